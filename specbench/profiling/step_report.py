"""Rows of what a training step costs, part by part, and their table as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from specbench.profiling.step_measurement import PrepareStep, StepCost, fresh, measure
from specbench.profiling.training_speed import (
    StepShape,
    against_straightforward,
    agreement,
    flops,
    matrix_step,
    mixed_lengths,
    one_more_term,
    packing,
)


@dataclass(frozen=True)
class TimingSettings:
    """How steps are timed: repetitions after a warm-up, threads; tokens of a packed row and of its vocabulary."""

    repeats: int
    warmup: int
    threads: int
    row_length: int
    vocabulary: int


def sized(shape: StepShape, sizes: Mapping[str, Any], device: str) -> StepShape:
    """The shape on this device with the sizes that were asked for."""
    unknown = sizes.keys() - asdict(shape).keys()
    if unknown:
        raise ValueError(f"train.sizes has no {', '.join(sorted(unknown))}; it takes {', '.join(asdict(shape))}")
    dtype = shape.dtype if device == "cuda" else "float32"
    return replace(shape, **{"device": device, "dtype": dtype} | dict(sizes))


def _against(name: str, shapes: Mapping[str, StepShape], how: TimingSettings) -> tuple[list[dict], dict[str, float]]:
    shape = shapes[name]
    costs = _measured(against_straightforward(shape), how)
    said = {f"difference_{key}": value for key, value in fresh(partial(agreement, shape)).items()}
    work, size = fresh(partial(flops, shape)), 8192 if shape.device == "cuda" else 2048
    rate = 2 * size**3 / _measured({"matrix": partial(matrix_step, shape, size)}, how)["matrix"].seconds
    base = costs["straightforward"]
    rows = [_row(variant, cost, base) for variant, cost in costs.items()]
    for row in rows:
        if row["variant"] != "straightforward":
            # Of the rate of one large matrix product on the same device, which no step can exceed.
            row["utilisation"] = work / row["seconds"] / rate
    return rows, said | {"teraflops": work / 1e12, "matrix_teraflops_a_second": rate / 1e12}


def _terms(shapes: Mapping[str, StepShape], how: TimingSettings) -> tuple[list[dict], dict[str, float]]:
    costs = _measured(one_more_term(shapes["dspark"]), how)
    return [_row(variant, cost, costs["product"]) for variant, cost in costs.items()], {}


def _packing(shapes: Mapping[str, StepShape], how: TimingSettings) -> tuple[list[dict], dict[str, float]]:
    tokens, rows = sum(map(sum, mixed_lengths())), []
    for name, shape in shapes.items():
        small = replace(shape, vocabulary=how.vocabulary)
        costs = _measured(packing(small, how.row_length), how)
        for variant, cost in costs.items():
            row = _row(f"{name} {variant}", cost, costs["padded"])
            rows.append(row | {"tokens_per_second": tokens / cost.seconds})
    return rows, {}


PARTS = {
    "dspark": partial(_against, "dspark"),
    "eagle3": partial(_against, "eagle3"),
    "terms": _terms,
    "packing": _packing,
}


def _measured(builds: Mapping[str, PrepareStep], how: TimingSettings) -> dict[str, StepCost]:
    return measure(builds, repeats=how.repeats, warmup=how.warmup, threads=how.threads)


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
