"""Prompts, answers and a cache of a few arithmetic questions on the embedded target, for tests of what comes after."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.quickstart import stage

QUESTIONS = 12


def prepare(root: Path) -> list[str]:
    """Run the stages before training below `root`; returns the overrides that train and evaluate on them need."""
    lines = [{"messages": [{"role": "user", "content": f"What is {n} + {n + 3}?"}]} for n in range(11, 11 + QUESTIONS)]
    chats, asked = root / "chats.jsonl", root / "asked.jsonl"
    text = {"role": "assistant", "content": "A number."}
    chats.write_text("".join(json.dumps({"messages": [*line["messages"], text]}) + "\n" for line in lines))
    asked.write_text("".join(json.dumps({"turns": [f"What is {n} + 5?"]}) + "\n" for n in (41, 52, 63)))
    common = [f"root={root}", "data=jsonl"]
    source = [f"data.source.paths=[{chats}]", "decontaminate=null", "near_duplicate=null", "validation=0.3"]
    stage("prompts", [*common, *source])
    stage("answers", [*common, "max_new_tokens=24"])
    stage("cache", common)
    return [
        *common,
        "trainer=smoke",
        "tracking=disabled",
        "trainer.max_steps=2",
        "trainer.data.validation_fraction=0.3",
        f"suite.prompts={asked}",
    ]
