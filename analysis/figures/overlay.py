"""The paper's numbers as thin lines beside ours, in figures with the same axes: figures 2, 5 and 6.

Figure 4 shows a gain over DFlash against the draft length, which is an axis of none of our figures; its numbers are in
analysis/paper/fig4_gain_over_dflash.csv.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.style import GREY, KNOWN, styled
from analysis.html.content import Drawing
from analysis.tables.published import spelling, table

TARGET = "qwen3_4b"
LABEL = "paper, Qwen3-4B"


def wanted(targets: Iterable[object], published: bool | None) -> bool:
    """Whether to draw them: as requested, and by default if the only target is that of the paper."""
    return {spelling(target) for target in targets} == {TARGET} if published is None else published


def overlaid(drawings: Sequence[Drawing]) -> list[Drawing]:
    """The drawings; those with the axes of a figure of the paper also show its numbers, and the caption says so."""
    return [_drawn(drawing) for drawing in drawings]


def _drawn(drawing: Drawing) -> Drawing:
    by_start = {"conditional_acceptance": conditional, "threshold": threshold, "reliability": reliability}
    draw = next((f for start, f in by_start.items() if drawing.name.startswith(start)), None)
    said = None if draw is None else draw(drawing.figure)
    if said is None:
        return drawing
    return Drawing(drawing.name, drawing.figure, f"{drawing.caption} {said}", drawing.on_page)


def conditional(figure: Figure) -> str | None:
    """Thin lines of figure 2 in the panels of its domains, for the methods that are drawn there."""
    paper, drawn = table("fig2_conditional_acceptance"), []
    for ax in figure.axes:
        own = paper[paper["domain"] == ax.get_title()]
        shown = {str(line.get_label()).partition(",")[0] for line in ax.lines}
        last = ax.get_xlim()[1]
        for method, line in own.groupby("method", sort=False):
            if method in shown:
                line = line[line["slot"] <= last]
                style = {"color": KNOWN[method].color, "linestyle": KNOWN[method].linestyle, "linewidth": 0.6}
                ax.plot(line["slot"], line["conditional_acceptance"], label=f"_{LABEL}", zorder=2.5, **style)
                drawn.append(ax)
    if not drawn:
        return None
    _key(drawn[0], {LABEL: {"color": GREY, "linewidth": 0.6}})
    return f"Thin: {LABEL}, figure 2, read off to 0.01."


def threshold(figure: Figure) -> str | None:
    """Thin levels of figure 5 over the groups of its domains: the fixed length, and the highest threshold swept."""
    paper, rate = table("fig5_threshold"), figure.axes[0]
    below = figure.axes[-1]
    places = {label.get_text(): at for at, label in zip(below.get_xticks(), below.get_xticklabels(), strict=True)}
    looks = {"0.0": (f"{LABEL}: fixed length", "--"), "highest swept": ("its highest threshold", ":")}
    drawn: dict[str, dict[str, object]] = {}
    for _, row in paper.iterrows():
        if row["domain"] in places:
            name, linestyle = looks[str(row["threshold"])]
            look = {"color": "0.1", "linewidth": 0.7, "linestyle": linestyle}
            at = places[row["domain"]]
            rate.plot([at - 0.46, at + 0.46], [row["acceptance_rate"]] * 2, label=f"_{name}", zorder=4, **look)
            drawn[name] = look
    if not drawn:
        return None
    rate.set_ylim(top=1.3)  # room for the key; what is above 100% is no rate
    rate.set_yticks((0, 0.25, 0.5, 0.75, 1))
    _key(rate, drawn, columns=2)
    return f"Thin: {LABEL}, figure 5."


def reliability(figure: Figure) -> str | None:
    """The errors of figure 6 in the panels of its slots; its curves are not published as numbers."""
    paper = table("fig6_calibration_alpaca").set_index("slot")
    said = None
    for ax in figure.axes:
        slot = int(ax.get_title().split()[1])
        if slot in paper.index:
            row = paper.loc[slot]
            text = f"{LABEL}:\nECE {row['ece_before']:.3f} → {row['ece_after_sts']:.3f}"
            _note(ax, text)
            said = f"In the panels: {LABEL} on Alpaca, figure 6."
    return said


@styled
def _key(ax: Axes, looks: dict[str, dict[str, object]], columns: int = 1) -> Figure:
    """A legend inside the panel, so that the figure's own stays that of the methods."""
    handles = [Line2D([], [], **look) for look in looks.values()]
    where = "upper left" if columns > 1 else "lower left"
    ax.legend(handles, list(looks), loc=where, fontsize=5.5, ncols=columns, borderaxespad=0.1, handlelength=1.6)
    return ax.figure


@styled
def _note(ax: Axes, text: str) -> Figure:
    ax.text(0.97, 0.04, text, transform=ax.transAxes, ha="right", va="bottom", fontsize=5.5, color="0.25")
    return ax.figure
