"""`specbench status`, `docs` and `completion`: where a user is, what to read, and what a word can become."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.cli import main
from specbench.cli.assembly import composed
from specbench.cli.completion import answers
from specbench.cli.inventory import items, next_command
from specbench.cli.overrides import leaves
from specbench.cli.stages import Stage
from specbench.cli.verbs import VERBS
from specbench.files.folder_swap import beside

REPOSITORY = Path(__file__).resolve().parents[1]
Capture = pytest.CaptureFixture[str]


def finished(root: Path, kind: str, name: str, summary: dict, next: str | None = None) -> Path:
    folder = root / kind / name
    with Stage(kind.rpartition("/")[2], folder, {"a": 1}, results=("x.bin",)) as stage:
        (stage.work / "x.bin").write_bytes(b"0" * 1500)
        stage.finish(summary, next=next)
    return folder


def test_status_knows_what_is_complete_running_failed_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["specbench", "cache", f"root={tmp_path}", "api_key=${oc.env:KEY}"])
    finished(tmp_path, "prompts", "embedded", {"train": 60, "validation": 12}, "specbench answers")
    finished(tmp_path, "answers", "embedded/qwen", {"answers": 60}, "specbench cache")
    with pytest.raises(OSError), Stage("cache", tmp_path / "cache" / "0a", {}) as _:
        raise OSError("gone")
    Stage("train", tmp_path / "runs/train/killed", {}).__enter__()._release()
    (tmp_path / "cache" / "no-stage").mkdir()
    with Stage("evaluate", tmp_path / "runs/evaluate/now", {}):
        found = {(item.kind, item.name): item for item in items(tmp_path)}
    assert {key: item.status for key, item in found.items()} == {
        ("prompts", "embedded"): "complete",
        ("answers", "embedded/qwen"): "complete",
        ("cache", "0a"): "failed",
        ("train", "killed"): "left unfinished",
        ("evaluate", "now"): "in progress",
    }
    assert found["prompts", "embedded"].facts == {"train": 60, "validation": 12}
    assert found["prompts", "embedded"].bytes >= 1500
    why, command = next_command(list(found.values()))
    assert command.startswith("specbench cache root=") and "left unfinished" in why and "${oc.env:KEY}" in command


def test_what_comes_next_follows_from_the_newest(tmp_path: Path) -> None:
    assert next_command(items(tmp_path))[1] == "specbench quickstart"
    assert next_command([], tmp_path / "a b")[1] == f"specbench quickstart 'root={tmp_path}/a b'"
    assert next_command([], tmp_path, [tmp_path])[1] == f"specbench status root={tmp_path}"
    for kind, then in (("prompts", "specbench answers data=x"), ("answers", "specbench cache data=x")):
        time.sleep(0.02)
        finished(tmp_path, kind, "a/b" if kind == "answers" else "a", {}, then)
        assert next_command(items(tmp_path))[1] == then
    page = tmp_path / "compare" / "all" / "report.html"
    page.parent.mkdir(parents=True)
    time.sleep(0.02)
    page.write_text("<p>")
    assert next_command(items(tmp_path))[1] == str(page)


def test_work_beside_a_finished_folder_is_shown(tmp_path: Path) -> None:
    folder = finished(tmp_path, "prompts", "a", {})
    with Stage("prompts", folder, {"a": 2}, force=True) as stage:
        assert stage.work == beside(folder)
        assert {item.name: item.status for item in items(tmp_path)} == {"a": "complete", "a (new)": "in progress"}


def test_the_page_and_its_json_say_the_same(tmp_path: Path, capsys: Capture) -> None:
    finished(tmp_path / "quickstart", "prompts", "a", {"train": 1200}, "specbench answers")
    assert main(["status", f"root={tmp_path}/quickstart"]) == 0
    said = capsys.readouterr()
    assert "1,200 train" in said.out and said.out.rstrip().endswith("specbench answers")
    assert main(["status", f"root={tmp_path}/quickstart", "json=true"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [item["facts"] for item in data["items"]] == [{"train": 1200}]
    assert data["next"]["command"] == "specbench answers"
    assert main(["status", f"root={tmp_path}"]) == 0
    assert f"specbench status root={tmp_path}/quickstart" in capsys.readouterr().out


def test_an_unreadable_summary_is_no_end_of_the_page(tmp_path: Path) -> None:
    (finished(tmp_path, "prompts", "a", {}) / "stage.json").write_text("{")
    finished(tmp_path, "prompts", "b", {})
    assert {item.name: item.status for item in items(tmp_path)} == {"a": "unreadable", "b": "complete"}


@pytest.mark.parametrize(
    "text",
    [
        '{"status":"finished","summary":null,"command":5,"next":["x"]}',
        '{"status":["failed"],"summary":[1],"command":"rm -rf x","next":{"a":1}}',
        '{"status":"fail\\u001b[2J","summary":{"samples":NaN},"command":"specbench cache\\nrm -rf x"}',
    ],
)
def test_foreign_markers_neither_end_the_page_nor_reach_the_terminal(
    tmp_path: Path, text: str, capsys: Capture
) -> None:
    (folder := tmp_path / "cache" / "a\nb\x1b[31m").mkdir(parents=True)
    (folder / "stage.json").write_text(text)
    assert main(["status", f"root={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "a\\nb\\x1b[31m" in shown
    assert not any(line.strip().startswith("rm -rf") for line in shown.splitlines())
    assert main(["status", f"root={tmp_path}", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["items"]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "cache" / "folder" / "stage.json").mkdir(parents=True)
    for kind, pipe in (("cache", "stage.json"), ("train", ".lock")):
        folder = tmp_path / ("cache/pipe" if kind == "cache" else "runs/train/pipe")
        folder.mkdir(parents=True)
        os.mkfifo(folder / pipe)
    (tmp_path / "runs/train/pipe/summary.json").write_text('{"status": "running"}')
    (tmp_path / "cache" / "broken").symlink_to("nothing")
    found = {item.name: item.status for item in items(tmp_path) if item.kind == "cache"}
    assert found == {"folder": "unreadable", "pipe": "unreadable"}
    assert [item.status for item in items(tmp_path) if item.kind == "train"] == ["left unfinished"]


def test_specbench_alone_says_where_you_are_without_torch(tmp_path: Path) -> None:
    finished(tmp_path / "outputs", "prompts", "a", {}, "specbench answers data=a")
    code = (
        "import sys; from experiments.cli import main; code = main([]); "
        "heavy = [m for m in ('torch', 'hydra', 'pyarrow') if m in sys.modules]; print(heavy); sys.exit(code)"
    )
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "specbench answers data=a" in done.stdout and done.stdout.endswith("[]\n")


def test_docs_lists_every_page_and_prints_one(capsys: Capture) -> None:
    assert main(["docs"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {page.stem}" in listed for page in (REPOSITORY / "docs").glob("*.md"))
    assert main(["docs", "evaluation"]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "docs" / "evaluation.md").read_text()
    assert main(["docs", "evaluatoin"]) == 2
    assert "did you mean 'evaluation'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tra", ["train"]),
        ("train meth", ["method="]),
        ("train method=ds", ["method=dspark"]),
        ("train -m method=dspark,mt", ["method=dspark,mtp"]),
        ("train trainer.recipe.lr", ["trainer.recipe.lr="]),
        ("train trainer=node trainer.recipe.lr", ["trainer.recipe.lr="]),
        ("train online=", ["online=false", "online=true"]),
        ("evaluate accounting=", ["accounting=deepspec", "accounting=specbench"]),
        ("train +experiment=fig2", ["+experiment=fig2_position"]),
        ("train --mu", ["--multirun"]),
        ("speed dec", ["decode"]),
        ("completion z", ["zsh"]),
        ("train cache=", []),
        ("nothing ", []),
    ],
)
def test_a_word_becomes_what_the_verb_takes(line: str, found: list[str]) -> None:
    assert answers(line.split(" "), VERBS) == found


@pytest.mark.parametrize("verb", ["train", "evaluate", "quickstart"])
def test_every_setting_that_completes_can_be_set(verb: str) -> None:
    known = set(leaves(composed(VERBS[verb].config)))
    starts = ["", *(f"{group}." for group in ("trainer", "method", "target", "tracking", "clock"))]
    offered = {word.removesuffix("=") for start in starts for word in answers([verb, start], VERBS) if word[-1] == "="}
    deep = {word for word in offered if "." in word}
    assert deep and deep <= known


def test_bash_completes_words_that_it_has_split_at_the_sign(tmp_path: Path) -> None:
    program = tmp_path / "specbench"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m experiments.cli "$@"\n')
    program.chmod(0o755)
    script = 'eval "$(specbench completion bash)"\n' + "".join(
        f'COMP_WORDS=(specbench {words}); COMP_CWORD={words.count(" ") + 1}; _specbench; echo "${{COMPREPLY[*]}}"\n'
        for words in ("eva", "train meth", "train method = ds", "train method =")
    )
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    methods = sorted(file.stem for file in (REPOSITORY / "configs" / "method").glob("*.yaml"))
    assert done.stdout.splitlines() == ["evaluate", "method=", "dspark", " ".join(methods)], done.stderr


def test_completion_imports_neither_torch_nor_hydra(tmp_path: Path) -> None:
    code = (
        "import sys; from experiments.cli import main; main(['--complete', 'train', 'method', '=', 'ds']); "
        "print([m for m in ('torch', 'hydra', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["method=dspark", "[]"], done.stderr
