"""What a method costs: parameters, training tokens, cache bytes, seconds and verified tokens a round, speedup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from analysis import groups as grouping
from analysis.groups import Group
from analysis.runs import Runs

# Keys of summary.json, in an evaluation's own or in that of a run it names under lineage.parents; a nested mapping
# (costs.draft_parameters) counts too.
STATED = ("draft_parameters", "training_tokens", "cache_bytes", "speedup_measured", "speedup_predicted")
MEASURED = ("seconds_per_round", "verified_per_round", "acceptance_rate")


def costs(found: Sequence[Group], every: Runs) -> pd.DataFrame:
    """One row a variant of a section. Rates come from the records, pooled over its benchmarks; the rest from summaries.

    Where the variant's runs state different numbers the mean stands in the table and `varies` names the column.

    Args:
        every: all runs that were read: the parents of an evaluation are looked up in it.
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


def _stated(key: str, runs: pd.DataFrame, every: pd.DataFrame) -> list[float]:
    values = []
    for _, row in runs.iterrows():
        for place in [row, *(every.loc[i] for i in _parents(row, every))]:
            value = next((v for k, v in place.items() if _is(k, key) and _number(v)), None)
            if value is not None:
                values.append(float(value))
                break
    return values


def _is(column: Any, key: str) -> bool:
    return str(column).startswith("summary.") and str(column).rpartition(".")[2] == key


def _number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _parents(row: pd.Series, every: pd.DataFrame) -> list[Any]:
    parents = row.get("summary.lineage.parents")
    if isinstance(parents, str):
        parents = (parents,)
    if not isinstance(parents, tuple):
        return []
    names = {PurePath(str(parent)).name for parent in parents}
    return list(every.index[every["run"].isin(names) & (every["path"] != row["path"])])
