"""The headline numbers of one evaluation, with intervals and counts, for its summary.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.statistics.acceptance_gap import TeacherForcedSums, paired
from analysis.statistics.histograms import Counts, count
from analysis.statistics.intervals import by_slot, interval
from specbench.metrics.functional import QUANTITIES

# Tokens / seconds that their requests spent in flight: of one request inside its batch, not of the batch.
PER_REQUEST = "tokens_per_second_per_request"


def counts_of(records: Sequence[Mapping[str, Any]]) -> Counts:
    """Rounds by prompt; all turns of a prompt are one cluster."""
    keys = _keys(records)
    cells = [(i, *cell) for i, record in enumerate(records) for cell in record["histogram"]]
    table = np.array(cells, dtype=np.int64).reshape(-1, 4)
    committed = np.array([r["committed"] for r in records], dtype=float)
    beyond = np.array([r["nodes"] - r["proposed"] if r.get("nodes") else 0 for r in records], dtype=float)
    return count(keys, committed, *table.T, beyond)


def _keys(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The prompt of each record, as analysis.read.records names and orders them: by the hash of the first turn of its
    conversation, by its id where no hash was recorded."""
    first = {(r["benchmark"], r["prompt_id"]): r.get("prompt_hash") for r in records if not r.get("turn")}
    keys = []
    for r in records:
        mark = first.get((r["benchmark"], r["prompt_id"]))
        keys.append(f"{r['benchmark']}\0{mark or 'id:' + str(r['prompt_id'])}")
    return np.array(keys)


def headline(records: Sequence[Mapping[str, Any]], resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Every headline metric as {value, low, high, count}, the slot curves, and the same by benchmark.

    `count` is the number of rounds; a quantity without a value (no round, one prompt) is null. Records with
    teacher-forced sums add expected_length, length_gap, forced_decay, decay_gap and a curve `teacher_forced`
    (analysis.statistics.acceptance_gap), whose counts are anchors.
    """
    whole = _numbers(records, resamples, seed)
    names = sorted({r["benchmark"] for r in records})
    own = {name: _numbers([r for r in records if r["benchmark"] == name], resamples, seed) for name in names}
    return whole | {"benchmarks": own}


def _numbers(records: Sequence[Mapping[str, Any]], resamples: int, seed: int) -> dict[str, Any]:
    counts = counts_of(records)
    rounds = int(counts.rounds.sum())
    found: dict[str, Any] = {"prompts": len(counts.prompts), "rounds": rounds}
    found["truncated"] = {"value": float(np.mean([r["truncated"] for r in records])), "count": len(records)}
    seconds = float(sum(r["seconds"] for r in records))
    tokens = int(sum(r["output_tokens"] for r in records))
    found[PER_REQUEST] = {"value": tokens / seconds if seconds else None, "count": tokens}
    if not rounds:
        return found
    for name in QUANTITIES:
        value, low, high = interval(counts, lambda sums, name=name: sums.quantity(name), resamples, seed)
        found[name] = {"value": _number(value), "low": _number(low), "high": _number(high), "count": rounds}
    conditional = by_slot(counts, True, resamples, seed)
    survival, _, _ = by_slot(counts, False, resamples, seed)
    product = counts.total().survival_product
    reached = counts.reached.sum(0)
    found["slots"] = [
        {
            "slot": k + 1,
            "conditional": _number(conditional[0][k]),
            "low": _number(conditional[1][k]),
            "high": _number(conditional[2][k]),
            "n": int(reached[k]),
            "survival": _number(survival[k]),
            "survival_product": _number(product[k]),
        }
        for k in range(counts.slots)
    ]
    return found | _of_trees(records) | _teacher_forced(records, counts, resamples, seed)


def _of_trees(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Conditional acceptance in token trees: `ranks`, of the child of a rank at a depth where the node that was reached
    has one, and `depths`, of any child where it has some; n counts these nodes."""
    offered: Counter[tuple[int, int]] = Counter()
    accepted: Counter[tuple[int, int]] = Counter()
    for record in records:
        for depth, rank, seen, taken in record.get("by_rank") or ():
            offered[depth, rank] += seen
            accepted[depth, rank] += taken
    if not offered:
        return {}
    ranks = [
        {"depth": depth, "rank": rank, "conditional": accepted[depth, rank] / n, "n": n}
        for (depth, rank), n in sorted(offered.items())
    ]
    depths = [
        {
            "depth": d,
            "any_child": sum(k for (at, _), k in accepted.items() if at == d) / offered[d, 0],
            "n": offered[d, 0],
        }
        for d in sorted({depth for depth, _ in offered})
    ]
    return {"depths": depths, "ranks": ranks}


def _teacher_forced(records: Sequence[Mapping[str, Any]], counts: Counts, resamples: int, seed: int) -> dict[str, Any]:
    have = [r for r in records if r.get("teacher_forced")]
    both = (
        paired(counts, TeacherForcedSums.of(_keys(have), [r["teacher_forced"] for r in have]), resamples, seed)
        if have
        else None
    )
    if both is None:
        return {}

    def entry(triple: Sequence[Any], n: Any) -> dict[str, Any]:
        return dict(zip(("value", "low", "high"), map(_number, triple), strict=True)) | {"count": int(n)}

    names = ("expected_length", "length_gap", "forced_decay", "decay_gap")
    found: dict[str, Any] = {name: entry(both.length[name], both.anchors[0]) for name in names}
    found["teacher_forced"] = [
        {"slot": k + 1, "anchors": int(both.anchors[k]), "n": int(both.rounds[k])}
        | {name: _number(both.slots[name][0][k]) for name in ("acceptance", "conditional", "survival", "on_policy")}
        | {"gap": _number(both.slots["gap"][0][k])}
        | {"low": _number(both.slots["gap"][1][k]), "high": _number(both.slots["gap"][2][k])}
        for k in range(len(both.anchors))
    ]
    return found


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(float(value)) else None
