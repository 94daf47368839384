"""A run of a verb, on disk and on W&B: both begin and end together, also after errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from specbench.runs.run_folder import RunFolder
from specbench.runs.stage_output import StageOutput
from specbench.runs.termination import sigterm_interrupts
from specbench.runs.wandb_tracking import Tracking

RunPlace = TypeVar("RunPlace", RunFolder, StageOutput)


@contextmanager
def tracked(tracking: Tracking, place: RunPlace, **headline: Any) -> Iterator[tuple[RunPlace, Tracking]]:
    """Open `place`, start its W&B run, and end both when the block ends.

        with tracked(tracking_of(cfg), RunFolder(...), method="dspark", target="qwen3_4b") as (run, wandb):
            run.write_provenance(...)
            wandb.table("points", columns, rows)        # nothing where W&B is off
            run.finish(speedup=1.7)

    `headline` are the top-level settings on W&B that filters and groupings use. The W&B run has the place's kind as its
    job type, all settings under `settings`, the provenance, and, once it ends, every number of the summary. An
    exception leaves it failed, Ctrl-C and SIGTERM too; the place says which. Keys and passwords are withheld from all
    of it.
    """
    with sigterm_interrupts(), tracking, place as opened:
        tracking.start(opened, headline)
        yield opened, tracking
