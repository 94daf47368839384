"""Published draft checkpoints, read: what each format's config.json and tensor names mean in our layout.

    DeepSpec      architectures [*DSparkModel | *Eagle3Model]; tensor names are ours
    z-lab DFlash  architectures [DFlashDraftModel], dflash_config; block_size counts the anchor; no embedding, no head
    speculators   speculators_model_type dspark | dflash | eagle3, transformer_layer_config; taps are stored plus one
    SGLang        architectures [LlamaForCausalLMEagle3], midlayer.*; eagle_config names the taps

The last two may cut the draft's vocabulary: row i of the head is token i + d2t[i], and t2d marks those tokens. What a
format can say and a draft here cannot be is refused. Sources, read on 2026-11-22: speculators models/{dspark,dflash,
eagle3}/config.py and eagle3/model_definitions.py; vLLM transformers_utils/configs/speculators/algos.py; SGLang
models/llama_eagle3.py and its set_eagle3_layers_to_capture.

Axes: V vocabulary, W draft vocabulary, C taps, D hidden.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specbench.backbone import Backbone, backbone_of
from specbench.methods.dflash import DFlash
from specbench.methods.draft import Draft
from specbench.methods.dspark import DSpark
from specbench.methods.eagle3 import Eagle3

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
# What speculators leaves out of transformer_layer_config because it is the default of the class that model_type names.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "intermediate_size": 22016},
    "llama": {"num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "intermediate_size": 11008},
}
SHARED_DEFAULTS = {"hidden_size": 4096, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
VOCABULARIES = {"qwen3": 151936, "llama": 32000}


class FormatError(ValueError):
    """A draft folder that cannot be read as any known format, or a draft that a format cannot hold."""


@dataclass(frozen=True)
class Reading:
    """A checkpoint understood: how to build the draft, and the tensors under our names.

    `text` is the configuration that the layers' facts came from, `tensors` still holds the tables, d2t and t2d.
    """

    kind: type[Draft]
    settings: dict[str, Any]
    backbone: Backbone
    text: dict[str, Any]
    tensors: dict[str, Tensor]
    scales_unknown: bool = False


def setting(config: Config, key: str) -> Any:
    """The value of a key that the format needs. Errors: FormatError naming it."""
    if config.get(key) is None:
        raise FormatError(f"config.json lacks {key!r}, which this architecture needs")
    return config[key]


def describe(config: Config, taps: list[int] | None = None) -> tuple[type[Draft], dict[str, Any]]:
    """The class and constructor settings that a draft's config.json asks for; `taps` where it names none."""
    if "specbench" in config:
        own = config["specbench"]
        module, name = own["class"].rsplit(".", 1)
        return getattr(importlib.import_module(module), name), dict(own["settings"])
    _, settings = _format(config)
    kind, found = settings(config)
    found["target_layer_ids"] = found["target_layer_ids"] or taps
    if not found["target_layer_ids"]:
        raise FormatError(
            "config.json does not say which target layers the draft reads; give target_layer_ids=[...] to "
            "`specbench import` (SGLang and vLLM take [1, L//2 - 1, L - 4] of a target with L layers)"
        )
    return kind, found


def read(config: Config, tensors: Tensors, taps: list[int] | None = None) -> Reading:
    """Understand a checkpoint. Errors: FormatError for an unknown format or for what a draft here cannot be."""
    kind, settings = describe(config, taps)
    if "specbench" in config:
        own = config["specbench"]
        return Reading(kind, settings, Backbone(**own["backbone"]), dict(own["target_config"]), dict(tensors))
    name, _ = _format(config)
    renamed = {_ours(key): value for key, value in tensors.items()}
    if name == "deepspec":
        text = dict(config.get("text_config") or config)
        if "layers.0.self_attn.v_proj.weight" in renamed and text.get("attention_k_eq_v"):
            text["attention_k_eq_v"] = False
        window = text.get("sliding_window") if text.get("use_sliding_window") else None
        return Reading(kind, settings, backbone_of(text, window=window), text, renamed)
    if name == "z-lab":
        return Reading(kind, settings, backbone_of(_plain_rope(config), window=_window(config)), dict(config), renamed)
    if name == "sglang":
        text = _plain_rope(dict(config))
        return Reading(kind, settings, backbone_of(text, "llama"), text, renamed, scales_unknown=True)
    text = _plain_rope(layer_config(config))
    window = _window(text, causal=not config.get("sliding_window_non_causal", False))
    backbone = backbone_of(text, text["model_type"], window)
    if config.get("norm_before_residual", False):
        backbone = replace(backbone, norm_before_residual=True)
    return Reading(kind, settings, backbone, text, renamed, scales_unknown=True)


