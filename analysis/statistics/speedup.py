"""Measured speedups with intervals over prompts, of all benchmarks together and of each.

A speedup is a ratio of two speeds: (tokens / seconds) of speculative decoding over (tokens / seconds) of plain decoding
of the same prompts. Prompts decoded at once are one cluster: a resample draws whole clusters with replacement, with the
times of both ways, so the difference between the ways is paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.statistics.intervals import RESAMPLES, Interval, bounds, resample
from specbench.metrics.functional import accepted_length, ratio

COLUMNS = ("speculative_tokens", "speculative_seconds", "plain_tokens", "plain_seconds")


def speedup(batches: Sequence[Mapping[str, Any]], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Speedup of the batches of `wall_clock` together; without bounds if there is one batch."""
    table = np.array([[row[name] for name in COLUMNS] for row in batches], dtype=float)

    def quantity(sums: np.ndarray) -> np.ndarray:
        fast, slow = ratio(sums[..., 0], sums[..., 1]), ratio(sums[..., 2], sums[..., 3])
        return ratio(fast, slow)

    low, high = bounds(quantity(resample(table, resamples, seed)), len(table))
    return Interval(float(quantity(table.sum(0))), float(low), float(high))


def by_benchmark(batches: Sequence[Mapping[str, Any]], benchmarks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Speedup, interval, accepted length and prompts of each benchmark.

    Args:
        batches: rows of `wall_clock`.
        benchmarks: benchmark of each prompt. A batch with prompts of several belongs to none.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in batches:
        names = set(benchmarks[row["first"] : row["first"] + row["prompts"]])
        if len(names) == 1:
            found.setdefault(names.pop(), []).append(row)
    return {name: _facts(rows) for name, rows in sorted(found.items())}


def _facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    measured = speedup(rows)
    length = accepted_length(*(np.float64(sum(row[name] for row in rows)) for name in ("committed", "rounds")))
    return {
        "speedup": measured.value,
        "speedup_low": _number(measured.low),
        "speedup_high": _number(measured.high),
        "accepted_length": float(length),
        "prompts": sum(row["prompts"] for row in rows),
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
