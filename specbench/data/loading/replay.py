"""Replay: a new target cache, with conversations of an older one in every optimiser step.

A draft that is trained further on other data alone forgets the data before. With replay, `share` of the conversations
of every step come from the older cache; an epoch is one pass over the new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from specbench.blocks import Batch, Sample
from specbench.data.cache.manifest import CacheMismatch
from specbench.data.loading.order import ROWS, EpochPlan, epoch_order, permutation
from specbench.data.loading.step_data import StepData
from specbench.data.loading.target_cache import TargetCache
from specbench.models.embedding_head import Tables
from specbench.ranges import ShareWithin


class Replay(StepData):
    """Two caches of one target as one data module. Rows of the older cache are numbered after those of the new one.

    Args:
        new: the cache to train on; its order settings (batch sizes, seed, held-out conversations) hold.
        old: the cache to replay, read by index; its held-out conversations are not replayed.
        share: of the conversations of a step that come from `old`, rounded to whole ones, at least one.

    Raises:
        ValueError: a step has no room for a conversation of each cache, or a cache is streamed.
        CacheMismatch: the caches are of different targets or taps.
    """

    def __init__(self, new: TargetCache, old: TargetCache, share: ShareWithin = 0.25):
        super().__init__(
            new.samples_per_micro,
            new.micro_batches_per_step,
            row_length=new.row_length,
            seed=new.seed,
            validation_fraction=new.validation_fraction,
            limit_samples=new.limit_samples,
            shuffle_window=new.shuffle_window,
            balance=new.balance,
            threads=new._ahead.threads,
            ahead=new._ahead.ahead,
            rank=new._rank,
            world=new._world,
        )
        if new.stream or old.stream:
            raise ValueError("replay reads both caches by index: set stream=false")
        size = new.samples_per_micro * new.micro_batches_per_step
        self.replayed = max(1, round(share * size))
        if not 0 < share < 1 or self.replayed >= size:
            raise ValueError(
                f"replay_share={share} of the {size} conversations of a step leaves no room for both caches: give a "
                "smaller share, or larger steps (trainer.data.samples_per_micro)"
            )
        for name in ("weights", "tokenizer", "taps"):
            one, other = new.manifest.identity.get(name), old.manifest.identity.get(name)
            if one != other:
                raise CacheMismatch(
                    f"replay={old.folder} has {name} {other} and {new.folder} has {one}: replay a cache of the same "
                    "target and taps"
                )
        self.new, self.old, self.share = new, old, share
        self.folder = new.folder

    @cached_property
    def ids(self) -> Sequence[str]:
        return [*self.new.ids, *self.old.ids]

    @cached_property
    def lengths(self) -> ROWS:
        return np.concatenate([self.new.lengths, self.old.lengths])

    @cached_property
    def supervised(self) -> ROWS:
        return np.concatenate([self.new.supervised, self.old.supervised])

    @cached_property
    def shards(self) -> ROWS:
        return np.concatenate([self.new.shards, self.old.shards + 1 + self.new.shards.max(initial=0)])

    @property
    def content(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{self.new.content} {self.old.content} {self.replayed}".encode())

    @property
    def tables(self) -> Tables:
        return self.new.tables

    @property
    def target_name(self) -> str:
        return self.new.target_name

    @property
    def target_config(self) -> dict[str, Any]:
        return self.new.target_config

    @property
    def lineage(self) -> dict[str, Any]:
        return self.new.lineage | {"replay": self.old.lineage["fingerprint"], "replay_share": self.share}

    @property
    def damage(self) -> Sequence[Any]:
        return [*self.new.damage, *self.old.damage]

    @cached_property
    def rows(self) -> tuple[ROWS, ROWS]:
        """Rows of the new cache alone, which make an epoch, and those held out."""
        return self.new.rows

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of a pass over the new cache."""
        return -(-len(self.rows[0]) // (self.samples_per_micro * self.micro_batches_per_step - self.replayed))

    def a_step(self) -> list[tuple[ROWS, float]]:
        """Rows of the new cache and of the replayed one, and how many of each an average step of an epoch takes."""
        old = self.old.rows[0] + len(self.new.ids)
        return [(self.rows[0], len(self.rows[0]) / self.steps_per_epoch), (old, float(self.replayed))]

    def plan(self, epoch: int) -> EpochPlan:
        """The micro-batches of an epoch: in every step the next new rows and the next replayed ones, which pass over
        the older cache in an order of their own, whatever the epochs."""
        train, old = self.rows[0], self.old.rows[0]
        order = epoch_order(train, self.shards[train], self.seed, epoch, self.shuffle_window)
        fresh = self.samples_per_micro * self.micro_batches_per_step - self.replayed
        steps = self.steps_per_epoch
        turn, place = np.divmod(np.arange(epoch * steps * self.replayed, (epoch + 1) * steps * self.replayed), len(old))
        again = np.empty_like(place)
        for one in np.unique(turn):
            again[turn == one] = old[permutation(len(old), self.seed, int(one), 2)[place[turn == one]]]
        again += len(self.new.ids)
        parts = []
        for step, replayed in enumerate(again.reshape(steps, self.replayed)):
            parts += [order[step * fresh : (step + 1) * fresh], replayed]
        return EpochPlan(
            np.concatenate(parts), self.lengths, self.samples_per_micro, self.micro_batches_per_step, self.balance
        )

    def samples(self, rows: ROWS) -> list[Sample]:
        """Conversations with their states; their ordinals are rows of both caches together, so that two of them never
        share one."""
        first, found = len(self.new.ids), {}
        for cache, start, chosen in ((self.new, 0, rows < first), (self.old, first, rows >= first)):
            if chosen.any():
                for sample in cache.samples(rows[chosen] - start):
                    found[sample.ordinal + start] = replace(sample, ordinal=sample.ordinal + start)
        return [found[int(row)] for row in rows if int(row) in found]

    def empty(self) -> Batch:
        return self.new.empty()
