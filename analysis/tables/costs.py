"""What a method costs: parameters, training tokens, cache bytes, seconds and verified tokens a round, speedup."""

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

# Column: last names of the keys of summary.json that state it: the evaluation's own, then its parent's, then those of a
# speed run on the same draft.
STATED = {
    "draft_parameters": ("draft_parameters", "parameters"),
    "training_tokens": ("training_tokens", "trained_tokens"),
    "cache_bytes": ("cache_bytes",),
    "speedup_measured": ("speedup_measured",),
    "speedup_predicted": ("speedup_predicted",),
    "speedup_low": ("speedup_low",),
    "speedup_high": ("speedup_high",),
}
COLUMNS = {name: column for column, names in STATED.items() for name in names}
LINEAGE = f"{SUMMARY}lineage.parents"


def costs(found: Sequence[Group], every: Runs) -> pd.DataFrame:
    """One row a variant of a section. Rates come from the records, pooled over its benchmarks; the rest from summaries.

    Where the variant's runs state different numbers the mean stands in the table and `varies` names the column.

    Args:
        every: all runs that were read: speed runs are looked up in it.
    """
    rows = []
    known = [key for key in every.runs if str(key).rpartition(".")[2] in COLUMNS or key in (LINEAGE, "temperature")]
    speeds = every.runs.loc[every.runs["kind"] == "speed", known].to_dict("records")
    for section, part in grouping.sections(found):
        for own in grouping.variants(part).values():
            records = pd.concat([group.runs.records for group in own])
            rounds = records["rounds"].sum()
            sums = records[["seconds", "proposed", "accepted"]].sum()
            rates = {
                "seconds_per_round": sums["seconds"] / rounds if rounds else np.nan,
                "verified_per_round": (sums["proposed"] + rounds) / rounds if rounds else np.nan,
                "acceptance_rate": sums["accepted"] / sums["proposed"] if sums["proposed"] else np.nan,
            }
            stated = _stated(every.runs.loc[sorted(set(records["source"])), known].to_dict("records"), speeds)
            means = {key: float(np.mean(values)) if values else np.nan for key, values in stated.items()}
            varies = ",".join(key for key, values in stated.items() if len(set(values)) > 1)
            rows.append({**section, **own[0].variant, **means, **rates, "varies": varies, "variant": own[0].label})
    return pd.DataFrame(rows)


def _stated(runs: Sequence[dict[str, Any]], speeds: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Every column's numbers, one a run that states it: by itself, by its parent or by a speed run on its draft."""
    beside: dict[str, list[dict[str, Any]]] = {}
    for speed in speeds:
        for name in _parents(speed):
            beside.setdefault(name, []).append(speed)
    stated: dict[str, list[float]] = {column: [] for column in STATED}
    for run in runs:
        found: dict[str, float] = {}
        for place in (run, *(speed for name in _parents(run) for speed in beside.get(name, ()) if _alike(run, speed))):
            found = _numbers(place) | found
        for column, number in found.items():
            stated[column].append(number)
    return stated


def _parents(row: dict[str, Any]) -> dict[str, None]:
    return dict.fromkeys(PurePath(parent).name for parent in folders.parents(row))


def _alike(run: dict[str, Any], speed: dict[str, Any]) -> bool:
    """A speedup holds for the temperature that it was measured at, where both runs state one."""
    ours, other = run.get("temperature"), speed.get("temperature")
    return pd.isna(ours) or pd.isna(other) or ours == other


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """What a run's summary says of each column, or else its parent's."""
    found: dict[str, float] = {}
    for prefix in (SUMMARY, PARENT):
        for key, value in row.items():
            column = COLUMNS.get(key.rpartition(".")[2]) if key.startswith(prefix) else None
            if column is not None and isinstance(value, (int, float, np.number)) and np.isfinite(value):
                found.setdefault(column, float(value))
    return found
