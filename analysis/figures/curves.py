"""Figures of scheduling, calibration, serving and training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis.figures.style import COLUMN, GREY, PAGE, legend, looks, styled

# A curve of more points than these has no markers and may be smoothed.
MANY = 25
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++")
SHADES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


@styled
def threshold(frame: pd.DataFrame, axis: str, place: str = "domain") -> Figure:
    """Threshold sweep: acceptance rate above, accepted length below, a group of bars per domain, a bar per threshold.

    Args:
        frame: columns `axis` (the threshold), `place`, acceptance_rate, rate_low, rate_high, accepted_length, low and
            high.
    """
    places, steps = list(dict.fromkeys(frame[place])), sorted(set(frame[axis]))
    figure = Figure(figsize=(COLUMN, 3.0))
    rate, length = figure.subplots(2, 1, sharex=True)
    thick = 0.84 / len(steps)
    panels = ((rate, "acceptance_rate", "rate_low", "rate_high"), (length, "accepted_length", "low", "high"))
    for i, step in enumerate(steps):
        part = frame[frame[axis] == step].set_index(place).reindex(places)
        x = np.arange(len(places)) + (i - (len(steps) - 1) / 2) * thick
        look = {"color": SHADES[i % len(SHADES)], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "white"}
        for ax, value, low, high in panels:
            error = np.abs(np.stack([part[value] - part[low], part[high] - part[value]]))
            label = f"{step:g}" if ax is rate else None
            ax.bar(x, part[value], thick, yerr=error, error_kw={"elinewidth": 0.7}, label=label, linewidth=0.3, **look)
            ax.grid(axis="x", visible=False)
    rate.set_ylabel("acceptance rate")
    rate.yaxis.set_major_formatter(PercentFormatter(1, 0))
    length.set_ylabel("accepted length")
    length.set_xticks(range(len(places)), places)
    legend(figure, [f"{step:g}" for step in steps], axis.rpartition(".")[2].replace("_", " "))
    return figure


@styled
def reliability(rows: Sequence[dict], slots: Sequence[int] | None = None) -> Figure:
    """Reliability diagrams before and after calibration, a panel per slot: predicted survival against the observed
    rate.

    The area of a dot grows with its share of the rounds; the expected calibration error (ECE) is printed above, and
    below it the ECE that a head without error would exceed one time in twenty (of the last side drawn).

    Args:
        rows: what `specbench calibrate` writes to reliability.json: slot, calibrated, n, ece and reliability (count,
            predicted, observed by bin).
        slots: which slots to draw; None takes up to four, spread over the block.
    """
    rows = [row for row in rows if row.get("reliability")]
    known = sorted({row["slot"] for row in rows})
    if not known:
        raise ValueError("no slot has a reliability diagram; calibrate on rounds with confidences")
    few = known if len(known) <= 4 else [known[round(i * (len(known) - 1) / 3)] for i in range(4)]
    slots = few if slots is None else list(slots)
    width = COLUMN if len(slots) <= 2 else PAGE
    # Panels are square: their width decides the height, and above and below stand legend, title and label.
    figure = Figure(figsize=(width, (width - 0.45) / max(2, len(slots)) + 1.1))
    grid = figure.subplots(1, len(slots), squeeze=False, sharey=True)
    looked = {False: ("#D55E00", "s", "--", "before"), True: ("#0072B2", "o", "-", "after")}
    for ax, slot in zip(grid.flat, slots, strict=True):
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.7, zorder=1)
        errors, bands = [], []
        for row in (row for row in rows if row["slot"] == slot):
            color, marker, line, name = looked[bool(row["calibrated"])]
            count, predicted, observed = (np.asarray(row["reliability"][k]) for k in ("count", "predicted", "observed"))
            seen = count > 0
            ax.plot(predicted[seen], observed[seen], line, color=color, linewidth=0.9, zorder=2)
            area = 3 + 60 * count[seen] / count.sum()
            dot = {"color": color, "marker": marker, "linewidths": 0.3, "edgecolors": "white", "zorder": 3}
            ax.scatter(predicted[seen], observed[seen], area, label=name, **dot)
            errors.append(f"{row['ece']:.3f}")
            bands.append(row.get("ece_band"))
        noise = f"\nperfect head: below {bands[-1]:.3f}" if bands and bands[-1] is not None else ""
        ax.set(title=f"slot {slot}\nECE {' → '.join(errors)}{noise}", xlabel="predicted survival")
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
        ax.set_yticks((0, 0.5, 1), ("0", "0.5", "1"))
    grid.flat[0].set_ylabel("observed survival")
    for handle in legend(figure, ("before", "after")).legend_handles:
        handle.set_sizes([12])
    return figure


@styled
def frontier(points: pd.DataFrame, policy: str = "policy") -> Figure:
    """Throughput against interactivity, a line per policy, a dot per load; up and to the right is better.

    Args:
        points: columns `policy`, interactivity (tokens per second and user), throughput (tokens per second), and
            optionally concurrency, which labels the ends of the first line.
    """
    shown = looks(points[policy])
    figure = Figure(figsize=(COLUMN, 2.6))
    ax = figure.subplots()
    for name, line in points.groupby(policy, sort=False):
        line = line.sort_values("interactivity")
        ax.plot(line["interactivity"], line["throughput"], label=name, **shown[name].line())
    ax.set(xlabel="tokens / s for each user", ylabel="tokens / s in total", yscale="log")
    ax.grid(which="minor", linewidth=0.2)
    figure.legend(
        loc="outside upper center", ncols=max(1, min(len(shown), int(COLUMN / (0.06 * max(map(len, shown)) + 0.45))))
    )
    return figure


@styled
def training(metrics: pd.DataFrame, names: Sequence[str], labels: dict[int, str], smooth: float = 0.0) -> Figure:
    """Training curves against the optimiser step, a panel per metric, a line per run (runs of one label have the same
    style).

    Args:
        metrics: `folders.metrics`: source, step, name, value.
        names: which metrics, one panel each.
        labels: variant of each source.
        smooth: weight of the past in an exponential moving average, 0 for none; the raw curve is drawn faintly behind
        it.
    """
    shown = looks(labels.values())
    width = COLUMN if len(names) == 1 else PAGE
    figure = Figure(figsize=(width, 2.25))
    grid = figure.subplots(1, len(names), squeeze=False)
    for ax, name in zip(grid.flat, names, strict=True):
        part = metrics[(metrics["name"] == name) & metrics["source"].isin(list(labels))]
        drawn = set()
        for source, line in part.sort_values("step").groupby("source", sort=False):
            label = labels[source]
            look = shown[label].line() | {"marker": "" if len(line) > MANY else shown[label].marker}
            values = line["value"]
            if smooth and len(line) > MANY:
                ax.plot(line["step"], values, color=shown[label].color, alpha=0.2, linewidth=0.6)
                values = values.ewm(alpha=1 - smooth).mean()
            ax.plot(line["step"], values, label=None if label in drawn else label, **look)
            drawn.add(label)
        ax.set(xlabel="optimiser step", title=name)
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    handles, texts = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, texts, loc="outside upper center", ncols=max(1, min(len(shown), 4 if width == COLUMN else 6))
    )
    return figure
