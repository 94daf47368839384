"""How long training steps wait for their data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Fetched = TypeVar("Fetched")


class DataWait:
    """Adds up the elapsed seconds of steps, and those in which a step waited for the next of its micro-batches.

    A micro-batch that was read ahead costs no waiting. Without reading ahead (`threads=0`), and where the target is run
    in training, all of this work counts. A resumed training counts from where it was resumed.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.seconds = self.waited = 0.0
        self._marked = (0.0, 0.0)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within it is one step."""
        start = self.clock()
        yield
        self.seconds += self.clock() - start

    def over(self, items: Iterable[Fetched]) -> Iterator[Fetched]:
        """The items; what each takes to arrive counts as waiting."""
        arriving = iter(items)
        while True:
            start = self.clock()
            try:
                item = next(arriving)
            except StopIteration:
                return
            finally:
                self.waited += self.clock() - start
            yield item

    @property
    def share(self) -> float | None:
        """Share of the time of all steps that was spent waiting; None before the first step."""
        return self.waited / self.seconds if self.seconds else None

    def since_last(self) -> float:
        """The share of the steps since this was last asked; 0 if there was none."""
        seconds, waited = self.seconds - self._marked[0], self.waited - self._marked[1]
        self._marked = (self.seconds, self.waited)
        return waited / seconds if seconds else 0.0
