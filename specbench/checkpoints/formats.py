"""Reading of published draft checkpoints: the meaning of each format's config.json and tensor names.

    DeepSpec      architectures [Qwen3 or Gemma4, then DSparkModel or Eagle3Model]; tensor names are ours
    z-lab DFlash  architectures [DFlashDraftModel], dflash_config; block_size counts the anchor; no embedding, no head;
                  JetSpec with dflash_config.causal_head; Domino with architectures [DominoDraftModel] or
                  dflash_config.projector_type domino, whose block_size with shift_label is that of its slots; DFlash2
                  with architectures [DFlash2DraftModel]
    speculators   speculators_model_type dspark | dflash | eagle3 | peagle, transformer_layer_config; taps are stored
                  plus one
    SGLang        architectures [LlamaForCausalLMEagle3], midlayer.*; eagle_config names the taps. With
                  parallel_drafting, or a mask token under one of MASK_TOKENS, it is the P-EAGLE that vLLM decodes
    EAGLE-1       architectures [LlamaForCausalLMEagle], or [LlamaForCausalLM] with a tensor fc.weight (as released); fc
                  has a bias unless `bias` is false; embedding and head are the target's where they are not there
    Medusa        see medusa_format.py

speculators and SGLang may cut the draft's vocabulary: row i of the head is token i + d2t[i], and t2d marks those
tokens. Every key of a configuration and every tensor is used, known not to matter (configkeys.py, IRRELEVANT_TENSORS),
or an error by name. Where a key is absent, the format's own library decides what it means: speculators
models/{dspark,dflash,eagle3}/ {config,core,attention}.py; z-lab dflash/model.py (a layer that slides attends causally
inside its block unless `is_causal` says otherwise; logits are the target's head's, times output_multiplier, then
capped); SGLang models/llama_eagle3.py and set_eagle3_layers_to_capture; vLLM models/{llama_eagle3,qwen3_dflash}.py (the
window of a sliding layer bounds how far back a query sees) and transformers_utils/configs/speculators/algos.py; for
P-EAGLE speculators models/peagle/{config,core}.py. Read on 2026-11-22, 2026-11-26 and 2026-11-27.

Axes: V vocabulary, W draft vocabulary, C taps, D hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specbench.checkpoints.config_keys import REASONS, FormatError, Keys, agreed, agreed_flag, agreed_number
from specbench.checkpoints.layer_config import LayerFacts, gemma4_layers_of, layers_of
from specbench.checkpoints.medusa_format import medusa_backbone, medusa_settings, medusa_tensors
from specbench.drafts.dflash import DFlash
from specbench.drafts.dflash2 import TAPS, DFlash2
from specbench.drafts.domino import Domino
from specbench.drafts.draft import Draft
from specbench.drafts.dspark import MARKOV_HEADS, DSpark
from specbench.drafts.eagle1 import Eagle1
from specbench.drafts.eagle3 import Eagle3
from specbench.drafts.installed import checked, method_named
from specbench.drafts.jetspec import JetSpec
from specbench.drafts.medusa import Medusa
from specbench.drafts.p_eagle import PEagle
from specbench.models.backbone import Backbone

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
# What a checkpoint may hold beside the draft: the target's own norm and head, kept for training. Rope's frequencies are
# held against the configuration.
IRRELEVANT_TENSORS = ("verifier_norm.weight", "verifier_lm_head.weight")
FREQUENCIES = "rotary_emb.inv_freq"
EAGLE_FLAGS = ("fc_norm", "norm_before_fc", "norm_output")
# Where vLLM looks for the input token of slots that are drafted in parallel.
MASK_TOKENS = ("mask_token_id", "pard_token", "ptd_token_id")


@dataclass(frozen=True)
class Scales:
    """Scales around the target's tables if a draft shares them, from the draft's configuration."""

    embedding: float = 1.0
    logits: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True)
class Reading:
    """A checkpoint understood: how to build the draft, and the tensors under our names.

    `text` is the configuration that the layers' facts came from, `tensors` still holds the tables, d2t and t2d. `head`
    says where a head that the checkpoint lacks is taken from: "missing" (an error), "embedding" or "target"; `scales`
    what is put around the target's tables (None: the format does not say); `draft_vocabulary` the rows of the head;
    `own` that it is a folder of our own, which holds any method.
    """

    kind: type[Draft]
    settings: dict[str, Any]
    backbone: Backbone
    text: dict[str, Any]
    tensors: dict[str, Tensor]
    scales_unknown: bool = False
    ships_tables: bool = True
    head: str = "missing"
    scales: Scales | None = None
    draft_vocabulary: int | None = None
    own: bool = False


@dataclass(frozen=True)
class Form:
    """Content of a configuration, before the tensors are read."""

    kind: type[Draft]
    settings: dict[str, Any]
    layers: LayerFacts
    text: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)


def describe(
    config: Config,
    taps: list[int] | None = None,
    methods: Sequence[type[Draft]] = (),
    tensors: Collection[str] = (),
) -> tuple[type[Draft], dict[str, Any]]:
    """The class and constructor settings that a draft's config.json asks for; `taps` where it names none, `tensors`:
    the names of the checkpoint's tensors, where the configuration alone does not tell its format.

    A folder of our own names its method, which is looked up among those of this package and `methods`, and gives plain
    settings, which are held against the method's signature. Errors: FormatError.
    """
    if "specbench" in config:
        own = _own(config)
        try:
            kind = method_named(own.get("class"), methods)
            return kind, checked(kind, own.get("settings"), "specbench.settings")
        except ValueError as error:
            raise FormatError(f"config.json: {error}") from error
    form = understand(config, taps, tensors)
    return form.kind, form.settings


# What a folder of our own holds beside its target's configuration: its section, and the fields of DeepSpec's format.
OWN_SECTION = ("class", "settings", "backbone", "target_config")
OWN_FIELDS = frozenset(
    [
        "specbench",
        "architectures",
        "model_type",
        "dtype",
        "torch_dtype",
        "num_target_layers",
        "num_hidden_layers",
        "layer_types",
        "target_layer_ids",
        "tie_word_embeddings",
        "attention_k_eq_v",
        "ttt_length",
        "draft_num_hidden_layers",
        "step_loss_decay",
        "block_size",
        "mask_token_id",
        "num_anchors",
        "markov_rank",
        "enable_confidence_head",
        "markov_head_type",
        "confidence_head_with_markov",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "hidden_act",
        "attention_bias",
        "mlp_bias",
        "max_position_embeddings",
    ]
)


def _own(config: Config) -> Config:
    """The section of a folder of our own, held to its keys. Errors: FormatError naming a key that nothing here writes,
    or a field that says something else than the settings."""
    own = _section(config, "specbench")
    target = _section(own, "target_config")
    text = target.get("text_config")
    known = OWN_FIELDS | REASONS.keys() | target.keys() | (text.keys() if isinstance(text, Mapping) else set())
    strange = [key for key in config if key not in known] + [f"specbench.{k}" for k in own if k not in OWN_SECTION]
    if strange:
        raise FormatError(
            f"config.json: {', '.join(strange)} is not known here. A draft is loaded as it was trained or not at all; "
            "take a key out of config.json only if you know that it does not change the draft"
        )
    settings = own.get("settings")
    for key in ("target_layer_ids", "mask_token_id"):
        if isinstance(settings, Mapping) and key in config and key in settings and config[key] != settings[key]:
            raise FormatError(
                f"config.json: {key}={config[key]!r} and specbench.settings.{key}={settings[key]!r} contradict each "
                "other; set both to what the draft was trained with"
            )
    return own


def read(
    config: Config, tensors: Tensors, taps: list[int] | None = None, methods: Sequence[type[Draft]] = ()
) -> Reading:
    """Understand a checkpoint. Errors: FormatError for an unknown format or for what a draft here cannot be."""
    if "specbench" in config:
        kind, settings = describe(config, taps, methods)
        own = config["specbench"]
        try:
            facts = checked(Backbone, own.get("backbone"), "specbench.backbone", objects=())
        except ValueError as error:
            raise FormatError(f"config.json: {error}") from error
        text = dict(_section(own, "target_config"))
        return Reading(kind, settings, Backbone(**facts), text, dict(tensors), own=True)
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if _ours(key) in renamed:
            raise FormatError(f"the checkpoint holds {_ours(key)!r} twice, once as {key!r}; keep the right one")
        renamed[_ours(key)] = value
    form = understand(config, taps, renamed)
    backbone = form.layers.backbone
    if form.kind is Medusa:
        renamed = medusa_tensors(renamed, form.settings)
    for key in [k for k in renamed if k in IRRELEVANT_TENSORS or k.endswith(FREQUENCIES)]:
        frequencies = renamed.pop(key)
        if key.endswith(FREQUENCIES):
            _hold_frequencies(key, frequencies, backbone)
    return Reading(form.kind, form.settings, backbone, form.text, renamed, **form.about)


def understand(config: Config, taps: list[int] | None = None, tensors: Collection[str] = ()) -> Form:
    """Read a published configuration to its last key; `taps` where it names none, `tensors` are the checkpoint's names.

    Errors: FormatError for an unknown format, for a key that is not known, and for what a draft here cannot be.
    """
    keys = Keys(config)
    form = _form(keys, tensors)
    keys.settle()
    settings = dict(form.settings)
    settings["target_layer_ids"] = settings["target_layer_ids"] or taps
    if not settings["target_layer_ids"] and not form.kind.reads_taps:
        settings["target_layer_ids"] = [0]  # a draft names its taps, also one that reads none
    if not settings["target_layer_ids"]:
        raise FormatError(
            "config.json does not say which target layers the draft reads; give target_layer_ids=[...] to "
            "`specbench import` (SGLang and vLLM take [1, L//2 - 1, L - 4] of a target with L layers)"
        )
    return Form(form.kind, settings, form.layers, form.text, form.about)


def _section(config: Config, key: str) -> Config:
    """An object of config.json. Errors: FormatError."""
    found = config.get(key)
    if not isinstance(found, Mapping):
        raise FormatError(f"config.json: {key} is {found!r}, not an object")
    return found


def draft_ids(tensors: Tensors, vocabulary: int) -> Int[Tensor, " W"] | None:
    """Token ids of a reduced vocabulary from d2t and t2d; None when the vocabulary is whole or there are none.

    Errors: FormatError when only one of the two is there, when they disagree, or when d2t was never filled in.
    """
    offsets, marks = tensors.get("d2t"), tensors.get("t2d")
    if offsets is None and marks is None:
        return None
    if offsets is None:
        raise FormatError("the checkpoint holds t2d and not d2t, so the rows of its head have no token ids")
    if offsets.dim() != 1 or offsets.is_floating_point() or offsets.is_complex() or offsets.dtype == torch.bool:
        raise FormatError(f"d2t is {offsets.dtype} of shape {tuple(offsets.shape)}, not one row of whole numbers")
    ids = torch.arange(len(offsets)) + offsets.long().cpu()
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary or len(ids.unique()) < len(ids)):
        raise FormatError(f"d2t does not name {len(ids)} different tokens of a vocabulary of {vocabulary}")
    if marks is None and len(ids) < vocabulary and not bool(offsets.any()):
        raise FormatError(
            f"d2t is all zeros and there is no t2d: {len(ids)} of {vocabulary} tokens, and nothing says which ones; "
            "take d2t and t2d from the training's vocabulary mapping"
        )
    if marks is not None:
        expected = torch.zeros(vocabulary, dtype=torch.bool).index_fill_(0, ids, True)
        if marks.shape != expected.shape or not torch.equal(marks.bool().cpu(), expected):
            raise FormatError("t2d marks other tokens than d2t names; the checkpoint is inconsistent")
    return None if torch.equal(ids, torch.arange(vocabulary)) else ids


def _form(config: Keys, tensors: Collection[str]) -> Form:
    """The format's reader, by what the configuration calls itself."""
    speculator = config.text("speculators_model_type")
    if speculator is not None:
        if speculator not in ("dspark", "dflash", "eagle3", "peagle"):
            raise FormatError(
                f"speculators_model_type {speculator!r} is not known here: dspark, dflash, eagle3 or peagle"
            )
        if speculator == "peagle":
            return _speculators_peagle(config)
        return _speculators_eagle3(config) if speculator == "eagle3" else _speculators_block(config, speculator)
    architecture = ([*(config.items("architectures") or []), "none"])[0]
    for family in ("Qwen3", "Gemma4"):
        if architecture == f"{family}DSparkModel":
            return _deepspec(config, family, tensors, _deepspec_block)
        if architecture == f"{family}Eagle3Model":
            return _deepspec(config, family, tensors, _deepspec_eagle3)
    if architecture in ("DFlashDraftModel", "DominoDraftModel", "DFlash2DraftModel"):
        return _zlab(config, architecture)
    if "medusa_num_heads" in config or architecture == "MedusaModel":
        settings, width, vocabulary = medusa_settings(config, tensors)
        backbone, plain = medusa_backbone(width, vocabulary)
        rows = config.integer("truncated_vocab_size")
        about = {"scales_unknown": True, "ships_tables": False, "head": "target", "draft_vocabulary": rows}
        return Form(Medusa, settings, LayerFacts(0, backbone, {}), plain, about)
    if architecture == "LlamaForCausalLMEagle" or (architecture == "LlamaForCausalLM" and "fc.weight" in tensors):
        return _eagle1(config)
    if architecture == "LlamaForCausalLMEagle3":
        return _sglang(config)
    raise FormatError(
        f"architecture {architecture!r} is no draft format known here; known: Qwen3 and Gemma4 with DSparkModel or "
        "Eagle3Model, DFlashDraftModel, DFlash2DraftModel, DominoDraftModel, LlamaForCausalLMEagle3, "
        "LlamaForCausalLMEagle, Medusa's, speculators and SpecBench's own"
    )


