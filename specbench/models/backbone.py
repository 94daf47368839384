"""The layers of a draft: families as data, one layer class for all families.

A family is one function from a target's raw configuration to `Backbone` and one row of FAMILIES; MODEL_TYPES says which
architectures have the layer of a family. For a target of any other architecture, `chosen` selects a family, with the
sizes of the target. Parameter names equal those of published checkpoints. Source: transformers' implementations.

    llama   pre-norm, no norms of queries and keys (Llama, Mistral, SmolLM2, SmolLM3)
    qwen2   llama with biases of queries, keys and values
    qwen3   llama with per-head norms of queries and keys
    phi3    llama with partial rope (only the leading features of a head are rotated)
    granite llama with factors on residuals, attention, embedding and logits
    gemma   llama with norms stored as 1 + w, scaled embedding, tanh-gelu
    gemma2  gemma with sandwich norms, capped attention scores and logits
    gemma3  gemma2 with norms of queries and keys and no caps; the rope of its full attention
    gemma4  full-attention geometry, sandwich norms with plain weights, layer scalar, values from the keys' projection,
            proportional rope, capped logits

A draft has full attention, or the window `method.window`: windows of the target's own layers are not copied.

Axes: B batch, T tokens, D hidden, V vocabulary, H query heads, G key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.models.kv_cache import KVCache
from specbench.models.rope import (
    KINDS,
    attention_factor,
    base,
    by_length,
    declared_kind,
    fraction,
    frequencies,
    resolve,
)

Rope = tuple[Tensor, Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Backbone:
    """Facts of a dense decoder family; sizes in features, angles in radians per position."""

    family: str
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    rope_fraction: float = 1.0
    rope_leading: bool = False  # the leading features of a head turn, not the leading ones of either half
    rope_scaling: Mapping[str, Any] | None = None  # as rope.resolve gives it
    rope_length: int | None = None  # of the texts, for scalings that depend on it
    norm_eps: float = 1e-6
    activation: str = "silu"
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    attention_bias: bool = False
    output_bias: bool | None = None  # of the output projection; None: as attention_bias
    mlp_bias: bool = False
    values_from_keys: bool = False
    value_norm: bool = False
    sandwich: bool = False
    layer_scalar: bool | None = None  # a layer's output times a constant; None: in layers with sandwich norms
    residual_scale: float = 1.0  # on what attention and feed-forward add
    norm_adds_one: bool = False  # norms are stored as w and multiply by 1 + w
    embedding_scale: float = 1.0
    soft_cap: float | None = None
    logit_scale: float = 1.0  # on the head's output, before the soft-cap
    window: int | None = None
    head_norms: bool = True
    norm_before_residual: bool = False  # a paired layer adds to its normed feature (a variant of published Eagle3s)

    @property
    def scale(self) -> float:
        """Factor on query-key products."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def inverse_frequencies(self, device: torch.device | None = None) -> Float[Tensor, " half"]:
        """Rope frequencies of the rotated features; without `rope_leading` those of the others are zero."""
        size = int(self.rope_fraction * self.head_dim)
        if self.rope_leading or self.rope_fraction == 1.0:
            return frequencies(self.rope_theta, size, self.rope_scaling, self.rope_length, device)
        half, turned = self.head_dim // 2, int(self.rope_fraction * self.head_dim // 2)
        exponents = torch.arange(0, 2 * turned, 2, dtype=torch.float32, device=device) / self.head_dim
        factor = 1.0 if self.rope_scaling is None else self.rope_scaling["factor"]
        return F.pad(1.0 / self.rope_theta**exponents / factor, (0, half - turned))

    def norm(self, size: int) -> nn.RMSNorm:
        """A norm over `size` features as the family stores it, initialised to the identity scale."""
        return (OffsetRMSNorm if self.norm_adds_one else nn.RMSNorm)(size, eps=self.norm_eps)


