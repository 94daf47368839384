"""Offline W&B runs, uploaded by W&B's own client to a server of the tests, and read back as any project is.

The test server answers what the client was seen to ask. W&B's own server is met only where there is a key.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.compare import compare
from analysis.read import runs
from experiments.cli import main
from specbench.files.folder_swap import beside, swap
from specbench.runs.run_folder import RunFolder
from specbench.runs.stage_output import StageOutput
from specbench.runs.tracked_run import tracked
from specbench.runs.wandb_sync import offline_runs
from specbench.runs.wandb_tracking import Tracking
from tests.analysis.synthetic import SCHEMA, simulate
from tests.wandbserver import Wandb, wandb_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    clean(monkeypatch)
    with wandb_server() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        yield running


def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that tracking sets, as it was afterwards."""
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_SILENT", "WANDB_ENTITY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def evaluated(root: Path, project: str, method: str = "dspark") -> Path:
    """A finished evaluation with records and an artifact, tracked offline."""
    rows = simulate(method, 4)
    draft = root / "draft"
    draft.mkdir(exist_ok=True)
    (draft / "config.json").write_text(json.dumps({"method": method}))
    config = {"method": method, "draft": {"layers": 2}, "seed": {"init": 3}}
    with RunFolder(root, "evaluate", f"{method}-run", config) as run:
        tracking = Tracking("offline", project).start(run, {"method": method, "target": "qwen3_4b"})
        table = pa.Table.from_pylist([{**row, "run": run.name} for row in rows], schema=SCHEMA)
        pq.write_table(table, run.path / "records.parquet")
        tracking.artifact(f"draft-{method}", "draft", draft)
        run.finish(method=method, target="qwen3_4b", suite="paper")
        tracking.finish()
    return run.path


def same(local: runs.Runs, remote: runs.Runs) -> None:
    """The same records, and the same facts of the run but for where they lie."""
    frames = [frame.records.drop(columns=["source", "prompt"]) for frame in (local, remote)]
    texts = frames[0].select_dtypes("category").columns
    pd.testing.assert_frame_equal(*(frame.astype(dict.fromkeys(texts, str)) for frame in frames))
    pd.testing.assert_frame_equal(*(frame.runs.drop(columns="path") for frame in (local, remote)))


def test_a_run_that_is_synced_reads_back_as_it_lies_here(server: Wandb, tmp_path: Path, capsys, monkeypatch) -> None:
    run = evaluated(tmp_path, "lab")
    monkeypatch.chdir(tmp_path)
    assert main(["sync", f"root={tmp_path}"]) == 0
    assert "1 of 1 runs uploaded and verified" in capsys.readouterr().out
    assert not server.unknown and offline_runs(tmp_path) == [] and not (tmp_path / "wandb").exists()
    (artifact,) = server.artifacts.values()
    assert (artifact["artifactCollectionName"], artifact["artifactTypeName"]) == ("draft-dspark", "draft")
    assert server.files[f"/artifacts/{artifact['id']}/config.json"] == (tmp_path / "draft/config.json").read_bytes()
    same(runs.load(run), runs.load("wandb:me/lab", cache=tmp_path / "cache"))
    made = [compare(source, tmp_path / str(number), resamples=50, draw=False, cache=tmp_path / "cache")
            for number, source in enumerate((run, "wandb:me/lab"))]  # fmt: skip
    for name, frame in made[0].frames.items():
        pd.testing.assert_frame_equal(frame, made[1].frames[name])
    assert main(["sync", f"root={tmp_path}"]) == 0
    assert "nothing to upload" in capsys.readouterr().out


