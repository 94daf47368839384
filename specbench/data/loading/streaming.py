"""Streaming: a webdataset pipeline reads shards from beginning to end and writes nothing of them to the disk.

Every rank has its own shards. Each reader of a rank, a thread with its own connection, reads some of them, in an order
that depends on (seed, epoch), and conversations go through webdataset's shuffle buffer. The index says which
conversations a shard contains, so the shuffle buffer runs on row numbers first. Therefore the conversations of every
step, the number of steps of an epoch and the position of a resumed run are known before anything is read, and every
conversation is checked against its checksum in the index when it arrives.
"""

from __future__ import annotations

import io
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import webdataset as wds

from specbench.data.cache.shards import DamagedShard, shard_name
from specbench.data.loading.buffers import Recycler
from specbench.data.loading.order import ROWS, permutation
from specbench.data.loading.reading import CacheReader, Stored, require_whole
from specbench.data.loading.steps import EpochSteps

SKIPPED = 1 << 20  # bytes read at a time of what is not needed
WAITING = 2  # conversations that a reader has ready beside its shuffle buffer
ReadRow = tuple[int, Stored | None]  # a row and its bytes; None where they are damaged and on_damage=skip


@runtime_checkable
class Streamable(Protocol):
    """Where shards come from, in the order in which they are asked for."""

    def stream(self, name: str) -> io.IOBase:
        """A shard to read from its beginning."""


def deal_shards(counts: Sequence[int], world: int) -> list[list[int]]:
    """The shards of each rank: the largest first, each to the rank with the fewest conversations so far.

    `counts`: conversations to train on of every shard; shards without any are left out. The division is the same in
    every epoch, so that every epoch has as many steps.

    Errors: ValueError if a rank would have no shard: the other ranks would wait for it forever.
    """
    used = [shard for shard, count in enumerate(counts) if count]
    if len(used) < world:
        raise ValueError(
            f"stream=true: the cache has {len(used)} shards to train on for {world} ranks, and every rank needs one of "
            "its own: build the cache with smaller shards (shard_bytes), use fewer ranks, or train by index "
            "(stream=false)"
        )
    dealt: list[list[int]] = [[] for _ in range(world)]
    held = [0] * world
    for shard in sorted(used, key=lambda shard: (-counts[shard], shard)):
        rank = min(range(world), key=lambda rank: (held[rank], rank))
        dealt[rank].append(shard)
        held[rank] += counts[shard]
    return [sorted(own) for own in dealt]


def buffered(rows: Iterable[int], buffer: int, *key: int) -> list[int]:
    """The rows as they leave webdataset's shuffle buffer of that many, a pure function of the key."""
    if buffer < 2:
        return list(rows)
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return list(wds.shuffle(buffer, initial=buffer, rng=random.Random(seed))(iter(rows)))


