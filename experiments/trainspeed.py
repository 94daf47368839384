"""specbench speed train: time and memory of a training step, compared with a straightforward one."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig

from specbench.cli.assembly import device_of
from specbench.cli.stages import Stage, container
from specbench.cli.tracked_stages import tracked_output
from specbench.files.atomic import write_json, write_text
from specbench.profiling.step_measurement import PrepareStep, StepCost, fresh, measure
from specbench.profiling.training_speed import (
    SHAPES,
    StepShape,
    against_straightforward,
    agreement,
    flops,
    matrix_step,
    mixed_lengths,
    one_more_term,
    packing,
)
from specbench.progress import Progress
from specbench.runs.provenance import hardware
from specbench.runs.run_folder import folder_name

RESULTS = ("steps.csv", "steps.json", "steps.md")
PARTS = ("dspark", "eagle3", "terms", "packing")


def run(cfg: DictConfig) -> Path:
    """Write steps.csv, steps.json and steps.md: one row per part and variant; returns their folder."""
    asked = cfg.train
    scale, device = place_of(cfg)
    with stage_of(cfg) as stage:
        if stage.done:
            return stage.folder
        folder = stage.work
        sizes = container(asked.sizes or {})
        shapes = {name: sized(shape, sizes, device) for name, shape in SHAPES[scale].items()}
        name = f"speed-{stage.folder.name}"
        with tracked_output("speed-train", name, stage, cfg, {}, shape=scale, device=device) as (run, wandb):
            rows, checks = [], {}
            with Progress("speed", len(asked.parts), "parts") as bar:
                for part in asked.parts:
                    found, said = PART[part](shapes, asked)
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


def sized(shape: StepShape, sizes: Mapping[str, Any], device: str) -> StepShape:
    """The shape on this device with the sizes that were asked for."""
    unknown = sizes.keys() - asdict(shape).keys()
    if unknown:
        raise ValueError(f"train.sizes has no {', '.join(sorted(unknown))}; it takes {', '.join(asdict(shape))}")
    dtype = shape.dtype if device == "cuda" else "float32"
    return replace(shape, **{"device": device, "dtype": dtype} | dict(sizes))


def _against(name: str, shapes: Mapping[str, StepShape], asked: DictConfig) -> tuple[list[dict], dict[str, float]]:
    shape = shapes[name]
    costs = _measured(against_straightforward(shape), asked)
    said = {f"difference_{key}": value for key, value in fresh(partial(agreement, shape)).items()}
    work, size = fresh(partial(flops, shape)), 8192 if shape.device == "cuda" else 2048
    rate = 2 * size**3 / _measured({"matrix": partial(matrix_step, shape, size)}, asked)["matrix"].seconds
    base = costs["straightforward"]
    rows = [_row(variant, cost, base) for variant, cost in costs.items()]
    for row in rows:
        if row["variant"] != "straightforward":
            # Of the rate of one large matrix product on the same device, which no step can exceed.
            row["utilisation"] = work / row["seconds"] / rate
    return rows, said | {"teraflops": work / 1e12, "matrix_teraflops_a_second": rate / 1e12}


def _terms(shapes: Mapping[str, StepShape], asked: DictConfig) -> tuple[list[dict], dict[str, float]]:
    costs = _measured(one_more_term(shapes["dspark"]), asked)
    return [_row(variant, cost, costs["product"]) for variant, cost in costs.items()], {}


def _packing(shapes: Mapping[str, StepShape], asked: DictConfig) -> tuple[list[dict], dict[str, float]]:
    tokens, rows = sum(map(sum, mixed_lengths())), []
    for name, shape in shapes.items():
        small = replace(shape, vocabulary=asked.packing.vocabulary)
        costs = _measured(packing(small, asked.packing.row_length), asked)
        for variant, cost in costs.items():
            row = _row(f"{name} {variant}", cost, costs["padded"])
            rows.append(row | {"tokens_per_second": tokens / cost.seconds})
    return rows, {}


PART = {
    "dspark": partial(_against, "dspark"),
    "eagle3": partial(_against, "eagle3"),
    "terms": _terms,
    "packing": _packing,
}


def _measured(builds: Mapping[str, PrepareStep], asked: DictConfig) -> dict[str, StepCost]:
    return measure(builds, repeats=asked.repeats, warmup=asked.warmup, threads=asked.threads)


def _row(variant: str, cost: StepCost, base: StepCost) -> dict[str, Any]:
    ratios = {
        "time_ratio": cost.seconds / base.seconds,
        "processor_ratio": cost.processor_seconds / base.processor_seconds if base.processor_seconds else None,
        "memory_ratio": cost.peak_bytes / base.peak_bytes if base.peak_bytes else None,
    }
    return {"variant": variant, **asdict(cost), **ratios}


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown; its ratios are to the straightforward step, to the unchanged step, or to padded rows."""
    shown = {
        "part": table["part"],
        "variant": table["variant"],
        "seconds": table["seconds"].map("{:.3f}".format),
        "low to high": [f"{low:.3f} to {high:.3f}" for low, high in zip(table["low"], table["high"], strict=True)],
        "processor seconds": table["processor_seconds"].map("{:.3f}".format),
        "MB above the model": (table["peak_bytes"] / 1e6).map("{:.0f}".format),
        "time ratio": table["time_ratio"].map("{:.3f}".format),
        "processor ratio": table["processor_ratio"].map("{:.3f}".format),
        "memory ratio": table["memory_ratio"].map("{:.3f}".format),
    }
    for column, form in (("utilisation", "{:.2f}"), ("tokens_per_second", "{:.0f}")):
        if column in table:
            shown[column.replace("_", " ")] = [form.format(v) if pd.notna(v) else "" for v in table[column]]
    lines = ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in zip(*shown.values(), strict=True)]
    return "\n".join(lines) + "\n"
