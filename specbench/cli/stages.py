"""Common behaviour of stages: finished stages are skipped, nothing is replaced unless requested, one writer per folder.

A stage writes `stage.json` into its folder: its identity (identity.py), its status, its results, and the size and
digest of every result file. It is also written when the stage begins, so that unfinished work of another configuration
is never continued.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from specbench.cli.identity import content, identity
from specbench.cli.inventory import MARKER
from specbench.cli.summary import report
from specbench.files.atomic import plain, read_json, write_json
from specbench.files.folder_lock import locked
from specbench.files.folder_swap import beside, remove, settle, swap
from specbench.files.redaction import redacted
from specbench.progress import first_rank

SCHEMA = "specbench.stage/2"
ROOM = 1 << 23  # bytes that must be free before any stage begins
SHOWN = 8  # number of differences in an error message
# Of these only the presence is recorded, because a later step can add to them.
PRESENT = ("summary.json", "config.yaml")


def container(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as plain resolved dictionaries and lists."""
    resolved = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    return plain(resolved)


class Stage:
    """One stage that works in one folder.

        with Stage("answers", folder, config, force=cfg.force, results=("answers.jsonl",)) as stage:
            if not stage.done:
                ...                             # in stage.work; stage.resumes: unfinished work of this stage exists
                stage.finish({"answers": 1200}, next="specbench cache")

    `state` is one of

        new       the folder did not exist
            resume    unfinished with this configuration, or finished and damaged
            forced    force=true: the work is done in a folder beside `folder`, which replaces it in `finish`
            done      finished, and no file was changed

    A folder of another configuration is a ValueError that names the differences, unless `force`. `work`: the folder to
    write to. `results`: patterns of the result files; a changed one is renamed (NAME.changed) before the stage repairs
    its folder, except those in `mends`, which the stage itself completes. `inputs`: fingerprints of what the stage
    reads, in addition to those that identity.py finds. `instead`: how a user can choose another folder, for messages.
    `summary`: what a finished stage passed to `finish`. A second process on the same folder gets a ValueError. Only the
    first rank locks and writes.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path,
        config: DictConfig | Mapping[str, Any],
        *,
        force: bool = False,
        results: Sequence[str] = (),
        mends: Sequence[str] = (),
        inputs: Mapping[str, str] | None = None,
        instead: str = "another name= or root=",
    ) -> None:
        self.name, self.folder, self.force = name, Path(folder), bool(force)
        self.identity = identity(name, config, inputs)
        self.results, self.mends, self.instead = tuple(results), tuple(mends), instead
        self.work = self.folder
        self.state = "new"
        self.summary: dict[str, Any] = {}
        self._began = time.monotonic()
        self._locks: list[Any] = []
        self._finished = False
        self._next: str | None = None

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def resumes(self) -> bool:
        return self.state == "resume"

    def decide(self) -> str:
        """The state that entering would give; sets `work` and changes no file. Errors: ValueError as for entering."""
        self.work = self.folder
        there, new = read_marker(self.folder), read_marker(beside(self.folder))
        if new is not None and new["status"] == "finished":
            there, new = new, None  # an interrupted swap, which entering completes
        if there is None:
            if (self.folder / "summary.json").is_file() and not self.force:
                raise ValueError(
                    f"{self.name}: {self.folder} holds a run without {MARKER}, so what it was made from is not known: "
                    f"choose {self.instead}, or force=true to replace it once the new one is complete"
                )
            if not (self.folder / "summary.json").is_file():
                return "new"
        elif not self.force or (there["status"] != "finished" and there.get("forced")):
            differing = self.identity.against(self.name, there)
            if not differing:
                return self._of_its_own(there)
            if not self.force:
                self._refuse(there, differing)
        self.work = beside(self.folder)
        if new is None or self.identity.against(self.name, new):
            return "forced"
        return "resume"

    def _of_its_own(self, there: Mapping[str, Any]) -> str:
        """The state for existing work of the same configuration."""
        if there["status"] != "finished":
            return "resume"
        return "resume" if self._faults(there) else "done"

    def _faults(self, there: Mapping[str, Any]) -> dict[str, str]:
        """Result files of a finished stage that were changed: name -> reason."""
        faults = {}
        claimed: Mapping[str, Any] = there.get("files") or {}
        for name, facts in claimed.items():
            path = self.folder / name
            if not path.is_file():
                faults[name] = "is missing"
            elif name not in PRESENT and path.stat().st_size != facts["bytes"]:
                faults[name] = f"holds {path.stat().st_size} bytes instead of {facts['bytes']}"
            elif name not in PRESENT and content([path]) != facts["digest"]:
                faults[name] = "holds something else than was written"
        if not claimed:  # written by an earlier version
            faults = {p: "is missing" for p in self.results if not any(self.folder.glob(p))}
        return faults

    def _refuse(self, there: Mapping[str, Any], differing: Sequence[str]) -> None:
        more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        unfinished = "" if there["status"] == "finished" else ", unfinished,"
        raise ValueError(
            f"{self.name}: {self.folder} is there{unfinished} under another configuration "
            f"({'; '.join(differing[:SHOWN])}{more}): choose {self.instead}, or force=true to replace it once the new "
            "one is complete"
        )

    def __enter__(self) -> Stage:
        try:
            return self._enter()
        except BaseException:
            self._release()
            raise

    def _enter(self) -> Stage:
        if first_rank():
            for folder in (beside(self.folder), self.folder):
                if folder.is_dir():
                    self._locks.append(locked(folder, self.folder, say))
            settle(self.folder, lambda new: (read_marker(new) or {}).get("status") == "finished")
        self.state = self.decide()
        there = read_marker(self.work)
        if self.done:
            assert there is not None
            self.summary = there["summary"]
            say(f"{self.name}: finished before, skipped ({self.folder}; force=true redoes it)")
            return self
        if first_rank():
            _require_room(self.folder)
            if self.state == "forced":
                remove(self.work)
            if not self.work.is_dir():
                self.work.mkdir(parents=True)
                self._locks.append(locked(self.work, self.folder, say))
        self._announce(there)
        self._mark("running")
        return self

    def _announce(self, there: Mapping[str, Any] | None) -> None:
        if self.state == "forced":
            say(f"{self.name}: done again; {self.folder} stays as it is until the new one is complete")
        elif self.resumes and there is not None and there["status"] == "finished":
            for name, wrong in self._faults(there).items():
                path = self.folder / name
                kept = ""
                if path.is_file() and name not in self.mends and first_rank():
                    os.replace(path, path.with_name(f"{path.name}.changed"))
                    kept = f", kept as {path.name}.changed"
                say(f"{self.name}: finished before, but {path} {wrong}{kept}; it is made again")
        elif self.resumes:
            say(f"{self.name}: continues what was left unfinished in {self.work}")

    def reopen(self) -> None:
        """Continue a finished stage, because more is requested than it has done."""
        self.state = "resume"
        self._mark("running")

    def finish(
        self, summary: Mapping[str, Any] | None = None, next: str | None = None, *, last_rank: bool = False
    ) -> None:
        """Mark the stage as finished, rename its folder to its final name, and print the result, its path, the time and
        the next command. `last_rank`: called by the rank that finishes last, not by the first one.

        Errors: ValueError when one of its result files is not there.
        """
        self.summary, self._next = plain(summary or {}), next
        if first_rank() or last_rank:
            self._mark("finished", anyone=last_rank, files=self._claims())
            if self.work != self.folder:
                swap(self.folder)
                self.work = self.folder
        self._finished = True
        report(self.name, self.folder, time.monotonic() - self._began, self.summary, next)

    def _claims(self) -> dict[str, Any]:
        claims = {}
        for pattern in self.results:
            found = sorted(path for path in self.work.glob(pattern) if path.is_file())
            if not found:
                raise ValueError(f"{self.name} is not finished: {self.work / pattern} was not written")
            for path in found:
                facts = {"bytes": path.stat().st_size, "digest": content([path])}
                claims[path.relative_to(self.work).as_posix()] = facts
        return claims

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is not None and not self.done and not self._finished:
                with suppress(OSError):  # a full disk: the marker keeps the status running
                    self._mark("failed" if issubclass(kind, Exception) else "interrupted")
        finally:
            self._release()

    def _release(self) -> None:
        for lock in self._locks:
            lock.close()
        self._locks = []

    def _mark(self, status: str, anyone: bool = False, **more: Any) -> None:
        if first_rank() or anyone:
            facts = {"schema": SCHEMA, "stage": self.name, "status": status, "forced": self.force}
            seconds = round(time.monotonic() - self._began, 3)
            facts |= {"seconds": seconds, "summary": self.summary, **more}
            facts |= {"command": shlex.join(["specbench", *sys.argv[1:]]), "next": self._next}
            facts |= {"config": self.identity.settings, "inputs": self.identity.inputs}
            write_json(self.work / MARKER, redacted(facts))


def read_marker(folder: Path) -> dict[str, Any] | None:
    """stage.json of a folder; None if there is none. Errors: ValueError if it was not written by a stage."""
    path = folder / MARKER
    try:
        found = read_json(path, None)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it, or remove {folder}") from error
    if found is not None and not (isinstance(found, dict) and {"status", "config", "summary"} <= found.keys()):
        raise ValueError(f"{path} does not say what was done there: restore it, or remove {folder}")
    return found


def _require_room(folder: Path) -> None:
    """ValueError for a folder that cannot be created or written, or a full disk, before any work."""
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{folder} cannot be written: {above} is a file; choose another root=")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written: no permission in {above}; choose another root=")
    free = shutil.disk_usage(above).free
    if free < ROOM:
        raise ValueError(f"{above} has {free / 2**20:.1f} MiB left on its disk: make room, or choose another root=")


def say(line: str) -> None:
    """One line for the user on stderr, from the first rank."""
    if first_rank():
        print(line, file=sys.stderr, flush=True)
