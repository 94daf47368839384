"""Stages: skipped when finished, continued when cut, refused where another is; what is there stays until the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specbench.cli.identity import content, identity
from specbench.cli.stages import MARKER, Stage
from specbench.files.atomic import write_json
from specbench.files.folder_swap import beside

REPOSITORY = Path(__file__).resolve().parents[1]


CONFIG: dict[str, Any] = {
    "root": "outputs",
    "force": False,
    "name": None,
    "tracking": {"mode": "auto", "tags": []},
    "method": {"name": "dspark", "draft": {"layers": 2, "block_size": 7}},
    "target": {"name": "embedded", "id": "package:data/embedded", "threads": 1, "device": "auto"},
    "trainer": {
        "max_steps": 300,
        "recipe": {"lr": 0.002, "log_every": 10},
        "data": {"threads": 2, "samples_per_micro": 8},
        "lightning": {"devices": 1, "precision": "32-true", "accelerator": "auto"},
    },
    "cache": None,
    "seed": {"init": 0},
    "batch_size": 16,
    "temperatures": [0.0],
}
FREE = (
    *("root", "force", "name", "tracking.mode", "tracking.tags", "target.threads", "target.device", "batch_size"),
    *("trainer.recipe.log_every", "trainer.data.threads", "trainer.lightning.devices", "trainer.lightning.accelerator"),
    "temperatures",
)
BOUND = (
    *("method.name", "method.draft.layers", "method.draft.block_size", "target.name", "target.id", "trainer.max_steps"),
    *("trainer.recipe.lr", "trainer.data.samples_per_micro", "trainer.lightning.precision", "seed.init"),
)


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {**config, head: changed(config[head], rest, value) if rest else value}


def attempt(
    folder: Path,
    config: dict[str, Any] = CONFIG,
    *,
    force: bool = False,
    error: BaseException | None = None,
    text: str = "one",
) -> str:
    """One try of a stage that writes two files; `error` ends it between them."""
    with Stage("train", folder, config, force=force, results=("draft/*", "summary.json")) as stage:
        if not stage.done:
            (stage.work / "draft").mkdir(exist_ok=True)
            (stage.work / "draft" / "weights").write_text(text)
            if error is not None:
                raise error
            (stage.work / "summary.json").write_text("{}")
            stage.finish({"steps": 3}, next="specbench evaluate")
        assert stage.summary == {"steps": 3}
    return stage.state


def every_byte(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_finished_stage_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attempt(tmp_path / "mine") == "new"
    out, err = capsys.readouterr()
    assert "train: done in" in out and "steps: 3" in out and "specbench evaluate" in out and err == ""
    assert attempt(tmp_path / "mine") == "done"
    assert "skipped" in capsys.readouterr().err


@pytest.mark.parametrize("key", FREE)
def test_settings_that_leave_the_result_alone_change_nothing(tmp_path: Path, key: str) -> None:
    attempt(tmp_path / "mine")
    before = every_byte(tmp_path)
    assert attempt(tmp_path / "mine", changed(CONFIG, key, "another")) == "done"
    assert every_byte(tmp_path) == before


@pytest.mark.parametrize("key", BOUND)
@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_is_refused_and_told_until_forced(tmp_path: Path, key: str, finished: bool) -> None:
    folder = tmp_path / "mine"
    if finished:
        attempt(folder)
    else:
        with pytest.raises(KeyboardInterrupt):
            attempt(folder, error=KeyboardInterrupt())
    before = every_byte(tmp_path)
    other = changed(CONFIG, key, "another")
    with pytest.raises(ValueError, match=re.escape(key) + r": \S+ -> another.*another name= or root=, or force=true"):
        attempt(folder, other)
    assert every_byte(tmp_path) == before
    # Forced work that fails or is stopped leaves what was there, and the same command goes on with it.
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            attempt(folder, other, force=True, error=error, text="two")
        assert {k: v for k, v in every_byte(tmp_path).items() if k.startswith("mine/")} == before
    with pytest.raises(ValueError, match="force=true"):
        attempt(folder, other)
    assert attempt(folder, other, force=True, text="two") == "resume"
    assert (folder / "draft" / "weights").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert attempt(folder, other) == "done"


def test_force_redoes_what_is_finished_and_continues_what_it_began(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    with pytest.raises(KeyboardInterrupt):
        attempt(folder, force=True, error=KeyboardInterrupt())
    assert attempt(folder, force=True) == "resume"
    assert attempt(folder, force=True, text="two") == "forced"
    assert (folder / "draft" / "weights").read_text() == "two"
    third = changed(CONFIG, "seed.init", 3)
    with pytest.raises(KeyboardInterrupt):
        attempt(folder, changed(CONFIG, "seed.init", 2), force=True, error=KeyboardInterrupt())
    assert attempt(folder, third, force=True, text="three") == "forced"  # not what was begun beside it
    assert (folder / "draft" / "weights").read_text() == "three"


def test_a_cut_stage_resumes_under_its_own_configuration(tmp_path: Path) -> None:
    for number, error in enumerate((KeyboardInterrupt(), ValueError("x"))):
        with pytest.raises(type(error)):
            attempt(tmp_path / str(number), error=error)
        assert attempt(tmp_path / str(number)) == "resume"


def test_a_kill_between_the_end_of_the_work_and_the_swap(tmp_path: Path) -> None:
    folder, other = tmp_path / "mine", changed(CONFIG, "seed.init", 1)
    attempt(folder)
    pid = os.fork()
    if pid == 0:
        os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        attempt(folder, other, force=True, text="two")
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert (folder / "draft" / "weights").read_text() == "one" and beside(folder).is_dir()
    assert attempt(folder, other) == "done"  # it was complete: the next process only gives it its name
    assert (folder / "draft" / "weights").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "altered": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_finished_is_what_it_claims_to_be(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    attempt(tmp_path / "mine")
    file = tmp_path / "mine" / "draft" / "weights"
    DAMAGE[damage](file)
    left = file.read_bytes() if file.exists() else None
    assert attempt(tmp_path / "mine") == "resume"
    assert str(file) in capsys.readouterr().err and file.read_text() == "one"
    kept = file.with_name("weights.changed")
    assert (kept.read_bytes() if kept.exists() else None) == left  # somebody may have wanted what was changed
    assert attempt(tmp_path / "mine") == "done"


def test_a_marker_without_its_files_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not written"), Stage("x", tmp_path, {}, results=("*.jsonl",)) as stage:
        stage.finish()
    assert json.loads((tmp_path / MARKER).read_text())["status"] == "failed"
    # As earlier versions wrote it, without claims.
    write_json(tmp_path / MARKER, {"status": "finished", "summary": {}, "config": {}, "stage": "x", "seconds": 1})
    with Stage("x", tmp_path, {}, results=("*.jsonl",)) as stage:
        assert stage.resumes
    write_json(tmp_path / MARKER, {"status": "finished", "summary": {}, "config": {}, "stage": "x", "seconds": 1})
    (tmp_path / "a.jsonl").touch()
    with Stage("x", tmp_path, {}, results=("*.jsonl",)) as stage:
        assert stage.done


def test_a_run_of_unknown_making_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "summary.json").write_text('{"status": "finished"}')
    with pytest.raises(ValueError, match="what it was made from is not known"):
        attempt(folder)
    assert {path.name for path in folder.iterdir()} <= {".lock", "summary.json"}
    assert attempt(folder, force=True) == "forced"


def test_inputs_count_by_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = tmp_path / "a" / "draft"
    draft.mkdir(parents=True)
    (draft / "config.json").write_text("{}")
    (draft / "model.safetensors").write_bytes(b"weights")
    (draft / "README.md").write_text("about")
    config = {"draft": str(draft), "root": str(tmp_path)}

    def state(config: dict[str, Any], folder: Path) -> str:
        with Stage("evaluate", folder, config) as stage:
            if not stage.done:
                stage.finish()
        return stage.state

    assert state(config, tmp_path / "e") == "new"
    # Moved, named from elsewhere, or by the run that it belongs to: the same weights.
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / "draft" / "README.md").write_text("about something else")
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "b" / "draft"), "b/draft", "./b", f"{tmp_path}/b/../b/draft"):
        assert state({**config, "draft": name, "root": "."}, Path("e")) == "done"
    (tmp_path / "b" / "draft" / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(ValueError, match=r"draft: \S+ \(\w+\) -> b/draft \(\w+\)"):
        state({**config, "draft": "b/draft"}, tmp_path / "e")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_identities_are_equal_exactly_where_nothing_that_counts_differs(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(FREE + BOUND), max_size=4, unique=True))
    other = CONFIG
    for key in keys:
        other = changed(other, key, data.draw(st.sampled_from(["x", 17, None, [1]])))
    then, now = identity("train", CONFIG), identity("train", other)
    lines = now.against("train", {"config": then.settings, "inputs": then.inputs})
    assert {line.partition(":")[0] for line in lines} == set(keys) & set(BOUND)
    assert (then.code == now.code) == (not lines)


def test_time_is_measured_for_one_device_and_one_number_of_threads() -> None:
    config = {"device": "cpu", "batch_size": 1, "target": {"threads": 1}, "root": "a"}
    for key, counts in (("device", True), ("batch_size", True), ("target.threads", True), ("root", False)):
        assert (identity("speed", config) != identity("speed", changed(config, key, "b"))) == counts, key


def test_large_files_are_known_by_size_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specbench.cli.identity.SAMPLED", 1000)
    monkeypatch.setattr("specbench.cli.identity.BLOCK", 10)
    monkeypatch.setattr("specbench.cli.identity.BLOCKS", 5)
    file = tmp_path / "weights"
    file.write_bytes(bytes(5000))
    first = content([file])
    for at in (0, 4999):
        file.write_bytes(bytes(at) + b"x" + bytes(4999 - at))
        assert content([file]) != first
    file.write_bytes(bytes(5001))
    assert content([file]) != first


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
