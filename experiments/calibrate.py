"""specbench calibrate: fit temperatures of a confidence head on some recorded prompts and evaluate them on others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from specbench.cli.checks import check_before
from specbench.cli.errors import naming
from specbench.cli.following import command
from specbench.cli.recording import recorded
from specbench.cli.stages import Stage
from specbench.cli.tracked_stages import tracked_output
from specbench.decoding.calibration import Calibration, fit
from specbench.evaluation.recorded_rounds import Rounds, conversations, flatten, recorded_rounds, rounds_file, split
from specbench.files.atomic import json_line, write_json, write_text
from specbench.runs.run_folder import folder_name, read_lines

RESULTS = ("calibration.json", "reliability.json", "slots.csv")


def run(cfg: DictConfig) -> Path:
    """Write calibration.json, slots.csv (one row per slot, before and after) and reliability.json; returns the folder.

    With `draft` the calibration is also written beside that draft if its calibration error on the held-out rounds is
    lower than without calibration and lower than that of an existing calibration. Otherwise ValueError.
    """
    check_before("calibrate", cfg)
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
    folder = Path(cfg.root) / "calibrate" / folder_name(cfg.name, "a folder (name=)")
    inputs = {"contents": [rounds_digest(path) for path in (cfg.rounds, cfg.held_out) if path is not None]}
    with Stage("calibrate", folder, {**recorded(cfg), **inputs}, force=cfg.force, results=RESULTS) as stage:
        if not stage.done:
            name = f"calibrate-{cfg.name}"
            with tracked_output("calibrate", name, stage, cfg, {"split": cfg.seed}) as (run, wandb):
                calibration = fit(learn.logits, learn.accepted, learn.proposed, learn.prompts, bins=cfg.bins)
                rows = calibration.judge(test.logits, test.accepted, test.proposed, test.prompts, cfg.bins)
                calibration.save(stage.work / "calibration.json")
                write_json(stage.work / "reliability.json", rows)
                table = pd.DataFrame(rows).drop(columns="reliability")
                table.to_csv(stage.work / "slots.csv", index=False)
                judged = cfg.held_out
                if judged is None:  # no schedule may be judged on the other rounds, so these stand alone
                    judged = folder / "held_out.jsonl"
                    kept, lines = {p.prompt for p in held_out}, read_lines(rounds_file(cfg.rounds))
                    named = zip(lines, conversations(lines), strict=True)
                    lines = [json_line(line) for line, prompt in named if prompt in kept]
                    write_text(stage.work / judged.name, "".join(lines))
                print(printed(table))
                before, after = _errors(rows)
                facts = {
                    "prompts_fitted": len({p.prompt for p in fitted}),
                    "prompts_judged": len({p.prompt for p in held_out}),
                    "ece_before": before,
                    "ece_after": after,
                    "ece_of_a_perfect_head": _mean(row["ece_floor"] for row in rows if row["calibrated"]),
                    "temperatures_at_the_edge_of_the_grid": len(calibration.at_edge),
                }
                wandb.rows("slots", table.to_dict("records"))
                run.finish(**facts)
            made = str(folder / "calibration.json")
            stage.finish(facts, next=command("serve", cfg, name=cfg.name, rounds=str(judged), calibration=made))
    if cfg.draft is not None:
        _place(Calibration.load(folder / "calibration.json"), Path(cfg.draft), test, cfg.bins, folder)
    return folder


def printed(table: pd.DataFrame) -> str:
    """The rows for a terminal: the ECE beside the most that a perfect head would show (95%), and the root mean square
    error without noise with its interval."""
    ends = zip(table["rms"], table["rms_low"], table["rms_high"], strict=True)
    words = ["-" if pd.isna(low) else f"{rms:.3f} [{low:.3f}, {high:.3f}]" for rms, low, high in ends]
    kept = table.drop(columns=["ece_floor", "rms", "rms_low", "rms_high"]).rename(columns={"ece_band": "ece of noise"})
    return kept.assign(**{"error without noise [95%]": words}).to_string(index=False, float_format="%.4f", na_rep="-")


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _errors(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean calibration error over the slots that were reached, without and with the calibration."""
    found = [[row["ece"] for row in rows if row["calibrated"] == flag and row["n"]] for flag in (False, True)]
    return sum(found[0]) / len(found[0]), sum(found[1]) / len(found[1])


def _place(calibration: Calibration, draft: Path, test: Rounds, bins: int, folder: Path) -> None:
    """Write the calibration beside a draft unless no calibration, or the existing one, is better on `test`."""
    before, after = _errors(calibration.judge(test.logits, test.accepted, test.proposed, test.prompts, bins))
    own = draft / "calibration.json"
    best = min([before, *_error_of(own, test, bins)])
    if after > best:
        raise ValueError(
            f"draft={draft}: on the held-out prompts the calibration error is {after:.4f} with this calibration and "
            f"{best:.4f} without, so {own} was left as it was; fit on more rounds, or leave draft= out to keep this "
            f"calibration in {folder} alone"
        )
    calibration.save(own)


def _error_of(file: Path, test: Rounds, bins: int) -> list[float]:
    """Mean calibration error of the calibration in `file` on `test`; None if there is none that can be evaluated."""
    if not file.is_file():
        return []
    there = Calibration.load(file)
    if there.prompts & set(test.prompts) or test.logits.shape[1] > len(there.temperatures):
        return []
    rows = there.judge(test.logits, test.accepted, test.proposed, test.prompts, bins)
    errors = [row["ece"] for row in rows if row["calibrated"] and row["n"]]
    return [sum(errors) / len(errors)]


def rounds_digest(path: str | Path) -> str:
    """Identity of a file of rounds: the digest of its content."""
    return hashlib.sha256(rounds_file(path).read_bytes()).hexdigest()[:16]
