"""What an evaluation logs to W&B in addition to its record: the table and the curves by slot, reliability diagrams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from specbench.decoding.calibration import by_slot, probabilities
from specbench.evaluation.recorded_rounds import flatten, read_rounds
from specbench.runs.run_folder import RunFolder
from specbench.runs.wandb_tracking import Tracking

COLUMNS = ("slot", "conditional", "low", "high", "n", "survival")


def log_evaluation(tracking: Tracking, run: RunFolder, method: str, numbers: Mapping[str, Any]) -> None:
    """Log the slots of `numbers` (analysis.statistics.headline) of an evaluation whose rounds.jsonl is written.

    Figures go to RUN/figures too.

    Nothing is drawn, and no library for it imported, where tracking is disabled.
    """
    if tracking.wandb is None:
        return
    slots = numbers.get("slots", [])
    tracking.table("slots", COLUMNS, [[row.get(name) for name in COLUMNS] for row in slots])
    from analysis.figures import acceptance as figures
    from analysis.figures import curves, style

    drawn = {}
    if any(row["n"] for row in slots):
        frame = pd.DataFrame(slots).assign(domain="all benchmarks", variant=method)
        drawn["conditional_acceptance"] = figures.by_slot(frame)
    if rows := reliability(run):
        drawn["reliability"] = curves.reliability(rows)
    for name, figure in drawn.items():
        for file in style.save(figure, run.path / "figures", name, ("png",)):
            tracking.image(f"figures/{name}", file)


def reliability(run: RunFolder) -> list[dict[str, Any]]:
    """Reliability by slot of the confidences as the draft gave them; nothing for a draft without a confidence head."""
    if run.config.get("tree"):  # a tree's nodes have no confidence
        return []
    prompts = read_rounds(run.path)
    if not prompts or any(prompt.logits is None for prompt in prompts):
        return []
    rounds = flatten(prompts)
    rows = by_slot(probabilities(rounds.logits), rounds.accepted, rounds.proposed, prompts=rounds.prompts)
    return [{"calibrated": False, **row} for row in rows]
