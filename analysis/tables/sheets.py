"""Tables arranged for printing: method x benchmark in the paper's layout, differences, seeds, costs, published.

A `Sheet` is a table of texts with some formatting facts; `analysis.tables.writers` converts it to Markdown, LaTeX,
HTML or a terminal table.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.read.records import CHAIN
from analysis.read.runs import shown
from analysis.statistics.intervals import FEWEST
from analysis.tables import groups as grouping
from analysis.tables import protocols, tiers
from analysis.tables.frames import ALL, METHOD_BOUNDS
from analysis.tables.groups import Group

MISSING = "-"
TREE_NOTE = (
    "Chain and trees: macro average of the accepted length with this tree; tokens that the target reads in a round; "
    "milliseconds of a round on the machine that decoded. Each tree has a table of its own; trees.csv has the paired "
    "differences to the chains."
)
SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Cell:
    """One entry: its text, whether it is resolved (the best of its column, or a difference of two methods), and the
    number by which a column is sorted."""

    text: str
    best: bool = False
    sort: float | int | np.number | None = None


@dataclass(frozen=True)
class Sheet:
    """A table: `spans` is the optional upper header line as (text, columns), its first entry over the row labels."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    spans: Sequence[tuple[str, int]] = ()
    notes: Sequence[str] = ()


def main(
    found: Sequence[Group],
    lengths: pd.DataFrame,
    macros: pd.DataFrame,
    pairs: pd.DataFrame,
    costs: pd.DataFrame | None = None,
) -> list[Sheet]:
    """One sheet per section: variants as rows, benchmarks as columns by domain, macro averages at the end of each
    domain.

    If `costs` (analysis.tables.costs) has measured speedups, the two last columns show them and the predicted ones. If
    the same rows were decoded with chains and with trees, the sheet of the chains has columns about both.
    """
    sheets = []
    for section, part in grouping.sections(found):
        own_lengths, own_macros, own_pairs = (only(frame, section) for frame in (lengths, macros, pairs))
        places = grouping.domains(part)
        columns, spans = [], [("", 1)]
        for domain, names in places.items():
            columns += [("benchmark", domain, name) for name in names]
            columns += [("macro", domain, domain)] if len(names) > 1 else []
            spans.append((domain, len(names) + (len(names) > 1)))
        if sum(map(len, places.values())) > 1:
            columns.append(("macro", ALL, ALL))
            spans.append(("all", 1))
        labels = _by_speedup(list(grouping.variants(part)), None if costs is None else only(costs, section))
        method = tiers.of_methods(part)
        other = {(label, benchmark) for label, benchmark in protocols.marked(part)}
        table = {
            column: _column(column, labels, places, own_lengths, own_macros, own_pairs, other, method)
            for column in columns
        }
        rows = [[Cell(name), *(table[column][i] for column in columns)] for i, name in enumerate(labels)]
        names = [name if scope == "benchmark" else "macro" for scope, _, name in columns]
        counted = own_lengths.groupby("variant", sort=False)["prompts"].sum()
        trained = own_lengths.groupby("variant", sort=False)["seeds"].min()
        for count in (counted, trained):
            rows = [[*row, Cell(str(count[row[0].text]), sort=int(count[row[0].text]))] for row in rows]
        names += ["prompts", "seeds"]
        ended = {} if costs is None else only(costs, section).groupby("variant")["converged"].min().to_dict()
        if known := [name for name in labels if pd.notna(ended.get(name))]:
            names.append("training")
            rows = [[*row, Cell(_converged(ended.get(row[0].text, np.nan)))] for row in rows]
        spans.append(("", 3 if known else 2))
        notes = [*_notes(part, own_macros, own_pairs, method), *protocols.notes(part)]
        if costs is not None and (beside := _trees(section, labels, macros, costs, method)):
            for tree, (heads, cells) in beside.items():
                names += heads
                spans.append((tree, len(heads)))
                rows = [[*row, *more] for row, more in zip(rows, cells, strict=True)]
            notes.append(TREE_NOTE)
        if costs is not None:
            timed = _speedups(only(costs, section), labels)
            places_of = _speed_ranks(labels, only(costs, section))
            if places_of:
                names.append("rank by speedup")
                spans.append(("", 1))
                rows = [[*row, places_of[label]] for row, label in zip(rows, labels, strict=True)]
                notes.append(
                    "Rows stand by measured speedup. Rank by speedup: rows whose 95% intervals overlap share their "
                    "ranks, and their order says nothing."
                )
            for batch, cells in timed.items():
                names += ["measured", "predicted"]
                spans.append((f"speedup at batch {batch}", 2))
                rows = [[*row, *more] for row, more in zip(rows, cells, strict=True)]
            if timed:
                notes.append(
                    "Speedup: tokens per second of the whole batch relative to plain decoding of the same prompts, "
                    "interleaved on one machine, with its 95% interval over prompts, and the prediction from the cost "
                    "curves; for the drafts, scheduler and temperature of the row. Below 1 the draft slows decoding "
                    "down."
                )
        sheets.append(Sheet("accepted_length", grouping.title(section), ["method", *names], rows, spans, notes))
    return sheets


