"""One configuration: what decided the numbers of a run, which runs are repetitions of it, and what tells two apart.

Decisive is every setting of an evaluation and of the training that made its draft that
specbench/runs/settings_without_effect.py calls compared. Weights, caches and prompts count by their content, wherever
they lie.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from specbench.runs.settings_without_effect import compared

Facts = tuple[tuple[str, Any], ...]

# What a row of `Runs.runs` says of its run beside the settings.
OF_ROW = ("run", "kind", "path", "status")
# Settings that the accepted lengths of one column must have in common, in addition to those of their table.
PROTOCOL = ("max_new_tokens", "top_k", "top_p", "min_p", "stop_token_ids", "turns", "dtype", "target weights")
# Settings that a run records with their resolved value, while its configuration can have null.
STATED = (*PROTOCOL[:-1], "slots")
UNRECORDED = "not recorded"


def of_decoding(row: Mapping[str, Any]) -> Facts:
    """Settings that affect an evaluation, without draft, prompts and seeds, as sorted (setting, value). `row`: of a
    run."""
    found = {key.removeprefix("suite."): value for key, value in _settings(row, "evaluate")}
    found["dtype"] = row.get("target.dtype")
    for key in STATED:  # null stands for the value of the draft or target
        if found.get(key, ...) is None:
            del found[key]
    found |= {key: row[f"summary.protocol.{key}"] for key in STATED if f"summary.protocol.{key}" in row}
    # Trees are known by their label, which names their kind and size; the keys of their settings differ by kind.
    label = row.get("summary.protocol.tree")
    if label is not None or found.get("tree", ...) is None:
        found = {key: value for key, value in found.items() if key.partition(".")[0] != "tree"}
        found |= {} if label is None else {"tree": label}
    if row.get("summary.lineage.target") is not None:
        found["target weights"] = str(row["summary.lineage.target"])[:8]
    return tuple(sorted(found.items()))


def of_draft(row: Mapping[str, Any], parent: Mapping[str, Any] | None) -> Facts:
    """Settings that affect the draft of the run `row`: the configuration of the training `parent` without seeds.

    Without a training (a draft from elsewhere), the hash of its weights is used instead.
    """
    if parent is not None:
        found = dict(_settings(parent, "train")) | {"draft": None}
        fingerprint = parent.get("summary.lineage.cache.fingerprint")
        return tuple(sorted((found if fingerprint is None else found | {"cache": str(fingerprint)[:8]}).items()))
    weights, named = row.get("summary.lineage.draft"), row.get("draft")
    place = _place(named) if isinstance(named, str) else None
    if weights is None:
        return () if place is None else (("draft", place),)
    return (("draft", "@".join(word for word in (place and place.rpartition("/")[2], str(weights)[:8]) if word)),)


def joined(decoding: Facts, draft: Facts) -> Facts:
    """Both together; a setting of the training that the evaluation has too is called training.KEY."""
    known = dict(decoding)
    return (*decoding, *((f"training.{key}" if key in known else key, value) for key, value in draft))


def _settings(row: Mapping[str, Any], kind: str) -> Iterable[tuple[str, Any]]:
    """Dotted keys of a run's configuration that affect its numbers; of paths only the last parts."""
    for key, value in row.items():
        if not key.startswith(("summary.", "provenance.", "parent.")) and key not in OF_ROW and compared(kind, key):
            yield key, _place(value) if isinstance(value, str) else value


def _place(value: str) -> str:
    """The last two parts of a path, which do not change if a root is moved. Other text is returned unchanged."""
    return "/".join(part for part in PurePath(value).parts[-2:] if part != "/") if "/" in value else value


def identity(
    row: Mapping[str, Any],
    decoding: Facts,
    draft: Facts,
    prompts: Mapping[str, str],
    first: Mapping[str, Any],
    content: str,
) -> str:
    """Key that is equal for a run and its repetitions and copies: configuration, weights, prompts and seeds.

    Args:
        prompts: hash of each benchmark's prompts. first: the first of the run's records.
        content: digest of all of them, used instead of the draft's weights if the run does not record them.
    """
    about = [str(first[key]) for key in ("method", "target", "suite", "temperature", "scheduler", "accounting")]
    about += [str(first["thinking"]), str(first["seed"])]
    if first["temperature"]:  # greedy decoding draws nothing
        about.append(str(row.get("provenance.seeds.decoding", row.get("seed"))))
    weights = row.get("summary.lineage.draft")
    if weights is None:
        seeds = tuple((key, value) for key, value in sorted(row.items()) if key.startswith("seed"))
        about.append(repr((content, draft, seeds)))
    return hashlib.sha256(repr((about, weights, decoding, sorted(prompts.items()))).encode()).hexdigest()


