"""Batches in reused memory, because new memory pages cost more time than filling them.

A store is free when no tensor refers to it, according to CPython's reference count: a batch that is still referenced is
never overwritten; the next batch then gets a new store.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specbench import fast

SMALL = 1 << 20  # bytes below which the allocator's own recycling is as good
FREE = 2  # references to a store that only the list holds, the one of the question included


class Recycler:
    """Hands out tensors. `pinned` stores make asynchronous copies to a GPU possible."""

    def __init__(self, pinned: bool = False):
        self.pinned, self._stores, self._lock = pinned, [], threading.Lock()

    def zeros(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Zeros of `shape` in the dtype and on the device of `like`."""
        size = math.prod(shape) * like.dtype.itemsize
        if size < SMALL or like.device.type != "cpu":
            return like.new_zeros(shape)
        return self.room(size).view(like.dtype).view(tuple(shape)).zero_()

    def states(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of `shape` that holds anything."""
        return self.room(math.prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))

    def room(self, size: int) -> Tensor:
        """`size` bytes that hold anything."""
        if not fast.enabled() or size < SMALL:
            return torch.empty(size, dtype=torch.uint8)
        with self._lock:
            store = self._stores[self._place(size)]
            memory = torch.frombuffer(store, dtype=torch.uint8, count=size)
            del store
        return memory

    def _place(self, size: int) -> int:
        """Index of a free store of at least `size` bytes; a new one, in the place of a free smaller one, if need be."""
        free = [n for n in range(len(self._stores)) if sys.getrefcount(self._stores[n]) == FREE]
        fitting = [n for n in free if len(self._stores[n]) >= size]
        if fitting:
            return min(fitting, key=lambda n: len(self._stores[n]))
        made = self._make(size + size // 8)
        if free:
            self._stores[free[0]] = made
            return free[0]
        self._stores.append(made)
        return len(self._stores) - 1

    def _make(self, size: int) -> np.ndarray:
        return (
            torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy() if self.pinned else np.empty(size, np.uint8)
        )
