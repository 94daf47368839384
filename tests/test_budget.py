"""Training budgets: expected slots and operations of a step, held against real batches and torch's counter."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from experiments import train
from specbench.blocks import with_anchors
from specbench.cli import allotments
from specbench.cli.allotments import budget_of, sized
from specbench.cli.assembly import composed, draft_without_weights, target_config
from specbench.cli.config_groups import configs, options
from specbench.cli.settings import check_settings
from specbench.losses.objective import Objective
from specbench.runs.run_folder import read_summary
from specbench.training.budget import Budget, ExpectedCost, conversation_cost, slots_per_anchor
from specbench.training.draft_training import trainable_parameters
from specbench.training.memory_estimate import flops_of
from tests import tiny
from tests.pipeline import prepare

with configs("configs"):
    PROTOCOLS = options("protocol")


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
    cost = conversation_cost(draft, np.array(lengths), np.array(lengths) - 4)
    assert 3 * cost.tokens == pytest.approx(slots)


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
    few, every = (conversation_cost(draft, lengths[:n], supervised[:n]) for n in (3000, 64))
    assert few.flops == pytest.approx(every.flops, rel=0.25)
    by_hand = np.mean([flops_of(draft, int(n), min(int(n) - 11, draft.anchors_per_sample)) for n in lengths[:200]])
    assert conversation_cost(draft, lengths[:200], supervised[:200]).flops == pytest.approx(by_hand, rel=0.02)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_is_a_budget_within_its_range(name):
    cfg = composed("train", [f"protocol={name}"])
    check_settings("train", cfg)
    budget, steps = budget_of(cfg), budget_of(cfg).steps(ExpectedCost(tokens=100.0, flops=1e9), 0.5)
    assert steps is None if name in ("published", "matched_parameters", "matched_round") else steps >= 1
    assert budget.name == name and budget.of_size == (name in ("matched_parameters", "matched_round"))


def test_hours_are_those_of_the_measured_steps():
    budget = Budget("h", "hours", 0.5)
    assert budget.steps(ExpectedCost(1.0, 1.0), seconds=3.0) == 600
    with pytest.raises(ValueError, match="the seconds of a step of this draft were not measured"):
        budget.steps(ExpectedCost(1.0, 1.0))
    with pytest.raises(ValueError, match=r"protocol.quantity=steps protocol.amount=null: give an amount"):
        Budget("b", "steps", None)
    own = Budget("published", "recipe", 3.0)
    assert own.steps(ExpectedCost(1.0, 1.0)) is None and "protocol.amount=3 has no effect" in own.text


def test_a_draft_is_as_deep_as_fits():
    """Costs of 10 + 4 n for n layers."""
    deep = {amount: Budget("p", "parameters", amount).layers(14.0, 22.0, 2) for amount in (14, 17.9, 18, 50)}
    assert deep == {14: 1, 17.9: 1, 18: 2, 50: 10}
    with pytest.raises(ValueError, match="a draft of one layer has 14 trained parameters"):
        Budget("p", "parameters", 13).layers(14.0, 22.0, 2)
    with pytest.raises(ValueError, match="repeat it on a quiet machine"):
        Budget("r", "round_share", 1).layers(0.5, 0.4, 2)


def test_a_budget_beyond_every_training_is_refused():
    assert Budget("p", "parameters", 10 + 4 * 256).layers(14.0, 22.0, 2) == 256
    with pytest.raises(ValueError, match=r"a draft of 1e\+05 layers fits, .* at most 256; give at most 1.03e\+03"):
        Budget("p", "parameters", 4e5).layers(14.0, 22.0, 2)
    assert Budget("s", "steps", 1e9).steps(ExpectedCost(1.0, 1.0)) == 10**9
    with pytest.raises(ValueError, match=r"these are 5e\+29 optimiser steps .* give at most 2e\+09"):
        Budget("f", "flops", 1e30).steps(ExpectedCost(1.0, 2.0))


@pytest.mark.parametrize("method", ["dspark", "eagle3"])
def test_equal_parameters_make_the_deepest_draft_that_fits(method):
    cfg = sized(composed("train", [f"method={method}", "protocol=matched_parameters", "protocol.amount=2e6"]))

    def trained(more):
        own = OmegaConf.merge(cfg, {"method": {"draft": {"layers": cfg.method.draft.layers + more}}})
        return trainable_parameters(draft_without_weights(own.method, own.target, target_config(own.target)))

    assert trained(0) <= 2e6 < trained(1)


def test_a_time_is_measured_once_and_decides_the_depth(tmp_path, monkeypatch):
    """A proposal costs 2 + n for n layers against 10 for the target: a share of 0.65 fits four layers."""
    words = [f"root={tmp_path}", "method=mtp", "protocol=matched_round", "protocol.amount=0.65"]
    asked = []

    def rounds(cfg, key):
        asked.append(key)
        return {"rounds": [{"draft": 2.0 + n, "target": 10.0} for n in (1, 1 + allotments.MORE)]}

    monkeypatch.setattr(allotments, "_rounds", rounds)
    assert sized(composed("train", words)).method.draft.layers == 4
    assert sized(composed("train", [*words, "seed.init=1"])).method.draft.layers == 4
    seconds = ["protocol.quantity=round_seconds", "protocol.amount=14"]
    assert sized(composed("train", [*words, *seconds])).method.draft.layers == 2
    assert asked == ["layers"]  # seeds and amounts share the measurement
    sized(composed("train", [*words, "method.draft.block_size=3"]))
    assert len(asked) == 2


def test_hours_and_rounds_are_measured_on_real_steps_and_rounds(tmp_path):
    words = [*prepare(tmp_path), "evaluate=false", "method=mtp", "trainer.probe.every=null"]
    cfg = composed("train", [*words, "protocol=matched_hours"])
    data = train.open_data(cfg, None)
    seconds = allotments.seconds_of_a_step(cfg, data, needed=True)
    assert 0 < seconds < 60 and seconds == allotments.seconds_of_a_step(cfg, data, needed=False)
    cfg = composed("train", [*words, "protocol=matched_hours", f"protocol.amount={3.5 * seconds / 3600}"])
    summary = read_summary(train.run(cfg))
    assert summary["steps"] == 3 and 0 < summary["training_seconds"] < 60
    assert summary["training_flops"] == pytest.approx(3 * train.allotted(cfg).cost.flops)
    found = allotments._rounds(composed("train", words), "layers")["rounds"]
    assert all(one["draft"] > 0 and one["target"] > 0 for one in found) and len(found) == 2
