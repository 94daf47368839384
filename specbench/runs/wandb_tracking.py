"""All use of W&B: runs by Lightning's logger, tables, images, artifacts.

The run folder is written first and completely; W&B receives a copy. Offline runs are written to RUN/wandb/ together
with the files of their tables, so that the folder is complete until `specbench sync` uploads it. Lineage (cache,
checkpoint, parent runs) is written into the config and the record as well, because W&B keeps none of it offline.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger

from specbench.files.atomic import plain, read_json, write_json
from specbench.files.redaction import redact, redacted
from specbench.ranges import Among
from specbench.runs import wandb_account as account
from specbench.runs.folder_logger import FolderLogger
from specbench.runs.run_folder import RunFolder
from specbench.runs.run_schema import MIRROR, STEP, TIMED
from specbench.runs.stage_output import StageOutput

MODES = ("auto", "online", "offline", "disabled")
_notices: set[str] = set()


class Tracking:
    """Copies runs to W&B.

    `mode`: `online` needs a key; `offline` writes beside the run folder for a later `sync`; `disabled` imports nothing;
    `auto` is online with a key and a server in reach, else offline; WANDB_MODE in the environment overrules it.
    `tracked_run.tracked` begins and ends it together with a run; in between `loggers` are for the Trainer, and `table`,
    `image`, `artifact` and `uses` add to what is mirrored by itself: settings, provenance, every number of the summary.
    """

    def __init__(
        self,
        mode: Annotated[str, Among(MODES)] = "auto",
        project: str = "specbench",
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"tracking.mode is one of {', '.join(MODES)}, not '{mode}'")
        self.mode, self.project, self.entity, self.group, self.job_type = mode, project, entity, group, job_type
        self.tags = [redact(str(tag)) for tag in tags]
        self.run: RunFolder | StageOutput | None = None
        self.wandb: WandbLogger | None = None
        self._record: dict[str, Any] = {}

    def start(self, run: RunFolder | StageOutput, headline: Mapping[str, Any] | None = None) -> Tracking:
        """Begin to mirror `run`; opening the same run again continues the same W&B run.

        `headline` are the top-level config keys that filters and groupings use: method, target, suite, seed, cache, ...
        The whole resolved configuration goes under the key `settings`.
        """
        self.run = run
        mode = self.resolved_mode()
        if mode == "disabled" or not run.writes:
            return self
        old = read_json(run.path / "tracking.json", {})
        self._record = {
            "id": old.get("id") or secrets.token_hex(4),
            "mode": mode,
            # Where W&B was told that the files lie: offline it keeps absolute paths.
            "folder": str(run.path.resolve()),
            "project": self.project,
            "entity": self.entity,
            "artifacts": old.get("artifacts", []),
        }
        os.environ["WANDB_MODE"] = mode
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")  # its notices; what goes wrong is raised all the same
        os.environ["WANDB_DIR"] = str(run.path.resolve())
        os.environ["WANDB_DATA_DIR"] = str(run.path.resolve() / "wandb" / "data")
        self.wandb = self._logger(mode)
        config = {"run": run.name, "kind": run.kind, **(headline or {}), "settings": run.config}
        if run.provenance:
            config["provenance"] = run.provenance
        self.wandb.experiment.config.update(redacted(plain(config)), allow_val_change=True)
        self._record["url"] = self.wandb.experiment.url if mode == "online" else None
        self._save()
        if mode == "offline":
            _say(
                "W&B is offline: runs are kept on the disk; `specbench sync` with the same root= uploads them "
                "once there is a key and a network"
            )
        return self

    def resolved_mode(self) -> str:
        """The mode that `auto` stands for here; raises ValueError as `check` does."""
        mode = self.check()
        if mode == "auto":
            return "online" if account.key() is not None and reachable() else "offline"
        return mode

    def check(self) -> str:
        """The mode that is asked for, without asking a server.

        Raises ValueError when WANDB_MODE is none of them, or `online` has no key. An empty variable is an unset one.
        """
        mode = (os.environ.get("WANDB_MODE") or "auto") if self.mode == "auto" else self.mode
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
        if mode not in MODES:
            raise ValueError(f"WANDB_MODE={mode} in the environment: set online, offline or disabled, or leave it out")
        if mode == "online" and account.key() is None:
            raise ValueError("tracking is online but there is no W&B key: run `wandb login`, or use tracking=offline")
        return mode

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.finish()
            return
        with suppress(Exception):  # what ended the run is what the user is told
            self.finish(succeeded=False)

    def _logger(self, mode: str) -> WandbLogger:
        import wandb

        assert self.run is not None
        try:
            # Begun here and handed over: the logger's own wandb.init warns about settings that it cannot leave out.
            experiment = wandb.init(
                name=self.run.name,
                project=self.project,
                entity=self.entity,
                dir=self.run.path.resolve(),
                id=self._record["id"],
                resume="allow" if mode == "online" else None,
                group=self.group,
                job_type=self.job_type or self.run.kind,
                tags=self.tags,
                reinit="finish_previous",  # a job of a sweep that failed may have left one open
                # Reading the machine's load every few seconds would be load of its own.
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=self.run.kind in TIMED),
            )
        except wandb.errors.CommError as error:
            raise ValueError(f"W&B cannot be reached ({error}): use tracking=offline and sync later") from error
        experiment.define_metric(STEP)
        experiment.define_metric("*", step_metric=STEP, step_sync=True)
        return WandbLogger(experiment=experiment, save_dir=str(self.run.path), project=self.project)

    @property
    def loggers(self) -> list[Logger]:
        """For the Trainer: the run folder first, then W&B where it is on."""
        assert isinstance(self.run, RunFolder), "start(RunFolder) comes first"
        return [FolderLogger(self.run), *([self.wandb] if self.wandb is not None else [])]

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int | None = None) -> None:
        """A W&B table, for example accepted length and conditional acceptance by slot."""
        if self.wandb is not None:
            self.wandb.log_table(key, columns=list(columns), data=redacted(plain(rows)), step=step)

    def rows(self, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows as a W&B table: a column for every key under which some row holds a number or a text.

        What is no finite number is left empty.
        """
        columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if _is_cell(value)))
        if columns:
            self.table(key, columns, [[_cell(row.get(name)) for name in columns] for row in rows])

    def image(self, key: str, path: str | Path, step: int | None = None) -> None:
        """A figure that lies in a file."""
        if self.wandb is not None:
            self.wandb.log_image(key, [str(path)], step=step)

    def artifact(self, name: str, kind: str, path: str | Path, **metadata: Any) -> str | None:
        """Log the file or folder at `path` as an artifact of type `kind` (cache, draft, figures); returns its digest.

        Files are not copied: W&B reads them where they lie, at once when online and at `sync` when offline.
        """
        if self.wandb is None:
            return None
        import wandb

        path = Path(path).resolve()
        artifact = wandb.Artifact(name, kind, metadata=redacted(plain(metadata)))
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            inside = str(file.relative_to(path)) if path.is_dir() else file.name
            artifact.add_file(str(file), name=inside, policy="immutable", skip_cache=True)
        try:
            logged = self.wandb.experiment.log_artifact(artifact)
            if self._record["mode"] == "online":
                logged.wait()
        except Exception as error:  # the client fails in ways that share no class
            if self._record["mode"] != "online":
                raise
            _say(f"W&B did not confirm the artifact {name} ({redact(str(error))}): its files are in {path}")
        entry = {"name": name, "type": kind, "digest": artifact.digest, "files": [str(file) for file in files]}
        if entry not in self._record["artifacts"]:
            self._record["artifacts"].append(entry)
        self._save()
        return artifact.digest

    def describe(self, **headline: Any) -> None:
        """Further top-level settings of the run, known once it has begun."""
        if self.wandb is not None:
            self.wandb.experiment.config.update(redacted(plain(headline)), allow_val_change=True)

    def uses(self, name: str, kind: str, **facts: Any) -> None:
        """Record that this run read the artifact `name` of type `kind`: cache -> draft -> evaluation.

        Always in the W&B config under `lineage`; online as an edge of W&B's graph too, where the artifact is there.
        """
        if self.wandb is None:
            return
        lineage = {**self.wandb.experiment.config.get("lineage", {}), kind: redacted(plain({"name": name, **facts}))}
        self.wandb.experiment.config.update({"lineage": lineage}, allow_val_change=True)
        if self._record["mode"] == "online":
            with suppress(Exception):  # never uploaded, or a server that cannot tell: the config holds the lineage
                self.wandb.experiment.use_artifact(f"{name}:latest", type=kind)

    def finish(self, succeeded: bool = True) -> None:
        """Mirror the record's files and the numbers of the summary, and close the W&B run.

        It is safe to call twice and after an error. Call it after the run's own `finish`, so that the mirrored summary
        is the final one.
        """
        if self.wandb is not None and self.run is not None:
            experiment, mirror = self.wandb.experiment, self.run.path.resolve() / "wandb"
            self.run.mirror(mirror / MIRROR)
            experiment.config.update({"provenance": self.run.provenance}, allow_val_change=True)
            experiment.summary.update(numbers(plain(self.run.summary)))
            experiment.save(str(mirror / MIRROR / "*"), base_path=str(mirror), policy="end")
            experiment.finish(exit_code=0 if succeeded else 1)
            self.wandb = None

    def _save(self) -> None:
        assert self.run is not None
        write_json(self.run.path / "tracking.json", redacted(self._record))


