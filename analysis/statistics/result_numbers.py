"""The numbers of a submitted result from its per-prompt records: what `specbench submit` writes and what
`specbench check-submission` computes again.

Intervals are those of the tables (analysis.statistics.intervals). The standard error is that of the same resamples,
times sqrt(P / (P - 1)) for P prompts, because a bootstrap over P prompts underestimates the variance by that factor.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache

import numpy as np

from analysis.statistics.histograms import Counts, Sums, count
from analysis.statistics.intervals import bounds, by_slot, interval, macro_draws, resample
from specbench.runs.result_schema import OfBenchmark, RecordLine, ResultQuantity, SlotRate, dumped

ALL = "all"


@dataclass(frozen=True)
class ResultNumbers:
    """Everything in a result that follows from its records."""

    benchmarks: dict[str, OfBenchmark]
    macro: ResultQuantity
    suffix_decay: ResultQuantity | None
    curves: dict[str, list[SlotRate]]


@cache
def definitions() -> dict[str, str]:
    """A digest of every quantity of a fixed sample of records, rounded to four decimals.

    Two programs with equal digests mean the same by a quantity and by its interval. So a changed definition, or other
    draws of the bootstrap, mark results that were written before without a number that somebody must raise.
    """
    about = {"a": {"domain": "math"}, "b": {"domain": "code"}}
    lines = []
    for prompt in range(16):
        cells = [[4, accepted, 1 + prompt * (accepted + 2) % 5] for accepted in range(prompt % 4 + 1)]
        rounds, accepted = sum(cell[2] for cell in cells), sum(cell[1] * cell[2] for cell in cells)
        lines.append(
            RecordLine(
                benchmark="ab"[prompt % 2],
                prompt_id=str(prompt),
                turn=0,
                prompt=f"{prompt:08x}",
                output=f"{prompt:08x}",
                output_tokens=rounds + accepted + 1,
                truncated=False,
                rounds=rounds,
                committed=rounds + accepted,
                histogram=cells,
            )
        )
    found = result_numbers(lines, about, 200, 0)
    plain = {one.name: rounded(unfolded(getattr(found, one.name)), 4) for one in fields(found)}
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8] for name, value in plain.items()}


def unfolded(found: object) -> object:
    """Parts of a result as plain data, in mappings and lists too."""
    if isinstance(found, Mapping):
        return {key: unfolded(value) for key, value in found.items()}
    if isinstance(found, list):
        return [unfolded(value) for value in found]
    return found if found is None else dumped(found)


def rounded(found: object, digits: int) -> object:
    """Plain data with its fractions rounded."""
    if isinstance(found, Mapping):
        return {key: rounded(value, digits) for key, value in found.items()}
    if isinstance(found, list):
        return [rounded(value, digits) for value in found]
    return round(found, digits) + 0.0 if isinstance(found, float) else found


def counts_of_lines(lines: Sequence[RecordLine]) -> Counts:
    """Sums by prompt, in the order of benchmark and prompt digest, which is that of every table and summary."""
    keys = np.array([f"{line.benchmark}\0{line.prompt}" for line in lines])
    cells = np.array([(i, *cell) for i, line in enumerate(lines) for cell in line.histogram], dtype=np.int64)
    committed = np.array([line.committed for line in lines], dtype=float)
    return count(keys, committed, *cells.reshape(-1, 4).T)


def result_numbers(
    lines: Sequence[RecordLine], about: Mapping[str, Mapping[str, object]], resamples: int, seed: int
) -> ResultNumbers:
    """Accepted length by benchmark and macro, suffix decay, and conditional acceptance by slot.

    about: facts of every benchmark (domain, version, dataset, revision), in the order of the macro average's strata.
    """
    own = {name: [line for line in lines if line.benchmark == name] for name in about}
    counts = {name: counts_of_lines(part) for name, part in own.items()}
    benchmarks = {}
    for name, facts in about.items():
        benchmarks[name] = OfBenchmark(
            **facts,
            prompts=len(counts[name].prompts),
            prompt_set=prompt_set(own[name]),
            rounds=int(counts[name].rounds.sum()),
            accepted_length=_accepted_length(counts[name], resamples, seed),
        )
    value, draws = macro_draws(list(counts.values()), resamples, seed)
    low, high = bounds(draws, min(_with_rounds(part) for part in counts.values()))
    errors = [one.accepted_length.standard_error for one in benchmarks.values()]
    error = None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(errors)
    decay = tuple(map(float, interval(counts_of_lines(lines), lambda sums: sums.suffix_decay, resamples, seed)))
    return ResultNumbers(
        benchmarks,
        _quantity(value, float(low), float(high), error),
        None if math.isnan(decay[0]) else _quantity(*decay),
        _curves(own, about, resamples, seed),
    )


def prompt_set(lines: Sequence[RecordLine]) -> str:
    """Digest of a benchmark's prompts, in any order; the tables of `specbench compare` show the same one."""
    return hashlib.sha256("\n".join(sorted({line.prompt for line in lines})).encode()).hexdigest()[:8]


def _accepted_length(counts: Counts, resamples: int, seed: int) -> ResultQuantity:
    draws = Sums(resample(counts.features(), resamples, seed)).accepted_length
    prompts = _with_rounds(counts)
    low, high = (float(bound) for bound in bounds(draws, prompts))
    error = None
    if prompts >= 2:
        error = float(np.nanstd(draws, ddof=1)) * math.sqrt(prompts / (prompts - 1))
    return _quantity(float(counts.total().accepted_length), low, high, error)


def _curves(
    own: Mapping[str, Sequence[RecordLine]], about: Mapping[str, Mapping[str, object]], resamples: int, seed: int
) -> dict[str, list[SlotRate]]:
    domains: dict[str, list[RecordLine]] = {}
    for name, part in own.items():
        domains.setdefault(str(about[name]["domain"]), []).extend(part)
    parts = domains if len(domains) == 1 else {**domains, ALL: [line for part in own.values() for line in part]}
    curves = {}
    for domain, part in parts.items():
        counts = counts_of_lines(part)
        reached = counts.reached.sum(0)
        rates = zip(*by_slot(counts, True, resamples, seed), reached, strict=True)
        curves[domain] = [
            SlotRate(slot=slot, conditional=_quantity(*map(float, (value, low, high))), rounds=int(rounds))
            for slot, (value, low, high, rounds) in enumerate(rates, 1)
            if rounds
        ]
    return curves


def _with_rounds(counts: Counts) -> int:
    return int((counts.rounds > 0).sum())


def _quantity(value: float, low: float, high: float, error: float | None = None) -> ResultQuantity:
    known = math.isfinite(low) and math.isfinite(high)
    return ResultQuantity(
        value=value, low=low if known else None, high=high if known else None, standard_error=error if known else None
    )
