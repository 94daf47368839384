"""Read runs from folders and W&B projects into one typed frame; filter and group it.

Runs that cannot be used (unfinished, broken, repeated) are listed in `Runs.faults`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.read import wandb_runs
from analysis.read.configurations import Facts, identity, joined, of_decoding, of_draft, prompt_sets
from analysis.read.folders import SUMMARY, find, inherit, read_run, trainings
from analysis.read.records import Table, check, concatenate
from analysis.statistics.histograms import Counts, count
from specbench.runs.run_schema import FINISHED

TRAINING_SEED = "provenance.seeds.init"
# End of the reason for a repetition or a copy.
ONCE = "counted once"
# Column of `Runs.runs` with what decided each run (analysis.read.configurations).
DECIDED = "decided by"


@dataclass(frozen=True)
class Runs:
    """Everything that was read.

    `records`: one row per prompt and turn (the columns of records.parquet without the histogram; `source` = index of
    its run in `runs`, `prompt` = one number a prompt, the same in every run). `cells`: the histograms in long form
    (record, proposed, accepted, count), `record` = row in `records`, ascending. `runs`: one row per run: run, kind,
    path, status, method, target, suite, then every config key with dots (its own, then those of the run that trained
    its draft), summary.json under `summary.`, provenance.json under `provenance.`, the parent's summary under
    `parent.`. `faults`: path and reason of everything that was found and is not in `runs`.
    """

    records: pd.DataFrame
    cells: pd.DataFrame
    runs: pd.DataFrame
    faults: pd.DataFrame

    def column(self, key: str) -> pd.Series:
        """`key` for every record: a record column, a config key with dots, `summary.KEY` or `provenance.KEY`."""
        if key in self.records:
            return self.records[key]
        self._known(key)
        return self._of_run(key)

    def _of_run(self, key: str) -> pd.Series:
        return self.runs[key].reindex(self.records["source"]).set_axis(self.records.index)

    def training_seeds(self) -> pd.Series:
        """The seed that each record's draft was trained with: the initialisation's in the run's provenance, else the
        record's own (that of decoding is another one, in the run's config)."""
        seeds = self.records["seed"].astype(object)
        if TRAINING_SEED not in self.runs:
            return seeds
        return self._of_run(TRAINING_SEED).astype(object).where(lambda known: known.notna(), seeds)

    def decoded(self) -> Runs:
        """The runs without those whose records have no round (plain decoding), which are moved to the faults."""
        rounds = self.records.groupby("source")["rounds"].sum()
        idle = rounds.index[rounds == 0]
        if not len(idle):
            return self
        kept = self._take(np.flatnonzero(~self.records["source"].isin(idle)), ~self.runs.index.isin(idle))
        paths = self.runs.loc[idle, "path"]
        named = pd.DataFrame({"path": paths, "reason": "no speculative round (plain decoding)"})
        return replace(kept, faults=pd.concat([self.faults, named], ignore_index=True))

    def _once(self, rows: list[dict[str, Any]], facts: list[tuple[Facts, Facts]], tables: dict[int, Table]) -> Runs:
        """Every run once: repetitions and copies have the same identity as another run and are moved to the faults."""
        seen: dict[object, int] = {}
        twice: dict[int, str] = {}
        starts = np.searchsorted(self.records["source"], np.arange(len(rows) + 1))
        contents, prompts = {}, prompt_sets(self.records)
        for number, row in enumerate(rows):
            if number in tables and len(tables[number].columns):
                first = self.records.iloc[starts[number]]
                contents[number] = tables[number].content()
                name: object = identity(row, *facts[number], prompts[number], first, contents[number])
            elif f"{SUMMARY}starts" in row:  # the start time distinguishes a run without records from every other one
                name = (row["kind"], row[f"{SUMMARY}starts"], row.get(f"{SUMMARY}seconds"))
            else:
                continue
            if name not in seen:
                seen[name] = number
                continue
            same = contents.get(number) == contents.get(seen[name])
            word = "the same run as" if same else "a repetition, with other numbers, of"
            twice[number] = f"{word} {rows[seen[name]]['path']}: {ONCE}"
        if not twice:
            return self
        kept = self._take(np.flatnonzero(~self.records["source"].isin(twice)), ~self.runs.index.isin(twice))
        named = pd.DataFrame({"path": [rows[n]["path"] for n in twice], "reason": list(twice.values())})
        return replace(kept, faults=pd.concat([self.faults, named], ignore_index=True))

    def where(self, filters: str | Sequence[str] = ()) -> Runs:
        """Keep what passes every filter `key=value`, `key=one,two` or `key!=value`; several are joined by 'and'."""
        kept = self
        for text in filters.split() if isinstance(filters, str) else filters:
            kept = kept._filter(text)
        return kept

    def _filter(self, text: str) -> Runs:
        key, sign, value = text.partition("=")
        if not sign or not key.rstrip("!") or not value:
            raise ValueError(f"filter {text!r} is not of the form key=value; write e.g. target=qwen3_4b")
        negate = key.endswith("!")
        key = key.rstrip("!")
        wanted = {normal(part) for part in value.split(",")}
        self._known(key)
        # A run without records (a training) has no columns of records, for example no benchmark.
        runs = _among(self.runs[key], wanted) ^ negate if key in self.runs else np.ones(len(self.runs), bool)
        if key in self.records:  # if a run has records, their values are used
            rows = np.flatnonzero(_among(self.records[key], wanted) ^ negate)
            recorded = np.isin(self.runs.index, self.records["source"])
            runs = np.where(recorded, np.isin(self.runs.index, self.records["source"].iloc[rows]), runs)
        else:
            rows = np.flatnonzero(np.isin(self.records["source"], self.runs.index[runs]))
        if len(self.records) and not len(rows):
            there = sorted({shown(value) for value in self.column(key).unique()})
            raise ValueError(f"no record is left after the filter {text}; {key} was one of {', '.join(there[:12])}")
        return self._take(rows, runs)

    def _known(self, key: str) -> None:
        known = [str(name) for name in (*self.records.columns, *self.runs.columns)]
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else "the keys are those of the runs' config.yaml"
            raise ValueError(f"no run has the key {key!r}; {hint}")

    def _take(self, rows: np.ndarray, runs: np.ndarray) -> Runs:
        """The records at ascending positions `rows` and the runs where `runs` is true."""
        places, sizes = self._places(rows)
        cells = self.cells.iloc[places].assign(record=np.repeat(np.arange(len(rows)), sizes)).reset_index(drop=True)
        return replace(self, records=self.records.iloc[rows].reset_index(drop=True), cells=cells, runs=self.runs[runs])

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the cells of the records at ascending positions `rows` stand, and how many each record has."""
        edges = np.searchsorted(self.cells["record"], np.arange(len(self.records) + 1))
        starts, sizes = edges[:-1][rows], np.diff(edges)[rows]
        ends = np.cumsum(sizes)
        return np.repeat(starts - (ends - sizes), sizes) + np.arange(sizes.sum()), sizes

    def pick(self, rows: np.ndarray) -> Runs:
        """The records at ascending positions `rows`, and their runs."""
        return self._take(rows, np.isin(self.runs.index, self.records["source"].iloc[rows]))

    def groups(self, keys: Sequence[str]) -> Iterator[tuple[dict[str, Any], Runs]]:
        """The records split by the values of `keys`, sorted; a missing value is a group of its own, named None."""
        frame = pd.DataFrame({key: _groupable(self.column(key)) for key in keys})
        for values, rows in frame.groupby(list(keys), dropna=False, sort=True).indices.items():
            values = values if isinstance(values, tuple) else (values,)
            named = {key: None if pd.isna(value) else value for key, value in zip(keys, values, strict=True)}
            yield named, self.pick(np.sort(rows))

    def counts(self, rows: np.ndarray | None = None) -> Counts:
        """Sums over prompts of all records here, or of those at ascending positions `rows`: the input of every
        statistic."""
        cells = [self.cells[name].to_numpy() for name in ("record", "proposed", "accepted", "count")]
        prompts, committed = self.records["prompt"].to_numpy(), self.records["committed"].to_numpy()
        beyond = (self.records["nodes"] - self.records["proposed"]).to_numpy()
        if rows is not None:
            places, sizes = self._places(rows)
            cells = [np.repeat(np.arange(len(rows)), sizes), *(cell[places] for cell in cells[1:])]
            prompts, committed, beyond = prompts[rows], committed[rows], beyond[rows]
        return count(prompts, committed, *cells, beyond)


