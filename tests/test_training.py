"""The training loop: resuming, choosing checkpoints by decoding, and stopping when asked to."""

from __future__ import annotations

import copy
import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp

from specbench.data.loading.online import OnlineTarget
from specbench.decoding.loop import Limits, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.losses.objective import Objective
from specbench.models.target import Target, new_causal_lm
from specbench.runs.folder_logger import FolderLogger
from specbench.runs.run_folder import RunFolder
from specbench.training.callbacks import DecodeProbe, GracefulStop, KeepLast, TrainingProgress
from specbench.training.data_wait import DataWait
from specbench.training.draft_training import DraftTraining, require_precision, warmup_cosine
from tests import toys
from tests.data.tiny_target import talks

STEPS, PROMPTS = 6, [[0, 3, 1], [2, 2], [4], [1, 1, 1]]


def train(until: int = STEPS, callbacks=(), resume: Path | None = None, lr: float = 1e-2, **settings) -> DraftTraining:
    """Up to optimiser step `until` of a schedule of STEPS, over epochs of three steps."""
    owner = toys.target()
    data = OnlineTarget(owner, talks(11, toys.VOCABULARY), samples_per_micro=2, micro_batches_per_step=2, threads=0)
    draft = copy.deepcopy(toys.draft("dspark", anchors=4)).train()
    objective = Objective(ce=0.1, tv=0.9, confidence=1.0, slot_weight={"exp": 4.0})
    module = DraftTraining(draft, objective, target_tables=owner.tables, max_steps=STEPS, lr=lr, **settings)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=until,
        max_epochs=-1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module


def assert_same_weights(one: DraftTraining, other: DraftTraining) -> None:
    weights = other.state_dict()
    assert weights.keys() == one.state_dict().keys()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize(
    "settings", [{"ema": 0.7}, pytest.param({"layer_decay": 0.5}, marks=pytest.mark.long)], ids=str
)
def test_a_resumed_run_equals_one_that_never_stopped(settings, tmp_path):
    """Stopped in the middle of the second epoch: the same data, anchors, learning rates and moments follow."""
    whole = train(**settings)
    half = train(until=4, callbacks=[KeepLast(tmp_path, every=4)], **settings)
    assert any((a != b).any() for a, b in zip(whole.state_dict().values(), half.state_dict().values(), strict=True))
    resumed = train(resume=tmp_path / "last.ckpt", **settings)
    assert_same_weights(whole, resumed)
    assert resumed.supervised == whole.supervised > half.supervised > 0


