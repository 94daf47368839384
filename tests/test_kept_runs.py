"""From the command line: what is finished stays as it is until a command says force=true and has something better."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.cli import main
from specbench.runs.run_folder import read_summary
from tests.pipeline import prepare

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = ["method=dflash", "name=mine", "evaluate=false"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A root with prompts, answers, a cache, a training and an evaluation, all of them small."""
    root = tmp_path_factory.mktemp("kept") / "out"
    root.mkdir()
    common = prepare(root)
    assert main(["train", *common, *SMALL]) == 0
    assert main(["evaluate", *evaluating(root, common)]) == 0
    return root, common


def evaluating(root: Path, common: list[str]) -> list[str]:
    kept = [word for word in common if not word.startswith(("data=", "trainer"))]
    return [*kept, f"draft={root / 'runs' / 'train' / 'mine'}", "name=mine", "max_new_tokens=4"]


def every_byte(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# A command on what is there, and what its one sentence says.
REFUSED = {
    "train trainer.recipe.lr=0.5": "trainer.recipe.lr: 0.002 -> 0.5",
    "train trainer.recipe.lr=zero": "trainer.recipe.lr",
    "train trainer.max_steps=3": "trainer.max_steps: 2 -> 3",
    "train method=dspark": "method.name: dflash -> dspark",
    "train seed.data=1": "seed.data: 0 -> 1",
    "train trainer.lightning.precision=16-mixed force=true": "use bf16-mixed or 32-true",
    "train trainer.lightning.precision=bf16-mixed": "trainer.lightning.precision: 32-true -> bf16-mixed",
    "train start=random": "start: auto -> random",
    "train tracking=online force=true": "no W&B key",
    "train method.objective.nothing=1 force=true": "nothing",
    "train +method.draft.nothing=1 force=true": "nothing",
    "train name=../mine force=true": "name",
    "train trainer.max_steps=0 force=true": "trainer.max_steps",
    "evaluate temperature=0.5": "temperature: 0.0 -> 0.5",
    "evaluate max_new_tokens=5": "max_new_tokens: 4 -> 5",
    "evaluate draft=plain": "draft: ",
    "evaluate draft=plain audit=true force=true": "audit=true",
    "evaluate scheduler=threshold": "scheduler",
    "evaluate scheduler=threshold confidence_threshold=0.5 force=true": "confidence_threshold=0.5",
    "evaluate suite.turns=some force=true": "turns",
    "answers max_new_tokens=25": "max_new_tokens: 24 -> 25",
    "answers count=2": "answers and 2 are asked for",
    "answers chunk=0 force=true": "chunk",
    "answers count=0": "count",
    "answers force=true servers=[http://127.0.0.1:9/v1]": "no server answers",
    "prompts validation=0.5": "validation: 0.3 -> 0.5",
    "prompts validation=1.5 force=true": "validation",
    "prompts data.source.paths=[nowhere.jsonl] force=true": "nowhere.jsonl",
    "cache codec=nothing force=true": "codec",
}


@pytest.mark.parametrize("command", REFUSED)
def test_a_refused_command_leaves_every_byte(
    made: tuple[Path, list[str]], command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, common = made
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(root / "no-netrc"))
    verb, *changes = command.split()
    source = [f"data.source.paths=[{root / 'chats.jsonl'}]", "decontaminate=null"]
    words = {
        "train": [*common, *SMALL],
        "evaluate": evaluating(root, common),
        "answers": [*common[:2], "max_new_tokens=24"],
        "prompts": [*common[:2], *source, "near_duplicate=null", "validation=0.3"],
        "cache": common[:2],
    }[verb]
    keys = {word.partition("=")[0].lstrip("+") for word in changes}
    before = every_byte(root)
    capsys.readouterr()
    kept = [word for word in words if word.partition("=")[0] not in keys]
    assert main([verb, *kept, *changes]) == 2
    said = capsys.readouterr().err
    assert REFUSED[command] in said and "Traceback" not in said
    assert every_byte(root) == before
    assert {p.name for p in root.glob("runs/*/*")} == {"mine"}


@pytest.mark.parametrize("mode", ["banana", "on line"])
def test_an_environment_that_cannot_be_is_told_before_anything(
    made: tuple[Path, list[str]], mode: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, common = made
    before = every_byte(root)
    monkeypatch.setenv("WANDB_MODE", mode)
    words = [word for word in common if not word.startswith("tracking")]
    assert main(["train", *words, *SMALL, "force=true", "tracking=auto"]) == 2
    assert f"WANDB_MODE={mode}" in capsys.readouterr().err
    assert every_byte(root) == before


@pytest.mark.parametrize(
    "changes",
    [
        ["trainer.recipe.log_every=7", "target.threads=2", "tracking=offline", "trainer.data.threads=1"],
        ["evaluate=false", "temperatures=[1.0]", "limit=3", "batch_size=2"],
        ["root={relative}"],
    ],
)
def test_what_leaves_the_result_alone_is_still_finished(
    made: tuple[Path, list[str]],
    changes: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, common = made
    monkeypatch.chdir(root.parent)
    changes = [word.format(relative="./out") for word in changes]
    keys = {word.partition("=")[0] for word in changes}
    words = [word for word in [*common, *SMALL] if word.partition("=")[0] not in keys]
    before = every_byte(root)
    assert main(["train", *words, *changes]) == 0
    assert "finished before, skipped" in capsys.readouterr().err
    assert every_byte(root) == before


def test_a_moved_root_is_as_finished_as_it_was(
    made: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, common = made
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)
    shutil.move(moved, tmp_path / "moved")
    words = [word.replace(str(root), str(tmp_path / "moved")) for word in common]
    assert prepare(tmp_path / "moved") == words
    assert main(["train", *words, *SMALL]) == 0
    assert main(["evaluate", *evaluating(tmp_path / "moved", words)]) == 0
    assert capsys.readouterr().err.count("finished before, skipped") == 5


@pytest.mark.parametrize("name", ["20260101", "nan", "1e5", "true"])
def test_a_name_is_a_text(made: tuple[Path, list[str]], tmp_path: Path, name: str) -> None:
    root, common = made
    cache = next((root / "cache").iterdir())
    words = [word for word in common if not word.startswith("root=")] + [f"root={tmp_path}", f"cache={cache}"]
    shutil.copytree(root / "prompts", tmp_path / "prompts")
    assert main(["train", *words, "method=dflash", "evaluate=false", f"name={name}"]) == 0
    assert [path.name for path in (tmp_path / "runs" / "train").iterdir()] == [name]
    assert read_summary(tmp_path / "runs" / "train" / name)["name"] == name


def damaged(root: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "out"
    shutil.copytree(root, copied)
    return copied


@pytest.mark.parametrize("cut", [0, 1, 40, 200])
def test_answers_that_were_cut_are_answered_again(made: tuple[Path, list[str]], tmp_path: Path, cut: int) -> None:
    root, _ = made
    lines = damaged(root, tmp_path) / "answers" / "jsonl" / "embedded" / "answers.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(whole[:-cut] if cut else b"")
    assert main(["answers", f"root={tmp_path / 'out'}", "data=jsonl", "max_new_tokens=24"]) == 0
    assert sorted(lines.read_bytes().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize("file", ["shard-00000.tar", "index.parquet", "tables.safetensors"])
def test_a_cache_that_was_cut_is_built_again(made: tuple[Path, list[str]], tmp_path: Path, file: str) -> None:
    root, _ = made
    (folder,) = (damaged(root, tmp_path) / "cache").iterdir()
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    assert main(["cache", f"root={tmp_path / 'out'}", "data=jsonl"]) == 0
    assert (folder / file).read_bytes() == whole


@pytest.mark.parametrize(
    ("verb", "file"),
    [("train", "draft/model.safetensors"), ("evaluate", "records.parquet"), ("evaluate", "rounds.jsonl")],
)
def test_a_run_without_its_results_is_made_whole(
    made: tuple[Path, list[str]], tmp_path: Path, verb: str, file: str
) -> None:
    root, common = made
    path = damaged(root, tmp_path) / "runs" / verb / "mine" / file
    whole = path.read_bytes()
    path.unlink()
    words = [word.replace(str(root), str(tmp_path / "out")) for word in common]
    words = [*words, *SMALL] if verb == "train" else evaluating(tmp_path / "out", words)
    assert main([verb, *words]) == 0
    if file != "records.parquet":  # its bytes hold when it was written
        assert path.read_bytes() == whole
    assert path.is_file()


QUICK = {
    "steps=0": "steps",
    "codec=bogus": "codec",
    "methods=[]": "methods",
    "methods=[dflash,dflash]": "methods",
    "methods=[nothing]": "nothing",
    "temperatures=[-1]": "temperature",
    "temperatures=[]": "temperatures",
    "held_out=3": "held_out=3",
    "max_new_tokens=0": "max_new_tokens",
    "benchmark_prompts=0": "benchmark_prompts",
    "clock.repeats=0": "repeats",
    "seed=-1": "seed",
    "tracking=online": "no W&B key",
}


@pytest.mark.parametrize("changes", QUICK)
def test_a_quickstart_checks_all_of_its_stages_first(
    tmp_path: Path, changes: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    words = ["methods=[dflash]", "tracking=disabled", f"root={tmp_path / 'out'}"]
    keys = {word.partition("=")[0] for word in changes.split()}
    kept = [word for word in words if word.partition("=")[0] not in keys]
    assert main(["quickstart", *kept, *changes.split()]) == 2
    assert QUICK[changes] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_reproduce_and_sweeps_check_every_job_first(
    made: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, common = made
    words = ["tracking=disabled", f"root={tmp_path / 'out'}", "yes=true"]
    assert main(["reproduce", "fig7_8_load", *words, "method=dspark"]) == 2
    assert "leave out method=" in capsys.readouterr().err
    assert main(["reproduce", "table1_main", *words, "codec=bogus"]) == 2
    assert "codec" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    before = every_byte(root)
    # The second job would be refused, so the first one does not begin.
    swept = [word for word in SMALL if not word.startswith("name")]
    assert main(["train", "-m", *common, *swept, "name=first,mine", "trainer.recipe.lr=0.1"]) == 2
    assert "trainer.recipe.lr: 0.002 -> 0.1" in capsys.readouterr().err
    assert main(["train", "-m", *common, *swept, "name=same", "trainer.recipe.lr=0.1,0.2"]) == 2
    assert "several jobs of this sweep would write to" in capsys.readouterr().err
    assert every_byte(root) == before


@pytest.mark.long
def test_a_killed_replacement_leaves_the_old_run_and_ends_as_one_that_never_stopped(
    made: tuple[Path, list[str]], tmp_path: Path
) -> None:
    root, common = made
    copied = damaged(root, tmp_path)
    words = [word.replace(str(root), str(copied)) for word in common if not word.startswith("trainer.max_steps")]
    longer = ["train", *words, "trainer.max_steps=24", "trainer.probe.every=4", "method=dflash", "evaluate=false"]
    assert main([*longer, "name=straight"]) == 0
    straight = read_summary(copied / "runs" / "train" / "straight")["lineage"]["checkpoint"]
    old = every_byte(copied / "runs" / "train" / "mine")
    command = [sys.executable, "-m", "experiments.cli", *longer, "name=mine", "force=true"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    kills = 0
    for seconds in (0.0, 0.05, 0.3, 1.0):
        with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE) as process:
            new = copied / "runs" / "train" / ".mine.new" / "checkpoints" / "last.ckpt"
            deadline = time.monotonic() + 120
            while not new.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(seconds)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
        if process.returncode == 0:
            break
        left = every_byte(copied / "runs" / "train" / "mine")
        assert left == old or read_summary(copied / "runs" / "train" / "mine")["status"] == "finished"
    assert kills >= 2
    if read_summary(copied / "runs" / "train" / "mine")["lineage"]["checkpoint"] != straight:
        assert main([*longer, "name=mine", "force=true"]) == 0
    assert read_summary(copied / "runs" / "train" / "mine")["lineage"]["checkpoint"] == straight
    assert {p.name for p in (copied / "runs" / "train").iterdir()} == {"mine", "straight"}
    marker = json.loads((copied / "runs" / "train" / "mine" / "stage.json").read_text())
    assert marker["status"] == "finished" and marker["config"]["trainer"]["max_steps"] == 24
