"""How fast a cache is read by index and as a stream, against other readers of the same data, in one run.

The memory-mapped reader is the plain form of what published toolkits do: raw bf16 states of every conversation in one
file, mapped, sliced and collated; no checksums. Stock webdataset parses the tar members of the same shards, with
checksums of nothing. All end in packed batches.

Axes: T tokens, C taps, D hidden size.
"""

from __future__ import annotations

import os
import resource
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

from specbench.blocks import Batch, Context, Sample, pack
from specbench.data.cache.build import build
from specbench.data.cache.shards import from_webdataset
from specbench.data.cache.storage import storage
from specbench.data.loading.order import ROWS
from specbench.data.loading.target_cache import TargetCache
from specbench.models.embedding_head import Tables

VOCABULARY = 512


@dataclass(frozen=True)
class ReadingSpeed:
    """Bytes of states (in bf16) per second of elapsed time, and processor seconds for them; best of the repeats."""

    reader: str
    gigabytes_per_second: float
    cpu_seconds_per_gigabyte: float


@dataclass(frozen=True)
class _Talk:
    id: str
    tokens: list[int]
    loss_mask: list[bool]
    source: str = "random"


class _Lookup:
    """States by table look-up: real bf16 numbers at the cost of a copy."""

    def __init__(self, hidden_size: int, taps: int):
        generator = torch.Generator().manual_seed(0)
        self.states_of_token = torch.randn(VOCABULARY, taps, hidden_size, generator=generator).bfloat16()
        table = self.states_of_token[:, 0].float()
        self.tables = Tables(table, table)
        self.name, self.revision, self.weights_hash, self.tokenizer = "look-up", None, "0", None
        self.target_layer_ids, self.config = tuple(range(taps)), {}

    def states(self, tokens: Tensor, lengths: Tensor) -> Context:
        taps = self.states_of_token[tokens]
        return Context(taps, taps[:, :, 0].contiguous(), lengths)

    def logits(self, last: Tensor) -> Tensor:
        return self.tables.logits(last.float())

    def live_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.logits(self.states(tokens, lengths).last)


def compare(
    folder: str | Path,
    samples: int = 48,
    shortest: int = 512,
    longest: int = 4096,
    hidden_size: int = 2560,
    taps: int = 5,
    samples_per_micro: int = 2,
    threads: int = 2,
    repeats: int = 3,
    codecs: tuple[str, ...] = ("bf16", "exact", "int8", "smallest"),
    shard_bytes: int = 1 << 28,
) -> list[ReadingSpeed]:
    """Write the same random conversations in all forms below `folder`, then read all of them in turns.

    A cache is read by index, as a stream of its files, as a stream of a command's output, and by stock webdataset.

    The files stay in the page cache of the operating system, as in a second epoch on a machine with enough memory.
    """
    folder, generator = Path(folder), np.random.default_rng(0)
    lengths = generator.integers(shortest, longest + 1, samples)
    talks = [_Talk(str(n), generator.integers(0, VOCABULARY, k).tolist(), [True] * k) for n, k in enumerate(lengths)]
    target = _Lookup(hidden_size, taps)
    mapped = _write_mapped(folder / "mapped.bin", target, talks)
    readers: dict[str, Callable[[], Iterator[Batch]]] = {}
    order: list[ROWS] = []
    for name in codecs:
        build(target, talks, folder / name, storage(name), longest, shard_bytes=shard_bytes)
        order_of = {"samples_per_micro": samples_per_micro, "threads": threads}
        data = TargetCache(folder / name, **order_of)
        data.setup()
        order = [rows for step in range(data.steps_per_epoch) for rows in data.plan(0).deal(step)]
        command = f"pipe:cat {shlex.quote(str(folder / name))}/{{name}}"
        ways = {
            f"{name} by index": data,
            f"{name} stream": TargetCache(folder / name, stream=True, shuffle_buffer=8, **order_of),
            f"{name} stream of a command": TargetCache(command, stream=True, shuffle_buffer=8, **order_of),
        }
        for label, way in ways.items():
            way.setup()
            readers[label] = lambda way=way: (batch for step in way.steps() for batch in step)
        readers[f"{name} stock webdataset"] = lambda data=data: _stock(data, samples_per_micro)
    readers["memory-mapped, collated"] = lambda: (pack([mapped(int(row)) for row in rows]) for rows in order)
    size = int(lengths.sum()) * (taps + 1) * hidden_size * 2 / 1e9
    best: dict[str, tuple[float, float]] = {}
    for _ in range(repeats):
        for name, read in readers.items():  # in turns, so that other programs slow all of them equally
            wall, processor = time.perf_counter(), _processor_seconds()
            checked = sum(float(batch.last[0, 0, 0]) + float(batch.taps[0, -1, -1, -1]) for batch in read())
            found = (time.perf_counter() - wall, _processor_seconds() - processor)
            assert np.isfinite(checked)
            best[name] = min(best.get(name, found), found)
    return [ReadingSpeed(name, size / wall, processor / size) for name, (wall, processor) in best.items()]


def _processor_seconds() -> float:
    """Of this process and of commands that it ran to their end."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _stock(data: TargetCache, samples_per_micro: int) -> Iterator[Batch]:
    """The shards in their own order through webdataset's own stages."""
    urls = [str(data.reader.files.folder / shard["name"]) for shard in data.manifest.shards]
    stages = wds.WebDataset(urls, shardshuffle=False).map(lambda raw: from_webdataset(raw, data.reader.storage))
    yield from (pack(group) for group in stages.batched(samples_per_micro, collation_fn=list))


def _write_mapped(path: Path, target: _Lookup, talks: list[_Talk]) -> Callable[[int], Sample]:
    """All states in one file, a conversation after the other, and a function that maps one back."""
    starts: list[int] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for talk in talks:
            starts.append(file.tell())
            context = target.states(torch.tensor([talk.tokens]), torch.tensor([len(talk.tokens)]))
            for states in (context.taps[0], context.last[0]):
                file.write(states.contiguous().view(torch.int16).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    data = np.memmap(path, np.int16, "r+")
    taps, hidden = target.states_of_token.shape[1:]

    def sample(row: int) -> Sample:
        talk = talks[row]
        count, first = len(talk.tokens), starts[row] // 2
        split = first + count * taps * hidden
        states = torch.from_numpy(data[first:split]).view(torch.bfloat16).view(count, taps, hidden)
        last = torch.from_numpy(data[split : split + count * hidden]).view(torch.bfloat16).view(count, hidden)
        return Sample(torch.tensor(talk.tokens), torch.tensor(talk.loss_mask), states, last, row)

    return sample


def report(speeds: list[ReadingSpeed]) -> list[dict[str, Any]]:
    """The comparison as rows of a table."""
    return [vars(speed) for speed in speeds]