def prompt_sets(records: pd.DataFrame) -> dict[int, dict[str, str]]:
    """For every `source` the hash of each benchmark's prompts: of their `prompt_key`, in any order."""
    found: dict[int, dict[str, str]] = {}
    keys = ["source", "benchmark", "prompt_key"]
    rows = records[keys].astype(object).drop_duplicates().sort_values(keys).itertuples(index=False)
    for (source, benchmark), part in groupby(rows, key=lambda row: (row[0], row[1])):
        text = "\n".join(str(row[2]) for row in part)
        found.setdefault(int(source), {})[str(benchmark)] = hashlib.sha256(text.encode()).hexdigest()[:8]
    return found


def told_apart(facts: Sequence[Facts], named: Collection[str] = ()) -> tuple[list[dict[str, Any]], list[str]]:
    """For every run the settings in which the runs differ, and the settings that only some of them recorded.

    A setting of STATED, or `target weights`, that a run did not record is taken from the others if they agree; a
    setting that its configuration did not have yet is taken from them if it is off there. Otherwise it is UNRECORDED.
    `named`: settings by which the runs are distinguished already.
    """
    unlike = set(facts)
    if len(unlike) == 1:
        return [{} for _ in facts], []
    every = [{key: value for key, value in setting if key not in named} for setting in facts]
    unlike = {tuple(setting.items()) for setting in every}
    values: dict[str, set[Any]] = {}
    for known in map(dict, unlike):
        for key, value in known.items():
            values.setdefault(key, set()).add(value)
    partly = sorted(key for key in values if any(key not in known for known in every))

    def tells(key: str) -> bool:
        off = key in (*STATED, "target weights") or not values[key] - {None, False, ()}
        return len(values[key]) > 1 or (key in partly and not off)

    telling = sorted(filter(tells, values), key=_priority)
    return [{key: known.get(key, UNRECORDED) for key in telling} for known in every], [
        key for key in partly if key not in telling
    ]


def _priority(key: str) -> tuple[int, str]:
    """Settings of the draft itself first, then of its training, then of decoding, then bare digests."""
    heads = ("method.", "draft.", "target.", "limit_samples", "data.", "trainer.", "training.")
    if key in ("cache", "target weights", "prompts", "draft"):
        return (len(heads) + 1, key)
    return (next((place for place, head in enumerate(heads) if key.startswith(head)), len(heads)), key)


def shortest(differing: Sequence[Mapping[str, Any]]) -> list[str]:
    """The smallest set of settings found that distinguishes all of `differing`: a single one, or several in order."""
    keys = list(differing[0]) if differing else []
    wanted = len({tuple(row.values()) for row in differing})

    def told(chosen: Sequence[str]) -> int:
        return len({tuple(row[key] for key in chosen) for row in differing})

    alone = [key for key in keys if told([key]) == wanted]
    if alone:
        return alone[:1]
    chosen: list[str] = []
    while told(chosen) < wanted:
        chosen.append(max((key for key in keys if key not in chosen), key=lambda key: told([*chosen, key])))
    return chosen


def words(settings: Mapping[str, Any]) -> str:
    """Settings for a label: `layers=2, lr=0.001`; keys whose last parts are equal are written whole."""
    short = Counter(key.rpartition(".")[2] for key in settings)
    names = {key: key.rpartition(".")[2] if short[key.rpartition(".")[2]] == 1 else key for key in settings}
    return ", ".join(f"{names[key]}={written(value)}" for key, value in settings.items())


def written(value: Any) -> str:
    """A value in short form: 1 for 1.0, null, true, 1-2-5 for a list."""
    if value is None:
        return "null"
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    if isinstance(value, tuple):
        return "-".join(map(written, value)) or "none"
    return f"{value:g}" if isinstance(value, (float, np.floating)) else str(value)