def _trees(
    section: dict, labels: Sequence[str], macros: pd.DataFrame, costs: pd.DataFrame, method: bool
) -> dict[str, tuple[list[str], list[list[Cell]]]]:
    """Columns about chains and about every tree with which rows of this section of chains were decoded too: by tree,
    their names, and their cells for every label. Empty where there are no trees, or this is a section of them."""
    if section.get("tree") != CHAIN:
        return {}
    same = {key: value for key, value in section.items() if key != "tree"}
    whole = only(macros, same)
    whole = whole[(whole["domain"] == ALL) & whole["variant"].isin(labels)]
    trees = [tree for tree in whole["tree"].unique() if tree != CHAIN]
    found = {}
    for tree in [CHAIN, *trees] if trees else []:
        length = whole[whole["tree"] == tree].set_index("variant")
        rates = only(costs, section | {"tree": tree}).drop_duplicates("variant").set_index("variant")
        rows = []
        for label in labels:
            cells = [] if tree == CHAIN else [_length_cell(length, label, method)]
            for rate, factor in (("verified_per_round", 1.0), ("seconds_per_round", 1e3)):
                value = rates[rate].get(label, np.nan) * factor
                cells.append(Cell(_number(value, 2), sort=value))
            rows.append(cells)
        found[str(tree)] = ([*([] if tree == CHAIN else ["macro"]), "verified", "ms"], rows)
    return found


def _length_cell(lengths: pd.DataFrame, label: str, method: bool) -> Cell:
    if label not in lengths.index:
        return Cell(MISSING)
    row = lengths.loc[label]
    ends = METHOD_BOUNDS if method else ("low", "high")
    dagger = "" if row["complete"] else "†"
    return Cell(bracket(row["accepted_length"], *(row[end] for end in ends)) + dagger, sort=row["accepted_length"])


def _speedups(costs: pd.DataFrame, labels: Sequence[str]) -> dict[str, list[list[Cell]]]:
    """Measured and predicted speedup of every label by batch size; empty if nothing was measured."""
    timed = costs[costs["speedup_measured"].notna()]
    found = {}
    for batch, part in timed.groupby("speedup_batch", dropna=False):
        by_label, rows = part.set_index("variant"), []
        for label in labels:
            if label not in by_label.index:
                rows.append([Cell(MISSING), Cell(MISSING)])
                continue
            row = by_label.loc[label]
            measured = bracket(row["speedup_measured"], row["speedup_low"], row["speedup_high"])
            predicted = _number(row["speedup_predicted"], 2)
            rows.append([Cell(measured, sort=row["speedup_measured"]), Cell(predicted, sort=row["speedup_predicted"])])
        found["unknown" if pd.isna(batch) else f"{batch:g}"] = rows
    return found


def _by_speedup(labels: list[str], costs: pd.DataFrame | None) -> list[str]:
    """The rows by falling measured speedup (at the smallest batch timed), then those that were not timed."""
    if costs is None or not costs["speedup_measured"].notna().any():
        return labels
    speeds = _smallest_batch(costs)["speedup_measured"]
    return sorted(labels, key=lambda label: -speeds.get(label, -np.inf))


