"""Block-parallel methods against plain transcriptions of their formulas, and their published folders."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from specbench.blocks import with_anchors
from specbench.checkpoints.config_keys import FormatError
from specbench.checkpoints.draft_folder import build_draft, export_draft, load_draft, save_draft
from specbench.checkpoints.formats import Scales, understand
from specbench.checkpoints.obstacles import obstacle
from specbench.drafts.dflash2 import DFlash2
from specbench.drafts.domino import Domino
from specbench.drafts.jetspec import JetSpec
from specbench.losses.objective import Objective
from specbench.models.backbone import backbone_of
from specbench.models.embedding_head import Tables
from tests import published, tiny, transcriptions

K, ANCHORS = 4, (5, 9, 13)
QWEN3 = tiny.QWEN3 | published.FACTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
FACTS = published.FACTS | {"rope_theta": 5e4, "num_hidden_layers": 2, "mask_token_id": tiny.MASK}


def built(kind: type, held: dict, **settings):
    """A draft of `kind` on those tensors, under the names of DeepSpec."""
    tables = Tables(held["embed_tokens.weight"], held["lm_head.weight"])
    draft = kind(backbone_of(QWEN3), tables, published.TAPS, tiny.MASK, layers=2, block_size=K, **settings)
    own = {name: value for name, value in held.items() if name not in ("embed_tokens.weight", "lm_head.weight")}
    draft.load_state_dict(own)
    return draft.eval()


def logits(draft) -> dict[int, torch.Tensor]:
    """Training-view logits (K, V) of some anchors of one conversation."""
    batch = with_anchors(tiny.pack([tiny.samples("qwen3")[0]]), None)
    with torch.no_grad():
        blocks = draft(batch)
        found = draft.logits(blocks.hidden, blocks.previous)
    return {a: found[0, int((batch.anchors[0] == a).nonzero())] for a in ANCHORS}


def block(held: dict, anchor: int, tokens: list[int] | None = None, causal: bool = False, shift: bool = True):
    """States of the outputs that predict slots 1..K, by the transcription; `tokens` enter instead of masks."""
    sample = tiny.samples("qwen3")[0]
    inputs = K if shift else K + 1
    tokens = tokens or [int(sample.tokens[anchor])] + [tiny.MASK] * (inputs - 1)
    states = transcriptions.block_states(FACTS | {"causal": causal}, held, sample.taps, tokens, anchor)
    return states[inputs - K :]


@pytest.mark.parametrize("shift", [True, False])
def test_jetspec_with_masks_is_a_causal_block(shift: bool) -> None:
    held = published.tensors("z-lab")
    draft = built(JetSpec, held, sample_from_anchor=shift)
    for anchor, found in logits(draft).items():
        states = block(held, anchor, causal=True, shift=shift)
        torch.testing.assert_close(found, torch.stack(states) @ held["lm_head.weight"].T, atol=1e-4, rtol=1e-4)
        wrong = torch.stack(block(held, anchor, causal=False, shift=shift)) @ held["lm_head.weight"].T
        assert (found - wrong).abs().max() > 1e-2  # a block that attends both ways is told apart


def test_jetspec_with_tokens_reads_the_token_before_each_slot() -> None:
    held = published.tensors("z-lab")
    draft = built(JetSpec, held, block_input="tokens")
    text = tiny.samples("qwen3")[0].tokens.tolist()
    for anchor, found in logits(draft).items():
        states = block(held, anchor, text[anchor : anchor + K], causal=True)
        torch.testing.assert_close(found, torch.stack(states) @ held["lm_head.weight"].T, atol=1e-4, rtol=1e-4)


def test_jetspec_refuses_to_show_a_slot_its_own_token() -> None:
    with pytest.raises(ValueError, match="block_input=tokens with sample_from_anchor=false"):
        built(JetSpec, published.tensors("z-lab"), block_input="tokens", sample_from_anchor=False)


def gru(held: dict, embeddings: list[torch.Tensor]) -> torch.Tensor:
    """The state after the embeddings, by torch's own GRU."""
    weights = {name: held[f"prefix_gru.{name}"] for name in ("weight_ih_l0", "weight_hh_l0")}
    size = len(weights["weight_hh_l0"]) // 3
    net = torch.nn.GRU(len(embeddings[0]), size, bias=False, batch_first=True)
    net.load_state_dict(weights)
    with torch.no_grad():
        return net(torch.stack(embeddings)[None])[1][0, 0]


