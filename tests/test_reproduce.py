"""specbench reproduce: its plan, its refusals, and a small experiment from nothing to its table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments.cli import main
from experiments.reproduce import cost_of_a_run
from specbench.cli.assembly import composed
from specbench.cli.stages import MARKER
from specbench.cli.studies import Study
from specbench.files.atomic import write_json
from tests.pipeline import prepare

SMALL = ["method=dflash", "tracking=disabled"]


def test_the_plan_is_printed_and_nothing_starts_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "table1_main", *SMALL, f"root={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert "3 trainings on embedded, 3 of them to do; 2 evaluations each" in said.out
    assert "add yes=true" in said.err
    assert not list(tmp_path.iterdir())


def test_the_name_of_an_experiment_needs_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "tabel1_main"]) == 2
    assert "did you mean 'table1_main'?" in capsys.readouterr().err


def test_the_cost_of_a_run_is_the_mean_of_those_that_finished(tmp_path: Path) -> None:
    job = composed("train", ["trainer.max_steps=100"])
    stated, source = cost_of_a_run(tmp_path, job, 2)
    assert stated is not None and "stated" in source
    assert cost_of_a_run(tmp_path, composed("train", ["target.name=other"]), 2) == (None, "")
    here = {"target": {"name": "embedded"}}
    for kind, name, seconds, status, config in (
        ("train", "a", 10.0, "finished", here | {"trainer": {"max_steps": 100}}),
        ("train", "b", 20.0, "finished", here | {"trainer": {"max_steps": 100}}),
        ("train", "c", 900.0, "failed", here | {"trainer": {"max_steps": 100}}),
        ("train", "d", 900.0, "finished", here | {"trainer": {"max_steps": 999}}),
        ("evaluate", "e", 4.0, "finished", here),
        ("evaluate", "f", 900.0, "finished", {"target": {"name": "other"}}),
    ):
        write_json(tmp_path / "runs" / kind / name / MARKER, {"seconds": seconds, "status": status, "config": config})
    assert cost_of_a_run(tmp_path, job, 2) == (15.0 + 2 * 4.0, "mean of the finished runs here")


def test_simulations_replay_the_rounds_of_each_draft_against_the_baselines(tmp_path: Path) -> None:
    study = Study("load", "?", [], simulations=[["profile=a"]], baseline={"method": "mtp", "policy": "mtp_1"})
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    expected = ["profile=a", f"rounds={ours}", f"policies.mtp_1.rounds={theirs}"]
    assert study.servings(["mtp", "dspark"], [theirs, ours]) == [expected]
    with pytest.raises(ValueError, match="leave out method="):
        study.servings(["dspark"], [ours])


@pytest.mark.long
def test_an_experiment_from_nothing_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*prepare(tmp_path), "seed.init=0", "method=dspark", "yes=true"]
    source = f"data.source.paths=[{tmp_path / 'chats.jsonl'}]"
    stages = ['stages.prompts=["decontaminate=null","near_duplicate=null","validation=0.3"]']
    words = ["reproduce", "fig3_depth", *settings, source, *stages, 'stages.answers=["max_new_tokens=24"]']
    assert main(words) == 0
    table = pd.read_csv(tmp_path / "compare" / "fig3_depth" / "accepted_length.csv")
    assert len(table) >= 4
    assert (tmp_path / "compare" / "fig3_depth" / "figures" / "accepted_length_by_method_draft_layers.pdf").exists()
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr()
    assert "4 trainings on embedded, 0 of them to do" in said.out
    assert said.err.count("train: finished before, skipped") == 4
