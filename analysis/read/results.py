"""Submitted results on disk: found, checked from what lies beside them, and their state.

| state | what it means |
|---|---|
| verified here | recomputed, and some prompts were decoded again with equal tokens and rounds (NAME.verified.json) |
| recomputed | its per-prompt records lie beside it, and every number follows from them |
| reported | numbers of a publication, or records that do not lie beside it: nothing could be recomputed |
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.statistics.result_numbers import definitions, result_numbers, unfolded
from specbench.runs.result_schema import (
    RECORDS_ENDING,
    ROUNDING,
    VERIFIED_ENDING,
    RecordLine,
    Result,
    Verification,
    beside,
    read_record_lines,
    read_result,
    read_verification,
    sha256,
)

VERIFIED, RECOMPUTED, REPORTED = "verified here", "recomputed", "reported"
# What follows from the records, by its name in analysis.statistics.result_numbers.
QUANTITIES = {
    "benchmarks": "accepted length",
    "macro": "macro average",
    "suffix_decay": "suffix decay",
    "curves": "conditional acceptance",
}
FACTS = ("domain", "version", "dataset", "revision")


@dataclass(frozen=True)
class Submitted:
    """A result that was checked. `problems`: what is wrong with it; `notes`: what could not be compared; `lines`: its
    records, if they lie beside it."""

    path: Path
    result: Result
    state: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lines: Sequence[RecordLine] = field(default=(), repr=False)
    verification: Verification | None = None


def result_files(place: str | os.PathLike[str]) -> list[Path]:
    """The result files at or below `place`, sorted. Errors: ValueError if there is none."""
    start = Path(place)
    if not start.is_dir():
        raise ValueError(f"results={place} is not a folder: name one with results, as `specbench submit` writes them")
    found = sorted(file for file in start.rglob("*.json") if not file.name.endswith(VERIFIED_ENDING))
    if not found:
        raise ValueError(f"results={place} holds no result: `specbench submit RUN results={place}` writes one")
    return found


def check(path: str | os.PathLike[str]) -> Submitted:
    """Read a result and check it from what lies beside it.

    Errors: ValueError for a file that is not a result, naming the field; what does not hold is in `problems`.
    """
    path = Path(path)
    result = read_result(path)
    problems = []
    if path.name != f"{result.name}.json":
        problems.append(f"the file is called {path.name} and its name is {result.name!r}")
    verification = _verification(path, problems)
    if result.source is not None:
        if result.records is not None:
            problems.append("it names both a publication and records: numbers come from one of them")
        return Submitted(path, result, REPORTED, tuple(problems))
    file = beside(path, result.records.place)
    if file is None:
        return Submitted(path, result, REPORTED, tuple(problems), ("its records do not lie beside it",))
    lines, found = _records(result, file)
    own = definitions()
    other = [name for name in own if result.definitions.get(name) != own[name]]
    problems += found or list(_recomputed(result, lines, other))
    notes = [
        f"{QUANTITIES[name]}: written under another definition than this program's, not compared" for name in other
    ]
    comparable = not problems and not other
    state = (RECOMPUTED if verification is None else VERIFIED) if comparable else REPORTED
    return Submitted(path, result, state, tuple(problems), tuple(notes), lines, verification)


def _verification(path: Path, problems: list[str]) -> Verification | None:
    """The verification beside a result; one of other bytes is a problem: the result was changed after it."""
    file = path.with_name(path.stem + VERIFIED_ENDING)
    if not file.exists():
        return None
    found = read_verification(file)
    if found.result_sha256 != sha256(path):
        problems.append(f"{file.name} verified another content of this file: check it again with draft= and target=")
        return None
    return found


def _records(result: Result, file: Path) -> tuple[list[RecordLine], list[str]]:
    """The record lines, and in what they are not those of the result or contradict themselves."""
    problems = []
    if not file.name.endswith(RECORDS_ENDING):
        problems.append(f"records lie in {file.name}, and the name ends in {RECORDS_ENDING}")
    if sha256(file) != result.records.sha256:
        problems.append(f"the digest of {file.name} is not the one that the result states")
    lines = read_record_lines(file)
    if len(lines) != result.records.lines:
        problems.append(f"{file.name} has {len(lines)} lines, and the result states {result.records.lines}")
    seen: set[tuple[str, str, int]] = set()
    prompts: dict[tuple[str, str], str] = {}
    for number, line in enumerate(lines, 1):
        if wrong := _contradiction(line, result.draft.slots):
            problems.append(f"{file.name}, line {number}: {wrong}")
        key = (line.benchmark, line.prompt_id, line.turn)
        if key in seen:
            problems.append(f"{file.name}, line {number}: stands twice ({', '.join(map(str, key))})")
        seen.add(key)
        if prompts.setdefault(key[:2], line.prompt) != line.prompt:
            problems.append(f"{file.name}, line {number}: turns of one conversation have different prompts")
    named, there = set(result.suite.benchmarks), {line.benchmark for line in lines}
    if named != there:
        problems.append(f"benchmarks {', '.join(sorted(named ^ there))} stand in the result or in its records only")
    return lines, problems


def _contradiction(line: RecordLine, slots: int | None) -> str | None:
    """What is wrong with the counts of a line: they must be those of its histogram."""
    cells = [(proposed, accepted) for proposed, accepted, _ in line.histogram]
    if len(set(cells)) < len(cells) or any(not times for _, _, times in line.histogram):
        return "a cell of its histogram stands twice, or counts no round"
    if line.output_tokens > line.committed + 1:
        return f"output_tokens = {line.output_tokens}, and {line.committed} were committed after the first"
    if any(accepted > proposed for proposed, accepted, _ in line.histogram):
        return "a round accepts more than it proposed"
    if slots is not None and any(proposed > slots for proposed, _, _ in line.histogram):
        return f"a round proposes more than the {slots} slots of the draft"
    rounds = sum(times for _, _, times in line.histogram)
    accepted = sum(taken * times for _, taken, times in line.histogram)
    if line.rounds != rounds:
        return f"rounds = {line.rounds}, and its histogram has {rounds}"
    if not accepted <= line.committed <= accepted + rounds:
        return f"committed = {line.committed}, and its histogram allows {accepted} to {accepted + rounds}"
    return None


def _recomputed(result: Result, lines: Sequence[RecordLine], without: Sequence[str]) -> Iterator[str]:
    """The numbers of the result that do not follow from its records; those of other definitions are left out."""
    facts = {name: one.model_dump(include=set(FACTS)) for name, one in result.suite.benchmarks.items()}
    found = result_numbers(lines, facts, result.bootstrap.resamples, result.bootstrap.seed)
    stated = {
        "benchmarks": result.suite.benchmarks,
        "macro": result.macro,
        "suffix_decay": result.suffix_decay,
        "curves": result.curves,
    }
    for name, quantity in stated.items():
        if name not in without:
            yield from _unequal(unfolded(quantity), unfolded(getattr(found, name)), name)


def _unequal(stated: Any, own: Any, where: str) -> Iterator[str]:
    if isinstance(stated, Mapping) and isinstance(own, Mapping):
        for key in [*stated, *(key for key in own if key not in stated)]:
            yield from _unequal(stated.get(key), own.get(key), f"{where}.{key}")
    elif isinstance(stated, list) and isinstance(own, list) and len(stated) == len(own):
        for number, (first, second) in enumerate(zip(stated, own, strict=True), 1):
            yield from _unequal(first, second, f"{where}.{number}")
    elif isinstance(stated, float) and isinstance(own, float):
        if abs(stated - own) > ROUNDING:
            yield f"{where}: the result states {stated:g}, and its records give {own:g}"
    elif stated != own:
        yield f"{where}: the result states {stated}, and its records give {own}"
