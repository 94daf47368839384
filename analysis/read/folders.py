"""Run folders on disk: how they are found and read.

A run folder has config.yaml, provenance.json, metrics.jsonl, summary.json and, if prompts were decoded,
records.parquet.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.read.records import Table, read_table
from specbench.files import json_lines as jsonl
from specbench.files import plain_yaml
from specbench.files.atomic import read_json
from specbench.runs.run_schema import FINISHED, KINDS, MARKS, SCHEMA, STEP

SUMMARY, PROVENANCE, PARENT = "summary.", "provenance.", "parent."


def find(source: str) -> list[Path]:
    """Run folders at or below `source` (a folder or a glob pattern), sorted, each once."""
    starts = sorted(glob.glob(source)) if glob.has_magic(source) else [source]
    if not starts or not all(os.path.isdir(start) for start in starts):
        raise ValueError(f"runs={source} is not a folder; name a run folder or a folder above some")
    found = sorted({Path(os.path.realpath(folder)) for start in starts for folder in _walk(start)})
    if not found:
        raise ValueError(f"runs={source} holds no run folder (none of {', '.join(MARKS)} lies below it)")
    return found


def _walk(folder: str) -> Iterator[str]:
    entries = list(os.scandir(folder))
    if any(entry.name in MARKS for entry in entries):
        yield folder
        return
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _walk(entry.path)


def read_run(folder: Path) -> tuple[dict[str, Any], Table | None, str | None]:
    """One row of `Runs.runs`, the records if there are any, and the reason why it cannot be used, if so."""
    row: dict[str, Any] = {"run": folder.name, "kind": None, "path": str(folder), "status": "no summary.json"}
    try:
        summary = _json(folder / "summary.json")
        config, settings = _yaml(folder / "config.yaml")
        provenance = _json(folder / "provenance.json")
        schema = summary.get("schema", SCHEMA)
        if schema != SCHEMA:
            return row, None, f"summary.json has schema {schema!r}, this version reads {SCHEMA!r}"
        kind = summary.get("kind") or (folder.parent.name if folder.parent.name in KINDS else None)
        records = folder / "records.parquet"
        row |= {"run": summary.get("name", folder.name), "kind": kind}
        if summary:
            row["status"] = summary.get("status", "no status in summary.json")
        for key in ("method", "target", "suite"):
            named = summary.get(key, config.get(key))
            row[key] = named if named is None or isinstance(named, str) else None
        row = settings | row
        row |= dict(flatten(summary, SUMMARY))
        row |= dict(flatten(provenance, PROVENANCE))
        if not records.exists():
            missing = kind == "evaluate" and row["status"] == FINISHED
            return row, None, "no records.parquet although the evaluation finished" if missing else None
        return row, read_table(records), None
    except (OSError, ValueError, yaml.YAMLError) as error:
        return row, None, " ".join(str(error).split())


def parents(row: dict[str, Any] | pd.Series) -> tuple[str, ...]:
    """The runs that a run came from (summary.json, lineage.parents), as written there: names or folders."""
    found = row.get("summary.lineage.parents")
    if isinstance(found, str):
        return (found,)
    return tuple(map(str, found)) if isinstance(found, tuple) else ()


def trainings(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For every run the trainings of its draft, if they are available.

    A training is searched below the root of the run, then by its name among `rows` (if there are several, the one whose
    checkpoint is the run's draft), then on disk under the recorded path.
    """
    trained = [row for row in rows if row["kind"] in ("train", "target")]
    by_path = {row["path"]: row for row in trained}
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in trained:
        by_name.setdefault(row["run"], []).append(row)

    def at(folder: Path) -> dict[str, Any] | None:
        known = by_path.get(os.path.realpath(folder))
        return known or (_parent(folder) if (folder / "summary.json").exists() else None) or None

    def named(row: dict[str, Any], name: str) -> dict[str, Any] | None:
        there = by_name.get(name, [])
        if len(there) > 1:
            weights = row.get(f"{SUMMARY}lineage.draft")
            there = [one for one in there if one.get(f"{SUMMARY}lineage.checkpoint") == weights]
        return there[0] if len(there) == 1 else None

    found = []
    for row in rows:
        own = []
        for parent in parents(row):
            path = Path(parent)
            beside = (at(Path(row["path"]).parents[1] / kind / path.name) for kind in ("train", "target"))
            source = next(filter(None, beside), None) or named(row, path.name) or at(path)
            own += [dict(source)] if source else []
        found.append(own)
    return found


def inherit(rows: list[dict[str, Any]], sources: list[list[dict[str, Any]]]) -> None:
    """Add to every run the config keys of the run that trained its draft (`trainings`), unless it has a key of that
    name, so that an evaluation can be grouped by depth or data. The summary of the training is added under
    `parent.`."""
    inherited = (SUMMARY, PROVENANCE, PARENT)
    for row, own in zip(rows, sources, strict=True):
        for source in own:
            for key, value in source.items():
                if key.startswith(SUMMARY):
                    row.setdefault(PARENT + key.removeprefix(SUMMARY), value)
                elif not key.startswith(inherited):
                    row.setdefault(key, value)


@lru_cache(4096)
def _parent(folder: Path) -> dict[str, Any]:
    row, _, fault = read_run(folder)
    return {} if fault else row


def metrics(runs: pd.DataFrame) -> pd.DataFrame:
    """metrics.jsonl of every run in `runs` in long form: source, step, name, value (numbers only).

    An incomplete last line of a killed process is dropped; a broken line before it is an error.
    """
    parts = []
    for source, path in runs["path"].items():
        file = Path(path) / "metrics.jsonl"
        if not file.exists():
            continue
        frame = pd.DataFrame([row for _, row in jsonl.read(file, unfinished="drop")])
        step = next((key for key in ("step", STEP) if key in frame), None)
        if step is None:
            continue
        numbers = frame.select_dtypes("number").melt(step, var_name="name", value_name="value").dropna()
        parts.append(numbers.rename(columns={step: "step"}).assign(source=source))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["step", "name", "value", "source"])


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (dotted key, leaf); lists become tuples so that runs can be grouped by them."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _hashable(value)


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_hashable(item) for item in value)
    return tuple(sorted(flatten(value))) if isinstance(value, dict) else value


def _json(file: Path) -> dict[str, Any]:
    return _mapping(file, read_json(file, {}))


def _yaml(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The top level of a YAML file, and all of it with dotted keys."""
    try:
        text = file.read_text()
    except FileNotFoundError:
        return {}, {}
    top: dict[str, Any] = {}
    flat: dict[str, Any] = {}
    for part in _parts(text):
        entry, leaves = _entry(part)
        top |= _mapping(file, entry)
        flat |= leaves
    return top, flat


def _parts(text: str) -> list[str]:
    """Top-level entries of a YAML text where that allows to read them one by one: the runs of a sweep share nearly all
    of theirs, and parsing is most of the time that reading a run takes."""
    starts = [at.start() for at in re.finditer(r"^[A-Za-z_]", text, re.M)]
    if not starts or starts[0] != 0 or re.search(r"[&*]|^[^A-Za-z_\s-]|^---|^\.\.\.", text, re.M):
        return [text]
    parts = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    return parts if all(isinstance(_entry(part)[0], dict) for part in parts) else [text]


@lru_cache(4096)
def _entry(text: str) -> tuple[Any, dict[str, Any]]:
    found = plain_yaml.read(text) or {}
    return found, dict(flatten(found)) if isinstance(found, dict) else {}


def _mapping(file: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a mapping")
    return content
