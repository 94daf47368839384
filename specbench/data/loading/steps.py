"""Steps: what a training loop iterates over. One `TrainingStep` is one optimiser step, a lazy handle over its batches.

Axes: B batch rows, T tokens, C taps, D hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import webdataset as wds

from specbench.blocks import PADDING, Batch
from specbench.data.loading.order import ROWS, StepPlan

EMPTY_LENGTH = 2  # tokens of a micro-batch without any sample: enough for every shape, supervised nowhere


def empty_batch(taps: int, hidden_size: int, dtype: torch.dtype) -> Batch:
    """A micro-batch with weight zero: one row of padding."""
    shape = (1, EMPTY_LENGTH)
    return Batch(
        tokens=torch.zeros(shape, dtype=torch.long),
        loss_mask=torch.zeros(shape, dtype=torch.bool),
        document=torch.full(shape, PADDING, dtype=torch.long),
        position=torch.zeros(shape, dtype=torch.long),
        taps=torch.zeros(*shape, taps, hidden_size, dtype=dtype),
        last=torch.zeros(*shape, hidden_size, dtype=dtype),
    )


class ReadAhead:
    """A pipeline stage that applies `load` in threads, some items ahead, and keeps the order.

    Reading and decoding release the interpreter lock, so threads are as fast as worker processes, without transfer of
    batches between processes. The threads and their buffers are kept after an epoch.
    """

    def __init__(self, load: Callable[[Any], Any], threads: int, ahead: int):
        if threads < 0 or ahead < 1:
            raise ValueError(f"threads={threads}, ahead={ahead}: give 0 or more threads and at least 1 item ahead")
        self.load, self.threads, self.ahead = load, threads, ahead
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="specbench-read")

    def __call__(self, items: Iterable[Any]) -> Iterator[Any]:
        if self.threads == 0:
            yield from map(self.load, items)
            return
        pending: deque[Future] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(self.load, item))
                if len(pending) > self.ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class TrainingStep:
    """One optimiser step of one rank. Iterate over it, or over `micro`, for its batches (this rank's).

    `number` counts from the start of training, `samples` and `supervised` count over all ranks: conversations, and
    tokens of their loss masks. Reading starts when the iteration does; a second iteration reads again.
    """

    def __init__(self, number: int, epoch: int, samples: int, supervised: int, epoch_steps: EpochSteps):
        self.number, self.epoch, self.samples, self.supervised = number, epoch, samples, supervised
        self._steps = epoch_steps

    @property
    def micro(self) -> Iterator[Batch]:
        """The micro-batches, read when they are requested."""
        return iter(self)

    def __iter__(self) -> Iterator[Batch]:
        return self._steps.batches(self.number - self.epoch * self._steps.plan.steps)

    def __repr__(self) -> str:
        counts = f"samples={self.samples}, supervised={self.supervised}"
        return f"TrainingStep(number={self.number}, epoch={self.epoch}, {counts})"


class EpochSteps:
    """The Steps of one epoch, from `first` (counted within the epoch) to its end, for one rank of `world`.

    `stages` is the pipeline after its source, as webdataset stages: each takes an iterator and gives one; the first
    receives arrays of index rows and the last yields batches.
    """

    def __init__(
        self,
        plan: StepPlan,
        epoch: int,
        stages: Sequence[Callable[[Iterable[Any]], Iterator[Any]]],
        supervised: ROWS,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.plan, self.epoch, self.stages, self.first = plan, epoch, list(stages), first
        self.supervised, self.rank, self.world = supervised, rank, world
        self._position: tuple[int, int] | None = None
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[TrainingStep]:
        for number in range(self.first, self.plan.steps):
            rows = self.plan.rows(number)
            total = self.epoch * self.plan.steps + number
            yield TrainingStep(total, self.epoch, len(rows), int(self.supervised[rows].sum()), self)

    def source(self, first: int) -> Iterator[ROWS]:
        """The first stage: rows of this rank's micro-batches from step `first` on. Driven by the index alone."""
        for number in range(first, self.plan.steps):
            yield from self.plan.share(number, self.rank, self.world)

    def pipeline(self, first: int) -> Iterable[Batch]:
        """Source and stages as one webdataset pipeline; its list of stages can be read and changed."""
        return wds.DataPipeline(lambda: self.source(first), *self.stages)

    def batches(self, number: int) -> Iterator[Batch]:
        """This rank's micro-batches of one step. Steps taken in order share a pipeline, any other order restarts it."""
        for micro in range(self.plan.micro_batches // self.world):
            if self._position != (number, micro) or self._batches is None:
                if micro:
                    raise RuntimeError(f"step {number} is being read twice at once")
                self.close()
                self._batches = iter(self.pipeline(number))
            batch = next(self._batches)
            last = micro + 1 == self.plan.micro_batches // self.world
            self._position = (number + 1, 0) if last else (number, micro + 1)
            yield batch

    def close(self) -> None:
        """Stop reading ahead."""
        if self._batches is not None:
            self._batches.close()
        self._batches = self._position = None