def draft_ids(tensors: Tensors, vocabulary: int) -> Int[Tensor, " W"] | None:
    """Token ids of a reduced vocabulary from d2t and t2d; None when the vocabulary is whole or there are none.

    Errors: FormatError when only one of the two is there or when they disagree.
    """
    offsets, marks = tensors.get("d2t"), tensors.get("t2d")
    if offsets is None and marks is None:
        return None
    if offsets is None:
        raise FormatError("the checkpoint holds t2d and not d2t, so the rows of its head have no token ids")
    ids = torch.arange(len(offsets)) + offsets.long().cpu()
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary or len(ids.unique()) < len(ids)):
        raise FormatError(f"d2t does not name {len(ids)} different tokens of a vocabulary of {vocabulary}")
    if marks is not None:
        expected = torch.zeros(vocabulary, dtype=torch.bool).index_fill_(0, ids, True)
        if not torch.equal(marks.bool().cpu(), expected):
            raise FormatError("t2d marks other tokens than d2t names; the checkpoint is inconsistent")
    return None if torch.equal(ids, torch.arange(vocabulary)) else ids


def layer_config(config: Config) -> dict[str, Any]:
    """speculators' transformer_layer_config with the defaults that it leaves out. Errors: FormatError."""
    text = dict(setting(config, "transformer_layer_config"))
    family = text.get("model_type")
    if family not in DEFAULTS:
        raise FormatError(f"transformer_layer_config has model_type {family!r}; drafts of {', '.join(DEFAULTS)} load")
    return {**SHARED_DEFAULTS, "vocab_size": VOCABULARIES[family], **DEFAULTS[family], **text}


def _format(config: Config) -> tuple[str, Callable[[Config], tuple[type[Draft], dict[str, Any]]]]:
    """The format's name and the function that reads its settings."""
    speculator = config.get("speculators_model_type")
    if speculator is not None:
        if speculator not in ("dspark", "dflash", "eagle3"):
            raise FormatError(f"speculators_model_type {speculator!r} is not known here: dspark, dflash or eagle3")
        return "speculators", _speculators
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture.endswith("DSparkModel"):
        return "deepspec", _deepspec_block
    if architecture.endswith("Eagle3Model"):
        return "deepspec", _deepspec_eagle3
    if architecture == "DFlashDraftModel":
        return "z-lab", _zlab
    if architecture == "LlamaForCausalLMEagle3":
        return "sglang", _sglang
    raise FormatError(
        f"architecture {architecture!r} is no draft format known here; known: *DSparkModel, *Eagle3Model, "
        "DFlashDraftModel, LlamaForCausalLMEagle3, speculators and SpecBench's own"
    )


def _deepspec_block(config: Config) -> tuple[type[Draft], dict[str, Any]]:
    settings = {
        "target_layer_ids": setting(config, "target_layer_ids"),
        "mask_token_id": setting(config, "mask_token_id"),
        "layers": setting(config, "num_hidden_layers"),
        "block_size": setting(config, "block_size"),
        "anchors": config.get("num_anchors", 512),
    }
    return _with_heads(config, settings)


def _with_heads(config: Config, settings: dict[str, Any]) -> tuple[type[Draft], dict[str, Any]]:
    rank, confident = int(config.get("markov_rank") or 0), bool(config.get("enable_confidence_head"))
    if rank == 0 and not confident:
        return DFlash, settings
    return DSpark, settings | {
        "markov_head": config.get("markov_head_type") or "vanilla",
        "markov_rank": rank,
        "confidence_head": confident,
        "confidence_with_markov": rank > 0 and bool(config.get("confidence_head_with_markov", True)),
    }