def test_a_stage_without_a_run_folder_is_uploaded_and_not_compared(server: Wandb, tmp_path: Path, capsys) -> None:
    run = evaluated(tmp_path, "lab")
    facts = {"seeds": {"data": 0}, "command": ["specbench", "cache"]}
    output = StageOutput("cache", "cache-feed", tmp_path / "cache" / "feed", {"codec": "bf16"}, facts)
    with tracked(Tracking("offline", "lab"), output, target="tiny") as (cache, _):
        cache.finish(samples=3)
    assert main(["sync", f"root={tmp_path}"]) == 0
    assert "2 of 2 runs uploaded and verified" in capsys.readouterr().out and not server.unknown
    (there,) = (found for found in server.runs.values() if found["jobType"] == "cache")
    record = json.loads(server.files[f"/runs/{there['name']}/record/summary.json"])
    assert record["samples"] == 3 and record["status"] == "finished"
    read = runs.load("wandb:me/lab", cache=tmp_path / "read")
    assert read.runs["run"].tolist() == [run.name] and read.faults.empty
    with pytest.raises(ValueError, match="that has a run folder"):
        runs.load(f"wandb:me/lab/{there['name']}", cache=tmp_path / "read")


@pytest.mark.parametrize("moved", ["root", "into the place of an older run"])
def test_a_run_that_was_moved_is_uploaded_whole(server: Wandb, tmp_path: Path, capsys, moved: str) -> None:
    """W&B's offline log names files by the absolute paths at which they lay when the run was made."""
    root = tmp_path / "made"
    work = beside(root / "runs" / "train" / "mine") if moved != "root" else root / "runs" / "train" / "mine"
    with Tracking("offline", "lab") as tracking, RunFolder(root, "train", "mine", {}, folder=work) as run:
        tracking.start(run)
        tracking.table("slots", ["a"], [[1]])
        (run.path / "draft").mkdir()
        (run.path / "draft" / "weights").write_bytes(b"weights")
        tracking.artifact("draft-mine", "draft", run.path / "draft")
        run.finish()
        tracking.finish()
    if moved == "root":
        shutil.move(root, tmp_path / "moved")
    else:
        assert main(["sync", f"root={root}"]) == 0
        assert "nothing to upload" in capsys.readouterr().out  # not before it is complete
        swap(root / "runs" / "train" / "mine")
    assert main(["sync", f"root={tmp_path}"]) == 0
    assert "1 of 1 runs uploaded and verified" in capsys.readouterr().out
    (artifact,) = [a for a in server.artifacts.values() if a["artifactTypeName"] == "draft"]
    assert server.files[f"/artifacts/{artifact['id']}/weights"] == b"weights"
    assert not work.exists() and not work.is_symlink()


def test_what_did_not_arrive_is_named_and_sent_again(server: Wandb, tmp_path: Path, capsys) -> None:
    """W&B's client ends well and marks the run as synced in both cases."""
    evaluated(tmp_path, "lab")
    server.loses = {"draft-dspark", "record/records.parquet"}
    assert main(["sync", f"root={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert "artifact draft-dspark did not arrive" in said.err and "record/records.parquet did not arrive" in said.err
    assert "1 of 1 runs did not arrive whole" in said.err and "0 of 1 runs uploaded" in said.out
    server.loses = set()
    assert main(["sync", f"root={tmp_path}"]) == 0
    assert "1 of 1 runs uploaded and verified" in capsys.readouterr().out
    assert {artifact["state"] for artifact in server.artifacts.values()} == {"COMMITTED"}


def test_a_file_that_arrived_damaged_is_named(server: Wandb, tmp_path: Path, capsys) -> None:
    evaluated(tmp_path, "lab")
    server.damages = {"record/summary.json"}
    assert main(["sync", f"root={tmp_path}"]) == 2
    assert "record/summary.json arrived damaged" in capsys.readouterr().err


@pytest.mark.online
@pytest.mark.skipif(not os.environ.get("WANDB_API_KEY"), reason="no WANDB_API_KEY: W&B's own server is not met")
def test_the_same_on_the_server_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, sync, read back, delete, in a project of its own name below the key's own entity."""
    import wandb

    clean(monkeypatch)
    project = f"specbench-test-{uuid.uuid4().hex[:8]}"
    run = evaluated(tmp_path, project)
    assert main(["sync", f"root={tmp_path}"]) == 0
    server = wandb.Api()
    try:
        source = f"wandb:{server.default_entity}/{project}"
        same(runs.load(run), runs.load(source, cache=tmp_path / "cache"))
    finally:
        for remote in server.runs(f"{server.default_entity}/{project}"):
            remote.delete(delete_artifacts=True)