def _deepspec(config: Keys, family: str, tensors: Collection[str], settings: Any) -> Form:
    text = config.section("text_config") if "text_config" in config else config
    kind = text.text("model_type") or family.lower()
    if not kind.startswith(family.lower()):
        raise FormatError(f"config.json: architectures names a {family} draft and model_type says {kind!r}")
    plain = dict(text.values)
    if family == "Gemma4":
        own_values = "layers.0.self_attn.v_proj.weight" in tensors
        if own_values and plain.get("attention_k_eq_v"):
            plain["attention_k_eq_v"] = False
        layers = gemma4_layers_of(text, own_values)
    else:
        layers = layers_of(text, "qwen3")
        if layers.sliding:
            raise FormatError("config.json: layer_types: sliding attention is no part of this format")
    draft, found = settings(config, layers)
    return Form(draft, found, layers, plain)


def _deepspec_block(config: Keys, layers: LayerFacts) -> tuple[type[Draft], dict[str, Any]]:
    return _with_heads(
        config,
        {
            "target_layer_ids": config.integers(config.needed("target_layer_ids")),
            "mask_token_id": config.integer(config.needed("mask_token_id")),
            "layers": layers.count,
            "block_size": config.integer(config.needed("block_size")),
            "anchors": config.integer("num_anchors", 512),
            # SGLang's DSpark reads this one; DeepSpec's blocks predict slot 1 from the anchor.
            **({"sample_from_anchor": config.flag("sample_from_anchor")} if "sample_from_anchor" in config else {}),
        },
    )


