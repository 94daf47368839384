"""The chunked objective against plain autograd on whole logits, finite differences and published values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from specbench.blocks import Blocks
from specbench.losses.objective import Objective
from specbench.models.embedding_head import Tables
from tests.heads import BASES, IDS, TERM_SETTINGS, WEIGHTS, D, K, assert_same, make, plainly

FIXTURE = Path(__file__).parent / "fixtures" / "dspark_losses.safetensors"


@pytest.mark.parametrize("terms", TERM_SETTINGS.values(), ids=TERM_SETTINGS)
@pytest.mark.parametrize("slot_weight", WEIGHTS, ids=str)
def test_chunks_equal_the_whole(terms, slot_weight):
    objective = Objective(**terms, slot_weight=slot_weight, chunk_rows=5)
    for ids in (None, IDS):
        for train_head, soft_cap in ((False, None), (True, 3.0)):
            draft, tables, blocks = make(ids=ids, train_head=train_head, soft_cap=soft_cap)
            expected = plainly(objective, draft, tables, blocks)
            assert_same(objective(draft, tables, blocks), expected, draft, blocks, 1e-12)


@pytest.mark.parametrize("terms", BASES.values(), ids=BASES)
@pytest.mark.parametrize("slot_weight", [{"exp": 4.0}, {"dpace": 0.5}], ids=str)
def test_chunks_equal_the_whole_with_a_loss_of_the_base_logits(terms, slot_weight):
    objective = Objective(**terms, slot_weight=slot_weight, chunk_rows=5)
    for ids in (None, IDS):
        draft, tables, blocks = make(ids=ids, train_head=True, soft_cap=3.0)
        expected = plainly(objective, draft, tables, blocks, progress=0.4)
        assert_same(objective(draft, tables, blocks, progress=0.4), expected, draft, blocks, 1e-12)


def test_base_and_final_loss_are_mixed_as_far_as_the_training_is():
    """The loss of each kind of logits computed alone, and their sum by hand; every slot has its weight in both."""

    class Base(nn.Module):
        def __init__(self, draft):
            super().__init__()
            self.draft, self.draft_vocabulary, self.confidence = draft, None, lambda *_: None
            self.features, self.project = draft.features, draft.project_base
            self.projection_parameters = draft.projection_parameters

    draft, tables, blocks = make()
    settings = {"ce": 0.3, "tv": 0.5, "slot_weight": {"exp": 4.0}}
    plain = Objective(**settings)
    final, base = (float(plain(one, tables, blocks).value) for one in (draft, Base(draft)))
    assert abs(final - base) > 0.1
    falling = Objective(**settings, base={"start": 0.8, "share": 0.5})
    for progress, weight in ((0.0, 0.8), (0.125, 0.6), (0.25, 0.4), (0.5, 0.0), (1.0, 0.0)):
        found = falling(draft, tables, blocks, progress=progress)
        assert float(found.value) == pytest.approx((1 - weight) * final + weight * base, abs=1e-12)
        assert float(found.weight) == float(plain(draft, tables, blocks).weight)
    added = Objective(**settings, base={"add": 0.7})(draft, tables, blocks, progress=0.3)
    assert float(added.value) == pytest.approx(final + 0.7 * base, abs=1e-12)


@pytest.mark.parametrize(
    "base", [{}, {"start": 1.0}, {"add": 0.0}, {"start": 1.0, "share": 0.0}, {"add": 1, "start": 1}]
)
def test_settings_of_the_base_loss_that_cannot_be(base):
    with pytest.raises(ValueError, match="objective base="):
        Objective(ce=1.0, base=base)


@pytest.mark.parametrize("terms", [TERM_SETTINGS["dspark"], TERM_SETTINGS["all"]], ids=["dspark", "all"])
def test_chunks_equal_the_whole_in_fp32_at_a_larger_vocabulary(terms):
    draft, tables, blocks = make(dtype=torch.float32, size=3001)
    objective = Objective(**terms, slot_weight={"exp": 4.0}, chunk_rows=7)
    expected = plainly(objective, draft, tables, blocks)
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


@pytest.mark.parametrize(
    "term", ["ce", "soft_ce", "kl", "softened kl", "reverse_kl", "js", "tv", "accept", "further", "feature", "all"]
)
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
        assert float(plainly(objective, draft, tables, blocks).mean) == pytest.approx(variant["loss"], abs=2e-6)
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


def test_logits_that_share_memory_with_features_survive():
    draft, _, blocks = make()
    draft.features, draft.project = (lambda hidden, previous: hidden), (lambda features: features)
    draft.projection_parameters, draft.confidence = list, lambda hidden, previous: None
    tables = Tables(torch.zeros(1, D), torch.eye(D, dtype=torch.float64))
    blocks = Blocks(blocks.hidden, blocks.target, blocks.previous, blocks.labels % D, blocks.mask)
    before = blocks.hidden.detach().clone()
    objective = Objective(tv=1.0, chunk_rows=4)
    assert_same(objective(draft, tables, blocks), plainly(objective, draft, tables, blocks), draft, blocks, 1e-12)
    assert torch.equal(blocks.hidden, before)
