"""Per-slot statistics of a training or validation step, as sums that can be added over micro-batches and ranks.

Axes: M blocks, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from specbench.metrics.functional import expected_lengths


@dataclass(frozen=True)
class SlotStatistics:
    """Sums over the supervised slots k = 1..K, fp64; divide by `count` for means.

    count          supervised slots; `labelled` those whose label is in the draft's vocabulary (ce sums over these)
    weight         slot weights
    alpha          acceptance sum min(p, q); agreement: argmax p is argmax q; hit: argmax p is the label
    ce, tv         the terms of losses/terms.py
    confidence     predicted acceptance and confidence_error, its absolute distance from alpha (0 without such a head)
    outside        target probability outside of the draft's vocabulary
    expected_length  sum over blocks of 1 + sum_k prod_{i<=k} alpha_i, and `blocks` with a supervised slot
    """

    count: Float[Tensor, " K"]
    labelled: Float[Tensor, " K"]
    weight: Float[Tensor, " K"]
    alpha: Float[Tensor, " K"]
    agreement: Float[Tensor, " K"]
    hit: Float[Tensor, " K"]
    ce: Float[Tensor, " K"]
    tv: Float[Tensor, " K"]
    confidence: Float[Tensor, " K"]
    confidence_error: Float[Tensor, " K"]
    outside: Float[Tensor, " K"]
    expected_length: Float[Tensor, ""]
    blocks: Float[Tensor, ""]

    @classmethod
    def of(
        cls,
        mask: Bool[Tensor, "M K"],
        weight: Float[Tensor, "M K"],
        values: dict[str, Tensor],
        confidence: Float[Tensor, "M K"] | None,
    ) -> SlotStatistics:
        """From values on the block grid (M, K), which are zero where unsupervised."""
        values = {name: value.detach().double() for name, value in values.items()}
        supervised = mask.double()
        chance = torch.zeros_like(supervised) if confidence is None else confidence.detach().double().sigmoid() * mask
        error = torch.zeros_like(supervised) if confidence is None else (chance - values["alpha"]).abs()
        filled = mask[:, 0].double()
        sums = {name: values[name].sum(0) for name in ("alpha", "agreement", "hit", "ce", "tv", "outside")}
        return cls(
            count=supervised.sum(0),
            labelled=(supervised - values["label_outside"]).sum(0),
            weight=weight.detach().double().sum(0),
            confidence=chance.sum(0),
            confidence_error=error.sum(0),
            expected_length=expected_lengths(values["alpha"], mask).sum(),
            blocks=filled.sum(),
            **sums,
        )
