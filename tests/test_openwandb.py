"""Runs on a server that speaks W&B's protocol and is not ours: what arrives there, online and from offline runs.

openwandb's licence forbids commercial use: it is for this test only. It answers none of the queries by which W&B's
client and our reader ask what a project holds, so what arrived is read from the server's own folder and database.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb

from experiments.cli import main
from specbench.runs.run_folder import RunFolder
from specbench.runs.tracked_run import tracked
from specbench.runs.wandb_tracking import Tracking
from tests.test_syncing import clean, evaluated

pytestmark = [
    pytest.mark.openwandb,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(importlib.util.find_spec("openwandb") is None, reason="needs openwandb (docs/experiments.md)"),
]
KEY = f"local{'0' * 40}"  # the key that the server prints when it starts


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    """Address and folder of a running server."""
    folder = tmp_path_factory.mktemp("openwandb")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "openwandb", "serve", "--host", "127.0.0.1", "-p", str(port)]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([*command, "--data-dir", str(folder)], stdout=log, stderr=log)
    try:
        until = time.monotonic() + 300
        while "startup complete" not in (folder / "log").read_text():
            assert time.monotonic() < until and process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", folder
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def there(server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The server's folder; this process tracks on it."""
    clean(monkeypatch)
    wandb.teardown()  # the client of a process reads the environment once
    monkeypatch.setenv("WANDB_BASE_URL", server[0])
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return server[1]


def rows(folder: Path, table: str, run: str) -> list[dict]:
    with sqlite3.connect(folder / "openwandb.db") as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(f"SELECT * FROM {table} WHERE run_id = ?", (run,))]


def arrived_whole(folder: Path, run: Path) -> dict:
    """The run's row; the record that the server keeps is, byte for byte, the one in the run folder's mirror."""
    id = json.loads((run / "tracking.json").read_text())["id"]
    (row,) = rows(folder, "runs", id)
    (stored,) = folder.glob(f"files/*/*/{id}")
    mirrored = sorted((run / "wandb" / "record").iterdir())
    assert mirrored
    for file in mirrored:
        assert (stored / "record" / file.name).read_bytes() == file.read_bytes(), file.name
    return row


def test_an_online_run_arrives_while_it_is_made(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Record, summary, state and job type; the server never confirms the artifact, which is said and ends nothing."""
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "weights").write_bytes(b"weights")
    with tracked(Tracking("online", "lab"), RunFolder(tmp_path, "train", "one", {"layers": 2}), method="eagle3") as (
        run,
        tracking,
    ):
        tracking.uses("cache-x", "cache")
        tracking.artifact("draft-one", "draft", tmp_path / "draft")
        run.finish(method="eagle3", steps=3)
    row = arrived_whole(there, run.path)
    assert row["display_name"] == "one" and row["state"] == "finished"
    assert json.loads(row["summary_json"])["steps"] == 3
    assert "W&B did not confirm the artifact draft-one" in capsys.readouterr().err


def test_an_offline_run_arrives_with_sync_and_what_cannot_be_verified_is_said(
    there: Path, tmp_path: Path, capsys
) -> None:
    run = evaluated(tmp_path, "lab")
    assert main(["sync", f"root={tmp_path}"]) == 2
    assert "W&B does not say what it holds" in capsys.readouterr().err
    row = arrived_whole(there, run)
    assert row["state"] == "finished" and "dspark" in row["config_json"]
