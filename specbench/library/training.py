"""Train a draft into a run folder: the Trainer, selection of the checkpoint by decoding, draft/ and the summary.

`train` is what a script calls; the command line opens the run folder itself, with its configuration and its tracking,
and calls `train_into`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.loggers import Logger

from specbench.checkpoints.draft_folder import save_draft
from specbench.data.loading.step_data import StepData
from specbench.drafts.draft import Draft
from specbench.files.folder_lock import locked
from specbench.files.torch_checkpoints import read_checkpoint
from specbench.progress import first_rank
from specbench.runs.folder_logger import FolderLogger
from specbench.runs.provenance import provenance
from specbench.runs.run_folder import RunFolder, read_settings, read_summary
from specbench.training.callbacks import DecodeProbe, GracefulStop, KeepLast, TrainingProgress
from specbench.training.draft_training import DraftTraining, digest, trainable_parameters

ELSEWHERE = {
    "gradient_clip_val": "set DraftTraining(..., gradient_clip=VALUE), which clips once per step, after the division",
    "gradient_clip_algorithm": "DraftTraining clips by norm: set its gradient_clip",
    "accumulate_grad_batches": "set micro_batches_per_step of TargetCache or OnlineTarget: one batch is one step here",
}
SAVE_EVERY = 1000  # optimiser steps between checkpoints of a training without a probe and without validation


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
        # The weights after a step are the ones wanted here; the warning asks whether those before it were meant.
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        super().__init__(max_steps=max_steps, **(defaults | settings))


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Args:
        draft: the draft of the selected checkpoint.
        step: the optimiser step of this checkpoint.
        folder: the run folder.
        summary: content of summary.json.
    """

    draft: Draft
    step: int
    folder: Path
    summary: dict[str, Any]


def train(
    module: DraftTraining,
    data: StepData,
    folder: str | Path,
    *,
    max_steps: int | None = None,
    probe: DecodeProbe | None = None,
    validate_every: int | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    method: str | None = None,
    training_seed: int = 0,
    **settings: Any,
) -> Trained:
    """Train a draft into a run folder, as `specbench train` does.

    `specbench evaluate draft=FOLDER` and `load_draft(FOLDER, target)` read the result. SIGTERM and Ctrl-C end the
    training at the next step with a checkpoint and raise KeyboardInterrupt.

    Args:
        module: draft, loss and optimiser settings.
        data: a `TargetCache` or `OnlineTarget`.
        folder: new or empty, or that of the same training, interrupted, which continues from its last checkpoint.
        max_steps: optimiser steps. None: those of the module.
        probe: decodes held-out prompts during training; the checkpoint with the longest accepted length becomes draft/.
            None: the last step becomes draft/.
        validate_every: optimiser steps between teacher-forced validations. None: no validation.
        callbacks: further Lightning callbacks.
        loggers: further Lightning loggers.
        method: name of the draft in tables. None: its class.
        training_seed: the seed in the record.
        **settings: arguments of `lightning.Trainer`.

    Returns:
        The finished training: the draft, the optimiser step of its checkpoint, the run folder and its summary.

    Raises:
        ValueError: the folder has other content, another process trains into it, or a setting is not valid.
    """
    place, label = Path(folder), method or type(module.draft).__name__.lower()
    steps = module.max_steps if max_steps is None else max_steps
    if steps is None:
        raise ValueError("max_steps=None and DraftTraining(max_steps=None) do not say when to end: give one of them")
    if steps < 1:
        raise ValueError(f"max_steps={steps}: train for at least one step")
    facts = {"method": label, "target": data.target_name, "lineage": {"cache": data.lineage}}
    config = {
        "method": {"name": label, **module.hparams["draft"], "objective": module.hparams["objective"]},
        "target": {"name": data.target_name},
        "trainer": {"max_steps": steps, "recipe": module.hparams["training"], "validate_every": validate_every},
        "seed": {"init": training_seed, "data": data.seed, "anchors": module.anchor_seed},
    }
    _unfinished(place, module, steps)  # what is refused gets no lock
    with ExitStack() as held:
        if first_rank():
            place.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(place, place, warnings.warn))
        resumes = _unfinished(place, module, steps)
        with RunFolder(place.parent, "train", place.name, config, folder=place) as run:
            run.write_provenance(*provenance(sys.argv, config["seed"], data.lineage, None))
            return train_into(
                run,
                module,
                data,
                steps=steps,
                probe=probe,
                validate_every=validate_every,
                callbacks=callbacks,
                loggers=[FolderLogger(run), *loggers],
                resumes=resumes,
                facts=facts,
                **settings,
            )


