"""Metrics of decoding rounds and of training slots: torchmetrics classes over the formulas of roundcounts.py.

States are int64 and float64 sums, so that ranks and micro-batches add up exactly. Numbers of decoding come from real
rounds; `SlotMetrics` and `ExpectedLength` are teacher-forced, from training.

Axes: K slots, M blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

from specbench.metrics.functional import (
    Triples,
    accepted_length,
    conditional_acceptance,
    expected_lengths,
    histogram,
    histogram_of,
    suffix_decay,
    survival,
)
from specbench.metrics.slot_statistics import SlotStatistics


class RoundMetric(Metric):
    """Counts of rounds over prompts and ranks; the classes below read them. `slots` is the longest proposal K.

    update(rounds, committed) takes one prompt: its histogram tensor or its (proposed, accepted, count) triples, and the
    tokens that its rounds committed.
    """

    full_state_update = False

    def __init__(self, slots: int):
        super().__init__()
        if slots < 1:
            raise ValueError(f"slots={slots}: a block holds at least one slot")
        self.slots = slots
        self.add_state("histogram", torch.zeros(slots + 1, slots + 1, dtype=torch.int64), dist_reduce_fx="sum")
        # committed tokens, prompts with a round, prompts without one
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("ratios", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rounds: Tensor | Triples, committed: int) -> None:
        counts = rounds if isinstance(rounds, Tensor) else histogram_of(rounds, self.slots)
        counts = counts.to(self.histogram)
        if counts.shape != self.histogram.shape:
            raise ValueError(f"a histogram of shape {tuple(counts.shape)} does not fit {self.slots} slots")
        number, most = (
            int(counts.sum()),
            int((counts.sum(0) * torch.arange(self.slots + 1, device=counts.device)).sum()),
        )
        if not 0 <= committed <= most + number:
            raise ValueError(f"{number} rounds that accept {most} tokens cannot commit {committed}")
        self.histogram += counts
        self.counts += torch.tensor([committed, number > 0, number == 0], device=self.counts.device)
        self.ratios += committed / number if number else 0.0

    def update_rounds(self, proposed: Sequence[int], accepted: Sequence[int], committed: Sequence[int]) -> None:
        """One prompt given as its rounds in order."""
        self.update(histogram(proposed, accepted, self.slots), sum(committed))

    @property
    def rounds(self) -> Tensor:
        """Number of rounds seen."""
        return self.histogram.sum()


class AcceptedLength(RoundMetric):
    """Tokens committed a round: pooled over all rounds (the published definition), or `per_prompt`, the mean over
    prompts of each prompt's own ratio (prompts without a round have none).

    >>> pooled, own = AcceptedLength(slots=2), AcceptedLength(slots=2, per_prompt=True)
    >>> for metric in (pooled, own):
    ...     metric.update_rounds([2, 2, 2], [2, 2, 2], [3, 3, 3])
    ...     metric.update_rounds([2], [0], [1])
    >>> float(pooled.compute()), float(own.compute())
    (2.5, 2.0)
    """

    def __init__(self, slots: int, per_prompt: bool = False):
        super().__init__(slots)
        self.per_prompt = per_prompt

    def compute(self) -> Tensor:
        return self.ratios / self.counts[1] if self.per_prompt else accepted_length(self.counts[0], self.rounds)


class Survival(RoundMetric):
    """survival@k of every slot, (K,).

    >>> metric = Survival(slots=2)
    >>> metric.update([(2, 2, 3), (2, 1, 1)], committed=11)
    >>> metric.compute().tolist()
    [1.0, 0.75]
    """

    def compute(self) -> Tensor:
        return survival(self.histogram)[0]


class ConditionalAcceptance(RoundMetric):
    """conditional@k of every slot, (K,).

    >>> metric = ConditionalAcceptance(slots=2)
    >>> metric.update([(2, 2, 1), (2, 1, 1), (2, 0, 2)], committed=7)
    >>> metric.compute().tolist()
    [0.5, 0.5]
    """

    def compute(self) -> Tensor:
        return conditional_acceptance(self.histogram)[0]


class SuffixDecay(RoundMetric):
    """One number for the conditional curve: its weighted log slope a slot.

    >>> metric = SuffixDecay(slots=2)
    >>> metric.update([(2, 2, 1), (2, 1, 3)], committed=9)
    >>> round(float(metric.compute()), 4)
    -1.3863
    """

    def compute(self) -> Tensor:
        return suffix_decay(*conditional_acceptance(self.histogram))


class AcceptanceRate(RoundMetric):
    """Accepted / proposed tokens.

    >>> metric = AcceptanceRate(slots=4)
    >>> metric.update([(4, 3, 1), (4, 0, 1)], committed=5)
    >>> float(metric.compute())
    0.375
    """

    def compute(self) -> Tensor:
        sizes = torch.arange(self.slots + 1, device=self.histogram.device)
        return (self.histogram.sum(0) * sizes).sum().double() / (self.histogram.sum(1) * sizes).sum()


class VerifiedPerRound(RoundMetric):
    """Tokens that the target verifies a round: proposed + 1.

    >>> metric = VerifiedPerRound(slots=4)
    >>> metric.update([(4, 3, 1), (1, 0, 1)], committed=5)
    >>> float(metric.compute())
    3.5
    """

    def compute(self) -> Tensor:
        sizes = torch.arange(1, self.slots + 2, device=self.histogram.device)
        return (self.histogram.sum(1) * sizes).sum().double() / self.rounds


class DecodingMetrics(RoundMetric):
    """All numbers of a decoding run in one dictionary of scalars; slots are numbered from 1, n_k beside each curve.

    >>> metric = DecodingMetrics(slots=2)
    >>> metric.update([(2, 2, 1), (2, 1, 1)], committed=5)
    >>> values = metric.compute()
    >>> {name: round(float(values[name]), 3) for name in ("accepted_length", "survival@2", "conditional@2", "rounds")}
    {'accepted_length': 2.5, 'survival@2': 0.5, 'conditional@2': 0.5, 'rounds': 2.0}
    """

    def compute(self) -> dict[str, Tensor]:
        sizes = torch.arange(self.slots + 1, device=self.histogram.device)
        proposed, accepted = (self.histogram.sum(1) * sizes).sum(), (self.histogram.sum(0) * sizes).sum()
        survived, offered = survival(self.histogram)
        conditional, reached = conditional_acceptance(self.histogram)
        values = {
            "accepted_length": accepted_length(self.counts[0], self.rounds),
            "accepted_length_per_prompt": self.ratios / self.counts[1],
            "acceptance_rate": accepted.double() / proposed,
            "verified_per_round": (proposed + self.rounds).double() / self.rounds,
            "suffix_decay": suffix_decay(conditional, reached),
            "rounds": self.rounds,
            "committed": self.counts[0],
            "prompts": self.counts[1:].sum(),
            "prompts_without_rounds": self.counts[2],
        }
        for k in range(self.slots):
            values |= {f"survival@{k + 1}": survived[k], f"survival_n@{k + 1}": offered[k]}
            values |= {f"conditional@{k + 1}": conditional[k], f"conditional_n@{k + 1}": reached[k]}
        return {name: value.double() for name, value in values.items()}


class ExpectedLength(Metric):
    """Mean over blocks of 1 + sum_k prod_{i<=k} alpha_i, alpha = 1 - half the L1 distance; never a product of means.

    >>> metric = ExpectedLength()
    >>> metric.update(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.ones(2, 2, dtype=torch.bool))
    >>> float(metric.compute())
    1.875
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("length", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("blocks", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, alpha: Float[Tensor, "M K"], mask: Bool[Tensor, "M K"]) -> None:
        self.length += expected_lengths(alpha.double(), mask).sum()
        self.blocks += mask[:, 0].sum()

    def compute(self) -> Tensor:
        return self.length / self.blocks


class SlotMetrics(Metric):
    """Teacher-forced statistics by slot, fed from `Loss.slots` of every micro-batch; one state, one reduction.

    compute() gives means over the supervised slots: acceptance, agreement, hit, ce, tv, outside, and for a draft with a
    confidence head confidence and confidence_error; each also by slot as name@k; expected_length; supervised (a count).
    """

    full_state_update = False

    def __init__(self, slots: int):
        super().__init__()
        self.slots = slots
        self.names = [field.name for field in fields(SlotStatistics) if field.name not in ("expected_length", "blocks")]
        self.add_state("sums", torch.zeros(len(self.names) * slots + 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, slots: SlotStatistics) -> None:
        curves = [getattr(slots, name) for name in self.names]
        if curves[0].shape != (self.slots,):
            raise ValueError(f"statistics of {len(curves[0])} slots do not fit metrics of {self.slots} slots")
        self.sums += torch.cat([*curves, slots.expected_length[None], slots.blocks[None]])

    def compute(self) -> dict[str, Tensor]:
        curves = dict(zip(self.names, self.sums[:-2].view(len(self.names), self.slots), strict=True))
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
        values = {"expected_length": self.sums[-2] / self.sums[-1], "supervised": curves["count"].sum()}
        for shown, name in means.items():
            count = curves["labelled" if name == "ce" else "count"]
            values[shown] = curves[name].sum() / count.sum()
            values |= {f"{shown}@{k + 1}": curves[name][k] / count[k] for k in range(self.slots)}
        return values
