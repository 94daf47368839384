"""The W&B run of a stage without a run folder: prompts, answers, a target cache, a calibration.

Such a stage has its record in stage.json beside its output. Settings, provenance and summary are copied only to W&B, so
nothing is written here if W&B is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from specbench.files.atomic import plain, write_json, write_text
from specbench.files.redaction import redacted
from specbench.runs.run_folder import status_after
from specbench.runs.run_schema import FINISHED, OUTPUTS, SCHEMA


class StageOutput:
    """One execution of a stage that writes to `path`; it is used where a RunFolder is, and ends as one does.

    `facts` is the provenance, as `provenance()` gives it. `writes=False` is for the ranks beside the first.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        path: Path,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        writes: bool = True,
    ) -> None:
        if kind not in OUTPUTS:
            raise ValueError(f"a stage without a run folder is one of {', '.join(OUTPUTS)}, not '{kind}'")
        self.kind, self.name, self.path, self.writes = kind, name, path, writes
        self.config = redacted(plain(config))
        self.provenance: dict[str, Any] = redacted(plain(facts))
        self.summary: dict[str, Any] = {"schema": SCHEMA, "kind": kind, "name": name, "status": "running"}

    def __enter__(self) -> StageOutput:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.summary |= {"status": FINISHED} if kind is None else status_after(kind, error)

    def finish(self, **values: Any) -> None:
        """Merge `values` into the summary and mark the run finished."""
        self.summary |= {**redacted(plain(values)), "status": FINISHED}

    def mirror(self, folder: Path) -> None:
        """Write what W&B is to hold of it into `folder`, as files of a run folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "summary.json", redacted(self.summary))
        write_json(folder / "provenance.json", self.provenance)
        write_text(folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
