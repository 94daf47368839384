"""Figures of accepted drafts: acceptance and survival by slot, suffix decay, accepted length along an axis.

Every function takes frames of `analysis.tables.frames` and returns a matplotlib Figure sized for print: a column is
3.3 in. Bands and bars are 95% intervals (cluster bootstrap over prompts).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures.style import COLUMN, PAGE, legend, looks, styled
from analysis.tables.sheets import size

PANEL = 1.75
BAND = 0.18
# A slot that fewer rounds reached is uncertain: its marker is hollow. With fewer than FEWEST_ROUNDS it is not drawn.
FEW = 30
FEWEST_ROUNDS = 5
# The rounds of each of more variants than these have no room below a slot: then those of the fewest.
COUNTED = 4


@styled
def by_slot(frame: pd.DataFrame, quantity: str = "conditional", panel: str = "domain") -> Figure:
    """Conditional acceptance (or survival) by slot, a panel per domain or benchmark, a line per variant.

    The number of rounds of each variant that reached a slot is printed under each panel of conditional acceptance. A
    slot that fewer than FEW rounds reached has a hollow marker; one that only one prompt reached (no interval) is not
    joined to the line; slots that fewer than FEWEST_ROUNDS reached are not drawn.

    Args:
        frame: `tables.conditional_by_domain` or `tables.conditional_acceptance` of one section.
        quantity: conditional or survival.
        panel: column that splits the panels.
    """
    some = frame.loc[frame["n"] >= FEWEST_ROUNDS, "slot"]
    frame = frame[frame["slot"] <= (some.max() if len(some) else frame["slot"].min())]
    low, high = ("low", "high") if quantity == "conditional" else ("survival_low", "survival_high")
    panels, shown = list(dict.fromkeys(frame[panel])), looks(frame["variant"])
    columns = min(len(panels), 3 if len(panels) != 4 else 2)
    rows = -(-len(panels) // columns)
    width = COLUMN if columns == 1 else PAGE if columns == 3 else 2 * PANEL + 1
    counted = 0.09 * len(shown) if quantity == "conditional" and len(shown) <= COUNTED else 0.0
    figure = Figure(figsize=(width, 0.35 + rows * (PANEL + 0.25 + counted)))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for place, (ax, name) in enumerate(zip(grid.flat, panels, strict=False)):
        part = frame[frame[panel] == name]
        for variant, line in part.groupby("variant", sort=False):
            line = line[line["n"] >= FEWEST_ROUNDS]
            known = line[quantity].where(line[low].notna())
            _band(ax, line["slot"], known, line[low], line[high], shown[variant], variant)
            few = line[line["n"] < FEW]
            ax.plot(few["slot"], few[quantity], shown[variant].marker, mfc="white", mec=shown[variant].color, zorder=4)
        ax.set_title(name)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlim(0.7, part["slot"].max() + 0.3)
        if place % columns == 0:
            ax.set_ylabel("conditional acceptance" if quantity == "conditional" else "survival (share of rounds)")
        _counts(ax, part, list(shown)) if quantity == "conditional" else ax.set_xlabel("slot")
    for ax in list(grid.flat)[len(panels) :]:
        ax.set_axis_off()
    legend(figure, shown)
    return figure


def _counts(ax: Axes, part: pd.DataFrame, variants: list[str]) -> None:
    """Ticks with the rounds of each variant in the order of the legend, or of the fewest where they are many."""
    n = part.pivot_table(index="slot", columns="variant", values="n", aggfunc="sum")
    n = n.reindex(columns=[name for name in variants if name in n])
    each = len(variants) <= COUNTED
    ticks = list(n.index) if len(n) <= 8 else list(n.index[:: -(-len(n) // 8)])
    shown = n if each else n.min(axis=1).to_frame()
    lines = ["\n".join(size(float(x)) for x in shown.loc[slot].fillna(0)) for slot in ticks]
    ax.set_xticks(ticks, [f"{slot}\n{below}" for slot, below in zip(ticks, lines, strict=True)])
    ax.set_xlabel(
        "slot; rounds of each, in the legend's order" if each else "slot, and rounds that reached it (fewest)"
    )


def _band(ax: Axes, x, y, low, high, look, label) -> None:
    # Of a single prompt there is no interval: None, which numpy does not take for a number.
    y, low, high = (np.asarray(values, dtype=float) for values in (y, low, high))
    ax.plot(x, y, label=label, zorder=3, **look.line())
    ax.fill_between(x, low, high, color=look.color, alpha=BAND, linewidth=0, zorder=2)


@styled
def along(
    frame: pd.DataFrame,
    axis: str,
    value: str = "accepted_length",
    label: str | None = None,
    panel: str | None = "domain",
    log: bool = False,
) -> Figure:
    """A value with its interval against any axis that the runs were grouped by: depth, block size, budget, data.

    Args:
        frame: rows with `axis`, `method`, `value`, low and high: `tables.macro_average` or `tables.suffix_decay` of
            runs grouped by `axis`.
        value: accepted_length or suffix_decay.
        panel: column that splits the panels; None for one.
        log: logarithmic axis (data, budget).

    Raises:
        ValueError: the axis has no number to plot against.
    """
    numbers = pd.to_numeric(frame[axis], errors="coerce")
    if numbers.notna().sum() == 0:
        raise ValueError(f"{axis} holds no numbers to draw {value} against; group by a numeric config key")
    frame = frame.assign(**{axis: numbers}).dropna(subset=[axis, value])
    others = [c for c in frame if c in ("method", *_grouped(frame, axis))]
    names = [", ".join(map(str, values)) for values in frame[others].itertuples(index=False)]
    frame = frame.assign(line=[f"{n} [{s}]" if s else n for n, s in zip(names, frame["short"], strict=True)])
    panels = list(dict.fromkeys(frame[panel])) if panel else [None]
    shown = looks(frame["line"])
    rows = -(-len(panels) // 5)  # with more than these in a row, tick labels overlap
    columns = -(-len(panels) // rows)
    width = COLUMN if len(panels) <= 2 else PAGE
    figure = Figure(figsize=(width, 0.35 + rows * (PANEL + 0.25)))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=value != "accepted_length")
    for place, (ax, name) in enumerate(zip(grid.flat, panels, strict=False)):
        part = frame if name is None else frame[frame[panel] == name]
        for line, points in part.sort_values(axis).groupby("line", sort=False):
            _band(ax, points[axis], points[value], points["low"], points["high"], shown[line], line)
        ax.set_title("" if name is None else str(name))
        ax.set_xlabel(label or axis.rpartition(".")[2].replace("_", " "))
        if log:
            ax.set_xscale("log")
        if len(ticks := sorted(set(part[axis]))) <= 8:
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.minorticks_off()
        if place % columns == 0:
            ax.set_ylabel(value.replace("_", " ") + (" (log per slot)" if value == "suffix_decay" else ""))
    for ax in list(grid.flat)[len(panels) :]:
        ax.set_axis_off()
    legend(figure, shown)
    return figure


def _grouped(frame: pd.DataFrame, axis: str) -> list[str]:
    """Further keys that distinguish the lines: grouping columns after the measures, without the axis."""
    columns = list(frame.columns)
    last = max(columns.index(name) for name in ("complete", "last", "seeds", "n", "method_high") if name in columns)
    return [name for name in columns[last + 1 :] if name not in (axis, "variant", "configuration", "short")]


@styled
def bars(frame: pd.DataFrame, value: str = "accepted_length", place: str = "benchmark") -> Figure:
    """A value with its interval, a group of bars per benchmark (or domain), a bar per variant."""
    shown, places = looks(frame["variant"]), list(dict.fromkeys(frame[place]))
    width = COLUMN if len(places) * len(shown) <= 16 else PAGE
    figure = Figure(figsize=(width, 2.3))
    ax = figure.subplots()
    thick = 0.8 / len(shown)
    for i, (variant, look) in enumerate(shown.items()):
        part = frame[frame["variant"] == variant].set_index(place).reindex(places)
        x = np.arange(len(places)) + (i - (len(shown) - 1) / 2) * thick
        error = np.abs(np.stack([part[value] - part["low"], part["high"] - part[value]]))
        style = {"ecolor": "0.15", "error_kw": {"elinewidth": 0.7}}
        ax.bar(
            x,
            part[value],
            thick,
            color=look.color,
            edgecolor="white",
            linewidth=0.4,
            yerr=error,
            label=variant,
            **style,
        )
    ax.set_xticks(range(len(places)), places, rotation=30 if max(map(len, places)) * len(places) > 45 else 0)
    units = {"conditional": "conditional acceptance", "suffix_decay": "suffix decay (log per slot)\nbelow 0: it falls"}
    ax.set_ylabel(units.get(value, "accepted length (tokens per round)"))
    ax.grid(axis="x", visible=False)
    if value == "suffix_decay":
        ax.axhline(0, color="0.3", linewidth=0.6)
    legend(figure, shown)
    return figure


@styled
def by_place(positions: pd.DataFrame, contexts: pd.DataFrame) -> Figure:
    """Accepted length against the generated tokens before a round, and against its context, a line per variant.

    Args:
        positions, contexts: by_position and by_context of `analysis.tables.positions.frames`, one domain of one
            section. A bin that fewer than FEW rounds fell into has a hollow marker; one of a single prompt has no band.
    """
    shown = looks([*positions["variant"], *contexts["variant"]])
    figure = Figure(figsize=(COLUMN, 0.35 + PANEL))
    axes = figure.subplots(1, 2, sharey=True)
    words = {"position": "generated tokens", "context": "context tokens"}
    for ax, (axis, label), frame in zip(axes, words.items(), (positions, contexts), strict=True):
        bins = frame.drop_duplicates(f"{axis}_from").sort_values(f"{axis}_from")
        places = {start: x for x, start in enumerate(bins[f"{axis}_from"])}
        for variant, line in frame.groupby("variant", sort=False):
            x, look = line[f"{axis}_from"].map(places), shown[variant]
            _band(ax, x, line["accepted_length"], line["low"], line["high"], look, variant)
            few = line["rounds"] < FEW
            ax.plot(x[few], line["accepted_length"][few], look.marker, mfc="white", mec=look.color, zorder=4)
        ends = ["more" if pd.isna(end) else f"{end:g}" for end in bins[f"{axis}_to"]]
        every = -(-len(ends) // 6)
        ax.set_xticks(range(0, len(ends), every), ends[::every])
        ax.set_xlabel(f"{label}, up to")
    axes[0].set_ylabel("accepted length (tokens per round)")
    legend(figure, shown)
    return figure


@styled
def histogram(frame: pd.DataFrame) -> Figure:
    """Share of rounds by accepted draft tokens, a line per variant: `analysis.tables.positions.frames`, one domain."""
    shown = looks(frame["variant"])
    figure = Figure(figsize=(COLUMN, 2.1))
    ax = figure.subplots()
    for variant, line in frame.groupby("variant", sort=False):
        _band(ax, line["accepted"], line["share"], line["low"], line["high"], shown[variant], variant)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_yscale("log")
    ax.set_xlabel("draft tokens accepted in a round")
    ax.set_ylabel("share of rounds (log scale)")
    legend(figure, shown)
    return figure


@styled
def price(frame: pd.DataFrame) -> Figure:
    """Accepted length and tokens per second against the time of a proposal, a point per variant: up and to the left is
    better. The line joins the variants that no other one beats in both (the Pareto front).

    Args:
        frame: `analysis.tables.costs.costs` of one section and batch size: variant, proposal_seconds,
            speedup_accepted_length, tokens_per_second.
    """
    shown = looks(frame["variant"])
    figure = Figure(figsize=(PAGE, 2.4))
    axes = figure.subplots(1, 2)
    words = {
        "speedup_accepted_length": "accepted length (tokens per round)",
        "tokens_per_second": "tokens per second",
    }
    for ax, (name, label) in zip(axes, words.items(), strict=True):
        points = frame.assign(ms=1e3 * frame["proposal_seconds"]).dropna(subset=["ms", name]).sort_values("ms")
        best = points[points[name] > points[name].cummax().shift(fill_value=-np.inf)]
        ax.step(best["ms"], best[name], where="post", color="0.6", linewidth=0.8, zorder=1)
        for _, row in points.iterrows():
            look = shown[row["variant"]]
            ax.plot(
                row["ms"], row[name], look.marker, color=look.color, mec="white", ms=6, label=row["variant"], zorder=3
            )
        ax.set_xlabel("ms a proposal (to the left: cheaper)")
        ax.set_ylabel(label)
        ax.margins(0.15)
    legend(figure, shown)
    return figure
