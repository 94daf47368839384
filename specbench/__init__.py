"""SpecBench trains and evaluates draft models for speculative decoding.

    import specbench as sb
    target = sb.Target.load("package:data/embedded", taps=[1, 3, 5])
    data   = sb.TargetCache.build(target, "answers.jsonl", "cache/", validation_fraction=0.1)
    draft  = sb.DSpark.for_target(target, layers=2, block_size=7)
    module = sb.DraftTraining(draft, sb.Objective(ce=0.1, tv=0.9, confidence=1.0))
    sb.Trainer(max_steps=300, callbacks=[sb.DecodeProbe(target, every=100)]).fit(module, data)
    result = sb.evaluate(target, draft, suite="embedded", temperature=0)

`dir(specbench)` lists what is public; docs/library.md describes it. A name is imported when it is first used, so that
`import specbench` costs nothing and readers of files need no torch.

Read the package in the order in which data flows through it; a folder imports only from those before it:

    blocks.py      the data layout of samples, batches and blocks
    requirements_check.py  old or missing packages are refused by name
    progress.py    one display of progress for every long loop
    files/         atomic files, JSON lines, data sets of the Hugging Face Hub
    runs/          run folders, provenance, Weights & Biases
    metrics/       every formula once, and the torchmetrics classes over it
    models/        the target, the layers of drafts, attention, key-value cache, embedding and head; fast/: faster paths
    drafts/        the contract (draft.py), initialisation, parallel.py, recurrent.py, one file a method, baselines
    checkpoints/   published formats in and out, draft folders, model cards
    losses/        terms, slot weights, the chunked objective and its reference
    decoding/      the loop, sampling, verification, scheduling, calibration of confidence
    data/          prompts/, answers/, cache/, loading/
    training/      the LightningModule, callbacks, pretraining of small targets
    evaluation/    decoding of benchmarks into records, teacher-forced acceptance, audits
    profiling/     measured cost of decoding, training steps and reading
    serving/       simulation of an engine under load
    library/       what a script or notebook calls beside these: Trainer, evaluate, compare, load_draft
    cli/           the command line: overrides, help, errors, stages
"""

from __future__ import annotations

import importlib
from typing import Any

from specbench.requirements_check import check_requirements

check_requirements()

# Public name -> the module that has it; __init__.pyi says the same to type checkers.
PUBLIC = {
    "Target": "specbench.models.target",
    "answer": "specbench.library.answers",
    "TargetCache": "specbench.data.loading.target_cache",
    "OnlineTarget": "specbench.data.loading.online",
    "Draft": "specbench.drafts.draft",
    "DSpark": "specbench.drafts.dspark",
    "DFlash": "specbench.drafts.dflash",
    "Eagle3": "specbench.drafts.eagle3",
    "PEagle": "specbench.drafts.p_eagle",
    "MTP": "specbench.drafts.mtp",
    "DFlash2": "specbench.drafts.dflash2",
    "Domino": "specbench.drafts.domino",
    "JetSpec": "specbench.drafts.jetspec",
    "Objective": "specbench.losses.objective",
    "DraftTraining": "specbench.training.draft_training",
    "DecodeProbe": "specbench.training.callbacks",
    "Trainer": "specbench.library.training",
    "train": "specbench.library.training",
    "Trained": "specbench.library.training",
    "evaluate": "specbench.library.evaluation",
    "Evaluation": "specbench.library.evaluation",
    "Estimate": "specbench.library.evaluation",
    "compare": "specbench.library.comparison",
    "load_draft": "specbench.library.drafts",
}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        found = getattr(importlib.import_module(PUBLIC[name]), name)
    # Only classes are looked for: `from specbench import fast` asks here first, while the drafts are being imported.
    elif (found := _method(name) if name[:1].isupper() else None) is None:
        raise AttributeError(f"module 'specbench' has no attribute {name!r}; it has {', '.join(PUBLIC)}")
    globals()[name] = found
    return found


def _method(name: str) -> Any:
    """A draft method of specbench/drafts/ by the name of its class, whether or not it is listed above."""
    installed = importlib.import_module("specbench.drafts.installed").installed()
    return next((kind for kind in installed.values() if kind.__name__ == name), None)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
