"""specbench power: the prompts and training seeds that resolve a gap between methods, from pilot runs."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from analysis.read.runs import load
from analysis.tables import groups, power, writers
from experiments.compare import filters
from specbench.cli.checks import check_before
from specbench.cli.stages import container
from specbench.cli.summary import report


def run(cfg: DictConfig) -> Path:
    """Print the table and write root/compare/NAME/power.csv; returns the folder."""
    began = time.monotonic()
    check_before("power", cfg)
    settings = container(cfg)
    runs = list(cfg.runs) if isinstance(cfg.runs, ListConfig) else cfg.runs
    keys = [settings["group_by"]] if isinstance(settings["group_by"], str) else settings["group_by"]
    found = groups.collect(load(runs, filters(settings), Path(cfg.root) / "wandb").decoded(), keys)
    plan = {key: settings[key] for key in ("power", "prompts", "seeds", "spread")}
    table = power.frame(found, cfg.gap, **plan)
    folder = Path(cfg.root) / "compare" / cfg.name
    folder.mkdir(parents=True, exist_ok=True)
    file = writers.csv(table, folder / "power.csv")
    print(writers.terminal(power.sheets(found, table), shutil.get_terminal_size((120, 40)).columns))
    report(
        "power",
        folder,
        time.monotonic() - began,
        {"table": str(file)},
        next="train with the seeds of a row, e.g. -m seed.init=0,1,2",
    )
    return folder
