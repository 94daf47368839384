"""Building: every conversation once whatever happens, wrong captures and wrong folders refused, sizes told first."""

from __future__ import annotations

import os
import resource
import shutil
import signal

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from specbench.data.cache.agreement import WrongCapture, relative_error
from specbench.data.cache.build import CacheBuilder, CachePrediction, build
from specbench.data.cache.manifest import CacheMismatch, Index, Manifest, fingerprint
from specbench.data.cache.plan import in_units, plan
from specbench.data.cache.shard_plan import lay_out
from specbench.data.cache.storage import storage
from specbench.data.cache.target_states import states_of
from specbench.data.cache.writing import NoRoom
from specbench.data.loading.reading import CacheReader, LocalFiles
from tests.data.killing import in_child
from tests.data.tiny_target import Talk, TinyTarget, talks

TALKS = talks(30)
SIZES = {"shard_bytes": 10_000, "batch_tokens": 48}


def make(folder, name="fp32", target=None, conversations=TALKS, **options):
    return build(target or TinyTarget(), conversations, folder, storage(name), 24, **SIZES, **options)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    make(folder)
    return folder


def test_every_conversation_is_stored_once_in_the_order_of_the_input(pristine):
    manifest, index = Manifest.read(pristine), Index(pristine / "index.parquet")
    assert index.ids == [talk.id for talk in TALKS]
    assert index["sample"].tolist() == list(range(30))
    assert index["length"].tolist() == [len(talk.tokens) for talk in TALKS]
    assert index["supervised"].tolist() == [sum(talk.loss_mask) for talk in TALKS]
    assert (manifest.samples, manifest.tokens) == (30, sum(len(talk.tokens) for talk in TALKS))
    assert manifest.supervised == sum(sum(talk.loss_mask) for talk in TALKS)
    assert [shard["samples"] for shard in manifest.shards] == np.bincount(index["shard"]).tolist()
    assert len(manifest.shards) >= 5
    reader = CacheReader(LocalFiles(pristine))
    for row, talk in enumerate(TALKS):
        (sample,) = reader.decode(reader.read([row]))
        context = states_of(TinyTarget(), [talk])
        assert torch.equal(sample.taps, context.taps[0]) and torch.equal(sample.last, context.last[0])


def test_tables_are_stored_so_that_training_needs_no_target(pristine, tmp_path):
    reader, target = CacheReader(LocalFiles(pristine)), TinyTarget()
    assert torch.equal(reader.tables.embedding, target.tables.embedding)
    assert torch.equal(reader.tables.head, target.tables.head)
    assert reader.manifest.target_config == target.config
    target.tables.head, target.tables.soft_cap = target.tables.embedding, 3.0
    make(tmp_path, target=target, norm=target.norm)
    reader = CacheReader(LocalFiles(tmp_path))
    assert set(load_file(tmp_path / "tables.safetensors")) == {"embedding", "norm"}  # tied: stored once
    assert torch.equal(reader.tables.head, target.tables.embedding) and reader.tables.soft_cap == 3.0
    assert torch.equal(reader.norm, target.norm)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_write_what_one_writes_alone(pristine, tmp_path, world):
    made = [make(tmp_path, rank=rank, world=world) for rank in reversed(range(world))]
    assert [manifest is None for manifest in made] == [True] * (world - 1) + [False]
    assert files(tmp_path) == files(pristine)


def test_a_complete_cache_is_left_alone(pristine):
    class Untouchable(TinyTarget):
        def states(self, tokens, lengths):
            raise AssertionError("the target was run")

    before = files(pristine)
    assert make(pristine, target=Untouchable()) == Manifest.read(pristine)
    assert files(pristine) == before


def test_lightning_predict_builds_the_same_cache(pristine, tmp_path):
    builder = CacheBuilder(TinyTarget(), TALKS, tmp_path, storage("fp32"), 24, **SIZES)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.predict(CachePrediction(builder), return_predictions=False)
    assert builder.finish() is not None
    assert files(tmp_path) == files(pristine)