class OffsetRMSNorm(nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight, in fp32 (Gemma)."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).type_as(x)


def width(config: Mapping[str, Any]) -> int:
    """Features of the residual stream, by either name that configurations have for it."""
    return config.get("hidden_size") or config["n_embd"]


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Heads, key-value heads, head size and feed-forward size of a dense draft for a target's raw configuration.

    Targets with dense grouped-query attention have these sizes. Latent or compressed attention (a `q_lora_rank` or
    `kv_lora_rank`) and experts without a dense feed-forward do not: a draft then has Qwen3's proportions (heads of 128,
    at most 8 key-value heads, feed-forward 3 D, as Qwen3-8B with D 4096).
    """
    D = width(config)
    if config.get("q_lora_rank") or config.get("kv_lora_rank") or not config.get("intermediate_size"):
        head_dim = next(d for d in (128, 64, 32, 16, 8, 4, 2) if D % d == 0 and 4 * d <= D)
        heads = D // head_dim
        kv_heads = next(g for g in range(min(8, max(1, heads // 2)), 0, -1) if heads % g == 0)
        return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "intermediate_size": 3 * D}
    heads = config["num_attention_heads"]
    return {
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or D // heads,
        "intermediate_size": config["intermediate_size"],
    }


def llama(config: Mapping[str, Any]) -> Backbone:
    """Llama-like dense backbone with the sizes of a configuration (a raw config.json mapping)."""
    theta, scaling = resolve(config, THETAS.get(config.get("model_type", ""), 1e4))
    return Backbone(
        family="llama",
        hidden_size=width(config),
        **sizes(config),
        vocab_size=config["vocab_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=config.get("hidden_act") or "silu",
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        head_norms=False,
    )


def qwen2(config: Mapping[str, Any]) -> Backbone:
    """Llama's with biases of queries, keys and values, whatever the configuration says."""
    return replace(llama(config), family="qwen2", attention_bias=True, output_bias=False)


def qwen3(config: Mapping[str, Any]) -> Backbone:
    """Llama's with norms of queries and keys."""
    return replace(llama(config), family="qwen3", head_norms=True)


def phi3(config: Mapping[str, Any]) -> Backbone:
    """Llama's with a rope of the leading features; the library reads `yarn` there as longrope."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "yarn" in (found.get("rope_type"), found.get("type")):
        config = {**config, "rope_parameters": {**found, "rope_type": "longrope"}}
    share = fraction(config)
    return replace(llama(config), family="phi3", rope_fraction=share, rope_leading=share < 1.0)


def granite(config: Mapping[str, Any]) -> Backbone:
    """Llama's with Granite's four factors."""
    return replace(
        llama(config),
        family="granite",
        attention_scale=float(config.get("attention_multiplier", 1.0)),
        residual_scale=float(config.get("residual_multiplier", 1.0)),
        embedding_scale=float(config.get("embedding_multiplier", 1.0)),
        logit_scale=1.0 / float(config.get("logits_scaling", 1.0)),
    )


def gemma(config: Mapping[str, Any]) -> Backbone:
    """Llama's with Gemma's norms, embedding scale and activation (its configurations say gelu for tanh-gelu)."""
    given = config.get("hidden_activation") or config.get("hidden_act") or "gelu"
    facts = llama({**config, "hidden_act": "gelu_pytorch_tanh" if given == "gelu" else given})
    return replace(facts, family="gemma", norm_adds_one=True, embedding_scale=facts.hidden_size**0.5)


def gemma2(config: Mapping[str, Any]) -> Backbone:
    """Gemma's with sandwich norms, its own attention scale and capped scores and logits."""
    return replace(
        gemma(config),
        family="gemma2",
        sandwich=True,
        layer_scalar=False,
        attention_scale=float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        attention_soft_cap=config.get("attn_logit_softcapping", 50.0),
        soft_cap=config.get("final_logit_softcapping", 30.0),
    )


def gemma3(config: Mapping[str, Any]) -> Backbone:
    """Gemma2's with norms of queries and keys, without caps; published configurations leave defaults out."""
    config = {**GEMMA3_DEFAULTS, **config}
    facts = gemma2({**config, "final_logit_softcapping": config.get("final_logit_softcapping")})
    return replace(facts, family="gemma3", head_norms=True, attention_soft_cap=None)


