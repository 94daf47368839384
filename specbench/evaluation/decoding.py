"""Decode a suite into a run folder, for the command line and the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger

from specbench.data.answers.templates import template_facts
from specbench.data.prompts.benchmarks import Benchmarks
from specbench.drafts.draft import Proposer
from specbench.evaluation.draft_evaluation import Answered, DraftEvaluation, Protocol, merged, write_rounds
from specbench.models.target import Target
from specbench.runs.run_folder import RunFolder


def decode_suite(
    run: RunFolder,
    target: Target,
    draft: Proposer | None,
    suite: Benchmarks,
    protocol: Protocol,
    labels: Mapping[str, Any],
    *,
    loggers: Sequence[Logger] = (),
    devices: int = 1,
    progress: Callable[[Answered], None] | None = None,
) -> list[Answered]:
    """Decode every prompt and write records.parquet and rounds.jsonl; prompts that `run` has already are not decoded
    again.

    Returns every prompt and turn in a fixed order on the first rank, nothing on the others.
    """
    module = DraftEvaluation(target, draft, protocol, run.path, labels, progress)
    trainer = L.Trainer(
        accelerator="cpu" if target.device.type == "cpu" else "gpu",
        devices=devices,
        logger=list(loggers) or False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    trainer.test(module, datamodule=suite, verbose=False)
    if trainer.global_rank:
        return []
    done = merged(run.path)
    run.write_records([item.record for item in done])
    write_rounds(run.path / "rounds.jsonl", done)
    return done


def facts_of(
    target: Target, draft: Proposer | None, suite: Benchmarks, protocol: Protocol, labels: Mapping[str, Any]
) -> dict[str, Any]:
    """The part of summary.json about an evaluation besides its numbers: what was decoded, and how."""
    return {
        **labels,
        "temperature": protocol.sampling.temperature,
        "accounting": protocol.limits.accounting,
        "prompts": suite.facts() | template_facts(target.tokenizer),
        "protocol": protocol.facts(str(target.dtype), draft and draft.block_size),
    }
