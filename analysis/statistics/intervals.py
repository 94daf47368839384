"""Intervals over prompts (about these checkpoints), paired differences, the spread over training seeds, and Holm's
correction. `analysis.statistics.training_seeds` makes intervals about methods of them.

Axes: P prompts, F summed features, R resamples. Prompts are the clusters: a resample draws whole prompts with
replacement, with all their turns and seeds; the quantities of `analysis.statistics.histograms` follow from its sums.

Intervals are 95% percentile intervals whose tails are moved outwards for few prompts (the expanded percentile
interval of T. Hesterberg, "What Teachers Should Know about the Bootstrap", 2015, section 4.3): without it, small
prompt sets give intervals that are too short. Fewer than two prompts with rounds give no interval at all.
Measured coverage of accepted length on over-dispersed simulated prompts (as in tests/analysis/test_statistics.py,
2,000 experiments each, standard error 0.5 points): 92.9% with 10 prompts, 93.8% with 20, 94.6% with 40, 93.9% with 80,
94.6% with 160; but 92.4% with 6, 86.8% with 4 and 75.1% with 3, hence FEWEST.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from scipy import special

from analysis.statistics.histograms import Counts, Sums
from specbench.metrics import functional
from specbench.metrics.functional import ratio

LEVEL = 0.95
RESAMPLES = 2000
# Of a difference: with these, the end of an interval is uncertain by 3% of its half-width (two standard errors).
VERDICT_RESAMPLES = 10_000
MINIMUM_SHARED = 0.9
# Draws of at most so many resamples x prompts are kept (8 MB each, of 16 seeds and numbers of prompts).
KEPT_DRAWS = 1_000_000
# With fewer prompts an interval is too short, so no difference is then called resolved.
FEWEST = 6


class PairingError(ValueError):
    """Two methods were measured on prompt sets too different to be paired."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval; the bounds are NaN if there are too few prompts."""

    value: float
    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        return not (number < self.low or number > self.high)


@dataclass(frozen=True)
class Difference:
    """`a - b` of these checkpoints on the `paired` prompts that both decoded; `fewest`: the smallest number of them
    (with rounds) on a benchmark.

    `p` inverts the interval (`p_value`), so it is below 0.05 if the interval does not hold zero. `reaches`: least and
    most half-width on the side of zero within two standard errors of Monte Carlo. `resolved`, of this pair alone, is
    false if the interval contains zero or does not exist, or if `fewest` is below FEWEST.
    """

    value: float
    low: float
    high: float
    p: float
    paired: int
    shared: float
    fewest: int
    reaches: tuple[float, float] = (float("nan"), float("nan"))

    @property
    def resolved(self) -> bool:
        return bool(self.fewest >= FEWEST and (self.low > 0 or self.high < 0))

    @property
    def reach(self) -> float:
        """Half-width of the interval on the side of zero."""
        return self.value - self.low if self.value > 0 else self.high - self.value


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (n-1) and 95% t-interval over training seeds; NaN where n = 1."""

    mean: float
    sd: float
    n: int
    low: float
    high: float


def resample(
    features: Float[np.ndarray, "P F"], resamples: int = RESAMPLES, seed: int = 0, chunk: int = 128
) -> Float[np.ndarray, "R F"]:
    """Column sums of `resamples` draws of P prompts with replacement.

    The draws depend only on (seed, P, resamples): two feature tables over the same prompts in the same order get the
    same draws, so their difference is paired.
    """
    prompts = len(features)
    if not prompts:
        return np.zeros((resamples, features.shape[1]))
    sums = np.empty((resamples, features.shape[1]))
    start = 0
    for times in _times(prompts, resamples, seed, chunk):
        sums[start : start + len(times)] = times @ features
        start += len(times)
    return sums


def _times(prompts: int, resamples: int, seed: int, chunk: int) -> Iterable[Float[np.ndarray, "rows P"]]:
    """How often each prompt is drawn in each resample, in chunks of rows; kept for the next table where it is small,
    because hundreds of trainings over the same prompts need the same draws."""
    small = prompts * resamples <= KEPT_DRAWS
    return _kept_times(prompts, resamples, seed, chunk) if small else _drawn_times(prompts, resamples, seed, chunk)


def _drawn_times(prompts: int, resamples: int, seed: int, chunk: int) -> Iterator[Float[np.ndarray, "rows P"]]:
    generator = np.random.default_rng([seed, prompts])
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(0, prompts, (rows, prompts), dtype=np.int32)
        drawn += (np.arange(rows, dtype=np.int32) * prompts)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * prompts).reshape(rows, prompts).astype(float)


@lru_cache(maxsize=16)
def _kept_times(prompts: int, resamples: int, seed: int, chunk: int) -> tuple[Float[np.ndarray, "rows P"], ...]:
    return tuple(_drawn_times(prompts, resamples, seed, chunk))


def tails(prompts: int) -> tuple[float, float]:
    """Lower and upper percentile (in 0..1) of the expanded percentile interval for `prompts` clusters."""
    reach = np.sqrt(prompts / (prompts - 1)) * special.stdtrit(prompts - 1, (1 + LEVEL) / 2)
    low = float(special.ndtr(-reach))
    return low, 1 - low


def bounds(
    draws: Float[np.ndarray, "R ..."], prompts: int
) -> tuple[Float[np.ndarray, "*axes"], Float[np.ndarray, "*axes"]]:
    """Lower and upper bound over the resamples; NaN with fewer than two prompts or no draw that has a value.

    If no round proposed anything there is no slot, and the bounds are empty like the curve.
    """
    if prompts < 2 or draws[0].size == 0:
        empty = np.full(draws.shape[1:], np.nan)
        return empty, empty.copy()
    some = ~np.isnan(draws).all(0)
    low, high = np.nanquantile(np.where(some, draws, 0.0), tails(prompts), axis=0)
    return np.where(some, low, np.nan), np.where(some, high, np.nan)


def uncertain(draws: Float[np.ndarray, " R"], prompts: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Two standard errors of Monte Carlo to both sides of `bounds`: (least, most) of the lower and the upper bound."""
    low, high = tails(prompts)
    step = 2 * np.sqrt(low * (1 - low) / len(draws))
    ends = np.clip([low - step, low + step, high - step, high + step], 0, 1)
    least, most, first, last = (float(x) for x in np.nanquantile(draws, ends))
    return (least, most), (first, last)


def p_value(value: float, reach: float, freedom: float, prompts: int) -> float:
    """Two-sided p of a value whose 95% interval has the half-width `reach` on the side of zero, by Student's t.

    Never below 2^(1 - prompts), the smallest p of a test that swaps the signs of the prompts' differences.
    """
    if np.isnan(reach) or prompts < 2:
        return float("nan")
    if not value:
        return 1.0
    least = 2.0 ** (1 - prompts)
    if reach <= 0:
        return least
    t = special.stdtrit(freedom, (1 + LEVEL) / 2) * abs(value) / reach
    return float(np.clip(2 * special.stdtr(freedom, -t), least, 1.0))


def interval(
    counts: Counts, quantity: Callable[[Sums], np.ndarray], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value and cluster-bootstrap bounds of `quantity`, e.g. `lambda sums: sums.conditional` -> three (K,) arrays."""
    draws = Sums(resample(counts.features(), resamples, seed))
    return (np.asarray(quantity(counts.total())), *bounds(quantity(draws), int((counts.rounds > 0).sum())))


def by_slot(
    counts: Counts, conditional: bool = True, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Conditional acceptance (or survival) by slot with its bounds, from the prompts that have rounds there.

    A slot that no round reached is empty. Survival and both of its bounds never increase along the block
    (`nonincreasing`). Bounds of rates 0 and 1: `exact_ends`.
    """
    total = counts.total()
    trials = counts.reached if conditional else counts.offered
    draws = Sums(resample(counts.features(), resamples, seed))
    drawn, value = (
        sums.conditional if conditional else nonincreasing(sums.passed, sums.offered) for sums in (draws, total)
    )
    prompts = (trials > 0).sum(0)
    each = [bounds(drawn[:, k], int(n)) for k, n in enumerate(prompts)]
    low, high = (np.array([pair[end] for pair in each], dtype=float) for end in (0, 1))
    low, high = exact_ends(value, low, high, prompts)
    if not conditional:
        low, high = nonincreasing_bounds(value, low, high)
    unreached = total.reached == 0
    return tuple(np.where(unreached, np.nan, curve) for curve in (value, low, high))


def exact_ends(
    value: Float[np.ndarray, " K"], low: Float[np.ndarray, " K"], high: Float[np.ndarray, " K"], prompts: np.ndarray
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Bounds of rates of which some are 0 or 1, each from so many `prompts`.

    If all outcomes were the same, every resample is equal and the bootstrap interval would have length zero. The open
    end is then the exact (Clopper-Pearson) bound with each prompt as one trial.
    """
    several = prompts >= 2
    open_end = ((1 - LEVEL) / 2) ** (1 / np.maximum(prompts, 1))
    return np.where(several & (value == 1), open_end, low), np.where(several & (value == 0), 1 - open_end, high)


def survival_product(
    counts: Counts, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Survival as a product of conditionals, with bounds that never increase along the block."""
    value, low, high = interval(counts, lambda sums: sums.survival_product, resamples, seed)
    return (value, *nonincreasing_bounds(value, low, high))


def nonincreasing_bounds(
    value: Float[np.ndarray, " K"], low: Float[np.ndarray, " K"], high: Float[np.ndarray, " K"]
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Bounds of a curve that cannot increase: a bound of one slot bounds those after it from above and those before it
    from below. NaN stays NaN."""
    above = np.where(np.isnan(high), np.nan, np.fmin.accumulate(np.fmax(high, value)))
    below = np.where(np.isnan(low), np.nan, np.fmax.accumulate(np.fmin(low, value)[::-1])[::-1])
    return below, above


def nonincreasing(
    passed: Float[np.ndarray, "*axes K"], offered: Float[np.ndarray, "*axes K"]
) -> Float[np.ndarray, "*axes K"]:
    """passed / offered by slot if that never increases, else the closest curve that does not: least squares weighted by
    `offered`, which must not increase itself (R. Barlow et al., 1972: the min-max formula). NaN where nothing was
    offered.

    The ratio can increase if only rounds with a high acceptance propose that many tokens; a survival function cannot.
    """
    plain = ratio(passed, offered)
    rises = np.diff(np.nan_to_num(plain), axis=-1) > 0
    if not rises.any():
        return plain
    slots = plain.shape[-1]
    above, below = (np.concatenate([np.zeros((*x.shape[:-1], 1)), x.cumsum(-1)], -1) for x in (passed, offered))
    fitted = np.full(plain.shape, np.nan)
    for k in range(slots):
        # Means over slots a..b for every a <= k <= b: the least over a of the greatest over b.
        share = ratio(
            above[..., None, k + 1 :] - above[..., : k + 1, None], below[..., None, k + 1 :] - below[..., : k + 1, None]
        )
        fitted[..., k] = np.nan_to_num(share, nan=-np.inf).max(-1).min(-1)
    return np.where(rises.any(-1, keepdims=True) & (offered > 0), fitted, plain)


def accepted_length(counts: Counts, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Pooled accepted length with its interval."""
    value, low, high = interval(counts, lambda sums: sums.accepted_length, resamples, seed)
    return Interval(float(value), float(low), float(high))


def common(a: Counts, b: Counts, minimum: float = MINIMUM_SHARED) -> tuple[np.ndarray, float]:
    """Common prompts and their share of the union; PairingError if that share is below `minimum`."""
    both = np.intersect1d(a.prompts, b.prompts, assume_unique=True)
    union = len(a.prompts) + len(b.prompts) - len(both)
    shared = len(both) / union if union else 0.0
    if shared < minimum or not len(both):
        raise PairingError(
            f"cannot pair: {len(both)} of {union} prompts were seen by both ({shared:.0%}, at least {minimum:.0%} "
            "needed); evaluate both on the same prompts or filter them to the same benchmarks"
        )
    return both, shared


def macro_draws(
    strata: Sequence[Counts], resamples: int = RESAMPLES, seed: int = 0, memo: dict[tuple, np.ndarray] | None = None
) -> tuple[float, Float[np.ndarray, " R"]]:
    """Unweighted mean of the strata's accepted lengths (a stratum is a benchmark) and its draws.

    Each stratum is resampled separately. `memo` keeps draws between calls, because many pairs need the same ones.
    """
    memo = {} if memo is None else memo
    value = float(np.mean([counts.total().accepted_length for counts in strata]))
    draws = []
    for index, counts in enumerate(strata):
        sums = np.stack([counts.committed, counts.rounds], 1)
        key = (index, resamples, seed, sums.tobytes())
        if key not in memo:
            drawn = resample(sums, resamples, stratum_seed(seed, index))
            memo[key] = functional.accepted_length(drawn[:, 0], drawn[:, 1])
        draws.append(memo[key])
    return value, np.mean(draws, 0)


def stratum_seed(seed: int, index: int) -> int:
    """Independent draws for benchmarks with equal numbers of prompts; those of the first are the benchmark's own."""
    return seed + 1_000_003 * index


def macro(strata: Sequence[Counts], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Macro average over benchmarks with its stratified cluster-bootstrap interval."""
    value, draws = macro_draws(strata, resamples, seed)
    low, high = bounds(draws, min(int((counts.rounds > 0).sum()) for counts in strata))
    return Interval(value, float(low), float(high))


def difference(
    a: Sequence[Counts],
    b: Sequence[Counts],
    resamples: int = RESAMPLES,
    seed: int = 0,
    minimum: float = MINIMUM_SHARED,
    memo: dict[tuple, np.ndarray] | None = None,
) -> Difference:
    """Accepted length of `a` minus that of `b`, paired by prompt, over one benchmark or the macro of several.

    Args:
        a, b: one `Counts` per benchmark, the same benchmarks in the same order.
        minimum: smallest share of prompts (of their union, per benchmark) that both must have decoded.
        memo: see `macro_draws`.

    Raises:
        PairingError: the prompt sets differ by more than that, or the benchmarks do.
    """
    if len(a) != len(b) or not a:
        raise PairingError(f"cannot pair {len(a)} benchmarks with {len(b)}: compare methods on the same benchmarks")
    paired = [common(x, y, minimum) for x, y in zip(a, b, strict=True)]
    left = [counts.take(prompts) for counts, (prompts, _) in zip(a, paired, strict=True)]
    right = [counts.take(prompts) for counts, (prompts, _) in zip(b, paired, strict=True)]
    value_a, draws_a = macro_draws(left, resamples, seed, memo)
    value_b, draws_b = macro_draws(right, resamples, seed, memo)
    draws = draws_a - draws_b
    prompts = min(int(((x.rounds > 0) & (y.rounds > 0)).sum()) for x, y in zip(left, right, strict=True))
    low, high = bounds(draws, prompts)
    value = value_a - value_b
    size = sum(len(prompts) for prompts, _ in paired)
    shared = float(min(share for _, share in paired))
    found = Difference(value, float(low), float(high), float("nan"), size, shared, prompts)
    if np.isnan(found.low):
        return found
    (least, most), (first, last) = uncertain(draws, prompts)
    reaches = (value - most, value - least) if value > 0 else (first - value, last - value)
    return replace(found, p=p_value(value, found.reach, prompts - 1, prompts), reaches=reaches)


def holm(p: Sequence[float]) -> Float[np.ndarray, " tests"]:
    """Holm's step-down adjustment of p-values (S. Holm, 1979); NaN stays NaN and is not counted as a test."""
    values = np.asarray(p, dtype=float)
    adjusted = np.full(values.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    steps = values[order] * (len(order) - np.arange(len(order)))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return adjusted


def spread(values: Sequence[float]) -> Spread:
    """Spread of a number over training seeds. This differs from the bootstrap interval over prompts."""
    numbers = np.asarray(values, dtype=float)
    n = len(numbers)
    mean = float(numbers.mean()) if n else float("nan")
    if n < 2:
        return Spread(mean, float("nan"), n, float("nan"), float("nan"))
    sd = float(numbers.std(ddof=1))
    reach = float(special.stdtrit(n - 1, (1 + LEVEL) / 2)) * sd / np.sqrt(n)
    return Spread(mean, sd, n, mean - reach, mean + reach)
