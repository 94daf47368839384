"""The protocol of a column (how its numbers were measured), cells with another protocol, and notes about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.read.configurations import PROTOCOL, told_apart, written
from analysis.tables import groups as grouping
from analysis.tables.groups import Group

MARK = "‡"
CLOSE = 1.1  # largest ratio of the operations of two trainings that count as matched


def clash(a: Mapping[str, Any], b: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
    """The settings that two protocols both record, with different values."""
    return {key: (a[key], b[key]) for key in a if key in b and key not in without and a[key] != b[key]}


def columns(part: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """The protocol of each benchmark of a section: that of most of its rows, of the first among equally many."""
    found = {}
    for benchmark in dict.fromkeys(group.benchmark for group in part):
        own = [group.protocol for group in part if group.benchmark == benchmark]
        counted = Counter(tuple(protocol.items()) for protocol in own)
        found[benchmark] = dict(max(counted, key=counted.__getitem__))
    return found


def marked(part: Sequence[Group]) -> dict[tuple[str, str], dict[str, tuple[Any, Any]]]:
    """The cells (row, benchmark) of a section with another protocol than their column's, and how it differs."""
    of = columns(part)
    different = {(group.label, group.benchmark): clash(group.protocol, of[group.benchmark]) for group in part}
    return {cell: settings for cell, settings in different.items() if settings}


def notes(part: Sequence[Group]) -> list[str]:
    """Notes under every table of a section: the protocol, the prompts, marks, and differences between rows."""
    of = columns(part)
    said = []
    common = {key: value for key, value in next(iter(of.values())).items() if key != "prompts"}
    shared = {k: v for k, v in common.items() if all(protocol.get(k) == v for protocol in of.values())}
    single = [f"{key} {written(value)}" for key, value in shared.items()]
    batches = sorted({size for group in part for size in batch_sizes(group)})
    single += [f"batch {', '.join(f'{size:g}' for size in batches)}"] if batches else []
    sizes = {b: {len(g.counts.prompts) for g in part if g.benchmark == b and g.protocol == of[b]} for b in of}
    sets = ", ".join(f"{b} {protocol['prompts']} ({max(sizes[b])})" for b, protocol in of.items())
    said.append(f"Protocol: {'; '.join(single) + '; ' if single else ''}prompts by hash (and number): {sets}.")
    for benchmark, protocol in of.items():
        own = {key: value for key, value in protocol.items() if key != "prompts" and key not in shared}
        if own:
            said.append(f"{benchmark}: {', '.join(f'{key} {written(value)}' for key, value in own.items())}.")
    unlike: dict[str, dict[str, None]] = {}
    for (label, benchmark), settings in marked(part).items():
        for key, (own, usual) in settings.items():
            text = f"{key} {written(own)} instead of {written(usual)}"
            text = f"other prompts of {benchmark} ({own})" if key == "prompts" else text
            unlike.setdefault(label, {})[text] = None
    if unlike:
        texts = "; ".join(f"{label}: {', '.join(differing)}" for label, differing in unlike.items())
        said.append(f"{MARK} another protocol than its column's, not to be compared with the others there: {texts}.")
    return said + _configurations(part)


def _configurations(part: Sequence[Group]) -> list[str]:
    """All settings in which rows of one method differ, if their labels show only a part, and settings not recorded."""
    said = []
    rows = {group.label: group for group in part}
    for label, group in rows.items():
        if len(group.differing) > len(group.short):
            said.append(f"{label}: {', '.join(f'{key} {written(value)}' for key, value in group.differing.items())}.")
    unrecorded = sorted({key for group in part for key in group.unrecorded})
    if unrecorded:
        said.append(f"Taken as in the other runs of their row, because some do not record it: {', '.join(unrecorded)}.")
    if any(str(key).startswith("id:") for group in part for key in group.runs.records["prompt_key"].unique()):
        said.append("Some records hold no hash of their prompts' tokens: those prompts are paired by their ids.")
    known = {label: facts for label, group in rows.items() if (facts := _training(group))}
    trained = told_apart(list(known.values()), part[0].variant)[0] if known else []
    if trained and trained[0] and len({rows[label].method for label in known}) > 1:
        texts = [
            f"{label} {', '.join(f'{key} {written(value)}' for key, value in own.items())}"
            for label, own in zip(known, trained, strict=True)
        ]
        said.append(f"Methods were trained differently: {'; '.join(texts)}.")
    return [*said, *budgets(part)]