def _deepspec_eagle3(config: Keys, layers: LayerFacts) -> tuple[type[Draft], dict[str, Any]]:
    count = config.integer("draft_num_hidden_layers", 1)
    if count != layers.count:
        raise FormatError(
            f"config.json contradicts itself: draft_num_hidden_layers={count} and num_hidden_layers={layers.count}"
        )
    return Eagle3, {
        "target_layer_ids": config.integers(config.needed("target_layer_ids")),
        "layers": count,
        "block_size": config.integer("ttt_length", 7),
    }


def _with_heads(config: Keys, settings: dict[str, Any]) -> tuple[type[Draft], dict[str, Any]]:
    rank, confident = config.integer("markov_rank", 0), config.flag("enable_confidence_head")
    head = config.choice("markov_head_type", MARKOV_HEADS, "vanilla")
    with_markov = config.flag("confidence_head_with_markov", True)
    if rank == 0 and not confident:
        return DFlash, settings
    return DSpark, settings | {
        "markov_head": head,
        "markov_rank": rank,
        "confidence_head": confident,
        "confidence_with_markov": rank > 0 and with_markov,
    }


def _zlab(config: Keys, architecture: str) -> Form:
    inner, layers = config.section("dflash_config"), layers_of(config, "qwen3")
    for place in (inner, config):
        place.integers("target_layer_ids"), place.integer("mask_token_id"), place.integer("block_size")
    found = {key: agreed(key, inner, config) for key in ("target_layer_ids", "mask_token_id", "block_size")}
    for key, value in found.items():
        if value is None:
            inner.needed(key)
    config.get("tie_word_embeddings")  # the target's, whose tables are shared
    _same_width(config, layers)
    usual = "domino" if architecture == "DominoDraftModel" else "dflash"
    domino = inner.choice("projector_type", [usual, "domino"], usual) == "domino"
    # The published block counts the anchor, which predicts nothing in this form but for Domino's shift_label.
    from_anchor = domino and inner.flag("shift_label")
    slots = found["block_size"] - (not from_anchor)
    named = {"is_causal": config, "causal": inner, "causal_head": inner}
    said = {key: place.flag(key) for key, place in named.items() if key in place}
    if len(set(said.values())) > 1:
        raise FormatError(f"config.json contradicts itself: {said}")
    settings = {
        "target_layer_ids": found["target_layer_ids"],
        "mask_token_id": found["mask_token_id"],
        "layers": layers.count,
        "block_size": slots,
        "sample_from_anchor": from_anchor,
    }
    settings |= _block_attention(layers, next(iter(said.values()), None), found["block_size"])
    scales = Scales(
        agreed_number("input_embedding_scale", inner, config) or 1.0,
        agreed_number("output_multiplier", inner, config) or 1.0,
        agreed_number("final_logit_softcapping", inner, config) or None,
    )
    about = {"scales_unknown": True, "ships_tables": False, "head": "target", "scales": scales}
    kind: type[Draft] = DFlash
    if said.get("causal_head"):  # every layer of such a draft is causal, which JetSpec does not set but is
        kind = JetSpec
        del settings["causal_block"]
    if domino or architecture == "DFlash2DraftModel":
        if settings.keys() & {"causal_block", "full_layers"} or "causal_head" in inner:
            raise FormatError("config.json: such a draft here attends both ways in its block, in all layers alike")
        if domino and architecture == "DFlash2DraftModel":
            raise FormatError("config.json: projector_type=domino asks for Domino and architectures for DFlash2")
        kind, own = (Domino, _domino(inner, config)) if domino else (DFlash2, _dflash2(inner))
        settings |= own
    return Form(kind, settings, layers, layers.text(config), about)


