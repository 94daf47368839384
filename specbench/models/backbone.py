"""The layers of a draft: family facts as data, one layer for all families, the key-value cache, the frozen tables.

Parameter names equal those of published checkpoints. Sources of the facts: METHODS of each family's reference
configuration (Qwen3: per-head q/k norms, pre-norm layout; Llama: the same without those norms; Gemma4: full-attention
geometry, sandwich norms, layer scalar, value = scale-free RMS norm of the key projection, proportional rope,
soft-capped head). A target of any other architecture lends its sizes; where its attention is not of that kind, `sizes`
gives a dense draft of its width Qwen3's proportions.

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
    norm_eps: float = 1e-6
    activation: str = "silu"
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    attention_bias: bool = False
    values_from_keys: bool = False
    value_norm: bool = False
    sandwich: bool = False
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
        """Rope frequencies; beyond `rope_fraction` of the head they are zero (those features are not rotated)."""
        half, turned = self.head_dim // 2, int(self.rope_fraction * self.head_dim // 2)
        exponents = torch.arange(0, 2 * turned, 2, dtype=torch.float32, device=device) / self.head_dim
        return F.pad(1.0 / self.rope_theta**exponents, (0, half - turned))


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Heads, key-value heads, head size and feed-forward size of a dense draft for a target's raw configuration.

    Targets with dense grouped-query attention give their own. Latent or compressed attention (a `q_lora_rank` or
    `kv_lora_rank`) and experts without a dense feed-forward have none: there a draft takes Qwen3's proportions (heads
    of 128, at most 8 key-value heads, feed-forward 3 D, as Qwen3-8B has at D 4096).
    """
    D, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("q_lora_rank") or config.get("kv_lora_rank") or not config.get("intermediate_size"):
        head_dim = next(d for d in (128, 64, 32, 16, 8, 4, 2) if D % d == 0 and 4 * d <= D)
        heads = D // head_dim
        kv_heads = next(g for g in range(min(8, max(1, heads // 2)), 0, -1) if heads % g == 0)
        return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "intermediate_size": 3 * D}
    return {
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or D // heads,
        "intermediate_size": config["intermediate_size"],
    }


def _rope_theta(config: Mapping[str, Any], default: float) -> float:
    parameters = config.get("rope_parameters") or {}
    parameters = parameters.get("main", parameters)  # DeepSeek-V4 keeps one set for each kind of attention
    return float(parameters.get("rope_theta") or config.get("rope_theta") or default)


def qwen3(config: Mapping[str, Any]) -> Backbone:
    """Qwen3-like dense backbone with the sizes of a configuration (a raw config.json mapping)."""
    return Backbone(
        family="qwen3",
        hidden_size=config["hidden_size"],
        **sizes(config),
        vocab_size=config["vocab_size"],
        rope_theta=_rope_theta(config, 1e6),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=config.get("hidden_act") or "silu",
        attention_bias=bool(config.get("attention_bias", False)),
    )


def llama(config: Mapping[str, Any]) -> Backbone:
    """Llama-like dense backbone: Qwen3's without norms of queries and keys (what SGLang's Eagle3 loads)."""
    return replace(qwen3(config), family="llama", head_norms=False)


def gemma4(config: Mapping[str, Any]) -> Backbone:
    """Gemma4-like dense backbone; a draft takes the full-attention geometry (global head size and rope)."""
    config = config.get("text_config") or config
    rope = (config.get("rope_parameters") or {}).get("full_attention") or {}
    shared = bool(config.get("attention_k_eq_v", False))
    found = sizes(config)
    if shared:
        found["kv_heads"] = config.get("num_global_key_value_heads") or found["kv_heads"]
    found["head_dim"] = config.get("global_head_dim") or found["head_dim"]
    return Backbone(
        family="gemma4",
        hidden_size=config["hidden_size"],
        **found,
        vocab_size=config["vocab_size"],
        rope_theta=float(rope.get("rope_theta", 1e6)),
        rope_fraction=float(rope.get("partial_rotary_factor", 1.0)),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=config.get("hidden_activation") or "gelu_pytorch_tanh",
        attention_scale=1.0,
        attention_bias=bool(config.get("attention_bias", False)),
        values_from_keys=shared,
        value_norm=True,
        sandwich=True,
        embedding_scale=config["hidden_size"] ** 0.5,
        soft_cap=config.get("final_logit_softcapping"),
    )


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Backbone]] = {"qwen3": qwen3, "gemma4": gemma4, "llama": llama}


def backbone_of(config: Mapping[str, Any], family: str | None = None, window: int | None = None) -> Backbone:
    """The backbone for a target's raw configuration: its own family, or `family` with the target's sizes.

    A family other than the target's keeps the target's embedding scale and soft-cap, since those belong to its tables.
    """
    own = "gemma4" if "gemma4" in str(config.get("model_type", "")) else "qwen3"
    name = family or own
    if name not in FAMILIES:
        raise ValueError(f"backbone {name!r} is unknown; choose one of {', '.join(FAMILIES)}")
    text = config.get("text_config") or config
    facts = FAMILIES[name](text)
    if name != own:
        tables = FAMILIES[own](text)
        facts = replace(facts, embedding_scale=tables.embedding_scale, soft_cap=tables.soft_cap)
    if facts.activation not in ACTIVATIONS:
        raise ValueError(f"activation {facts.activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    return replace(facts, window=window)


def rotate(x: Float[Tensor, "... h d"], rope: Rope) -> Float[Tensor, "... h d"]:
    """Rotary embedding of every head; `rope` is what RotaryEmbedding gives."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RotaryEmbedding(nn.Module):
    """Positions -> (cos, sin) of shape (..., 1, d), computed in fp32 whatever the dtype of the model.

    The first half of sin is negated: rotating the halves (a, b) of a head is (a, b) cos + (b, a) (-sin, sin).
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.register_buffer("frequencies", backbone.inverse_frequencies(), persistent=False)
        self._table: Rope | None = None

    def forward(self, positions: Int[Tensor, "*shape"], dtype: torch.dtype) -> Rope:
        angles = positions[..., None, None].float() * self.frequencies.float()
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def behind(self, cache: KVCache, size: int, dtype: torch.dtype) -> Rope:
        """Of the `size` positions behind each row of a cache, from a table that grows with need."""
        end, device = cache.longest + size, self.frequencies.device
        table = self._table
        if table is None or len(table[0]) < end or (table[0].dtype, table[0].device) != (dtype, device):
            with torch.inference_mode(False), torch.no_grad():
                table = self._table = self(torch.arange(max(256, 2 * end), device=device), dtype)
        if cache.even:
            return table[0][None, end - size : end], table[1][None, end - size : end]
        at = cache.lengths[:, None] + torch.arange(size, device=device)
        return table[0][at], table[1][at]


class Attention(nn.Module):
    """Projections and per-head norms; who attends to what is decided by the caller."""

    def __init__(self, backbone: Backbone, input_size: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = backbone.heads, backbone.kv_heads, backbone.head_dim
        bias = backbone.attention_bias
        self.q_proj = nn.Linear(input_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(input_size, self.kv_heads * self.head_dim, bias=bias)
        separate = not backbone.values_from_keys
        self.v_proj = nn.Linear(input_size, self.kv_heads * self.head_dim, bias=bias) if separate else None
        self.o_proj = nn.Linear(self.heads * self.head_dim, backbone.hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=backbone.norm_eps) if backbone.head_norms else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=backbone.norm_eps) if backbone.head_norms else nn.Identity()
        self.value_eps = backbone.norm_eps if backbone.value_norm else None

    def queries(self, x: Float[Tensor, "*b D"], rope: Rope) -> Float[Tensor, "*b H d"]:
        queries = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        # Under autocast a norm of fp32 weights gives fp32; attention kernels want what the values have.
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
        D, M = backbone.hidden_size, backbone.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(D, M, bias=False), nn.Linear(D, M, bias=False)
        self.down_proj = nn.Linear(M, D, bias=False)
        self.activation = ACTIVATIONS[backbone.activation]

    def forward(self, x: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer. `paired` layers read [embedding ; feature] (2D) and add to the feature (EAGLE-3)."""

    def __init__(self, backbone: Backbone, paired: bool = False):
        super().__init__()
        D, eps = backbone.hidden_size, backbone.norm_eps
        self.self_attn = Attention(backbone, 2 * D if paired else D)
        self.mlp = MLP(backbone)
        self.input_layernorm = nn.RMSNorm(D, eps=eps)
        self.hidden_norm = nn.RMSNorm(D, eps=eps) if paired else None
        self.post_attention_layernorm = nn.RMSNorm(D, eps=eps)
        self.sandwich, self.adds_to_normed = backbone.sandwich, paired and backbone.norm_before_residual
        if self.sandwich:
            self.pre_feedforward_layernorm = nn.RMSNorm(D, eps=eps)
            self.post_feedforward_layernorm = nn.RMSNorm(D, eps=eps)
            # A constant of the family, not trained: it is a buffer of the target's own layers too.
            self.register_buffer("layer_scalar", torch.ones(1))

    def normed(self, x: Float[Tensor, "*b D"], embedding: Float[Tensor, "*b D"] | None = None) -> Tensor:
        """What the attention projections read."""
        if self.hidden_norm is None:
            return self.input_layernorm(x)
        return torch.cat([self.input_layernorm(embedding), self.hidden_norm(x)], -1)

    def finish(self, x: Float[Tensor, "*b D"], seen: Float[Tensor, "*b H d"]) -> Float[Tensor, "*b D"]:
        """Residual, feed-forward and residual after attention."""
        if self.adds_to_normed:
            x = self.hidden_norm(x)
        seen = self.self_attn.o_proj(seen.flatten(-2))
        if not self.sandwich:
            x = x + seen
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(seen)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar
