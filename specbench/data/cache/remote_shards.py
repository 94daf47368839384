"""A cache behind a URL: fsspec downloads a shard when it is first needed; the least recently used ones are deleted."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from specbench.data.cache.manifest import INDEX, MANIFEST, TABLES, Manifest, sha256

CHUNK = 1 << 22  # bytes copied at a time


def is_remote(folder: str | Path) -> bool:
    """True for fsspec URLs (https://, s3://, hf://, ...), false for paths."""
    return "://" in str(folder)


class RemoteFiles:
    """Local copy of a remote cache in `folder`: manifest, index and tables, and shards up to `capacity` bytes at a
    time.

    Several processes of a machine can share the folder: a file is renamed into place when it is complete, and a file
    that is open stays readable after its removal. Each process has its own order of use.
    """

    def __init__(self, url: str, folder: str | Path, capacity: int):
        self.url, self.folder, self.capacity = url.rstrip("/"), Path(folder), capacity
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fetched = 0
        self._files, self._root = fsspec.core.url_to_fs(self.url)
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._fetch(MANIFEST)  # always downloaded: it contains the hashes and sizes of all other files
        for name in (INDEX, TABLES):
            if not (self.folder / name).exists() or not self._current(name):
                self._fetch(name)
        self._sizes = {shard["name"]: int(shard["bytes"]) for shard in Manifest.read(self.folder).shards}
        stale = [p for p in self.folder.glob("shard-*.tar") if p.stat().st_size != self._sizes.get(p.name)]
        for path in stale:
            path.unlink()
        present = sorted(self.folder.glob("shard-*.tar"), key=lambda path: path.stat().st_mtime)
        self._used: dict[str, int] = {path.name: path.stat().st_size for path in present}  # least recently used first

    def _current(self, name: str) -> bool:
        manifest = Manifest.read(self.folder)
        return sha256(self.folder / name) == {INDEX: manifest.index_hash, TABLES: manifest.tables_hash}[name]

    def require_window(self, shards: Sequence[dict[str, Any]], window: int | None) -> None:
        """Refuse an order that would download shards repeatedly: the shards in use at one time must fit."""
        sizes = sorted((int(shard["bytes"]) for shard in shards), reverse=True)
        # Reading ahead may already touch the next window while this one is being finished.
        needed = sum(sizes) if window is None else sum(sizes[: 2 * window])
        if needed > self.capacity:
            raise ValueError(
                f"local_bytes={self.capacity} cannot hold the {needed} bytes of shards that shuffle_window={window} "
                f"reads at a time from {self.url}: raise local_bytes or set a smaller shuffle_window"
            )

    def size(self, name: str) -> int | None:
        """Size in bytes of a local file (manifest, index, tables), or of a shard at its source."""
        if name in self._sizes:
            try:
                return int(self._files.size(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None
        path = self.folder / name
        return path.stat().st_size if path.exists() else None

    def open(self, name: str) -> int:
        """A file descriptor of the local copy, which is downloaded first if necessary."""
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            try:
                descriptor = os.open(self.folder / name, os.O_RDONLY)
            except FileNotFoundError:
                self._make_room(name)
                self._fetch(name)
                descriptor = os.open(self.folder / name, os.O_RDONLY)
        with self._guard:
            self._used.pop(name, None)
            self._used[name] = self._sizes[name]
        return descriptor

    def _make_room(self, name: str) -> None:
        with self._guard:
            while self._used and sum(self._used.values()) + self._sizes[name] > self.capacity:
                oldest = next(iter(self._used))
                del self._used[oldest]
                (self.folder / oldest).unlink(missing_ok=True)
            self._used[name] = self._sizes[name]

    def _fetch(self, name: str) -> None:
        temporary = self.folder / f"{name}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            with self._files.open(f"{self._root}/{name}", "rb") as source, open(temporary, "wb") as local:
                while chunk := source.read(CHUNK):
                    local.write(chunk)
            os.replace(temporary, self.folder / name)
        except FileNotFoundError as error:
            raise ValueError(f"{self.url}/{name} does not exist: is this the folder of a complete cache?") from error
        finally:
            temporary.unlink(missing_ok=True)
        with self._guard:
            self.fetched += 1
