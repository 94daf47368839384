"""Stages: skipped when finished, continued when cut, done again when the configuration is another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from specbench.cli.progress import Progress
from specbench.cli.stages import Stage, duration

REPOSITORY = Path(__file__).resolve().parents[1]


def attempt(folder: Path, config: dict[str, object], force: bool = False, error: BaseException | None = None) -> str:
    with Stage("answers", folder, config, force=force) as stage:
        if not stage.done:
            if error is not None:
                raise error
            stage.finish({"answers": 3}, next="specbench cache")
        assert stage.summary == {"answers": 3}
    return stage.state


def test_a_finished_stage_is_skipped_until_something_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config: dict[str, object] = {"steps": 4, "method": {"depth": 1}, "root": "a", "force": False}
    assert attempt(tmp_path, config) == "new"
    out, err = capsys.readouterr()
    assert "answers: done in" in out and "answers: 3" in out and str(tmp_path) in out and "specbench cache" in out
    assert err == ""
    assert attempt(tmp_path, {**config, "root": "b", "force": True}) == "done"
    assert "skipped" in capsys.readouterr().err
    assert attempt(tmp_path, {**config, "method": {"depth": 2}}) == "changed"
    assert "method.depth: 1 -> 2" in capsys.readouterr().err
    assert attempt(tmp_path, {**config, "method": {"depth": 2}}, force=True) == "forced"


def test_a_cut_stage_resumes_only_under_its_own_configuration(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt(), ValueError("x")):
        with pytest.raises(type(error)):
            attempt(tmp_path, {"steps": 4}, error=error)
        with Stage("answers", tmp_path, {"steps": 4}) as stage:
            assert stage.resumes
        with Stage("answers", tmp_path, {"steps": 5}) as stage:
            assert stage.state == "changed" and not stage.resumes
        (tmp_path / "stage.json").unlink()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys; from specbench.cli.stages import Stage\n"
        "with Stage('cache', sys.argv[1], {}) as stage: print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"in\n"
        with pytest.raises(ValueError, match=f"being written by process {process.pid} on"), Stage("x", tmp_path, {}):
            pass
        process.kill()
    with Stage("cache", tmp_path, {}) as stage:
        assert stage.resumes


def test_other_ranks_neither_lock_nor_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stage("train", tmp_path, {"a": 1}) as first:
        monkeypatch.setenv("RANK", "1")
        with Stage("train", tmp_path, {"a": 1}) as second:
            second.finish({"other": 1})
        monkeypatch.delenv("RANK")
        first.finish({"mine": 1})
    with Stage("train", tmp_path, {"a": 1}) as third:
        assert third.done and third.summary == {"mine": 1}


def test_progress_lines_have_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with Progress("answers", 1200, "prompts", start=200, every=10.0) as bar:
        for _ in range(4):
            clock[0] += 5.0
            bar.advance(50, note="loss 2.1")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "answers: 300/1200 prompts, 10.0 prompts/s, 1 min 30 s left, loss 2.1",
        "answers: 400/1200 prompts, 10.0 prompts/s, 1 min 20 s left, loss 2.1",
        "answers: 400/1200 prompts, 10.0 prompts/s, 1 min 20 s left, loss 2.1",
    ]


def test_durations_read_well() -> None:
    assert [duration(s) for s in (4.24, 60, 200, 7500)] == ["4.2 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]