def domino(held: dict, anchor: int, prefix: int, shift: bool, state_off: int = 0, label_off: int = 0) -> torch.Tensor:
    """Logits (K, V) of Domino's formulas. `state_off` more tokens enter the state, `label_off` shifts the hidden state
    that is read beside it: both are 0 in the method."""
    sample, states = tiny.samples("qwen3")[0], block(held, anchor, shift=shift)
    rows = []
    for k in range(1, K + 1):
        logits = held["lm_head.weight"] @ states[k - 1]
        if k >= 1 + prefix:
            before = sample.tokens[anchor : max(anchor + 1, anchor + k + state_off)]
            state = gru(held, [held["embed_tokens.weight"][token] for token in before])
            hidden = states[min(max(k - 1 + label_off, 0), K - 1)]
            latent = held["embed_proj.0.weight"] @ torch.cat([hidden, state])
            logits = logits + held["embed_proj.2.weight"] @ (latent * torch.sigmoid(latent))
        rows.append(logits)
    return torch.stack(rows)


def domino_tensors(size: int = 10, rank: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"prefix_gru.weight_ih_l0": (3 * size, published.D), "prefix_gru.weight_hh_l0": (3 * size, size)}
    shapes |= {"embed_proj.0.weight": (rank, published.D + size), "embed_proj.2.weight": (published.V, rank)}
    own = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return published.tensors("z-lab") | own


@pytest.mark.parametrize(("prefix", "shift"), [(1, True), (0, True), (1, False), (2, False)])
def test_domino_gives_the_formulas_logits_and_no_shifted_ones(prefix: int, shift: bool) -> None:
    held = domino_tensors()
    sizes = {"correction_rank": 6, "gru_size": 10, "prefix": prefix, "sample_from_anchor": shift}
    for anchor, found in logits(built(Domino, held, **sizes)).items():
        torch.testing.assert_close(found, domino(held, anchor, prefix, shift), atol=1e-4, rtol=1e-4)
        for wrong in ({"state_off": -1}, {"state_off": 1}, {"label_off": -1}, {"label_off": 1}):
            assert (found - domino(held, anchor, prefix, shift, **wrong)).abs().max() > 1e-2, wrong
        for other in (prefix - 1, prefix + 1):
            assert (found - domino(held, anchor, other, shift)).abs().max() > 1e-2 or other < 0


def test_dominos_base_logits_are_those_without_the_correction() -> None:
    draft = tiny.draft("domino", "qwen3")
    batch = with_anchors(tiny.batch("qwen3"), 3)
    with torch.no_grad():
        blocks = draft(batch)
        features = draft.features(blocks.hidden, blocks.previous)
        assert torch.equal(draft.project_base(features), draft.tables.logits(blocks.hidden))
        assert (draft.project_base(features) - draft.project(features))[..., draft.prefix :, :].abs().max() > 0.1


