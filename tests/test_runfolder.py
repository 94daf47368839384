"""The run folder: whole files, strict JSON, and a readable record after every way of ending."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from specbench.files.atomic import changes, plain, replacing, write_json
from specbench.runs.folder_logger import FolderLogger
from specbench.runs.provenance import differences, provenance, source_state
from specbench.runs.run_folder import RunFolder, read_lines, read_summary
from specbench.runs.run_schema import COLUMNS

REPOSITORY = Path(__file__).resolve().parents[1]
RECORD = {
    "run": "one", "method": "dspark", "target": "tiny", "suite": "quick", "benchmark": "maths", "domain": "maths",
    "prompt_id": "m-1", "turn": 0, "temperature": 0.0, "scheduler": "fixed", "accounting": "specbench",
    "thinking": False, "seed": 1, "prompt_tokens": 9, "output_tokens": 12, "truncated": False, "rounds": 4,
    "committed": 11, "proposed": 28, "accepted": 7, "seconds": 0.5, "histogram": [[7, 0, 1], [7, 2, 2], [7, 3, 1]],
}  # fmt: skip


def script(code: str, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_finished_run_holds_everything(tmp_path: Path) -> None:
    config = {"method": {"block_size": 7}, "seed": 1, "path": tmp_path}
    with RunFolder(tmp_path, "evaluate", "one", config) as run:
        assert read_summary(run.path)["status"] == "running"
        run.log({"loss": torch.tensor(2.5), "rate": np.float32(0.5), "bad": math.nan, "worse": -math.inf}, step=3)
        run.append_rounds({"prompt_ids": [1, 2], "proposed": np.array([7, 7]), "accepted": (3, 0)})
        run.write_records([RECORD])
        facts, diff = provenance(["specbench", "evaluate"], {"decoding": 1}, {"fingerprint": "feed"}, "<s>hello")
        run.write_provenance(facts, diff)
        run.update(method="dspark", lineage={"cache": "feed"})
        run.finish(metrics={"accepted_length": {"value": np.float64(2.75), "low": 2.5, "high": 3, "n": 4}})

    assert run.path == tmp_path / "runs" / "evaluate" / "one"
    summary = read_summary(run.path)
    assert summary["schema"] == "specbench.run/1" and summary["status"] == "finished"
    assert summary["metrics"]["accepted_length"] == {"value": 2.75, "low": 2.5, "high": 3, "n": 4}
    assert summary["lineage"] == {"cache": "feed"} and summary["metrics_not_finite"] == 2
    (line,) = read_lines(run.path / "metrics.jsonl")
    assert (line["step"], line["loss"], line["rate"], line["bad"], line["worse"]) == (3, 2.5, 0.5, None, None)
    assert read_lines(run.path / "rounds.jsonl") == [{"prompt_ids": [1, 2], "proposed": [7, 7], "accepted": [3, 0]}]
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {**config, "path": str(tmp_path)}
    table = pq.read_table(run.path / "records.parquet")
    assert table.schema.names == COLUMNS.names and table.to_pylist() == [{**RECORD, "thinking": "false"}]
    found = json.loads((run.path / "provenance.json").read_text())
    assert found["command"] == ["specbench", "evaluate"] and found["versions"]["torch"] == torch.__version__
    assert found["first_prompt"] == "<s>hello" and found["cache"] == {"fingerprint": "feed"}
    assert not list(run.path.glob("*.tmp"))


def test_records_must_have_exactly_the_columns(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "evaluate", "one", {}) as run:
        with pytest.raises(ValueError, match=r"record 1 lacks \['seed'\] and has unknown columns \['sead'\]"):
            wrong = {key: value for key, value in RECORD.items() if key != "seed"} | {"sead": 1}
            run.write_records([RECORD, wrong])
        assert not (run.path / "records.parquet").exists()


def test_strict_json_refuses_and_names_what_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.slots\[1\] is nan"):
        write_json(tmp_path / "x.json", {"metrics": {"slots": [1.0, np.nan]}})
    with pytest.raises(ValueError, match="a is inf"):
        plain({"a": torch.tensor(math.inf)})
    with pytest.raises(ValueError, match="of type object"):
        plain({"a": object()})
    assert not list(tmp_path.iterdir())
    assert plain({1: (np.int64(2), {3}), "t": torch.ones(2, dtype=torch.bool)}) == {"1": [2, [3]], "t": [True, True]}


def test_status_after_an_error_and_after_ctrl_c(tmp_path: Path) -> None:
    for error, status in ((RuntimeError("broken"), "failed"), (KeyboardInterrupt(), "interrupted")):
        with pytest.raises(type(error)), RunFolder(tmp_path, "train", status, {}) as run:
            run.update(method="dspark")
            raise error
        summary = read_summary(run.path)
        assert summary["status"] == status and summary["method"] == "dspark"
    assert read_summary(tmp_path / "runs" / "train" / "failed")["error"] == "RuntimeError: broken"


def test_a_killed_run_reads_as_unfinished_and_continues(tmp_path: Path) -> None:
    code = """
