"""Whether a training had ended to gain: the slope of accepted length at its end, from its decoding probes.

All probes of a training decode the same prompts. Over the probes of the last half of its steps, the pooled accepted
length is regressed on the logarithm of the step, which gives the gain per doubling of the steps. The interval is over
prompts (each prompt with its counts at every probe is one cluster; linearised variance of the ratios, Student's t). It
does not hold what another training with other seeds would give.

A training counts as converged if the upper end of the interval is below 2% of the accepted length. The slope belongs
to the schedule: with a rate that falls to 0 every curve becomes flat. Trainings of several lengths with a constant rate
and a short decay (`recipe.decay`) tell what more steps give.

Axes: J probes, P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

LAST = 0.5  # share of the steps at the end from which probes are taken
TOLERANCE = 0.02  # gain per doubling of the steps, as a share of the accepted length, that counts as none
LEVEL = 0.95
FEWEST = 5  # prompts; fewer can answer alike at every probe by chance, which would look like certainty


@dataclass(frozen=True)
class Convergence:
    """`gain_per_doubling` of the accepted length with its 95% interval, from `probes` probes of `prompts` prompts."""

    gain_per_doubling: float
    gain_low: float
    gain_high: float
    probes: int
    prompts: int
    converged: bool

    @property
    def text(self) -> str:
        """`accepted length +0.31 [0.12, 0.50] per doubling of the steps: not converged`."""
        verdict = "converged" if self.converged else "not converged"
        ends = f"[{self.gain_low:.2f}, {self.gain_high:.2f}]"
        return f"accepted length {self.gain_per_doubling:+.2f} {ends} per doubling of the steps: {verdict}"


def convergence(steps: Sequence[int], counts: Sequence[Int[np.ndarray, "P 2"]]) -> Convergence | None:
    """The certificate of a training; None with fewer than two probes in its last half, or fewer than FEWEST prompts.

    Args:
        steps: optimiser step of every probe, ascending; the last one is the end of the training.
        counts: of every probe, the tokens committed and the rounds of each prompt, in the same order.
    """
    kept = [(step, count) for step, count in zip(steps, counts, strict=True) if step >= LAST * steps[-1]]
    prompts = len(kept[0][1]) if kept else 0
    if len(kept) < 2 or prompts < FEWEST:
        return None
    log = np.log2([step for step, _ in kept])
    committed, rounds = np.moveaxis(np.array([count for _, count in kept], float), -1, 0)
    slope, error = slope_of_ratios(log, committed, rounds)
    half = float(stats.t.ppf((1 + LEVEL) / 2, prompts - 1)) * error
    length = float(committed[-1].sum() / rounds[-1].sum())
    return Convergence(slope, slope - half, slope + half, len(kept), prompts, bool(slope + half < TOLERANCE * length))


def slope_of_ratios(
    x: Float[np.ndarray, " J"], upper: Float[np.ndarray, "J P"], lower: Float[np.ndarray, "J P"]
) -> tuple[float, float]:
    """Least-squares slope over x of sum(upper) / sum(lower), and its standard error over the clusters P.

    >>> upper = np.array([[4.0, 8.0], [6.0, 12.0], [8.0, 16.0]])  # every cluster gains 1 a step
    >>> slope_of_ratios(np.array([0.0, 1.0, 2.0]), upper, np.array([[2.0, 4.0]] * 3))
    (1.0, 0.0)
    """
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    sums = lower.sum(1, keepdims=True)
    ratios = upper.sum(1, keepdims=True) / sums
    influence = weights @ ((upper - ratios * lower) / sums)
    clusters = upper.shape[1]
    return float(weights @ ratios[:, 0]), float(np.sqrt(clusters / (clusters - 1) * (influence**2).sum()))
