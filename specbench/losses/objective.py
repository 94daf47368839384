"""Objective: a weighted sum of slot losses over blocks, in chunks that never hold a whole [rows x vocabulary] tensor.

The forward pass goes through chunks of whole blocks: draft logits, target logits, one row pass (rowpass.py) that gives
all terms and d loss / d logits in place, then the chunk's backward at once. What stays is the gradient of the features
and of the projection's parameters; the outer backward hands it on. Only supervised slots ever reach a head.

Axes: B batch, N blocks a row, M = B*N blocks, K slots, R supervised slots, D hidden, F features, W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from specbench.blocks import Blocks
from specbench.losses.chunks import Chunks, grid
from specbench.losses.row_pass import RowPass, SlotResults
from specbench.losses.terms import Blend, SlotWeight
from specbench.metrics.slot_statistics import SlotStatistics
from specbench.models.fast.projection import Known, Linears, SharedLookups, leaves, without
from specbench.ranges import Among, AtLeastZero, Count, Number

if TYPE_CHECKING:
    from specbench.drafts.draft import Draft
    from specbench.models.embedding_head import Tables

NORMALISATIONS = ("weights", "positions")
ROW_STATISTICS = ("ce", "tv", "alpha", "agreement", "hit", "label_outside", "outside")


@dataclass(frozen=True)
class Loss:
    """Sums over the supervised slots of one call; the optimiser step divides by the weights of all its calls.

    `value` is differentiable, `terms` holds each term's weighted sum before its coefficient.
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
    """A loss as a configuration: coefficients of the terms of losses.py, a slot weight and a normalisation.

    `blend` ({scale, decay, over}) adds LK's lambda form; over="batch" needs the mean acceptance first and costs a
    second visit of the heads. `confidence` weighs the cross-entropy of the draft's confidence against its acceptance
    alpha; with `detach_confidence` it trains the confidence head alone. `normalise`: "weights" divides by the summed
    slot weights, "positions" (the released Eagle3) by the number of positions that the caller passes. `chunk_rows`:
    rows of vocabulary size held at once (None: by vocabulary and device; at least one block).
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
        blend: Mapping[str, Number | str] | None = None,
        confidence: AtLeastZero = 0.0,
        detach_confidence: bool = False,
        slot_weight: str | Mapping[str, Number] = "uniform",
        normalise: Annotated[str, Among(NORMALISATIONS)] = "weights",
        chunk_rows: Count | None = None,
    ):
        # As given, in plain values: what a checkpoint keeps of a loss.
        self.settings = {
            "ce": ce,
            "soft_ce": soft_ce,
            "kl": kl,
            "reverse_kl": reverse_kl,
            "js": js,
            "tv": tv,
            "accept": accept,
            "blend": None if blend is None else dict(blend),
            "confidence": confidence,
            "detach_confidence": detach_confidence,
            "slot_weight": slot_weight if isinstance(slot_weight, str) else dict(slot_weight),
            "normalise": normalise,
            "chunk_rows": chunk_rows,
        }
        terms = {"ce": ce, "soft_ce": soft_ce, "kl": kl, "reverse_kl": reverse_kl, "js": js, "tv": tv, "accept": accept}
        for name, value in {**terms, "confidence": confidence}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"objective {name}={value}: give a coefficient of at least 0")
        self.coefficients = {name: float(value) for name, value in terms.items() if value}
        self.blend = None if blend is None else Blend.of(blend)
        if not self.coefficients and self.blend is None and not confidence:
            raise ValueError(f"the objective has no term; set one of {', '.join(terms)}, blend or confidence above 0")
        if normalise not in NORMALISATIONS:
            raise ValueError(f"normalise={normalise!r} is unknown; choose 'weights' or 'positions'")
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"chunk_rows={chunk_rows}: give at least 1, or null to choose by vocabulary")
        self.confidence, self.detach_confidence = float(confidence), detach_confidence
        self.slot_weight, self.normalise, self.chunk_rows = SlotWeight.of(slot_weight), normalise, chunk_rows

    def __call__(self, draft: Draft, tables: Tables, blocks: Blocks, positions: int | None = None) -> Loss:
        """The loss of `blocks` (sums). `tables` is the target's head; `positions` is read by normalise="positions"."""
        with blocks.lookups or SharedLookups():
            features = draft.features(blocks.hidden, blocks.previous)[blocks.mask]
            confidence = self.predict(draft, blocks)
        learn = [parameter for parameter in draft.projection_parameters() if parameter.requires_grad]
        learning = torch.is_grad_enabled() and bool(features.requires_grad or learn)
        linears = Linears(learn)
        with torch.no_grad():
            visit = Chunks(draft, tables, blocks, features.detach(), self.slot_weight, self.chunk_rows)
            mean_alpha = None
            if self.blend is not None and self.blend.over == "batch":
                mean_alpha = visit(RowPass({}, None, draft.draft_vocabulary), linears)[0].alpha.mean()
            row_pass = RowPass(self.coefficients, self.blend, draft.draft_vocabulary, mean_alpha)
            rows, outer = visit(row_pass, linears, learning)
            gradients = [outer, *linears.totals()] if learning else []
            del visit, linears, row_pass

        def attach(value: Tensor) -> Tensor:
            return Known.apply(value, gradients, features, *learn) if learning else value

        shared = [*draft.projection_parameters(), *(leaves(features) if self.detach_confidence else [])]
        return total(self, blocks, rows, confidence, shared, positions, attach)

    def predict(self, draft: Draft, blocks: Blocks) -> Float[Tensor, "B N K"] | None:
        """The draft's confidence logits, with gradient only where they are trained; None without such a head."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.confidence > 0):
            logits = draft.confidence(blocks.hidden, blocks.previous)
        if logits is None and self.confidence:
            raise ValueError(f"objective confidence={self.confidence:g} needs a draft with a confidence head")
        return logits


def total(
    objective: Objective,
    blocks: Blocks,
    rows: SlotResults,
    confidence: Float[Tensor, "B N K"] | None,
    shared: Sequence[Tensor],
    positions: int | None,
    attach: Callable[[Tensor], Tensor] = lambda value: value,
) -> Loss:
    """Weigh and sum the rows; `attach` connects the sum to the gradients that were computed with it.

    `shared` are the tensors that a detached confidence must not train.
    """
    mask = blocks.mask.flatten(0, 1)
    weights = objective.slot_weight.weigh(mask, grid(rows.probability, mask), grid(rows.hit, mask))
    weight = weights[mask]
    terms = {term: (weight * value).sum() for term, value in rows.terms.items()}
    factors = {"blend": 1.0} | objective.coefficients
    value = attach(sum((factors[term] * amount for term, amount in terms.items()), weight.new_zeros(())))
    if objective.confidence:
        logits, alpha = confidence[blocks.mask].to(weight.dtype), rows.alpha.detach()
        term = (weight * F.binary_cross_entropy_with_logits(logits, alpha, reduction="none")).sum()
        terms["confidence"] = term
        if objective.detach_confidence and term.requires_grad:
            term = without(term, shared)
        value = value + objective.confidence * term
    if objective.normalise == "positions":
        if positions is None:
            raise ValueError("normalise='positions' needs the number of positions of the batch; pass positions=B*T")
        divisor = weight.new_tensor(float(positions))
    else:
        divisor = weight.sum()
    grids = {name: grid(getattr(rows, name), mask) for name in ROW_STATISTICS}
    slots = SlotStatistics.of(mask, weights, grids, None if confidence is None else confidence.flatten(0, 1))
    return Loss(value, divisor, {term: amount.detach() for term, amount in terms.items()}, slots)