def budgets(part: Sequence[Group]) -> list[str]:
    """What was made equal for the trainings of a section; that their budgets are not matched, if nothing was.

    A budget is matched if all rows have one protocol with one amount, or spent the same operations within a tenth.
    """
    rows = {group.label: group for group in part}
    spent = {label: flops for label, group in rows.items() if (flops := _spent(group)) is not None}
    if len({rows[label].method for label in spent}) < 2:
        return []
    facts = {label: dict(rows[label].runs.runs[grouping.DECIDED].iloc[0]) for label in spent}
    named = {tuple(own.get(f"protocol.{key}") for key in ("name", "quantity", "amount")) for own in facts.values()}
    ((name, quantity, amount), *others) = named
    if not others and name is not None and quantity != "recipe":
        return [f"Equal for every row: {name}, {written(amount)} {quantity}."]
    least, most = (end(spent, key=spent.__getitem__) for end in (min, max))
    if spent[most] <= CLOSE * spent[least]:
        return []
    return [
        f"Budgets are not matched: training took from {spent[least]:.3g} ({least}) to {spent[most]:.3g} FLOP ({most}); "
        "protocol= makes them equal."
    ]


def _spent(group: Group) -> float | None:
    """Operations of the trainings of a row, on average; None where they are not known."""
    for key in ("summary.training_flops", "parent.training_flops"):
        if key in group.runs.runs:
            known = pd.to_numeric(group.runs.runs[key], errors="coerce").dropna()
            if len(known):
                return float(known.mean())
    return None


def _training(group: Group) -> tuple[tuple[str, Any], ...]:
    """Amount and source of the training data of a row's drafts, which rows of different methods should have in
    common."""
    facts = dict(group.runs.runs[grouping.DECIDED].iloc[0])
    keys = ("cache", "data.name", "limit_samples", "protocol.name", "protocol.amount")
    if "protocol.name" not in facts:  # a budget decides the steps
        keys += ("trainer.max_steps", "trainer.epochs")
    return tuple((key, facts[key]) for key in keys if key in facts)


def batch_sizes(group: Group) -> set[float]:
    """Number of requests decoded at once, if the runs of a group record it."""
    found: set[float] = set()
    for key in ("summary.protocol.batch_size", "batch_size"):
        if key in group.runs.runs:
            found |= set(pd.to_numeric(group.runs.runs[key], errors="coerce").dropna())
            break
    return found


def table(found: Sequence[Group]) -> pd.DataFrame:
    """One row per variant and benchmark: its prompts by hash and number, its protocol, its runs, and `as_column`."""
    rows = []
    for section, part in grouping.sections(found):
        different = marked(part)
        for group in part:
            facts = {key: group.protocol[key] for key in ("prompts", *PROTOCOL) if key in group.protocol}
            facts = {("prompt_set" if key == "prompts" else key): written(value) for key, value in facts.items()}
            sizes = ",".join(f"{size:g}" for size in sorted(batch_sizes(group)))
            counted = {"prompts": len(group.counts.prompts), "runs": group.runs.records["source"].nunique()}
            same = (group.label, group.benchmark) not in different
            head = {**section, "variant": group.label, "benchmark": group.benchmark}
            rows.append(head | counted | {"as_column": same} | facts | {"batch_size": sizes})
    return pd.DataFrame(rows)
