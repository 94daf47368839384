"""The W&B run of a stage, from its configuration."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from specbench.cli.recording import recorded
from specbench.cli.stages import Stage
from specbench.progress import first_rank
from specbench.runs.provenance import provenance
from specbench.runs.stage_output import StageOutput
from specbench.runs.tracked_run import tracked
from specbench.runs.wandb_tracking import Tracking


def tracking_of(cfg: DictConfig) -> Tracking:
    """The W&B tracking of the run of `cfg`; for configurations recorded before their verb had `tracking`, `auto`."""
    return Tracking() if cfg.get("tracking") is None else instantiate(cfg.tracking)


@contextmanager
def tracked_output(
    kind: str, name: str, stage: Stage, cfg: DictConfig, seeds: Mapping[str, int], **headline: Any
) -> Iterator[tuple[StageOutput, Tracking]]:
    """`tracked` for a stage that writes no run folder: its W&B run `name`, while it works in `stage.work`."""
    tracking = tracking_of(cfg)
    facts = {} if tracking.check() == "disabled" else provenance(sys.argv, seeds)[0]
    output = StageOutput(kind, name, stage.work, recorded(cfg), facts, writes=first_rank())
    with tracked(tracking, output, **headline) as both:
        yield both
