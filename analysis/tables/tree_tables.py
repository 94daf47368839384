"""Token trees: acceptance by depth and rank, and each tree beside the chains of the same drafts.

Depth: steps from the anchor, from 1. Rank: place among the children of one parent, from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.read import details
from analysis.read.records import CHAIN
from analysis.statistics.intervals import MINIMUM_SHARED, RESAMPLES, VERDICT_RESAMPLES, exact_ends
from analysis.tables import frames as tables
from analysis.tables import groups as grouping
from analysis.tables.groups import Group
from analysis.tables.positions import scopes, shares
from analysis.tables.sheets import Cell, Sheet, bracket, only, size

ANY = -1  # the `rank` of a row about any child
RANKS_SHOWN = 4  # of the page; the CSV file has all
RATES = ("verified_per_round", "seconds_per_round")


def acceptance(found: Sequence[Group], resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """One row per variant, domain, depth and rank, and one with `rank` -1 for any child at this depth.

    conditional: accepted / n, with its 95% interval over prompts; n counts the nodes that were reached and have such a
    child. Empty where no run verified trees.
    """
    rows: list[dict[str, Any]] = []
    for domain, same in scopes(found):
        counted = pd.concat([details.ranks(group.runs) for group in same], ignore_index=True)
        if not len(counted):
            continue
        # Each node that was reached has a child of rank 0 if it has any.
        whole = counted.assign(rank=ANY, offered=counted["offered"].where(counted["rank"] == 0, 0))
        every = pd.concat([whole, counted], ignore_index=True)
        places, bins = np.unique(every[["depth", "rank"]].to_numpy(), axis=0, return_inverse=True)
        terms = (every[name].to_numpy() for name in ("accepted", "offered"))
        values, seen = shares(every["prompt"].to_numpy(), bins.ravel(), *terms, len(places), resamples, seed)
        low, high = exact_ends(*values[:3], seen)
        head = {key: value for key, value in tables.keys(same[0]).items() if key != "benchmark"} | {"domain": domain}
        for b, (depth, rank) in enumerate(places):
            numbers = {"depth": int(depth), "rank": int(rank), "conditional": values[0, b]}
            numbers |= {"low": low[b], "high": high[b], "n": int(values[3, b]), "prompts": int(seen[b])}
            rows.append(head | numbers | tables.extra(same[0]))
    return pd.DataFrame(rows)


def beside_chains(
    found: Sequence[Group],
    costs: pd.DataFrame,
    resamples: int = VERDICT_RESAMPLES,
    seed: int = 0,
    minimum: float = MINIMUM_SHARED,
    holm: bool = True,
) -> pd.DataFrame:
    """Every tree less the chains of the same row, paired by prompt: on each benchmark, and on the macro averages.

    `chain` and `with_tree` are the accepted lengths; the verdict columns are those of `frames.differences`, with Holm's
    correction over all rows and columns of one tree. Verified tokens and seconds per round are over all benchmarks.
    Empty without rows that have both.
    """
    rows: list[dict[str, Any]] = []
    memo: dict = {}
    for section, part, chains in _with_chains(found):
        places = grouping.domains(part)
        asked = [("benchmark", d, [b]) for d, names in places.items() for b in names]
        asked += [("macro", domain, names) for domain, names in tables.macro_scopes(places)]
        both = {"tree": grouping.variants(part), "chain": grouping.variants(chains)}
        sides = {side: {label: {g.benchmark: g for g in own} for label, own in v.items()} for side, v in both.items()}
        named = [label for label in sides["tree"] if label in sides["chain"]]
        rates = {side: _rates(costs, section | ({"tree": CHAIN} if side == "chain" else {})) for side in sides}
        block = []
        for scope, domain, names in asked:
            rows_of = [[own.get(name) for name in names] for own in (s[k] for s in sides.values() for k in named)]
            shared = tables.macro_variance([own for own in rows_of if None not in own], seed, memo)
            for label in named:
                pair = [[sides[side][label].get(name) for name in names] for side in ("tree", "chain")]
                head = {**section, "scope": scope, "domain": domain, "benchmark": ",".join(names)}
                lengths = dict(zip(("with_tree", "chain"), map(_mean_length, pair), strict=True))
                numbers = tables.paired_difference(pair, resamples, seed, minimum, memo, shared)
                costly = {f"{side}_{rate}": rates[side][rate].get(label) for rate in RATES for side in sides}
                block.append(head | {"a": label, "b": f"{label}, chain"} | lengths | numbers | costly)
        rows += [{"variant": row["a"], **row} for row in tables.judged(block, holm)]
    return pd.DataFrame(rows).drop(columns=["a", "b"]) if rows else pd.DataFrame()


def _with_chains(found: Sequence[Group]) -> Iterator[tuple[dict[str, Any], list[Group], list[Group]]]:
    """The sections with trees, each with the groups of the section that is equal but for its chains."""
    known = grouping.sections(found)
    for section, part in known:
        if section.get("tree", CHAIN) != CHAIN:
            for other, chains in known:
                if other == section | {"tree": CHAIN}:
                    yield section, part, chains


def _rates(costs: pd.DataFrame, section: dict[str, Any]) -> dict[str, dict[str, float]]:
    own = only(costs, section).drop_duplicates("variant").set_index("variant")
    return {rate: own[rate].to_dict() for rate in RATES}


def _mean_length(groups: Sequence[Group | None]) -> float:
    if None in groups:
        return np.nan
    return float(np.mean([group.counts.total().accepted_length for group in groups]))


def sheets(found: Sequence[Group], frame: pd.DataFrame, lengths: pd.DataFrame) -> list[Sheet]:
    """`beside_chains` and `acceptance` (`frame`) for printing: a sheet of each per section with trees."""
    made = []
    for section, part in grouping.sections(found):
        if len(lengths) and len(own := only(lengths, section)):
            made.append(_gains(section, own[(own["scope"] == "macro") & (own["domain"] == tables.ALL)]))
        if len(frame):
            domains = list(grouping.domains(part))
            own = only(frame, section | {"domain": tables.ALL if len(domains) > 1 else domains[0]})
            made += [_ranks(section, own)] if len(own) else []
    return made


def _gains(section: dict[str, Any], own: pd.DataFrame) -> Sheet:
    rows = []
    for _, row in own.iterrows():
        gain = bracket(row["difference"], row["low"], row["high"], sign=True)
        cells = [Cell(row["variant"])]
        cells += [Cell(bracket(row[key], np.nan, np.nan), sort=row[key]) for key in ("chain", "with_tree")]
        cells += [Cell(gain, bool(row["resolved"]), row["difference"]), Cell(row["note"])]
        rows.append(cells)
    columns = ["method", "chain", "tree", "tree - chain [95%]", "verdict"]
    note = (
        "Accepted length, macro average. The same drafts and prompts both ways; the interval is about these "
        "checkpoints (paired over prompts). The main table has the cost of a round."
    )
    return Sheet("trees", f"Trees beside chains: {grouping.title(section)}", columns, rows, notes=[note])


def _ranks(section: dict[str, Any], own: pd.DataFrame) -> Sheet:
    rows = []
    for (label, depth), part in own.groupby(["variant", "depth"], sort=False):
        by_rank = part.set_index("rank")
        cells = [Cell(label), Cell(str(depth), sort=depth)]
        for rank in (ANY, *range(RANKS_SHOWN)):
            known = rank in by_rank.index
            texts = (_share(by_rank.loc[rank]), size(by_rank.loc[rank, "n"])) if known else ("-", "-")
            cells += [Cell(texts[0], sort=by_rank.loc[rank, "conditional"] if known else None)]
            cells += [Cell(texts[1])] if rank == ANY else []
        rows.append(cells)
    columns = ["method", "depth", "any child [95%]", "nodes", *(f"rank {rank}" for rank in range(RANKS_SHOWN))]
    note = (
        "Conditional acceptance in trees: of the nodes that were reached and have a child (of this rank), the share at "
        "which one (this one) was accepted. 95% intervals over prompts; every rank is in tree_acceptance.csv."
    )
    return Sheet("trees", f"Trees by depth and rank: {grouping.title(section)}", columns, rows, notes=[note])


def _share(row: pd.Series) -> str:
    text = f"{row['conditional']:.2f}"
    return text if np.isnan(row["low"]) else f"{text} [{row['low']:.2f}, {row['high']:.2f}]"
