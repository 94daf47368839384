"""Slot losses and slot weights as plain differentiable formulas on whole logits: the oracle of the chunked objective.

p is the draft's distribution, q the target's (from its last state at a+k-1), y the true token a+k; every softmax in
at least fp32, temperature 1. With a reduced draft vocabulary p is zero outside of its ids and q is not renormalised:
the probability of q outside is `outside`, which tv, alpha and js include exactly. kl, reverse_kl and soft_ce sum over
the draft's ids (their outside part is infinite or constant), and a label outside has no ce.

Axes: R rows (supervised slots), M blocks, K slots, V target vocabulary, W draft vocabulary (W = V unless reduced).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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

    ce          -log p(y), 0 where y is outside of the draft's vocabulary
    soft_ce     -sum q log p                                    EAGLE-3 (arXiv 2503.01840)
    kl          sum q (log q - log p)                           soft_ce less the target's entropy
    reverse_kl  sum p (log p - log q)                           as in DistillSpec (arXiv 2310.08461)
    js          (KL(p|m) + KL(q|m)) / 2, m = (p + q) / 2        as in DistillSpec
    tv          sum |p - q|, the L1 distance, not half of it    DSpark
    accept      -log alpha, alpha = sum min(p, q)               LK (arXiv 2602.23881)
    """
    dtype = torch.promote_types(draft_logits.dtype, torch.float32)
    log_p, log_q = draft_logits.to(dtype).log_softmax(-1), target_logits.to(dtype).log_softmax(-1)
    columns, inside = draft_columns(labels, ids, target_logits.shape[-1])
    p, q, outside = log_p.exp(), log_q.exp(), log_q.new_zeros(len(log_q))
    if ids is not None:
        log_q, q = log_q[:, ids], q[:, ids]
        outside = 1 - q.sum(-1)
    chosen = log_p.gather(1, columns.clamp_min(0)[:, None])[:, 0]
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
    return terms


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
class SlotWeight:
    """The weight w_k of slot k = 1..K, the same for every term of the objective.

    exp g          exp(-(k-1)/g). DSpark's paper prints g = K; its released configurations hold g = 4 at K = 7.
    power beta     beta^(k-1): Eagle3 0.8, MTP 0.6
    uniform        1
    dpace a        D-PACE (arXiv 2605.18810): s_k = (1-a) p_k(y_k) + a, c_k = prod_{j<=k} s_j, w_k = sum_{j>=k} c_j
                   over the supervised slots, without gradient
    first_failure  Spec-AUF (arXiv 2607.01893; also `specauf`): 1 up to and including the draft's first miss
                   (argmax p is not y), 0 after it
    """

    kind: str
    constant: float = math.nan

    @classmethod
    def of(cls, setting: str | Mapping[str, float | int]) -> SlotWeight:
        """From a configuration: 'uniform', 'first_failure', {'exp': 4.0}, {'power': 0.8}, {'dpace': 0.5}."""
        if isinstance(setting, str):
            kind = "first_failure" if setting == "specauf" else setting
            if kind in ("uniform", "first_failure"):
                return cls(kind)
        elif len(setting) == 1:
            ((kind, constant),) = setting.items()
            ranges = {"exp": (0.0, math.inf), "power": (0.0, 1.0), "dpace": (0.0, 1.0)}
            if kind in ranges:
                low, high = ranges[kind]
                if not low < float(constant) <= high:
                    raise ValueError(f"slot_weight {kind}={constant} must be above {low:g} and at most {high:g}")
                return cls(kind, float(constant))
        raise ValueError(
            f"slot_weight={setting!r} is unknown; choose 'uniform', 'first_failure', {{'exp': g}}, {{'power': beta}} "
            "or {'dpace': a}"
        )

    @property
    def dynamic(self) -> bool:
        """Whether the weights depend on what the draft predicts in the block."""
        return self.kind in ("dpace", "first_failure")

    def static(self, slots: int, device: torch.device | None = None) -> Float[Tensor, " K"]:
        """w_1 .. w_K of a weight that depends on the slot alone (fp64)."""
        k = torch.arange(slots, dtype=torch.float64, device=device)
        if self.kind == "exp":
            return torch.exp(-k / self.constant)
        return self.constant**k if self.kind == "power" else torch.ones_like(k)

    def weigh(
        self, mask: Bool[Tensor, "M K"], probability: Float[Tensor, "M K"], hit: Bool[Tensor, "M K"]
    ) -> Float[Tensor, "M K"]:
        """Weights of whole blocks, 0 where unsupervised; `probability` is p(y), `hit` whether argmax p is y."""
        probability = probability.detach()
        if self.kind == "dpace":
            survives = ((1 - self.constant) * probability + self.constant).masked_fill(~mask, 0.0).cumprod(-1)
            weights = survives.flip(-1).cumsum(-1).flip(-1)
        elif self.kind == "first_failure":
            misses = (~hit & mask).long().cumsum(-1)
            weights = ((misses - (~hit & mask).long()) == 0).to(probability.dtype)
        else:
            weights = self.static(mask.shape[-1], mask.device).to(probability.dtype).expand_as(probability)
        return weights * mask
