"""From (proposed, accepted, count) histograms to sums over prompts, and from sums to the metrics,
whose formulas are those of specbench/metrics/functional.py.

Axes: P prompts, K slots, F summed features; leading `axes` of a metric are bootstrap samples or groups.

A prompt is one cluster: all its turns, seeds and runs are summed into one row, because its rounds are not independent.
Every metric is a function of column sums, so a bootstrap resamples rows and does not read the rounds again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from specbench.metrics import functional
from specbench.metrics.functional import QUANTITIES, RoundSums, SlotCounts


@dataclass(frozen=True)
class Counts:
    """Sums over the rounds of each of P prompts. A prompt without rounds has a row of zeros.

    `offered[p, k-1]` counts rounds that proposed at least k tokens; `reached` those of them that accepted at least
    k-1; `passed` those that accepted at least k. `committed` is counted by the decoder (a stop token adds no bonus).
    """

    prompts: np.ndarray  # (P,) sorted and distinct
    committed: Float[np.ndarray, " P"]
    rounds: Float[np.ndarray, " P"]
    proposed: Float[np.ndarray, " P"]
    accepted: Float[np.ndarray, " P"]
    offered: Float[np.ndarray, "P K"]
    reached: Float[np.ndarray, "P K"]
    passed: Float[np.ndarray, "P K"]

    @property
    def slots(self) -> int:
        """K, the longest proposal seen."""
        return self.offered.shape[1]

    def features(self) -> Float[np.ndarray, "P F"]:
        """The columns that a bootstrap sums, read back by `Sums`; F = 6 + 3K."""
        own = functional.prompt_ratios(self.committed, self.rounds)
        scalars = [self.committed, self.rounds, self.proposed, self.accepted, own.own, own.some]
        return np.concatenate([np.stack(scalars, 1), self.offered, self.reached, self.passed], 1)

    def with_slots(self, slots: int) -> Counts:
        """The same counts with `slots` slots; those that were never proposed are zero."""
        more = ((0, 0), (0, slots - self.slots))
        wide = (np.pad(values, more) for values in (self.offered, self.reached, self.passed))
        return Counts(self.prompts, self.committed, self.rounds, self.proposed, self.accepted, *wide)

    def total(self) -> Sums:
        """Sums over every prompt: the point estimates."""
        return Sums(self.features().sum(0))

    def take(self, prompts: np.ndarray) -> Counts:
        """The rows of `prompts` (each must be here), in that order."""
        rows = np.searchsorted(self.prompts, prompts)
        fields = ("committed", "rounds", "proposed", "accepted", "offered", "reached", "passed")
        return Counts(self.prompts[rows], *(getattr(self, field)[rows] for field in fields))


@dataclass(frozen=True)
class Sums:
    """Column sums of `Counts.features()` with any leading axes, and the metrics computed from them."""

    values: Float[np.ndarray, "*axes F"]

    def _slot(self, which: int) -> Float[np.ndarray, "*axes K"]:
        slots = (self.values.shape[-1] - 6) // 3
        return self.values[..., 6 + which * slots : 6 + (which + 1) * slots]

    @property
    def offered(self) -> Float[np.ndarray, "*axes K"]:
        return self._slot(0)

    @property
    def reached(self) -> Float[np.ndarray, "*axes K"]:
        return self._slot(1)

    @property
    def passed(self) -> Float[np.ndarray, "*axes K"]:
        return self._slot(2)

    @property
    def slot_counts(self) -> SlotCounts:
        """Sums of all three, as the formulas take them."""
        return SlotCounts(self.offered, self.reached, self.passed)

    def quantity(self, name: str) -> Float[np.ndarray, "*axes"]:
        """A quantity of functional.QUANTITIES."""
        return QUANTITIES[name](RoundSums(*(self.values[..., column] for column in range(6)), self.slot_counts))

    @property
    def accepted_length(self) -> Float[np.ndarray, "*axes"]:
        """Tokens committed / rounds, pooled over rounds (the published definition)."""
        return self.quantity("accepted_length")

    @property
    def accepted_length_per_prompt(self) -> Float[np.ndarray, "*axes"]:
        """Mean over prompts of each prompt's own committed / rounds; prompts without rounds have no ratio."""
        return self.quantity("accepted_length_per_prompt")

    @property
    def acceptance_rate(self) -> Float[np.ndarray, "*axes"]:
        """Tokens accepted / tokens proposed."""
        return self.quantity("acceptance_rate")

    @property
    def verified_per_round(self) -> Float[np.ndarray, "*axes"]:
        """Tokens that the target reads in a round: the proposal and the anchor."""
        return self.quantity("verified_per_round")

    @property
    def survival(self) -> Float[np.ndarray, "*axes K"]:
        """Rounds that accepted at least k / rounds that proposed at least k."""
        return functional.survival(self.slot_counts)

    @property
    def conditional(self) -> Float[np.ndarray, "*axes K"]:
        """Rounds that accepted at least k / rounds that proposed at least k and accepted at least k-1."""
        return functional.conditional_acceptance(self.slot_counts)

    @property
    def survival_product(self) -> Float[np.ndarray, "*axes K"]:
        """The product of conditional@1 ... @k."""
        return functional.survival_product(self.slot_counts)

    @property
    def suffix_decay(self) -> Float[np.ndarray, "*axes"]:
        """Slope of log conditional@k over k, by the likelihood of the counts."""
        return self.quantity("suffix_decay")


def count(
    prompts: np.ndarray,
    committed: np.ndarray,
    cell_record: Int[np.ndarray, " C"],
    cell_proposed: Int[np.ndarray, " C"],
    cell_accepted: Int[np.ndarray, " C"],
    cell_count: Int[np.ndarray, " C"],
    beyond: np.ndarray | None = None,
) -> Counts:
    """Sum records into one row per prompt.

    Args:
        prompts: (records,) key of each record's prompt; equal keys are one cluster.
        committed: (records,) tokens committed.
        cell_record, cell_proposed, cell_accepted, cell_count: the histograms in long form, C cells; `cell_record` is
            the position of the record that a cell belongs to.
        beyond: (records,) nodes of token trees beyond one a level; they count as proposed. None: chains.
    """
    keys, cluster = np.unique(prompts, return_inverse=True)
    slots = int(cell_proposed.max(initial=0))
    width = (slots + 1) ** 2
    index = cluster[cell_record] * width + cell_proposed * (slots + 1) + cell_accepted
    # Of integers where there is no cell at all, whatever the weights.
    histogram = np.bincount(index, weights=cell_count, minlength=len(keys) * width).astype(float)
    histogram = histogram.reshape(-1, slots + 1, slots + 1)
    summed = np.bincount(cluster, weights=committed, minlength=len(keys)).astype(float)
    rounds, proposed, accepted = functional.round_totals(histogram)
    if beyond is not None:
        proposed = proposed + np.bincount(cluster, weights=beyond, minlength=len(keys))
    return Counts(keys, summed, rounds, proposed, accepted, *functional.slot_counts(histogram))


def join(parts: Sequence[Counts]) -> Counts:
    """The prompts of several benchmarks in one; no prompt may stand in two of them."""
    slots = max(part.slots for part in parts)
    parts = [part.with_slots(slots) for part in parts]
    fields = ("prompts", "committed", "rounds", "proposed", "accepted", "offered", "reached", "passed")
    columns = [np.concatenate([getattr(part, field) for part in parts]) for field in fields]
    order = np.argsort(columns[0])
    assert len(np.unique(columns[0])) == len(order), "a prompt stands in two benchmarks"
    return Counts(*(column[order] for column in columns))
