"""What a method costs: parameters, training tokens, cache bytes, seconds and verified tokens a round, speedup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
import pandas as pd

from analysis import folders
from analysis import groups as grouping
from analysis.folders import PARENT, SUMMARY
from analysis.groups import Group
from analysis.runs import Runs

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


def costs(found: Sequence[Group], every: Runs) -> pd.DataFrame:
    """One row a variant of a section. Rates come from the records, pooled over its benchmarks; the rest from summaries.

    Where the variant's runs state different numbers the mean stands in the table and `varies` names the column.

    Args:
        every: all runs that were read: speed runs are looked up in it.
    """
    rows = []
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
            runs = every.runs.loc[sorted(set(records["source"]))]
            stated = {key: _stated(key, runs, every.runs) for key in STATED}
            means = {key: float(np.mean(values)) if values else np.nan for key, values in stated.items()}
            varies = ",".join(key for key, values in stated.items() if len(set(values)) > 1)
            rows.append({**section, **own[0].variant, **means, **rates, "varies": varies, "variant": own[0].label})
    return pd.DataFrame(rows)


def _stated(column: str, runs: pd.DataFrame, every: pd.DataFrame) -> list[float]:
    values = []
    for _, row in runs.iterrows():
        for place in (row, *_speeds(row, every)):
            found = next((v for prefix in (SUMMARY, PARENT) for v in _numbers(place, prefix, STATED[column])), None)
            if found is not None:
                values.append(found)
                break
    return values


def _numbers(row: pd.Series, prefix: str, names: Sequence[str]) -> list[float]:
    held = [v for k, v in row.items() if str(k).startswith(prefix) and str(k).rpartition(".")[2] in names]
    return [float(v) for v in held if isinstance(v, (int, float, np.number)) and np.isfinite(v)]


def _speeds(row: pd.Series, every: pd.DataFrame) -> list[pd.Series]:
    own = {PurePath(parent).name for parent in folders.parents(row)}
    speeds = every[every["kind"] == "speed"]
    same = [other for _, other in speeds.iterrows() if own & {PurePath(p).name for p in folders.parents(other)}]
    # A speedup holds for the temperature that it was measured at, where both runs state one.
    ours = row.get("temperature")
    return [r for r in same if pd.isna(ours) or pd.isna(r.get("temperature")) or r["temperature"] == ours]
