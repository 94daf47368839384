"""What the objective promises beside its value: sums, chunks, validation, precision, errors, two ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from specbench.blocks import Blocks
from specbench.losses.fused import RowPass, _spans, _top
from specbench.losses.objective import Objective
from specbench.losses.terms import Blend, Combination
from tests.heads import IDS, TERM_SETTINGS, B, gradients, make, plainly


def test_sums_add_over_micro_batches():
    draft, tables, blocks = make()
    objective = Objective(ce=0.1, tv=0.9, slot_weight={"dpace": 0.5}, chunk_rows=4)
    whole = objective(draft, tables, blocks)
    rows = [Blocks(*(None if value is None else value[b : b + 1] for value in vars(blocks).values())) for b in range(B)]
    parts = [objective(draft, tables, row) for row in rows]
    torch.testing.assert_close(sum(p.value for p in parts), whole.value)
    torch.testing.assert_close(sum(p.weight for p in parts), whole.weight)
    for name in vars(whole.slots):
        torch.testing.assert_close(sum(getattr(p.slots, name) for p in parts), getattr(whole.slots, name))


def test_only_supervised_rows_reach_the_head_and_never_more_than_a_chunk():
    draft, tables, blocks = make()
    seen = []
    tables.logits = lambda hidden, plain=tables.logits: (seen.append(len(hidden)), plain(hidden))[1]
    Objective(ce=1.0, chunk_rows=6)(draft, tables, blocks)
    assert sum(draft.heights) == sum(seen) == int(blocks.mask.sum()) == 19
    assert max(draft.heights) <= 6


def test_what_lies_beyond_the_mask_changes_nothing():
    draft, tables, blocks = make()
    objective = Objective(ce=0.1, tv=0.9, confidence=1.0, slot_weight="first_failure")
    loss = objective(draft, tables, blocks)
    beyond = torch.where(blocks.mask[..., None], blocks.hidden, torch.full_like(blocks.hidden, 7.0))
    other = Blocks(beyond, blocks.target, blocks.previous, blocks.labels, blocks.mask)
    torch.testing.assert_close(objective(draft, tables, other).value, loss.value)


def test_validation_needs_no_gradient_and_gives_the_same_numbers():
    draft, tables, blocks = make()
    objective = Objective(ce=0.1, tv=0.9, confidence=1.0, slot_weight={"exp": 4.0}, chunk_rows=6)
    loss = objective(draft, tables, blocks)
    with torch.no_grad():
        quiet = objective(draft, tables, blocks)
    assert not quiet.value.requires_grad and loss.value.requires_grad
    torch.testing.assert_close(quiet.value, loss.value.detach())
    torch.testing.assert_close(quiet.slots.alpha, loss.slots.alpha)


def test_a_batch_without_supervision_costs_nothing_and_still_has_a_gradient():
    draft, tables, blocks = make(train_head=True)
    empty = Blocks(blocks.hidden, blocks.target, blocks.previous, blocks.labels, torch.zeros_like(blocks.mask))
    for terms in (TERM_SETTINGS["all"], TERM_SETTINGS["blend"], TERM_SETTINGS["dspark"]):
        loss = Objective(**terms)(draft, tables, empty)
        assert float(loss.value.detach()) == 0 and float(loss.weight) == 0 and float(loss.slots.blocks) == 0
        draft.zero_grad()
        loss.value.backward()
        assert all(not p.grad.any() for p in [*draft.w2.parameters(), draft.tables.head, draft.w1.weight])


def test_a_detached_confidence_trains_its_head_alone():
    draft, tables, blocks = make()

    def grad(**settings):
        draft.zero_grad()
        blocks.hidden.grad = None
        Objective(**settings)(draft, tables, blocks).value.backward()
        return {"own": draft.own.weight.grad, "w1": draft.w1.weight.grad, "hidden": blocks.hidden.grad}

    plain, through = grad(ce=1.0), grad(ce=1.0, confidence=1.0)
    cut = grad(ce=1.0, confidence=1.0, detach_confidence=True)
    assert plain["own"] is None and torch.equal(cut["own"], through["own"]) and cut["own"].any()
    for name in ("w1", "hidden"):
        torch.testing.assert_close(cut[name], plain[name])
        assert not torch.allclose(through[name], plain[name])


def test_reduced_vocabulary_counts_what_it_cannot_say():
    draft, tables, blocks = make(ids=IDS)
    slots = Objective(ce=1.0)(draft, tables, blocks).slots
    q = tables.logits(blocks.target[blocks.mask]).softmax(-1)
    torch.testing.assert_close(slots.outside.sum(), 1.0 * (1 - q[:, IDS].sum(-1)).sum())
    known = sum(int(label) in IDS for label in blocks.labels[blocks.mask])
    assert float(slots.labelled.sum()) == known < float(slots.count.sum())


def test_bf16_logits_are_judged_in_fp32():
    generator = torch.Generator().manual_seed(0)
    z, t = (torch.randn(9, 700, generator=generator).bfloat16() for _ in range(2))
    wide, labels, scale = z.float(), torch.arange(9), torch.rand(9, generator=generator)
    combination = Objective(**TERM_SETTINGS["all"]).combination
    passes = [RowPass(combination) for _ in range(2)]
    low, high = (one(logits, one.judge(t), labels, scale) for one, logits in zip(passes, (z, wide), strict=True))
    for name in low.terms:
        assert torch.equal(low.terms[name], high.terms[name])
    assert torch.equal(z, wide.bfloat16())


def test_bf16_parameters_are_summed_in_fp32():
    draft, tables, blocks = make(dtype=torch.float32, size=700)
    objective = Objective(ce=0.1, tv=0.9, kl=0.5, chunk_rows=1)
    draft, tables = draft.bfloat16(), tables.bfloat16()
    hidden = blocks.hidden.detach().bfloat16().requires_grad_()
    blocks = Blocks(hidden, blocks.target.bfloat16(), blocks.previous, blocks.labels, blocks.mask)
    loss, expected = objective(draft, tables, blocks), plainly(objective, draft, tables, blocks)
    assert loss.value.dtype == torch.float32
    torch.testing.assert_close(loss.value, expected.value, rtol=1e-3, atol=0)
    for a, b in zip(gradients(loss, draft, blocks), gradients(expected, draft, blocks), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() <= 0.02 * b.norm()  # bf16 keeps 8 bits


def test_a_second_backward_is_refused():
    draft, tables, blocks = make()
    loss = Objective(tv=1.0)(draft, tables, blocks)
    loss.value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        loss.value.backward()


def test_argmax_takes_the_first_of_equals():
    logits = torch.randint(0, 3, (64, 1300), generator=torch.Generator().manual_seed(0)).float()
    value, index = _top(logits, width=16)
    assert torch.equal(index, logits.argmax(-1)) and torch.equal(value, logits.amax(-1))
    logits[:, -1] = 9.0
    assert (_top(logits, width=16)[1] == 1299).all()


def test_disjoint_distributions_have_finite_loss_and_gradient():
    logits, target = torch.full((1, 600), -60.0), torch.full((1, 600), -60.0)
    logits[0, 0] = target[0, 1] = 60.0
    one = RowPass(Combination({"accept": 1.0, "kl": 1.0}, Blend(over="row")))
    rows = one(logits, one.judge(target), torch.tensor([1]), torch.ones(1))
    assert float(rows.terms["accept"]) == pytest.approx(-math.log(1e-10))
    assert logits.isfinite().all() and logits[0, 0] == pytest.approx(1.0 + 1.0)  # kl and its blend: p - q


def test_chunks_are_whole_blocks():
    spans = list(_spans([4, 0, 2, 1, 4, 7, 0], rows=6))
    assert [(r.start, r.stop, b.start, b.stop) for r, b in spans] == [(0, 6, 0, 3), (6, 11, 3, 5), (11, 18, 5, 7)]
    assert [(r.start, r.stop) for r, _ in _spans([], rows=6)] == [(0, 0)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "no term"),
        ({"ce": -1.0}, "ce=-1"),
        ({"ce": 1.0, "normalise": "tokens"}, "normalise"),
        ({"ce": 1.0, "chunk_rows": 0}, "chunk_rows"),
        ({"ce": 1.0, "slot_weight": {"expo": 4.0}}, "slot_weight"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        Objective(**settings)


def test_confidence_needs_a_head():
    draft, tables, blocks = make()
    draft.confidence = lambda hidden, previous: None
    with pytest.raises(ValueError, match="confidence head"):
        Objective(ce=1.0, confidence=1.0)(draft, tables, blocks)


class Step(nn.Module):
    def __init__(self, draft, tables, objective):
        super().__init__()
        self.draft, self.objective, self.tables = draft, objective, [tables]

    def forward(self, blocks):
        return self.objective(self.draft, self.tables[0], blocks)


def _rank(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    objective = Objective(ce=0.1, tv=0.9, confidence=1.0, slot_weight={"dpace": 0.5}, chunk_rows=4)
    alone, tables, blocks = make()
    objective(alone, tables, blocks).mean.backward()
    draft, tables, blocks = make()
    step = DistributedDataParallel(Step(draft, tables, objective))
    loss = step(Blocks(*(None if v is None else v[rank : rank + 1] for v in vars(blocks).values())))
    weight = loss.weight.clone()
    dist.all_reduce(weight)
    (2 * loss.value / weight).backward()
    for (name, parameter), expected in zip(draft.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)
    dist.destroy_process_group()


def test_two_ranks_give_the_gradient_of_one(tmp_path):
    mp.start_processes(_rank, (tmp_path / "rendezvous",), nprocs=2, start_method="spawn")
