"""Metrics of decoding rounds: torchmetrics classes over the formulas of functional.py.

States are int64 and float64 sums, so that sums over ranks are exact. `DecodingMetrics` is the collection of all of
them; evaluations log it.

Axes: K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from specbench.metrics.functional import (
    QUANTITIES,
    RoundSums,
    SlotCounts,
    Triples,
    conditional_acceptance,
    histogram,
    histogram_of,
    round_totals,
    slot_counts,
    survival,
)


class Curve(Metric):
    """A metric with one value per slot, (K,); torchmetrics gives a single one as a scalar."""

    full_state_update = False
    is_differentiable = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Figure and axes of the value over the slots 1..K."""
        import matplotlib.pyplot as plt

        curve = (self.compute() if val is None else val).reshape(-1)
        figure, axes = plt.subplots() if ax is None else (ax.figure, ax)
        axes.plot(range(1, len(curve) + 1), curve.tolist(), marker="o")
        axes.set(xlabel="slot", ylabel=type(self).__name__, ylim=(self.plot_lower_bound, self.plot_upper_bound))
        return figure, axes


class RoundMetric(Metric):
    """Counts of rounds over prompts and ranks, from which the classes below are computed. `slots`: the longest proposal
    K.

    update(rounds, committed, nodes) takes one prompt: its histogram or its (proposed, accepted, count) triples, the
    tokens that its rounds committed, and the nodes of its token trees, of which slots are the levels (None: chains,
    whose nodes are the tokens proposed). Keyword arguments are those of `torchmetrics.Metric` (sync_on_compute,
    dist_sync_on_step, process_group, ...).
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | None = True
    plot_lower_bound = 0.0

    def __init__(self, slots: int, **kwargs: Any):
        super().__init__(**kwargs)
        if slots < 1:
            raise ValueError(f"slots={slots}: a block holds at least one slot")
        self.slots = slots
        self.add_state("histogram", torch.zeros(slots + 1, slots + 1, dtype=torch.int64), dist_reduce_fx="sum")
        # committed tokens, prompts with a round, prompts without one, nodes of trees beyond one a level
        self.add_state("counts", torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("ratios", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rounds: Tensor | np.ndarray | Triples, committed: int, nodes: int | None = None) -> None:
        counts = rounds if isinstance(rounds, (Tensor, np.ndarray)) else histogram_of(rounds, self.slots)
        counts = torch.as_tensor(counts).to(self.histogram)
        if counts.shape != self.histogram.shape:
            raise ValueError(f"a histogram of shape {tuple(counts.shape)} does not fit {self.slots} slots")
        totals = round_totals(counts)
        number, most = int(totals.rounds), int(totals.accepted)
        if not 0 <= committed <= most + number:
            raise ValueError(f"{number} rounds that accept {most} tokens cannot commit {committed}")
        beyond = 0 if nodes is None else nodes - int(totals.proposed)
        if beyond < 0:
            raise ValueError(f"trees of {nodes} nodes cannot have {int(totals.proposed)} levels")
        self.histogram += counts
        self.counts += torch.tensor([committed, number > 0, number == 0, beyond], device=self.counts.device)
        self.ratios += committed / number if number else 0.0

    def update_rounds(self, proposed: Sequence[int], accepted: Sequence[int], committed: Sequence[int]) -> None:
        """One prompt given as its rounds in order."""
        self.update(histogram(proposed, accepted, self.slots), sum(committed))

    @property
    def rounds(self) -> Tensor:
        """Number of rounds seen."""
        return self.histogram.sum()

    @property
    def slot_counts(self) -> SlotCounts:
        """Rounds that offered, reached and passed every slot."""
        return slot_counts(self.histogram)

    @property
    def sums(self) -> RoundSums:
        """What the quantities of functional.py are computed from."""
        committed, with_rounds, _, beyond = self.counts
        rounds, proposed, accepted = round_totals(self.histogram)
        return RoundSums(committed, rounds, proposed + beyond, accepted, self.ratios, with_rounds, self.slot_counts)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Figure and axes of the value, or of the values of several steps."""
        return self._plot(val, ax)


class Quantity(RoundMetric):
    """The quantity `name` of functional.QUANTITIES.

    >>> metric = Quantity(slots=4, name="verified_per_round")
    >>> metric.update([(4, 3, 1), (1, 0, 1)], committed=5)
    >>> float(metric.compute())
    3.5
    """

    higher_is_better = None

    def __init__(self, slots: int, name: str, **kwargs: Any):
        super().__init__(slots, **kwargs)
        if name not in QUANTITIES:
            raise ValueError(f"name={name!r}: choose one of {', '.join(QUANTITIES)}")
        self.name = name

    def compute(self) -> Tensor:
        return torch.as_tensor(QUANTITIES[self.name](self.sums))


class AcceptedLength(Quantity):
    """Tokens committed per round: pooled over all rounds (the published definition), or `per_prompt`, the mean over
    prompts of each prompt's own ratio (prompts without a round have none).

    >>> pooled, own = AcceptedLength(slots=2), AcceptedLength(slots=2, per_prompt=True)
    >>> for metric in (pooled, own):
    ...     metric.update_rounds([2, 2, 2], [2, 2, 2], [3, 3, 3])
    ...     metric.update_rounds([2], [0], [1])
    >>> float(pooled.compute()), float(own.compute())
    (2.5, 2.0)
    """

    higher_is_better = True

    def __init__(self, slots: int, per_prompt: bool = False, **kwargs: Any):
        super().__init__(slots, "accepted_length_per_prompt" if per_prompt else "accepted_length", **kwargs)
        self.per_prompt = per_prompt


