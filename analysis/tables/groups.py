"""Grouping of records: sections (one table each), variants (its rows) and benchmarks (its columns).

A section has one target, suite, temperature, scheduler, kind of token trees (or chains), accounting and thinking mode;
a variant is a method and the values of `group_by`; a row is one configuration of a variant, whose runs differ only in
seeds. Numbers of different accountings, thinking modes or suites are never put into one column.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.read.configurations import PROTOCOL, prompt_sets, shortest, told_apart, words
from analysis.read.records import CHAIN
from analysis.read.runs import DECIDED, Runs, shown
from analysis.statistics.histograms import Counts
from specbench.runs.run_schema import UNTRAINED

SECTION = ("target", "suite", "temperature", "scheduler", "tree", "accounting", "thinking")
SINGLE = ("accounting", "thinking", "suite")
PLACE = ("domain", "benchmark")
METHOD_ORDER = (
    "medusa",
    "hydra",
    "eagle1",
    "hass",
    "mtp",
    "eagle3",
    "eagle3_1",
    "p_eagle",
    "dflash",
    "jetspec",
    "domino",
    "dflash2",
    "dspark",
)
DOMAIN_ORDER = ("math", "maths", "code", "chat", "prose")
BENCHMARK_ORDER = (
    *("gsm8k", "math500", "aime25"),
    *("mbpp", "humaneval", "livecodebench"),
    *("mt-bench", "alpaca", "arena-hard-v2"),
)


class MixedError(ValueError):
    """Numbers with different meanings would be in one column."""


@dataclass(frozen=True)
class Group:
    """All records of one row on one benchmark of one section: one configuration, over its runs and seeds.

    `apart`: keys for which the user asked for separate tables (accounting, thinking, suite). `differing`: settings that
    distinguish this row from others of the same variant; `short`: those that its label needs; `unrecorded`: settings
    that some of its runs do not record and that are taken from the others. `protocol`: how it was measured.
    """

    section: dict[str, Any]
    variant: dict[str, Any]
    domain: str
    benchmark: str
    runs: Runs = field(repr=False)
    apart: tuple[str, ...] = ()
    differing: dict[str, Any] = field(default_factory=dict)
    short: dict[str, Any] = field(default_factory=dict)
    unrecorded: tuple[str, ...] = ()
    protocol: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def counts(self) -> Counts:
        return self.runs.counts()

    @cached_property
    def seeds(self) -> dict[Any, Counts]:
        """Counts by training seed; a draft trained twice with one seed counts once."""
        seeds = self.runs.training_seeds().to_numpy()
        return {s: self.runs.counts(np.flatnonzero(seeds == s)) for s in sorted(set(seeds), key=str)}

    @property
    def trainings(self) -> float:
        """Trainings over which the row was taken; without bound for a method that is not trained, which has no variance
        between trainings."""
        return np.inf if self.method in UNTRAINED else len(self.seeds)

    @property
    def method(self) -> str:
        return str(self.variant["method"])

    @property
    def label(self) -> str:
        return label(self.variant, self.short)


def label(variant: dict[str, Any], short: dict[str, Any] | None = None) -> str:
    """Label of a row: `dspark`; `dspark, layers 2` if the runs were also grouped by `draft.layers`; `dspark [lr=0.001]`
    if rows of that name differ in a setting that is not in `group_by`."""
    extra = [f"{key.rpartition('.')[2]} {shown(value)}" for key, value in variant.items() if key != "method"]
    name = ", ".join([str(variant["method"]), *extra])
    return f"{name} [{words(short)}]" if short else name


def title(section: dict[str, Any]) -> str:
    """Title of a section; the scheduler `fixed`, chains and the thinking mode `false` are not mentioned."""
    parts = [shown(section["target"])] if "target" in section else []
    parts += [f"suite {shown(section['suite'])}"] if section.get("suite") is not None else []
    parts += [f"temperature {shown(section['temperature'])}"] if "temperature" in section else []
    parts += [f"scheduler {shown(section['scheduler'])}"] if section.get("scheduler") not in (None, "fixed") else []
    parts += [f"tree {shown(section['tree'])}"] if section.get("tree") not in (None, CHAIN) else []
    parts += [f"accounting {shown(section['accounting'])}"]
    parts += ["thinking"] if section.get("thinking") in ("true", "on") else []
    return ", ".join(parts)


def collect(runs: Runs, group_by: Sequence[str] = ()) -> list[Group]:
    """Split records into groups, in the order of the paper's table.

    Args:
        group_by: keys that distinguish variants in addition to `method`: record columns, config keys with dots. Naming
            accounting, thinking or suite keeps them in tables of their own.

    Raises:
        MixedError: several accountings, thinking modes or suites that `group_by` does not name.
        ValueError: no records at all, or an unknown key.
    """
    if not len(runs.records):
        raise ValueError("no finished run with records is left to compare; check runs= and the filters")
    for key in SINGLE:
        values = sorted(shown(value) for value, _ in ((v[key], r) for v, r in runs.groups([key])))
        if len(values) > 1 and key not in group_by:
            raise MixedError(
                f"the runs hold {len(values)} values of {key} ({', '.join(values)}), which do not belong in one "
                f"column; keep one with the filter {key}={values[0]}, or give each its own table with group_by=[{key}]"
            )
    variant = ["method", *(key for key in group_by if key not in (*SINGLE, "method", *PLACE))]
    # Grouping by scheduler.threshold or tree.budget tells schedulers or trees apart: they are then rows of one table.
    section = [key for key in SECTION if not any(name == key or name.startswith(f"{key}.") for name in variant)]
    prompts = prompt_sets(runs.records)
    named: dict[tuple[Any, ...], list[tuple[dict[str, Any], Runs]]] = {}
    for values, part in runs.groups([*section, *variant, *PLACE]):
        named.setdefault(tuple(values[key] for key in (*section, *variant)), []).append((values, part))
    found = []
    for same in named.values():
        sources = sorted({int(source) for _, part in same for source in part.records["source"].unique()})
        rows, unrecorded = _rows(runs, sources, prompts, variant)
        apart = shortest(rows)
        for values, part in same:
            for differing, own in _split(part, dict(zip(sources, rows, strict=True))):
                group = Group(
                    {key: values[key] for key in section},
                    {key: values[key] for key in variant},
                    shown(values["domain"]),
                    shown(values["benchmark"]),
                    own,
                    tuple(key for key in SINGLE if key in group_by),
                    differing,
                    {key: differing[key] for key in apart},
                    tuple(unrecorded),
                )
                found.append(replace(group, protocol=_protocol(group, prompts)))
    return sorted(found, key=_order)


def _rows(
    runs: Runs, sources: Sequence[int], prompts: dict[int, dict[str, str]], variant: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Settings that distinguish the runs `sources` of one variant, and settings that only some of them record."""
    facts = [runs.runs.loc[source, DECIDED] for source in sources]
    sets: dict[str, set[str]] = {}
    for source in sources:
        for benchmark, name in prompts[source].items():
            sets.setdefault(benchmark, set()).add(name)
    if any(len(names) > 1 for names in sets.values()):  # other prompts of one benchmark: never one row
        limits = runs.runs.get("suite.limit")
        for place, source in enumerate(sources):
            name = hashlib.sha256(repr(sorted(prompts[source].items())).encode()).hexdigest()[:8]
            limit = () if limits is None else (("limit", None if pd.isna(limits[source]) else limits[source]),)
            facts[place] = (*facts[place], *limit, ("prompts", name))
    return told_apart(facts, variant)


