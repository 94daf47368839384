"""The paper's numbers in our figures: the committed values, where the axes are the same, and only when asked for."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.figures import acceptance as figures
from analysis.figures import curves, overlay
from analysis.html.content import Drawing
from analysis.read import runs
from analysis.tables import frames as tables
from analysis.tables import groups as grouping
from analysis.tables.published import table
from tests.analysis.synthetic import simulate, write_run


@pytest.mark.parametrize(
    ("targets", "asked", "drawn"),
    [
        (["qwen3_4b"], None, True),
        (["Qwen/Qwen3-4B", "qwen3_4b"], None, True),
        (["embedded"], None, False),
        (["qwen3_4b", "qwen3_8b"], None, False),
        (["embedded"], True, True),
        (["qwen3_4b"], False, False),
    ],
)
def test_they_are_drawn_when_asked_for_or_for_the_target_of_the_paper(targets, asked, drawn):
    assert overlay.wanted(targets, asked) is drawn


def test_curves_of_figure_2_stand_in_the_panels_of_their_domains(tmp_path):
    for method in ("dspark", "mtp"):
        write_run(tmp_path, method, simulate(method, 4, slots=5))
    frame = tables.conditional_by_domain(grouping.collect(runs.load(tmp_path)), 20)
    figure = figures.by_slot(frame)
    (drawing,) = overlay.overlaid([Drawing("conditional_acceptance", figure, "Ours.")])
    assert drawing.caption == "Ours. Thin: paper, Qwen3-4B, figure 2, read off to 0.01."
    paper = table("fig2_conditional_acceptance").query("method == 'dspark' and slot <= 5")
    for ax in figure.axes:
        lines = [line for line in ax.lines if line.get_label() == "_paper, Qwen3-4B"]
        (line,) = lines  # dspark's: the paper has no mtp, and dflash is not among ours
        own = paper[paper["domain"] == ax.get_title()]
        np.testing.assert_array_equal(line.get_ydata(), own["conditional_acceptance"])
        np.testing.assert_array_equal(line.get_xdata(), own["slot"])
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "paper, Qwen3-4B"


def test_levels_of_figure_5_stand_over_their_domains():
    rows = [
        {"domain": domain, "threshold": step, "acceptance_rate": 0.7, "rate_low": 0.6, "rate_high": 0.8,
         "accepted_length": 4.0, "low": 3.8, "high": 4.2} for domain in ("math", "prose") for step in (0.0, 0.5)
    ]  # fmt: skip
    figure = curves.threshold(pd.DataFrame(rows), "threshold")
    (drawing,) = overlay.overlaid([Drawing("threshold_dspark", figure, "Ours.")])
    assert drawing.caption.endswith("figure 5.")
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_label()[:1] == "_"]
    levels = {line.get_ydata()[0] for line in lines if np.ptp(line.get_xdata()) == pytest.approx(0.92)}
    assert levels == {0.769, 0.925}  # math alone: the paper has no prose


def test_errors_of_figure_6_stand_in_the_panels_of_their_slots():
    bins = {"count": [4, 10], "predicted": [0.2, 0.8], "observed": [0.1, 0.6]}
    rows = [
        {"slot": slot, "calibrated": c, "n": 14, "ece": 0.2, "reliability": bins} for slot in (1, 2) for c in (0, 1)
    ]
    figure = curves.reliability(rows)
    overlay.overlaid([Drawing("reliability_head", figure, "Ours.")])
    said = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert said == [["paper, Qwen3-4B:\nECE 0.057 → 0.020"], []]


def test_other_figures_stay_as_they_are():
    frame = pd.DataFrame({"benchmark": ["a"], "variant": ["dspark"], "accepted_length": [1.0], "low": 0.9, "high": 1.1})
    figure = figures.bars(frame)
    drawing = Drawing("suffix_decay", figure, "Ours.")
    assert overlay.overlaid([drawing]) == [drawing]
