"""The terms of a loss at one slot: plain differentiable formulas on whole logits, which `fused.py` computes in chunks.

p is the draft's distribution, q the target's (from its last state at a+k-1), y the true token a+k; every softmax in
at least fp32, temperature 1. With a reduced draft vocabulary p is zero outside of its ids and q is not renormalised:
the probability of q outside is `outside`, which tv, alpha and js include exactly. kl, reverse_kl and soft_ce sum over
the draft's ids (their outside part is infinite or constant), and a label outside has no ce.

Axes: R rows (supervised slots), M blocks, K slots, V target vocabulary, W draft vocabulary (W = V unless reduced).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from specbench.losses.further_terms import FURTHER_TERMS

TERMS = ("ce", "soft_ce", "kl", "reverse_kl", "js", "tv", "accept")
# Below this overlap -log(alpha) stays at its value there (23 nats): fp32 no longer resolves alpha or its gradient.
SMALLEST_ALPHA = 1e-10


def slot_terms(
    draft_logits: Float[Tensor, "R W"],
    target_logits: Float[Tensor, "R V"],
    labels: Int[Tensor, " R"],
    ids: Int[Tensor, " W"] | None = None,
    wanted: Collection[str] = TERMS,
) -> dict[str, Float[Tensor, " R"]]:
    """The `wanted` terms of every row in nats, and always ce, tv, alpha and the `outside` mass; differentiable.

    ce          -log p(y), 0 where y is outside of the draft's vocabulary or candidates
    soft_ce     -sum q log p                                    EAGLE-3 (arXiv 2503.01840)
    kl          sum q (log q - log p)                           soft_ce less the target's entropy
    reverse_kl  sum p (log p - log q)                           as in DistillSpec (arXiv 2310.08461)
    js          (KL(p|m) + KL(q|m)) / 2, m = (p + q) / 2        as in DistillSpec
    tv          sum |p - q|, the L1 distance, not half of it    DSpark
    accept      -log alpha, alpha = sum min(p, q)               LK (arXiv 2602.23881)

    and those of further_terms.py.
    """
    dtype = torch.promote_types(draft_logits.dtype, torch.float32)
    log_p, log_q = draft_logits.to(dtype).log_softmax(-1), target_logits.to(dtype).log_softmax(-1)
    columns, inside = draft_columns(labels, ids, target_logits.shape[-1])
    p, q, outside = log_p.exp(), log_q.exp(), log_q.new_zeros(len(log_q))
    if ids is not None:
        log_q, q = log_q[:, ids], q[:, ids]
        outside = 1 - q.sum(-1)
    chosen = log_p.gather(1, columns.clamp_min(0)[:, None])[:, 0]
    inside = inside & (chosen > -torch.inf)
    terms = {"ce": torch.where(inside, -chosen, 0.0), "tv": (p - q).abs().sum(-1) + outside, "outside": outside}
    terms["alpha"] = torch.minimum(p, q).sum(-1) if "accept" in wanted else 1 - terms["tv"] / 2
    if "soft_ce" in wanted:
        terms["soft_ce"] = -(q * log_p).sum(-1)
    if "kl" in wanted:
        terms["kl"] = (q * (log_q - log_p)).sum(-1)
    if "reverse_kl" in wanted:
        terms["reverse_kl"] = (p * (log_p - log_q)).sum(-1)
    if "js" in wanted:
        log_middle = torch.logaddexp(log_p, log_q) - math.log(2)
        both = p * (log_p - log_middle) + q * (log_q - log_middle)
        terms["js"] = (both.sum(-1) + outside * math.log(2)) / 2
    if "accept" in wanted:
        terms["accept"] = -terms["alpha"].clamp_min(SMALLEST_ALPHA).log()
    for name in FURTHER_TERMS.keys() & set(wanted):
        terms[name] = FURTHER_TERMS[name](log_p, log_q, outside)
    return terms


def softened_kl(
    draft_logits: Float[Tensor, "R W"],
    target_logits: Float[Tensor, "R V"],
    temperature: float,
    ids: Int[Tensor, " W"] | None = None,
) -> Float[Tensor, " R"]:
    """T^2 sum q_T (log q_T - log p_T): `kl` with both distributions at temperature T. The square keeps the size of its
    gradient (Hinton et al. 2015, arXiv 1503.02531; JetSpec, arXiv 2606.18394)."""
    dtype = torch.promote_types(draft_logits.dtype, torch.float32)
    log_p, log_q = ((logits.to(dtype) / temperature).log_softmax(-1) for logits in (draft_logits, target_logits))
    log_q = log_q if ids is None else log_q[:, ids]
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1)


def draft_columns(
    labels: Int[Tensor, " R"], ids: Int[Tensor, " W"] | None, vocabulary: int
) -> tuple[Int[Tensor, " R"], Bool[Tensor, " R"]]:
    """Column of each label in the draft's logits (-1 outside of its vocabulary) and whether it has one."""
    if ids is None:
        return labels, torch.ones_like(labels, dtype=torch.bool)
    column = torch.full((vocabulary,), -1, dtype=torch.long, device=labels.device)
    column[ids] = torch.arange(len(ids), device=labels.device)
    columns = column[labels]
    return columns, columns >= 0