def _dflash2(inner: Keys) -> dict[str, Any]:
    """The settings of DFlash2's convolutions and selector, each of which the format names."""
    if (taps := inner.integer(inner.needed("conv_kernel_size"))) != TAPS:
        raise FormatError(f"config.json: dflash_config.conv_kernel_size={taps}: convolutions here have {TAPS} taps")
    named = {"conv_group": "conv_group_size", "selector_rank": "selector_rank", "candidates": "selector_top_k"}
    return {setting: inner.integer(inner.needed(key)) for setting, key in named.items()}


def _domino(inner: Keys, config: Keys) -> dict[str, Any]:
    """The settings of Domino's correction."""
    config.integer("emb_dim"), inner.integer("emb_dim")
    if (rank := agreed("emb_dim", inner, config)) is None:
        inner.needed("emb_dim")
    return {
        "correction_rank": rank,
        "gru_size": inner.integer(inner.needed("gru_hidden_dim")),
        "prefix": inner.integer("pure_draft_prefix_len", 0),
    }


def _block_attention(layers: LayerFacts, causal: bool | None, inputs: int) -> dict[str, Any]:
    """The settings of attention inside a block; `causal` of all layers (None: of those that slide).

    Errors: FormatError for a window that reaches no block's end, and for full layers that are causal beside others.
    """
    window, mixed = layers.backbone.window, bool(layers.sliding) and bool(layers.full)
    causal_block = bool(layers.sliding) if causal is None else causal
    if window is not None and not causal_block and window < inputs:
        raise FormatError(
            f"config.json: sliding_window={window} is smaller than a block of {inputs} whose slots see the later ones: "
            "drafts here do not bound how far ahead a slot sees"
        )
    if mixed and causal:
        raise FormatError(
            "config.json: is_causal (causal, causal_head) is true and layer_types mixes full with sliding attention: "
            "full layers of such drafts are not causal here"
        )
    found: dict[str, Any] = {"causal_block": True} if causal_block else {}
    return found | ({"full_layers": layers.full} if mixed else {})