class Survival(Curve, RoundMetric):
    """survival@k of every slot, (K,).

    >>> metric = Survival(slots=2)
    >>> metric.update([(2, 2, 3), (2, 1, 1)], committed=11)
    >>> metric.compute().tolist()
    [1.0, 0.75]
    """

    def compute(self) -> Tensor:
        return survival(self.slot_counts)


class ConditionalAcceptance(Curve, RoundMetric):
    """conditional@k of every slot, (K,).

    >>> metric = ConditionalAcceptance(slots=2)
    >>> metric.update([(2, 2, 1), (2, 1, 1), (2, 0, 2)], committed=7)
    >>> metric.compute().tolist()
    [0.5, 0.5]
    """

    def compute(self) -> Tensor:
        return conditional_acceptance(self.slot_counts)


class SuffixDecay(Quantity):
    """Slope of log conditional@k per slot (`functional.suffix_decay`).

    >>> metric = SuffixDecay(slots=2)
    >>> metric.update([(2, 2, 1), (2, 1, 3)], committed=9)
    >>> round(float(metric.compute()), 4)
    -1.3863
    """

    higher_is_better = True
    plot_lower_bound = None

    def __init__(self, slots: int, **kwargs: Any):
        super().__init__(slots, "suffix_decay", **kwargs)


class AcceptanceRate(Quantity):
    """Accepted / proposed tokens.

    >>> metric = AcceptanceRate(slots=4)
    >>> metric.update([(4, 3, 1), (4, 0, 1)], committed=5)
    >>> float(metric.compute())
    0.375
    """

    higher_is_better = True
    plot_upper_bound = 1.0

    def __init__(self, slots: int, **kwargs: Any):
        super().__init__(slots, "acceptance_rate", **kwargs)


class VerifiedPerRound(Quantity):
    """Tokens that the target verifies a round: proposed + 1. It is a cost: at the same accepted length, fewer are
    better.

    >>> metric = VerifiedPerRound(slots=4)
    >>> metric.update([(4, 3, 1), (1, 0, 1)], committed=5)
    >>> float(metric.compute())
    3.5
    """

    higher_is_better = False

    def __init__(self, slots: int, **kwargs: Any):
        super().__init__(slots, "verified_per_round", **kwargs)


class RoundCounts(RoundMetric):
    """The counts of which the other metrics are quotients: rounds, committed, prompts and prompts_without_rounds, and
    the counts survival_n@k and conditional_n@k of each slot.

    >>> metric = RoundCounts(slots=1)
    >>> metric.update([(1, 1, 2), (0, 0, 1)], committed=5)
    >>> {name: int(value) for name, value in metric.compute().items()}
    {'rounds': 3, 'committed': 5, 'prompts': 1, 'prompts_without_rounds': 0, 'survival_n@1': 2, 'conditional_n@1': 2}
    """

    higher_is_better = None

    def compute(self) -> dict[str, Tensor]:
        committed, with_rounds, without, _ = self.counts
        values = {"rounds": self.rounds, "committed": committed, "prompts": with_rounds + without}
        values["prompts_without_rounds"] = without
        for k, (offered, reached) in enumerate(zip(*self.slot_counts[:2], strict=True), start=1):
            values |= {f"survival_n@{k}": offered, f"conditional_n@{k}": reached}
        return values


class DecodingMetrics(MetricCollection):
    """All numbers of a decoding run in one dictionary of fp64 scalars; slots are numbered from 1, n_k beside curves.

    The members share one state (a compute group), so a prompt is counted once. update() and
    update_rounds() are those of `RoundMetric`; keyword arguments go to every member.

    >>> metric = DecodingMetrics(slots=2)
    >>> metric.update([(2, 2, 1), (2, 1, 1)], committed=5)
    >>> values = metric.compute()
    >>> {name: round(float(values[name]), 3) for name in ("accepted_length", "survival@2", "conditional@2", "rounds")}
    {'accepted_length': 2.5, 'survival@2': 0.5, 'conditional@2': 0.5, 'rounds': 2.0}
    """

    def __init__(self, slots: int, **kwargs: Any):
        metrics = {
            **{name: Quantity(slots, name, **kwargs) for name in QUANTITIES},
            "accepted_length": AcceptedLength(slots, **kwargs),
            "accepted_length_per_prompt": AcceptedLength(slots, per_prompt=True, **kwargs),
            "acceptance_rate": AcceptanceRate(slots, **kwargs),
            "verified_per_round": VerifiedPerRound(slots, **kwargs),
            "suffix_decay": SuffixDecay(slots, **kwargs),
            "survival": Survival(slots, **kwargs),
            "conditional": ConditionalAcceptance(slots, **kwargs),
            "counts": RoundCounts(slots, **kwargs),
        }
        super().__init__(metrics, compute_groups=[list(metrics)])
        self.slots = slots

    def update_rounds(self, proposed: Sequence[int], accepted: Sequence[int], committed: Sequence[int]) -> None:
        """One prompt given as its rounds in order."""
        self.update(histogram(proposed, accepted, self.slots), sum(committed))

    def compute(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, value in super().compute().items():
            # By name, because torchmetrics returns the curve of a single slot as a scalar.
            curve = name in ("survival", "conditional")
            each = {f"{name}@{k}": one for k, one in enumerate(value.reshape(-1), start=1)} if curve else {name: value}
            values |= {key: one.double() for key, one in each.items()}
        return values
