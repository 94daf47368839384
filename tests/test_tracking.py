"""W&B offline for real: what a run leaves in its folder, read back with W&B's own reader."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import lightning
import pytest
import torch

from specbench.runs import wandb_account as account
from specbench.runs.run_folder import RunFolder, read_lines
from specbench.runs.wandb_sync import offline_runs, sync
from specbench.runs.wandb_tracking import Tracking
from tests.wandblog import inspect, offline_run


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials of the machine, and the environment as it was afterwards."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_SILENT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


class Line(lightning.LightningModule):
    """The smallest module that logs a curve."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_offline_run_mirrors_the_folder(tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "config.json").write_text("{}")
    config = {"seed": 3, "trainer": {"max_steps": 4}}
    tracking = Tracking(project="lab", group="figure-2", tags=["tiny"])
    with RunFolder(tmp_path, "train", "dspark", config) as run:
        tracking.start(run, {"method": "dspark", "target": "tiny", "seed": 3})
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=4, logger=tracking.loggers, log_every_n_steps=1, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(8, 1)))
        tracking.table("slots", ["slot", "conditional"], [[1, 0.5], [2, torch.tensor(0.25)]])
        tracking.uses("cache-feed", "cache", fingerprint="feed")
        digest = tracking.artifact("draft-dspark", "draft", draft, steps=4)
        run.finish(method="dspark", metrics={"accepted_length": {"value": 2.5, "low": 2.25, "high": 2.75}})
        tracking.finish()
        tracking.finish()

    curve = read_lines(run.path / "metrics.jsonl")
    assert [line["step"] for line in curve] == [0, 1, 2, 3]
    assert all(line["train/loss"] > 0 for line in curve)

    said = inspect(run.path)
    records = [json.loads(line) for line in said.splitlines() if line.strip().startswith("{")]
    assert records, said[:500]
    for fact in ("dspark", "figure-2", "draft-dspark", "train/loss", "trainer/global_step", "accepted_length/low"):
        assert fact in said, fact
    assert "feed" in said and "max_steps" in said

    mirrored = list(run.path.glob("wandb/offline-run-*/files/record/summary.json"))
    assert [json.loads(file.read_text())["status"] for file in mirrored] == ["finished"]
    record = json.loads((run.path / "tracking.json").read_text())
    assert record["mode"] == "offline" and record["project"] == "lab"
    (artifact,) = record["artifacts"]
    assert artifact["digest"] == digest and artifact["files"] == [str(draft / "config.json")]
    assert offline_runs(tmp_path) == [run.path]
    with pytest.raises(ValueError, match="no W&B key"):
        sync(run.path)


def test_opening_again_continues_the_same_wandb_run(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        with RunFolder(tmp_path, "train", "again", {}) as run:
            tracking = Tracking(mode="offline").start(run)
            tracking.finish()
        ids.append(json.loads((run.path / "tracking.json").read_text())["id"])
    assert ids[0] == ids[1]
    with RunFolder(tmp_path, "train", "again", {}, fresh=True) as run:
        Tracking(mode="offline").start(run).finish()
    assert json.loads((run.path / "tracking.json").read_text())["id"] != ids[0]


def test_modes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert account.key() is None
    assert Tracking().resolved_mode() == "offline"
    with pytest.raises(ValueError, match="wandb login"):
        Tracking(mode="online").resolved_mode()
    with pytest.raises(ValueError, match="not 'on'"):
        Tracking(mode="on")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert Tracking().resolved_mode() == "disabled"
    monkeypatch.setenv("WANDB_MODE", "")  # set to nothing is not set
    assert Tracking().resolved_mode() == "offline"
    for wrong in ("banana", "Offline", " "):
        monkeypatch.setenv("WANDB_MODE", wrong)
        with pytest.raises(ValueError, match=f"WANDB_MODE={wrong} in the environment"):
            Tracking().check()
    monkeypatch.delenv("WANDB_MODE")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert account.key() == "secret"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert Tracking().resolved_mode() == "online"
    assert Tracking().resolved_mode() == "offline"  # a key, and nobody at the other end


def test_disabled_touches_nothing_but_the_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "train", "quiet", {}) as run:
        tracking = Tracking(mode="disabled").start(run)
        (logger,) = tracking.loggers
        logger.log_metrics({"loss": 1.0}, step=1)
        assert tracking.artifact("x", "draft", tmp_path) is None
        tracking.table("t", ["a"], [[1]])
        tracking.finish()
    assert not (run.path / "wandb").exists() and not (run.path / "tracking.json").exists()
    assert "WANDB_DIR" not in os.environ
    assert read_lines(run.path / "metrics.jsonl")[0]["loss"] == 1.0


def test_sync_names_an_artifact_file_that_has_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"1")
    with RunFolder(tmp_path, "train", "gone", {}) as run:
        tracking = Tracking(mode="offline").start(run)
        tracking.artifact("draft-gone", "draft", file)
        tracking.finish()
    file.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ValueError, match=r"weights\.bin is part of an artifact"):
            sync(run.path)
    with pytest.raises(ValueError, match="cannot be reached"):
        sync(run.path)


def test_a_run_that_failed_does_not_swallow_the_next(tmp_path: Path) -> None:
    ids = []
    for name in ("fails", "next"):
        with RunFolder(tmp_path, "train", name, {}) as run:
            tracking = Tracking(mode="offline").start(run)
            assert tracking.wandb is not None
            ids.append(tracking.wandb.experiment.id)
    tracking.finish()
    assert ids[0] != ids[1] and len(list(run.path.glob("wandb/offline-run-*"))) == 1


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_what_failed_here_failed_there_whatever_runs_next(tmp_path: Path, error: BaseException) -> None:
    """Exit codes of a failed run, of the one after it in the same process, and of one that ends without `finish`."""
    folders = []
    for number, raised in enumerate((error, None)):
        record = RunFolder(tmp_path, "train", f"run-{number}", {})
        folders.append(record.path)
        with suppress(type(error)), Tracking(mode="offline") as tracking, record as run:
            tracking.start(run)
            if raised is not None:
                raise raised
    assert [offline_run(folder).exit_code for folder in folders] == [1, 0]
    mirrored = json.loads((folders[0] / "wandb" / "record" / "summary.json").read_text())
    assert mirrored["status"] in ("failed", "interrupted")