def _smallest_batch(costs: pd.DataFrame) -> pd.DataFrame:
    """The measured speedups of each variant at the smallest batch timed."""
    timed = costs.dropna(subset=["speedup_measured"]).sort_values("speedup_batch", kind="stable")
    return timed.drop_duplicates("variant").set_index("variant")


def _speed_ranks(labels: Sequence[str], costs: pd.DataFrame) -> dict[str, Cell]:
    """The rank of each label by speedup, as a range where its interval overlaps others; empty if fewer than two were
    timed. Only rows of one batch are compared; a row without an interval has no rank."""
    timed = _smallest_batch(costs)
    if len(timed) < 2:
        return {}
    cells = {label: Cell(MISSING) for label in labels}
    for label, row in timed.iterrows():
        alike = timed[timed["speedup_batch"].eq(row["speedup_batch"]) | timed["speedup_batch"].isna()]
        if label not in cells or pd.isna(row["speedup_low"]) or label not in alike.index:
            continue
        best = 1 + int((alike["speedup_low"] > row["speedup_high"]).sum())
        worst = len(alike) - int((alike["speedup_high"] < row["speedup_low"]).sum())
        cells[label] = Cell(f"{best}" if best == worst else f"{best}–{worst}", sort=best)
    return cells


def _notes(part: Sequence[Group], macros: pd.DataFrame, pairs: pd.DataFrame, method: bool) -> list[str]:
    notes = [
        "Accepted length: tokens committed / rounds, pooled (bonus token included), with its 95% interval. Macro: "
        "unweighted mean over benchmarks.",
        tiers.note(part, method),
    ]
    notes += [tiers.best(pairs)] if method and grouping.variants(part).keys() != {part[0].label} else []
    few = sorted({g.benchmark for g in part if (g.counts.rounds > 0).sum() < FEWEST})
    if few:
        notes.append(f"Fewer than {FEWEST} prompts on {', '.join(few)}: too few for an interval to be trusted.")
    if not macros["complete"].all():
        notes.append("† over fewer benchmarks than others have; not comparable.")
    return notes


def only(frame: pd.DataFrame, section: dict) -> pd.DataFrame:
    """The rows of one section, by those of its keys that the frame has."""
    keep = np.ones(len(frame), bool)
    for key, value in section.items():
        if key in frame:
            keep &= (frame[key].isna() if value is None else frame[key] == value).to_numpy(bool)
    return frame[keep]


def _column(
    column: tuple[str, str, str],
    labels: list[str],
    places: dict[str, list[str]],
    lengths: pd.DataFrame,
    macros: pd.DataFrame,
    pairs: pd.DataFrame,
    other: Collection[tuple[str, str]],
    method: bool,
) -> list[Cell]:
    """The cells of a column, one per label; `other`: (label, benchmark) with another protocol, which are never best.
    `method`: the intervals are about methods, else about checkpoints, of which none is marked best."""
    scope, domain, name = column
    every = [benchmark for names in places.values() for benchmark in names]
    here = [name] if scope == "benchmark" else places.get(domain, every)
    unlike = {label for label in labels if any((label, benchmark) in other for benchmark in here)}
    frame = lengths[lengths["benchmark"] == name] if scope == "benchmark" else macros[macros["domain"] == domain]
    by_label = frame.set_index("variant")
    chosen = pairs[(pairs["scope"] == scope) & (pairs["domain"] == domain)]
    if scope == "benchmark":
        chosen = chosen[chosen["benchmark"] == name]
    comparable = {n: by_label["accepted_length"].get(n, np.nan) for n in labels if n not in unlike}
    best = resolved_best(comparable, chosen) if method else None
    ends = METHOD_BOUNDS if method else ("low", "high")
    cells = []
    for label in labels:
        if label not in by_label.index:
            cells.append(Cell(MISSING))
            continue
        row = by_label.loc[label]
        dagger = ("" if row.get("complete", True) else "†") + (protocols.MARK if label in unlike else "")
        text = bracket(row["accepted_length"], *(row[end] for end in ends)) + dagger
        cells.append(Cell(text, label == best, float(row["accepted_length"])))
    return cells


