"""The tables as frames: accepted length, macro averages, conditional acceptance, differences, seeds, costs.

Each function takes the groups of `analysis.tables.groups.collect` and returns one row per line of the table, as CSV
needs it. `analysis.tables.sheets` arranges them for printing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from analysis.read.configurations import words, written
from analysis.statistics import intervals as statistics
from analysis.statistics.histograms import Counts, join
from analysis.statistics.intervals import FEWEST, MINIMUM_SHARED, RESAMPLES, PairingError
from analysis.tables import groups as grouping
from analysis.tables.groups import Group
from analysis.tables.protocols import clash

KEYS = ("target", "method", "suite", "benchmark", "domain", "temperature", "scheduler")
MEASURES = ("accepted_length", "low", "high", "per_prompt", "prompts", "rounds", "seeds")
SLOT_MEASURES = ("slot", "conditional", "low", "high", "n", "survival")
SLOT_BOUNDS = ("survival_low", "survival_high")
NUMBERS = ("difference", "low", "high", "p", "paired", "shared")
ALL = "all"
VARIANT = "variant"
# Settings that distinguish a row from others of its name: all of them, and those that its label needs.
CONFIGURATION, SHORT = "configuration", "short"


def keys(group: Group) -> dict[str, Any]:
    """The columns that identify a row; further keys of `group_by` come last."""
    known = {**group.section, **group.variant, "benchmark": group.benchmark, "domain": group.domain}
    return {key: known[key] if key in known else _only(group.runs.records[key]) for key in KEYS}


def _only(values: pd.Series) -> Any:
    """The value of a column; several values are joined."""
    there = list(dict.fromkeys(values))
    return there[0] if len(there) == 1 else ",".join(map(str, there))


def extra(group: Group) -> dict[str, Any]:
    """Keys of `group_by` beyond KEYS, and the label of the variant, with which figures and tables name a row."""
    known = group.variant | {key: group.section[key] for key in group.apart}
    named = {key: value for key, value in known.items() if key not in KEYS}
    return named | {CONFIGURATION: words(group.differing), SHORT: words(group.short), VARIANT: group.label}


def accepted_length(found: Sequence[Group], resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """One row per variant and benchmark: pooled accepted length with its interval, per-prompt mean, counts."""
    rows = []
    for group in found:
        counts = group.counts
        value = statistics.accepted_length(counts, resamples, seed)
        per_prompt = float(counts.total().accepted_length_per_prompt)
        numbers = (value.value, value.low, value.high, per_prompt, len(counts.prompts), int(counts.rounds.sum()))
        rows.append(
            keys(group)
            | dict(zip(MEASURES, (*numbers, group.runs.training_seeds().nunique()), strict=True))
            | extra(group)
        )
    return pd.DataFrame(rows)


def macro_average(found: Sequence[Group], resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """One row per variant and domain, and one over all benchmarks (`domain` = all): the unweighted mean over
    benchmarks.

    `complete` is false if a variant has no value on a benchmark that another variant of its section has; its average is
    then over fewer benchmarks and must not be compared.
    """
    rows = []
    for _, part in grouping.sections(found):
        places = grouping.domains(part)
        for own in grouping.variants(part).values():
            for domain, benchmarks in _scopes(places):
                strata = [group for group in own if group.benchmark in benchmarks]
                if not strata:
                    continue
                value = statistics.macro([group.counts for group in strata], resamples, seed)
                numbers = {"accepted_length": value.value, "low": value.low, "high": value.high}
                facts = {"benchmarks": len(strata), "complete": len(strata) == len(benchmarks)}
                head = {key: kept for key, kept in keys(strata[0]).items() if key != "benchmark"}
                rows.append(head | {"domain": domain} | numbers | facts | extra(strata[0]))
    return pd.DataFrame(rows)


def _scopes(places: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    return [*places.items(), (ALL, [name for names in places.values() for name in names])]


def conditional_acceptance(found: Sequence[Group], resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """One row per variant, benchmark and slot: conditional@k with its interval and n_k, survival@k with its own."""
    parts = [_slots(keys(group), extra(group), group.counts, resamples, seed) for group in found]
    return pd.concat(parts, ignore_index=True)


def conditional_by_domain(found: Sequence[Group], resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """The same with the rounds of a domain's benchmarks pooled; the curve of the paper's figure 2."""
    parts = []
    for same in _by_domain(found).values():
        head = {key: value for key, value in keys(same[0]).items() if key != "benchmark"}
        pooled = join([group.counts for group in same])
        parts.append(_slots(head, extra(same[0]), pooled, resamples, seed))
    return pd.concat(parts, ignore_index=True)


def _slots(head: dict[str, Any], tail: dict[str, Any], counts: Counts, resamples: int, seed: int) -> pd.DataFrame:
    value, low, high = statistics.by_slot(counts, True, resamples, seed)
    survival, below, above = statistics.by_slot(counts, False, resamples, seed)
    n = counts.total().reached.astype(int)
    columns = (np.arange(1, counts.slots + 1), value, low, high, n, survival, below, above)
    measures = zip(*columns, strict=True)
    names = (*SLOT_MEASURES, *SLOT_BOUNDS)
    return pd.DataFrame([head | dict(zip(names, row, strict=True)) | tail for row in measures])


def acceptance_rate(found: Sequence[Group], resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """One row per variant and domain, benchmarks pooled: accepted / proposed beside accepted length, with intervals."""
    rows = []
    for (_, _, domain), same in _by_domain(found).items():
        counts = join([group.counts for group in same])
        rate, low, high = statistics.interval(counts, lambda sums: sums.acceptance_rate, resamples, seed)
        length = statistics.accepted_length(counts, resamples, seed)
        rates = {"acceptance_rate": float(rate), "rate_low": float(low), "rate_high": float(high)}
        lengths = {"accepted_length": length.value, "low": length.low, "high": length.high}
        head = {key: value for key, value in keys(same[0]).items() if key != "benchmark"}
        rows.append(head | {"domain": domain} | rates | lengths | extra(same[0]))
    return pd.DataFrame(rows)


def _by_domain(found: Sequence[Group]) -> dict[tuple[Any, ...], list[Group]]:
    merged: dict[tuple[Any, ...], list[Group]] = {}
    for group in found:
        merged.setdefault((tuple(group.section.values()), group.label, group.domain), []).append(group)
    return merged


def suffix_decay(found: Sequence[Group], resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """One row per variant and benchmark: slope of log conditional@k per slot, conditional@1 and @K beside it."""
    rows = []
    for group in found:
        value, low, high = statistics.interval(group.counts, lambda sums: sums.suffix_decay, resamples, seed)
        curve = group.counts.total().conditional
        ends = {"first": curve[0], "last": curve[-1]} if len(curve) else {"first": np.nan, "last": np.nan}
        numbers = {"suffix_decay": float(value), "low": float(low), "high": float(high), "slots": len(curve)}
        rows.append(keys(group) | numbers | ends | extra(group))
    return pd.DataFrame(rows)


def differences(
    found: Sequence[Group],
    resamples: int = RESAMPLES,
    seed: int = 0,
    minimum: float = MINIMUM_SHARED,
    holm: bool = False,
) -> pd.DataFrame:
    """Every pair of variants of a section, on each benchmark, each domain's macro average and the overall one.

    `resolved` is false if the paired 95% interval contains zero, and with `holm` also if the p-value adjusted over the
    pairs of the same scope in the section exceeds 0.05. `note` gives the reason if a pair has no interval.
    """
    rows, memo = [], {}
    for section, part in grouping.sections(found):
        places = grouping.domains(part)
        by_variant = {name: {g.benchmark: g for g in own} for name, own in grouping.variants(part).items()}
        scopes = [("benchmark", d, [b]) for d, names in places.items() for b in names]
        scopes += [("macro", domain, names) for domain, names in _scopes(places)]
        for scope, domain, names in scopes:
            block = []
            for a, b in combinations(by_variant, 2):
                head = {**section, "scope": scope, "domain": domain, "benchmark": ",".join(names)}
                pair = [[by_variant[v].get(name) for name in names] for v in (a, b)]
                block.append(head | {"a": a, "b": b} | _pair(pair, resamples, seed, minimum, memo))
            if holm:
                for row, adjusted in zip(block, statistics.holm([row["p"] for row in block]), strict=True):
                    row["p_holm"] = adjusted
                    row["resolved"] = bool(row["resolved"] and adjusted <= 1 - statistics.LEVEL)
                    row["note"] = row["note"] or ("" if row["resolved"] else "not resolved")
            rows += block
    columns = (*grouping.SECTION, "scope", "domain", "benchmark", "a", "b", *NUMBERS, "resolved", "note")
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def _pair(pair: list[list[Any]], resamples: int, seed: int, minimum: float, memo: dict) -> dict[str, Any]:
    a, b = pair
    nothing = {"difference": np.nan, "low": np.nan, "high": np.nan, "p": np.nan, "paired": 0, "shared": 0.0}
    lacking = sum(x is None or y is None for x, y in zip(a, b, strict=True))
    if lacking:
        return nothing | {"resolved": False, "note": f"{lacking} of {len(a)} benchmarks not measured by both"}
    # Other prompts are found by pairing them; what else differs makes two numbers of it.
    other = {
        key: pair for x, y in zip(a, b, strict=True) for key, pair in clash(x.protocol, y.protocol, ["prompts"]).items()
    }
    if other:
        texts = [f"{key} {written(x)} | {written(y)}" for key, (x, y) in other.items()]
        return nothing | {"resolved": False, "note": f"another protocol: {', '.join(texts)}"}
    try:
        found = statistics.difference([g.counts for g in a], [g.counts for g in b], resamples, seed, minimum, memo)
    except PairingError as error:
        return nothing | {"resolved": False, "note": str(error)}
    values = (found.value, found.low, found.high, found.p, found.paired, found.shared)
    numbers = dict(zip(NUMBERS, values, strict=True))
    few = f": {found.fewest} prompts are too few" if found.fewest < FEWEST else ""
    return numbers | {"resolved": found.resolved, "note": "" if found.resolved else f"not resolved{few}"}


def seeds(found: Sequence[Group]) -> pd.DataFrame:
    """One row per variant and benchmark: mean, sd and t-interval of accepted length over training seeds."""
    rows = []
    for group in found:
        values = [float(counts.total().accepted_length) for counts in group.seeds.values()]
        spread = statistics.spread([value for value in values if not np.isnan(value)])
        numbers = {"mean": spread.mean, "sd": spread.sd, "n": spread.n, "low": spread.low, "high": spread.high}
        rows.append(keys(group) | numbers | extra(group))
    return pd.DataFrame(rows)
