"""Drafts of one head a slot (Medusa, Hydra) against their formulas, written out for one slot and one number at a time.

Nothing of the package computes the expected values but the target's tables, which are read as plain numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from specbench import fast
from specbench.blocks import with_anchors
from specbench.checkpoints.config_keys import FormatError
from specbench.checkpoints.draft_folder import build_draft, export_draft, load_draft, save_draft
from specbench.decoding.loop import Limits, decode, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.drafts.hydra import Hydra
from specbench.drafts.initialisation import first_weights
from specbench.drafts.medusa import Medusa
from specbench.losses.objective import Objective
from tests import tiny
from tests.test_interchange import made

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


def trained_logits(draft) -> Tensor:
    batch = with_anchors(tiny.batch("qwen3"), 4)
    with torch.no_grad():
        blocks = draft(batch)
        return draft.logits(blocks.hidden, blocks.previous)[blocks.mask]


def released(draft) -> tuple[dict, dict[str, Tensor]]:
    """config.json and tensors of the release's format, from the draft's own tensors."""
    tensors, own = draft.state_dict(), draft.depth
    held = {name: t for name, t in tensors.items() if name.startswith("medusa_head.")}
    held |= {f"medusa_head.{k}.{own}.weight": tensors[f"vocabulary_heads.{k}"] for k in range(draft.block_size)}
    config = {"medusa_num_heads": 4, "medusa_num_layers": own, "base_model_name_or_path": "me/target"}
    return config | {"transformers_version": "4.35.0"}, held


@pytest.mark.parametrize("prefix", ["medusa_head.", ""])
def test_heads_in_the_format_of_the_release_load(prefix: str) -> None:
    tables, draft = tiny.target("qwen3").tables, varied("medusa", "qwen3", own_heads=True, depth=2)
    config, held = released(draft)
    held = {prefix + name.removeprefix("medusa_head."): t for name, t in held.items()}
    loaded = build_draft(config, held, tables)
    assert loaded.settings["own_heads"] and (loaded.block_size, loaded.depth) == (4, 2)
    assert torch.equal(trained_logits(loaded), trained_logits(draft))
    with pytest.raises(FormatError, match="medusa_choices"):
        build_draft(config | {"medusa_choices": 63}, held, tables)
    with pytest.raises(FormatError, match=r"unknown \['medusa_head.0.1.norm'\]"):
        build_draft(config, held | {"medusa_head.0.1.norm": torch.ones(2)}, tables)
    held.pop(f"{prefix}3.2.weight")
    with pytest.raises(FormatError, match=r"missing \['vocabulary_heads.3'\]"):
        build_draft(config, held, tables)


def test_heads_of_a_reduced_vocabulary_are_refused_for_vllm(tmp_path: Path) -> None:
    draft, kept, config = made("medusa", own_heads=True, ids=IDS)
    save_draft(draft, tmp_path / "own", config, kept)
    with pytest.raises(FormatError, match="whole vocabulary only"):
        export_draft(tmp_path / "own", tmp_path / "out", "vllm", tables=tiny.target("qwen3").tables)
    assert not (tmp_path / "out").exists()


# A vocabulary head of each slot has the whole vocabulary there.
@pytest.mark.parametrize(
    ("own", "ids"), [(True, None), (False, None), (False, IDS)], ids=["own-whole", "shared-whole", "shared-reduced"]
)
def test_vllm_reads_the_same_logits(own: bool, ids: Tensor | None, tmp_path: Path) -> None:
    """vLLM's steps from the written folder: x + SiLU(layer(x)), one table or one a head, ids by token_map."""
    draft, kept, config = made("medusa", own_heads=own, ids=ids)
    for name, parameter in draft.named_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    save_draft(draft, tmp_path / "own", config, kept)
    out = export_draft(tmp_path / "own", tmp_path / "out", "vllm", tables=tiny.target("qwen3").tables)
    written, held = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert written["architectures"] == ["MedusaModel"] and written["num_heads"] == 4
    assert written["truncated_vocab_size"] == (96 if ids is None else 10) and ("token_map" in held) == (ids is not None)
    sample = tiny.samples("qwen3")[0]
    batch = with_anchors(tiny.pack([sample]), None)
    with torch.no_grad():
        blocks = draft(batch)
        found = draft.logits(blocks.hidden, blocks.previous)[0, 3]
    for k in range(written["num_heads"]):
        x = sample.last[int(batch.anchors[0, 3]) - 1]
        for i in range(written["num_hidden_layers"]):
            y = held[f"blocks.{k}.layers.{i}.weight"] @ x + held[f"blocks.{k}.layers.{i}.bias"]
            x = x + y * torch.sigmoid(y)
        table = held[f"lm_heads.{0 if written['original_lm_head'] else k}.weight"]
        torch.testing.assert_close(found[k], table @ x, atol=1e-4, rtol=1e-4)
    loaded = load_draft(out, tiny.target("qwen3").tables)
    assert torch.equal(trained_logits(loaded), trained_logits(draft))
    assert (loaded.draft_vocabulary is None) == (ids is None)
    for form in ("deepspec", "sglang"):
        with pytest.raises(FormatError, match="format=vllm or specbench"):
            export_draft(tmp_path / "own", tmp_path / form, form)


def test_one_vocabulary_head_is_trained_or_every_slots_own() -> None:
    with pytest.raises(ValueError, match="own_heads=true and train_tables=true"):
        tiny.draft("medusa", "qwen3", own_heads=True, train_tables=True)
