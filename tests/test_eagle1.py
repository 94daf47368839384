"""EAGLE-1 and HASS against their formulas: the chain's logits, which steps are trained, and the regression loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specbench import fast
from specbench.blocks import with_anchors
from specbench.checkpoints.config_keys import FormatError
from specbench.checkpoints.draft_folder import build_draft, export_draft, load_draft, save_draft, taps_of
from specbench.checkpoints.model_card import serving_command
from specbench.losses.objective import Objective
from tests import published, tiny, transcriptions
from tests.test_interchange import made


@pytest.mark.parametrize(("backbone", "bias"), [("qwen3", True), ("llama", False)])
def test_logits_are_those_of_the_formulas(backbone: str, bias: bool) -> None:
    draft = tiny.draft("eagle1", "qwen3", layers=1, backbone=backbone, fc_bias=bias)
    if bias:
        draft.fc.bias.data.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    sample = tiny.samples("qwen3")[0]
    batch = with_anchors(tiny.pack([sample]), None)
    held = draft.state_dict() | {"embed_tokens.weight": draft.tables.embedding, "lm_head.weight": draft.tables.head}
    assert not {"norm.weight", "layers.0.input_layernorm.weight"} & set(held) and ("fc.bias" in held) == bias
    c = published.FACTS | {"rope_theta": draft.backbone.rope_theta, "rms_norm_eps": draft.backbone.norm_eps}
    with torch.no_grad():
        blocks = draft(batch)
        found = draft.logits(blocks.hidden, blocks.previous)[0]
    for n in (1, 7):
        anchor = int(batch.anchors[0, n])
        wanted = transcriptions.eagle1(c, held, sample.last, sample.tokens, anchor, draft.block_size)
        torch.testing.assert_close(found[n], wanted, atol=1e-4, rtol=1e-4)


def test_its_published_form_gives_the_formulas_logits(tmp_path: Path) -> None:
    """Out to SGLang's folder, whose tensors the transcription reads; in again, also under the name of the release."""
    draft, kept, config = made("eagle1", backbone="llama")
    draft.fc.bias.data.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    save_draft(draft, tmp_path / "own", config, kept)
    out = export_draft(tmp_path / "own", tmp_path / "out", "sglang")
    written, held = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert written["architectures"] == ["LlamaForCausalLMEagle"] and written["num_hidden_layers"] == 1
    layer = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    layer += ("mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
    assert set(held) == {"fc.weight", "fc.bias", *(f"layers.0.{name}.weight" for name in layer)}
    tables = tiny.target("qwen3").tables
    whole = held | {"embed_tokens.weight": tables.embedding, "lm_head.weight": tables.head}
    c = published.FACTS | {"rope_theta": draft.backbone.rope_theta, "rms_norm_eps": draft.backbone.norm_eps}
    sample = tiny.samples("qwen3")[0]
    batch = with_anchors(tiny.pack([sample]), None)
    as_released = {**written, "architectures": ["LlamaForCausalLM"]}
    loaded = [
        load_draft(out, tables),
        build_draft(as_released, held | {"embed_tokens.weight": tables.embedding}, tables),
    ]
    for one in (draft, *loaded):
        with torch.no_grad():
            blocks = one.eval()(batch)
            found = one.logits(blocks.hidden, blocks.previous)[0, 3, :4]  # the folder's chain has 7 steps
        wanted = transcriptions.eagle1(c, whole, sample.last, sample.tokens, int(batch.anchors[0, 3]), 4)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert taps_of(out) == [0]  # none are read; a target is loaded with at least one
    (out / "config.json").write_text(json.dumps(as_released))
    assert taps_of(out) == [0]
    unbiased = {name: t for name, t in held.items() if name != "fc.bias"}
    assert build_draft({**written, "bias": False}, unbiased, tables).fc.bias is None
    with pytest.raises(FormatError, match=r"missing \['fc.bias'\]"):
        build_draft(written, unbiased, tables)
    with pytest.raises(FormatError, match="hot_vocab_size"):
        build_draft({**written, "hot_vocab_size": 16}, held, tables)


def test_vllms_form_is_the_same_draft_without_a_bias(tmp_path: Path) -> None:
    draft, kept, config = made("eagle1", backbone="llama", fc_bias=False)
    save_draft(draft, tmp_path / "own", config, kept)
    out = export_draft(tmp_path / "own", tmp_path / "out", "vllm")
    written, held = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    # vLLM reads EagleLlamaForCausalLM from this name, and `bias` as biases of the attention.
    assert (written["architectures"], written["bias"]) == (["LlamaForCausalLM"], False)
    assert written["max_position_embeddings"] and "fc.bias" not in held
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(held)
    back, batch = load_draft(out, tiny.target("qwen3").tables), with_anchors(tiny.batch("qwen3"), 3)
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(batch).hidden[:, :, :4], draft.eval()(batch).hidden[:, :, :4])
    asked = {"method": "eagle", "model": "DRAFT", "num_speculative_tokens": 7}
    assert serving_command("DRAFT", "vllm", "T", written) == f"vllm serve T --speculative-config '{json.dumps(asked)}'"


