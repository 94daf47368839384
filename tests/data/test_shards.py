"""Shards: plain webdataset tars, the same bytes each time, decoded where they lie; damage is named."""

from __future__ import annotations

import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
import webdataset as wds

from specbench.data.cache.build import build
from specbench.data.cache.manifest import Manifest
from specbench.data.cache.shards import DamagedShard, from_webdataset
from specbench.data.cache.storage import storage
from specbench.data.cache.target_states import states_of
from specbench.data.loading.reading import CacheReader, LocalFiles, verify
from specbench.data.loading.target_cache import TargetCache
from tests.data.tiny_target import TinyTarget, talks

TALKS = talks(14)


def make(folder, name="fp32", **options):
    return build(TinyTarget(), TALKS, folder, storage(name), 24, shard_bytes=14_000, batch_tokens=48, **options)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    make(folder)
    return folder


@pytest.fixture
def copy(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "cache")


def test_stock_webdataset_opens_and_decodes_every_shard(pristine):
    manifest = Manifest.read(pristine)
    assert len(manifest.shards) > 2
    urls = [str(pristine / shard["name"]) for shard in manifest.shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert len(samples) == len(TALKS)
    for raw in samples:
        facts = json.loads(raw["json"])
        talk = TALKS[facts["ordinal"]]
        sample = from_webdataset(raw, manifest.storage())
        context = states_of(TinyTarget(), [talk])
        assert (facts["id"], facts["length"], facts["supervised"], facts["source"]) == (
            talk.id,
            len(talk.tokens),
            sum(talk.loss_mask),
            "tests",
        )
        assert sample.ordinal == facts["ordinal"]
        assert sample.tokens.tolist() == talk.tokens
        assert sample.loss_mask.tolist() == talk.loss_mask
        assert torch.equal(sample.taps, context.taps[0])
        assert torch.equal(sample.last, context.last[0])


def test_index_points_at_the_members(pristine):
    reader = CacheReader(LocalFiles(pristine))
    for number, shard in enumerate(reader.manifest.shards):
        with tarfile.open(pristine / shard["name"]) as tar:
            infos = {info.name: info for info in tar.getmembers()}
        assert all(info.mtime == 0 for info in infos.values())
        assert len(infos) == 4 * shard["samples"]
        rows = np.flatnonzero(reader.index["shard"] == number)
        for place, row in enumerate(sorted(rows, key=lambda r: reader.index["offset"][r])):
            key = f"{number:05d}-{place:06d}"
            assert infos[f"{key}.json"].offset == reader.index["offset"][row]
            for part in ("last", "taps", "tokens"):
                info = infos[f"{key}.{part}.safetensors"]
                assert info.offset_data == reader.index[f"{part}_offset"][row]
                assert info.size == reader.index[f"{part}_bytes"][row]


def test_the_same_conversations_give_the_same_bytes(pristine, tmp_path):
    make(tmp_path)
    ours, theirs = ({p.name: p.read_bytes() for p in folder.glob("*.*")} for folder in (pristine, tmp_path))
    assert ours == theirs


def test_raw_states_are_views_of_the_buffer_they_were_read_into(pristine):
    reader = CacheReader(LocalFiles(pristine))
    stored = reader.read([3, 5])
    for one, sample in zip(stored, reader.decode(stored), strict=True):
        for part, tensor in (("taps", sample.taps), ("last", sample.last), ("tokens", sample.tokens)):
            begin = one.parts[part].data_ptr()
            assert begin <= tensor.data_ptr() < begin + len(one.parts[part])
    first = stored[0].parts["last"].data_ptr()
    assert reader.read([3, 5])[0].parts["last"].data_ptr() == first  # the buffer is used again


def test_fewer_taps_and_no_taps(pristine):
    rows = np.array([0, 7])
    whole = CacheReader(LocalFiles(pristine))
    for taps, places in (([1], [1]), ([0], [0]), ([], [])):
        reader = CacheReader(LocalFiles(pristine), taps=taps)
        for ours, full in zip(reader.decode(reader.read(rows)), whole.decode(whole.read(rows)), strict=True):
            assert torch.equal(ours.taps, full.taps[:, places])
            assert torch.equal(ours.last, full.last)
            assert torch.equal(ours.tokens, full.tokens)
    with pytest.raises(ValueError, match=r"asks for \[2\].*stores the layers \[0, 1\]"):
        CacheReader(LocalFiles(pristine), taps=[1, 2])


def rewrite(path, change):
    data = bytearray(path.read_bytes())
    path.chmod(0o644)
    path.write_bytes(bytes(change(data)))


def damage(folder, kind):
    """Damage one shard; returns its name and the ids of the samples that are lost."""
    reader = CacheReader(LocalFiles(folder))
    number = next(n for n, shard in enumerate(reader.manifest.shards) if shard["samples"] >= 3)
    rows = np.flatnonzero(reader.index["shard"] == number)
    rows = rows[np.argsort(reader.index["offset"][rows])]
    name, ids = reader.manifest.shards[number]["name"], [reader.index.ids[row] for row in rows]
    path, start = folder / name, int(reader.index["offset"][rows[1]])
    payload = int(reader.index["taps_offset"][rows[1]]) + 200
    if kind == "cut in a header":
        rewrite(path, lambda data: data[: start + 100])
        return name, ids[1:]
    if kind == "cut at a header":
        rewrite(path, lambda data: data[:start])
        return name, ids[1:]
    if kind == "cut between members":
        rewrite(path, lambda data: data[: int(reader.index["taps_offset"][rows[1]]) - 512])
        return name, ids[1:]
    if kind == "empty":
        rewrite(path, lambda data: b"")
        return name, ids
    if kind == "missing":
        path.unlink()
        return name, ids
    if kind == "grown":
        rewrite(path, lambda data: data + bytes(512))
        return name, []
    if kind == "bit flip":
        rewrite(path, lambda data: data[:payload] + bytes([data[payload] ^ 1]) + data[payload + 1 :])
        return name, [ids[1]]
    if kind == "bit flip in a header":
        rewrite(path, lambda data: data[: start + 5] + bytes([data[start + 5] ^ 1]) + data[start + 6 :])
        return name, [ids[1]]
    assert kind == "missing member"  # taken out, the rest moved up, the length kept
    member = int(reader.index["taps_offset"][rows[1]]) - 512
    after = int(reader.index["tokens_offset"][rows[1]]) - 512
    rewrite(path, lambda data: data[:member] + data[after:] + bytes(after - member))
    return name, ids[1:]


SIZES = ["cut in a header", "cut at a header", "cut between members", "empty", "missing", "grown"]
BYTES = ["bit flip", "bit flip in a header", "missing member"]


@pytest.mark.parametrize("kind", SIZES)
def test_a_shard_of_the_wrong_size_is_named_before_the_first_step(copy, kind):
    name, lost = damage(copy, kind)
    with pytest.raises(DamagedShard, match=name) as error:
        CacheReader(LocalFiles(copy))
    assert (repr(lost[0]) if lost else "seem whole") in str(error.value)
    assert "on_damage=skip" in str(error.value)


@pytest.mark.parametrize("kind", BYTES)
def test_damaged_bytes_are_named_with_shard_and_sample_when_read(copy, kind):
    name, lost = damage(copy, kind)
    data = TargetCache(copy, samples_per_micro=2, threads=2)
    data.setup()
    with pytest.raises(DamagedShard, match=name) as error:
        for step in data.steps():
            list(step)
    assert any(repr(one) in str(error.value) for one in lost)


@pytest.mark.parametrize("kind", SIZES + BYTES)
@pytest.mark.filterwarnings("ignore:shard-")
def test_skip_loses_what_is_damaged_counts_it_and_nothing_else(copy, kind):
    name, lost = damage(copy, kind)
    data = TargetCache(copy, samples_per_micro=2, micro_batches_per_step=2, on_damage="skip")
    data.setup()
    seen = sorted(
        row for step in data.steps() for batch in step for row in set(batch.document.flatten().tolist()) - {-1}
    )
    ids = data.ids
    assert sorted(set(ids) - {ids[row] for row in seen}) == sorted(lost)
    assert len(seen) == len(set(seen))
    assert {one.id for one in data.damage} == set(lost)
    assert {one.shard for one in data.damage} <= {name}


def test_verify_finds_every_damage(copy):
    assert verify(LocalFiles(copy)) == []
    name, lost = damage(copy, "bit flip")
    assert [(one.shard, one.id) for one in verify(LocalFiles(copy))] == [(name, lost[0])]


def test_a_removed_shard_is_built_again_as_it_was(copy, pristine):
    name, _ = damage(copy, "bit flip")
    (copy / name).unlink()
    make(copy)
    assert (copy / name).read_bytes() == (pristine / name).read_bytes()
    assert (copy / "manifest.json").read_bytes() == (pristine / "manifest.json").read_bytes()


@pytest.mark.parametrize("paper", ["index.parquet", "tables.safetensors"])
def test_exchanged_papers_are_refused(copy, paper):
    rewrite(copy / paper, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedShard, match=paper):
        CacheReader(LocalFiles(copy))


def test_a_folder_without_a_manifest_is_not_a_cache(tmp_path):
    with pytest.raises(ValueError, match=r"no complete cache.*specbench cache"):
        CacheReader(LocalFiles(tmp_path))
