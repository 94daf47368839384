"""specbench submit: write the results of evaluations as small JSON files that others can check."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig

from specbench.cli.checks import check_before
from specbench.cli.summary import report
from specbench.library.submission import submit


def run(cfg: DictConfig) -> list[Path]:
    """Write NAME.json and NAME.records.jsonl for every run; returns the JSON files."""
    began = time.monotonic()
    check_before("submit", cfg)
    runs = [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs)
    settings = {"signed_off_by": cfg.signed_off_by, "place": cfg.place, "force": cfg.force}
    made = [submit(run, cfg.results, **settings) for run in runs]
    for file in made:
        print(file)
    then = f"specbench check-submission {cfg.results}/*.json"
    report("submit", cfg.results, time.monotonic() - began, {"results": len(made)}, next=then)
    return made


def check(cfg: DictConfig) -> None:
    """Several runs cannot have their records at one address."""
    if cfg.place is not None and not isinstance(cfg.runs, str) and len(cfg.runs) > 1:
        raise ValueError(f"place={cfg.place} is the address of one file of records: submit one run with it")
