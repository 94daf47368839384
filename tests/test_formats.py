"""Published formats read: what is left out, what is inconsistent, and what a draft here cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from specbench.checkpoints import formats
from specbench.checkpoints import layer_config as layerconfig
from specbench.checkpoints.draft_folder import FormatError, build_draft, fetch, load_draft, read_folder
from specbench.drafts.dflash import DFlash
from specbench.drafts.dspark import DSpark
from specbench.drafts.eagle3 import Eagle3
from specbench.models.backbone import backbone_of
from tests import tiny
from tests.test_interchange import CASES, GOLDEN, made, same


def speculator(**changes) -> tuple[dict, dict]:
    """An Eagle3 in speculators' form, with what its library leaves out left out."""
    layer = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    layer |= {"num_hidden_layers": 1, "vocab_size": 96}
    config = {"speculators_model_type": "eagle3", "eagle_aux_hidden_state_layer_ids": [1, 3, 4]}
    facts = backbone_of({**layerconfig.SHARED_DEFAULTS, **layerconfig.DEFAULTS["llama"], **layer}, "llama")
    tables = tiny.target("qwen3").tables
    draft = Eagle3(facts, tables, [0, 2, 3])
    tensors = {k: v.clone() for k, v in draft.state_dict().items()} | {"lm_head.weight": tables.head.clone()}
    tensors |= {"embed_tokens.weight": tables.embedding.clone()}
    layer |= changes.pop("layer", {})
    return config | {"transformer_layer_config": layer} | changes, tensors


def test_speculators_leaves_defaults_out_and_starts_from_the_embedding() -> None:
    config, tensors = speculator(eagle_aux_hidden_state_layer_ids=[0, 3, 4])
    draft = build_draft(config, tensors)
    assert draft.target_layer_ids == (-1, 2, 3)
    assert draft.backbone.kv_heads == 4 and draft.backbone.head_dim == 8 and draft.backbone.rope_theta == 1e4
    with pytest.raises(FormatError, match=r"target_layer_ids=\[...\]"):
        build_draft(speculator(eagle_aux_hidden_state_layer_ids=None)[0], tensors)
    config, _ = speculator(eagle_aux_hidden_state_layer_ids=None)
    assert build_draft(config, tensors, taps=[0, 2, 3]).target_layer_ids == (0, 2, 3)


@pytest.mark.parametrize("family", sorted(layerconfig.DEFAULTS))
def test_the_defaults_left_out_are_the_librarys(family: str) -> None:
    config = AutoConfig.for_model(family)
    for key, value in {**layerconfig.SHARED_DEFAULTS, **layerconfig.DEFAULTS[family]}.items():
        found = config.rope_parameters["rope_theta"] if key == "rope_theta" else getattr(config, key)
        derived = {"num_key_value_heads": config.num_attention_heads, "head_dim": 128}
        assert found == (derived.get(key) if value is None else value), key
    assert config.vocab_size == layerconfig.VOCABULARIES[family]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"speculators_model_type": "medusa"}, "medusa"),
        ({"norm_before_fc": True}, r"missing \['input_norm.weight'\]"),
        ({"layer": {"num_hidden_layers": 2}}, "num_hidden_layers=2"),
        ({"layer": {"model_type": "phi3"}}, "phi3"),
        ({"layer": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}}, "llama3.* lacks low_freq_factor"),
        ({"layer": {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}}, "dynamic"),
        ({"layer": {"mlp_bias": True}}, r"missing \['layers.0.mlp.down_proj.bias'"),
        ({"layer": {"layer_types": ["sliding_attention"]}}, "sliding_window=None"),
        ({"layer": {"layer_types": ["linear_attention"]}}, "linear_attention"),
        ({"target_hidden_size": 64}, "target_hidden_size=64"),
    ],
)
def test_what_a_draft_here_cannot_be_is_refused(changes: dict, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        build_draft(*speculator(**changes))


def test_missing_and_unknown_tensors_are_listed(tmp_path: Path) -> None:
    config, tensors = read_folder(GOLDEN / "qwen3_eagle3" / "draft")
    tensors["layers.0.self_attn.extra"] = tensors.pop("fc.weight")
    with pytest.raises(FormatError, match=r"missing \['fc.weight'\], unknown \['layers.0.self_attn.extra'\]"):
        build_draft(config, tensors)
    config, tensors = read_folder(GOLDEN / "qwen3_eagle3" / "draft")
    tensors["norm.weight"] = tensors["norm.weight"][:-1].clone()
    with pytest.raises(FormatError, match=r"norm.weight \(63,\), not \(64,\)"):
        build_draft(config, tensors)
    with pytest.raises(FormatError, match="GPT2"):
        build_draft({"architectures": ["GPT2"]}, tensors)
    with pytest.raises(FormatError, match=r"no config\.json"):
        load_draft(tmp_path)


@pytest.mark.parametrize(
    ("offsets", "marks", "reason"),
    [
        ([0, 0, 0], [0, 1, 3], "other tokens"),
        ([0, -1, 0], [0, 2], "3 different tokens"),
        ([0, 0, 99], None, "different tokens"),
        (None, [0, 1, 2], "t2d and not d2t"),
    ],
)
def test_an_inconsistent_vocabulary_map_is_refused(offsets, marks, reason) -> None:
    tensors = {} if offsets is None else {"d2t": torch.tensor(offsets)}
    if marks is not None:
        tensors["t2d"] = torch.zeros(96, dtype=torch.bool).index_fill_(0, torch.tensor(marks), True)
    with pytest.raises(FormatError, match=reason):
        formats.draft_ids(tensors, 96)


def test_zlab_shares_the_targets_tables(tmp_path: Path) -> None:
    draft, _, config = made("dflash", sample_from_anchor=False)
    tensors = {k: v for k, v in draft.state_dict().items() if not k.startswith("tables.")}
    inner = {"mask_token_id": tiny.MASK, "target_layer_ids": list(tiny.TAPS)}
    about = config | {"architectures": ["DFlashDraftModel"], "num_hidden_layers": 1, "block_size": 5}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(about | {"dflash_config": inner, "layer_types": None}))
    loaded = load_draft(tmp_path, tiny.target("qwen3").tables)
    same(draft, loaded)
    assert loaded.tables is tiny.target("qwen3").tables
    with pytest.raises(FormatError, match="ships no embedding"):
        load_draft(tmp_path)


def test_formats_of_scaled_targets_are_not_guessed() -> None:
    config, tensors = speculator()
    with pytest.raises(FormatError, match="decoded faithfully"):
        build_draft(config, tensors, tiny.target("gemma4").tables)


def test_a_hub_id_without_a_network_is_one_sentence() -> None:
    with pytest.raises(FormatError, match=r"draft=nobody/nothing: .* the hub does not give it .* network") as caught:
        fetch("nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(FormatError, match="no hub id"):
        fetch("./not/there")
    assert fetch(GOLDEN) == GOLDEN


def test_deepspec_says_what_heads_a_draft_has() -> None:
    kinds = {case: type(load_draft(GOLDEN / case / "draft")) for case in CASES}
    assert {k: v for k, v in kinds.items() if v is not DSpark} == {
        "gemma4_eagle3": Eagle3,
        "qwen3_dflash": DFlash,
        "qwen3_eagle3": Eagle3,
    }
