"""Upload of offline W&B runs by the W&B client, with a check of what arrived.

The client ends with success, and marks a run as synced, even if the server refused its artifacts or files. So the
server is queried afterwards, and the mark is removed from a run of which something is missing.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specbench.files.atomic import read_json
from specbench.runs import wandb_account as account
from specbench.runs.run_schema import MIRROR
from specbench.runs.wandb_tracking import reachable, uploaded


def offline_runs(folder: str | Path) -> list[Path]:
    """Run folders at or below `folder` with W&B runs that were not uploaded."""
    records = sorted(Path(folder).rglob("tracking.json"))
    # What has a dot in front is a run that is being made again, or what is left of one.
    shown = [r.parent for r in records if not any(p.startswith(".") for p in r.relative_to(folder).parts)]
    return [run for run in shown if unsynced(run)]


def unsynced(run: Path) -> list[Path]:
    """The W&B directories of one run folder that were not uploaded (W&B writes a mark beside uploaded ones)."""
    logs = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    return [log.parent for log in logs if not log.with_name(f"{log.name}.synced").exists()]


def sync(run: str | Path) -> list[str]:
    """Upload the offline W&B runs of a run folder and check what arrived; returns what is missing, one line each.

    Raises ValueError without a key, when artifact files have gone or when the upload fails.
    """
    run = Path(run)
    record = read_json(run / "tracking.json", None)
    if record is None:
        raise ValueError(f"{run} was not tracked by W&B: it has no tracking.json")
    if account.key() is None:
        raise ValueError("there is no W&B key to upload with: run `wandb login` or set WANDB_API_KEY")
    if not reachable():
        raise ValueError(f"{account.server()} cannot be reached: sync where there is a network")
    with where_recorded(run, record):
        return _sync(run, record)


@contextmanager
def where_recorded(run: Path, record: Mapping[str, Any]) -> Iterator[None]:
    """Within it, a run that was moved since (with its root, or into the place of an older one) is found where W&B was
    told that its files lie: its offline log names them by absolute paths.
    """
    told = Path(record.get("folder") or run.resolve())
    if told.exists() and told.resolve() != run.resolve() and told.name.startswith("."):
        raise ValueError(f"{told} is in the way of the files of {run}: finish or remove that run before the upload")
    if told.exists() or told.is_symlink() or not told.is_absolute():
        yield
        return
    made: list[Path] = []
    try:
        try:
            for above in reversed(told.parents):
                if not above.exists():
                    above.mkdir()
                    made.append(above)
            told.symlink_to(run.resolve(), target_is_directory=True)
            made.append(told)
        except OSError as error:
            raise ValueError(
                f"{run} was written as {told}, where W&B looks for its files, and no link can be made there ({error}): "
                "move it back for the upload"
            ) from error
        yield
    finally:
        for path in reversed(made):
            path.unlink() if path.is_symlink() else path.rmdir()


def _sync(run: Path, record: Mapping[str, Any]) -> list[str]:
    gone = [file for artifact in record["artifacts"] for file in artifact["files"] if not Path(file).exists()]
    if gone:
        raise ValueError(f"{gone[0]} is part of an artifact of {run} and is gone: W&B would leave it out in silence")
    own = {"WANDB_MODE": "online", "WANDB_DIR": str(run.resolve())}  # its notes beside the run, not where one stands
    environment = {**os.environ, **own, "WANDB_DATA_DIR": str(run.resolve() / "wandb" / "data")}
    for directory in unsynced(run):
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", "--yes", str(directory)],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = (done.stderr + done.stdout).strip().splitlines()
            raise ValueError(f"wandb sync of {directory} failed: {lines[-1] if lines else done.returncode}")
    missing = _missing(run, record)
    if missing:  # the client counts even a refused artifact as synced, and would not send it again
        for mark in run.glob("wandb/offline-run-*/*.synced"):
            mark.unlink()
    return missing


def _missing(run: Path, record: Mapping[str, Any]) -> list[str]:
    """What is missing on the server of an uploaded run: artifacts by digest, files of the record by MD5."""
    mirrored = sorted((run / "wandb" / MIRROR).glob("*"))
    names = [f"{MIRROR}/{file.name}" for file in mirrored]
    arrived, stored = uploaded(record["entity"], record["project"], record["id"], names)
    lost = [item["name"] for item in record["artifacts"] if item["digest"] not in arrived]
    missing = [f"{run}: artifact {name} did not arrive" for name in lost]
    for file in mirrored:
        digest = hashlib.md5(file.read_bytes(), usedforsecurity=False).digest()
        found = stored.get(f"{MIRROR}/{file.name}", "")
        if found not in (None, base64.b64encode(digest).decode(), digest.hex()):  # None: this server keeps no MD5
            missing.append(f"{run}: {MIRROR}/{file.name} {'arrived damaged' if found else 'did not arrive'}")
    return missing