def resolved_best(values: dict[str, float], pairs: pd.DataFrame) -> str | None:
    """The variant with the highest value, if the method's difference to every other one is resolved; else None."""
    known = {name: value for name, value in values.items() if not np.isnan(value)}
    if len(known) < 2:
        return None
    best = max(known, key=known.__getitem__)
    resolved = pairs[pairs["resolved"].astype(bool)]
    beaten = set(resolved["b"][(resolved["a"] == best) & (resolved["difference"] > 0)])
    beaten |= set(resolved["a"][(resolved["b"] == best) & (resolved["difference"] < 0)])
    return best if beaten >= set(known) - {best} else None


def differences(found: Sequence[Group], pairs: pd.DataFrame) -> list[Sheet]:
    """One sheet per section: pairs of variants on each domain's macro average and on the overall one, with the verdict
    about these checkpoints and the one about the methods."""
    sheets = []
    holm = bool(pairs["p_holm"].notna().any())
    p = " (Holm)" if holm else ""
    tests = (("these checkpoints", "", "low", "high"), ("this method", "_method", *METHOD_BOUNDS))
    columns = ["pair", "macro", "difference"]
    columns += [name for tier, *_ in tests for name in (f"{tier} [95%]", f"p{p}")]
    for section, part in grouping.sections(found):
        own = only(pairs, section)
        rows = []
        for _, row in own[own["scope"] == "macro"].iterrows():
            value = Cell(_signed(row["difference"]), bool(row["resolved"]), row["difference"])
            cells = [Cell(f"{row['a']} - {row['b']}"), Cell(row["domain"]), value]
            for _, tier, low, high in tests:
                p_value = row[f"p{tier}_holm" if holm else f"p{tier}"]
                cells += [Cell(ends(row[low], row[high], sign=True)), Cell(_p(p_value), sort=p_value)]
            counts = [Cell(f"{row[name]:g}", sort=row[name]) for name in ("paired", "trainings")]
            rows.append([*cells, *counts, Cell(row["note"])])
        if rows:
            title = f"Differences of accepted length: {grouping.title(section)}"
            more = [*columns, "prompts", "seeds", "verdict"]
            sheets.append(Sheet("differences", title, more, rows, notes=tiers.of_differences(part, own)))
    return sheets


def spread(seeds: pd.DataFrame) -> Sheet:
    """Mean and spread over training seeds, which differs from the interval over prompts."""
    rows = []
    for _, row in seeds.iterrows():
        mean = Cell(bracket(row["mean"], row["low"], row["high"]), sort=row["mean"])
        place = [Cell(str(row[key])) for key in ("target", "variant", "benchmark")]
        rest = [Cell(_number(row["sd"], 3), sort=row["sd"]), Cell(str(row["n"]), sort=row["n"])]
        rows.append([*place, _temperature(row), mean, *rest])
    columns = ["target", "method", "benchmark", "temperature", "mean [95% t]", "sd", "seeds"]
    note = "Over trained drafts (training seeds). One seed has no spread, and its table says nothing about retraining."
    return Sheet("seeds", "Spread over training seeds", columns, rows, notes=[note])


