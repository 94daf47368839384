"""A cache behind a real HTTP server: the same batches, fetched when needed, within the bytes that were granted."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from specbench.data.cache.build import build
from specbench.data.cache.remote_shards import RemoteFiles, is_remote
from specbench.data.cache.shards import DamagedShard
from specbench.data.cache.storage import storage
from specbench.data.loading.frequent_tokens import frequent_tokens
from specbench.data.loading.reading import CacheReader
from specbench.data.loading.target_cache import TargetCache
from tests.data.tiny_target import TinyTarget, talks


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    build(TinyTarget(), talks(30), folder, storage("fp32"), 24, shard_bytes=10_000, batch_tokens=48)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def sizes(folder):
    return {path.name: path.stat().st_size for path in folder.glob("shard-*.tar")}


def test_urls_are_told_from_paths():
    assert is_remote("https://host/cache") and is_remote("s3://bucket/cache") and not is_remote("/data/cache")


def test_remote_steps_are_those_of_the_folder(source, tmp_path):
    folder, url = source
    options = {"samples_per_micro": 2, "micro_batches_per_step": 2, "shuffle_window": 1}
    room = 2 * max(sizes(folder).values())
    assert room < sum(sizes(folder).values()) / 2
    remote = TargetCache(url, local_folder=tmp_path, local_bytes=room, **options)
    local = TargetCache(folder, **options)
    remote.setup(), local.setup()
    for ours, theirs in zip(remote.steps(), local.steps(), strict=True):
        for batch, stored in zip(ours, theirs, strict=True):
            assert torch.equal(batch.taps, stored.taps) and torch.equal(batch.document, stored.document)
            assert sum(sizes(tmp_path).values()) <= room
    assert not list(tmp_path.glob("*.tmp"))
    # Papers, then every shard once: the order by windows needs none twice.
    assert remote.reader.files.fetched == 3 + len(sizes(folder))


def test_the_frequent_tokens_of_a_remote_cache_are_those_of_the_folder(source, tmp_path):
    folder, url = source
    remote, local = TargetCache(url, local_folder=tmp_path), TargetCache(folder)
    remote.setup(), local.setup()
    (ours, covered), (theirs, expected) = (frequent_tokens(data, 9, [3]) for data in (remote, local))
    assert ours.tolist() == theirs.tolist() and covered == expected and 3 in ours


def test_the_least_recently_used_shard_makes_room(source, tmp_path):
    folder, url = source
    names = sorted(sizes(folder))[:3]
    files = RemoteFiles(url, tmp_path, 2 * max(sizes(folder).values()))
    for name in (names[0], names[1], names[0], names[2]):
        with open(files.open(name), "rb") as file:
            assert file.read() == (folder / name).read_bytes()
    assert set(sizes(tmp_path)) == {names[0], names[2]}
    before = files.fetched
    with open(files.open(names[0]), "rb"):
        assert files.fetched == before
    again = RemoteFiles(url, tmp_path, 2 * max(sizes(folder).values()))
    assert again.fetched == 1  # the manifest alone: what is here is used
    with open(again.open(names[2]), "rb"):
        assert again.fetched == 1


def test_an_order_that_would_fetch_again_and_again_is_refused(source, tmp_path):
    folder, url = source
    with pytest.raises(ValueError, match="shuffle_window=None"):
        TargetCache(url, local_folder=tmp_path, local_bytes=sum(sizes(folder).values()) - 1).setup()
    with pytest.raises(ValueError, match="name a local_folder"):
        TargetCache(url).setup()
    TargetCache(url, local_folder=tmp_path, local_bytes=sum(sizes(folder).values())).setup()


def test_missing_papers_and_shards_are_named(source, tmp_path):
    folder, url = source
    with pytest.raises(ValueError, match=r"manifest\.json does not exist"):
        RemoteFiles(f"{url}/nothing", tmp_path / "a", 1 << 20)
    hidden = folder / "shard-00001.tar"
    hidden.rename(folder / "away")
    try:
        with pytest.raises(DamagedShard, match=r"shard-00001\.tar.*is missing"):
            CacheReader(RemoteFiles(url, tmp_path / "b", 1 << 20))
    finally:
        (folder / "away").rename(hidden)


def test_shards_of_another_cache_in_the_folder_are_not_taken_for_this_ones(source, tmp_path):
    folder, url = source
    build(TinyTarget(seed=1), talks(30), tmp_path / "other", storage("fp32"), 24, shard_bytes=10_000, batch_tokens=48)
    assert sizes(tmp_path / "other") == sizes(folder)
    room = sum(sizes(folder).values())
    for place, where in ((url, folder), ((tmp_path / "other").as_uri(), tmp_path / "other")):
        files = RemoteFiles(place, tmp_path / "copy", room)
        for name in sizes(where):
            with open(files.open(name), "rb") as file:
                assert file.read() == (where / name).read_bytes()
