"""Objective: a weighted sum of slot losses over blocks.

    features = draft.features(hidden, previous)                     what the draft's head reads, of every slot
    results  = fused.slot_losses or reference.slot_losses           the terms of every supervised slot (terms.py)
    loss     = sum over slots of w_k (sum of coefficient x term)    w_k: slot_weights.py
               + confidence x BCE(confidence logit, alpha)
               + feature x smooth-L1(hidden state of the slot, target's state)
               and the same sum by the base logits, if asked for    base_loss.py

Both implementations give the same numbers: `fused` in chunks without a whole [slots x vocabulary] tensor, `reference`
by autograd on whole logits (`specbench.fast.plain()` selects it).

Axes: B batch, N blocks per row, M = B*N blocks, K slots, R supervised slots, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from specbench import fast
from specbench.blocks import Blocks
from specbench.losses import fused, reference
from specbench.losses.base_loss import BaseLoss
from specbench.losses.further_terms import FURTHER_TERMS
from specbench.losses.gradients import leaves, without
from specbench.losses.slot_weights import SlotWeight
from specbench.losses.terms import Blend, Combination, grid
from specbench.metrics.slot_statistics import SlotStatistics
from specbench.models.fast.projection import SharedLookups
from specbench.ranges import AboveZero, Among, AtLeastZero, Count, Number

if TYPE_CHECKING:
    from specbench.drafts.draft import Draft
    from specbench.models.embedding_head import Tables

NORMALISATIONS = ("weights", "positions")
SLOT_STATISTICS = ("ce", "tv", "alpha", "agreement", "hit", "label_outside", "outside")


@dataclass(frozen=True)
class Loss:
    """Sums over the supervised slots of one call; the optimiser step divides by the weights of all its calls.

    `value` is differentiable; `terms`: the weighted sum of each term before its coefficient.
    """

    value: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    terms: dict[str, Tensor]
    slots: SlotStatistics

    @property
    def mean(self) -> Tensor:
        """value / weight of this call alone."""
        return self.value / self.weight


class Objective:
    """A training loss: a weighted sum of terms at every slot, with a slot weight. Formulas and sources:
    docs/methods.md.

    The constructor takes only plain values, so a loss can be written in YAML. Calling an objective returns `Loss`,
    whose `value` and `weight` are SUMS over slots: an optimiser step divides the sum of values by the sum of weights.

    Args:
        ce: coefficient of cross-entropy with the true token.
        soft_ce: coefficient of cross-entropy with the target's distribution.
        kl: coefficient of KL(target, draft).
        kl_temperature: temperature T of both distributions in `kl`, which is then T^2 KL, so that its gradient keeps
            its size (JetSpec); no other term reads it.
        reverse_kl: coefficient of KL(draft, target).
        js: coefficient of the Jensen-Shannon divergence.
        tv: coefficient of the L1 distance of both distributions (twice the total variation).
        accept: coefficient of -log alpha, alpha the acceptance of the slot.
        further: {NAME: coefficient} of terms in further_terms.py.
        feature: coefficient of the distance between the draft's hidden state and the target's state that predicts the
            same token: smooth-L1 (d^2 / 2 below 1, |d| - 1/2 above), mean over the features (EAGLE-1).
        blend: {scale, decay, over} of LK's lambda form. over="batch" needs the mean acceptance first, which costs a
            second pass over both heads.
        base: {start, share} or {add} of `BaseLoss`: the same terms of the draft's base logits, beside or instead of
            those of its final logits. The draft needs base logits.
        confidence: coefficient of the binary cross-entropy of the predicted confidence against alpha.
        detach_confidence: the confidence term trains only the confidence head.
        slot_weight: "uniform", {"exp": g}, {"power": beta}, {"dpace": a} or "first_failure".
        normalise: "weights" divides by the sum of slot weights; "positions" (released EAGLE-3 code) by the number of
            positions that the caller passes.
        chunk_rows: rows of vocabulary size in memory at once. None: chosen by vocabulary and device.
    """

    def __init__(
        self,
        ce: AtLeastZero = 0.0,
        soft_ce: AtLeastZero = 0.0,
        kl: AtLeastZero = 0.0,
        reverse_kl: AtLeastZero = 0.0,
        js: AtLeastZero = 0.0,
        tv: AtLeastZero = 0.0,
        accept: AtLeastZero = 0.0,
        feature: AtLeastZero = 0.0,
        further: Mapping[str, Number] | None = None,
        blend: Mapping[str, Number | str] | None = None,
        kl_temperature: AboveZero = 1.0,
        base: Mapping[str, Number] | None = None,
        confidence: AtLeastZero = 0.0,
        detach_confidence: bool = False,
        slot_weight: str | Mapping[str, Number] = "uniform",
        normalise: Annotated[str, Among(NORMALISATIONS)] = "weights",
        chunk_rows: Count | None = None,
    ):
        # The arguments as plain values, which a checkpoint stores.
        self.settings = {
            "ce": ce,
            "soft_ce": soft_ce,
            "kl": kl,
            "kl_temperature": kl_temperature,
            "reverse_kl": reverse_kl,
            "js": js,
            "tv": tv,
            "accept": accept,
            "feature": feature,
            "further": None if further is None else dict(further),
            "blend": None if blend is None else dict(blend),
            "base": None if base is None else dict(base),
            "confidence": confidence,
            "detach_confidence": detach_confidence,
            "slot_weight": slot_weight if isinstance(slot_weight, str) else dict(slot_weight),
            "normalise": normalise,
            "chunk_rows": chunk_rows,
        }
        terms = {"ce": ce, "soft_ce": soft_ce, "kl": kl, "reverse_kl": reverse_kl, "js": js, "tv": tv, "accept": accept}
        unknown = sorted(set(further or {}) - set(FURTHER_TERMS))
        if unknown:
            raise ValueError(
                f"objective further={dict(further)}: there is no term {', '.join(unknown)}; "
                f"choose among {', '.join(FURTHER_TERMS)}"
            )
        terms |= further or {}
        for name, value in {**terms, "feature": feature, "confidence": confidence}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"objective {name}={value}: give a coefficient of at least 0")
        coefficients = {name: float(value) for name, value in terms.items() if value}
        if not 0 < kl_temperature < float("inf"):
            raise ValueError(f"objective kl_temperature={kl_temperature}: give a temperature above 0")
        softened = None if kl_temperature == 1.0 or not kl else float(kl_temperature)
        self.combination = Combination(coefficients, None if blend is None else Blend.of(blend), softened)
        if not coefficients and blend is None and not confidence and not feature:
            raise ValueError(
                f"the objective has no term; set one of {', '.join(terms)}, feature, further, blend or confidence "
                "above 0"
            )
        if normalise not in NORMALISATIONS:
            raise ValueError(f"normalise={normalise!r} is unknown; choose 'weights' or 'positions'")
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"chunk_rows={chunk_rows}: give at least 1, or null to choose by vocabulary")
        self.feature = float(feature)
        self.base = None if base is None else BaseLoss.of(base)
        self.confidence, self.detach_confidence = float(confidence), detach_confidence
        self.slot_weight, self.normalise, self.chunk_rows = SlotWeight.of(slot_weight), normalise, chunk_rows

    def __call__(
        self, draft: Draft, tables: Tables, blocks: Blocks, positions: int | None = None, progress: float = 1.0
    ) -> Loss:
        """The loss of `blocks` (sums). `tables` is the target's head; `positions` is read by normalise="positions",
        `progress`, the share of the training that is done, by `base`."""
        factors = (1.0, 0.0) if self.base is None else self.base.factors(progress)
        with blocks.lookups or (SharedLookups() if fast.enabled() else nullcontext()):
            features = draft.features(blocks.hidden, blocks.previous)
            confidence = self.predict(draft, blocks)
        if getattr(draft, "candidates", None) is not None:
            self.require_terms_of_candidates(draft)
        if self.base is not None and draft.project_base(features.flatten(0, 2)[:0]) is None:
            raise ValueError(f"objective base={self.settings['base']}: {type(draft).__name__} has no base logits here")
        inputs = (draft, tables, blocks, features, self.combination)
        if fast.enabled():
            results, base, with_gradient = fused.slot_losses(*inputs, self.slot_weight, self.chunk_rows, factors)
        else:
            results, base, with_gradient = reference.slot_losses(*inputs, factors)
        mask = blocks.mask.flatten(0, 1)
        weights = self.slot_weight.weigh(mask, grid(results.probability, mask), grid(results.hit, mask))
        weight = weights[mask]
        terms = {term: (weight * value).sum() for term, value in results.terms.items()}
        coefficients = self.combination.factors

        def combined(amounts: Mapping[str, Tensor]) -> Tensor:
            return sum((coefficients[term] * amount for term, amount in amounts.items()), weight.new_zeros(()))

        total = factors[0] * combined(terms)
        if base is not None:
            terms["base"] = combined({term: (weight * value).sum() for term, value in base.terms.items()})
            total = total + factors[1] * terms["base"]
        value = with_gradient(total)
        if self.confidence:
            logits, alpha = confidence[blocks.mask].to(weight.dtype), results.alpha.detach()
            terms["confidence"] = (weight * F.binary_cross_entropy_with_logits(logits, alpha, reduction="none")).sum()
            value = value + self.confidence * self.of_its_own(terms["confidence"], draft, features)
        if self.feature:
            ours, theirs = (state[blocks.mask].to(weight.dtype) for state in (blocks.hidden, blocks.target))
            terms["feature"] = (weight * F.smooth_l1_loss(ours, theirs, reduction="none").mean(-1)).sum()
            value = value + self.feature * terms["feature"]
        grids = {name: grid(getattr(results, name), mask) for name in SLOT_STATISTICS}
        scores = None if confidence is None else confidence.flatten(0, 1)
        slots = SlotStatistics.of(mask, weights, grids, scores)
        found = {term: amount.detach() for term, amount in terms.items()}
        return Loss(value, self.divisor(weight, positions), found, slots)

    def require_terms_of_candidates(self, draft: Draft) -> None:
        """Refuse terms that are infinite where the draft's law is 0."""
        infinite = sorted(set(self.combination.coefficients) - {"ce", "tv", "accept"})
        infinite += [] if self.combination.blend is None else ["blend"]
        if infinite:
            raise ValueError(
                f"objective {', '.join(infinite)}: the law of {type(draft).__name__} is 0 outside of its "
                f"{draft.candidates} candidates, where this is infinite; use ce, tv and accept"
            )

    def predict(self, draft: Draft, blocks: Blocks) -> Float[Tensor, "B N K"] | None:
        """The draft's confidence logits, with gradient only where they are trained; None without such a head."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.confidence > 0):
            logits = draft.confidence(blocks.hidden, blocks.previous)
        if logits is None and self.confidence:
            raise ValueError(f"objective confidence={self.confidence:g} needs a draft with a confidence head")
        return logits

    def of_its_own(self, term: Tensor, draft: Draft, features: Tensor) -> Tensor:
        """The confidence term for training: with `detach_confidence`, without gradient for parameters of the
        features."""
        if not (self.detach_confidence and term.requires_grad):
            return term
        return without(term, [*draft.projection_parameters(), *leaves(features)])

    def divisor(self, weight: Float[Tensor, " R"], positions: int | None) -> Float[Tensor, ""]:
        """The divisor of the sum, over all calls of an optimiser step."""
        if self.normalise == "weights":
            return weight.sum()
        if positions is None:
            raise ValueError("normalise='positions' needs the number of positions of the batch; pass positions=B*T")
        return weight.new_tensor(float(positions))
