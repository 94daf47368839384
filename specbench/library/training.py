"""A Lightning Trainer with the settings that draft training needs, so that a script need not know them."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ProgressBar

from specbench.training.callbacks import TrainingProgress

ELSEWHERE = {
    "gradient_clip_val": "set DraftTraining(..., gradient_clip=VALUE), which clips once a step, after the division",
    "gradient_clip_algorithm": "DraftTraining clips by norm: set its gradient_clip",
    "accumulate_grad_batches": "set micro_batches_per_step of TargetCache or OnlineTarget: one batch is one step here",
}


class Trainer(L.Trainer):
    """`lightning.Trainer` with other defaults for draft training. A plain `lightning.Trainer` works as well.

    The data modules divide conversations among ranks themselves, so no sampler is added. Metrics are logged every
    `DraftTraining(log_every=...)` steps. Progress is shown as elsewhere in SpecBench unless another progress bar is
    given. Nothing is written unless requested (`logger=True`, a ModelCheckpoint).

    Args:
        max_steps: optimiser steps; -1: no limit.
        **settings: all other arguments of `lightning.Trainer`.

    Raises:
        ValueError: `gradient_clip_val` or `accumulate_grad_batches` is set. A step sums weighted terms over its
            micro-batches and divides once by the sum of weights, so use `DraftTraining(gradient_clip=...)` and
            `micro_batches_per_step` of the data instead.
    """

    def __init__(self, *, max_steps: int = -1, **settings: Any):
        for name, remedy in ELSEWHERE.items():
            if settings.get(name) not in (None, 1 if name == "accumulate_grad_batches" else None):
                raise ValueError(f"Trainer({name}={settings[name]!r}): {remedy}")
        callbacks = settings.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
        defaults = {
            "logger": False,
            "enable_checkpointing": any(isinstance(one, Checkpoint) for one in callbacks),
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            # Inference tensors would outlive a validation: a sharded draft gathers its weights into the same memory.
            "inference_mode": False,
        }
        if "val_check_interval" in settings:
            defaults["check_val_every_n_epoch"] = None
        asked = settings.get("enable_progress_bar")
        if asked is not False and not any(isinstance(one, ProgressBar) for one in callbacks):
            settings["callbacks"] = [*callbacks, TrainingProgress()]
        super().__init__(max_steps=max_steps, **(defaults | settings))
