"""From a pilot to an experiment: the variances of a difference, and the prompts and trainings that resolve a gap.

The variance of the difference of two methods over P prompts and S trainings of each is

    prompt / P + decoding / (P S) + 2 v / S

with `prompt` the variance over prompts that all trainings share, `decoding` what one training adds on one prompt, and
v the variance between trainings (`analysis.statistics.training_seeds`). No number of prompts makes it smaller than
2 v / S.

Axes: P prompts, S trainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from analysis.statistics.histograms import Counts
from analysis.statistics.intervals import LEVEL
from analysis.statistics.training_seeds import SeedVariance

# More prompts than these are no plan.
MOST = 1_000_000


@dataclass(frozen=True)
class Pilot:
    """Variances of a difference of accepted lengths, for one prompt and one training; `methods`: rows of the table,
    over which the variance between trainings is pooled."""

    prompt: float
    decoding: float
    training: float
    methods: int

    def error(self, prompts: int, seeds: int) -> float:
        """Standard error of the difference."""
        return float(np.sqrt(self.prompt / prompts + self.decoding / (prompts * seeds) + 2 * self.training / seeds))

    def gap(self, prompts: int, seeds: int, power: float, tests: int) -> float:
        """The difference that is resolved with the probability `power`, corrected for `tests` tests (Bonferroni, the
        first step of Holm)."""
        over_prompts = self.prompt / prompts + self.decoding / (prompts * seeds)
        over_seeds = 2 * self.training / seeds
        parts = over_prompts**2 / (prompts - 1) + over_seeds**2 / (self.methods * (seeds - 1))
        freedom = (over_prompts + over_seeds) ** 2 / parts if parts else float(prompts - 1)
        t = special.stdtrit(freedom, 1 - (1 - LEVEL) / (2 * tests)) + special.stdtrit(freedom, power)
        return float(t * self.error(prompts, seeds))

    def prompts_for(self, gap: float, seeds: int, power: float, tests: int) -> int | None:
        """The fewest prompts that resolve `gap` with `seeds` trainings of each; None if no number of them does."""
        low, high = 2, MOST
        if self.gap(high, seeds, power, tests) > gap:
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.gap(middle, seeds, power, tests) <= gap else (middle + 1, high)
        return low


def pilot(a: Sequence[Sequence[Counts]], b: Sequence[Sequence[Counts]], shared: SeedVariance, methods: int) -> Pilot:
    """Variances of the macro average of `a` minus that of `b`; per benchmark the counts of each training.

    The prompts of the benchmarks are taken to keep their proportions. With one training of each, what decoding adds
    cannot be told from what prompts differ by, and counts as theirs.

    Raises:
        ValueError: no benchmark has two prompts that both decoded.
    """
    sizes, prompt, decoding = [], [], []
    for left, right in zip(a, b, strict=True):
        common = left[0].prompts
        for counts in (*left[1:], *right):
            common = np.intersect1d(common, counts.prompts)
        if len(common) < 2:
            raise ValueError(
                "a benchmark has fewer than two prompts that all runs decoded; name runs with more prompts"
            )
        one, other = (np.stack([_influence(c.take(common)) for c in own]) for own in (left, right))
        noise = sum(_noise(own) / len(own) for own in (one, other))
        whole = float((one.mean(0) - other.mean(0)).var(ddof=1))
        sizes.append(len(common))
        prompt.append(max(0.0, whole - noise))
        decoding.append(sum(_noise(own) for own in (one, other)))
    total, weights = sum(sizes), 1 / len(sizes) ** 2
    per_prompt, per_round = (
        total * weights * sum(value / n for value, n in zip(part, sizes, strict=True)) for part in (prompt, decoding)
    )
    return Pilot(per_prompt, per_round, float(shared.variance), methods)


def _influence(counts: Counts) -> np.ndarray:
    """What each prompt adds to the accepted length, (P,): the linearised ratio (W. Cochran, 1977, section 6.3)."""
    length = counts.committed.sum() / counts.rounds.sum()
    return (counts.committed - length * counts.rounds) / counts.rounds.mean()


def _noise(own: np.ndarray) -> float:
    """Variance of one training on one prompt around the mean of the trainings there."""
    return float((own - own.mean(0)).var(ddof=1, axis=1).sum() / (len(own) - 1)) if len(own) > 1 else 0.0
