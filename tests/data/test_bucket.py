"""A cache in a bucket: drafts trained from it are those of the folder, and a server that is killed loses nothing.

Needs s3fs and moto; docs/data.md says how to install them.
"""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from experiments.quickstart import stage
from specbench.data.cache import remote_shards
from specbench.data.cache.build import build
from specbench.data.cache.shards import DamagedShard
from specbench.data.cache.storage import storage
from specbench.data.loading.target_cache import TargetCache
from tests.data.test_datamodule import rows_of
from tests.data.tiny_target import TinyTarget, talks
from tests.pipeline import prepare

MISSING = [name for name in ("s3fs", "moto", "flask", "flask_cors") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.s3,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (docs/data.md)"),
]
SERVER = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"


class Bucket:
    """An S3 server in a process of its own, whose bucket `caches` is in memory: killed, it has lost everything."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("the S3 server does not listen")

    def put(self, folder) -> None:
        import s3fs

        files = s3fs.S3FileSystem(skip_instance_cache=True)
        files.mkdir("caches")
        files.put([str(path) for path in folder.iterdir() if path.is_file()], "caches/one/")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def bucket(monkeypatch):
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # one with the address of an earlier server
    made = Bucket()
    for name, value in {
        "AWS_ENDPOINT_URL": made.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_shards, "PAUSE", 0.05)
    made.start()
    yield made
    made.kill()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_draft_trained_from_the_bucket_is_that_of_the_folder(bucket, tmp_path):
    """Mirrored, in the order of the index; and streamed, in the order of a stream."""
    words = [word for word in prepare(tmp_path) if not word.startswith("root=")]
    (folder,) = (tmp_path / "cache").iterdir()
    bucket.put(folder)
    words += ["evaluate=false", "trainer.probe.every=null", "method=dflash", "start=random"]
    for way in ("mirrored", "streamed"):
        runs = [
            stage("train", [f"root={tmp_path / way / name}", f"cache={cache}", *words, f"stream={way == 'streamed'}"])
            for name, cache in (("folder", folder), ("bucket", "s3://caches/one"))
        ]
        here, there = (load_file(run / "draft" / "model.safetensors") for run in runs)
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    kept = [path.name for path in (tmp_path / "streamed").rglob("shard-*.tar")]
    copied = [path.name for path in (tmp_path / "mirrored").rglob("shard-*.tar")]
    assert kept == [] and sorted(copied) == sorted(path.name for path in folder.glob("shard-*.tar"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["streamed", "mirrored"])
def test_a_server_that_is_killed_is_named_and_reading_goes_on_with_the_next_one(bucket, way, tmp_path):
    folder = tmp_path / "cache"
    build(TinyTarget(), talks(46), folder, storage("bf16"), 24, shard_bytes=3_000, batch_tokens=48)
    bucket.put(folder)

    def opened():
        own = {"stream": True} if way == "streamed" else {"local_folder": tmp_path / "mirror", "shuffle_window": 1}
        order = {"samples_per_micro": 2, "micro_batches_per_step": 1, "seed": 7, "threads": 0}
        data = TargetCache("s3://caches/one", **order, **own)
        data.setup()
        return data

    whole = [[rows_of(batch) for batch in step] for step in opened().steps()]
    for path in (tmp_path / "mirror").glob("shard-*.tar"):
        path.unlink()
    data, seen = opened(), []
    with pytest.raises((DamagedShard, OSError), match=r"shard-\d+\.tar.*s3://caches/one.*tried 3 times"):
        for step in data.steps():
            seen.append([rows_of(batch) for batch in step])
            if len(seen) == 2:
                bucket.kill()
    assert 2 <= len(seen) < len(whole)
    bucket.start()
    bucket.put(folder)
    rest = [[rows_of(batch) for batch in step] for step in opened().steps(len(seen))]
    assert seen + rest[: len(whole) - len(seen)] == whole