def _deepspec_eagle3(config: Config) -> tuple[type[Draft], dict[str, Any]]:
    return Eagle3, {
        "target_layer_ids": setting(config, "target_layer_ids"),
        "layers": config.get("draft_num_hidden_layers", 1),
        "block_size": config.get("ttt_length", 7),
    }


def _zlab(config: Config) -> tuple[type[Draft], dict[str, Any]]:
    inner = setting(config, "dflash_config")
    block = config.get("block_size") or setting(inner, "block_size")
    return DFlash, {
        "target_layer_ids": setting(inner, "target_layer_ids"),
        "mask_token_id": setting(inner, "mask_token_id"),
        "layers": setting(config, "num_hidden_layers"),
        # The published block counts the anchor, which predicts nothing in this form.
        "block_size": block - 1,
        "sample_from_anchor": False,
    }


def _speculators(config: Config) -> tuple[type[Draft], dict[str, Any]]:
    name, text = config["speculators_model_type"], layer_config(config)
    if name == "eagle3":
        if config.get("norm_before_fc") or config.get("fc_norm"):
            raise FormatError("norm_before_fc: this Eagle3 norms its taps before fusing them; drafts here do not")
        stored = config.get("eagle_aux_hidden_state_layer_ids")
        methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
        return Eagle3, {
            "target_layer_ids": stored and [i - 1 for i in stored],
            "layers": _one_layer(text.get("num_hidden_layers", 1)),
            "block_size": methods[0].get("speculative_tokens") or 7,
        }
    if config.get("projector_type", "dflash") != "dflash":
        raise FormatError(f"projector_type {config['projector_type']!r}: only plain DFlash drafts load")
    # DFlash's anchor predicts nothing and counts in the block, DSpark's predicts slot 1.
    from_anchor = bool(config.get("sample_from_anchor", name == "dspark"))
    settings = {
        "target_layer_ids": [i - 1 for i in setting(config, "aux_hidden_state_layer_ids")],
        "mask_token_id": setting(config, "mask_token_id"),
        "layers": setting(text, "num_hidden_layers"),
        "block_size": setting(config, "block_size") - (not from_anchor),
        "sample_from_anchor": from_anchor,
    }
    return _with_heads(config, settings) if name == "dspark" else (DFlash, settings)


def _sglang(config: Config) -> tuple[type[Draft], dict[str, Any]]:
    inner = config.get("eagle_config") or {}
    if not inner.get("use_aux_hidden_state", True):
        raise FormatError("use_aux_hidden_state is false: this draft reads the last state alone, as EAGLE-1 does")
    stored = inner.get("eagle_aux_hidden_state_layer_ids")
    # The format does not say how far the draft was unrolled in training; 7 steps is the published table's length.
    layers = _one_layer(config.get("num_hidden_layers", 1))
    return Eagle3, {"target_layer_ids": stored and list(stored), "layers": layers, "block_size": 7}


def _one_layer(layers: int) -> int:
    if layers != 1:
        raise FormatError(f"num_hidden_layers={layers}: further layers of this format do not read the embedding")
    return layers


def _ours(key: str) -> str:
    key = key.removeprefix("model.")
    return "layers.0." + key.removeprefix("midlayer.") if key.startswith("midlayer.") else key


def _plain_rope(config: Config) -> dict[str, Any]:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise FormatError(f"rope type {kind!r}: drafts here rotate by plain rope")
    if config.get("mlp_bias"):
        raise FormatError("mlp_bias: drafts here have no bias in the feed-forward")
    return dict(config)


def _window(config: Config, causal: bool = False) -> int | None:
    kinds = set(config.get("layer_types") or ["full_attention"])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"} or causal:
        how = "causal inside a block" if causal else "mixed with full attention"
        raise FormatError(
            f"layer_types: sliding attention {how}; drafts here take one window for all layers, both ways"
        )
    return setting(config, "sliding_window")
