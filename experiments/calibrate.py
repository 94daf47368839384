"""Fit temperatures for a draft's confidence head on some recorded prompts and judge them on others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from specbench.cli.errors import naming
from specbench.cli.following import command
from specbench.cli.recording import recorded
from specbench.cli.stages import Stage
from specbench.decoding.calibration import Calibration, fit
from specbench.evaluation.recorded_rounds import Rounds, conversations, flatten, recorded_rounds, rounds_file, split
from specbench.files.atomic import json_line, write_json, write_text
from specbench.runs.run_folder import read_lines


def run(cfg: DictConfig) -> Path:
    """Write calibration.json, slots.csv (a slot before and after a row) and reliability.json; returns the folder.

    With `draft` the calibration is written beside that draft, too, if it lowers the calibration error on the held-out
    rounds: below that of the confidences as they are, and of the calibration that lies there. ValueError otherwise.
    """
    with naming("rounds", cfg.rounds):
        prompts = recorded_rounds(cfg.rounds)
    if cfg.held_out is None:
        fitted, held_out = split(prompts, cfg.share, cfg.seed)
    else:
        with naming("held_out", cfg.held_out):
            fitted, held_out = prompts, recorded_rounds(cfg.held_out)
    if cfg.draft is not None and not Path(cfg.draft).is_dir():
        raise ValueError(f"draft={cfg.draft} is no folder; name the draft folder that the rounds were decoded with")
    learn, test = flatten(fitted), flatten(held_out)
    folder = Path(cfg.root) / "calibrate" / cfg.name
    inputs = {"contents": [rounds_digest(path) for path in (cfg.rounds, cfg.held_out) if path is not None]}
    with Stage("calibrate", folder, {**recorded(cfg), **inputs}, force=cfg.force) as stage:
        if stage.done:
            return folder
        calibration = fit(learn.logits, learn.accepted, learn.proposed, learn.prompts, bins=cfg.bins)
        rows = calibration.judge(test.logits, test.accepted, test.proposed, test.prompts, cfg.bins)
        calibration.save(folder / "calibration.json")
        write_json(folder / "reliability.json", rows)
        table = pd.DataFrame(rows).drop(columns="reliability")
        table.to_csv(folder / "slots.csv", index=False)
        judged = cfg.held_out
        if judged is None:  # no schedule may be judged on the other rounds, so these stand alone
            judged = folder / "held_out.jsonl"
            kept, lines = {p.prompt for p in held_out}, read_lines(rounds_file(cfg.rounds))
            named = zip(lines, conversations(lines), strict=True)
            write_text(judged, "".join(json_line(line) for line, prompt in named if prompt in kept))
        print(table.to_string(index=False, float_format="%.4f", na_rep="-"))
        seen = table[table.n > 0]
        before, after = (float(seen[seen.calibrated == flag].ece.mean()) for flag in (False, True))
        if cfg.draft is not None:
            own = Path(cfg.draft) / "calibration.json"
            best = min([before, *_error_of(own, test, cfg.bins)])
            if after > best:
                raise ValueError(
                    f"draft={cfg.draft}: on the held-out prompts the calibration error is {after:.4f} with this "
                    f"calibration and {best:.4f} without, so {own} was left as it was; fit on more rounds, or leave "
                    f"draft= out to keep this calibration in {folder} alone"
                )
            calibration.save(own)
        stage.finish(
            {
                "prompts_fitted": len({p.prompt for p in fitted}),
                "prompts_judged": len({p.prompt for p in held_out}),
                "ece_before": before,
                "ece_after": after,
                "temperatures_at_the_edge_of_the_grid": len(calibration.at_edge),
            },
            next=command("serve", cfg, name=cfg.name, rounds=str(judged), calibration=str(folder / "calibration.json")),
        )
    return folder


def _error_of(file: Path, test: Rounds, bins: int) -> list[float]:
    """Mean calibration error of the calibration in `file` on `test`; nothing where there is none that can be judged."""
    if not file.is_file():
        return []
    there = Calibration.load(file)
    if there.prompts & set(test.prompts) or test.logits.shape[1] > len(there.temperatures):
        return []
    rows = there.judge(test.logits, test.accepted, test.proposed, test.prompts, bins)
    errors = [row["ece"] for row in rows if row["calibrated"] and row["n"]]
    return [sum(errors) / len(errors)]


def rounds_digest(path: str | Path) -> str:
    """What identifies a file of rounds: its content, wherever it lies."""
    return hashlib.sha256(rounds_file(path).read_bytes()).hexdigest()[:16]
