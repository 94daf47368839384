"""Rotary position embedding (rope): frequencies, and the published scalings for longer texts.

A draft keeps its keys between rounds and is trained on every prefix of a text at once, so its frequencies are fixed.
Two scalings (dynamic, longrope) depend on the length of the text: a draft uses their frequencies at one `length`, the
longest that it is trained on.

Sources: the reference implementations' formulas (transformers' ROPE_INIT_FUNCTIONS), which the tests compare with.
linear: position interpolation; dynamic: NTK-aware base; yarn: Peng et al., arXiv 2309.00071; longrope: Ding et al.,
arXiv 2402.13753; llama3: Llama 3.1.

Axes: d rotated features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Scaling = Mapping[str, Any]
Half = Float[Tensor, " half"]


def plain(theta: float, size: int, device: torch.device | None = None) -> Half:
    """theta^(-2i/d) of the d = `size` rotated features, in radians per position."""
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)


def frequencies(
    theta: float,
    size: int,
    scaling: Scaling | None = None,
    length: int | None = None,
    device: torch.device | None = None,
) -> Half:
    """Frequencies with `scaling` (from `resolve`) for texts of `length` tokens (None: at most the original number of
    positions)."""
    if scaling is None:
        return plain(theta, size, device)
    return KINDS[scaling["rope_type"]](theta, size, scaling, length, device)


def attention_factor(scaling: Scaling | None) -> float:
    """Factor of cosines and sines."""
    return 1.0 if scaling is None else float(scaling.get("attention_factor", 1.0))


def resolve(config: Mapping[str, Any], theta: float) -> tuple[float, Scaling | None]:
    """Base and scaling of a target's raw configuration; `theta`: the default base of its architecture.

    The scaling has all values of its formula, defaults included. If different kinds of layers have different ropes,
    that of full attention is used. Errors: ValueError for a type that is not implemented here or lacks a value.
    """
    found, theta, kind = _declared(config), base(config, theta), declared_kind(config)
    if kind == "default":
        return theta, None
    if kind not in KINDS:
        raise ValueError(f"rope type {kind!r} of the target is unknown here; known: default, {', '.join(KINDS)}")
    positions = config.get("max_position_embeddings")
    original = config.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
    given = {**found, "rope_type": kind, "original_max_position_embeddings": original or positions}
    if kind == "dynamic":
        given["original_max_position_embeddings"] = positions
    if kind in FACTORS and not given.get("factor") and positions:
        given["factor"] = positions / given["original_max_position_embeddings"]
    missing = [key for key in NEEDS[kind] if given.get(key) is None]
    if missing:
        raise ValueError(f"rope type {kind!r} of the target lacks {', '.join(missing)} in its rope_parameters")
    if given.get("attention_factor") is None and kind in FACTORS:
        given["attention_factor"] = FACTORS[kind](given)
    kept = {"rope_type", "attention_factor", *NEEDS[kind], *OPTIONAL.get(kind, ())}
    return theta, {key: value for key, value in given.items() if key in kept and value is not None}


def base(config: Mapping[str, Any], default: float) -> float:
    """The base of a raw configuration, or `default`."""
    return float(_declared(config).get("rope_theta") or config.get("rope_theta") or default)


def declared_kind(config: Mapping[str, Any]) -> str:
    """The type of scaling that a raw configuration asks for, `default` for none."""
    found = _declared(config)
    kind = str(found.get("rope_type") or found.get("type") or "default")
    return {"su": "longrope"}.get(kind, kind)


def by_length(scaling: Scaling | None) -> bool:
    """Whether the frequencies depend on the length of the text."""
    return scaling is not None and scaling["rope_type"] in ("dynamic", "longrope")


def fraction(config: Mapping[str, Any]) -> float:
    """Share of a head's features that are rotated."""
    found = _declared(config)
    return float(found.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def _declared(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    sets = {kind: own for kind, own in found.items() if isinstance(own, Mapping)}
    if not sets:
        return found
    # DeepSeek-V4 calls the rope of its full attention "main".
    return sets.get("full_attention") or sets.get("main") or next(iter(sets.values()))


def _linear(theta: float, size: int, scaling: Scaling, length: int | None, device: torch.device | None) -> Half:
    return plain(theta, size, device) / scaling["factor"]


def _dynamic(theta: float, size: int, scaling: Scaling, length: int | None, device: torch.device | None) -> Half:
    positions, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    stretch = factor * max(length or 0, positions) / positions - (factor - 1)
    return plain(theta * stretch ** (size / (size - 2)), size, device)


def _yarn(theta: float, size: int, scaling: Scaling, length: int | None, device: torch.device | None) -> Half:
    def turns_at(rotations: float | int) -> float:
        """The index of the feature that makes `turns` rotations over the original positions."""
        span = scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return size * math.log(span) / (2 * math.log(theta))

    low, high = turns_at(scaling.get("beta_fast") or 32), turns_at(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(size // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    own = plain(theta, size, device)
    return own / scaling["factor"] * ramp + own * (1 - ramp)


def _longrope(theta: float, size: int, scaling: Scaling, length: int | None, device: torch.device | None) -> Half:
    is_long = length is not None and length > scaling["original_max_position_embeddings"]
    factors = scaling["long_factor" if is_long else "short_factor"]
    if len(factors) != size // 2:
        raise ValueError(f"longrope has {len(factors)} factors for {size // 2} frequencies of the target's heads")
    return plain(theta, size, device) / torch.tensor(factors, dtype=torch.float32, device=device)


def _llama3(theta: float, size: int, scaling: Scaling, length: int | None, device: torch.device | None) -> Half:
    own, positions = plain(theta, size, device), scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = own * positions / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: kept as they are, 0: interpolated
    return share * own + (1 - share) * own / scaling["factor"]


def _yarn_factor(scaling: Scaling) -> float:
    def scale(weight: float | int) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    one, all_dimensions = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return scale(one) / scale(all_dimensions) if one and all_dimensions else scale(1.0)


def _longrope_factor(scaling: Scaling) -> float:
    factor = scaling["factor"]
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(scaling["original_max_position_embeddings"]))


KINDS: dict[str, Callable[[float, int, Scaling, int | None, torch.device | None], Half]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
FACTORS: dict[str, Callable[[Scaling], float]] = {"yarn": _yarn_factor, "longrope": _longrope_factor}
NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {"yarn": ("beta_fast", "beta_slow", "truncate")}