def test_last_checkpoint_is_kept_on_the_way_and_at_the_end(tmp_path):
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            path = tmp_path / "last.ckpt"
            seen.append(torch.load(path, weights_only=False)["global_step"] if path.exists() else None)

    train(callbacks=[KeepLast(tmp_path, every=4), Look()])
    assert seen == [None, None, None, 4, 4, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt"]


def test_the_probe_chooses_the_checkpoint_with_the_longest_accepted_length(tmp_path):
    """A learning rate this high makes later weights worse and better again; best.ckpt is the best that was seen."""
    owner = toys.target()
    probe = DecodeProbe(owner, PROMPTS, every=1, max_new_tokens=12, folder=tmp_path)
    train(callbacks=[probe], lr=0.1)
    assert [step for step, _ in probe.history] == [1, 2, 3, 4, 5, 6]
    lengths = dict(probe.history)
    assert probe.best == max(lengths.values()) > min(lengths.values())
    first_best = min(step for step, length in lengths.items() if length == probe.best)
    best, last = (torch.load(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("best", "last"))
    assert (best["global_step"], last["global_step"]) == (first_best, STEPS)
    # Its weights do give that accepted length.
    draft = copy.deepcopy(toys.draft("dspark", anchors=4))
    weights = {k.removeprefix("draft."): v for k, v in best["state_dict"].items() if k.startswith("draft.")}
    draft.load_state_dict(weights, strict=False)
    done = list(speculative_decode(owner, draft, PROMPTS, Sampling(), Limits(12), seeds=range(4)))
    rounds = [r.committed for d in done for r in d.rounds]
    assert sum(rounds) / len(rounds) == pytest.approx(probe.best)


def test_the_probe_leaves_training_as_it_is():
    probe = DecodeProbe(toys.target(), PROMPTS, every=1, sampling=Sampling(1.0), max_new_tokens=8)
    assert_same_weights(train(until=2, callbacks=[probe]), train(until=2))


class Kill(L.Callback):
    """Sends a signal to this very process after two optimiser steps."""

    def __init__(self, number: int):
        self.number = number

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 2:
            os.kill(os.getpid(), self.number)


def _stopped(rank: int, folder: Path, number: int) -> None:
    stop = GracefulStop(folder)
    before = signal.getsignal(number)
    train(callbacks=[Kill(number), stop])
    assert stop.received == number
    assert signal.getsignal(number) == before, "handlers are put back"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_ends_training_with_a_checkpoint_that_continues(number, tmp_path):
    mp.start_processes(_stopped, (tmp_path, number), nprocs=1, start_method="fork")
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 2
    assert_same_weights(train(resume=tmp_path / "last.ckpt"), train())


def trained_under(precision: str, method: str) -> tuple[DraftTraining, DecodeProbe]:
    """Four steps on a bf16 target with probes, as a GPU trains."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = new_causal_lm(toys.CONFIG).bfloat16()
    owner = Target(model, toys.CONFIG, toys.TAPS, name="toy", stop_token_ids=[])
    data = OnlineTarget(owner, talks(11, toys.VOCABULARY), samples_per_micro=2, micro_batches_per_step=2, threads=0)
    draft = copy.deepcopy(toys.draft(method)).train()
    draft.tables = owner.tables if precision == "bf16-mixed" else copy.deepcopy(owner.tables).float()
    tables = draft.tables
    module = DraftTraining(draft, Objective(kl=1.0), target_tables=tables, max_steps=4, lr=1e-2, warmup=0.0)
    probed = (
        owner
        if precision == "bf16-mixed"
        else Target(copy.deepcopy(model).float(), toys.CONFIG, toys.TAPS, name="toy", stop_token_ids=[])
    )
    probe = DecodeProbe(probed, PROMPTS, every=2, max_new_tokens=8)
    L.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=4,
        max_epochs=-1,
        callbacks=[probe],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    ).fit(module, datamodule=data)
    return module, probe


@pytest.mark.parametrize("method", toys.METHODS)
def test_mixed_precision_trains_and_probes_a_bf16_target(method):
    before = {k: p.detach().clone() for k, p in toys.draft(method).named_parameters()}
    mixed, probe = trained_under("bf16-mixed", method)
    exact, other = trained_under("32-true", method)
    moves = []
    for module in (mixed, exact):
        now = dict(module.draft.named_parameters())
        assert all(p.dtype == torch.float32 for p in now.values())
        moves.append(torch.cat([(now[k].detach() - before[k]).flatten() for k in before]))
    assert moves[1].norm() > 1e-2, "training moved nothing"
    # Rounding to bf16 turns few steps by a little; a gradient that is lost or counted twice turns them by far more.
    assert torch.cosine_similarity(*moves, 0) > 0.9
    assert [step for step, _ in probe.history] == [step for step, _ in other.history] == [2, 4]
    assert probe.best == pytest.approx(other.best, rel=0.3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight(value, where, monkeypatch):
    """Three good steps, then a value that is no number: in the loss, or in one gradient while the loss is finite."""
    seen, real = [], DraftTraining.loss

    def loss(self, *arguments):
        draft, found = arguments[0], real(self, *arguments)
        seen.append({k: p.detach().clone() for k, p in draft.named_parameters()})
        if len(seen) == 7:  # two micro-batches a step: the first of the fourth
            if where == "loss":
                return replace(found, value=found.value * value)
            next(p for p in draft.parameters() if p.requires_grad).register_hook(lambda g: g * value)
        return found

    monkeypatch.setattr(DraftTraining, "loss", loss)
    caught = []
    watch = L.Callback()
    watch.on_exception = lambda trainer, module, error: caught.append(module)
    with pytest.raises(ValueError, match=r"at step 3, and no weight .* lower trainer\.recipe\.lr"):
        train(callbacks=[watch])
    for name, weight in caught[0].draft.named_parameters():
        assert torch.equal(weight, seen[6][name]), name
    assert any(not torch.equal(seen[0][name], seen[6][name]) for name in seen[0])


def test_float16_is_refused_before_a_step():
    for precision in ("16-mixed", "16-true", "16", 16):
        with pytest.raises(ValueError, match=f"precision={precision}: .* use bf16-mixed or 32-true"):
            require_precision(precision)
    for precision in ("bf16-mixed", "bf16-true", "32-true", "64-true"):
        require_precision(precision)
    with pytest.raises(ValueError, match="precision=16-true: "):
        trained_under("16-true", "dflash")


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_and_nothing_else(tmp_path, monkeypatch):
    real = L.Trainer.save_checkpoint

    def full(self, path, *args, **kwargs):
        real(self, path, *args, **kwargs)
        if self.global_step == 4:
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        train(callbacks=[KeepLast(tmp_path, 2)])
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 2
    monkeypatch.setattr(L.Trainer, "save_checkpoint", real)
    assert_same_weights(train(resume=tmp_path / "last.ckpt"), train())


def test_training_says_a_few_lines_that_each_tell_something(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("specbench.progress.SOONEST", 0.0)
    owner = toys.target()
    data = OnlineTarget(owner, talks(8, toys.VOCABULARY), samples_per_micro=2, validation_fraction=0.25, threads=0)
    module = DraftTraining(
        copy.deepcopy(toys.draft("mtp")), Objective(ce=1.0), target_tables=owner.tables, max_steps=3, log_every=1
    )
    probe = DecodeProbe(owner, [[1, 2, 3]], every=3, max_new_tokens=4)
    with RunFolder(tmp_path, "train", "bar", {}) as run:
        shown = TrainingProgress("train mtp")
        quiet = {"enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
        quiet |= {"num_sanity_val_steps": 0, "val_check_interval": 3, "check_val_every_n_epoch": None}
        logger, max_steps = FolderLogger(run), 3
        L.Trainer(max_steps=max_steps, max_epochs=-1, logger=logger, callbacks=[probe, shown], **quiet).fit(
            module, data
        )
    said = capsys.readouterr().err.splitlines()
    steps = [line for line in said if line.startswith("train mtp:")]
    assert [line.partition(",")[0].partition(" in ")[0] for line in steps] == [
        *(f"train mtp: {done}/3 steps" for done in (1, 2)),
        "train mtp: 3/3 steps",
    ]
    assert "loss " in steps[0] and "estimating time left" in steps[0] and "probe accepted length" in steps[-1]
    assert {line.partition(":")[0] for line in said} == {"train mtp", "probe", "validation"}
    assert not any("v_num" in line or "it/s" in line or "\r" in line for line in said)


def test_learning_rate_warms_up_and_falls_to_zero():
    factors = [warmup_cosine(step, total=100, warmup=4) for step in range(101)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0 and factors[52] == pytest.approx(0.5) and factors[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(factors[3:]))


def test_a_step_is_the_same_in_one_micro_batch_and_in_four():
    def run(samples: int, micro: int) -> DraftTraining:
        owner = toys.target()
        order = {"samples_per_micro": samples, "micro_batches_per_step": micro, "balance": False, "threads": 0}
        data = OnlineTarget(owner, talks(8, toys.VOCABULARY), **order)
        draft = copy.deepcopy(toys.draft("dspark", anchors=4)).train()
        objective = Objective(ce=0.1, tv=0.9, confidence=1.0, slot_weight={"exp": 4.0})
        module = DraftTraining(draft, objective, target_tables=owner.tables, max_steps=3, lr=1e-2)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        L.Trainer(accelerator="cpu", max_steps=3, max_epochs=-1, enable_model_summary=False, **quiet).fit(module, data)
        return module

    whole, parts = run(8, 1), run(2, 4)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], weight, atol=1e-5, rtol=1e-5, msg=name)


def test_settings_that_cannot_be_are_refused():
    tables, objective = toys.target().tables, Objective(ce=1.0)
    with pytest.raises(ValueError, match="max_steps=0"):
        DraftTraining(toys.draft("mtp"), objective, target_tables=tables, max_steps=0)
    with pytest.raises(ValueError, match="supervision=unshifted"):
        DraftTraining(toys.draft("eagle3", supervision="unshifted"), objective, target_tables=tables, max_steps=1)


def test_waiting_for_data_counts_what_arrives_late_and_nothing_else():
    now = [0.0]

    def pass_by(seconds):
        now[0] += seconds

    def batches():
        for _ in range(2):
            pass_by(1.0)
            yield
        pass_by(0.5)  # the end of the step's data is waited for too

    wait = DataWait(clock=lambda: now[0])
    assert wait.share is None and wait.since_last() == 0
    with wait.step():
        for _ in wait.over(batches()):
            pass_by(3.0)
        pass_by(1.5)
    pass_by(100.0)  # between steps: probes, validation
    assert (wait.waited, wait.seconds) == (2.5, 10.0) and wait.share == wait.since_last() == 0.25
    with wait.step():
        pass_by(10.0)
    assert wait.since_last() == 0 and wait.share == 0.125


def test_a_training_says_how_long_it_waited():
    module = train(until=2, log_every=1)
    assert 0 < module.data_wait.waited < module.data_wait.seconds
    assert float(module.trainer.callback_metrics["train/data_wait_share"]) < 1
