"""Ranks of results with their uncertainty: a rank is a range, and results that the data do not separate share it.

Two results with records are compared on the prompts that both decoded; results without records by their standard
errors, as if their prompts were independent, which is conservative where they were the same. Holm's correction runs
over all pairs. A result without a standard error (a publication that gives none) has no rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import special

from analysis.statistics.histograms import Counts
from analysis.statistics.intervals import LEVEL, PairingError, difference, holm
from specbench.runs.result_schema import ResultQuantity


@dataclass(frozen=True)
class RankRange:
    """The best and the worst rank that the data allow; 1 is best."""

    best: int
    worst: int

    def __str__(self) -> str:
        return str(self.best) if self.best == self.worst else f"{self.best}–{self.worst}"


def ranks(macros: Sequence[ResultQuantity], strata: Sequence[Sequence[Counts] | None]) -> list[RankRange | None]:
    """Ranks by macro-averaged accepted length; 1 + the results that are better, to n - those that are worse.

    Args:
        macros: the macro average of every result.
        strata: its counts by benchmark, the same benchmarks in the same order; None without records.
    """
    placed = [i for i, macro in enumerate(macros) if macro.standard_error is not None]
    pairs = list(combinations(placed, 2))
    compared = [_compared(macros[a], macros[b], strata[a], strata[b]) for a, b in pairs]
    adjusted = holm([p for _, p in compared])
    better = np.zeros(len(macros), int)
    worse = np.zeros(len(macros), int)
    for (a, b), (value, _), p in zip(pairs, compared, adjusted, strict=True):
        if p < 1 - LEVEL:  # False for NaN
            ahead, behind = (a, b) if value > 0 else (b, a)
            better[behind] += 1
            worse[ahead] += 1
    size = len(placed)
    return [RankRange(1 + int(better[i]), size - int(worse[i])) if i in placed else None for i in range(len(macros))]


def _compared(
    a: ResultQuantity, b: ResultQuantity, left: Sequence[Counts] | None, right: Sequence[Counts] | None
) -> tuple[float, float]:
    """The difference a - b and its p-value."""
    if left is not None and right is not None:
        try:
            found = difference(left, right)
            return found.value, found.p if found.resolved else 1.0
        except PairingError:
            pass
    value, error = a.value - b.value, math.hypot(a.standard_error, b.standard_error)
    if not error:
        return value, 1.0
    return value, float(2 * special.ndtr(-abs(value) / error))
