"""Teacher-forced acceptance and that of real rounds by slot, and their gap with paired intervals.

Records carry four sums per slot (specbench/evaluation/teacher_forced.py):
anchors, alpha, prod_{i<=k} alpha_i, prod_{i<k} alpha_i.
Both estimates use the same bootstrap samples of prompts, so their gap is paired.

Axes: P prompts, R resamples, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from analysis.statistics.histograms import Counts, Sums
from analysis.statistics.intervals import RESAMPLES, bounds, resample
from specbench.metrics.functional import suffix_decay, teacher_forced

SUMS = 4


@dataclass(frozen=True)
class TeacherForcedSums:
    """Sums of P prompts: sums[p, k-1] = anchors, alpha, survived, reached."""

    prompts: np.ndarray  # (P,) sorted and distinct
    sums: Float[np.ndarray, "P K four"]

    @classmethod
    def of(cls, prompts: Sequence[Any], rows: Sequence[Sequence[Sequence[float]]]) -> TeacherForcedSums:
        """From the records that have these sums: the keys of their prompts, and one list of slots per record."""
        slots = max((len(row) for row in rows), default=0)
        keys, cluster = np.unique(np.asarray(prompts), return_inverse=True)
        sums = np.zeros((len(keys), slots, SUMS))
        for where, row in zip(cluster, rows, strict=True):
            if len(row):
                sums[where, : len(row)] += np.stack([np.asarray(slot, dtype=float) for slot in row])
        return cls(keys, sums)


@dataclass(frozen=True)
class Paired:
    """Each quantity with its bounds, (K,) by slot; `length` holds those of lengths and decays, one value each."""

    slots: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    length: dict[str, tuple[float, float, float]]
    anchors: np.ndarray
    rounds: np.ndarray


def quantities(on: Sums, forced: Float[np.ndarray, "*axes K four"]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Curves (..., K) and lengths (...) of both estimates and their gaps, forced minus on-policy.

    acceptance   mean alpha_k over anchors: what training reports
    conditional  sum prod_{i<=k} alpha_i / sum prod_{i<k} alpha_i, beside conditional@k of the rounds
    survival     mean prod_{i<=k} alpha_i, beside survival@k
    expected_length  1 + sum_k survival@k, beside accepted_length
    forced_decay  slope of log acceptance over every anchor, beside the suffix decay of the rounds that reached a slot
    """
    K = min(on.offered.shape[-1], forced.shape[-2])
    found = teacher_forced(forced, K)
    curves = {
        "acceptance": found.acceptance,
        "conditional": found.conditional,
        "survival": found.survival,
        "on_policy": on.conditional[..., :K],
        "on_policy_survival": on.survival[..., :K],
        "gap": found.conditional - on.conditional[..., :K],
        "survival_gap": found.survival - on.survival[..., :K],
    }
    expected = found.expected_length
    lengths = {"expected_length": expected, "accepted_length": on.accepted_length}
    # Every anchor counts at every slot: not only the rounds that accepted all slots before, which are easier places.
    decays = {"forced_decay": suffix_decay(found.acceptance, forced[..., :K, 0]), "decay": on.suffix_decay}
    decays["decay_gap"] = decays["forced_decay"] - decays["decay"]
    return curves, lengths | {"length_gap": expected - on.accepted_length} | decays


def paired(counts: Counts, forced: TeacherForcedSums, resamples: int = RESAMPLES, seed: int = 0) -> Paired | None:
    """Both estimates over the prompts that have rounds and anchors; None where there is no such prompt."""
    both = np.intersect1d(counts.prompts[counts.rounds > 0], forced.prompts)
    sums = forced.sums[np.searchsorted(forced.prompts, both)]
    both, sums = both[sums[:, :1, 0].any(1)], sums[sums[:, :1, 0].any(1)]
    if not len(both) or not counts.slots:
        return None
    features = counts.take(both).features()
    width = features.shape[1]
    joined = np.concatenate([features, sums.reshape(len(both), -1)], 1)
    drawn = resample(joined, resamples, seed)
    whole = joined.sum(0)
    shape = sums.shape[1:]
    values = quantities(Sums(whole[:width]), whole[width:].reshape(shape))
    draws = quantities(Sums(drawn[:, :width]), drawn[:, width:].reshape(-1, *shape))
    curves, lengths = (
        {name: (value, *bounds(drawn[name], len(both))) for name, value in found.items()}
        for found, drawn in zip(values, draws, strict=True)
    )
    lengths = {name: tuple(float(x) for x in triple) for name, triple in lengths.items()}
    K = len(curves["gap"][0])
    return Paired(curves, lengths, sums[:, :K, 0].sum(0), counts.take(both).reached.sum(0)[:K])