import sys, time
from specbench.runs.run_folder import RunFolder
run = RunFolder(sys.argv[1], "train", "killed", {"seed": 1}).open()
for step in range(5):
    run.log({"loss": 1.0 / (step + 1)}, step)
with open(run.path / "metrics.jsonl", "a") as file:
    file.write('{"step": 5, "lo')
print("ready", flush=True)
time.sleep(60)
"""
    folder = tmp_path / "runs" / "train" / "killed"
    with script(code, str(tmp_path)) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert read_summary(folder)["status"] == "running"
        process.send_signal(signal.SIGKILL)
    assert read_summary(folder)["status"] == "unfinished"
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4]

    with RunFolder(tmp_path, "train", "killed", {"seed": 1}) as run:
        run.log({"loss": 0.1}, 5)
    summary = read_summary(folder)
    assert summary["status"] == "finished" and len(summary["starts"]) == 2
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]

    (folder / "checkpoints").mkdir()
    with RunFolder(tmp_path, "train", "killed", {"seed": 2}, fresh=True):
        pass
    assert not (folder / "metrics.jsonl").exists() and not (folder / "checkpoints").exists()
    assert len(read_summary(folder)["starts"]) == 1


@pytest.mark.parametrize("disk", ["limit", "tmpfs"])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, disk: str) -> None:
    if disk == "tmpfs":
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], check=False).returncode:
            pytest.skip("mounting a small disk needs root")
        limit = ""
    else:
        limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    code = f"""
import sys
from specbench.files.atomic import write_json
from specbench.runs.run_folder import RunFolder, read_summary
run = RunFolder(sys.argv[1], "train", "full", {{}}).open()
write_json(run.path / "facts.json", {{"kept": 1}})
{limit}
try:
    write_json(run.path / "facts.json", {{"big": "x" * 200_000}})
except OSError as error:
    print(error.errno)
"""
    try:
        with script(code, str(tmp_path)) as process:
            out, errors = process.communicate(timeout=300)
        assert out.strip() in ("28", "27"), errors  # ENOSPC, EFBIG
        folder = tmp_path / "runs" / "train" / "full"
        assert json.loads((folder / "facts.json").read_text()) == {"kept": 1}
        assert not list(folder.glob("*.tmp"))
        assert read_summary(folder)["status"] == "unfinished"
    finally:
        if disk == "tmpfs":
            subprocess.run(["umount", str(tmp_path)], check=True)


def test_replacing_keeps_the_old_file_on_any_error(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(RuntimeError), replacing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_folders_are_named_safely(tmp_path: Path) -> None:
    for name in ("", "a/b", "..", ".hidden"):
        with pytest.raises(ValueError, match="cannot name a run folder"):
            RunFolder(tmp_path, "train", name, {})
    with pytest.raises(ValueError, match="not 'training'"):
        RunFolder(tmp_path, "training", "a", {})


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "train", "rank1", {}, writes=False) as run:
        FolderLogger(run).log_metrics({"loss": 1.0}, 1)
        run.write_records([RECORD])
        run.append_rounds({})
        run.write_provenance({})
    assert not list(tmp_path.iterdir())


def test_another_schema_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"schema": "specbench.run/9", "status": "finished"})
    with pytest.raises(ValueError, match=r"specbench\.run/9"):
        read_summary(tmp_path)


def test_source_state_sees_commits_changes_and_new_files(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    folder = tmp_path.resolve()
    assert source_state(folder)[0]["commit"] is None
    git("init")
    (tmp_path / "a.py").write_text("one\n")
    git("add", "a.py")
    git("commit", "-m", "first")
    clean, diff = source_state(folder)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False and diff == ""
    (tmp_path / "a.py").write_text("two\n")
    (tmp_path / "b.py").write_text("new\n")
    dirty, diff = source_state(folder)
    assert dirty["commit"] == clean["commit"] and dirty["dirty"] and list(dirty["untracked"]) == ["b.py"]
    assert "-one" in diff and "+two" in diff


def test_differences_name_key_then_and_now() -> None:
    then = {"versions": {"torch": "1", "numpy": "2"}, "time": "x", "seeds": {"init": 1}}
    now = {"versions": {"torch": "3", "numpy": "2"}, "time": "y", "seeds": {"init": 1, "anchors": 2}}
    assert differences(then, now) == ["versions.torch: 1 -> 3", "seeds.anchors: None -> 2"]
    assert changes({"a": [1, 2], "b": {"c": 1}}, {"a": [1, 2], "b": {"c": 1}}) == []