def _speculators_eagle3(config: Keys) -> Form:
    text, layers = _speculators_layers(config, ("llama", "qwen3"), norm_first=config.flag("norm_before_residual"))
    stored = config.integers("eagle_aux_hidden_state_layer_ids")
    _same_count(config.section("transformer_layer_config"), stored)
    settings = {
        "target_layer_ids": stored and [i - 1 for i in stored],
        "layers": _one_layer(layers),
        "block_size": _proposed(config) or 7,
    }
    return Form(Eagle3, settings | _eagle_flags(config), layers, text, _speculators_tables(config))


def _speculators_peagle(config: Keys) -> Form:
    text, layers = _speculators_layers(config, ("llama", "qwen3"), norm_first=config.flag("norm_before_residual"))
    stored = config.integers("eagle_aux_hidden_state_layer_ids")
    _same_count(config.section("transformer_layer_config"), stored)
    settings = {
        "target_layer_ids": stored and [i - 1 for i in stored],
        "mask_token_id": config.integer(config.needed("mask_token_id")),
    }
    return Form(PEagle, settings | _peagle(config, layers), layers, text, _speculators_tables(config))


def _peagle(config: Keys, layers: LayerFacts, *sections: Keys) -> dict[str, Any]:
    """What every P-EAGLE has. Errors: FormatError for layers with and without a window."""
    if layers.sliding and layers.full:
        raise FormatError(
            "config.json: layer_types mixes full with sliding attention, which drafts of this kind do not"
        )
    flags = _eagle_flags(config, *sections)
    flags.pop("norm_output", None)  # nothing is passed on between the slots
    proposed = _proposed(config)
    ratios = {"down_sample_ratio": 0.7, "down_sample_ratio_min": 0.2}
    return flags | {
        "layers": layers.count,
        "block_size": config.integer("num_depths") or proposed or 8,
        **{key: config.number(key, known) for key, known in ratios.items()},
    }


