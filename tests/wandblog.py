"""What an offline W&B run holds, read from its log by W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb


@dataclass(frozen=True)
class OfflineRun:
    """`exit_code` is None where the log has no end, as after a kill; `tables` are the names of the tables in it."""

    job_type: str
    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    exit_code: int | None
    tables: list[str]
    text: str


def inspect(run: Path, runs: int = 1) -> str:
    """The records of the newest W&B log below a folder as JSON text; there are `runs` of them."""
    wandb.teardown()  # finish() may return before the file is whole
    logs = sorted(run.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert len(logs) == runs, logs
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(logs[-1])]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def offline_run(folder: Path, runs: int = 1) -> OfflineRun:
    """The newest W&B run that a stage left in its folder; there are `runs` of them."""
    text = inspect(folder, runs)
    records = [json.loads(line) for line in text.splitlines() if line.strip()]
    begun = next(record["run"] for record in records if "run" in record)
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for record in records:
        config |= record.get("config", {}).get("update", {})
        summary |= record.get("summary", {}).get("update", {})
    ends = [record["exit"].get("exit_code", 0) for record in records if "exit" in record]  # a zero is left out
    tables = sorted(key.removesuffix("._type") for key, value in summary.items() if value == "table-file")
    return OfflineRun(
        begun["job_type"], begun["display_name"], config, summary, int(ends[-1]) if ends else None, tables, text
    )
