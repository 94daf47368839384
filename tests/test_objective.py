"""The chunked objective against plain autograd on whole logits, against published values, and against its promises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from specbench.blocks import Blocks
from specbench.chunks import _spans
from specbench.losses import Blend
from specbench.objective import Objective
from specbench.oracle import reference_objective
from specbench.rowpass import RowPass, _top
from specbench.tables import Tables

FIXTURE = Path(__file__).parent / "fixtures" / "dspark_losses.safetensors"
B, N, K, D, R, V = 2, 5, 4, 6, 3, 17
IDS = [0, 2, 3, 5, 8, 9, 11, 16]


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Draft(nn.Module):
    """A head like DSpark's with a bias on top, so that autograd and the accumulators both have work."""

    def __init__(self, ids=None, train_head=False, soft_cap=None, dtype=torch.float64, size=V):
        super().__init__()
        head = torch.randn(size, D, dtype=dtype)
        ids = None if ids is None else torch.tensor(ids)
        rows = head if ids is None else head[ids]
        self.tables = Tables(torch.randn(size, D, dtype=dtype), rows, soft_cap=soft_cap, trainable=train_head, ids=ids)
        self.w1, self.w2 = nn.Embedding(size, R, dtype=dtype), nn.Linear(R, len(rows), dtype=dtype)
        self.own = nn.Linear(D + R, 1, dtype=dtype)
        self.heights = []

    @property
    def draft_vocabulary(self):
        return self.tables.ids

    def features(self, hidden, previous):
        return torch.cat([hidden, self.w1(previous)], -1)

    def project(self, features):
        self.heights.append(len(features))
        return self.tables.logits(features[:, :D]) + self.w2(features[:, D:])

    def projection_parameters(self):
        return [*self.w2.parameters(), *([self.tables.head] if self.tables.trainable else [])]

    def confidence(self, hidden, previous):
        return self.own(self.features(hidden, previous)).squeeze(-1)


def make(seed=0, dtype=torch.float64, size=V, **settings):
    torch.manual_seed(seed)
    draft = Draft(dtype=dtype, size=size, **settings)
    cap = settings.get("soft_cap")
    tables = Tables(torch.randn(size, D, dtype=dtype), torch.randn(size, D, dtype=dtype), soft_cap=cap)
    hidden = torch.randn(B, N, K, D, dtype=dtype, requires_grad=True)
    mask = torch.arange(K) < torch.tensor([[4, 0, 2, 1, 4], [3, 4, 0, 0, 1]])[..., None]
    previous, labels = torch.randint(0, size, (2, B, N, K))
    return draft, tables, Blocks(hidden, torch.randn(B, N, K, D, dtype=dtype), previous, labels, mask)