def gemma4(config: Mapping[str, Any]) -> Backbone:
    """Gemma4-like dense backbone; a draft takes the full-attention geometry (global head size and rope)."""
    rope = (config.get("rope_parameters") or {}).get("full_attention") or {}
    factor = float(rope.get("factor") or 1.0)
    shared = bool(config.get("attention_k_eq_v", False))
    found = sizes(config)
    if shared:
        found["kv_heads"] = config.get("num_global_key_value_heads") or found["kv_heads"]
    found["head_dim"] = config.get("global_head_dim") or found["head_dim"]
    return Backbone(
        family="gemma4",
        hidden_size=width(config),
        **found,
        vocab_size=config["vocab_size"],
        rope_theta=float(rope.get("rope_theta", 1e6)),
        rope_fraction=float(rope.get("partial_rotary_factor", 1.0)),
        rope_scaling=None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=config.get("hidden_activation") or "gelu_pytorch_tanh",
        attention_scale=1.0,
        attention_bias=bool(config.get("attention_bias", False)),
        values_from_keys=shared,
        value_norm=True,
        sandwich=True,
        embedding_scale=width(config) ** 0.5,
        soft_cap=config.get("final_logit_softcapping"),
    )


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Backbone]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "phi3": phi3,
    "granite": granite,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma4": gemma4,
}
# model_type of a target (of its text configuration first) -> the family whose layer it has.
MODEL_TYPES: dict[str, str] = {
    **{family: family for family in FAMILIES},
    **dict.fromkeys(("mistral", "mixtral", "smollm3"), "llama"),
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen3",
    "gemma3_text": "gemma3",
    **dict.fromkeys(("gemma4_text", "gemma4_unified", "gemma4_unified_text"), "gemma4"),
}
# Mixtures of experts whose attention is the family's: a draft's feed-forward is dense.
OF_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
# Rope bases that these architectures have where a configuration names none; 10,000 elsewhere.
THETAS = {"mixtral": 1e6, "smollm3": 2e6, "gemma3_text": 1e6, "gemma3": 1e6}
GEMMA3_DEFAULTS = {
    "model_type": "gemma3",
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}


@dataclass(frozen=True)
class Choice:
    """The family of a draft's layers, and the reason. `own`: the target's layer belongs to this family."""

    family: str
    own: bool
    reason: str


