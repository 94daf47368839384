"""Drafts of one head a slot (Medusa, Hydra) against their formulas, written out for one slot and one number at a time.

Nothing of the package computes the expected values but the target's tables, which are read as plain numbers.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from specbench import fast
from specbench.blocks import with_anchors
from specbench.decoding.loop import Limits, decode, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.drafts.hydra import Hydra
from specbench.drafts.initialisation import first_weights
from specbench.drafts.medusa import Medusa
from specbench.losses.objective import Objective
from tests import tiny

IDS = torch.tensor([1, 2, 3, 5, 8, 13, 21, 34, 55, 89])


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def residual(w: dict[str, Tensor], name: str, x: list[float]) -> list[float]:
    weight, bias = w[f"{name}.linear.weight"].tolist(), w[f"{name}.linear.bias"].tolist()
    inner = [sum(a * b for a, b in zip(row, x, strict=True)) + c for row, c in zip(weight, bias, strict=True)]
    return [a + silu(b) for a, b in zip(x, inner, strict=True)]


def vocabulary(draft, slot: int, x: list[float]) -> list[float]:
    """Logits of one state by the slot's own table if there is one, then factor and cap."""
    w, tables = draft.state_dict(), draft.tables
    rows = w.get(f"vocabulary_heads.{slot}", tables.head).tolist()
    found = [tables.logit_scale * sum(a * b for a, b in zip(row, x, strict=True)) for row in rows]
    cap = tables.soft_cap
    return found if cap is None else [cap * math.tanh(z / cap) for z in found]


def medusa(draft, last: Tensor, tokens: Tensor, anchor: int) -> list[list[float]]:
    w, state, found = draft.state_dict(), last[anchor - 1].tolist(), []
    for slot in range(draft.block_size):
        x = state
        for i in range(draft.depth):
            x = residual(w, f"medusa_head.{slot}.{i}", x)
        found.append(vocabulary(draft, slot, x))
    return found


def hydra(draft, last: Tensor, tokens: Tensor, anchor: int) -> list[list[float]]:
    w, table, scale = draft.state_dict(), draft.tables.embedding.tolist(), draft.tables.embedding_scale
    found = []
    for slot in range(draft.block_size):
        joined = last[anchor - 1].tolist()
        for before in range(anchor, anchor + slot + 1):
            joined = joined + [scale * value for value in table[int(tokens[before])]]
        sides = []
        for part in ("linear", "shortcut"):
            weight, bias = (w[f"hydra_head.{slot}.0.{part}.{kind}"].tolist() for kind in ("weight", "bias"))
            sides.append(
                [sum(a * b for a, b in zip(r, joined, strict=True)) + c for r, c in zip(weight, bias, strict=True)]
            )
        x = [b + silu(a) for a, b in zip(*sides, strict=True)]
        for i in range(1, draft.depth):
            x = residual(w, f"hydra_head.{slot}.{i}", x)
        found.append(vocabulary(draft, slot, x))
    return found


TRANSCRIPTIONS = {"medusa": medusa, "hydra": hydra}


def varied(method: str, family: str, **settings):
    """A draft whose own heads differ, as they do once trained, and whose biases are not zero."""
    draft = tiny.draft(method, family, **settings)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in draft.named_parameters():
        if "vocabulary_heads" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return draft


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gemma2", {"depth": 2}), ("granite", {"own_heads": True})],
    ids=str,
)
@pytest.mark.parametrize("method", TRANSCRIPTIONS)
def test_logits_are_those_of_the_formulas(method: str, family: str, settings: dict) -> None:
    draft, sample = varied(method, family, **settings), tiny.samples(family)[1]
    batch = with_anchors(tiny.pack([sample]), None)
    with torch.no_grad():
        blocks = draft(batch)
        logits = draft.logits(blocks.hidden, blocks.previous)
    for anchor, n in ((int(batch.anchors[0, 4]), 4),):
        wanted = torch.tensor(TRANSCRIPTIONS[method](draft, sample.last, sample.tokens, anchor))
        torch.testing.assert_close(logits[0, n], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "reduced"])
