"""Fit temperatures for a draft's confidence head on some recorded prompts and judge them on others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from experiments.stage import Stage, container
from specbench.atomic import write_json
from specbench.calibration import fit
from specbench.rounds import flatten, read_rounds, split


def run(cfg: DictConfig) -> Path:
    """Write calibration.json, slots.csv (a slot before and after a row) and reliability.json; returns the folder.

    With `draft` the calibration is written beside that draft, too.
    """
    prompts = read_rounds(cfg.rounds)
    if cfg.held_out is None:
        fitted, held_out = split(prompts, cfg.share, cfg.seed)
    else:
        fitted, held_out = prompts, read_rounds(cfg.held_out)
    if cfg.draft is not None and not Path(cfg.draft).is_dir():
        raise ValueError(f"draft={cfg.draft} is no folder; name the draft folder that the rounds were decoded with")
    learn, test = flatten(fitted), flatten(held_out)
    folder = Path(cfg.root) / "calibrate" / cfg.name
    inputs = {"contents": [rounds_digest(path) for path in (cfg.rounds, cfg.held_out) if path is not None]}
    with Stage("calibrate", folder, {**container(cfg), **inputs}, force=cfg.force) as stage:
        if stage.done:
            return folder
        calibration = fit(learn.logits, learn.accepted, learn.proposed, learn.prompts, bins=cfg.bins)
        rows = calibration.judge(test.logits, test.accepted, test.proposed, test.prompts, cfg.bins)
        calibration.save(folder / "calibration.json")
        write_json(folder / "reliability.json", rows)
        table = pd.DataFrame(rows).drop(columns="reliability")
        table.to_csv(folder / "slots.csv", index=False)
        if cfg.draft is not None:
            calibration.save(Path(cfg.draft) / "calibration.json")
        print(table.to_string(index=False, float_format="%.4f", na_rep="-"))
        seen = table[table.n > 0]
        stage.finish(
            {
                "prompts_fitted": len({p.prompt for p in fitted}),
                "prompts_judged": len({p.prompt for p in held_out}),
                "ece_before": float(seen[~seen.calibrated].ece.mean()),
                "ece_after": float(seen[seen.calibrated].ece.mean()),
                "temperatures_at_the_edge_of_the_grid": len(calibration.at_edge),
            },
            next=f"specbench serve rounds={cfg.held_out or cfg.rounds} calibration={folder / 'calibration.json'}",
        )
    return folder


def rounds_digest(path: str | Path) -> str:
    """What identifies a file of rounds: its content, wherever it lies."""
    path = Path(path) / "rounds.jsonl" if Path(path).is_dir() else Path(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