@dataclass(frozen=True)
class StreamPlan:
    """One epoch of a stream, over all ranks; the micro-batches of a step are taken as in EpochPlan, in reading order.

    by_shard: rows to train on of every shard, in the order in which they lie in it. shards: those of each rank.
    readers: of a rank. buffer: conversations that a reader holds to draw from.
    """

    by_shard: Sequence[ROWS]
    shards: Sequence[Sequence[int]]
    seed: int
    epoch: int
    readers: int
    buffer: int
    samples_per_micro: int
    micro_batches: int

    @property
    def world(self) -> int:
        return len(self.shards)

    @property
    def per_rank(self) -> int:
        """Conversations that a rank takes in a step."""
        return self.samples_per_micro * self.micro_batches // self.world

    @cached_property
    def steps(self) -> int:
        """Optimiser steps of the epoch: those of the rank with the most conversations. Towards the end other ranks may
        have none left; their micro-batches are empty and weigh nothing."""
        most = max(sum(len(self.by_shard[shard]) for shard in own) for own in self.shards)
        return -(-most // self.per_rank)

    @cached_property
    def reading(self) -> list[list[tuple[list[int], list[int]]]]:
        """Of each rank and reader: its shards in the order of reading, and its rows as they leave the buffer."""
        found = []
        for rank, shards in enumerate(self.shards):
            drawn = [shards[place] for place in permutation(len(shards), self.seed, self.epoch, 2, rank)]
            of_rank = []
            for reader in range(self.readers):
                own = drawn[reader :: self.readers]
                rows = [int(row) for shard in own for row in self.by_shard[shard]]
                of_rank.append((own, buffered(rows, self.buffer, self.seed, self.epoch, 3, rank, reader)))
            found.append(of_rank)
        return found

    @cached_property
    def turns(self) -> list[list[int]]:
        """Of each rank: the reader of each conversation in turn, until every reader is at its end."""
        found = []
        for readers in self.reading:
            left = [len(rows) for _, rows in readers]
            turns: list[int] = []
            while any(left):
                for reader in range(self.readers):
                    if left[reader]:
                        left[reader] -= 1
                        turns.append(reader)
            found.append(turns)
        return found

    @cached_property
    def orders(self) -> list[ROWS]:
        """Of each rank: its rows in the order in which it trains on them."""
        found = []
        for readers, turns in zip(self.reading, self.turns, strict=True):
            sources = [iter(rows) for _, rows in readers]
            found.append(np.array([next(sources[reader]) for reader in turns], np.int64))
        return found

    def rows(self, step: int) -> ROWS:
        """All rows of an optimiser step, over all ranks."""
        return np.concatenate([order[step * self.per_rank : (step + 1) * self.per_rank] for order in self.orders])

    def share(self, step: int, rank: int, world: int) -> list[ROWS]:
        """The micro-batches of one rank in a step; `world` is the plan's own."""
        rows, size = self.orders[rank][step * self.per_rank : (step + 1) * self.per_rank], self.samples_per_micro
        return [rows[n * size : (n + 1) * size] for n in range(self.micro_batches // world)]


def pipeline(
    files: Streamable, reader: CacheReader, shards: Sequence[int], rows: Sequence[int], memory: Recycler
) -> wds.DataPipeline:
    """What one reader reads: `rows`, in this order, from these shards, as (row, bytes).

    Its stages are those of wds.WebDataset, with two replaced: conversations are cut out of a shard by their offsets in
    the index, which takes a third of the processor time of parsing tar members, and the shuffle buffer returns them in
    the order of the plan.
    """
    wanted = np.zeros(len(reader), bool)
    wanted[list(rows)] = True
    present = set(reader.index["shard"][wanted].tolist())
    needed = [shard for shard in shards if shard in present]
    return wds.DataPipeline(
        wds.SimpleShardList([shard_name(shard) for shard in needed]) if needed else lambda: iter(()),
        lambda urls: opened(files, urls),
        lambda streams: conversations(reader, streams, wanted, memory),
        lambda found: in_order(found, rows),
    )


def opened(files: Streamable, urls: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Shards as streams; a shard that cannot be opened has None and the cause."""
    for one in urls:
        try:
            stream = files.stream(one["url"])
        except OSError as error:
            yield one | {"stream": None, "error": error}
            continue
        with stream:
            yield one | {"stream": stream, "error": None}


def conversations(
    reader: CacheReader, streams: Iterable[dict[str, Any]], wanted: np.ndarray, memory: Recycler
) -> Iterator[ReadRow]:
    """The wanted conversations of every shard, checked, as they lie in it."""
    for one in streams:
        number = int(one["url"].removeprefix("shard-").removesuffix(".tar"))
        error, place = one["error"], 0
        for row in map(int, _rows_of(reader, number)):
            if not wanted[row]:
                continue
            stored = None
            try:
                if error is not None:
                    raise error
                blobs = []
                for offset, size, checksum in reader.spans(row):
                    blob = memory.room(size)
                    view = memoryview(blob.numpy())
                    try:
                        _skip(one["stream"], offset - place)
                        count = _fill(one["stream"], view)
                    except OSError as broken:
                        error = broken  # what lies behind it in the shard is out of reach, too
                        raise
                    place = offset + count
                    require_whole(view, count, checksum)
                    blobs.append(blob)
                stored = Stored(row, reader.parts_of(row, blobs))
            except (DamagedShard, OSError) as damaged:
                reader.lost(row, damaged)
            yield row, stored


def in_order(found: Iterable[ReadRow], rows: Sequence[int]) -> Iterator[ReadRow]:
    """Return what arrives in the order of `rows` and keep what arrives too early: the shuffle buffer."""
    arriving, held = iter(found), {}
    for row in rows:
        while row not in held:
            number, stored = next(arriving)
            held[number] = stored
        yield row, held.pop(row)


def _rows_of(reader: CacheReader, shard: int) -> ROWS:
    """All rows of a shard, in the order in which they lie in it."""
    rows = np.flatnonzero(reader.index["shard"] == shard)
    return rows[np.argsort(reader.index["offset"][rows], kind="stable")]


def _fill(stream: io.IOBase, view: memoryview) -> int:
    done = 0
    while done < len(view) and (count := stream.readinto(view[done:])):
        done += count
    return done


def _skip(stream: io.IOBase, count: int) -> None:
    if isinstance(stream, io.FileIO):
        stream.seek(count, io.SEEK_CUR)
        return
    scratch = memoryview(bytearray(min(count, SKIPPED)))
    while count and (read := stream.readinto(scratch[:count])):
        count -= read


def ahead(items: Iterable[Any], count: int) -> Iterator[Any]:
    """The items, up to `count` of them fetched before they are asked for, in a thread of their own."""
    source, end, pending = iter(items), object(), deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="specbench-stream")
    try:
        while True:
            while len(pending) < count:
                pending.append(pool.submit(next, source, end))
            found = pending.popleft().result()
            if found is end:
                return
            yield found
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        source.close()


class StreamSteps(EpochSteps):
    """The Steps of one epoch of a stream, for one rank. `stages` begin with what makes a batch of conversations' bytes.

    threads: 0 reads in the calling thread, anything else gives every reader a thread of its own.
    """

    plan: StreamPlan

    def __init__(
        self, *epoch: Any, files: Streamable, reader: CacheReader, memory: Recycler, threads: int, **place: int
    ):
        super().__init__(*epoch, **place)
        self._files, self._reader, self._memory, self._threads = files, reader, memory, threads

    def source(self, first: int) -> Iterator[list[Stored]]:
        """The first stage: what was read for each of this rank's micro-batches from step `first` on.

        A reader that starts in the middle of an epoch opens the shards alone in which something is left to read.
        """
        turns, done = self.plan.turns[self.rank], first * self.plan.per_rank
        readers: list[Iterator[ReadRow]] = []
        for number, (shards, rows) in enumerate(self.plan.reading[self.rank]):
            left = rows[turns[:done].count(number) :]
            stages = iter(pipeline(self._files, self._reader, shards, left, self._memory))
            readers.append(ahead(stages, WAITING) if self._threads else stages)
        try:
            place = done
            for step in range(first, self.plan.steps):
                for rows in self.plan.share(step, self.rank, self.world):
                    found = [next(readers[turns[place + n]]) for n in range(len(rows))]
                    assert [row for row, _ in found] == rows.tolist(), "the stream is not in the order of its plan"
                    place += len(rows)
                    yield [stored for _, stored in found if stored is not None]
        finally:
            for reader in readers:
                reader.close()
