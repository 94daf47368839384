"""From intervals about checkpoints to intervals about methods: the variance between trainings, and what it adds.

An interval over prompts is about *these checkpoints*: other prompts, the same weights. A claim about *a method* is
about a training that somebody else will run, with another seed. Its half-width is

    sqrt(h^2 + t^2 v / S)        of one method,        sqrt(h^2 + t^2 v (1/S_a + 1/S_b))        of a difference,

with h the half-width over prompts, S trainings, v the variance of one training around the mean of its method, and t the
quantile of Student's distribution for the degrees of freedom of v. v is what the values of the trainings vary beyond
the share that their prompts and their decoding explain (which h has already), so that nothing is counted twice; and it
is pooled over the methods of a table, because two or three seeds alone estimate no variance.

Axes: S trainings, R resamples; `axes` are those of the quantity, e.g. slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special

from analysis.statistics.histograms import Counts, Sums
from analysis.statistics.intervals import (
    LEVEL,
    Difference,
    macro_draws,
    nonincreasing_bounds,
    p_value,
    resample,
)

# With fewer trainings of each method no verdict is about the method.
FEWEST_SEEDS = 3
# Enough for a variance: its relative standard error is sqrt(2 / 1000) = 4.5%.
RESAMPLES = 1000


@dataclass(frozen=True)
class SeedVariance:
    """Variance of one training around its method's mean, and its degrees of freedom; 0 of them: not known.

    The variance of one part can be below zero (an estimate by subtraction); `pooled` cuts it at zero.
    """

    variance: Float[Any, "*axes"]
    freedom: Float[Any, "*axes"]

    @property
    def known(self) -> Any:
        """Where there is a degree of freedom."""
        return np.asarray(self.freedom) > 0

    @property
    def sd(self) -> Any:
        """Standard deviation between trainings; NaN where it is not known."""
        return np.where(self.known, np.sqrt(np.maximum(self.variance, 0.0)), np.nan)


UNKNOWN = SeedVariance(np.float64(np.nan), np.float64(0.0))


def between(values: Float[np.ndarray, "seeds ..."], draws: Float[np.ndarray, "seeds R ..."]) -> SeedVariance:
    """Variance between trainings from their values, less what resampling the prompts explains of it.

    Args:
        values: the quantity of each training.
        draws: the same over resamples of the prompts, the same prompts for every training in a resample.
    """
    seeds = len(values)
    if seeds < 2:
        return SeedVariance(np.full(values.shape[1:], np.nan), np.zeros(values.shape[1:]))
    apart = draws - draws.mean(0)
    some = ~np.isnan(apart).any(0).all(0)  # a slot that one of the trainings reaches in no resample has no variance
    noise = np.nanvar(np.where(some, apart, 0.0), 1).mean(0) * seeds / (seeds - 1)
    known = some & ~np.isnan(values).any(0)
    variance = np.where(known, values.var(0, ddof=1) - noise, np.nan)
    return SeedVariance(variance, np.where(known, seeds - 1.0, 0.0))


def pooled(parts: Sequence[SeedVariance]) -> SeedVariance:
    """The variance that several methods share, weighted by their degrees of freedom; curves of different lengths are
    pooled slot by slot."""
    if not parts:
        return UNKNOWN

    def add(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        if one.ndim == 0 or other.ndim == 0:
            return one + other
        total = np.zeros(max(len(one), len(other)))
        total[: len(one)] += one
        total[: len(other)] += other
        return total

    freedom = reduce(add, (np.asarray(part.freedom, dtype=float) for part in parts))
    weighted = (np.where(part.known, np.nan_to_num(part.variance) * part.freedom, 0.0) for part in parts)
    summed = reduce(add, (np.asarray(one, dtype=float) for one in weighted))
    some = freedom > 0
    return SeedVariance(np.where(some, np.maximum(summed / np.where(some, freedom, 1.0), 0.0), np.nan), freedom)


def of_quantities(
    seeds: Sequence[Counts], quantities: Mapping[str, Callable[[Sums], np.ndarray]], seed: int = 0
) -> dict[str, SeedVariance]:
    """Variance between the trainings of one method of quantities of their rounds, on the prompts that all decoded."""
    alike = _same_prompts(seeds)
    if len(alike) < 2:
        return dict.fromkeys(quantities, UNKNOWN)
    totals = [counts.total() for counts in alike]
    draws = [Sums(resample(counts.features(), RESAMPLES, seed)) for counts in alike]
    return {
        name: between(
            np.stack([np.asarray(quantity(total), dtype=float) for total in totals]),
            np.stack([quantity(drawn) for drawn in draws]),
        )
        for name, quantity in quantities.items()
    }


def of_macro(strata: Sequence[Sequence[Counts]], seed: int = 0, memo: dict | None = None) -> SeedVariance:
    """The same of the macro average of accepted length: for every benchmark the counts of each training, in one order.

    Benchmarks with other numbers of trainings have no common value of a training: the variance is then not known.
    """
    alike = [_same_prompts(seeds) for seeds in strata]
    if len({len(seeds) for seeds in alike}) != 1 or len(alike[0]) < 2:
        return UNKNOWN
    each = [macro_draws(own, RESAMPLES, seed, memo) for own in zip(*alike, strict=True)]
    return between(np.array([value for value, _ in each]), np.stack([draws for _, draws in each]))


def _same_prompts(seeds: Sequence[Counts]) -> list[Counts]:
    """The trainings with a round, each with the prompts that all of them decoded, so that resamples are the same."""
    some = [counts for counts in seeds if counts.rounds.any()]
    if len(some) < 2:
        return some
    shared = reduce(np.intersect1d, (counts.prompts for counts in some))
    slots = max(counts.slots for counts in some)
    return [counts.take(shared).with_slots(slots) for counts in some] if len(shared) else []


def widened(
    value: Float[Any, "*axes"],
    low: Float[Any, "*axes"],
    high: Float[Any, "*axes"],
    variance: SeedVariance,
    inverse_seeds: float,
) -> tuple[Float[Any, "*axes"], Float[Any, "*axes"]]:
    """The bounds about the method from those about its checkpoints; NaN where the variance is not known.

    Args:
        inverse_seeds: 1 / S, or 1 / S_a + 1 / S_b of a difference.
    """
    known = variance.known
    t = special.stdtrit(np.where(known, variance.freedom, 1.0), (1 + LEVEL) / 2)
    more = np.where(known, t**2 * np.nan_to_num(variance.variance) * inverse_seeds, np.nan)
    return value - np.sqrt((value - low) ** 2 + more), value + np.sqrt((high - value) ** 2 + more)


def widened_curve(
    value: Float[np.ndarray, " K"],
    low: Float[np.ndarray, " K"],
    high: Float[np.ndarray, " K"],
    variance: SeedVariance,
    inverse_seeds: float,
    falls: bool = False,
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """`widened` of probabilities by slot, between 0 and 1. falls: neither bound increases along the block."""
    slots = (np.broadcast_to(part, max(np.size(part), len(value)))[: len(value)] for part in _parts(variance))
    below, above = widened(value, low, high, SeedVariance(*slots), inverse_seeds)
    below, above = np.clip(below, 0, 1), np.clip(above, 0, 1)
    return nonincreasing_bounds(value, below, above) if falls else (below, above)


def _parts(variance: SeedVariance) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(variance.variance, dtype=float), np.asarray(variance.freedom, dtype=float)


@dataclass(frozen=True)
class Verdict:
    """A difference of two methods: its bounds and p; `p_least` and `p_most` are the range of p that the bootstrap
    leaves uncertain. NaN if the variance between trainings is not known."""

    low: float
    high: float
    p: float
    p_least: float
    p_most: float


NONE = Verdict(*[float("nan")] * 5)


def of_checkpoints(found: Difference) -> Verdict:
    """The verdict about these checkpoints: prompts alone."""
    ps = (p_value(found.value, reach, found.fewest - 1, found.fewest) for reach in found.reaches)
    return Verdict(found.low, found.high, found.p, *ps)


def of_methods(found: Difference, variance: SeedVariance, inverse_seeds: float) -> Verdict:
    """The verdict about the methods: prompts and trainings. inverse_seeds: 1 / S_a + 1 / S_b."""
    if np.isnan(found.low) or not variance.known:
        return NONE
    low, high = (float(x) for x in widened(found.value, found.low, found.high, variance, inverse_seeds))
    more = (special.stdtrit(float(variance.freedom), (1 + LEVEL) / 2) ** 2) * float(variance.variance) * inverse_seeds
    ps = []
    for reach in (found.reach, *found.reaches):
        of_both = _freedom(reach, found.fewest, variance, inverse_seeds)
        ps.append(p_value(found.value, float(np.sqrt(reach**2 + more)), of_both, found.fewest))
    return Verdict(low, high, *ps)


def _freedom(reach: float, prompts: int, variance: SeedVariance, inverse_seeds: float) -> float:
    """Degrees of freedom of both parts together (F. Satterthwaite, 1946): `reach` is the half-width over prompts."""
    over_prompts = (reach / special.stdtrit(prompts - 1, (1 + LEVEL) / 2)) ** 2
    over_seeds = float(variance.variance) * inverse_seeds
    parts = over_prompts**2 / (prompts - 1) + over_seeds**2 / float(variance.freedom)
    return (over_prompts + over_seeds) ** 2 / parts if parts > 0 else float(prompts - 1)
