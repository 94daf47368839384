"""The folder of one run: the primary record of its settings and results. W&B receives a copy.

    root/runs/KIND/NAME/
        config.yaml      the resolved configuration
        provenance.json  code, versions, hardware, seeds, cache, command line, first prompt; dirty.diff beside it
        metrics.jsonl    one line per log call: {"step", "time", name: number}
        records.parquet  one row per prompt and turn (run_schema.COLUMNS)
        rounds.jsonl     one line per prompt: its rounds
        summary.json     status and headline metrics

Files are renamed into place when complete; the two line files are appended, and a reader drops an incomplete last line.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from specbench.files import json_lines as jsonl
from specbench.files import plain_yaml
from specbench.files.atomic import json_line, plain, read_json, read_object, replacing, write_json, write_text
from specbench.files.redaction import redact, redacted
from specbench.runs.run_schema import COLUMNS, FINISHED, KINDS, MIRRORED, OPTIONAL, RECORDS_SCHEMA, SCHEMA, WRITTEN

LONGEST = 200  # bytes of a name; file systems take 255, and there are endings to come


class RunFolder:
    """One run on disk, opened for writing. As a context manager it sets the final status.

    After an exception the status is `failed`, after Ctrl-C `interrupted`; after a kill it stays `running` with a
    process that no longer exists, which `read_summary` reports as `unfinished`. Opening the folder again continues the
    same run; `fresh` starts again and removes what the earlier run wrote, checkpoints/ and draft/ included. `folder`:
    where the run is written until it replaces the old one. `writes=False`: methods have no effect, for all ranks except
    the first.
    """

    def __init__(
        self,
        root: str | Path,
        kind: str,
        name: str,
        config: Mapping[str, Any],
        *,
        fresh: bool = False,
        writes: bool = True,
        folder: Path | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"a run folder's kind is one of {', '.join(KINDS)}, not '{kind}'")
        self.kind, self.name, self.writes = kind, folder_name(name, "a run folder"), writes
        self.path = folder or Path(root) / "runs" / kind / self.name
        self.config = redacted(plain(config))
        self._fresh = fresh
        self._summary: dict[str, Any] = {}
        self._not_finite = 0
        self._finished = False

    def open(self) -> RunFolder:
        """Create or continue the folder: config.yaml is written and the status becomes `running`."""
        old = {} if self._fresh else read_json(self.path / "summary.json", {})
        self._not_finite = old.get("metrics_not_finite", 0)
        starts = [*old.get("starts", []), round(time.time(), 3)]
        # Headline metrics of an earlier attempt are not this one's: they come back when the run finishes.
        self._summary = {"schema": SCHEMA, "kind": self.kind, "name": self.name, "starts": starts}
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._fresh:
                for file in WRITTEN:
                    (self.path / file).unlink(missing_ok=True)
                for folder in ("checkpoints", "draft"):
                    shutil.rmtree(self.path / folder, ignore_errors=True)
            for file in ("metrics.jsonl", "rounds.jsonl"):
                jsonl.repair(self.path / file)
            write_text(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        self._settle("running", process=_process())
        return self

    __enter__ = open

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            if not self._finished:  # once is enough: what was mirrored since must stay what lies here
                self.finish()
        else:
            self._settle(**status_after(kind, error))

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json holds beside the status: everything that `update` and `finish` were given."""
        return self._summary

    @property
    def provenance(self) -> dict[str, Any]:
        """What provenance.json holds; nothing where it is not written yet."""
        return read_json(self.path / "provenance.json", {})

    def mirror(self, folder: Path) -> None:
        """Copy what W&B is to hold of the run (run_schema.MIRRORED) into `folder`."""
        for file in MIRRORED:
            if (self.path / file).exists():
                with replacing(folder / file) as copy:
                    shutil.copyfile(self.path / file, copy)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Append one line to metrics.jsonl. A number that is not finite is written as null and counted."""
        line: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        for key, value in values.items():
            value = value.item() if hasattr(value, "item") else value
            if isinstance(value, float) and not math.isfinite(value):
                self._not_finite += 1
                value = None
            line[key] = value
        self._append("metrics.jsonl", line)

    def append_rounds(self, line: Mapping[str, Any]) -> None:
        """Append one prompt's rounds: prompt_ids, output_ids, proposed, accepted, seconds, confidence if any."""
        self._append("rounds.jsonl", line)

    def write_records(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write records.parquet, one row per prompt and turn, with exactly the columns of COLUMNS and any of
        OPTIONAL."""
        rows = list(rows)
        for index, row in enumerate(rows):
            missing, unknown = set(COLUMNS.names) - set(row), set(row) - {*COLUMNS.names, *OPTIONAL.names}
            if missing or unknown:
                raise ValueError(f"record {index} lacks {sorted(missing)} and has unknown columns {sorted(unknown)}")
            if isinstance(row["thinking"], bool):
                rows[index] = {**row, "thinking": str(row["thinking"]).lower()}
        used = [field for field in OPTIONAL if any(field.name in row for row in rows)]
        schema = pa.schema([*COLUMNS, *used], metadata={"schema": RECORDS_SCHEMA})
        if self.writes:
            with replacing(self.path / "records.parquet") as temporary:
                pq.write_table(pa.Table.from_pylist([plain(row) for row in rows], schema=schema), temporary)

    def write_provenance(self, facts: Mapping[str, Any], diff: str | None = None) -> None:
        """Write provenance.json, and the uncommitted changes as dirty.diff. Facts written before are kept beside."""
        if self.writes:
            old = read_json(self.path / "provenance.json", {})
            write_json(self.path / "provenance.json", redacted({**old, **facts}))
            if diff:
                write_text(self.path / "dirty.diff", redact(diff))

    def update(self, **values: Any) -> None:
        """Merge `values` into summary.json: method, target, suite, metrics, lineage and what else the run knows."""
        for key, value in values.items():
            both = isinstance(value, Mapping) and isinstance(self._summary.get(key), dict)
            self._summary[key] = {**self._summary[key], **value} if both else value
        self._finished = False
        self._settle("running", process=_process())

    def finish(self, **values: Any) -> None:
        """Merge `values` into summary.json and mark the run finished."""
        self.update(**values)
        self._settle(FINISHED)
        self._finished = True

    def _settle(self, status: str, **facts: Any) -> None:
        now = round(time.time(), 3)
        volatile = {"status": status, "seconds": round(now - self._summary["starts"][-1], 3), **facts}
        if status != "running":
            volatile["ended"] = now
        if self._not_finite:
            self._summary["metrics_not_finite"] = self._not_finite
        if self.writes:
            write_json(self.path / "summary.json", redacted({**self._summary, **volatile}))

    def _append(self, file: str, line: Mapping[str, Any]) -> None:
        if self.writes:
            text = json_line(line)
            with open(self.path / file, "a", encoding="utf-8") as lines:
                lines.write(text)


def status_after(kind: type[BaseException], error: BaseException | None) -> dict[str, str]:
    """How an exception ended a run: `interrupted` by Ctrl-C, SIGTERM or exit, else `failed` with the error."""
    if issubclass(kind, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        return {"status": "interrupted"}
    return {"status": "failed", "error": f"{kind.__name__}: {error}"}


def folder_name(name: object, what: str) -> str:
    """`name` as text, if it is a valid folder name. Errors: ValueError naming `what`."""
    text = str(name)
    if not text or text != Path(text).name or text.startswith(".") or not text.isprintable():
        raise ValueError(f"{text!r} cannot name {what}: give a name without slashes, control signs or a leading dot")
    if len(text.encode("utf-8", "surrogatepass")) > LONGEST:
        raise ValueError(f"{text[:20]!r}... cannot name {what}: it has more than {LONGEST} bytes")
    return text


def read_summary(folder: str | Path) -> dict[str, Any]:
    """summary.json of a run folder. A run whose process no longer exists has the status `unfinished`.

    Raises FileNotFoundError without a summary, ValueError when it is of another schema.
    """
    path = Path(folder) / "summary.json"
    summary = read_object(path)
    if summary.get("schema") != SCHEMA:
        raise ValueError(f"{path} has the schema {summary.get('schema')!r}, and this version reads {SCHEMA!r}")
    if summary["status"] == "running" and not _alive(summary.get("process", {})):
        summary["status"] = "unfinished"
    return summary


def read_settings(folder: str | Path) -> dict[str, Any]:
    """config.yaml of a run folder as plain data: interpolations in it are not resolved.

    Errors: FileNotFoundError, and ValueError for what is no YAML of plain values.
    """
    path = Path(folder) / "config.yaml"
    try:
        found = plain_yaml.read(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML of plain values ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings: it is not the config.yaml of a run")
    return found


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or rounds.jsonl, without an incomplete last line."""
    return [line for _, line in jsonl.read(path, unfinished="drop")]


def _process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot(), "born": _born(os.getpid())}


def _alive(process: Mapping[str, Any]) -> bool:
    """Whether a recorded process still runs. One on another machine cannot be asked and counts as alive."""
    if process.get("host") != socket.gethostname():
        return True
    return process.get("boot") == _boot() and process.get("born") == _born(process.get("pid", -1))


def _boot() -> str | None:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else None


def _born(pid: int) -> str | None:
    """When process `pid` began, in the system's own ticks: a number used again by a later process differs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a dead process that nobody has waited for is gone
    except OSError:
        return "running" if not Path("/proc/self").exists() and _exists(pid) else None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
