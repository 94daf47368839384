"""What an evaluation shows on W&B: headline numbers, the table by slot and two figures, from its own record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from analysis.statistics.headline import headline
from specbench.library.tracked_evaluation import log_evaluation, reliability
from specbench.runs.run_folder import RunFolder
from specbench.runs.tracked_run import tracked
from specbench.runs.wandb_tracking import Tracking
from tests.analysis.synthetic import simulate
from tests.test_syncing import clean
from tests.wandblog import offline_run


def rounds(run: RunFolder, confident: bool) -> None:
    """Rounds whose confidence is right: slot k is accepted with the probability that the head states."""
    generator = np.random.default_rng(0)
    for prompt in range(20):
        logits = generator.normal(1.0, 1.0, (30, 3))
        hits = generator.random((30, 3)) < 1 / (1 + np.exp(-logits))
        accepted = hits.cumprod(1).sum(1)
        committed = int(accepted.sum()) + len(accepted)
        line = {
            "prompt_ids": [prompt],
            "output_ids": [1] * (1 + committed),
            "proposed": [3] * 30,
            "accepted": accepted.tolist(),
        }
        line |= {"seconds": [0.1] * 30, "confidence": logits.tolist() if confident else None}
        run.append_rounds(line)


@pytest.mark.parametrize("confident", [True, False])
def test_a_tracked_evaluation_shows_its_numbers_and_figures(
    confident: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean(monkeypatch)
    numbers = headline(simulate("dspark", 6))
    with tracked(Tracking("offline"), RunFolder(tmp_path, "evaluate", "one", {})) as (run, tracking):
        rounds(run, confident)
        log_evaluation(tracking, run, "dspark", numbers)
        run.finish(metrics=numbers)
    value, shown = numbers["accepted_length"], offline_run(run.path)
    assert shown.summary["accepted_length"] == value["value"] and shown.summary["accepted_length/low"] == value["low"]
    assert shown.tables == ["slots"]
    drawn = {"conditional_acceptance", *(["reliability"] if confident else [])}
    assert {file.stem for file in (run.path / "figures").iterdir()} == drawn
    for name in drawn:
        assert image.imread(run.path / "figures" / f"{name}.png")[..., :3].std() > 0.05
        assert list(run.path.glob(f"wandb/offline-run-*/files/media/images/figures/{name}_*.png"))
    (table,) = run.path.glob("wandb/offline-run-*/files/media/table/slots_*.json")
    rows = json.loads(table.read_text())["data"]
    assert [row[:2] for row in rows] == [[row["slot"], row["conditional"]] for row in numbers["slots"]]
    judged = reliability(run)
    assert [row["slot"] for row in judged] == ([1, 2, 3] if confident else [])
    assert all(row["ece"] < 0.1 and row["n"] == 600 for row in judged)


def test_nothing_is_drawn_where_tracking_is_disabled(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "evaluate", "quiet", {}) as run:
        log_evaluation(Tracking("disabled").start(run), run, "dspark", headline(simulate("dspark", 2)))
    assert not (run.path / "figures").exists()
