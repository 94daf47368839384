"""The tables as frames: accepted length, macro averages, conditional acceptance, differences, seeds, costs.

Each function takes the groups of `analysis.tables.groups.collect` and returns one row per line of the table, as CSV
needs it. `analysis.tables.sheets` arranges them for printing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from analysis.read.configurations import words, written
from analysis.statistics import intervals as statistics
from analysis.statistics import training_seeds
from analysis.statistics.histograms import Counts, Sums, join
from analysis.statistics.intervals import FEWEST, MINIMUM_SHARED, RESAMPLES, VERDICT_RESAMPLES, PairingError
from analysis.statistics.training_seeds import FEWEST_SEEDS, SeedVariance
from analysis.tables import groups as grouping
from analysis.tables.groups import Group
from analysis.tables.protocols import clash

KEYS = ("target", "method", "suite", "benchmark", "domain", "temperature", "scheduler", "tree")
# low, high: of these checkpoints (prompts); method_low, method_high: of the method (prompts and trainings).
METHOD_BOUNDS = ("method_low", "method_high")
MEASURES = ("accepted_length", "low", "high", "per_prompt", "prompts", "rounds", "seeds", *METHOD_BOUNDS)
SLOT_BOUNDS = (
    *("survival_low", "survival_high", *METHOD_BOUNDS, "survival_method_low", "survival_method_high"),
    *("survival_product", "product_low", "product_high"),
)
SLOT_MEASURES = ("slot", "conditional", "low", "high", "n", "survival", *SLOT_BOUNDS)
NUMBERS = ("difference", "low", "high", "p", "paired", "shared", *METHOD_BOUNDS, "p_method", "trainings")
P_HOLM = ("p_holm", "p_method_holm")
VERDICTS = (*P_HOLM, "resolved_checkpoints", "resolved", "borderline", "note")
# What a row of differences holds while it is judged.
WORKING = ("range", "range_method", "few_prompts", "few_seeds", "fewest", "resolved_method", "border", "border_method")
ALPHA = 1 - statistics.LEVEL
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
    """One row per variant and benchmark: pooled accepted length with its intervals, per-prompt mean, counts."""
    rows, shared = [], _shared_variance(found, lambda sums: sums.accepted_length, seed)
    for group in found:
        counts = group.counts
        value = statistics.accepted_length(counts, resamples, seed)
        per_prompt = float(counts.total().accepted_length_per_prompt)
        numbers = (value.value, value.low, value.high, per_prompt, len(counts.prompts), int(counts.rounds.sum()))
        wider = training_seeds.widened(value.value, value.low, value.high, shared[_place(group)], 1 / group.trainings)
        rows.append(keys(group) | dict(zip(MEASURES, (*numbers, len(group.seeds), *wider), strict=True)) | extra(group))
    return pd.DataFrame(rows)


def _place(group: Group) -> tuple[Any, ...]:
    """What the methods of one column have in common: their section and benchmark."""
    return (*group.section.values(), group.benchmark)


def _shared_variance(
    found: Sequence[Group], quantity: Callable[[Sums], np.ndarray], seed: int = 0
) -> dict[tuple[Any, ...], SeedVariance]:
    """The variance between trainings of a quantity, pooled over the methods of each column."""
    parts: dict[tuple[Any, ...], list[SeedVariance]] = {}
    for group in found:
        parts.setdefault(_place(group), []).append(
            training_seeds.of_quantities(list(group.seeds.values()), {"": quantity}, seed)[""]
        )
    return {place: training_seeds.pooled(own) for place, own in parts.items()}


def macro_average(found: Sequence[Group], resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """One row per variant and domain, and one over all benchmarks (`domain` = all): the unweighted mean over
    benchmarks.

    `complete` is false if a variant has no value on a benchmark that another variant of its section has; its average is
    then over fewer benchmarks and must not be compared.
    """
    rows, memo = [], {}
    for _, part in grouping.sections(found):
        places = grouping.domains(part)
        for domain, benchmarks in macro_scopes(places):
            every = {
                name: strata for name, own in grouping.variants(part).items() if (strata := _in_order(own, benchmarks))
            }
            shared = macro_variance(list(every.values()), seed, memo)
            for strata in every.values():
                value = statistics.macro([group.counts for group in strata], resamples, seed)
                numbers = {"accepted_length": value.value, "low": value.low, "high": value.high}
                wider = training_seeds.widened(value.value, value.low, value.high, shared, 1 / _trainings(strata))
                facts = {"benchmarks": len(strata), "complete": len(strata) == len(benchmarks)}
                facts |= {"seeds": min(len(group.seeds) for group in strata)} | dict(
                    zip(METHOD_BOUNDS, map(float, wider), strict=True)
                )
                head = {key: kept for key, kept in keys(strata[0]).items() if key != "benchmark"}
                rows.append(head | {"domain": domain} | numbers | facts | extra(strata[0]))
    return pd.DataFrame(rows)


def _in_order(own: Sequence[Group], benchmarks: Sequence[str]) -> list[Group]:
    by_name = {group.benchmark: group for group in own}
    return [by_name[name] for name in benchmarks if name in by_name]


def _trainings(strata: Sequence[Group]) -> float:
    """Trainings of a row: the least of its benchmarks."""
    return min(group.trainings for group in strata)


def macro_variance(rows: Sequence[Sequence[Group]], seed: int, memo: dict) -> SeedVariance:
    """The variance between trainings of a macro average, pooled over the methods that have all of its benchmarks."""
    most = max(map(len, rows), default=0)
    return training_seeds.pooled(
        [
            training_seeds.of_macro([list(group.seeds.values()) for group in strata], seed, memo)
            for strata in rows
            if len(strata) == most
        ]
    )


def macro_scopes(places: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    return [*places.items(), (ALL, [name for names in places.values() for name in names])]


def conditional_acceptance(found: Sequence[Group], resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """One row per variant, benchmark and slot: conditional@k with its interval and n_k, survival@k with its own, and
    survival as a product of conditionals."""
    parts = _slots([(keys(group), [group]) for group in found], resamples, seed)
    return pd.concat(parts, ignore_index=True)


def conditional_by_domain(found: Sequence[Group], resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """The same with the rounds of a domain's benchmarks pooled; the curve of the paper's figure 2."""
    rows = []
    for same in _by_domain(found).values():
        head = {key: value for key, value in keys(same[0]).items() if key != "benchmark"}
        rows.append((head, same))
    return pd.concat(_slots(rows, resamples, seed), ignore_index=True)


def _slots(rows: Sequence[tuple[dict[str, Any], list[Group]]], resamples: int, seed: int) -> list[pd.DataFrame]:
    """The curves of every row, whose groups are pooled."""
    curves = {"conditional": lambda sums: sums.conditional, "survival": lambda sums: sums.survival}
    parts: dict[tuple[Any, ...], list[dict[str, SeedVariance]]] = {}
    places = [(*same[0].section.values(), same[0].domain, head.get("benchmark")) for head, same in rows]
    for place, (_, same) in zip(places, rows, strict=True):
        parts.setdefault(place, []).append(training_seeds.of_quantities(_pooled_seeds(same), curves, seed))
    shared = {
        place: {name: training_seeds.pooled([one[name] for one in own]) for name in curves}
        for place, own in parts.items()
    }
    made = []
    for place, (head, same) in zip(places, rows, strict=True):
        counts = same[0].counts if len(same) == 1 else join([group.counts for group in same])
        value, low, high = statistics.by_slot(counts, True, resamples, seed)
        survival, below, above = statistics.by_slot(counts, False, resamples, seed)
        n = counts.total().reached.astype(int)
        wider = []
        for name, curve in (("conditional", (value, low, high)), ("survival", (survival, below, above))):
            variance, falls = shared[place][name], name == "survival"
            wider += training_seeds.widened_curve(*curve, variance, 1 / _trainings(same), falls)
        product = statistics.survival_product(counts, resamples, seed)
        columns = (np.arange(1, counts.slots + 1), value, low, high, n, survival, below, above, *wider, *product)
        tail = extra(same[0])
        lines = [head | dict(zip(SLOT_MEASURES, row, strict=True)) | tail for row in zip(*columns, strict=True)]
        made.append(pd.DataFrame(lines))
    return made


def _pooled_seeds(same: Sequence[Group]) -> list[Counts]:
    """Counts of each training over the groups; of the trainings that all of them have."""
    common = [seed for seed in same[0].seeds if all(seed in group.seeds for group in same)]
    return [join([group.seeds[seed] for group in same]) for seed in common]


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
    rows, shared = [], _shared_variance(found, lambda sums: sums.suffix_decay, seed)
    for group in found:
        value, low, high = statistics.interval(group.counts, lambda sums: sums.suffix_decay, resamples, seed)
        curve = group.counts.total().conditional
        ends = {"first": curve[0], "last": curve[-1]} if len(curve) else {"first": np.nan, "last": np.nan}
        numbers = {"suffix_decay": float(value), "low": float(low), "high": float(high), "slots": len(curve)}
        wider = training_seeds.widened(value, low, high, shared[_place(group)], 1 / group.trainings)
        numbers |= dict(zip(METHOD_BOUNDS, map(float, wider), strict=True))
        rows.append(keys(group) | numbers | ends | extra(group))
    return pd.DataFrame(rows)


def differences(
    found: Sequence[Group],
    resamples: int = VERDICT_RESAMPLES,
    seed: int = 0,
    minimum: float = MINIMUM_SHARED,
    holm: bool = True,
) -> pd.DataFrame:
    """Every pair of variants of a section, on each benchmark, each domain's macro average and the overall one.

    Two verdicts: `resolved_checkpoints` about these checkpoints (low, high, p: prompts are resampled), and `resolved`
    about the methods (method_low, method_high, p_method: prompts and trainings), which needs FEWEST_SEEDS trainings of
    both. With `holm`, p_holm and p_method_holm are adjusted over all pairs and columns of the section, and must not
    exceed 0.05. `borderline`: another seed of the bootstrap could turn the verdict. `note` is the verdict in words, or
    the reason why there is none.
    """
    rows, memo = [], {}
    for section, part in grouping.sections(found):
        places = grouping.domains(part)
        by_variant = {name: {g.benchmark: g for g in own} for name, own in grouping.variants(part).items()}
        scopes = [("benchmark", d, [b]) for d, names in places.items() for b in names]
        scopes += [("macro", domain, names) for domain, names in macro_scopes(places)]
        block = []
        for scope, domain, names in scopes:
            whole = [[own[name] for name in names] for own in by_variant.values() if all(n in own for n in names)]
            shared = macro_variance(whole, seed, memo)
            for a, b in combinations(by_variant, 2):
                head = {**section, "scope": scope, "domain": domain, "benchmark": ",".join(names)}
                pair = [[by_variant[v].get(name) for name in names] for v in (a, b)]
                block.append(head | {"a": a, "b": b} | paired_difference(pair, resamples, seed, minimum, memo, shared))
        rows += judged(block, holm)
    columns = (*grouping.SECTION, "scope", "domain", "benchmark", "a", "b", *NUMBERS, *VERDICTS)
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def judged(block: list[dict[str, Any]], holm: bool) -> list[dict[str, Any]]:
    """The rows of a section with their verdicts; the macro average of one benchmark is that benchmark, one test."""
    tests: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in block:
        tests.setdefault((row["benchmark"], row["a"], row["b"]), row)
    for tier, few in (("", "few_prompts"), ("_method", "few_seeds")):
        values = [row[f"p{tier}"] for row in tests.values()]
        adjusted = statistics.holm(values) if holm else np.asarray(values, dtype=float)
        for row, p in zip(tests.values(), adjusted, strict=True):
            # The factor by which Holm raised p also holds for the p that another bootstrap would have found.
            least, most = (min(1.0, x / row[f"p{tier}"] * p) for x in row["range" + tier])
            row[f"p{tier}_holm"] = p
            row["resolved" + (tier or "_checkpoints")] = bool(p <= ALPHA and not row["few_prompts"] and not row[few])
            row["border" + tier] = bool(least <= ALPHA < most)
    for row in block:
        judged = tests[row["benchmark"], row["a"], row["b"]]
        row |= {key: judged[key] for key in (*P_HOLM, "resolved_checkpoints")} | {"resolved": judged["resolved_method"]}
        row["borderline"] = judged["border" if row["few_seeds"] else "border_method"]
        row["note"] = row["note"] or _verdict(row)
        if not holm:
            row |= dict.fromkeys(P_HOLM, np.nan)
    return [{key: value for key, value in row.items() if key not in WORKING} for row in block]


def _verdict(row: dict[str, Any]) -> str:
    """The verdict in words, with what it is about."""
    resolved = row["resolved_checkpoints"] if row["few_seeds"] else row["resolved"]
    word = "resolved" if resolved else "not resolved"
    word += f": {row['fewest']} prompts are too few" if row["few_prompts"] else ""
    word += ", borderline" if row["borderline"] and not row["few_prompts"] else ""
    if not row["few_seeds"]:
        return word
    trained = "one training each" if row["trainings"] == 1 else f"{row['trainings']} trainings each are too few"
    return f"{word} for these checkpoints; {trained}"


def paired_difference(
    pair: list[list[Any]], resamples: int, seed: int, minimum: float, memo: dict, shared: SeedVariance
) -> dict[str, Any]:
    a, b = pair
    nothing = dict.fromkeys(NUMBERS, np.nan) | {"paired": 0, "shared": 0.0, "trainings": 0, "fewest": 0}
    nothing |= {"range": (np.nan, np.nan), "range_method": (np.nan, np.nan), "few_prompts": True, "few_seeds": True}
    lacking = sum(x is None or y is None for x, y in zip(a, b, strict=True))
    if lacking:
        return nothing | {"note": f"{lacking} of {len(a)} benchmarks not measured by both"}
    # Other prompts are found by pairing them; what else differs makes two numbers of it.
    other = {
        key: pair for x, y in zip(a, b, strict=True) for key, pair in clash(x.protocol, y.protocol, ["prompts"]).items()
    }
    if other:
        texts = [f"{key} {written(x)} | {written(y)}" for key, (x, y) in other.items()]
        return nothing | {"note": f"another protocol: {', '.join(texts)}"}
    try:
        found = statistics.difference([g.counts for g in a], [g.counts for g in b], resamples, seed, minimum, memo)
    except PairingError as error:
        return nothing | {"note": str(error)}
    trainings = [_trainings(a), _trainings(b)]
    own = training_seeds.of_checkpoints(found)
    method = training_seeds.of_methods(found, shared, sum(1 / n for n in trainings))
    values = (found.value, own.low, own.high, own.p, found.paired, found.shared, method.low, method.high, method.p)
    fewest = min(trainings) if np.isfinite(min(trainings)) else 1
    return dict(zip(NUMBERS, (*values, fewest), strict=True)) | {
        "fewest": found.fewest,
        "few_prompts": found.fewest < FEWEST,
        "few_seeds": min(trainings) < FEWEST_SEEDS or np.isnan(method.p),
        "range": (own.p_least, own.p_most),
        "range_method": (method.p_least, method.p_most),
        "note": "",
    }


def seeds(found: Sequence[Group]) -> pd.DataFrame:
    """One row per variant and benchmark: mean, sd and t-interval of accepted length over training seeds."""
    rows = []
    for group in found:
        values = [float(counts.total().accepted_length) for counts in group.seeds.values()]
        spread = statistics.spread([value for value in values if not np.isnan(value)])
        numbers = {"mean": spread.mean, "sd": spread.sd, "n": spread.n, "low": spread.low, "high": spread.high}
        rows.append(keys(group) | numbers | extra(group))
    return pd.DataFrame(rows)
