"""Every verb's run on W&B: made offline by the command line, read back with W&B's own reader."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from experiments.cli import main
from specbench.files.atomic import read_json
from specbench.runs.run_folder import RunFolder, read_summary
from specbench.runs.run_schema import KINDS, OUTPUTS
from specbench.runs.stage_output import StageOutput
from specbench.runs.tracked_run import tracked
from specbench.runs.wandb_sync import offline_runs
from specbench.runs.wandb_tracking import Tracking
from tests.test_serving import drawn, written
from tests.test_syncing import clean
from tests.wandblog import offline_run


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clean(monkeypatch)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def place(root: Path, kind: str) -> RunFolder | StageOutput:
    if kind in KINDS:
        return RunFolder(root, kind, "mine", {"seed": 3})
    return StageOutput(kind, "mine", root / kind, {"seed": 3}, {"seeds": {"data": 3}})


@pytest.mark.parametrize(
    ("kind", "end", "status"),
    [
        ("train", None, "finished"),
        ("train", "SIGTERM", "interrupted"),
        ("cache", ValueError("x"), "failed"),
        ("cache", KeyboardInterrupt(), "interrupted"),
    ],
    ids=str,
)
def test_a_run_ends_on_disk_and_on_wandb_as_its_block_ends(tmp_path: Path, kind: str, end: object, status: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with (
        suppress(ValueError, KeyboardInterrupt),
        tracked(Tracking("offline"), place(tmp_path, kind), target="tiny") as (run, wandb),
    ):
        run.finish(steps=4, metrics={"loss": {"value": 0.5, "low": 0.25}}, lineage={"parents": []})
        wandb.rows("points", [{"x": 1, "y": float("nan")}, {"x": 2, "z": "a", "skipped": [1]}])
        if end == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif isinstance(end, BaseException):
            raise end
    assert signal.getsignal(signal.SIGTERM) is before
    found = offline_run(run.path)
    assert (found.job_type, found.name, found.exit_code) == (kind, "mine", 0 if end is None else 1)
    assert found.config["kind"] == kind and found.config["target"] == "tiny" and found.config["settings"] == {"seed": 3}
    assert {key: found.summary[key] for key in ("steps", "loss", "loss/low")} == {
        "steps": 4,
        "loss": 0.5,
        "loss/low": 0.25,
    }
    assert read_json(run.path / "wandb" / "record" / "summary.json", {})["status"] == status
    (table,) = run.path.glob("wandb/offline-run-*/files/media/table/points_*.json")
    assert json.loads(table.read_text()) == {"columns": ["x", "y", "z"], "data": [[1, None, None], [2, None, "a"]]}
    if isinstance(run, RunFolder):
        assert read_summary(run.path)["status"] == status
    else:  # its own record is stage.json, which the stage writes
        assert not (run.path / "summary.json").exists() and found.config["provenance"] == {"seeds": {"data": 3}}


def test_a_handler_of_somebody_else_stays(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with tracked(Tracking("disabled"), place(tmp_path, "train")) as (run, _):
            os.kill(os.getpid(), signal.SIGTERM)
        assert read_summary(run.path)["status"] == "finished"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("kind", ["train", "cache"])
def test_disabled_leaves_nothing_of_wandb(tmp_path: Path, kind: str) -> None:
    with tracked(Tracking("disabled"), place(tmp_path, kind)) as (run, wandb):
        wandb.rows("points", [{"x": 1}])
        run.finish(steps=4)
    assert not list(tmp_path.rglob("wandb")) and not list(tmp_path.rglob("tracking.json"))


def test_kinds_are_apart() -> None:
    assert not set(KINDS) & set(OUTPUTS)
    with pytest.raises(ValueError, match="is one of prompts, answers"):
        StageOutput("train", "x", Path("x"), {}, {})


def test_the_stages_before_training_leave_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = tmp_path / "chats.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"What is {n} + 3?"}]} for n in range(11, 17)]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    root = tmp_path / "root"
    common = [f"root={root}", "data=jsonl", "tracking=offline", "tracking.group=mine"]
    source = [f"data.source.paths=[{chats}]", "decontaminate=null", "near_duplicate=null", "validation=0.3"]
    assert main(["prompts", *common, *source]) == 2
    failed = offline_run(root / "prompts" / "jsonl")
    assert (failed.job_type, failed.exit_code) == ("prompts", 1) and "read" not in failed.summary
    record = read_json(root / "prompts" / "jsonl" / "wandb" / "record" / "summary.json", {})
    assert record["status"] == "failed" and "line 7" in record["error"]

    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["prompts", *common, *source, "force=true"]) == 0
    for verb, more in (("answers", ["max_new_tokens=8"]), ("cache", [])):
        assert main([verb, *common, *more]) == 0, capsys.readouterr().err
    (cache,) = (folder for folder in (root / "cache").iterdir() if not folder.name.startswith("."))
    folders = {"prompts": root / "prompts/jsonl", "answers": root / "answers/jsonl/embedded", "cache": cache}
    assert {folder.resolve() for folder in offline_runs(root)} == {path.resolve() for path in folders.values()}
    runs = {verb: offline_run(folder) for verb, folder in folders.items()}
    for verb, found in runs.items():
        assert (found.job_type, found.config["kind"], found.exit_code) == (verb, verb, 0)
        assert found.config["settings"]["root"] == str(root) and found.config["provenance"]["versions"]["torch"]
        assert found.config["data"] == "jsonl" and '"run_group":"mine"' in found.text
    assert [runs[v].name for v in folders] == ["prompts-jsonl", "answers-jsonl-embedded", f"cache-{cache.name}"]
    assert runs["prompts"].summary["read"] == 6
    asked = runs["prompts"].summary["train"]
    assert runs["answers"].summary["answered"] == asked and runs["answers"].summary["missing"] == 0
    manifest = read_json(cache / "manifest.json", {})
    assert runs["cache"].summary["samples"] == asked and runs["cache"].config["fingerprint"] == manifest["fingerprint"]
    assert runs["cache"].summary["bytes"] > 0 and runs["cache"].config["target"] == "embedded"


def test_a_calibration_and_a_simulated_load_leave_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [f"root={tmp_path}", "tracking=offline"]
    rounds = written(tmp_path / "rounds", drawn(30))
    assert main(["calibrate", *common, f"rounds={rounds}"]) == 0
    found = offline_run(tmp_path / "calibrate" / "calibration")
    assert (found.job_type, found.name, found.exit_code) == ("calibrate", "calibrate-calibration", 0)
    assert found.summary["ece_after"] >= 0 and found.summary["prompts_fitted"] > 0 and found.tables == ["slots"]
    assert found.config["settings"]["rounds"] == str(rounds)

    policies = [f"policies.{name}=null" for name in ("hardware_aware", "delayed_global")]
    assert main(["serve", *common, f"rounds={rounds}", "concurrency=[2]", "steps=5", "warmup=1", *policies]) == 0
    folder = tmp_path / "runs" / "serve" / "serve"
    found, summary = offline_run(folder), read_summary(folder)
    assert (found.job_type, found.name, found.exit_code) == ("serve", "serve", 0)
    assert found.tables == ["points", "service_levels"] and summary["status"] == "finished"
    assert found.summary["best_throughput"] == summary["best_throughput"] > 0
    assert read_json(folder / "provenance.json", {})["seeds"] == {"load": 0}