def make_all_ranks(folder, world):
    for rank in range(world):
        make(folder, rank=rank, world=world)


def make_with_little_room(folder, limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        make(folder)
    except NoRoom as error:
        assert "no space left" in str(error) and "complete shards are kept" in str(error)
        return
    raise AssertionError("the limit was not met")


def kill_and_resume(folder, whole, points, generator):
    for place in range(points):
        world = int(generator.integers(1, 4))
        in_child(make_all_ranks, folder, world, seconds=generator.uniform(0, 0.8))
        for path in folder.glob("shard-*.tar"):  # what has its name is whole
            assert path.read_bytes() == whole[path.name]
        if place % 7 == 6:  # also kills late in the build
            shutil.rmtree(folder, ignore_errors=True)
    assert make(folder) is not None
    assert {name: data for name, data in files(folder).items() if not name.endswith(".tmp")} == whole


def test_killed_anywhere_it_continues_to_the_same_files(pristine, tmp_path):
    kill_and_resume(tmp_path / "cache", files(pristine), 6, np.random.default_rng(0))


@pytest.mark.long
def test_killed_at_twenty_points_under_changing_ranks_it_continues_to_the_same_files(pristine, tmp_path):
    kill_and_resume(tmp_path / "cache", files(pristine), 20, np.random.default_rng(1))


def test_ctrl_c_keeps_complete_shards_and_a_second_run_continues(pristine, tmp_path):
    class Interrupted(TinyTarget):
        calls = 0

        def states(self, tokens, lengths):
            self.calls += 1
            if self.calls == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return super().states(tokens, lengths)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, target=Interrupted())
    kept = files(tmp_path)
    assert any(name.endswith(".tar") for name in kept) and not any(name.endswith(".tmp") for name in kept)
    make(tmp_path)
    assert files(tmp_path) == files(pristine)


def test_a_full_disk_is_one_sentence_and_keeps_complete_shards(pristine, tmp_path):
    """A real refusal of the operating system: the child may write no file as large as the largest shard."""
    sizes = [path.stat().st_size for path in sorted(pristine.glob("shard-*.tar"))]
    limit = max(sizes) - 1024
    first_refused = next(number for number, size in enumerate(sizes) if size > limit)
    assert in_child(make_with_little_room, tmp_path, limit)
    assert len(list(tmp_path.glob("shard-*.tar"))) == first_refused
    assert not list(tmp_path.glob("*.tmp"))
    make(tmp_path)
    assert files(tmp_path) == files(pristine)


@pytest.mark.parametrize("fault", ["before the norm", "one position late", "scaled head"])
def test_a_wrong_capture_raises(tmp_path, fault):
    class Wrong(TinyTarget):
        def states(self, tokens, lengths):
            context = super().states(tokens, lengths)
            if fault == "before the norm":
                context.last.copy_(context.taps[:, :, -1])
            if fault == "one position late":
                context.last.copy_(context.last.roll(1, 1))
            return context

        def logits(self, last):
            return super().logits(last) * (0.8 if fault == "scaled head" else 1.0)

        def live_logits(self, tokens, lengths):
            return TinyTarget().live_logits(tokens, lengths)

    with pytest.raises(WrongCapture, match="captured final states"):
        make(tmp_path, target=Wrong())
    assert not (tmp_path / "manifest.json").exists()


def test_agreement_is_measured_and_kept(tmp_path):
    for name in ("fp32", "int8", "smallest"):
        manifest = make(tmp_path / name, name)
        assert manifest.agreement["positions"] == sum(
            len(TALKS[shard[0][0]].tokens)
            for shard in CacheBuilder(TinyTarget(), TALKS, tmp_path / name, storage(name), 24, **SIZES).layout.shards
        )
        assert manifest.agreement["captured"] == 1.0
        assert manifest.agreement["stored"] >= 0.9
    live = torch.tensor([[1.0, 2.0, 4.0]])
    assert relative_error(live + 7.0, live) == pytest.approx(0, abs=1e-6)  # a shift of all logits changes nothing
    assert relative_error(torch.zeros(1, 3), live) > 0.5


