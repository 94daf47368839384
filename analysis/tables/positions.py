"""Acceptance by position in the answer, context length and token class; histogram of accepted tokens.

Tables by domain, and over all benchmarks (`domain` = all, rounds pooled). Only prompts with long answers have late
positions, so two bins do not contain the same prompts.

Axes: P prompts, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.read import details
from analysis.read.runs import Runs
from analysis.statistics.intervals import RESAMPLES, bounds, resample
from analysis.tables import frames as tables
from analysis.tables import groups as grouping
from analysis.tables.groups import Group
from specbench.metrics.functional import ratio
from specbench.runs.run_schema import TOKEN_CLASSES

POSITIONS = (1, 17, 33, 65, 129, 257, 513, 1025, 2049, 4097)
CONTEXTS = (1, 65, 129, 257, 513, 1025, 2049, 4097, 8193, 16385, 32769, 65537)


def frames(found: Sequence[Group], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, pd.DataFrame]:
    """by_position, by_context, accepted_histogram, truncation and token_classes, each with 95% intervals."""
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("by_position", "by_context", "accepted_histogram", "truncation", "token_classes")
    }
    for domain, same in scopes(found):
        head = {key: value for key, value in tables.keys(same[0]).items() if key != "benchmark"} | {"domain": domain}
        tail = tables.extra(same[0])
        parts = [(group.runs, details.rounds(group.runs)) for group in same]
        known = pd.concat([frame for _, frame in parts], ignore_index=True)
        letters = pd.concat([details.classes(*part) for part in parts], ignore_index=True)
        made = {
            "by_position": _binned(known, "position", POSITIONS, resamples, seed),
            "by_context": _binned(known, "context", CONTEXTS, resamples, seed),
            "accepted_histogram": _histogram(known, resamples, seed),
            "truncation": _truncation([group.runs for group in same], resamples, seed),
            "token_classes": _classes(letters, resamples, seed),
        }
        for name, found_rows in made.items():
            rows[name] += [head | row | tail for row in found_rows]
    return {name: pd.DataFrame(found_rows) for name, found_rows in rows.items()}


def scopes(found: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """The groups of each variant by domain, and all of a variant's together where it has several domains."""
    split: list[tuple[str, list[Group]]] = []
    for _, part in grouping.sections(found):
        for own in grouping.variants(part).values():
            domains = grouping.domains(own)
            split += [(domain, [g for g in own if g.domain == domain]) for domain in domains]
            split += [(tables.ALL, own)] if len(domains) > 1 else []
    return split


def shares(
    prompts: np.ndarray,
    bins: np.ndarray,
    numerators: np.ndarray,
    denominators: np.ndarray,
    size: int,
    resamples: int,
    seed: int,
) -> tuple[Float[np.ndarray, "four B"], np.ndarray]:
    """For each of `size` bins: ratio of sums, its cluster-bootstrap bounds, the denominator, and the number of prompts.

    One entry per round (or slot, or record): its prompt, its bin, its terms of numerator and denominator.
    """
    keys, cluster = np.unique(prompts, return_inverse=True)
    index = cluster * size + bins
    above, below = (
        np.bincount(index, weights=weights, minlength=len(keys) * size).reshape(-1, size).astype(float)
        for weights in (numerators, denominators)
    )
    draws = resample(np.concatenate([above, below], 1), resamples, seed)
    drawn = ratio(draws[:, :size], draws[:, size:])
    seen = (below > 0).sum(0)
    ends = [bounds(drawn[:, b], int(n)) for b, n in enumerate(seen)]
    low, high = (np.array([pair[end] for pair in ends], dtype=float) for end in (0, 1))
    return np.stack([ratio(above.sum(0), below.sum(0)), low, high, below.sum(0)]), seen


def _binned(
    known: pd.DataFrame, axis: str, edges: Sequence[int], resamples: int, seed: int
) -> list[dict[str, float | int]]:
    if not len(known):
        return []
    bins = np.searchsorted(np.asarray(edges), known[axis].to_numpy(), side="right") - 1
    prompts, committed = known["prompt"].to_numpy(), known["committed"].to_numpy()
    values, seen = shares(prompts, bins, committed, np.ones(len(known)), len(edges), resamples, seed)
    ends = [*(edge - 1 for edge in edges[1:]), None]
    return [
        {f"{axis}_from": edges[b], f"{axis}_to": ends[b], "accepted_length": values[0, b]}
        | {"low": values[1, b], "high": values[2, b], "rounds": int(values[3, b]), "prompts": int(seen[b])}
        for b in range(len(edges))
        if seen[b]
    ]


def _histogram(known: pd.DataFrame, resamples: int, seed: int) -> list[dict[str, float | int]]:
    """Share of rounds by accepted draft tokens, 0 to K."""
    if not len(known):
        return []
    size = int(known["proposed"].max()) + 1
    prompts, accepted = known["prompt"].to_numpy(), known["accepted"].to_numpy()
    # A round adds one to the numerator of its bin and one to the denominator of every bin.
    every = np.repeat(np.arange(len(known)), size)
    bins = np.tile(np.arange(size), len(known))
    hits = (accepted[every] == bins).astype(float)
    values, _ = shares(prompts[every], bins, hits, np.ones(len(every)), size, resamples, seed)
    return [
        {"accepted": j, "share": values[0, j], "low": values[1, j], "high": values[2, j], "rounds": int(values[3, j])}
        for j in range(size)
    ]


def _truncation(runs: Sequence[Runs], resamples: int, seed: int) -> list[dict[str, float | int]]:
    """Share of answers that reached the limit of new tokens."""
    records = pd.concat([part.records for part in runs], ignore_index=True)
    cut, ones = records["truncated"].to_numpy().astype(float), np.ones(len(records))
    place = np.zeros(len(records), np.int64)
    values, seen = shares(records["prompt"].to_numpy(), place, cut, ones, 1, resamples, seed)
    named = dict(zip(("truncated", "low", "high"), values[:3, 0], strict=True))
    return [named | {"answers": len(records), "prompts": int(seen[0])}]


def _classes(letters: pd.DataFrame, resamples: int, seed: int) -> list[dict[str, float | int | str]]:
    """Conditional acceptance by class of the token that the text has in the slot."""
    if not len(letters):
        return []
    order = {letter: place for place, letter in enumerate(TOKEN_CLASSES)}
    bins = letters["token_class"].map(order).to_numpy()
    prompts, accepted = letters["prompt"].to_numpy(), letters["accepted"].to_numpy().astype(float)
    values, seen = shares(prompts, bins, accepted, np.ones(len(letters)), len(order), resamples, seed)
    return [
        {"token_class": name, "conditional": values[0, b], "low": values[1, b], "high": values[2, b]}
        | {"n": int(values[3, b]), "prompts": int(seen[b])}
        for b, name in enumerate(TOKEN_CLASSES.values())
        if seen[b]
    ]