def chosen(config: Mapping[str, Any], family: str | None = None) -> Choice:
    """The family of a draft for a target's raw configuration; `family` is the user's own choice.

    Errors: ValueError for a family that is not in the table.
    """
    text = config.get("text_config") or config
    kinds = [str(part.get("model_type") or "unknown") for part in (text, config)]
    own = next((MODEL_TYPES[kind] for kind in kinds if kind in MODEL_TYPES), None)
    if family is not None and family not in FAMILIES:
        raise ValueError(f"backbone {family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    name, kind = family or own or "qwen3", kinds[0]
    if own is None:
        reason = f"target model_type {kind} has no layer of ours: draft uses {name}'s layer with the target's sizes"
    elif name != own:
        reason = f"method.backbone={name}: draft uses {name}'s layer in place of the target's own, {own}"
    else:
        reason = f"target model_type {kind}: draft uses the target's own layer, {name}"
    scaled = declared_kind(text)
    if own is None and scaled != "default":
        reason += f", without its rope scaling ({scaled})"
    if text.get("sliding_window") and text.get("use_sliding_window", True):
        reason += f"; windows of its layers ({text['sliding_window']} positions) are not taken over"
    if kind in OF_EXPERTS:
        reason += "; one dense feed-forward takes the place of its experts"
    if kind == "smollm3":
        reason += "; its layers without rope are drafted with rope, like its others"
    return Choice(name, name == own, reason)


def backbone_of(
    config: Mapping[str, Any], family: str | None = None, window: int | None = None, length: int | None = None
) -> Backbone:
    """The backbone for a target's raw configuration: of its own family where `chosen` knows one, or `family` with the
    target's sizes. `length`: of the longest texts that the draft is for.

    A family other than the target's keeps the target's embedding scale, logit scale and soft-cap, because these belong
    to its tables. Errors: ValueError naming the setting.
    """
    if window is not None and window < 1:
        raise ValueError(f"window={window}: a slot sees at least itself; give 1 or more positions, or null for all")
    name, own = chosen(config, family).family, chosen(config)
    text = config.get("text_config") or config
    if own.own and name == own.family:
        facts = FAMILIES[name](text)
    else:
        # The rope of the target is copied only if this family can compute it and the heads of the target are known.
        if not own.own or declared_kind(text) not in KINDS:
            plain_rope = {"rope_parameters": None, "rope_scaling": None, "rope_theta": base(text, 1e4)}
            text = {**text, **plain_rope}
        activation = text.get("hidden_act") if text.get("hidden_act") in ACTIVATIONS else None
        facts = FAMILIES[name]({**text, "hidden_act": activation})
    if own.own and name != own.family:
        tables = FAMILIES[own.family](config.get("text_config") or config)
        scales = ("embedding_scale", "soft_cap", "logit_scale")
        facts = replace(facts, **{scale: getattr(tables, scale) for scale in scales})
    if facts.activation not in ACTIVATIONS:
        raise ValueError(
            f"activation {facts.activation!r} of the target is unknown here ({', '.join(ACTIVATIONS)} are known): set "
            "method.backbone to another family, which takes silu"
        )
    return replace(facts, window=window, rope_length=length if by_length(facts.rope_scaling) else None)


def rotate(x: Float[Tensor, "... h d"], rope: Rope) -> Float[Tensor, "... h d"]:
    """Rotary embedding of every head; `rope` is what RotaryEmbedding gives, for the leading features or for all."""
    cos, sin = rope
    if cos.shape[-1] < x.shape[-1]:
        leading, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        return torch.cat([rotate(leading, rope), rest], -1)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RotaryEmbedding(nn.Module):
    """Positions -> (cos, sin) of shape (..., 1, r), computed in fp32 whatever the dtype of the model; r features turn.

    The first half of sin is negated: rotating the halves (a, b) of a head is (a, b) cos + (b, a) (-sin, sin).
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.register_buffer("frequencies", backbone.inverse_frequencies(), persistent=False)
        self.factor = attention_factor(backbone.rope_scaling)
        self._table: Rope | None = None

    def forward(self, positions: Int[Tensor, "*shape"], dtype: torch.dtype) -> Rope:
        angles = positions[..., None, None].float() * self.frequencies.float()
        cos, sin = angles.cos(), angles.sin()
        if self.factor != 1.0:
            cos, sin = cos * self.factor, sin * self.factor
        cos, sin = cos.to(dtype), sin.to(dtype)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def behind(self, cache: KVCache, size: int, dtype: torch.dtype, depth: Int[Tensor, "B S"] | None = None) -> Rope:
        """Of the `size` positions behind each row of a cache, from a table that grows with need; `depth`: of the
        positions so far behind it, below `size`."""
        end, device = cache.longest + size, self.frequencies.device
        table = self._table
        if table is None or len(table[0]) < end or (table[0].dtype, table[0].device) != (dtype, device):
            with torch.inference_mode(False), torch.no_grad():
                table = self._table = self(torch.arange(max(256, 2 * end), device=device), dtype)
        if depth is not None:
            at = cache.lengths[:, None] + depth
            return table[0][at], table[1][at]
        if cache.even:
            return table[0][None, end - size : end], table[1][None, end - size : end]
        at = cache.lengths[:, None] + torch.arange(size, device=device)
        return table[0][at], table[1][at]


class Attention(nn.Module):
    """Projections and per-head norms; the caller provides the attention itself."""

    def __init__(self, backbone: Backbone, input_size: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = backbone.heads, backbone.kv_heads, backbone.head_dim
        bias = backbone.attention_bias
        self.q_proj = nn.Linear(input_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(input_size, self.kv_heads * self.head_dim, bias=bias)
        separate = not backbone.values_from_keys
        self.v_proj = nn.Linear(input_size, self.kv_heads * self.head_dim, bias=bias) if separate else None
        output_bias = bias if backbone.output_bias is None else backbone.output_bias
        self.o_proj = nn.Linear(self.heads * self.head_dim, backbone.hidden_size, bias=output_bias)
        self.q_norm, self.k_norm = (
            backbone.norm(self.head_dim) if backbone.head_norms else nn.Identity() for _ in range(2)
        )
        self.value_eps = backbone.norm_eps if backbone.value_norm else None

    def queries(self, x: Float[Tensor, "*b D"], rope: Rope) -> Float[Tensor, "*b H d"]:
        queries = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        # Under autocast a norm with fp32 weights gives fp32; attention kernels need the dtype of the values.
        return rotate(self.q_norm(queries), rope).to(queries.dtype)

    def keys_values(self, x: Float[Tensor, "*b D"], rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values (..., G, d); values come from the key projection when the family shares it."""
        keys = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        values = keys if self.v_proj is None else self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.value_eps is not None:
            values = F.rms_norm(values, (self.head_dim,), eps=self.value_eps)
        return rotate(self.k_norm(keys), rope).to(keys.dtype), values.to(keys.dtype)


class MLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        D, M, bias = backbone.hidden_size, backbone.intermediate_size, backbone.mlp_bias
        self.gate_proj, self.up_proj = nn.Linear(D, M, bias=bias), nn.Linear(D, M, bias=bias)
        self.down_proj = nn.Linear(M, D, bias=bias)
        self.activation = ACTIVATIONS[backbone.activation]

    def forward(self, x: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer. `paired` layers read [embedding ; feature] (2D) and add to the feature (EAGLE-3); without
    `norms_input` attention reads the layer's input as it is (EAGLE-1)."""

    def __init__(self, backbone: Backbone, paired: bool = False, norms_input: bool = True):
        super().__init__()
        D = backbone.hidden_size
        self.self_attn = Attention(backbone, 2 * D if paired else D)
        self.mlp = MLP(backbone)
        self.input_layernorm = backbone.norm(D) if norms_input else nn.Identity()
        self.hidden_norm = backbone.norm(D) if paired else None
        self.post_attention_layernorm = backbone.norm(D)
        self.sandwich, self.residual_scale = backbone.sandwich, backbone.residual_scale
        self.adds_to_normed = paired and backbone.norm_before_residual
        if self.sandwich:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = backbone.norm(D), backbone.norm(D)
        if self.sandwich if backbone.layer_scalar is None else backbone.layer_scalar:
            # A constant of the family, not trained: it is a buffer of the target's own layers too.
            self.register_buffer("layer_scalar", torch.ones(1))
        else:
            self.layer_scalar = None

    def normed(self, x: Float[Tensor, "*b D"], embedding: Float[Tensor, "*b D"] | None = None) -> Tensor:
        """The input of the attention projections."""
        if self.hidden_norm is None:
            return self.input_layernorm(x)
        return torch.cat([self.input_layernorm(embedding), self.hidden_norm(x)], -1)

    def finish(self, x: Float[Tensor, "*b D"], seen: Float[Tensor, "*b H d"]) -> Float[Tensor, "*b D"]:
        """Residual, feed-forward and residual after attention."""
        if self.adds_to_normed:
            x = self.hidden_norm(x)
        attended = self.attended(x, seen)
        if self.sandwich:
            x = self.add(x, self.post_attention_layernorm(attended))
            x = self.add(x, self.post_feedforward_layernorm(self.fed_forward(self.pre_feedforward_layernorm(x))))
        else:
            x = self.add(x, attended)
            x = self.add(x, self.fed_forward(self.post_attention_layernorm(x)))
        return x if self.layer_scalar is None else x * self.layer_scalar

    def attended(self, x: Float[Tensor, "*b D"], seen: Float[Tensor, "*b H d"]) -> Float[Tensor, "*b D"]:
        """The output of the attention sublayer, whose input x is; a subclass can change it."""
        return self.self_attn.o_proj(seen.flatten(-2))

    def fed_forward(self, x: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        """The output of the feed-forward sublayer; a subclass can change it."""
        return self.mlp(x)

    def add(self, x: Float[Tensor, "*b D"], change: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        """The residual stream after a sublayer."""
        return x + change if self.residual_scale == 1.0 else x + change * self.residual_scale