def test_a_folder_of_another_identity_is_refused_field_by_field(pristine):
    with pytest.raises(CacheMismatch, match=r"target: .*'tiny-16'.*'other'"):
        other = TinyTarget()
        other.name = "other"
        make(pristine, target=other)
    with pytest.raises(CacheMismatch, match=r"taps: .*\[0, 1\].*\[0, 2\]"):
        make(pristine, target=TinyTarget(taps=(0, 2)))
    with pytest.raises(CacheMismatch, match=r"codec: .*fp32.*bf16"):
        make(pristine, "bf16")
    with pytest.raises(CacheMismatch, match="conversations"):
        make(pristine, conversations=TALKS[:-1])
    with pytest.raises(CacheMismatch, match=r"max_length: .*24.*32"):
        build(TinyTarget(), TALKS, pristine, storage("fp32"), 32, **SIZES)


def test_fingerprint_ignores_the_order_of_fields_and_nothing_else():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": (1, 2), "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_bad_input_is_one_sentence(tmp_path):
    one = TALKS[0]
    for conversations, message in (
        ([], "no conversation"),
        ([one, one], "appears twice"),
        ([Talk("long", [1] * 25, [True] * 25)], "max_length=24.*'long' with 25"),
        ([Talk("none", [], [])], "'none' holds no token"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path, conversations=conversations)


def test_layout_holds_everything_once_within_its_sizes():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    layout = lay_out(lengths, batch_tokens=300, shard_tokens=2000)
    batches = [batch for shard in layout.shards for batch in shard]
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all(len(batch) * lengths[batch].max() <= 300 for batch in batches)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded <= 1.02 * lengths.sum()  # sorted by length, next to nothing is padding
    tokens = [sum(lengths[batch].sum() for batch in shard) for shard in layout.shards]
    assert all(2000 <= size < 2300 for size in tokens[:-1])


def test_plan_tells_the_size_that_the_build_takes(pristine, tmp_path):
    target = TinyTarget()
    for name in ("fp32", "int8"):
        told = plan(TALKS, tmp_path / name, storage(name), 16, 2, target)
        manifest = make(tmp_path / name, name)
        # Shards end in two empty blocks and are padded to 10,240 bytes.
        real = sum(shard["bytes"] for shard in manifest.shards)
        assert told.total <= real <= told.total + 10_240 * len(manifest.shards)
        assert told.fits and told.hours > 0 and told.timed_tokens == told.tokens
        assert f"as {name}" in told.text() and "it fits" in told.text()
    again = plan(TALKS, pristine, storage("fp32"), 16, 2)
    assert again.present == sum(path.stat().st_size for path in pristine.glob("shard-*.tar"))
    assert again.hours is None and set(again.totals) >= {"bf16", "exact", "int8", "smallest"}


def test_a_plan_times_a_part_of_what_it_plans(tmp_path, monkeypatch):
    whole = plan(TALKS, tmp_path, storage("fp32"), 16, 2, TinyTarget())
    monkeypatch.setattr("specbench.data.cache.plan.SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr("specbench.data.cache.plan.SAMPLE_BATCH", 30)
    part = plan(TALKS, tmp_path, storage("fp32"), 16, 2, TinyTarget())
    assert 0 < part.timed_tokens <= 30 < whole.timed_tokens
    # Tokens and states of fp32 take the same room everywhere; headers are divided among the tokens of a conversation.
    assert abs(part.total - whole.total) < 0.5 * whole.total and part.hours > 0


def test_plan_refuses_what_cannot_fit(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    huge = plan(TALKS, tmp_path, storage("bf16"), hidden_size=int(free / 500), taps=5)
    assert "DOES NOT FIT" in huge.text()
    with pytest.raises(NoRoom, match=r"no codec fits|choose codec"):
        huge.require_room()
    assert (in_units(999), in_units(1500), in_units(2.5e12)) == ("999 B", "1.50 kB", "2.50 TB")