def costs(found: Sequence[Group], frame: pd.DataFrame) -> list[Sheet]:
    """One sheet per section: costs of each variant."""
    forms = {
        "draft_parameters": ("draft parameters", size),
        "training_tokens": ("training tokens", size),
        "training_flops": ("training FLOP", size),
        "training_seconds": ("hours of steps", lambda v: _number(v / 3600, 3)),
        "peak_memory": ("peak GPU bytes", size),
        "cache_bytes": ("cache bytes", size),
        "seconds_per_round": ("ms per round", lambda v: _number(v * 1e3, 2)),
        "verified_per_round": ("verified per round", lambda v: _number(v, 2)),
        "acceptance_rate": ("acceptance rate", lambda v: _number(v, 3)),
        "speedup_measured": ("speedup", lambda v: _number(v, 2)),
        "speedup_predicted": ("predicted", lambda v: _number(v, 2)),
        "speedup_batch": ("timed at batch", lambda v: _number(v, 0)),
        "speedup_accepted_length": ("timed at length", lambda v: _number(v, 2)),
    }
    sheets = []
    for section, _ in grouping.sections(found):
        own = only(frame, section)
        rows = []
        for _, row in own.iterrows():
            gain = bracket(row["gain_per_doubling"], row["gain_low"], row["gain_high"], sign=True)
            varies = dict(part.split("=") for part in str(row["varies"]).split(";") if part)
            texts = {
                key: ", ".join(form(float(value)) for value in varies[key].split("|"))
                if key in varies
                else form(row[key])
                for key, (_, form) in forms.items()
            }
            cells = [Cell(text, sort=row[key]) for key, text in texts.items()]
            ended = [Cell(gain, sort=row["gain_per_doubling"]), Cell(_converged(row["converged"]))]
            rows.append([Cell(row["variant"]), *cells, *ended])
        notes = [
            "Times are those of the machine that decoded (see provenance). Several numbers in one place are those of "
            "several runs. Timed at: the batch and the accepted length of the run against the clock.",
            "Gain: of the accepted length on held-out prompts per doubling of the steps, over the probes of the last "
            "half of a training, with its 95% interval over prompts (of several trainings the mean, and the widest "
            "bounds). Converged: the upper bound is below 2% of the accepted length, in every training of the row.",
        ]
        columns = ["method", *(name for name, _ in forms.values()), "gain [95%]", "training"]
        sheets.append(Sheet("costs", f"Cost: {grouping.title(section)}", columns, rows, notes=notes))
    return sheets


def _converged(value: float) -> str:
    return MISSING if pd.isna(value) else "converged" if value else "not converged"


def published(gap: pd.DataFrame) -> Sheet:
    """Published accepted lengths beside ours."""
    rows = []
    for _, row in gap.iterrows():
        ours = Cell(bracket(row["accepted_length"], row["low"], row["high"]), sort=row["accepted_length"])
        place = [Cell(str(row[key])) for key in ("target", "variant", "benchmark")]
        numbers = [Cell(f"{row['published']:.2f}", sort=row["published"]), Cell(f"{row['gap']:+.2f}", sort=row["gap"])]
        relative = [Cell(f"{row['relative']:+.1%}", sort=row["relative"]), Cell("yes" if row["inside"] else "no")]
        rows.append([*place, _temperature(row), ours, *numbers, *relative])
    columns = ["target", "method", "benchmark", "temperature", "ours [95%]", "published", "gap", "relative", "inside"]
    source = gap["source"].iloc[0] if len(gap) else ""
    note = f"Source: {source}. Inside: the published value lies in our interval; the source states no error of its own."
    return Sheet("published", "Published numbers and the gap of reproduction", columns, rows, notes=[note])


def _temperature(row: pd.Series) -> Cell:
    return Cell(shown(row["temperature"]), sort=row["temperature"])


def bracket(value: float, low: float, high: float, sign: bool = False) -> str:
    """`4.18 [3.93, 4.43]`."""
    if np.isnan(value):
        return MISSING
    text = f"{value:+.2f}" if sign else f"{value:.2f}"
    return text if np.isnan(low) else f"{text} {ends(low, high, sign)}"


def ends(low: float, high: float, sign: bool = False) -> str:
    """`[3.93, 4.43]`; `-` without an interval."""
    form = "{:+.2f}" if sign else "{:.2f}"
    return MISSING if np.isnan(low) else f"[{form.format(low)}, {form.format(high)}]"


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else _number(value, 4)


def _signed(value: float) -> str:
    return MISSING if np.isnan(value) else f"{value:+.2f}"


def size(value: float) -> str:
    """`1.3M`, `512`."""
    if value is None or np.isnan(value):
        return MISSING
    for unit, suffix in SUFFIXES:
        if abs(value) >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:g}"


def _number(value: float, digits: int) -> str:
    return MISSING if pd.isna(value) else f"{value:.{digits}f}"
