"""Teacher-forced metrics of training and validation slots: torchmetrics classes over sums by slot.

Training and validation log `SlotMetrics`, which is updated with `Loss.slots` of every micro-batch.

Axes: M blocks, K slots.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from specbench.metrics.functional import expected_lengths, ratio
from specbench.metrics.slot_statistics import SlotStatistics


class ExpectedLength(Metric):
    """Mean over blocks of 1 + sum_k prod_{i<=k} alpha_i, alpha = 1 - half the L1 distance; never a product of means.

    The same formula as a function is `functional.expected_length`. Keyword arguments are those of
    `torchmetrics.Metric`.

    >>> metric = ExpectedLength()
    >>> metric.update(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.ones(2, 2, dtype=torch.bool))
    >>> float(metric.compute())
    1.875
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    plot_lower_bound = 1.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("length", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("blocks", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, alpha: Float[Tensor, "M K"] | SlotStatistics, mask: Bool[Tensor, "M K"] | None = None) -> None:
        """Blocks by their alpha and mask, or the sums of blocks that training counted."""
        if isinstance(alpha, SlotStatistics):
            length, blocks = alpha.expected_length, alpha.blocks
        else:
            length, blocks = expected_lengths(alpha.double(), mask).sum(), mask[:, 0].sum()
        self.length += length
        self.blocks += blocks.long()

    def compute(self) -> Tensor:
        return ratio(self.length, self.blocks)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Figure and axes of the value, or of the values of several steps."""
        return self._plot(val, ax)


class SlotMeans(Metric):
    """Means over the supervised slots: acceptance, agreement, hit, ce, tv, outside, and for a draft with a confidence
    head confidence and confidence_error; each also by slot as name@k; supervised (a count).

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> names = ("alpha", "agreement", "hit", "ce", "tv", "outside", "label_outside")
    >>> metric = SlotMeans(slots=2)
    >>> metric.update(SlotStatistics.of(mask, mask.float(), {name: mask.float() / 2 for name in names}, None))
    >>> found = metric.compute()
    >>> float(found["acceptance"]), float(found["supervised"])
    (0.5, 3.0)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None  # more is better for some of its numbers, less for others

    def __init__(self, slots: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.slots = slots
        self.names = [field.name for field in fields(SlotStatistics) if field.name not in ("expected_length", "blocks")]
        self.add_state("sums", torch.zeros(len(self.names), slots, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, slots: SlotStatistics) -> None:
        curves = [getattr(slots, name) for name in self.names]
        if curves[0].shape != (self.slots,):
            raise ValueError(f"statistics of {len(curves[0])} slots do not fit metrics of {self.slots} slots")
        self.sums += torch.stack(curves)

    def compute(self) -> dict[str, Tensor]:
        curves = dict(zip(self.names, self.sums, strict=True))
        means = {
            "acceptance": "alpha",
            "agreement": "agreement",
            "hit": "hit",
            "ce": "ce",
            "tv": "tv",
            "outside": "outside",
        }
        if curves["confidence"].sum() > 0:
            means |= {"confidence": "confidence", "confidence_error": "confidence_error"}
        values = {"supervised": curves["count"].sum()}
        for shown, name in means.items():
            count = curves["labelled" if name == "ce" else "count"]
            values[shown] = ratio(curves[name].sum(), count.sum())
            by_slot = ratio(curves[name], count)
            values |= {f"{shown}@{k + 1}": by_slot[k] for k in range(self.slots)}
        return values


class SlotMetrics(MetricCollection):
    """The collection that training and validation log: `ExpectedLength` and `SlotMeans`.

    update(slots) takes a `SlotStatistics`; compute() gives expected_length and the numbers of `SlotMeans`. Keyword
    arguments go to both.
    """

    def __init__(self, slots: int, **kwargs: Any) -> None:
        metrics = {"expected_length": ExpectedLength(**kwargs), "means": SlotMeans(slots, **kwargs)}
        super().__init__(metrics, compute_groups=False)
