"""Reading: every conversation of an epoch once, equal steps on every rank, exact resume under kills and other ranks."""

from __future__ import annotations

import json
import os

import lightning as L
import numpy as np
import pytest
import torch
import webdataset as wds

from specbench.blocks import pack
from specbench.data.cache.build import build
from specbench.data.cache.manifest import CacheMismatch
from specbench.data.cache.shards import from_webdataset
from specbench.data.cache.storage import storage
from specbench.data.loading.order import split
from specbench.data.loading.target_cache import TargetCache
from tests.data.killing import in_child
from tests.data.tiny_target import TinyTarget, talks

TALKS = talks(46)
ORDER = {"samples_per_micro": 3, "micro_batches_per_step": 6, "seed": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("cache")
    build(TinyTarget(), TALKS, made, storage("fp32"), 24, shard_bytes=12_000, batch_tokens=48)
    return made


def opened(folder, **options):
    data = TargetCache(folder, **(ORDER | {"threads": 1} | options))
    data.setup()
    return data


def rows_of(batch):
    """Ordinals in a batch, in the order in which they lie."""
    return [int(row) for row in dict.fromkeys(batch.document.flatten().tolist()) if row >= 0]


def epoch_rows(data, start=0):
    return [[rows_of(batch) for batch in step] for step in data.steps(start)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_epoch_reads_every_conversation_once_in_an_order_of_its_own(folder, threads):
    data = opened(folder, threads=threads)
    first, second = epoch_rows(data), epoch_rows(data, data.steps_per_epoch)
    assert len(first) == data.steps_per_epoch == 3
    flat = [[row for step in epoch for micro in step for row in micro] for epoch in (first, second)]
    assert sorted(flat[0]) == sorted(flat[1]) == list(range(46))
    assert flat[0] != flat[1]
    assert first == epoch_rows(opened(folder))  # whatever the threads


def test_batches_hold_what_stock_webdataset_reads(folder):
    data = opened(folder, row_length=48)
    urls = [str(folder / shard["name"]) for shard in data.manifest.shards]
    samples = {s.ordinal: s for s in (from_webdataset(raw, data.manifest.storage()) for raw in stock(urls))}
    for step in data.steps():
        for batch in step:
            again = pack([samples[row] for row in rows_of(batch)], 48)
            for name in ("tokens", "loss_mask", "document", "position", "taps", "last"):
                assert torch.equal(getattr(batch, name), getattr(again, name))


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("taps", [None, ()])
def test_samples_keep_what_they_hold_while_others_are_read(tmp_path, codec, taps):
    """A reader's buffer is used again by its next call; what `samples` gave before must not change with it."""
    build(TinyTarget(), TALKS[:12], tmp_path / "cache", storage(codec), 24, shard_bytes=12_000, batch_tokens=48)
    data = opened(tmp_path / "cache", taps=taps)
    kept = data.samples(np.arange(3))
    before = [{name: getattr(s, name).tolist() for name in ("tokens", "loss_mask", "taps", "last")} for s in kept]
    for rows in (np.arange(3, 6), np.arange(6, 12)):
        data.samples(rows)
        next(iter(next(iter(data.steps()))))
    assert [{name: getattr(s, name).tolist() for name in before[0]} for s in kept] == before
    assert [s.ordinal for s in kept] == [0, 1, 2]


def stock(urls):
    return wds.WebDataset(urls, shardshuffle=False)


def test_the_pipeline_is_a_list_of_webdataset_stages(folder):
    data = opened(folder)
    pipeline = data.steps().pipeline(0)
    assert isinstance(pipeline, wds.DataPipeline)
    assert len(pipeline.pipeline) == 2  # the index-driven source, then what data.stages() lists
    assert sum(len(rows_of(batch)) for batch in pipeline) == 46
    pipeline.append(lambda batches: (rows_of(batch) for batch in batches))
    assert sum(map(len, pipeline)) == 46


def test_steps_count_samples_and_supervised_tokens_over_all_ranks(folder):
    for world in (1, 3):
        data = opened(folder, rank=world - 1, world=world)
        for step in data.steps():
            rows = data.plan(0).rows(step.number)
            assert step.samples == len(rows)
            assert step.supervised == sum(sum(TALKS[row].loss_mask) for row in rows)
    assert data.supervised_tokens == sum(sum(talk.loss_mask) for talk in TALKS)


def test_ranks_have_equal_steps_and_the_tail_is_padded_with_batches_of_no_weight(folder):
    whole = epoch_rows(opened(folder))
    for world in (2, 3, 6):
        ranks = [list(opened(folder, rank=rank, world=world).steps()) for rank in range(world)]
        assert {len(steps) for steps in ranks} == {3}
        for number in range(3):
            parts = [[rows_of(batch) for batch in steps[number]] for steps in ranks]
            merged = [parts[m % world][m // world] for m in range(6)]
            assert merged == whole[number]
    small = opened(folder, limit_samples=4, samples_per_micro=1)
    (step,) = small.steps()
    batches = list(step)
    assert [len(rows_of(batch)) for batch in batches] == [1, 1, 1, 1, 0, 0]
    empty = batches[-1]
    assert not empty.loss_mask.any() and (empty.document == -1).all()
    assert empty.taps.shape[2:] == (2, 16) and empty.taps.dtype == torch.float32


def test_steps_may_be_skipped_and_read_again(folder):
    data = opened(folder)
    expected = epoch_rows(data)
    steps = list(data.steps())  # nothing is read yet
    assert [rows_of(b) for b in steps[2]] == expected[2]
    assert [rows_of(b) for b in steps[0]] == expected[0]
    next(iter(steps[1]))  # left in the middle
    assert [rows_of(b) for b in steps[1].micro] == expected[1]
    assert [rows_of(b) for b in steps[2].micro] == expected[2]


@pytest.mark.parametrize("start", range(7))
def test_resuming_at_any_step_continues_exactly(folder, start):
    data = opened(folder)
    epoch, first = divmod(start, 3)
    assert epoch_rows(opened(folder), start) == epoch_rows(data, epoch * 3)[first:]


def train_until_killed(folder, log, world, threads):
    """One epoch from the last complete step; a step is complete once its line is on the disk."""
    with open(log, "a+") as file:
        file.seek(0)
        done = len(file.read().splitlines())
        ranks = [iter(opened(folder, rank=r, world=world, threads=threads).steps(done)) for r in range(world)]
        for steps in zip(*ranks, strict=True):
            rows = [row for step in steps for batch in step for row in rows_of(batch)]
            file.write(json.dumps({"step": steps[0].number, "rows": rows}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def write_epoch(folder, rank, world, file):
    """The rows that a rank streams in an epoch, from a process whose environment names no rank."""
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(os.environ)
    file.write_text(json.dumps(epoch_rows(opened(folder, stream=True, rank=rank, world=world))))


def kill_and_resume(folder, log, points, generator):
    for _ in range(points):
        arguments = (folder, log, int(generator.choice([1, 2, 3, 6])), int(generator.integers(0, 3)))
        in_child(train_until_killed, *arguments, seconds=generator.uniform(0.02, 0.2))
        text = log.read_text() if log.exists() else ""
        log.write_text("".join(line for line in text.splitlines(True) if line.endswith("\n")))  # half a line is no step
        if len(text.splitlines()) >= 3:
            yield [json.loads(line) for line in log.read_text().splitlines()]
            log.unlink()
    train_until_killed(folder, log, 2, 1)
    yield [json.loads(line) for line in log.read_text().splitlines()]


def check_epochs(epochs):
    for lines in epochs:
        assert [line["step"] for line in lines] == [0, 1, 2]
        assert sorted(row for line in lines for row in line["rows"]) == list(range(46))


def test_killed_at_random_steps_with_changing_ranks_every_sample_is_seen_once(folder, tmp_path):
    check_epochs(kill_and_resume(folder, tmp_path / "log", 5, np.random.default_rng(0)))


@pytest.mark.long
def test_killed_at_twenty_points_with_changing_ranks_every_sample_is_seen_once(folder, tmp_path):
    check_epochs(kill_and_resume(folder, tmp_path / "log", 20, np.random.default_rng(1)))


class Recorder(L.LightningModule):
    """Counts an optimiser step for each Step and notes what it saw; stops hard at `stop`."""

    def __init__(self, stop=None):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.held, self.stop = [], [], stop

    def training_step(self, step, index):
        assert step.number == self.global_step
        if step.number == self.stop:
            raise RuntimeError("stopped")
        self.seen.append((step.number, step.epoch, [rows_of(batch) for batch in step.micro]))
        loss = self.weight * 1.0
        self.manual_backward(loss)
        self.optimizers().step()

    def validation_step(self, step, index):
        self.held += [row for batch in step.micro for row in rows_of(batch)]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


def fit(folder, where, stop=None, resume=None, **options):
    module = Recorder(stop)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[L.pytorch.callbacks.ModelCheckpoint(where, every_n_train_steps=1, save_last=True)],
    )
    data = TargetCache(folder, **(ORDER | {"threads": 1, "validation_fraction": 0.2} | options))
    try:
        trainer.fit(module, data, ckpt_path=resume)
    except RuntimeError as error:
        assert "stopped" in str(error)
    return module


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_in_the_middle_of_an_epoch_from_its_global_step_alone(folder, tmp_path):
    whole = fit(folder, tmp_path / "whole")
    steps = -(-37 // 18)
    assert [number for number, _, _ in whole.seen] == list(range(2 * steps))
    held = set(split([talk.id for talk in TALKS], 0.2)[1].tolist())
    assert sorted(whole.held) == sorted([*held, *held]) and len(held) == 9
    for stop in range(1, 2 * steps):
        where = tmp_path / str(stop)
        first = fit(folder, where, stop)
        second = fit(folder, where, resume=where / "last.ckpt")
        assert first.seen + second.seen == whole.seen
    with pytest.raises(ValueError, match=r"another order \(seed: the checkpoint has 7, the run asks for 8;"):
        fit(folder, tmp_path / "other", resume=tmp_path / "1" / "last.ckpt", seed=8)


def test_a_checkpoint_of_other_data_is_refused(folder):
    data = opened(folder)
    state = data.state_dict()
    opened(folder, rank=1, world=2, threads=3).load_state_dict(state)  # other ranks and threads are no matter
    for change in ({"micro_batches_per_step": 12}, {"samples_per_micro": 1}, {"limit_samples": 40}, {"balance": False}):
        with pytest.raises(ValueError, match=next(iter(change))):
            opened(folder, **change).load_state_dict(state)


def test_what_the_run_needs_is_checked_before_step_0(folder, tmp_path):
    with pytest.raises(CacheMismatch, match=r"target: the cache has 'tiny-16', the run asks for 'tiny-17'"):
        opened(folder, expect={"target": "tiny-17"})
    opened(folder, expect={"target": "tiny-16", "max_length": 24})
    with pytest.raises(ValueError, match=r"asks for \[5\].*stores the layers \[0, 1\]"):
        opened(folder, taps=[1, 5])
    with pytest.raises(ValueError, match="cannot be shared by 4 ranks"):
        opened(folder, world=4)
    with pytest.raises(ValueError, match=r"row_length=20 is shorter than the longest conversation .24 tokens"):
        opened(folder, row_length=20)
    with pytest.raises(ValueError, match="on_damage='ignore'"):
        opened(folder, on_damage="ignore")
    build(TinyTarget(), TALKS, tmp_path, storage("fp32", last_rows="supervised"), 24)
    with pytest.raises(ValueError, match="supervised tokens only"):
        opened(tmp_path, needs_all_last=True)


def test_taps_dtype_and_rows_of_last_can_be_chosen(folder, tmp_path):
    build(TinyTarget(), TALKS, tmp_path, storage("bf16", last_rows="supervised"), 24)
    whole, few = opened(folder), opened(tmp_path, taps=[1])
    for ours, theirs in zip(few.steps(), whole.steps(), strict=True):
        for batch, full in zip(ours, theirs, strict=True):
            assert batch.taps.dtype == torch.bfloat16
            assert torch.equal(batch.taps[:, :, 0], full.taps[:, :, 1].bfloat16())
            mask = full.loss_mask
            assert torch.equal(batch.last[mask], full.last[mask].bfloat16())
    assert next(iter(next(iter(opened(tmp_path, dtype="float32").steps())))).last.dtype == torch.float32


def test_validation_may_be_a_cache_of_its_own(folder, tmp_path):
    others = talks(7, seed=5)
    build(TinyTarget(), others, tmp_path, storage("fp32"), 24)
    for world in (1, 2):
        ranks = [opened(folder, validation_folder=tmp_path, rank=rank, world=world) for rank in range(world)]
        loaders = [list(data.val_dataloader()) for data in ranks]
        assert len({len(steps) for steps in loaders}) == 1
        seen = [row for steps in loaders for step in steps for batch in step for row in rows_of(batch)]
        assert sorted(seen) == list(range(7))
    assert len(ranks[0].rows[0]) == 46
    with pytest.raises(ValueError, match="choose one"):
        opened(folder, validation_folder=tmp_path, validation_fraction=0.1)
