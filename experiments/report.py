"""specbench report: the comparison as one HTML page and as a W&B report."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig

from analysis.compare import CURVES
from analysis.html import content
from experiments.compare import comparison
from specbench.cli.checks import check_before
from specbench.cli.summary import report


def run(cfg: DictConfig) -> Path:
    """Write root/compare/NAME/report.html, and report.json or the W&B report itself; returns the folder."""
    began = time.monotonic()
    check_before("report", cfg)
    made = comparison(cfg, cfg.title)
    facts = {"page": str(made.folder / "report.html")}
    if cfg.entity is not None:
        names = {key: sorted(made.frames["accepted_length"][key].dropna().unique()) for key in ("method", "target")}
        blocks = content.blocks(made.content, cfg.entity, cfg.project, names["method"], names["target"], CURVES)
        path = made.folder / "report.json"
        path.write_text(content.serialise(blocks), encoding="utf-8")
        facts["wandb"] = content.publish(blocks) or f"not saved, set WANDB_API_KEY; what would be sent is {path}"
    report("report", made.folder, time.monotonic() - began, facts, next="open the page in a browser")
    return made.folder
