"""What is compared with what: sections (one table each), variants (its rows) and benchmarks (its columns).

A section fixes target, suite, temperature, scheduler, accounting and thinking mode; a variant is a method and whatever
else the user groups by. Numbers of different accountings, thinking modes or suites are never put into one column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from analysis.histograms import Counts
from analysis.runs import Runs, shown

SECTION = ("target", "suite", "temperature", "scheduler", "accounting", "thinking")
SINGLE = ("accounting", "thinking", "suite")
PLACE = ("domain", "benchmark")
METHOD_ORDER = ("mtp", "eagle3", "dflash", "dspark")
DOMAIN_ORDER = ("math", "maths", "code", "chat", "prose")
BENCHMARK_ORDER = (
    *("gsm8k", "math500", "aime25"),
    *("mbpp", "humaneval", "livecodebench"),
    *("mt-bench", "alpaca", "arena-hard-v2"),
)


class MixedError(ValueError):
    """Numbers that mean different things would have stood in one column."""


@dataclass(frozen=True)
class Group:
    """All records of one variant on one benchmark of one section, over every run and seed.

    `apart` names what the user asked to keep in tables of its own (accounting, thinking, suite).
    """

    section: dict[str, Any]
    variant: dict[str, Any]
    domain: str
    benchmark: str
    runs: Runs = field(repr=False)
    apart: tuple[str, ...] = ()

    @cached_property
    def counts(self) -> Counts:
        return self.runs.counts()

    @cached_property
    def seeds(self) -> dict[Any, Counts]:
        """Counts by training seed; a draft trained twice with one seed is one."""
        seeds = self.runs.training_seeds().to_numpy()
        return {s: self.runs.counts(np.flatnonzero(seeds == s)) for s in sorted(set(seeds), key=str)}

    @property
    def method(self) -> str:
        return str(self.variant["method"])

    @property
    def label(self) -> str:
        return label(self.variant)


def label(variant: dict[str, Any]) -> str:
    """A variant in words: `dspark`, or `dspark, layers 2` when the runs were also grouped by `draft.layers`."""
    extra = [f"{key.rpartition('.')[2]} {shown(value)}" for key, value in variant.items() if key != "method"]
    return ", ".join([str(variant["method"]), *extra])


def title(section: dict[str, Any]) -> str:
    """A section in words; the scheduler `fixed` and the thinking mode `false` go without saying."""
    parts = [shown(section["target"])] if "target" in section else []
    parts += [f"suite {shown(section['suite'])}"] if section.get("suite") is not None else []
    parts += [f"temperature {shown(section['temperature'])}"] if "temperature" in section else []
    parts += [f"scheduler {shown(section['scheduler'])}"] if section.get("scheduler") not in (None, "fixed") else []
    parts += [f"accounting {shown(section['accounting'])}"]
    parts += ["thinking"] if section.get("thinking") in ("true", "on") else []
    return ", ".join(parts)


def collect(runs: Runs, group_by: Sequence[str] = ()) -> list[Group]:
    """Split records into groups, in the order of the paper's table.

    Args:
        group_by: keys that tell variants apart beside `method`: record columns, config keys with dots. Naming
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
    # Grouping by scheduler.threshold tells schedulers apart: they are then rows of one table.
    section = [key for key in SECTION if not any(name == key or name.startswith(f"{key}.") for name in variant)]
    found = [
        Group(
            {key: values[key] for key in section},
            {key: values[key] for key in variant},
            shown(values["domain"]),
            shown(values["benchmark"]),
            part,
            tuple(key for key in SINGLE if key in group_by),
        )
        for values, part in runs.groups([*section, *variant, *PLACE])
    ]
    return sorted(found, key=_order)


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
        [_natural(value) for value in group.section.values()],
        _rank(group.method, METHOD_ORDER),
        natural,
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
