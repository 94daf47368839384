"""StepData: conversations as optimiser steps for Lightning, for any source of the target's states.

The position in the data follows only from the trainer's global step: the order of an epoch is a pure function of (seed,
epoch), and the state of the module is an identity that a resumed run must match. Data sets have no length; use
`steps_per_epoch`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import lightning as L
import torch

from specbench.blocks import Batch, Sample, pack
from specbench.data.cache.manifest import differences
from specbench.data.loading.buffers import Recycler
from specbench.data.loading.order import ROWS, EpochPlan, epoch_order, permutation, split
from specbench.data.loading.steps import EpochSteps, ReadAhead, TrainingStep
from specbench.models.embedding_head import Tables
from specbench.ranges import Count, Seed, ShareBelowOne, Threads, Tokens


class StepData(L.LightningDataModule):
    """Conversations as optimiser steps, for any source of their states.

    A step takes `samples_per_micro * micro_batches_per_step` conversations over all ranks. `row_length` packs several
    conversations into a row of at most that many tokens (None: one per row, padded). Ranks come from the trainer unless
    `rank` and `world` are given; `micro_batches_per_step` must be a multiple of the number of ranks.
    """

    def __init__(
        self,
        samples_per_micro: Count = 1,
        micro_batches_per_step: Count = 1,
        row_length: Tokens | None = None,
        seed: Seed = 0,
        validation_fraction: ShareBelowOne = 0.0,
        limit_samples: Count | None = None,
        shuffle_window: Count | None = None,
        balance: bool = True,
        threads: Threads = 2,
        ahead: Count = 4,
        rank: int | None = None,
        world: int | None = None,
    ):
        super().__init__()
        if samples_per_micro < 1 or micro_batches_per_step < 1:
            raise ValueError(
                f"samples_per_micro={samples_per_micro}, micro_batches_per_step={micro_batches_per_step}: "
                "both must be at least 1"
            )
        self.samples_per_micro, self.micro_batches_per_step = samples_per_micro, micro_batches_per_step
        self.row_length, self.seed, self.validation_fraction = row_length, seed, validation_fraction
        self.limit_samples, self.shuffle_window, self.balance = limit_samples, shuffle_window, balance
        self._rank, self._world = rank, world
        self._memory = Recycler(pinned=torch.cuda.is_available())
        self._ahead = ReadAhead(self.batch, threads, ahead)

    @property
    @abstractmethod
    def ids(self) -> Sequence[str]:
        """Identity of every conversation, by row."""

    @property
    @abstractmethod
    def lengths(self) -> ROWS:
        """Tokens of every conversation."""

    @property
    @abstractmethod
    def supervised(self) -> ROWS:
        """Supervised tokens of every conversation."""

    @property
    @abstractmethod
    def shards(self) -> ROWS:
        """Shard of every conversation, for `shuffle_window`."""

    @property
    @abstractmethod
    def content(self) -> str:
        """Hash of the rows; two modules with the same hash have the same conversations in the same order."""

    @property
    @abstractmethod
    def tables(self) -> Tables:
        """The target's frozen embedding and head."""

    @property
    @abstractmethod
    def target_name(self) -> str:
        """Name of the target."""

    @property
    @abstractmethod
    def target_config(self) -> dict[str, Any]:
        """The raw configuration of the target's model."""

    @property
    @abstractmethod
    def lineage(self) -> dict[str, Any]:
        """The source of the states for the record of a run: fingerprint, folder and bytes on disk."""

    @property
    def damage(self) -> Sequence[Any]:
        """Samples that could not be read and were left out."""
        return ()

    @abstractmethod
    def samples(self, rows: ROWS) -> list[Sample]:
        """Conversations with their states, in new memory; called from any thread."""

    def borrowed(self, rows: ROWS) -> list[Sample]:
        """The same, in memory that the next call of this thread can overwrite; called from reader threads."""
        return self.samples(rows)

    @abstractmethod
    def empty(self) -> Batch:
        """A micro-batch without weight."""

    @property
    def rank(self) -> int:
        return self._rank if self._rank is not None else self.trainer.global_rank if self.trainer else 0

    @property
    def world(self) -> int:
        return self._world if self._world is not None else self.trainer.world_size if self.trainer else 1

    def setup(self, stage: str | None = None) -> None:
        """Check before step 0 what would otherwise fail later."""
        if self.micro_batches_per_step % self.world:
            raise ValueError(
                f"micro_batches_per_step={self.micro_batches_per_step} cannot be shared by {self.world} ranks: "
                "choose a multiple"
            )
        longest = int(self.lengths.max(initial=0))
        if self.row_length is not None and longest > self.row_length:
            raise ValueError(
                f"row_length={self.row_length} is shorter than the longest conversation ({longest} tokens)"
            )

    @cached_property
    def rows(self) -> tuple[ROWS, ROWS]:
        """Rows to train on and rows held out."""
        return split(self.ids, self.validation_fraction, self.limit_samples)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-len(self.rows[0]) // (self.samples_per_micro * self.micro_batches_per_step))

    @property
    def supervised_tokens(self) -> int:
        """Supervised tokens that one epoch trains on."""
        return int(self.supervised[self.rows[0]].sum())

    def a_step(self) -> list[tuple[ROWS, float]]:
        """Where the conversations of a step come from: rows, and how many of them an average step of an epoch takes."""
        return [(self.rows[0], len(self.rows[0]) / self.steps_per_epoch)]

    def plan(self, epoch: int) -> EpochPlan:
        """The micro-batches of an epoch."""
        train = self.rows[0]
        order = epoch_order(train, self.shards[train], self.seed, epoch, self.shuffle_window)
        return EpochPlan(order, self.lengths, self.samples_per_micro, self.micro_batches_per_step, self.balance)

    def steps(self, start: int = 0) -> EpochSteps:
        """The Steps from optimiser step `start` of the run to the end of its epoch."""
        epoch, first = divmod(start, self.steps_per_epoch)
        return self._epoch(self.plan(epoch), epoch, first)

    def _epoch(self, plan: EpochPlan, epoch: int = 0, first: int = 0) -> EpochSteps:
        return EpochSteps(plan, epoch, self.stages(), self.supervised, first, self.rank, self.world)

    def stages(self) -> list[Callable[..., Iterator[Any]]]:
        """The webdataset stages after the index-driven source: rows -> batches."""
        return [self._ahead]

    def batch(self, rows: ROWS) -> Batch:
        """One micro-batch from its rows."""
        samples = self.borrowed(rows) if len(rows) else []
        return pack(samples, self.row_length, self._memory.zeros) if samples else self.empty()

    def train_dataloader(self) -> _FromGlobalStep:
        return _FromGlobalStep(self)

    def val_dataloader(self) -> EpochSteps | list:
        held = self.rows[1]
        if not len(held):
            return []
        return self._epoch(EpochPlan(held, self.lengths, self.samples_per_micro, self.world, self.balance))

    def test_dataloader(self) -> EpochSteps | list:
        """The held-out conversations, as for validation."""
        return self.val_dataloader()

    def identity(self) -> dict[str, Any]:
        """Values that must be equal for a run to be continued; the number of ranks can differ."""
        return {
            "content": self.content,
            "seed": self.seed,
            "samples_per_micro": self.samples_per_micro,
            "micro_batches_per_step": self.micro_batches_per_step,
            "row_length": self.row_length,
            "validation_fraction": self.validation_fraction,
            "limit_samples": self.limit_samples,
            "shuffle_window": self.shuffle_window,
            "balance": self.balance,
            # Another version of numpy could give another order with the same seed.
            "order": permutation(8, self.seed).tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.identity()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of other data, because its step number would stand for other conversations."""
        lines = differences(state_dict, self.identity(), "the checkpoint")
        if lines:
            raise ValueError(f"this checkpoint was trained on other data or in another order ({'; '.join(lines)})")


class _FromGlobalStep:
    """What Lightning iterates over: at each start, the steps from the trainer's global step on."""

    def __init__(self, data: StepData):
        self.data = data

    def __iter__(self) -> Iterator[TrainingStep]:
        start = self.data.trainer.global_step if self.data.trainer else 0
        return iter(self.data.steps(start))
