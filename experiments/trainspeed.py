"""specbench speed train: time and memory of a training step, compared with a straightforward one."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig

from specbench.cli.assembly import device_of
from specbench.cli.stages import Stage, container
from specbench.cli.tracked_stages import tracked_output
from specbench.files.atomic import write_json, write_text
from specbench.profiling.step_report import PARTS, TimingSettings, markdown, sized
from specbench.profiling.training_speed import SHAPES
from specbench.progress import Progress
from specbench.runs.provenance import hardware
from specbench.runs.run_folder import folder_name

RESULTS = ("steps.csv", "steps.json", "steps.md")


def run(cfg: DictConfig) -> Path:
    """Write steps.csv, steps.json and steps.md: one row per part and variant; returns their folder."""
    asked = cfg.train
    scale, device = place_of(cfg)
    with stage_of(cfg) as stage:
        if stage.done:
            return stage.folder
        folder = stage.work
        sizes = container(asked.sizes or {})
        how = TimingSettings(
            asked.repeats, asked.warmup, asked.threads, asked.packing.row_length, asked.packing.vocabulary
        )
        shapes = {name: sized(shape, sizes, device) for name, shape in SHAPES[scale].items()}
        name = f"speed-{stage.folder.name}"
        with tracked_output("speed-train", name, stage, cfg, {}, shape=scale, device=device) as (run, wandb):
            rows, checks = [], {}
            with Progress("speed", len(asked.parts), "parts") as bar:
                for part in asked.parts:
                    found, said = PARTS[part](shapes, how)
                    rows += [{"part": part, **row} for row in found]
                    checks |= {f"{part}.{key}": value for key, value in said.items()}
                    bar.advance()
            table = pd.DataFrame(rows)
            table.to_csv(folder / "steps.csv", index=False)
            facts = hardware() | {"platform": platform.platform(), "torch": torch.__version__, "threads": asked.threads}
            used = {name: asdict(shape) for name, shape in shapes.items()}
            write_json(folder / "steps.json", {"rows": rows, "checks": checks, "shapes": used, "machine": facts})
            text = markdown(table)
            write_text(folder / "steps.md", text)
            wandb.rows("steps", rows)
            run.finish(**checks)
        print(text)
        stage.finish(checks)
    return stage.folder


def place_of(cfg: DictConfig) -> tuple[str, str]:
    """The shape that is timed and the kind of device, as the settings or the machine say. Errors: ValueError."""
    asked = cfg.train
    unknown = [part for part in asked.parts if part not in PARTS]
    if unknown or not asked.parts:
        raise ValueError(f"train.parts={list(asked.parts)}: choose from {', '.join(PARTS)}")
    device = device_of(cfg.device).type
    scale = asked.shape or ("qwen3_4b" if device == "cuda" else "small")
    if scale not in SHAPES:
        raise ValueError(f"train.shape={scale}: choose one of {', '.join(SHAPES)}, or null for the machine's")
    return scale, device


def stage_of(cfg: DictConfig) -> Stage:
    """The stage of this measurement, not entered."""
    scale, device = place_of(cfg)
    name = folder_name(cfg.name or f"train-{scale}-{device}", "a folder (name=)")
    return Stage("speed", Path(cfg.root) / "speed" / name, cfg, force=cfg.force, results=RESULTS)