def reachable(seconds: float = 5.0) -> bool:
    """Whether a connection to the W&B server can be opened; behind a proxy that is taken for granted."""
    server = urlparse(account.server())
    if os.environ.get(f"{server.scheme}_proxy") or os.environ.get(f"{server.scheme.upper()}_PROXY"):
        return True
    port = server.port or (80 if server.scheme == "http" else 443)
    try:
        socket.create_connection((server.hostname or "", port), seconds).close()
    except OSError:
        return False
    return True


def uploaded(
    entity: str | None, project: str, run: str, files: Sequence[str]
) -> tuple[set[str], dict[str, str | None]]:
    """What the server holds of a run: the digests of its artifacts, and the MD5 of those of `files` that are there.

    Raises ValueError when the server does not know the run or the key.
    """
    import wandb

    try:
        api = wandb.Api()
        found = api.run(f"{entity or api.default_entity}/{project}/{run}")
        digests = {artifact.digest for artifact in found.logged_artifacts() if artifact.state == "COMMITTED"}
        return digests, {file.name: file.md5 for file in found.files(names=list(files))} if files else {}
    except Exception as error:  # its reader fails in ways that share no class
        raise ValueError(f"W&B does not say what it holds of run {run} in {project}: {error}") from error


def numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a summary under flat keys: those at its top, then all below `metrics`, by their own names."""
    own = {key: value for key, value in summary.items() if isinstance(value, (int, float))}
    return {**own, **{k: v for k, v in _leaves(summary.get("metrics", {})).items() if isinstance(v, (int, float))}}


def _is_cell(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _cell(value: Any) -> Any:
    return value if _is_cell(value) and not (isinstance(value, float) and not math.isfinite(value)) else None


def _leaves(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested numbers as flat keys joined by slashes; {"value": x, "low": ...} keeps x under the bare key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = where if key == "value" and where else f"{where}/{key}" if where else key
        flat.update(_leaves(value, path) if isinstance(value, Mapping) else {path: value})
    return flat


def _say(line: str) -> None:
    """Print a line to stderr, once in a process."""
    if line not in _notices:
        _notices.add(line)
        print(line, file=sys.stderr)
