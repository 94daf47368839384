"""specbench sync: upload offline W&B runs and check what arrived on the server."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from specbench.cli.stages import say
from specbench.progress import Progress
from specbench.runs import wandb_account as account
from specbench.runs.wandb_sync import offline_runs, sync


def run(cfg: DictConfig) -> list[Path]:
    """Upload every run below `root`, or `run` alone; returns the folders that are now on the server.

    Raises ValueError without a key, and at the end when an artifact or a whole run did not arrive: the others have.
    """
    below = Path(cfg.run if cfg.run is not None else cfg.root)
    if not below.is_dir():
        raise ValueError(f"there is no folder {below} with runs to upload")
    folders = offline_runs(below)
    if not folders:
        print(f"sync: nothing to upload below {below}")
        return []
    faults: list[str] = []
    synced: list[Path] = []
    with Progress("sync", len(folders), "runs") as bar:
        for folder in folders:
            try:
                missing = sync(folder)
            except ValueError as error:
                if account.key() is None:
                    raise
                missing = [str(error)]
            faults += missing
            synced += [] if missing else [folder]
            bar.advance()
    print(f"sync: {len(synced)} of {len(folders)} runs uploaded and verified")
    for fault in faults:
        say(fault)
    if faults:
        raise ValueError(
            f"{len(folders) - len(synced)} of {len(folders)} runs did not arrive whole; see the lines above"
        )
    return synced