@pytest.mark.parametrize("method", TRANSCRIPTIONS)
def test_own_heads_are_trained_alike_in_chunks_and_whole(method: str, ids: Tensor | None) -> None:
    """The fused objective against autograd on whole logits: values, and the gradient of every parameter."""
    found = []
    for chunked in (True, False):
        draft = varied(method, "qwen3", own_heads=True)
        if ids is not None:
            draft.tables = draft.tables.derive(ids=ids)
            for head in draft.vocabulary_heads:
                head.data = head.data[ids]
        batch = with_anchors(tiny.batch("qwen3"), 6)
        with fast.switched(chunked):
            objective = Objective(ce=0.7, tv=0.4, slot_weight={"power": 0.8}, chunk_rows=5)
            loss = objective(draft, tiny.target("qwen3").tables, draft(batch))
            loss.value.backward()
        found.append((loss.value.detach(), {name: p.grad for name, p in draft.named_parameters()}))
    (fused, gradients), (whole, others) = found
    torch.testing.assert_close(fused, whole, atol=1e-5, rtol=1e-5)
    assert {name for name in gradients if "vocabulary" in name} == {f"vocabulary_heads.{k}" for k in range(4)}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", TRANSCRIPTIONS)
def test_own_heads_decode_losslessly(method: str) -> None:
    owner, draft = tiny.target("qwen3"), varied(method, "qwen3", own_heads=True)
    prompts = [s.tokens[:5].tolist() for s in tiny.samples("qwen3", lengths=(9, 9))]
    limits = Limits(max_new_tokens=10, batch_size=2)
    own = {d.index: d.output_ids for d in decode(owner, prompts, Sampling(), limits)}
    done = list(speculative_decode(owner, draft, prompts, Sampling(), limits))
    assert {d.index: d.output_ids for d in done} == own
    assert all(len(d.output_ids) == 10 for d in speculative_decode(owner, draft, prompts, Sampling(1.0), limits))


@pytest.mark.parametrize(("kind", "copied"), [(Medusa, 6), (Hydra, 12)])
def test_heads_start_as_the_targets_own_on_its_state(kind: type, copied: int) -> None:
    """As published for Medusa: zero maps, and in the own heads the target's. So every slot first predicts the anchor
    itself, but for what Hydra's embeddings add: they start small, and are taken out here."""
    target = tiny.target("qwen3")
    for settings in ({}, {"own_heads": True}):
        draft = kind.for_target(target, mask_token_id=tiny.MASK, block_size=3, **settings)
        assert f"start=target, {copied} tensors" in draft.origin
        for name, parameter in draft.named_parameters():
            if "shortcut.weight" in name:
                embedded = parameter.data[:, target.tables.head.shape[1] :]
                assert 0.01 < float(embedded.std()) < 0.03
                embedded.zero_()
        batch = with_anchors(tiny.batch("qwen3"), 4)
        blocks = draft(batch)
        for b, n in (batch.anchors >= 0).nonzero().tolist():
            anchor = int(batch.anchors[b, n])
            wanted = batch.last[b, anchor - 1] @ target.tables.head.T
            for slot in draft.logits(blocks.hidden, blocks.previous)[b, n]:
                torch.testing.assert_close(slot, wanted, atol=1e-5, rtol=1e-5)
    begun = first_weights(draft, "random", target)
    heads = draft.medusa_head if kind is Medusa else draft.hydra_head
    assert begun.copied == [] and 0.01 < float(heads[0][0].linear.weight.detach().std()) < 0.03


def test_one_vocabulary_head_is_trained_or_every_slots_own() -> None:
    with pytest.raises(ValueError, match="own_heads=true and train_tables=true"):
        tiny.draft("medusa", "qwen3", own_heads=True, train_tables=True)
