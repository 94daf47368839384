"""Lightning logger that writes metrics into the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from specbench.runs.run_folder import RunFolder


class FolderLogger(Logger):
    """Every log call of a Trainer becomes one line of metrics.jsonl. Only the first rank writes."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__()
        self.run = run

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def version(self) -> str:
        return self.run.kind

    @property
    def save_dir(self) -> str:
        return str(self.run.path)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.run.log(metrics, step=0 if step is None else step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml was written when the folder was opened."""