def _speculators_block(config: Keys, name: str) -> Form:
    text, layers = _speculators_layers(config, None)
    _proposed(config)  # how many an engine asks for; the block says how many there are
    # DFlash's anchor predicts nothing and counts in the block, DSpark's predicts slot 1.
    from_anchor = config.flag("sample_from_anchor", name == "dspark")
    block = config.integer(config.needed("block_size"))
    settings = {
        "target_layer_ids": [i - 1 for i in config.integers(config.needed("aux_hidden_state_layer_ids"))],
        "mask_token_id": config.integer(config.needed("mask_token_id")),
        "layers": layers.count,
        "block_size": block - (not from_anchor),
        "sample_from_anchor": from_anchor,
    }
    both_ways = config.flag("sliding_window_non_causal")
    settings |= _block_attention(layers, False if both_ways else None, block)
    kind, settings = _with_heads(config, settings) if name == "dspark" else (DFlash, settings)
    return Form(kind, settings, layers, text, _speculators_tables(config))


def _speculators_layers(
    config: Keys, families: tuple[str, ...] | None, norm_first: bool = False
) -> tuple[dict[str, Any], LayerFacts]:
    """transformer_layer_config, whose class is Qwen3's where it does not say; `families` it may have (None: its layers
    are Qwen3's, whatever it says)."""
    inner = config.section(config.needed("transformer_layer_config"))
    inner.get("tie_word_embeddings")  # the target's; the draft has a head of its own
    family = inner.text("model_type", "qwen3")
    if families is not None and family not in families:
        raise FormatError(f"transformer_layer_config has model_type {family!r}; drafts of {', '.join(families)} load")
    layers = layers_of(inner, "qwen3" if families is None else family, norm_first, "qwen3")
    _same_width(config, layers)
    return layers.text(inner) | {"model_type": family}, layers


def _speculators_tables(config: Keys) -> dict[str, Any]:
    return {"scales_unknown": True, "ships_tables": False, "draft_vocabulary": config.integer("draft_vocab_size")}


def _proposed(config: Keys) -> int | None:
    """speculative_tokens of the first proposal method."""
    about, found = config.section("speculators_config"), []
    about.get("verifier")
    for method in about.items("proposal_methods") or []:
        if not isinstance(method, Mapping):
            raise FormatError(f"config.json: speculators_config.proposal_methods holds {method!r}, not a mapping")
        keys = Keys(method, "speculators_config.proposal_methods.")
        keys.get("proposal_type")
        found.append(keys.integer("speculative_tokens"))
        keys.settle()
    return found[0] if found else None


