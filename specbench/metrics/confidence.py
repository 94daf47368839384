"""Metrics of a confidence head on decoding rounds: torchmetrics classes over the formulas of functional.py.

At slot k, the product c_1 ... c_k is compared with the event that the round accepted at least k tokens, over the rounds
that proposed at least k.

Axes: R rounds, K slots.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import MetricCollection

from specbench.metrics.functional import BINS, auroc, prefix_events, ratio, reliability_of, reliability_sums
from specbench.metrics.rounds import Curve


class ConfidenceMetric(Curve):
    """update(confidence, accepted, proposed) takes rounds: probabilities of conditional acceptance (NaN beyond what was
    proposed), tokens accepted and proposed. compute() gives one value per slot, (K,), NaN where nothing was
    observed."""

    def __init__(self, slots: int, **kwargs: Any):
        super().__init__(**kwargs)
        if slots < 1:
            raise ValueError(f"slots={slots}: a block holds at least one slot")
        self.slots = slots

    def update(
        self, confidence: Float[Tensor, "R K"], accepted: Int[Tensor, " R"], proposed: Int[Tensor, " R"]
    ) -> None:
        if confidence.shape[1] != self.slots:
            raise ValueError(f"confidences of {confidence.shape[1]} slots do not fit a metric of {self.slots} slots")
        events = prefix_events(confidence.double(), accepted, proposed)
        for k in range(self.slots):
            seen = events.seen[:, k]
            self.add(k, events.predicted[seen, k], events.passed[seen, k])

    def add(self, k: int, predicted: Float[Tensor, " N"], passed: Tensor) -> None:
        """Count the observations of slot k + 1."""
        raise NotImplementedError


class ConfidenceCalibrationError(ConfidenceMetric):
    """Expected calibration error by slot over equal-width bins.

    >>> metric = ConfidenceCalibrationError(slots=1)
    >>> metric.update(torch.tensor([[0.75], [0.75]]), torch.tensor([1, 0]), torch.tensor([1, 1]))
    >>> metric.compute().tolist()
    0.25
    """

    higher_is_better = False

    def __init__(self, slots: int, bins: int = BINS, **kwargs: Any):
        super().__init__(slots, **kwargs)
        self.add_state("sums", torch.zeros(slots, bins, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, k: int, predicted: Float[Tensor, " N"], passed: Tensor) -> None:
        self.sums[k] += reliability_sums(predicted, passed, self.sums.shape[1])

    def compute(self) -> Tensor:
        return reliability_of(self.sums).ece


class ConfidenceBrierScore(ConfidenceMetric):
    """Mean squared difference of the product c_1 ... c_k and its event (0 or 1), by slot.

    >>> metric = ConfidenceBrierScore(slots=1)
    >>> metric.update(torch.tensor([[0.5], [1.0]]), torch.tensor([0, 1]), torch.tensor([1, 1]))
    >>> metric.compute().tolist()
    0.125
    """

    higher_is_better = False

    def __init__(self, slots: int, **kwargs: Any):
        super().__init__(slots, **kwargs)
        self.add_state("squares", torch.zeros(slots, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(slots, dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, k: int, predicted: Float[Tensor, " N"], passed: Tensor) -> None:
        self.squares[k] += ((predicted - passed.double()) ** 2).sum()
        self.seen[k] += len(predicted)

    def compute(self) -> Tensor:
        return ratio(self.squares, self.seen)


class ConfidenceAUROC(ConfidenceMetric):
    """Probability that an accepted prefix has a higher product than a rejected one, by slot. It keeps every
    observation.

    >>> metric = ConfidenceAUROC(slots=1)
    >>> metric.update(torch.tensor([[0.9], [0.4], [0.4]]), torch.tensor([1, 1, 0]), torch.tensor([1, 1, 1]))
    >>> metric.compute().tolist()
    0.75
    """

    higher_is_better = True

    def __init__(self, slots: int, **kwargs: Any):
        super().__init__(slots, **kwargs)
        for name in ("slot", "predicted", "passed"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def add(self, k: int, predicted: Float[Tensor, " N"], passed: Tensor) -> None:
        self.slot.append(torch.full_like(passed, k, dtype=torch.int64))
        self.predicted.append(predicted)
        self.passed.append(passed)

    def compute(self) -> Tensor:
        # One tensor each once ranks were joined, a list of them before.
        slot, predicted, passed = (
            x if isinstance(x, Tensor) else torch.cat(x) for x in (self.slot, self.predicted, self.passed)
        )
        return torch.stack([auroc(predicted[slot == k], passed[slot == k]) for k in range(self.slots)])


class ConfidenceMetrics(MetricCollection):
    """The collection for calibration: ece, brier and auroc, each (K,). Keyword arguments go to every member.

    >>> metric = ConfidenceMetrics(slots=1)
    >>> metric.update(torch.tensor([[0.75], [0.5]]), torch.tensor([1, 0]), torch.tensor([1, 1]))
    >>> {name: value.tolist() for name, value in metric.compute().items()}
    {'auroc': 1.0, 'brier': 0.15625, 'ece': 0.375}
    """

    def __init__(self, slots: int, bins: int = BINS, **kwargs: Any):
        metrics = {
            "ece": ConfidenceCalibrationError(slots, bins, **kwargs),
            "brier": ConfidenceBrierScore(slots, **kwargs),
            "auroc": ConfidenceAUROC(slots, **kwargs),
        }
        super().__init__(metrics, compute_groups=False)
