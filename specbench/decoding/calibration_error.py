"""How sure a calibration error is: the noise that a perfect head would show, and an estimate without that noise.

The expected calibration error (ECE) is a mean of absolute values, so sampling noise never cancels in it: a perfect head
has an ECE above zero, and the more so the fewer rounds there are. Two remedies, both with prompts as clusters (the
rounds of one prompt are not independent):

- the null distribution of the ECE: residuals of whole prompts get random signs (the wild bootstrap of C. Wu, 1986),
  after each bin's own error was taken off them;
- the root mean square error of the bins without its noise: from every squared error its own variance is subtracted
  (A. Kumar, P. Liang, T. Ma, 2019, "Verified Uncertainty Calibration", here with the variance over prompts). Its
  interval is a jackknife over prompts with Student's t.

Axes: N observations, P prompts, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

from specbench.metrics.functional import BINS, ratio

SIGNS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class CalibrationNoise:
    """What noise alone would do, and the error without it.

    `floor` and `band`: mean and 95th percentile of the ECE of a head without error on these predictions. `rms`: root
    mean square error of the bins without noise, with its 95% interval `low` to `high`. NaN: with one prompt all of it,
    with two the interval.
    """

    floor: float
    band: float
    rms: float
    low: float
    high: float


def calibration_noise(
    predicted: Float[np.ndarray, " N"],
    observed: Bool[np.ndarray, " N"],
    prompts: Sequence[str],
    bins: int = BINS,
    seed: int = 0,
) -> CalibrationNoise:
    """From predictions, events and the prompt of each. Errors: ValueError without an observation."""
    if not len(predicted):
        raise ValueError("no observation of this slot: record rounds that propose it (scheduler=fixed, length null)")
    keys, cluster = np.unique(np.asarray(prompts), return_inverse=True)
    places = np.minimum((np.asarray(predicted, dtype=float) * bins).astype(int), bins - 1)
    index, shape = cluster * bins + places, (len(keys), bins)
    size = shape[0] * shape[1]
    count = np.bincount(index, minlength=size).reshape(shape).astype(float)
    residual = np.bincount(index, np.asarray(observed, dtype=float) - predicted, size).reshape(shape)
    n, total = count.sum(0), count.sum()
    if len(keys) < 2:
        return CalibrationNoise(*[float("nan")] * 5)
    centred = residual - count * np.nan_to_num(ratio(residual.sum(0), n))
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (SIGNS, len(keys)))
    null = np.abs(signs @ (centred * np.sqrt(_correction(n, (count**2).sum(0))))).sum(1) / total
    square = float(_square(n, residual.sum(0), *_moments(count, residual)))
    if len(keys) < 3:
        rms = float(np.sqrt(max(0.0, square)))
        return CalibrationNoise(float(null.mean()), float(np.quantile(null, LEVEL)), rms, float("nan"), float("nan"))
    # Without one prompt after the other.
    moments = (whole - own for whole, own in zip(_moments(count, residual), _products(count, residual), strict=True))
    without = _square(n - count, residual.sum(0) - residual, *moments)
    error = np.sqrt((len(keys) - 1) / len(keys) * ((without - without.mean()) ** 2).sum())
    reach = special.stdtrit(len(keys) - 1, (1 + LEVEL) / 2) * error
    rms, low, high = (float(np.sqrt(max(0.0, x))) for x in (square, square - reach, square + reach))
    return CalibrationNoise(float(null.mean()), float(np.quantile(null, LEVEL)), rms, low, high)


def _products(count: Float[np.ndarray, "P B"], residual: Float[np.ndarray, "P B"]) -> tuple[np.ndarray, ...]:
    return residual**2, residual * count, count**2


def _moments(count: Float[np.ndarray, "P B"], residual: Float[np.ndarray, "P B"]) -> tuple[np.ndarray, ...]:
    return tuple(product.sum(0) for product in _products(count, residual))


def _square(
    n: Float[np.ndarray, "*axes B"],
    residual: Float[np.ndarray, "*axes B"],
    squares: Float[np.ndarray, "*axes B"],
    crossed: Float[np.ndarray, "*axes B"],
    counts: Float[np.ndarray, "*axes B"],
) -> Float[Any, "*axes"]:
    """Mean over observations of their bin's squared error less its variance over prompts, from sums over prompts."""
    bias = np.nan_to_num(ratio(residual, n))
    variance = np.nan_to_num(ratio(squares - 2 * bias * crossed + bias**2 * counts, n**2)) * _correction(n, counts)
    return (n * (bias**2 - variance)).sum(-1) / n.sum(-1)


def _correction(n: Float[np.ndarray, "*axes B"], counts: Float[np.ndarray, "*axes B"]) -> Float[np.ndarray, "*axes B"]:
    """m / (m - 1) for the m prompts that a bin has in effect, because its own error was estimated; 1 for one."""
    prompts = np.nan_to_num(ratio(n**2, counts))
    several = prompts > 1.001
    return np.where(several, prompts / np.where(several, prompts - 1, 1.0), 1.0)
