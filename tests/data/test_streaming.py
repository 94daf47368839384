"""Streaming: the same conversations bit for bit, each once over ranks and readers, from every kind of place.

Also: what damage, interrupted transfers, too few shards and other ranks lead to.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
import torch
import webdataset as wds

from specbench.data.cache import remote_shards
from specbench.data.cache.build import build
from specbench.data.cache.manifest import DamagedManifest
from specbench.data.cache.remote_shards import StreamedFiles
from specbench.data.cache.shards import DamagedShard
from specbench.data.cache.storage import storage
from specbench.data.loading.streaming import buffered, deal_shards, pipeline
from specbench.data.loading.target_cache import TargetCache
from specbench.losses.objective import Objective
from specbench.training.draft_training import DraftTraining
from tests import tiny
from tests.data.killing import in_child
from tests.data.test_datamodule import epoch_rows, fit, rows_of, write_epoch
from tests.data.test_shards import BYTES, SIZES, damage
from tests.data.tiny_target import Talk, TinyTarget, talks

TALKS = talks(46)
ORDER = {"samples_per_micro": 3, "micro_batches_per_step": 6, "seed": 7, "threads": 2}
FIELDS = ("tokens", "loss_mask", "document", "position", "taps", "last")


class Whole(SimpleHTTPRequestHandler):
    """Knows no ranges. `broken` counts down: so many answers stop in the middle of a shard."""

    broken = 0

    def log_message(self, *args):
        pass

    def copyfile(self, source, outputfile):
        data = source.read()
        if type(self).broken and self.path.endswith(".tar"):
            type(self).broken -= 1
            outputfile.write(data[: len(data) // 2])
            outputfile.flush()
            time.sleep(0.5)  # so that the first half arrives before the break does
            self.close_connection = True
            return
        outputfile.write(data)


class Ranged(Whole):
    """Answers a request for a part with that part, and notes it in `parts`."""

    parts: ClassVar[list[str]] = []

    def do_GET(self):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return super().do_GET()
        type(self).parts.append(self.headers["Range"])
        with open(self.translate_path(self.path), "rb") as file:
            data = file.read()
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(data[first : last + 1])
        return None


@contextmanager
def served(folder, kind=Whole):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(type("Server", (kind,), {}), directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.RequestHandlerClass.func
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("cache")
    build(TinyTarget(), TALKS, made, storage("bf16"), 24, shard_bytes=8_000, batch_tokens=48)
    return made


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def streamed(place, **options):
    data = TargetCache(place, stream=True, **(ORDER | options))
    data.setup()
    return data


@contextmanager
def place_of(kind, folder):
    """The cache of `folder` as it is reached through folder, command or server."""
    if kind == "folder":
        yield str(folder)
    elif kind == "pipe":
        yield f"pipe:cat {folder}/{{name}}"
    else:
        with served(folder, Ranged if kind == "http with ranges" else Whole) as (url, _):
            yield url


def assert_streams_the_folder(place, folder, **options):
    """An epoch over two ranks: every conversation once, every batch that of the indexed reader for the same rows."""
    indexed = TargetCache(folder, **ORDER)
    seen, steps = [], []
    for rank in range(2):
        data = streamed(place, rank=rank, world=2, **options)
        assert torch.equal(data.tables.embedding, indexed.tables.embedding)
        steps.append(0)
        for step in data.steps():
            planned = data.plan(0).rows(step.number)
            assert step.samples == len(planned)
            assert step.supervised == sum(sum(TALKS[row].loss_mask) for row in planned)
            batches = list(step)
            assert len(batches) == 3
            steps[-1] += 1
            for batch in batches:
                rows = rows_of(batch)
                seen += rows
                again = indexed.batch(np.array(rows, np.int64))
                for name in FIELDS:
                    assert torch.equal(getattr(batch, name), getattr(again, name)), name
    assert sorted(seen) == list(range(46))
    assert len(set(steps)) == 1


@pytest.mark.parametrize("kind", ["folder", "pipe", "http without ranges", "http with ranges"])
def test_batches_are_those_of_the_indexed_reader_and_an_epoch_holds_every_conversation_once(kind, folder, tmp_path):
    with place_of(kind, folder) as place:
        assert_streams_the_folder(place, folder, local_folder=tmp_path if kind == "pipe" else None)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == ({"manifest.json", "index.parquet", "tables.safetensors"} if kind == "pipe" else set())


S3 = [name for name in ("s3fs", "moto", "flask", "flask_cors") if importlib.util.find_spec(name) is None]


@pytest.mark.s3
@pytest.mark.skipif(bool(S3), reason=f"needs {', '.join(S3)}: pip install s3fs 'moto[s3]' flask flask-cors")
def test_a_bucket_is_streamed_and_read_in_parts(folder, tmp_path, monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # one with the address of an earlier server
        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("caches")
        bucket.put([str(path) for path in folder.iterdir() if path.is_file()], "caches/one/")
        assert_streams_the_folder("s3://caches/one", folder)
        held = streamed("s3://caches/one", validation_fraction=0.2)
        assert sorted(row for step in held.val_dataloader() for batch in step for row in rows_of(batch)) == sorted(
            held.rows[1]
        )
        with pytest.raises(ValueError, match=r"s3://caches/two/manifest\.json does not exist"):
            streamed("s3://caches/two")
    finally:
        server.stop()


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_missing_package_is_named():
    with pytest.raises(ValueError, match=r"s3://caches/one needs a package that is missing .*s3fs"):
        streamed("s3://caches/one")


@pytest.mark.parametrize("codec", ["fp32", "exact", "int8"])
@pytest.mark.parametrize("taps", [None, [1], []])
def test_every_codec_and_choice_of_taps_decodes_as_by_index(codec, taps, tmp_path):
    build(TinyTarget(), TALKS[:12], tmp_path, storage(codec, "bf16"), 24, shard_bytes=6_000, batch_tokens=48)
    indexed = TargetCache(tmp_path, taps=taps, row_length=48, **ORDER)
    for step in streamed(tmp_path, taps=taps, row_length=48).steps():
        for batch in step:
            again = indexed.batch(np.array(rows_of(batch), np.int64))
            assert all(torch.equal(getattr(batch, name), getattr(again, name)) for name in FIELDS)


@pytest.mark.parametrize("threads", [0, 1, 2, 3])
def test_the_order_is_decided_by_seed_and_epoch(folder, threads):
    data = streamed(folder, threads=threads)
    first, second = epoch_rows(data), epoch_rows(data, data.steps_per_epoch)
    assert first == epoch_rows(streamed(folder, threads=threads))
    flat = [[row for step in epoch for micro in step for row in micro] for epoch in (first, second)]
    assert sorted(flat[0]) == sorted(flat[1]) == list(range(46)) and flat[0] != flat[1]
    assert epoch_rows(streamed(folder, threads=threads, seed=8)) != first
    assert all(len(micro) <= 3 for step in first for micro in step)


def test_the_buffer_mixes_shards_and_holds_no_more_than_was_asked_for(folder):
    """With a buffer of 1 conversations come as they lie; with one of n each may come at most n - 1 places early."""
    plain = streamed(folder, shuffle_buffer=1, threads=1).plan(0)
    shards, rows = plain.reading[0][0]
    assert rows == [row for shard in shards for row in plain.by_shard[shard]]
    for buffer in (4, 20):
        mixed = buffered(rows, buffer, 7)
        assert sorted(mixed) == sorted(rows) and mixed != rows
        early = [rows.index(row) - place for place, row in enumerate(mixed)]
        assert 0 < max(early) <= buffer
        assert mixed == buffered(rows, buffer, 7) != buffered(rows, buffer, 8)


def test_the_pipeline_is_a_list_of_webdataset_stages(folder):
    data = streamed(folder, threads=1)
    shards, rows = data.plan(0).reading[0][0]
    stages = pipeline(data.reader.files, data.reader, shards, rows, data._read)
    assert isinstance(stages, wds.DataPipeline) and isinstance(stages.pipeline[0], wds.SimpleShardList)
    assert [row for row, _ in stages] == rows


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_run_is_taken_up_at_any_step(folder, world):
    for rank in range(world):
        data = streamed(folder, rank=rank, world=world)
        whole = [epoch_rows(data, epoch * data.steps_per_epoch) for epoch in range(2)]
        for start in range(2 * data.steps_per_epoch):
            epoch, first = divmod(start, data.steps_per_epoch)
            assert epoch_rows(streamed(folder, rank=rank, world=world), start) == whole[epoch][first:]


def test_a_resumed_reader_opens_the_shards_alone_in_which_something_is_left(folder, tmp_path):
    command = f"pipe:echo {{name}} >> {tmp_path}/log; cat {folder}/{{name}}"
    data = streamed(command, threads=1, shuffle_buffer=2, local_folder=tmp_path / "papers")
    opened = [[], []]
    for number, start in enumerate((0, data.steps_per_epoch - 1)):
        (tmp_path / "log").write_text("")
        for step in data.steps(start):
            list(step)
        opened[number] = (tmp_path / "log").read_text().split()
    assert sorted(opened[0]) == [shard["name"] for shard in data.manifest.shards]
    assert 0 < len(opened[1]) < len(opened[0]) / 2 and opened[1] == opened[0][-len(opened[1]) :]


def test_other_ranks_readers_and_ways_of_reading_are_refused(folder):
    state = streamed(folder).state_dict()
    streamed(folder).load_state_dict(state)
    said = r"stream=true \(ranks 1, readers 2, shuffle_buffer 100\) and this run has stream="
    for change, now in (
        ({"rank": 0, "world": 2}, r"true \(ranks 2"),
        ({"threads": 1}, r"true \(ranks 1, readers 1"),
        ({"shuffle_buffer": 7}, "true .*shuffle_buffer 7"),
        ({"stream": False}, "false"),
    ):
        with pytest.raises(ValueError, match=said + now):
            TargetCache(folder, **(ORDER | {"stream": True} | change)).load_state_dict(state)
    with pytest.raises(ValueError, match="stream=false and this run has stream=true"):
        streamed(folder).load_state_dict(TargetCache(folder, **ORDER).state_dict())
    with pytest.raises(ValueError, match="seed: the checkpoint has 7, the run asks for 8"):
        streamed(folder, seed=8, shuffle_buffer=1).load_state_dict(streamed(folder, shuffle_buffer=1).state_dict())


@pytest.mark.filterwarnings("ignore")
def test_lightning_takes_a_stream_up_in_the_middle_of_an_epoch(folder, tmp_path):
    whole = fit(folder, tmp_path / "whole", stream=True)
    for stop in (1, len(whole.seen) - 1):
        first = fit(folder, tmp_path / str(stop), stop, stream=True)
        second = fit(folder, tmp_path / str(stop), resume=tmp_path / str(stop) / "last.ckpt", stream=True)
        assert first.seen + second.seen == whole.seen
        assert sorted({row for row in second.held}) == sorted(TargetCache(folder, validation_fraction=0.2).rows[1])


@pytest.mark.parametrize("kind", SIZES + BYTES)
@pytest.mark.parametrize("way", ["folder", "pipe"])
@pytest.mark.filterwarnings("ignore:shard-")
def test_damage_is_found_named_and_counted_as_by_index(copy, kind, way, monkeypatch):
    """A command tells no sizes, so there a cut shard is found when it is read."""
    monkeypatch.setattr(remote_shards, "PAUSE", 0.0)
    name, lost = damage(copy, kind)
    with place_of(way, copy) as place:
        found_early = kind in SIZES and way == "folder"
        if not found_early and lost:
            data = streamed(place)
            with pytest.raises(DamagedShard, match=name) as error:
                for step in data.steps():
                    list(step)
            assert any(repr(one) in str(error.value) for one in lost)
        elif found_early:
            with pytest.raises(DamagedShard, match=name):
                streamed(place)
        data = streamed(place, on_damage="skip")
        seen = sorted(row for step in epoch_rows(data) for micro in step for row in micro)
    ids = data.ids
    assert sorted(set(ids) - {ids[row] for row in seen}) == sorted(lost)
    assert len(seen) == len(set(seen)) == 46 - len(lost)
    assert {one.id for one in data.damage} == set(lost)
    assert {one.shard for one in data.damage} <= {name}


def test_a_changed_manifest_and_foreign_papers_are_refused(copy):
    index = (copy / "index.parquet").read_bytes()
    (copy / "index.parquet").write_bytes(index[:-1] + bytes([index[-1] ^ 1]))
    with pytest.raises(DamagedShard, match=r"index\.parquet is not the file that the manifest describes"):
        streamed(f"pipe:cat {copy}/{{name}}")
    (copy / "index.parquet").write_bytes(index)
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").chmod(0o644)
    (copy / "manifest.json").write_text(text.replace('"samples": 46', '"samples": 45'))
    with pytest.raises(DamagedManifest, match="was changed after it was written"):
        streamed(f"pipe:cat {copy}/{{name}}")


@pytest.mark.parametrize("kind", [Whole, Ranged])
def test_a_transfer_that_breaks_off_is_taken_up_again(folder, kind, monkeypatch):
    monkeypatch.setattr(remote_shards, "PAUSE", 0.0)
    monkeypatch.setattr(Ranged, "parts", [])
    with served(folder, kind) as (url, handler):
        data = streamed(url, threads=1)
        handler.broken = 2
        seen = sorted(row for step in epoch_rows(data) for micro in step for row in micro)
        assert seen == list(range(46)) and handler.broken == 0 and data.damage == []
        # Where the server supports it, only the rest is asked for.
        assert (0 < len(Ranged.parts) <= 2) if kind is Ranged else not Ranged.parts
        assert all(part.endswith("-") and not part.startswith("bytes=0-") for part in Ranged.parts)
        if kind is Ranged:
            return
        handler.broken = 1_000
        with pytest.raises(DamagedShard, match=r"tried 3 times"):
            for step in data.steps():
                list(step)


def test_commands_are_the_users_own_and_their_failures_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"write \{name\} where the name of a file belongs"):
        streamed(f"pipe:cat {folder}/manifest.json")
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read from .*ended with status 3"):
        streamed("pipe:exit 3; echo {name}")
    with pytest.raises(ValueError, match="a command needs stream=true"):
        TargetCache(f"pipe:touch {tmp_path}/ran; cat {folder}/{{name}}", local_folder=tmp_path).setup()
    assert not (tmp_path / "ran").exists()


def test_every_rank_needs_a_shard(folder):
    shards = len(TargetCache(folder).manifest.shards)
    with pytest.raises(ValueError, match=f"has {shards} shards to train on for 48 ranks, and every rank needs one"):
        streamed(folder, rank=0, world=48, micro_batches_per_step=48)
    assert deal_shards([5, 0, 1, 1, 3], 2) == [[0], [2, 3, 4]]
    with pytest.raises(ValueError, match="2 shards to train on for 3 ranks"):
        deal_shards([4, 0, 4], 3)


def test_ranks_with_few_conversations_are_filled_up_and_that_is_said(tmp_path):
    """Three shards for two ranks: the steps are equal, the tail weighs nothing."""
    build(TinyTarget(), TALKS, tmp_path, storage("bf16"), 24, shard_bytes=28_000, batch_tokens=48)
    assert len(TargetCache(tmp_path).manifest.shards) == 3
    ranks = []
    for rank in range(2):
        with pytest.warns(UserWarning, match="from step .* on some have nothing to train on"):
            ranks.append(streamed(tmp_path, rank=rank, world=2, samples_per_micro=1, micro_batches_per_step=2))
    steps = [list(data.steps()) for data in ranks]
    assert len(steps[0]) == len(steps[1]) == ranks[0].steps_per_epoch
    seen = [[rows_of(batch) for step in own for batch in step] for own in steps]
    assert sorted(row for own in seen for micro in own for row in micro) == list(range(46))
    assert [step.samples for step in steps[0]] == [len(one) + len(other) for one, other in zip(*seen, strict=True)]
    assert [] in seen[0] or [] in seen[1]


def test_processes_without_a_rank_in_their_environment_share_the_epoch(folder, tmp_path):
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    for rank, file in enumerate(files):
        assert in_child(write_epoch, folder, rank, 2, file)
    rows = [row for file in files for step in json.loads(file.read_text()) for micro in step for row in micro]
    assert sorted(rows) == list(range(46))


def test_held_out_conversations_are_those_of_the_index_and_need_a_place_that_gives_parts(folder):
    expected = TargetCache(folder, validation_fraction=0.2, limit_samples=20).rows
    for kind in ("folder", "http with ranges"):
        with place_of(kind, folder) as place:
            data = streamed(place, validation_fraction=0.2, limit_samples=20)
            held = [row for step in data.val_dataloader() for batch in step for row in rows_of(batch)]
            assert sorted(held) == sorted(expected[1])
            trained = [row for step in epoch_rows(data) for micro in step for row in micro]
            assert sorted(trained) == sorted(expected[0])
            ours, theirs = data.samples(expected[1]), TargetCache(folder).samples(expected[1])
            assert all(torch.equal(a.taps, b.taps) for a, b in zip(ours, theirs, strict=True))
    for kind, why in (("http without ranges", "refuses requests for a part"), ("pipe", "writes from the beginning")):
        with place_of(kind, folder) as place:
            with pytest.raises(ValueError, match=rf"gives whole files only .*{why}.*validation_fraction=0"):
                streamed(place, validation_fraction=0.2)
            data = streamed(place, validation_folder=folder)
            held = [row for step in data.val_dataloader() for batch in step for row in rows_of(batch)]
            assert sorted(held) == list(range(46))


def test_settings_that_do_not_go_together_are_refused(folder):
    with pytest.raises(ValueError, match=r"shuffle_window=2 orders reading by index.*shuffle_buffer"):
        streamed(folder, shuffle_window=2)
    with pytest.raises(ValueError, match="shuffle_buffer=0"):
        streamed(folder, shuffle_buffer=0)
    with pytest.raises(ValueError, match=r"shuffle_buffer=1000000000: so many conversations fill .* MiB"):
        streamed(folder, shuffle_buffer=10**9)
    with pytest.raises(ValueError, match="cannot be shared by 4 ranks"):
        streamed(folder, world=4)


def test_an_epoch_has_the_loss_of_the_indexed_reader(tmp_path):
    """Sums over an epoch, ranks added up: the same value, weight and slots, so the same length-normalised steps."""
    target = tiny.target("qwen3")
    generator = np.random.default_rng(0)
    lengths = generator.integers(12, 25, 14)
    many = [
        Talk(f"t{n}", generator.integers(0, tiny.VOCABULARY, k).tolist(), [at >= 4 for at in range(k)])
        for n, k in enumerate(lengths)
    ]
    build(target, many, tmp_path, storage("fp32"), 24, shard_bytes=30_000, batch_tokens=48)
    draft = tiny.draft("dspark", "qwen3")
    module = DraftTraining(
        draft,
        Objective(ce=0.1, tv=0.9, confidence=1.0, slot_weight={"exp": 4.0}),
        target_tables=target.tables,
        max_steps=1,
    )

    def totals(data):
        value = weight = torch.zeros((), dtype=torch.float64)
        for step in data.steps():
            for batch in step:
                if batch.loss_mask.any():
                    loss = module.loss(draft, batch, 0)
                    value, weight = value + loss.value.detach().double(), weight + loss.weight.double()
        return torch.stack([value, weight])

    order = {"samples_per_micro": 2, "micro_batches_per_step": 2, "taps": list(draft.target_layer_ids)}
    indexed = TargetCache(tmp_path, **order)
    ranks = [TargetCache(tmp_path, stream=True, rank=rank, world=2, threads=2, **order) for rank in range(2)]
    for data in (indexed, *ranks):
        data.setup()
    torch.testing.assert_close(sum(map(totals, ranks)), totals(indexed), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("command", "cause"), [("exit 7", "ended with status 7"), ("sleep 9", "gave nothing for 1 s")])
def test_a_command_that_fails_or_is_silent_is_named_with_its_remedy(folder, command, cause, monkeypatch):
    monkeypatch.setattr(remote_shards, "PAUSE", 0.0)
    monkeypatch.setattr(remote_shards, "SILENCE", 1)
    monkeypatch.setattr(remote_shards, "ATTEMPTS", 1)
    place = f"pipe:case {{name}} in shard*) {command};; esac; cat {folder}/{{name}}"
    data = streamed(place, threads=1)
    with pytest.raises(DamagedShard, match=cause) as failed:
        for step in data.steps():
            list(step)
    assert f"of {place}" in str(failed.value) and "run the same command again" in str(failed.value)


def test_papers_of_a_temporary_folder_go_with_the_cache(folder):
    files = StreamedFiles(f"pipe:cat {folder}/{{name}}")
    kept = files.folder
    assert (kept / "tables.safetensors").exists()
    del files
    assert not kept.exists()
