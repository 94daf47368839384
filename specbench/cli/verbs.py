"""The verbs of the command line in the order in which data flows through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verb:
    """A stage: `run(cfg)` of `module`, composed from the root config `config` of the package `configs`."""

    config: str
    does: str
    module: str
    takes: str | None = None  # the setting that a word without "=" gives
    several: bool = False  # whether several such words are a list
    filters: bool = False  # whether KEY=... is short for filters.KEY=...
    experiments: bool = False  # whether +experiment=NAME sets its axes


def _verb(config: str, does: str, module: str | None = None, **more: Any) -> Verb:
    return Verb(config, does, f"experiments.{module or config}", **more)


VERBS = {
    "quickstart": _verb("quickstart", "all stages on the embedded target, without network and GPU"),
    "target": _verb("pretrain", "make a target: the small embedded one, or from a GGUF file", "target"),
    "prompts": _verb("prompts", "download, deduplicate against the benchmarks, split"),
    "answers": _verb("answers", "let the target answer every prompt"),
    "cache": _verb("cache", "store the target's hidden states; plan=true only prints size and time"),
    "train": _verb("train", "train a draft, then evaluate it", experiments=True),
    "tune": _verb("tune", "choose a method's learning rate by decoding held-out prompts"),
    "evaluate": _verb(
        "evaluate", "decode benchmarks or your prompts speculatively, with one record per prompt", experiments=True
    ),
    "speed": _verb("speed", "cost curves and speedup of decoding; `speed train`: a training step", takes="what"),
    "calibrate": _verb("calibrate", "calibrate the confidence head by one temperature per slot"),
    "serve": _verb("serve", "simulate throughput and speed per user under load", experiments=True),
    "compare": _verb("compare", "tables and figures of any runs", filters=True),
    "power": _verb("power", "prompts and seeds that resolve a gap, from pilot runs", filters=True),
    "report": _verb("report", "one HTML page, and a W&B report if there is a key", filters=True),
    "export": _verb("export", "write a draft in a published format"),
    "import": _verb("import", "read a draft from a published format", "import_draft"),
    "submit": _verb("submit", "write results as small files that others can check", takes="runs", several=True),
    "check-submission": _verb(
        "check_submission", "check results, and decode prompts again", takes="files", several=True
    ),
    "leaderboard": _verb("leaderboard", "a static site from a folder of results", takes="results"),
    "sync": _verb("sync", "upload offline W&B runs and verify that they arrived"),
    "rerun": _verb("rerun", "repeat a run from its record and compare the numbers"),
    "reproduce": _verb("reproduce", "an experiment, its tables and its report in one command", takes="name"),
    "status": _verb("status", "what exists below root, and the command that comes next; also `specbench` alone"),
    "docs": _verb("docs", "the documentation, without a network; `docs NAME`: one page", takes="page"),
    "completion": _verb("completion", "the completion script of a shell: bash, zsh or fish", takes="shell"),
}
