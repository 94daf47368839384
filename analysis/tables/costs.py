"""Costs of a method: parameters, training tokens, cache bytes, seconds and verified tokens per round, speedup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from analysis.read import folders
from analysis.read.folders import PARENT, SUMMARY
from analysis.read.runs import Runs
from analysis.tables import groups as grouping
from analysis.tables.groups import Group

# Column: last names of the keys of summary.json that state it, the evaluation's own, then its parent's.
STATED = {
    "draft_parameters": ("draft_parameters", "parameters"),
    "training_tokens": ("training_tokens", "trained_tokens"),
    "training_flops": ("training_flops",),
    "training_seconds": ("training_seconds",),
    "peak_memory": ("peak_memory",),
    "gain_per_doubling": ("gain_per_doubling",),
    "gain_low": ("gain_low",),
    "gain_high": ("gain_high",),
    "converged": ("converged",),
    "cache_bytes": ("cache_bytes",),
}
# Of several trainings of a row, one number: times differ from run to run, and a method has converged if all of its
# trainings have.
JOINED = {
    "training_seconds": np.mean,
    "peak_memory": np.max,
    "gain_per_doubling": np.mean,
    "gain_low": np.min,
    "gain_high": np.max,
    "converged": np.min,
}
COLUMNS = {name: column for column, names in STATED.items() for name in names}
# Columns of a speed run, and how the values of several drafts of a row are combined.
TIMED = {
    "speedup_measured": ("speedup_measured", np.mean),
    "speedup_predicted": ("speedup_predicted", np.mean),
    "speedup_low": ("speedup_low", np.min),
    "speedup_high": ("speedup_high", np.max),
    "speedup_accepted_length": ("accepted_length", np.mean),
    "proposal_seconds": ("draft_seconds", np.mean),
    "tokens_per_second": ("tokens_per_second", np.mean),
}
# Beside draft, scheduler and temperature, a speedup belongs to these where both runs state them.
SHARED = ("top_k", "top_p", "min_p", "slots", "accounting", "thinking", "dtype")


def costs(found: Sequence[Group], every: Runs) -> pd.DataFrame:
    """One row per variant of a section, and one more for every further batch size with which its drafts were timed.

    Rates come from the records, pooled over the benchmarks. Sizes come from summaries; if the runs of a row have
    several, the column is empty and `varies` lists all, as `draft_parameters=1000|2000`. Speedups belong to exactly
    these drafts.

    Args:
        every: all runs that were read: speed runs are looked up in it.
    """
    rows = []
    speeds = every.runs[every.runs["kind"] == "speed"].to_dict("records")
    for section, part in grouping.sections(found):
        for own in grouping.variants(part).values():
            records = pd.concat([group.runs.records for group in own])
            rounds = records["rounds"].sum()
            sums = records[["seconds", "nodes", "accepted"]].sum()
            rates = {
                "seconds_per_round": sums["seconds"] / rounds if rounds else np.nan,
                "verified_per_round": (sums["nodes"] + rounds) / rounds if rounds else np.nan,
                "acceptance_rate": sums["accepted"] / sums["nodes"] if sums["nodes"] else np.nan,
            }
            about = records.drop_duplicates("source").set_index("source")[["scheduler", "temperature"]]
            runs = every.runs.loc[sorted(about.index)].to_dict("index")
            stated = {column: [_stated(run, column) for run in runs.values()] for column in STATED}
            sizes = {column: {value for value in values if value is not None} for column, values in stated.items()}
            # A training without a certificate has not shown that it converged.
            certified = stated["converged"]
            sizes["converged"] = {v or 0.0 for v in certified} if sizes["converged"] else set()
            sizes |= {c: {float(join(list(v)))} for c, join in JOINED.items() if len(v := sizes[c]) > 1}
            varies = ";".join(f"{c}={'|'.join(f'{v:g}' for v in sorted(n))}" for c, n in sizes.items() if len(n) > 1)
            stated = {column: next(iter(values)) if len(values) == 1 else np.nan for column, values in sizes.items()}
            timed = [
                speed
                for speed in speeds
                if any(_belongs(run, about.loc[number].to_dict(), speed) for number, run in runs.items())
            ]
            for batch, clock in _by_batch(timed) or [(np.nan, dict.fromkeys(TIMED, np.nan))]:
                head = {**section, **own[0].variant, **stated, **clock, "speedup_batch": batch}
                rows.append(head | rates | {"varies": varies, "variant": own[0].label})
    return pd.DataFrame(rows)


def _stated(run: dict[str, Any], column: str) -> float | None:
    """The value of a column in the summary of a run, or else in that of its parent."""
    for prefix in (SUMMARY, PARENT):
        for key, value in run.items():
            known = key.startswith(prefix) and COLUMNS.get(key.rpartition(".")[2]) == column
            if known and isinstance(value, (int, float, np.number)) and np.isfinite(value):
                return float(value)
    return None


def _belongs(run: dict[str, Any], about: dict[str, Any], speed: dict[str, Any]) -> bool:
    """Whether a speedup is that of the draft, scheduler, temperature and target that the records of `run` came from.

    Speed runs of earlier versions record no draft; it is that of the same training run, without a scheduler.
    """
    ours, other = (row.get(f"{SUMMARY}lineage.draft") for row in (run, speed))
    if pd.isna(ours) or pd.isna(other):
        if not _parents(run) & _parents(speed):
            return False
    elif ours != other:
        return False
    timed = speed.get(f"{SUMMARY}protocol.scheduler")
    if about["scheduler"] != ("fixed" if _absent(timed) else timed):
        return False
    trees = [row.get(f"{SUMMARY}protocol.tree") for row in (run, speed)]
    if not all(map(_absent, trees)) and trees[0] != trees[1]:
        return False
    heat = speed.get(f"{SUMMARY}protocol.temperature", speed.get("temperature"))
    if not _absent(heat) and heat != about["temperature"]:
        return False
    keys = [f"{SUMMARY}protocol.{key}" for key in SHARED] + [f"{SUMMARY}lineage.target"]
    return all(_absent(run.get(k)) or _absent(speed.get(k)) or run[k] == speed[k] for k in keys)


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))


def _parents(row: dict[str, Any]) -> set[str]:
    """The parents of a run as KIND/NAME, which does not change if a root is moved; without a kind it is train."""
    return {"/".join(["train", *PurePath(parent).parts][-2:]) for parent in folders.parents(row)}


def _by_batch(speeds: Sequence[dict[str, Any]]) -> list[tuple[float, dict[str, float]]]:
    """The speedups of a row by the batch that was timed: means over its runs, the widest range."""
    split: dict[float, list[dict[str, Any]]] = {}
    for speed in speeds:
        size = speed.get(f"{SUMMARY}protocol.batch_size", speed.get("batch_size"))
        split.setdefault(np.nan if _absent(size) else float(size), []).append(speed)
    found = []
    for size, own in sorted(split.items()):
        clock = {}
        for column, (name, join) in TIMED.items():
            values = [v for speed in own if (v := _number(speed, name)) is not None]
            clock[column] = float(join(values)) if values else np.nan
        found.append((size, clock))
    return found


def _number(speed: dict[str, Any], name: str) -> float | None:
    for key, value in speed.items():
        if key.startswith(SUMMARY) and key.rpartition(".")[2] == name and isinstance(value, (int, float, np.number)):
            return float(value) if np.isfinite(value) else None
    return None