def gradients(loss, draft, blocks):
    leaves = [blocks.hidden, *(p for p in draft.parameters() if p.requires_grad)]
    found = torch.autograd.grad(1.3 * loss.value, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def assert_same(loss, expected, draft, blocks, tolerance):
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(loss.value, expected.value, **close)
    torch.testing.assert_close(loss.weight, expected.weight, **close)
    assert loss.terms.keys() == expected.terms.keys()
    for term in loss.terms:
        torch.testing.assert_close(loss.terms[term], expected.terms[term], **close)
    for name in vars(expected.slots):
        torch.testing.assert_close(getattr(loss.slots, name), getattr(expected.slots, name), **close)
    for a, b in zip(gradients(loss, draft, blocks), gradients(expected, draft, blocks), strict=True):
        torch.testing.assert_close(a, b, **close)


TERM_SETTINGS = {
    "ce": {"ce": 0.7},
    "soft_ce": {"soft_ce": 0.7},
    "kl": {"kl": 0.7},
    "reverse_kl": {"reverse_kl": 0.7},
    "js": {"js": 0.7},
    "tv": {"tv": 0.7},
    "accept": {"accept": 0.7},
    "blend": {"blend": {"scale": 0.9, "decay": 2.0}},
    "blend by row": {"blend": {"decay": 2.0, "over": "row"}, "ce": 0.1},
    "dspark": {"ce": 0.1, "tv": 0.9, "confidence": 1.0},
    "detached": {"ce": 0.1, "confidence": 1.0, "detach_confidence": True},
    "confidence": {"confidence": 0.5},
    "all": {"ce": 0.1, "soft_ce": 0.2, "kl": 0.3, "reverse_kl": 0.4, "js": 0.5, "tv": 0.6, "accept": 0.7},
}
WEIGHTS = ["uniform", {"exp": 4.0}, {"power": 0.8}, {"dpace": 0.5}, "first_failure"]


@pytest.mark.parametrize("terms", TERM_SETTINGS.values(), ids=TERM_SETTINGS)
@pytest.mark.parametrize("slot_weight", WEIGHTS, ids=str)
def test_chunks_equal_the_whole(terms, slot_weight):
    objective = Objective(**terms, slot_weight=slot_weight, chunk_rows=5)
    for ids in (None, IDS):
        for train_head, soft_cap in ((False, None), (True, 3.0)):
            draft, tables, blocks = make(ids=ids, train_head=train_head, soft_cap=soft_cap)
            expected = reference_objective(objective, draft, tables, blocks)
            assert_same(objective(draft, tables, blocks), expected, draft, blocks, 1e-12)


@pytest.mark.parametrize("terms", [TERM_SETTINGS["dspark"], TERM_SETTINGS["all"]], ids=["dspark", "all"])
def test_chunks_equal_the_whole_in_fp32_at_a_larger_vocabulary(terms):
    draft, tables, blocks = make(dtype=torch.float32, size=3001)
    objective = Objective(**terms, slot_weight={"exp": 4.0}, chunk_rows=7)
    expected = reference_objective(objective, draft, tables, blocks)
    assert_same(objective(draft, tables, blocks), expected, draft, blocks, 1e-5)


class Fresh(torch.autograd.Function):
    """The objective as a function of hidden states and Markov weights that may be differentiated again and again."""

    @staticmethod
    def forward(ctx, objective, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        ctx.objective = objective
        return Fresh.run(objective, hidden, weight)[0].detach()

    @staticmethod
    def backward(ctx, outer):
        with torch.enable_grad():
            value, leaves = Fresh.run(ctx.objective, *ctx.saved_tensors)
            return None, *torch.autograd.grad(value, leaves, outer)

    @staticmethod
    def run(objective, hidden, weight):
        draft, tables, blocks = make(ids=IDS, soft_cap=3.0)
        hidden, draft.w2.weight = hidden.detach().requires_grad_(), nn.Parameter(weight.detach().clone())
        blocks = Blocks(hidden, blocks.target, blocks.previous, blocks.labels, blocks.mask)
        return objective(draft, tables, blocks).value, (hidden, draft.w2.weight)


@pytest.mark.parametrize("term", ["ce", "soft_ce", "kl", "reverse_kl", "js", "tv", "accept", "all"])
def test_gradients_by_finite_differences(term):
    draft, _, blocks = make(ids=IDS, soft_cap=3.0)
    objective = Objective(**TERM_SETTINGS[term], slot_weight={"exp": 4.0}, chunk_rows=3)
    leaves = (blocks.hidden.detach().requires_grad_(), draft.w2.weight.detach().requires_grad_())
    assert torch.autograd.gradcheck(lambda *x: Fresh.apply(objective, *x), leaves, eps=1e-6, atol=1e-6, fast_mode=True)


def test_published_losses_and_acceptance():
    """Values that the released toolkit gave for these hidden states (DSpark, Markov head of rank 16)."""
    with safe_open(FIXTURE, "pt") as file:
        data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expected = json.loads(file.metadata()["expected"])

    class Published(nn.Module):
        draft_vocabulary = None

        def features(self, hidden, previous):
            return torch.cat([hidden, data["w1"][previous]], -1)

        def project(self, features):
            hidden, latent = features.split([64, 16], -1)
            return hidden @ data["head"].T + latent @ data["w2"].T

        def projection_parameters(self):
            return []

        def confidence(self, hidden, previous):
            return data["confidence"]

    tables, draft = Tables(data["head"], data["head"]), Published()
    index = [data[name].long() for name in ("previous", "labels")]
    blocks = Blocks(data["hidden"], data["target"], *index, data["mask"].bool())
    for variant in expected["variants"]:
        g = variant["loss_decay_gamma"]
        objective = Objective(
            ce=variant["ce_loss_alpha"],
            tv=variant["l1_loss_alpha"],
            confidence=variant["confidence_head_alpha"],
            slot_weight="uniform" if g is None else {"exp": g},
            chunk_rows=20,
        )
        loss = objective(draft, tables, blocks)
        assert float(loss.mean) == pytest.approx(variant["loss"], abs=2e-6)
        assert float(reference_objective(objective, draft, tables, blocks).mean) == pytest.approx(
            variant["loss"], abs=2e-6
        )
    slots = loss.slots
    assert (slots.alpha / slots.count).tolist() == pytest.approx(expected["accept_rate"], abs=1e-6)
    assert float(slots.expected_length / slots.blocks) == pytest.approx(expected["tau"], abs=1e-5)


def test_eagle3_normalisation_divides_by_positions():
    draft, tables, blocks = make()
    parity = Objective(soft_ce=1, slot_weight={"power": 0.8}, normalise="positions")
    own = Objective(soft_ce=1, slot_weight={"power": 0.8})
    loss, by_weight = parity(draft, tables, blocks, positions=64), own(draft, tables, blocks)
    assert float(loss.weight) == 64 and torch.equal(loss.value, by_weight.value)
    expected = sum(0.8**k * int(blocks.mask[..., k].sum()) for k in range(K))
    assert float(by_weight.weight) == pytest.approx(expected)
    with pytest.raises(ValueError, match="positions"):
        parity(draft, tables, blocks)


def test_sums_add_over_micro_batches():
    draft, tables, blocks = make()
    objective = Objective(ce=0.1, tv=0.9, slot_weight={"dpace": 0.5}, chunk_rows=4)
    whole = objective(draft, tables, blocks)
    rows = [Blocks(*(value[b : b + 1] for value in vars(blocks).values())) for b in range(B)]
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
    coefficients = Objective(**TERM_SETTINGS["all"]).coefficients
    low, high = (RowPass(coefficients)(logits, t, labels, scale) for logits in (z, wide))
    for name in low.terms:
        assert torch.equal(low.terms[name], high.terms[name])
    assert torch.equal(z, wide.bfloat16())


def test_bf16_parameters_are_summed_in_fp32():
    draft, tables, blocks = make(dtype=torch.float32, size=700)
    objective = Objective(ce=0.1, tv=0.9, kl=0.5, chunk_rows=1)
    draft, tables = draft.bfloat16(), tables.bfloat16()
    hidden = blocks.hidden.detach().bfloat16().requires_grad_()
    blocks = Blocks(hidden, blocks.target.bfloat16(), blocks.previous, blocks.labels, blocks.mask)
    loss, expected = objective(draft, tables, blocks), reference_objective(objective, draft, tables, blocks)
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


def test_logits_that_share_memory_with_features_survive():
    draft, _, blocks = make()
    draft.features, draft.project = (lambda hidden, previous: hidden), (lambda features: features)
    draft.projection_parameters, draft.confidence = list, lambda hidden, previous: None
    tables = Tables(torch.zeros(1, D), torch.eye(D, dtype=torch.float64))
    blocks = Blocks(blocks.hidden, blocks.target, blocks.previous, blocks.labels % D, blocks.mask)
    before = blocks.hidden.detach().clone()
    objective = Objective(tv=1.0, chunk_rows=4)
    assert_same(
        objective(draft, tables, blocks), reference_objective(objective, draft, tables, blocks), draft, blocks, 1e-12
    )
    assert torch.equal(blocks.hidden, before)


def test_argmax_takes_the_first_of_equals():
    logits = torch.randint(0, 3, (64, 1300), generator=torch.Generator().manual_seed(0)).float()
    value, index = _top(logits, width=16)
    assert torch.equal(index, logits.argmax(-1)) and torch.equal(value, logits.amax(-1))
    logits[:, -1] = 9.0
    assert (_top(logits, width=16)[1] == 1299).all()


def test_disjoint_distributions_have_finite_loss_and_gradient():
    logits, target = torch.full((1, 600), -60.0), torch.full((1, 600), -60.0)
    logits[0, 0] = target[0, 1] = 60.0
    rows = RowPass({"accept": 1.0, "kl": 1.0}, Blend(over="row"))(logits, target, torch.tensor([1]), torch.ones(1))
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
    loss = step(Blocks(*(value[rank : rank + 1] for value in vars(blocks).values())))
    weight = loss.weight.clone()
    dist.all_reduce(weight)
    (2 * loss.value / weight).backward()
    for (name, parameter), expected in zip(draft.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)
    dist.destroy_process_group()


def test_two_ranks_give_the_gradient_of_one(tmp_path):
    mp.start_processes(_rank, (tmp_path / "rendezvous",), nprocs=2, start_method="fork")
