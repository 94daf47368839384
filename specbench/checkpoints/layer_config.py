"""The decoder layers in a published draft's config.json, converted to a Backbone.

A missing key has the default of the configuration class that model_type names, because the library that wrote the file
leaves out defaults; a test compares DEFAULTS with transformers. If model_type names a class that is not in DEFAULTS,
the keys that matter must be in the file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from specbench.checkpoints.config_keys import FormatError, Keys, agreed
from specbench.models.backbone import ACTIVATIONS, Backbone, backbone_of

DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "intermediate_size": 22016},
    "llama": {"num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "intermediate_size": 11008},
}
SHARED_DEFAULTS = {"hidden_size": 4096, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
SHARED_DEFAULTS |= {"num_hidden_layers": 32}
VOCABULARIES = {"qwen3": 151936, "llama": 32000}
# max_position_embeddings of the same classes.
POSITIONS = {"qwen3": 32768, "llama": 2048}
QWEN3_FULL_LAYERS = 28  # Qwen3Config's max_window_layers: layers before it have no window
# Scalings of rope that do not depend on the length of the text, and the numbers that they read.
FIXED_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class LayerFacts:
    """Number and facts of a draft's layers; those in `sliding`, counted from 0, have the backbone's attention
    window."""

    count: int
    backbone: Backbone
    facts: dict[str, Any]
    sliding: frozenset[int] = frozenset()

    @property
    def full(self) -> list[int]:
        """The other layers."""
        return [i for i in range(self.count) if i not in self.sliding]

    def text(self, config: Keys) -> dict[str, Any]:
        """The configuration with what it leaves out filled in."""
        return self.facts | {key: value for key, value in config.values.items() if value is not None}


def layers_of(config: Keys, family: str, norm_before_residual: bool = False, unnamed: str = "qwen3") -> LayerFacts:
    """Read the layers of `family` (qwen3 or llama) from a configuration whose defaults are those of the class that
    its model_type names, `unnamed` where it names none. Errors: FormatError."""
    known = config.text("model_type", unnamed)
    defaults = {} if known not in DEFAULTS else SHARED_DEFAULTS | {"vocab_size": VOCABULARIES[known]} | DEFAULTS[known]

    def asked(key: str, read: Any) -> Any:
        found = read(key, defaults.get(key))
        if found is None and key not in ("num_key_value_heads", "head_dim"):
            raise FormatError(
                f"config.json lacks {config.path + key!r}, and the default of model_type {known!r} is not known here"
            )
        return found

    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    facts = {key: asked(key, config.integer) for key in (*sizes, "num_key_value_heads", "head_dim")}
    for key, value in facts.items():
        if value is not None and value < 1:
            raise FormatError(f"config.json: {config.path}{key}={value} is below 1")
    heads = facts["num_attention_heads"]
    if facts["num_key_value_heads"] is None:
        if known not in DEFAULTS:
            raise FormatError(f"config.json lacks '{config.path}num_key_value_heads', which model_type {known!r} needs")
        facts["num_key_value_heads"] = heads
    if heads % facts["num_key_value_heads"]:
        raise FormatError(
            f"config.json: {config.path}num_attention_heads={heads} is not a multiple of num_key_value_heads="
            f"{facts['num_key_value_heads']}"
        )
    if facts["head_dim"] is None:
        if facts["hidden_size"] % heads:
            raise FormatError(
                f"config.json lacks '{config.path}head_dim', and hidden_size={facts['hidden_size']} is not a multiple "
                f"of num_attention_heads={heads}"
            )
        facts["head_dim"] = facts["hidden_size"] // heads
    facts |= {"rms_norm_eps": asked("rms_norm_eps", config.number), "hidden_act": asked("hidden_act", config.text)}
    config.choice("hidden_act", ACTIVATIONS)
    facts |= {
        "attention_bias": config.flag("attention_bias"),
        "mlp_bias": family == "llama" and config.flag("mlp_bias"),
    }
    facts |= _rope(config, defaults.get("rope_theta"))
    window, sliding = windows_of(config, facts["num_hidden_layers"])
    backbone = _backbone(facts | {"model_type": family}, family, window, norm_before_residual)
    return LayerFacts(facts["num_hidden_layers"], backbone, facts, sliding)


def gemma4_layers_of(config: Keys, own_values: bool) -> LayerFacts:
    """The same of a Gemma4 text configuration, whose drafts have the full-attention geometry; `own_values`: the
    checkpoint holds value projections, whatever `attention_k_eq_v` says of the target."""
    rope = config.section("rope_parameters")
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise FormatError(f"config.json: {rope.path}rope_type={kind!r}: Gemma4's is given by kind of layer")
    rope.get("rope_theta")  # null beside the two kinds
    full = rope.section(FULL)
    rope.get(SLIDING)  # drafts have no such layers
    kind = full.text("rope_type", "default")
    if kind not in ("default", "proportional"):
        raise FormatError(
            f"config.json: {full.path}rope_type={kind!r}: Gemma4's full attention is default or proportional"
        )
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    facts: dict[str, Any] = {key: config.integer(config.needed(key)) for key in sizes}
    for key in ("num_key_value_heads", "num_global_key_value_heads", "head_dim", "global_head_dim"):
        facts[key] = config.integer(key)
    facts |= {
        "model_type": "gemma4_text",
        "rms_norm_eps": config.number("rms_norm_eps", 1e-6),
        "hidden_activation": config.choice("hidden_activation", ACTIVATIONS),
        "attention_bias": config.flag("attention_bias"),
        "attention_k_eq_v": config.flag("attention_k_eq_v") and not own_values,
        "final_logit_softcapping": config.number("final_logit_softcapping"),
        "rope_parameters": {
            FULL: {
                "rope_type": kind,
                "rope_theta": full.number("rope_theta", 1e6),
                "partial_rotary_factor": full.number("partial_rotary_factor", 1.0),
            }
        },
    }
    config.get("vocab_size_per_layer_input")  # of embeddings that the draft does not have
    if set(config.items("layer_types") or [FULL]) != {FULL}:
        raise FormatError(
            f"config.json: {config.path}layer_types={config.items('layer_types')}: drafts have {FULL} alone"
        )
    for key in ("sliding_window", "use_sliding_window"):
        config.get(key)  # of the target's own layers
    return LayerFacts(facts["num_hidden_layers"], _backbone(facts, "gemma4", None, False), facts)


def windows_of(config: Keys, layers: int) -> tuple[int | None, frozenset[int]]:
    """The attention window in positions and the layers that have it; None and no layers if there is none.

    `layer_types` decides, and without it Qwen3's rule: layers from `max_window_layers` on slide when
    `use_sliding_window`. Errors: FormatError for layers of other kinds and for a window that is not there.
    """
    kinds, window = config.items("layer_types"), config.integer("sliding_window")
    used, first = config.flag("use_sliding_window", None), config.integer("max_window_layers", QWEN3_FULL_LAYERS)
    if kinds is None:
        slides = bool(used) and window is not None
        kinds = [SLIDING if slides and i >= first else FULL for i in range(layers)]
    if not all(kind in (FULL, SLIDING) for kind in kinds):
        raise FormatError(f"config.json: {config.path}layer_types={kinds}: drafts here have {FULL} or {SLIDING}")
    sliding = frozenset(i for i, kind in enumerate(kinds) if kind == SLIDING)
    if not sliding:
        return None, sliding
    if len(kinds) != layers:
        raise FormatError(f"config.json: {config.path}layer_types={kinds} names {len(kinds)} of {layers} layers")
    if used is False or window is None or window < 1:
        raise FormatError(
            f"config.json: {config.path}layer_types says {SLIDING}, and sliding_window={window}, "
            f"use_sliding_window={used} give no window"
        )
    return window, sliding


def _rope(config: Keys, default: float | None) -> dict[str, Any]:
    """Base and scaling of rope, which may stand in three places. Errors: FormatError for a scaling that depends on the
    length of the text, and for one that is unknown or lacks a value."""
    places, scalings = [config], []
    for key in ("rope_parameters", "rope_scaling"):
        if key not in config:
            config.get(key)
            continue
        rope = config.section(key)
        places.append(rope)
        kind = agreed("rope_type", rope) or agreed("type", rope) or "default"
        # Multimodal rope on text gives all its axes one position, which is plain rope.
        for axis in ("mrope_section", "mrope_interleaved"):
            rope.get(axis)
        if kind in ("default", "mrope"):
            continue
        if kind not in FIXED_SCALINGS:
            raise FormatError(
                f"config.json: {rope.path}rope_type={kind!r}: drafts in published formats are read with plain rope or "
                f"{', '.join(FIXED_SCALINGS)}"
            )
        numbers = {name: rope.number(name) for name in FIXED_SCALINGS[kind]}
        whole = rope.integer("original_max_position_embeddings")
        found = {"rope_type": kind, "original_max_position_embeddings": whole} | numbers
        if kind == "yarn":
            found["truncate"] = rope.flag("truncate", None)
        scalings.append({name: value for name, value in found.items() if value is not None})
    for place in places:
        place.number("rope_theta")
    theta = agreed("rope_theta", *places)
    theta = default if theta is None else theta
    if theta is None:
        raise FormatError(f"config.json lacks '{config.path}rope_theta', and no default is known for its model_type")
    if theta <= 0:
        raise FormatError(f"config.json: rope_theta={theta} is not above 0")
    if any(scaling != scalings[0] for scaling in scalings):
        raise FormatError(f"config.json contradicts itself: rope_parameters and rope_scaling are {scalings}")
    scaling = scalings[0] if scalings else {"rope_type": "default"}
    facts = {"rope_theta": float(theta), "rope_parameters": {"rope_theta": float(theta)} | scaling}
    # Where the scaling does not say how many positions the model had before, it is as many as the model has.
    return facts | {"max_position_embeddings": config.integer("max_position_embeddings")} if scalings else facts


def _backbone(facts: dict[str, Any], family: str, window: int | None, norm_before_residual: bool) -> Backbone:
    try:
        found = backbone_of(facts, family, window)
    except ValueError as error:
        raise FormatError(f"config.json: {error}") from error
    return replace(found, norm_before_residual=norm_before_residual) if norm_before_residual else found