def load(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    filters: str | Sequence[str] = (),
    cache: str | os.PathLike[str] = "outputs/wandb",
    unfinished: bool = False,
) -> Runs:
    """Read every run below `sources`: folders, glob patterns and `wandb:entity/project`, in any mix.

    Args:
        cache: where the files of W&B runs are kept, in the shape of run folders.
        unfinished: also read runs whose status is not finished (otherwise they are among the faults).

    Raises:
        ValueError: a source does not exist or holds no run; a record contradicts its own histogram.
    """
    folders: dict[Path, None] = {}
    for source in [sources] if isinstance(sources, (str, os.PathLike)) else sources:
        text = os.fspath(source)
        found = wandb_runs.fetch(text, Path(cache)) if text.startswith(wandb_runs.PREFIX) else find(text)
        folders.update(dict.fromkeys(found))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = list(pool.map(read_run, folders))
    rows, tables, faults = [], [], []
    for folder, (row, table, fault) in zip(folders, read, strict=True):
        if fault is None and row["status"] != FINISHED and not unfinished:
            fault = f"unfinished (status: {row['status']})"
        if fault is not None:
            faults.append({"path": str(folder), "reason": fault})
            continue
        if table is not None:
            tables.append((len(rows), table))
        rows.append(row)
    sources = trainings(rows)
    facts = [(of_decoding(row), of_draft(row, own[0] if own else None)) for row, own in zip(rows, sources, strict=True)]
    inherit(rows, sources)
    for row, pair in zip(rows, facts, strict=True):
        row[DECIDED] = joined(*pair)
    runs = pd.DataFrame(rows) if rows else pd.DataFrame(columns=["run", "kind", "path", "status", "method", "target"])
    records, cells = concatenate(tables)
    check(records, cells)
    read = Runs(records, cells, runs, pd.DataFrame(faults, columns=["path", "reason"]))
    return read._once(rows, facts, dict(tables)).where(filters)


def shown(value: Any) -> str:
    """A value as text for messages."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return "none"
    return f"{value:g}" if isinstance(value, (float, np.floating)) else str(value)


def normal(value: Any) -> str:
    """A uniform spelling of values that a filter and a file can write differently: 1 and 1.0, true and True, null and
    None."""
    text = shown(value).strip().lower()
    try:
        return repr(float(text))
    except ValueError:
        return {"null": "none", "": "none"}.get(text, text)


def _groupable(series: pd.Series) -> pd.Series:
    """Without unused categories, and lists or mixed types as text, so that groups can be formed and sorted."""
    values = series.astype(object)
    kinds = {type(value) for value in values.dropna().unique()}
    if kinds <= {str} or all(issubclass(kind, (int, float, np.number, np.bool_)) for kind in kinds):
        return values
    return values.map(str, na_action="ignore")


def _among(series: pd.Series, wanted: set[str]) -> np.ndarray:
    codes, values = pd.factorize(series.astype(object), use_na_sentinel=False)
    return np.array([normal(value) in wanted for value in values], bool)[codes] if len(codes) else np.zeros(0, bool)