def _split(part: Runs, rows: dict[int, dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Runs]]:
    """The records of one variant and benchmark by configuration."""
    by_row: dict[tuple[Any, ...], list[int]] = {}
    for source in part.records["source"].unique():
        by_row.setdefault(tuple(rows[int(source)].values()), []).append(int(source))
    if len(by_row) == 1:
        yield rows[next(iter(by_row.values()))[0]], part
        return
    for own in by_row.values():
        yield rows[own[0]], part.pick(np.flatnonzero(part.records["source"].isin(own)))


def _protocol(group: Group, prompts: dict[int, dict[str, str]]) -> dict[str, Any]:
    """How the records of a group were decoded: its prompts by hash, and the settings of PROTOCOL that its runs
    record."""
    sources = group.runs.records["source"].unique()
    facts = dict(group.runs.runs.loc[sources[0], DECIDED])
    for source in sources[1:]:
        facts |= {key: value for key, value in group.runs.runs.loc[source, DECIDED] if key not in facts}
    found = {"prompts": prompts[int(sources[0])][group.benchmark]}
    return found | {key: facts[key] for key in PROTOCOL if key in facts}


def sections(groups: Sequence[Group]) -> list[tuple[dict[str, Any], list[Group]]]:
    """Groups by section, in order."""
    split: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        split.setdefault(tuple(group.section.values()), []).append(group)
    return [(part[0].section, part) for part in split.values()]


def variants(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """The groups of one section by variant label, in order."""
    split: dict[str, list[Group]] = {}
    for group in groups:
        split.setdefault(group.label, []).append(group)
    return split


def domains(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Benchmarks by domain, both in the order of the paper's table."""
    split: dict[str, list[str]] = {}
    for group in sorted(groups, key=lambda g: (_rank(g.domain, DOMAIN_ORDER), _rank(g.benchmark, BENCHMARK_ORDER))):
        known = split.setdefault(group.domain, [])
        if group.benchmark not in known:
            known.append(group.benchmark)
    return split


def _order(group: Group) -> tuple[Any, ...]:
    natural = [_natural(value) for key, value in group.variant.items() if key != "method"]
    return (
        [_natural(None if value == CHAIN else value) for value in group.section.values()],  # chains before trees
        _rank(group.method, METHOD_ORDER),
        natural,
        [_natural(value) for value in group.short.values()],
        _rank(group.domain, DOMAIN_ORDER),
        _rank(group.benchmark, BENCHMARK_ORDER),
    )


def _natural(value: Any) -> tuple[int, float, str]:
    """Missing first, then numbers by size, then text."""
    if value is None:
        return (0, 0.0, "")
    if isinstance(value, (int, float, np.number)):
        return (1, float(value), "")
    return (2, 0.0, str(value))


def _rank(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)