def train_into(
    run: RunFolder,
    module: DraftTraining,
    data: StepData,
    *,
    steps: int,
    probe: DecodeProbe | None,
    validate_every: int | None,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    resumes: bool,
    facts: Mapping[str, Any],
    **settings: Any,
) -> Trained:
    """Train into a run folder that is open, and finish it: checkpoints/, draft/ and summary.json.

    resumes: continue from checkpoints/last.ckpt where there is one. facts: what the summary says beside the training's
    own numbers (method, target, lineage, ...). Every rank calls it; the first one writes.
    """
    for one in callbacks:
        if isinstance(one, EarlyStopping) and not validate_every:
            raise ValueError(
                f"EarlyStopping(monitor={one.monitor!r}) looks at validations, and validate_every={validate_every} "
                "asks for none: set trainer.validate_every (validate_every= in a script)"
            )
    keep = run.path / "checkpoints"
    stop = GracefulStop(keep)
    if probe is not None:
        probe.folder = keep
    if settings.get("enable_progress_bar") is False:
        callbacks = [one for one in callbacks if not isinstance(one, ProgressBar)]
    judge = probe or KeepLast(keep, validate_every or SAVE_EVERY)  # before those that show its number
    trainer = Trainer(
        max_steps=steps,
        logger=list(loggers),
        callbacks=[stop, judge, *callbacks],
        log_every_n_steps=module.log_every,
        val_check_interval=validate_every,
        limit_val_batches=1.0 if validate_every else 0,
        **settings,
    )
    last = keep / "last.ckpt"
    resumed = str(last) if resumes and last.exists() else None
    if resumed is not None:
        read_checkpoint(resumed)  # what cannot be read is refused by name, before any work
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    if stop.received:
        raise KeyboardInterrupt
    best = keep / ("last.ckpt" if probe is None else "best.ckpt")
    # From the checkpoint, so that what is written is the same whether the weights are whole or sharded here.
    trainer.strategy.barrier()
    kinds = [type(module.draft)]
    draft = DraftTraining.load_from_checkpoint(best, target_tables=data.tables, methods=kinds).published
    step = read_checkpoint(best)["global_step"]
    trainer.strategy.barrier()  # once every rank has read it, the folder may take another name
    if run.writes:
        save_draft(draft, run.path / "draft", data.target_config, draft.settings)
    summary = {
        **facts,
        "probe_accepted_length": None if probe is None else probe.best,
        "probes": [] if probe is None else probe.history,
        "convergence": None if probe is None or probe.convergence is None else asdict(probe.convergence),
        "best_step": step,
        "steps": trainer.global_step,
        "parameters": trainable_parameters(draft),
        "trained_tokens": module.supervised,
        "data_wait_share": module.data_wait.share,
        "training_flops": trainer.global_step * facts["flops_per_step"] if "flops_per_step" in facts else None,
        "training_seconds": module.seconds,
        "peak_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "lineage": {**facts["lineage"], "checkpoint": digest(draft.state_dict().items())},
        "damage": len(data.damage),
    }
    run.finish(**summary)
    return Trained(draft, step, run.path, summary)


def _unfinished(folder: Path, module: DraftTraining, steps: int) -> bool:
    """Whether the folder holds this very training, interrupted. Errors: ValueError where it holds something else."""
    if not folder.exists() or not any(found.name != ".lock" for found in folder.iterdir()):
        return False
    last = folder / "checkpoints" / "last.ckpt"
    remedy = "name a new folder"
    try:
        status = read_summary(folder)["status"]
    except FileNotFoundError:
        raise ValueError(f"folder={str(folder)!r} is not empty and holds no training: {remedy}") from None
    if status == "finished":
        raise ValueError(f"folder={str(folder)!r} holds a finished training: {remedy}")
    if not last.exists():
        return False
    if read_checkpoint(last)["hyper_parameters"] != dict(module.hparams):
        raise ValueError(f"folder={str(folder)!r} holds an interrupted training of other settings: {remedy}")
    if (begun := read_settings(folder)["trainer"]["max_steps"]) != steps:
        raise ValueError(
            f"folder={str(folder)!r} holds an interrupted training of max_steps={begun}, and this one has {steps}, "
            f"with another schedule of the learning rate: {remedy}"
        )
    return True
