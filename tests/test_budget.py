"""Training budgets: expected slots and operations of a step, held against real batches and torch's counter."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from specbench.blocks import with_anchors
from specbench.cli.assembly import composed
from specbench.cli.settings import check_settings
from specbench.losses.objective import Objective
from specbench.training.budget import Budget, ExpectedCost, slots_per_anchor, step_cost
from specbench.training.memory_estimate import flops_of
from tests import tiny


@pytest.mark.parametrize("anchors", [0, 1, 3, 4, 5, 30])
def test_slots_of_an_anchor_by_counting(anchors):
    counted = [min(left, 4) for left in range(1, anchors + 1)]
    assert slots_per_anchor(anchors, 4) == pytest.approx(np.mean(counted) if counted else 0)


@pytest.mark.parametrize("method", ["dflash", "dspark", "eagle3", "mtp"])
def test_tokens_of_a_step_are_the_supervised_slots_of_its_batches(method):
    """With every anchor, the expectation is exact: all blocks of conversations that are supervised from token 4 on."""
    draft, lengths = tiny.draft(method, "qwen3"), (24, 17, 9)
    batch = with_anchors(tiny.batch("qwen3", lengths=lengths), None)
    with torch.no_grad():
        slots = int(draft(batch).mask.sum())
    draft.anchors_per_sample = None
    cost = step_cost(draft, np.array(lengths), np.array(lengths) - 4, 3)
    assert cost.tokens == pytest.approx(slots)


@pytest.mark.parametrize("method", ["dflash", "dspark", "eagle3", "mtp"])
def test_operations_of_a_step_are_near_those_that_torch_counts(method):
    """Forward and backward pass of draft and whole-logits loss. The estimate counts the target's logits of every slot;
    the loss computes them once a distinct state, which is fewer, so the estimate may be higher but not lower."""
    draft, length = tiny.draft(method, "qwen3").train(), 60
    batch = with_anchors(tiny.batch("qwen3", lengths=(length,)), None)
    objective = Objective(ce=0.5, tv=0.5, slot_weight="uniform")
    with FlopCounterMode(display=False) as counter:
        objective(draft, tiny.target("qwen3").tables, draft(batch)).value.backward()
    anchors = int((batch.anchors >= 0).sum())
    assert 0.9 < flops_of(draft, length, anchors) / counter.get_total_flops() < 1.4


def test_a_budget_gives_each_method_its_steps():
    cheap, dear = ExpectedCost(tokens=1000.0, flops=2e9), ExpectedCost(tokens=1000.0, flops=6e9)
    assert [Budget("b", "flops", 6e10).steps(cost) for cost in (cheap, dear)] == [30, 10]
    assert [Budget("b", "tokens", 6e4).steps(cost) for cost in (cheap, dear)] == [60, 60]
    assert Budget("b", "steps", 7).steps(cheap) == 7
    with pytest.raises(
        ValueError, match=r"protocol.amount=1e\+09: one optimiser step of this draft takes 6e\+09 flops"
    ):
        Budget("b", "flops", 1e9).steps(dear)


def test_the_sample_of_conversations_stands_for_all():
    draft = tiny.draft("dspark", "qwen3")
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 200, 3000)
    supervised = lengths - 10
    few, every = (step_cost(draft, lengths[:n], supervised[:n], 8) for n in (3000, 64))
    assert few.flops == pytest.approx(every.flops, rel=0.25)
    by_hand = np.mean([flops_of(draft, int(n), min(int(n) - 11, draft.anchors_per_sample)) for n in lengths[:200]])
    assert step_cost(draft, lengths[:200], supervised[:200], 8).flops == pytest.approx(8 * by_hand, rel=0.02)


@pytest.mark.parametrize("name", ["matched_steps", "matched_tokens", "matched_flops"])
def test_every_protocol_is_a_budget_within_its_range(name):
    cfg = composed("train", [f"protocol={name}"])
    check_settings("train", cfg)
    assert Budget(**cfg.protocol).steps(ExpectedCost(tokens=100.0, flops=1e9)) >= 1
