"""Callbacks of draft training: selection of the checkpoint by real decoding, progress, and a clean stop on signals."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ProgressBar

from specbench.data.loading.step_data import StepData
from specbench.decoding.loop import Limits, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.files.folder_swap import remove
from specbench.models.target import Target
from specbench.progress import Progress
from specbench.training.convergence import Convergence, convergence

PROBE_KEY = "probe/accepted_length"
PROMPTS = 12  # of a probe that chooses them itself
log = logging.getLogger("specbench")


class DecodeProbe(Callback):
    """Lightning callback: decode held-out prompts during training and log `probe/accepted_length`.

    The accepted length selects the best checkpoint, because the training loss can improve while the accepted length
    falls. The last step is probed too, however the training ends. The prompts are divided among ranks and the counts
    are summed. Decoding has its own seeds.

    Args:
        target: the target, on the device of the training.
        prompts: lists of token ids. None: the first held-out conversations of the training data up to their answers; if
            none are held out, training conversations, with a warning.
        every: optimiser steps between two probes.
        sampling: temperature and filters. None: greedy.
        max_new_tokens: maximum tokens of an answer.
        batch_size: requests decoded at once.
        folder: where last.ckpt is written after every probe, and best.ckpt after every probe that is the best so far.
            None: nowhere.

    Raises:
        ValueError: there are no prompts, `every` is below 1, or target and draft are on different devices.
    """

    def __init__(
        self,
        target: Target,
        prompts: Sequence[Sequence[int]] | None = None,
        every: int = 100,
        sampling: Sampling | None = None,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        folder: Path | None = None,
    ):
        if prompts is not None and not prompts:
            raise ValueError("the decode probe has no prompt; give it some, or set probe.every=null")
        if every < 1:
            raise ValueError(f"probe.every={every}: probe every 1 or more steps, or set it to null")
        self.target, self.prompts, self.every = target, prompts, every
        self.sampling = sampling or Sampling()
        self.limits = Limits(max_new_tokens, target.stop_token_ids, batch_size)
        self.folder, self.best = folder, -math.inf
        self.history: list[tuple[int, float]] = []
        # Of every probe, tokens committed and rounds of each prompt.
        self.counts: list[list[list[int]]] = []

    @property
    def convergence(self) -> Convergence | None:
        """Slope of the accepted length at the end; None with too few probes or prompts."""
        if not self.history:
            return None
        known = [(step, np.array(own)) for (step, _), own in zip(self.history, self.counts, strict=True) if own]
        return convergence([step for step, _ in known], [own for _, own in known])

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Forget what an earlier training found; a checkpoint that is continued gives its own back after this."""
        if stage == "fit":
            self.best, self.history, self.counts = -math.inf, [], []

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.target.device.type != module.device.type:
            raise ValueError(
                f"the probe's target is on {self.target.device} and the draft trains on {module.device}: load the "
                "target there (Target.load(..., device=...)), or set the Trainer's accelerator"
            )
        if self.prompts is None:
            self.prompts = first_prompts(trainer.datamodule, PROMPTS)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self.probe(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Probe the last step of a training that ended early, for example by EarlyStopping, but not by a signal."""
        if _by_a_signal(trainer) or (self.history and self.history[-1][0] == trainer.global_step):
            return
        found = self._judged(trainer, module)
        for logger in trainer.loggers:  # a module logs nothing any more by now
            logger.log_metrics(found, step=trainer.global_step)

    def probe(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Run the probe now and log accepted length and rounds."""
        found = self._judged(trainer, module)
        module.log(PROBE_KEY, found.pop(PROBE_KEY), prog_bar=True)
        module.log_dict(found)

    def _judged(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
        """Decode, remember, and keep the checkpoint where there is a folder."""
        rank, world = trainer.global_rank, trainer.world_size
        mine = list(range(rank, len(self.prompts), world))
        every = torch.zeros(len(self.prompts), 2, dtype=torch.float64, device=module.device)
        prompts = [self.prompts[i] for i in mine]
        # Lightning casts within its own steps only, and under mixed precision draft and target differ in dtype.
        with module.whole() as draft, trainer.precision_plugin.forward_context():
            training = draft.training
            draft.eval()
            bar = Progress("probe", len(mine), "prompts", shown=trainer.progress_bar_callback is not None)
            with bar:
                for done in speculative_decode(self.target, draft, prompts, self.sampling, self.limits, seeds=mine):
                    own = [sum(r.committed for r in done.rounds), len(done.rounds)]
                    every[mine[done.index]] = torch.tensor(own, dtype=torch.float64, device=module.device)
                    bar.advance()
            draft.train(training)
        if world > 1:
            dist.all_reduce(every)
        counts = every.sum(0)
        length = float(counts[0] / counts[1].clamp_min(1))
        self.history.append((trainer.global_step, length))
        self.counts.append(every.long().tolist())
        if self.folder is not None:
            better, self.best = length > self.best, max(self.best, length)
            for name in ("best", "last") if better else ("last",):
                save_checkpoint(trainer, self.folder / f"{name}.ckpt")
        return {PROBE_KEY: length, "probe/rounds": float(counts[1])}

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "best": self.best, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.best = [tuple(entry) for entry in state["history"]], state["best"]
        # Checkpoints of earlier versions lack the counts: probes without them take no part in the slope.
        self.counts = state.get("counts", [[] for _ in self.history])


def first_prompts(data: StepData, count: int) -> list[list[int]]:
    """The first `count` held-out conversations of `data`, each up to its first supervised token, as token ids.

    Errors: ValueError where the trainer was given no data module.
    """
    if not isinstance(data, StepData):
        raise ValueError("the decode probe has no prompt: give prompts=[[token ids], ...], or train on a data module")
    train, held = data.rows
    if not len(held):
        log.warning(
            "the decode probe judges by prompts that are trained on, because none are held out; set validation_fraction"
        )
    found = []
    for sample in data.samples((held if len(held) else train)[:count]):
        answer = sample.loss_mask.nonzero()
        if len(answer) and int(answer[0]):
            found.append(sample.tokens[: int(answer[0])].tolist())
    if not found:
        raise ValueError("no conversation of the data begins with a prompt: give the probe prompts of its own")
    return found


class KeepLast(Callback):
    """last.ckpt every `every` optimiser steps and at the end, for runs without a probe."""

    def __init__(self, folder: Path, every: int):
        self.folder, self.every, self.saved = folder, every, -1

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.saved != trainer.global_step and not _by_a_signal(trainer):
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        save_checkpoint(trainer, self.folder / "last.ckpt")
        self.saved = trainer.global_step


def _by_a_signal(trainer: L.Trainer) -> bool:
    """Whether a signal ended the training, which GracefulStop has then saved."""
    return any(isinstance(one, GracefulStop) and one.received for one in trainer.callbacks)


def save_checkpoint(trainer: L.Trainer, path: Path) -> None:
    """Write a checkpoint by an atomic rename; every rank must call it."""
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, path)
    finally:
        if trainer.is_global_zero:
            remove(temporary)


class TrainingProgress(ProgressBar):
    """Steps, rate and time left of a training, shown by `specbench.progress` instead of Lightning's progress bar.

    Beside them stand the metrics logged with `prog_bar=True`. They are read only when a line is shown, because reading
    waits for the device. `share` says how much of a budget is spent that is not counted in steps, for example seconds.
    """

    def __init__(self, what: str = "training", share: Callable[[], float] | None = None) -> None:
        super().__init__()
        self.what, self.share = what, share
        self._shown = True
        self._open: list[Progress] = []

    def disable(self) -> None:
        self._shown = False

    def enable(self) -> None:
        self._shown = True

    def _begin(self, what: str, total: float | int, unit: str, start: int = 0) -> None:
        known = int(total) if math.isfinite(total) and total > 0 else None
        bar = Progress(what, known, unit, start=start, shown=self._shown and self.trainer.is_global_zero)
        self._open.append(bar.__enter__())

    def _end(self, error: BaseException | None = None) -> None:
        self._open.pop().__exit__(None if error is None else type(error), error, None)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        steps = trainer.estimated_stepping_batches if self.share is None else math.inf
        self._begin(self.what, steps, "steps", trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        bar = self._open[-1]
        done = trainer.global_step - bar.count
        ends = bar.count + done == bar.total
        bar.advance(done, self._note(trainer) if bar.due() or ends else None)

    def _note(self, trainer: L.Trainer) -> str:
        said = [] if self.share is None else [f"{self.share():.0%} of its time"]
        for name, value in trainer.progress_bar_metrics.items():
            said.append(f"{name.replace('/', ' ').replace('_', ' ')} {float(value):.4g}")
        return ", ".join(said)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._end()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._begin("validation", sum(batches), "batches")

    def on_validation_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self._open[-1].advance()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._end()

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begin("test", sum(trainer.num_test_batches), "batches")

    def on_test_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self._open[-1].advance()

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._end()

    def on_predict_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begin("prediction", sum(trainer.num_predict_batches), "batches")

    def on_predict_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self._open[-1].advance()

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        while self._open:
            self._end(exception)


class GracefulStop(Callback):
    """SIGTERM and Ctrl-C end training at the next optimiser step, with a checkpoint in `folder`.

    The handler only sets a flag: Lightning's own handler talks to other ranks from inside the signal and can hang.
    Outside of the main thread, where no handler can be installed, signals are left alone.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._flag)

    def _flag(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        asked = self.received or 0
        if trainer.world_size > 1:
            flag = torch.tensor(asked, device=module.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            asked = int(flag)
        if asked:
            self.received = asked
            trainer.should_stop = True
            if self.folder is not None:
                save_checkpoint(trainer, self.folder / "last.ckpt")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._give_back()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._give_back()

    def _give_back(self) -> None:
        """Install the handlers that were there before."""
        while self._previous:
            signal.signal(*self._previous.popitem())
