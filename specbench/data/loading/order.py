"""The order of reading: pure functions of (seed, epoch) and of the optimiser step.

An epoch is a permutation of rows from a counter-based generator. An optimiser step takes the next
`samples_per_micro * micro_batches` rows and divides them into micro-batches; rank r of W takes micro-batches
m*W + r for m = 0, 1, ... So the samples of a step do not depend on the number of ranks or on what was read before,
and a run can resume from the number of its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import xxhash
from jaxtyping import Int

ROWS = Int[np.ndarray, "_"]


def permutation(count: int, *key: int) -> ROWS:
    """A permutation of range(count), a pure function of the key."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(count)


def epoch_order(rows: ROWS, shards: ROWS, seed: int, epoch: int, window: int | None = None) -> ROWS:
    """The rows in the order of an epoch. `shards` names the shard of each row.

    Without a window every order is equally likely. With one, the order of shards is random and rows are shuffled within
    `window` shards at a time, so that a reader needs only that many shards at a time.
    """
    if window is None:
        return rows[permutation(len(rows), seed, epoch)]
    if window < 1:
        raise ValueError(f"shuffle_window={window} shards: give at least 1, or none to shuffle over everything")
    present = np.unique(shards)
    place = np.empty(present.max(initial=0) + 1, np.int64)
    place[present[permutation(len(present), seed, epoch)]] = np.arange(len(present)) // window
    shuffled = permutation(len(rows), seed, epoch, 1)
    return rows[shuffled[np.argsort(place[shards[shuffled]], kind="stable")]]


def by_hash(ids: Sequence[str], salt: str) -> ROWS:
    """Rows in ascending order of a hash of their id: a fixed order that does not depend on other conversations."""
    digests = [xxhash.xxh3_64_intdigest(f"{salt}\n{one}".encode()) for one in ids]
    return np.argsort(np.array(digests, np.uint64), kind="stable")


def split(ids: Sequence[str], fraction: float, limit: int | None = None) -> tuple[ROWS, ROWS]:
    """Rows to train on and rows held out, both ascending.

    `fraction` of the conversations (at least one if it is above 0), those of the lowest hash, are held out. `limit`
    keeps that many of the others, those of the lowest second hash, so a smaller limit keeps a subset of a larger one's.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction={fraction}: give a share from 0 to below 1")
    held = max(1, round(fraction * len(ids))) if fraction else 0
    if held >= len(ids):
        raise ValueError(f"validation_fraction={fraction} of {len(ids)} conversations leaves none to train on")
    order = by_hash(ids, "validation")
    validation, rest = np.sort(order[:held]), np.sort(order[held:])
    if limit is not None:
        if not 0 < limit <= len(rest):
            raise ValueError(f"limit_samples={limit}: there are {len(rest)} conversations to train on")
        rest = np.sort(rest[by_hash([ids[row] for row in rest], "limit")[:limit]])
    return rest, validation


@runtime_checkable
class StepPlan(Protocol):
    """Which conversations every optimiser step of an epoch holds. `micro_batches`: of a step, over all ranks."""

    micro_batches: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the epoch."""

    def rows(self, step: int) -> ROWS:
        """All rows of an optimiser step, over all ranks."""

    def share(self, step: int, rank: int, world: int) -> list[ROWS]:
        """The micro-batches of one rank in a step."""


@dataclass(frozen=True)
class EpochPlan:
    """The micro-batches of an epoch. `order`: its rows; `lengths`: tokens of every row of the index."""

    order: ROWS
    lengths: ROWS
    samples_per_micro: int
    micro_batches: int
    balance: bool = True

    @property
    def steps(self) -> int:
        """Optimiser steps of the epoch; the last can have fewer samples, and micro-batches without samples."""
        return -(-len(self.order) // (self.samples_per_micro * self.micro_batches))

    def rows(self, step: int) -> ROWS:
        """All rows of an optimiser step, over all ranks."""
        size = self.samples_per_micro * self.micro_batches
        return self.order[step * size : (step + 1) * size]

    def deal(self, step: int) -> list[ROWS]:
        """The rows of a step, divided into its micro-batches; some are empty at the end of an epoch.

        Balanced: conversations are assigned longest first, each to the micro-batch with the fewest tokens so far, so
        the ranks of a step have nearly equal work.
        """
        rows = self.rows(step)
        if not self.balance:
            size = self.samples_per_micro
            return [rows[n * size : (n + 1) * size] for n in range(self.micro_batches)]
        hands: list[list[int]] = [[] for _ in range(self.micro_batches)]
        tokens = [0] * self.micro_batches
        for place in np.argsort(-self.lengths[rows], kind="stable"):
            open_hands = (n for n in range(self.micro_batches) if len(hands[n]) < self.samples_per_micro)
            hand = min(open_hands, key=lambda n: (tokens[n], n))
            hands[hand].append(place)
            tokens[hand] += int(self.lengths[rows[place]])
        return [rows[np.sort(np.array(hand, np.int64))] for hand in hands]

    def share(self, step: int, rank: int, world: int) -> list[ROWS]:
        """The micro-batches of one rank in a step."""
        return self.deal(step)[rank::world]
