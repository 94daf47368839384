"""Random access to a cache: index, one read per sample into a reused buffer, checksum, decoding without copies.

Axes: T tokens, C taps, D hidden size.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import xxhash
from jaxtyping import UInt8
from torch import Tensor

from specbench.blocks import Sample
from specbench.data.cache.manifest import INDEX, Index, Manifest, read_tables, sha256
from specbench.data.cache.shards import PARTS, DamagedShard, decode_sample, read_and_close, shard_name
from specbench.data.loading.buffers import Recycler
from specbench.data.loading.order import ROWS

ByteTensor = UInt8[Tensor, "_"]


@runtime_checkable
class ShardFiles(Protocol):
    """Where a cache's files are: a folder of this machine, a mirror of a remote one, or the remote one itself.

    `folder` holds manifest, index and tables. `sized`: whether the size of a shard can be asked for. `source`: where
    the shards are, for messages.
    """

    folder: Path
    sized: bool

    @property
    def source(self) -> str: ...

    def size(self, name: str) -> int | None:
        """ByteTensor of a file; None if it is missing."""

    def read_into(self, name: str, view: memoryview, offset: int) -> int:
        """Fill `view` from a shard at `offset`; returns how many bytes there were."""


class LocalFiles:
    """A cache on this machine."""

    sized = True

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @property
    def source(self) -> str:
        return str(self.folder)

    def size(self, name: str) -> int | None:
        path = self.folder / name
        return path.stat().st_size if path.exists() else None

    def read_into(self, name: str, view: memoryview, offset: int) -> int:
        return read_and_close(os.open(self.folder / name, os.O_RDONLY), view, offset)

    def stream(self, name: str) -> io.FileIO:
        """A shard to read from its beginning."""
        return io.FileIO(self.folder / name)

    def require_ranges(self) -> None:
        """Any part of a file on disk can be read."""


@dataclass(frozen=True)
class Stored:
    """The bytes of one sample in memory: the requested parts, not yet decoded."""

    row: int
    parts: dict[str, ByteTensor]


@dataclass(frozen=True)
class Damage:
    """A sample that could not be read, and why."""

    shard: str
    id: str
    reason: str


class CacheReader:
    """Reads samples of one cache by their row in the index; it can be used from several threads.

    taps: layer ids to read, ascending, of those stored (None: all; empty: no bytes of taps are read).
    on_damage: "raise" names shard and sample; "skip" leaves the sample out and records it in `damage`.
    """

    def __init__(
        self,
        files: ShardFiles,
        taps: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        on_damage: str = "raise",
    ):
        if on_damage not in ("raise", "skip"):
            raise ValueError(f"on_damage={on_damage!r} does not exist: choose raise or skip")
        self.files, self.on_damage = files, on_damage
        self.damage: list[Damage] = []
        self.manifest = Manifest.read(files.folder)
        self._check_hashes()
        self.index = Index(files.folder / INDEX)
        self.manifest.require(self.index, files.folder)
        self.tables, self.norm, scales = read_tables(files.folder, self.manifest)
        self.storage = self.manifest.storage().with_scales(scales)
        self.dtype = dtype or self.storage.dtype
        self.taps, self._places = self._chosen(taps)
        self._parts = PARTS if self.taps else ("last", "tokens")
        self._decoded = Recycler()
        self._local, self._lock = threading.local(), threading.Lock()
        self._check_shards()

    def _chosen(self, taps: Sequence[int] | None) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        stored = list(self.manifest.identity["taps"])
        if taps is None or list(taps) == stored:
            return tuple(stored), None
        missing = [tap for tap in taps if tap not in stored]
        if missing:
            raise ValueError(
                f"target_layer_ids={list(taps)} asks for {missing}, but {self.files.folder} stores the layers "
                f"{stored}: choose among these or build a cache with those"
            )
        return tuple(taps), tuple(stored.index(tap) for tap in taps)

    def _check_hashes(self) -> None:
        for name, wanted in ((INDEX, self.manifest.index_hash), ("tables.safetensors", self.manifest.tables_hash)):
            if self.files.size(name) is None or sha256(self.files.folder / name) != wanted:
                raise DamagedShard(
                    f"{self.files.folder / name} is not the file that the manifest describes: remove manifest.json and "
                    "run `specbench cache` again; complete shards are kept"
                )

    def _check_shards(self) -> None:
        """Check the sizes of all shards before the first step: finds truncated, empty and missing shards."""
        if not self.files.sized:
            return
        for number, shard in enumerate(self.manifest.shards):
            size = self.files.size(shard["name"])
            if size == shard["bytes"]:
                continue
            rows = (self.index["shard"] == number).nonzero()[0]
            rows = rows[self.index["offset"][rows].argsort()]
            ends = self.index["offset"][rows] + self.index["bytes"][rows]
            lost = [self.index.ids[row] for row in rows[ends > (size or 0)]]
            found = "is missing" if size is None else f"holds {size} bytes instead of {shard['bytes']}"
            what = f"from sample {lost[0]!r} on {len(lost)} are cut" if lost else "its samples seem whole"
            message = f"{shard['name']} of {self.files.source} {found} ({what})"
            if self.on_damage == "raise":
                remedy = "remove it and run `specbench cache` again, or set on_damage=skip to train without the lost"
                raise DamagedShard(f"{message}: {remedy}")
            warnings.warn(message, stacklevel=2)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, rows: Sequence[int] | ROWS) -> list[Stored]:
        """The bytes of some samples, checked. They are in a buffer of this thread and valid until its next read."""
        rows = [int(row) for row in rows]
        spans = [self.spans(row) for row in rows]
        need = sum(self._room(size) for span in spans for _, size, _ in span)
        buffer, used, found = self._buffer(need), 0, []
        for row, span in zip(rows, spans, strict=True):
            try:
                blobs = []
                for offset, size, checksum in span:
                    blobs.append(self._fill(row, buffer[used : used + size], offset, checksum))
                    used += self._room(size)
                found.append(Stored(row, self.parts_of(row, blobs)))
            except (DamagedShard, OSError) as error:
                self.lost(row, error)
        return found

    def decode(self, stored: Sequence[Stored]) -> list[Sample]:
        """ByteTensor -> samples; raw states stay views of the bytes, others are in memory that is used again when no
        tensor refers to it."""
        how = {"taps": self._places, "dtype": self.dtype, "room": self._decoded.states}
        return [decode_sample(one.parts, self.storage, one.row, **how) for one in stored]

    def spans(self, row: int) -> list[tuple[int, int, int]]:
        """Byte ranges to read for a sample: all of it at once, or the requested parts one by one."""
        if len(self._parts) == len(PARTS):
            columns = [("offset", "bytes", "checksum")]
        else:
            columns = [(f"{part}_offset", f"{part}_bytes", f"{part}_checksum") for part in self._parts]
        return [tuple(int(self.index[name][row]) for name in names) for names in columns]

    def parts_of(self, row: int, blobs: list[ByteTensor]) -> dict[str, ByteTensor]:
        """The bytes of what `spans` names, by part."""
        if len(self._parts) < len(PARTS):
            return dict(zip(self._parts, blobs, strict=True))
        starts = {part: int(self.index[f"{part}_offset"][row] - self.index["offset"][row]) for part in PARTS}
        return {part: blobs[0][at : at + int(self.index[f"{part}_bytes"][row])] for part, at in starts.items()}

    @staticmethod
    def _room(size: int) -> int:
        return -(-size // 64) * 64

    def _buffer(self, size: int) -> ByteTensor:
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            self._local.buffer = buffer = torch.empty(size + size // 4, dtype=torch.uint8)
        return buffer

    def _fill(self, row: int, room: ByteTensor, offset: int, checksum: int) -> ByteTensor:
        view = memoryview(room.numpy())
        count = self.files.read_into(shard_name(int(self.index["shard"][row])), view, offset)
        require_whole(view, count, checksum)
        return room

    def lost(self, row: int, error: Exception) -> None:
        """A sample that cannot be read: an error that names it, or a line in `damage`."""
        damage = Damage(shard_name(int(self.index["shard"][row])), self.index.ids[row], str(error))
        message = f"{damage.shard} of {self.files.source}: sample {damage.id!r} (row {row}) {damage.reason}"
        if self.on_damage == "raise":
            remedy = "remove that shard and run `specbench cache` again, or set on_damage=skip"
            if isinstance(error, OSError):  # the transfer failed, and nothing is known against the shard
                remedy = "make it readable and run the same command again, or set on_damage=skip"
            raise DamagedShard(f"{message}: {remedy}") from error
        with self._lock:
            if damage not in self.damage:
                self.damage.append(damage)
                warnings.warn(f"{message}; skipped, {len(self.damage)} so far", stacklevel=2)


def require_whole(view: memoryview, count: int, checksum: int) -> None:
    """DamagedShard unless all of `view` was read (`count` bytes) and is what its xxh3 checksum says."""
    if count < len(view):
        raise DamagedShard(f"ends {len(view) - count} bytes early")
    if xxhash.xxh3_64_intdigest(view) != checksum:
        raise DamagedShard("does not match its checksum")


def verify(files: ShardFiles) -> list[Damage]:
    """Read every byte of every sample and return what is damaged."""
    reader = CacheReader(files, on_damage="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in range(len(reader)):
            reader.read([row])
    return reader.damage