@pytest.mark.parametrize(
    ("form", "settings", "reason"),
    [
        ("sglang", {}, "backbone=llama"),
        ("sglang", {"backbone": "llama", "fc_bias": False}, "SGLang 0.5.23 has a bias .*fc_bias=true"),
        ("vllm", {"backbone": "llama"}, "vLLM 0.32.0 has no bias .*fc_bias=false"),
        ("vllm", {"fc_bias": False}, "vLLM 0.32.0 has EAGLE-1 with Llama layers"),
    ],
    ids=["layers", "bias", "no bias", "layers of vLLM"],
)
def test_what_an_engine_cannot_decode_is_not_written(form: str, settings: dict, reason: str, tmp_path: Path) -> None:
    draft, kept, config = made("eagle1", **settings)
    save_draft(draft, tmp_path / "own", config, kept)
    with pytest.raises(FormatError, match=reason):
        export_draft(tmp_path / "own", tmp_path / "out", form)


def test_training_runs_and_supervises_the_trained_steps_alone() -> None:
    batch = with_anchors(tiny.batch("qwen3"), 5)
    for method, steps in (("eagle1", 1), ("hass", 3)):
        draft = tiny.draft(method, "qwen3")
        with torch.no_grad():
            whole = draft.eval()(batch)
        part = draft.train()(batch)
        torch.testing.assert_close(part.hidden[:, :, :steps], whole.hidden[:, :, :steps])
        assert torch.equal(part.mask[:, :, :steps], whole.mask[:, :, :steps]) and whole.mask[:, :, steps:].any()
        assert not part.mask[:, :, steps:].any() and part.mask.shape == whole.mask.shape


@pytest.mark.parametrize("stop", [True, False])
def test_a_gradient_stops_between_steps_if_asked(stop: bool) -> None:
    draft = tiny.draft("hass", "qwen3", stop_gradient=stop, layers=1).train()
    read, plain = [], draft.step
    draft.step = lambda feature, *rest, **more: read.append(feature.requires_grad) or plain(feature, *rest, **more)
    draft(with_anchors(tiny.batch("qwen3"), 3))
    assert read == [False, not stop, not stop]


def smooth_l1(a: list[float], b: list[float]) -> float:
    apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return sum(0.5 * d * d if d < 1 else d - 0.5 for d in apart) / len(apart)


def log_softmax(logits: list[float]) -> list[float]:
    norm = math.log(sum(math.exp(x) for x in logits))
    return [x - norm for x in logits]


@pytest.mark.parametrize("quick", [True, False])
def test_the_loss_of_hass_is_its_formula(quick: bool) -> None:
    """smooth-L1 of states + 0.1 soft cross-entropy + that of the ten likeliest tokens, summed over the slots."""
    target, draft = tiny.target("qwen3"), tiny.draft("hass", "qwen3").train()
    blocks = draft(with_anchors(tiny.batch("qwen3"), 2))
    with fast.switched(quick):
        loss = Objective(feature=1.0, soft_ce=0.1, further={"top_ce": 1.0})(draft, target.tables, blocks)
    wanted, head = 0.0, target.tables.head
    for ours, theirs in zip(blocks.hidden[blocks.mask], blocks.target[blocks.mask], strict=True):
        wanted += smooth_l1(ours.tolist(), theirs.tolist())
        log_p, log_q = (log_softmax((head @ x).tolist()) for x in (ours, theirs))
        cross = [-math.exp(q) * p for p, q in zip(log_p, log_q, strict=True)]
        likely = sorted(range(len(log_q)), key=lambda v: -log_q[v])[:10]
        wanted += 0.1 * sum(cross) + sum(cross[v] for v in likely)
    assert float(loss.value.detach()) == pytest.approx(wanted, rel=1e-4)
    assert float(loss.weight) == int(blocks.mask.sum())


def test_more_trained_steps_than_the_chain_has_are_refused() -> None:
    with pytest.raises(ValueError, match="trained_steps=5: a chain has block_size=4 steps"):
        tiny.draft("hass", "qwen3", trained_steps=5)
