"""What every stage shares: skip what is finished, one writer a folder, progress, and the last words.

A stage leaves `stage.json` in its folder: its configuration, its status and what it found out. The marker is written
when the stage begins, too, so that half-done work of another configuration is never continued.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from specbench.cli.recording import recorded
from specbench.files.atomic import changes, plain, read_json, write_json
from specbench.files.redaction import redacted

MARKER = "stage.json"
# Where something goes and how it is shown does not change what it is.
WITHOUT_EFFECT = ("force", "root", "tracking", "yes", "progress", "study", "methods")


def container(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as plain resolved dictionaries and lists."""
    resolved = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    return plain(resolved)


def first_rank() -> bool:
    """Whether this process is the one that writes, under torchrun, Slurm or Lightning's own launcher."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


class Stage:
    """One stage at work in one folder.

        with Stage("answers", folder, config, force=cfg.force) as stage:
            if not stage.done:
                ...                                   # stage.resumes: half-done work here is of this configuration
                stage.finish({"answers": 1200}, next="specbench cache")

    `state` is one of: new, resume (half done under this configuration), changed (there under another one, to be
    overwritten, and the differing keys were printed), forced, done. `summary` is what a finished stage handed to
    `finish`. A second process on the same folder gets a ValueError. Ranks beside the first neither lock nor write.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path,
        config: DictConfig | Mapping[str, Any],
        *,
        force: bool = False,
        ignore: Sequence[str] = (),
    ) -> None:
        self.name, self.folder, self.force = name, Path(folder), force
        dropped = {*WITHOUT_EFFECT, *ignore}
        self.config = {key: value for key, value in recorded(config).items() if key not in dropped}
        self.state = "new"
        self.summary: dict[str, Any] = {}
        self._began = time.monotonic()
        self._lock: Any = None

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def resumes(self) -> bool:
        return self.state == "resume"

    def __enter__(self) -> Stage:
        if first_rank():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
        marker = read_json(self.folder / MARKER, None)
        self.state, differing = self._judge(marker)
        if self.done:
            self.summary = marker["summary"]
            say(f"{self.name}: finished before, skipped ({self.folder}; force=true redoes it)")
            return self
        if self.state == "changed":
            say(f"{self.name}: there under another configuration, done again ({'; '.join(differing)})")
        elif self.resumes:
            say(f"{self.name}: continues what was left unfinished in {self.folder}")
        self._mark("running")
        return self

    def _judge(self, marker: Mapping[str, Any] | None) -> tuple[str, list[str]]:
        if marker is None:
            return "new", []
        if self.force:
            return "forced", []
        differing = changes(marker["config"], self.config)
        if differing:
            return "changed", differing
        return ("done" if marker["status"] == "finished" else "resume"), []

    def finish(self, summary: Mapping[str, Any] | None = None, next: str | None = None) -> None:
        """Mark the stage finished and print what was made, where, how long it took and what comes next."""
        self.summary = plain(summary or {})
        self._mark("finished")
        report(self.name, self.folder, time.monotonic() - self._began, self.summary, next)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is not None and not self.done:
                self._mark("failed" if issubclass(kind, Exception) else "interrupted")
        except OSError:
            pass  # a full disk: the marker still says running, which is resumed all the same
        finally:
            if self._lock is not None:
                self._lock.close()

    def _mark(self, status: str) -> None:
        if first_rank():
            facts = {"schema": "specbench.stage/1", "stage": self.name, "status": status}
            seconds = round(time.monotonic() - self._began, 3)
            facts |= {"seconds": seconds, "summary": self.summary, "config": self.config}
            write_json(self.folder / MARKER, redacted(facts))


def _locked(folder: Path) -> Any:
    """The open lock file of `folder`; the lock falls when it is closed or the process dies."""
    lock = open(folder / ".lock", "a+")  # noqa: SIM115 - it stays open for as long as the stage runs
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        raise ValueError(f"{folder} is being written by {owner}: wait for it, or choose another root or name") from None
    except OSError:
        say(f"{folder} lies on a file system without locks: take care that one process at a time writes there")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {os.uname().nodename}")
    lock.flush()
    return lock


def report(
    what: str, where: str | Path, seconds: float, facts: Mapping[str, Any] | None = None, next: str | None = None
) -> None:
    """The last words of a stage: what was made, where it lies, how long it took, what comes next."""
    if first_rank():
        print(f"{what}: done in {duration(seconds)}")
        for key, value in (facts or {}).items():
            if isinstance(value, (str, int, float)) and not isinstance(value, bool):
                print(
                    f"  {key.replace('_', ' ')}: {value:.4g}"
                    if isinstance(value, float)
                    else f"  {key.replace('_', ' ')}: {value}"
                )
        print(f"  in {where}")
        if next:
            print(f"  next: {next}")
        sys.stdout.flush()


def say(line: str) -> None:
    """One line for the user on stderr, from the first rank."""
    if first_rank():
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float | int) -> str:
    """4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