def _sglang(config: Keys) -> Form:
    inner = config.section("eagle_config")
    if agreed_flag("use_aux_hidden_state", inner, config) is False:
        raise FormatError("use_aux_hidden_state is false: this draft reads the last state alone, as EAGLE-1 does")
    norm_first = bool(agreed_flag("norm_before_residual", inner, config))
    layers = layers_of(config, "llama", norm_first, "llama")
    _same_width(config, layers)
    named = "eagle_aux_hidden_state_layer_ids"
    stored = agreed(named, inner, config)
    inner.integers(named), config.integers(named)
    _same_count(config, stored)
    taps, tokens = {"target_layer_ids": stored and list(stored)}, {key: config.integer(key) for key in MASK_TOKENS}
    token = agreed_token(tokens)
    parallel = config.flag("parallel_drafting") or token is not None
    if parallel and token is None:
        raise FormatError(
            f"config.json: parallel_drafting is true and none of {', '.join(MASK_TOKENS)} names the input token"
        )
    rows, tied = config.integer("draft_vocab_size"), config.flag("tie_word_embeddings")
    whole = rows in (None, layers.backbone.vocab_size)
    head = "embedding" if tied else "target" if whole else "missing"
    about = {"scales_unknown": True, "ships_tables": False, "head": head, "draft_vocabulary": rows}
    if parallel:
        settings = taps | {"mask_token_id": token} | _peagle(config, layers, inner)
        return Form(PEagle, settings, layers, layers.text(config), about)
    # The format does not say how far the draft was unrolled in training; 7 steps is the published table's length.
    settings = taps | {"layers": _one_layer(layers), "block_size": 7}
    return Form(Eagle3, settings | _eagle_flags(config, inner), layers, layers.text(config), about)


def _eagle1(config: Keys) -> Form:
    layers = layers_of(config, "llama", False, "llama")
    _same_width(config, layers)
    config.get("tie_word_embeddings")  # the target's, whose head is shared
    # The format does not say how many steps are drafted; 7 is the published table's length.
    settings = {"target_layer_ids": None, "layers": layers.count, "block_size": 7, "fc_bias": config.flag("bias", True)}
    about = {"scales_unknown": True, "ships_tables": False, "head": "target"}
    return Form(Eagle1, settings, layers, layers.text(config), about)


def agreed_token(tokens: Mapping[str, int | None]) -> int | None:
    """The one token that these keys name. Errors: FormatError where they name several."""
    named = {key: token for key, token in tokens.items() if token is not None}
    if len(set(named.values())) > 1:
        raise FormatError(f"config.json contradicts itself: {named}")
    return next(iter(named.values()), None)


def _eagle_flags(*sections: Keys) -> dict[str, bool]:
    """EAGLE-3.1's settings and gpt-oss's, those that are on."""
    found = {name: agreed_flag(name, *sections) for name in EAGLE_FLAGS}
    if found["fc_norm"] and found["norm_before_fc"]:
        raise FormatError("config.json: fc_norm and norm_before_fc are both true; the format has one or the other")
    return {name: True for name, on in found.items() if on}


def _same_width(config: Keys, layers: LayerFacts) -> None:
    width = config.integer("target_hidden_size")
    if width not in (None, layers.backbone.hidden_size):
        raise FormatError(
            f"config.json: target_hidden_size={width} and hidden_size={layers.backbone.hidden_size}: drafts here have "
            "the width of their target"
        )


def _same_count(config: Keys, taps: Sequence[int] | None) -> None:
    """Hold the number of taps, where a configuration gives it, against the list of them."""
    count = config.integer("num_aux_hidden_states")
    if count is not None and taps is not None and count != len(taps):
        raise FormatError(
            f"config.json contradicts itself: {config.path}num_aux_hidden_states={count} and {len(taps)} layers named"
        )


def _one_layer(layers: LayerFacts) -> int:
    if layers.count != 1:
        raise FormatError(f"num_hidden_layers={layers.count}: further layers of this format do not read the embedding")
    return layers.count


def _ours(key: str) -> str:
    key = key.removeprefix("model.")
    return "layers.0." + key.removeprefix("midlayer.") if key.startswith("midlayer.") else key


def _hold_frequencies(key: str, found: Tensor, backbone: Backbone) -> None:
    expected = backbone.inverse_frequencies()
    if found.shape != expected.shape or not torch.allclose(found.float().cpu(), expected, rtol=1e-2):
        raise FormatError(f"{key} holds other rope frequencies than config.json gives")