@dataclass(frozen=True)
class Blend:
    """The lambda form of LK: w KL + (1 - w)(1 - alpha), w = scale * exp(-decay * stop_grad(alpha)).

    `over` says which alpha is used in w: "batch", its mean over the supervised slots of the call, or "row", that of
    each slot (as in vLLM's speculators).
    """

    scale: float | int = 1.0
    decay: float | int = 3.0
    over: str = "batch"

    @classmethod
    def of(cls, setting: Mapping[str, float | int | str]) -> Blend:
        """From a configuration: {scale: 1.0, decay: 3.0}, with `over` if it is not the batch."""
        unknown = set(setting) - {"scale", "decay", "over"}
        if unknown:
            raise ValueError(f"blend has no setting {', '.join(sorted(unknown))}; it has scale, decay and over")
        return cls(**setting)

    def __post_init__(self) -> None:
        if self.over not in ("batch", "row"):
            raise ValueError(f"blend.over={self.over!r} is unknown; choose 'batch' or 'row'")

    def weight(self, alpha: Float[Tensor, "*r"]) -> Float[Tensor, "*r"]:
        """w for a (mean) acceptance, without gradient."""
        return self.scale * torch.exp(-self.decay * alpha.detach())


@dataclass(frozen=True)
class Combination:
    """Which terms make the loss of a slot: a coefficient above 0 for each, and the blend (coefficient 1) if there is
    one. `softened`: the temperature of `kl` (`softened_kl`); None: 1."""

    coefficients: Mapping[str, float] = field(default_factory=dict)
    blend: Blend | None = None
    softened: float | None = None

    @property
    def factors(self) -> dict[str, float]:
        """What each of `SlotResults.terms` is multiplied by."""
        return {"blend": 1.0, **self.coefficients}


@dataclass
class SlotResults:
    """What draft and target say of every supervised slot, in at least fp32. `terms` holds the active ones."""

    ce: Float[Tensor, " R"]
    probability: Float[Tensor, " R"]  # p(y), 0 where y is outside of the draft's vocabulary
    tv: Float[Tensor, " R"]
    alpha: Float[Tensor, " R"]
    agreement: Bool[Tensor, " R"]  # draft and target have the same most likely token
    hit: Bool[Tensor, " R"]  # the draft's most likely token is y
    label_outside: Bool[Tensor, " R"]  # y is outside of the draft's vocabulary or candidates
    outside: Float[Tensor, " R"]
    terms: dict[str, Tensor]

    @classmethod
    def join(cls, parts: list[SlotResults]) -> SlotResults:
        """The rows of several parts in order."""
        names = [field.name for field in fields(cls) if field.name != "terms"]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(**joined, terms={term: torch.cat([part.terms[term] for part in parts]) for term in parts[0].terms})


def grid(values: Shaped[Tensor, " R"], mask: Bool[Tensor, "M K"]) -> Shaped[Tensor, "M K"]:
    """Values of the supervised slots on the block grid, zero elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