def dflash2_tensors(rank: int = 6) -> dict[str, torch.Tensor]:
    generator, D = torch.Generator().manual_seed(4), published.D
    shapes = {f"candidate_selector.{side}_codebook": (published.V, rank) for side in ("predecessor", "successor")}
    shapes["candidate_selector.hidden_projection.weight"] = (rank, D)
    own = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for i in range(2):
        for place in ("attention", "mlp"):
            name = f"layers.{i}.{place}_conv"
            noise = torch.randn(2, 2, D, generator=generator)
            own[f"{name}.base_kernel"] = torch.tensor([1.0, 0.0])[:, None] + 0.3 * noise
            own[f"{name}.kernel_projection.weight"] = 0.1 * torch.randn(2 * 2 * D // 16, D, generator=generator)
    return published.tensors("z-lab") | own


@pytest.mark.parametrize("shift", [True, False])
def test_dflash2_gives_the_formulas_scores_of_its_candidates(shift: bool) -> None:
    held, sample = dflash2_tensors(), tiny.samples("qwen3")[0]
    draft = built(DFlash2, held, selector_rank=6, candidates=5, sample_from_anchor=shift)
    inputs = K if shift else K + 1
    for anchor, found in logits(draft).items():
        text = sample.tokens.tolist()
        tokens = [text[anchor]] + [tiny.MASK] * (inputs - 1)
        c = FACTS | {"conv_group_size": 16}
        states = transcriptions.dflash2_states(c, held, sample.taps, tokens, anchor)[inputs - K :]
        plain = block(held, anchor, shift=shift)
        assert (torch.stack(states) - torch.stack(plain)).abs().max() > 0.1  # the convolutions matter
        for k, hidden in enumerate(states):
            base = held["lm_head.weight"] @ hidden
            scores = transcriptions.selected(held, hidden, base, text[anchor + k], 5)
            assert set(found[k].isfinite().nonzero().flatten().tolist()) == set(scores)
            for token, score in scores.items():
                assert float(found[k, token]) == pytest.approx(score, abs=2e-4, rel=1e-4)
            other = transcriptions.selected(held, hidden, base, (text[anchor + k] + 1) % published.V, 5)
            assert max(abs(other[token] - score) for token, score in scores.items()) > 1e-2


def test_a_new_dflash2_is_dflash_on_its_candidates() -> None:
    held = published.tensors("z-lab")
    tables = Tables(held["embed_tokens.weight"], held["lm_head.weight"])
    sizes = {"layers": 2, "block_size": K, "candidates": 5}
    fresh = DFlash2(backbone_of(QWEN3), tables, published.TAPS, tiny.MASK, **sizes)
    known = {name: value for name, value in held.items() if name in fresh.state_dict()}
    missing = fresh.load_state_dict(known, strict=False)
    assert not missing.unexpected_keys
    for anchor, found in logits(fresh.eval()).items():
        expected = torch.stack(block(held, anchor)) @ held["lm_head.weight"].T
        best = expected.topk(5, -1)
        torch.testing.assert_close(found.gather(-1, best.indices), best.values, atol=1e-4, rtol=1e-4)
        assert (found.isfinite().sum(-1) == 5).all()


def test_a_label_outside_of_the_candidates_adds_nothing_and_keeps_its_weight() -> None:
    draft, tables = tiny.draft("dflash2", "qwen3", candidates=4), tiny.target("qwen3").tables
    batch = with_anchors(tiny.batch("qwen3"), 4)
    with torch.no_grad():
        blocks = draft(batch)
        scores = draft.logits(blocks.hidden, blocks.previous)
        loss = Objective(ce=1.0, slot_weight={"exp": 7.0})(draft, tables, blocks)
    total = weight = 0.0
    outside = 0
    for b, n, k in blocks.mask.nonzero().tolist():
        row, w = scores[b, n, k].double(), math.exp(-k / 7)
        label = row[blocks.labels[b, n, k]]
        weight += w
        outside += int(not label.isfinite())
        total += 0.0 if not label.isfinite() else w * float(row.exp().sum().log() - label)
    assert 0 < outside < int(blocks.mask.sum())
    assert float(loss.value) == pytest.approx(total, rel=1e-5) and float(loss.weight) == pytest.approx(weight)
    assert int(loss.slots.labelled.sum()) == int(blocks.mask.sum()) - outside
    with pytest.raises(ValueError, match="objective kl: the law of DFlash2 is 0 outside of its 4 candidates"):
        Objective(kl=1.0)(draft, tables, blocks)


def test_detached_base_logits_get_no_gradient_from_the_selected_law() -> None:
    tables, batch = tiny.target("qwen3").tables, with_anchors(tiny.batch("qwen3"), 4)
    moved = {}
    for detach in (False, True):
        draft = tiny.draft("dflash2", "qwen3", detach_base=detach, train_tables=True)
        blocks = draft(batch)
        Objective(ce=1.0)(draft, tables, blocks).value.backward()
        moved[detach] = draft.tables.head.grad, draft.candidate_selector.successor_codebook.grad
    assert moved[True][0] is None or moved[True][0].abs().max() == 0
    assert moved[False][0].abs().max() > 0
    torch.testing.assert_close(moved[True][1], moved[False][1])


def folder_of(draft, path):
    """The draft in the layout of this project."""
    return save_draft(draft, path, tiny.QWEN3, draft.settings)


def written(draft, path) -> tuple[dict, dict, object]:
    """Configuration and tensors of a draft in z-lab's format, and the draft that they are read as."""
    out = export_draft(folder_of(draft, path / "own"), path / "zlab", "zlab")
    config = json.loads((out / "config.json").read_text())
    return config, load_file(out / "model.safetensors"), load_draft(out, draft.tables)


def assert_same(one, other) -> None:
    assert type(one) is type(other) and one.backbone == other.backbone
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    for anchor, found in logits(one).items():
        assert torch.equal(found, logits(other)[anchor])


@pytest.mark.parametrize(
    ("method", "settings"),
    [("dflash", {}), ("dflash", {"causal_block": True}), ("jetspec", {})],
)
def test_zlabs_format_is_written_and_read_back(method: str, settings: dict, tmp_path) -> None:
    draft = tiny.draft(method, "qwen3", sample_from_anchor=False, **settings)
    config, tensors, again = written(draft, tmp_path)
    assert_same(draft, again)
    assert config["architectures"] == ["DFlashDraftModel"] and config["block_size"] == draft.block_size + 1
    assert config["dflash_config"] == {
        "mask_token_id": tiny.MASK,
        "target_layer_ids": list(tiny.TAPS),
        **({"causal_head": True} if method == "jetspec" else {}),
    }
    assert config.get("is_causal") is (True if settings else None)
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(tensors)
    assert set(tensors) == {name for name in published.stored("z-lab", published.tensors("z-lab"))}


@pytest.mark.parametrize("shift", [True, False])
def test_dominos_format_is_written_and_read_back(shift: bool, tmp_path) -> None:
    draft = tiny.draft("domino", "qwen3", sample_from_anchor=shift)
    config, tensors, again = written(draft, tmp_path)
    assert_same(draft, again)
    assert config["architectures"] == ["DominoDraftModel"] and config["block_size"] == K + (not shift)
    expected = {"projector_type": "domino", "emb_dim": 6, "gru_hidden_dim": 10, "pure_draft_prefix_len": 1}
    expected |= {"mask_token_id": tiny.MASK, "target_layer_ids": list(tiny.TAPS), "shift_label": shift}
    assert config["dflash_config"] == expected
    assert set(tensors) == set(published.stored("z-lab", domino_tensors()))
    # Older files name DFlash's class, and the size of the correction a second time.
    named = config | {"architectures": ["DFlashDraftModel"], "emb_dim": 6}
    assert_same(draft, build_draft(named, tensors, draft.tables))
    for wrong, reason in (({"emb_dim": 7}, "contradicts"), ({"is_causal": True}, "attends both ways")):
        with pytest.raises(FormatError, match=reason):
            build_draft(config | wrong, tensors, draft.tables)
    for key in ("gru_hidden_dim", "emb_dim"):
        cut = {name: value for name, value in expected.items() if name != key}
        with pytest.raises(FormatError, match=key):
            build_draft(config | {"dflash_config": cut}, tensors, draft.tables)


def test_dflash2s_format_is_written_and_read_back(tmp_path) -> None:
    draft = tiny.draft("dflash2", "qwen3", sample_from_anchor=False)
    config, tensors, again = written(draft, tmp_path)
    assert_same(draft, again)
    expected = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 6, "selector_top_k": 16}
    expected |= {"mask_token_id": tiny.MASK, "target_layer_ids": list(tiny.TAPS), "block_size": K + 1}
    assert config["architectures"] == ["DFlash2DraftModel"] and config["dflash_config"] == expected
    assert set(tensors) == set(published.stored("z-lab", dflash2_tensors()))
    assert tensors["layers.0.mlp_conv.base_kernel"].shape == (2, 2, published.D)
    assert tensors["layers.0.mlp_conv.kernel_projection.weight"].shape == (2 * 2 * published.D // 16, published.D)
    for key in ("conv_group_size", "selector_top_k"):
        cut = {name: value for name, value in expected.items() if name != key}
        with pytest.raises(FormatError, match=key):
            build_draft(config | {"dflash_config": cut}, tensors, draft.tables)
    for key, value in (("conv_kernel_size", 3), ("projector_type", "domino")):
        with pytest.raises(FormatError, match=key):
            build_draft(config | {"dflash_config": expected | {key: value}}, tensors, draft.tables)


def test_causal_head_of_zlabs_format_is_jetspec() -> None:
    held, config = published.tensors("z-lab"), published.config("z-lab")
    tables = Tables(held["embed_tokens.weight"], held["lm_head.weight"])
    config["dflash_config"]["causal_head"] = True
    found = build_draft(config, published.stored("z-lab", held), tables)
    assert isinstance(found, JetSpec) and found.causal_block and not found.sample_from_anchor
    for anchor, values in logits(found).items():
        states = block(held, anchor, causal=True, shift=False)
        torch.testing.assert_close(values, torch.stack(states) @ held["lm_head.weight"].T, atol=1e-4, rtol=1e-4)


def test_configurations_as_published_are_understood() -> None:
    """Facts of z-lab's DFlash2 drafts (windows both ways, scaled and capped logits) and of SpecForge's Domino."""
    layer = {"attention_bias": False, "head_dim": 128, "hidden_act": "silu", "model_type": "qwen3"}
    layer |= {"num_hidden_layers": 5, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
    layer["max_window_layers"] = 5
    inner = {"block_size": 16, "conv_group_size": 16, "conv_kernel_size": 2, "final_logit_softcapping": 20.0}
    inner |= {"mask_token_id": 201818, "output_multiplier": 0.196, "selector_rank": 256, "selector_top_k": 16}
    own = {"architectures": ["DFlash2DraftModel"], "is_causal": False, "layer_types": ["sliding_attention"] * 5}
    own |= {"hidden_size": 6656, "intermediate_size": 19968, "rms_norm_eps": 1e-5, "vocab_size": 202048}
    own |= {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "sliding_window": 2048}
    own |= {"use_sliding_window": True, "dflash_config": inner | {"target_layer_ids": [1, 13, 25, 37, 49]}}
    form = understand(layer | own)
    assert form.kind is DFlash2 and form.layers.backbone.window == 2048
    assert form.about["scales"] == Scales(1.0, 0.196, 20.0)
    assert form.settings == {
        "target_layer_ids": [1, 13, 25, 37, 49],
        "mask_token_id": 201818,
        "layers": 5,
        "block_size": 15,
        "sample_from_anchor": False,
        "conv_group": 16,
        "selector_rank": 256,
        "candidates": 16,
    }
    inner = {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33], "projector_type": "domino"}
    inner |= {"pure_draft_prefix_len": 1, "emb_dim": 256, "gru_hidden_dim": 1024, "shift_label": True}
    own = {"architectures": ["DominoDraftModel"], "emb_dim": 256, "block_size": 16}
    own |= {
        "layer_types": ["full_attention"] * 5,
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }
    own |= {"rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "dflash_config": inner}
    form = understand(layer | own)
    assert form.kind is Domino
    assert form.settings == {
        "target_layer_ids": [1, 9, 17, 25, 33],
        "mask_token_id": 151669,
        "layers": 5,
        "block_size": 16,
        "sample_from_anchor": True,
        "correction_rank": 256,
        "gru_size": 1024,
        "prefix": 1,
    }
    unshifted = understand(layer | own | {"dflash_config": inner | {"shift_label": False}}).settings
    assert unshifted["block_size"] == 15 and not unshifted["sample_from_anchor"]


@pytest.mark.parametrize(
    ("method", "settings", "form", "reason"),
    [
        ("jetspec", {}, "zlab", "sample_from_anchor=false"),
        ("jetspec", {"block_input": "tokens"}, "zlab", "sample_from_anchor=false"),
        ("jetspec", {}, "deepspec", "JetSpec is no draft of this format; use format=zlab or specbench"),
        ("jetspec", {"train_tables": True, "sample_from_anchor": False}, "zlab", "share the target's embedding"),
        ("jetspec", {"backbone": "llama", "sample_from_anchor": False}, "zlab", "norms of queries and keys"),
        ("dflash2", {}, "zlab", "sample_from_anchor=false"),
        ("domino", {}, "vllm", "Domino is no draft of this format; use format=zlab or specbench"),
        ("dspark", {}, "zlab", "DSpark is no draft of this format"),
    ],
)
def test_what_zlabs_format_cannot_hold_is_refused(method: str, settings: dict, form: str, reason: str, tmp_path):
    draft = tiny.draft(method, "qwen3", **settings)
    assert reason in obstacle(draft, form)
    with pytest.raises(FormatError, match=reason):
        export_draft(folder_of(draft, tmp_path), tmp_path / "out", form)
