"""TargetCache: a target cache as a LightningDataModule whose every batch is one optimiser step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specbench.blocks import Batch, Sample, pack
from specbench.data.cache.cache_source import CacheSource
from specbench.data.cache.manifest import Manifest, require_same
from specbench.data.cache.remote_shards import RemoteFiles, StreamedFiles, is_command, is_remote
from specbench.data.cache.storage import storage
from specbench.data.loading.buffers import Recycler
from specbench.data.loading.order import ROWS, EpochPlan
from specbench.data.loading.reading import CacheReader, Damage, LocalFiles, ShardFiles, Stored
from specbench.data.loading.step_data import StepData
from specbench.data.loading.steps import EpochSteps, ReadAhead, TrainingStep, empty_batch
from specbench.data.loading.streaming import StreamPlan, StreamSteps, buffered, deal_shards
from specbench.files.redaction import redact
from specbench.models.embedding_head import Tables
from specbench.models.target import Target
from specbench.ranges import Count

__all__ = ["StepData", "TargetCache", "TrainingStep"]


class TargetCache(StepData):
    """Training data from a target cache, as a Lightning data module: every batch is one optimiser step.

    By default conversations are read by their offsets in the index, in an order over the whole cache. With `stream`
    a webdataset pipeline reads shards from beginning to end and writes nothing of them to the disk, for caches that are
    larger than it: conversations are shuffled within a buffer, `balance` has no effect, and a run can be resumed only
    with the same number of ranks and readers. Damage is detected in the same way, and samples are equal bit for bit.

    Args:
        folder: the cache: a folder, an fsspec URL (https://, s3://, hf://), or, with `stream`, pipe:COMMAND, where the
            command contains {name} in place of the name of a file and writes this file to its output.
        taps: layer ids to read, of those stored. None: all. []: none.
        needs_all_last: refuse a cache that contains final states only where tokens are supervised.
        expect: fields of the cache's identity (target, weights, tokenizer, max_length, ...) and their required values.
        validation_folder: a second cache, to validate on, instead of a held-out fraction.
        dtype: number format of the states, by name. None: that of the cache.
        on_damage: "raise", or "skip" to leave damaged samples out; `damage` lists them.
        local_folder: where files of a remote cache are kept: with `stream` manifest, index and tables (None: a
            temporary folder), otherwise also shards.
        local_bytes: maximum total size of the shards in `local_folder`.
        stream: read shards from beginning to end. Every rank needs at least one shard; `threads` is the number of
            readers of a rank.
        shuffle_buffer: conversations that a rank keeps in memory to shuffle, with `stream`.
        **order: samples_per_micro, micro_batches_per_step, row_length, seed, validation_fraction, limit_samples,
            shuffle_window, balance, threads, ahead, rank and world.

    Raises:
        ValueError: a setting that is impossible or does not go with another; a folder without a complete cache.
        CacheMismatch: a cache of another target, or one that differs from `expect`.
        DamagedShard: files that differ from what the manifest or the index says.
    """

    def __init__(
        self,
        folder: str | Path,
        taps: Sequence[int] | None = None,
        needs_all_last: bool = False,
        expect: Mapping[str, Any] | None = None,
        validation_folder: str | Path | None = None,
        dtype: str | None = None,
        on_damage: str = "raise",
        local_folder: str | Path | None = None,
        local_bytes: int = 64 << 30,
        stream: bool = False,
        shuffle_buffer: Count = 100,
        **order: Any,
    ):
        super().__init__(**order)
        if validation_folder is not None and self.validation_fraction:
            raise ValueError("validation_folder and validation_fraction are both set: choose one")
        self.folder, self.validation_folder = folder, validation_folder
        self._options = (None if taps is None else tuple(taps), dtype and getattr(torch, dtype), on_damage)
        self._needs_all_last, self._expect = needs_all_last, dict(expect or {})
        self._local_folder, self._local_bytes = local_folder, local_bytes
        self.stream, self.shuffle_buffer = stream, shuffle_buffer
        if stream and self.shuffle_window is not None:
            raise ValueError(
                f"shuffle_window={self.shuffle_window} orders reading by index; with stream=true set shuffle_buffer"
            )
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={shuffle_buffer}: hold at least 1 conversation")
        self._plan: StreamPlan | None = None

    def of_tokens(self) -> TargetCache:
        """The same cache, read from the same places, for its tokens and masks alone."""
        return TargetCache(
            self.folder,
            taps=[],
            on_damage=self._options[2],
            local_folder=self._local_folder,
            local_bytes=self._local_bytes,
            stream=self.stream,
        )

    @classmethod
    def build(
        cls,
        target: Target,
        answers: str | Path,
        folder: str | Path,
        *,
        codec: str = "bf16",
        max_length: int = 4096,
        thinking: bool | None = None,
        **order: Any,
    ) -> TargetCache:
        """Compute the states of answers into a folder and open it. An interrupted build is completed.

        Args:
            target: the target, loaded with the taps to be stored.
            answers: an answers.jsonl (docs/data.md) or its folder.
            folder: folder of the cache. If it has a complete cache with the same identity, this is opened.
            codec: number format of the stored states, a preset of docs/data.md: "bf16", "exact", "int8", "fp8",
                "smallest", ...
            max_length: maximum tokens of a conversation, which is cut there.
            thinking: passed to the chat template. None: not passed.
            **order: arguments of `TargetCache`.

        Returns:
            The opened cache.

        Raises:
            ValueError: the answers cannot be used.
            CacheMismatch: the folder has a cache of another target, other answers or another codec.
            NoRoom: the disk is full.
        """
        CacheSource.read(target, answers, storage(codec), max_length, thinking).build(folder)
        return cls(folder, **order)

    @cached_property
    def reader(self) -> CacheReader:
        """The opened cache; manifest, index, tables and the sizes of its shards are checked here."""
        reader = CacheReader(self._files(), *self._options)
        require_same(reader.manifest.identity, self._expect, self.folder, "build a cache for this run or name another")
        if self._needs_all_last and reader.storage.last_rows != "all":
            raise ValueError(
                f"{self.folder} keeps the final states of supervised tokens only, and this draft reads all: "
                "build the cache with last_rows=all"
            )
        return reader

    def _files(self) -> ShardFiles:
        if not is_remote(self.folder):
            return LocalFiles(self.folder)
        if self.stream:
            return StreamedFiles(str(self.folder), self._local_folder)
        if is_command(self.folder):
            raise ValueError(f"folder={redact(str(self.folder))}: a command needs stream=true")
        if self._local_folder is None:
            raise ValueError(
                f"folder={redact(str(self.folder))} is remote: name a local_folder for its shards, or set stream=true"
            )
        files = RemoteFiles(str(self.folder), self._local_folder, self._local_bytes)
        files.require_window(Manifest.read(files.folder).shards, self.shuffle_window)
        return files

    @cached_property
    def validation(self) -> TargetCache | None:
        """The module of `validation_folder`."""
        if self.validation_folder is None:
            return None
        taps, dtype, on_damage = self._options
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        other = TargetCache(
            self.validation_folder,
            taps=taps,
            needs_all_last=self._needs_all_last,
            expect=self._expect,
            dtype=name,
            on_damage=on_damage,
            samples_per_micro=self.samples_per_micro,
            micro_batches_per_step=self.world,
            row_length=self.row_length,
            threads=self._ahead.threads,
            ahead=self._ahead.ahead,
            rank=self.rank,
            world=self.world,
            stream=self.stream,
        )
        StepData.setup(other)  # it is read by index, so it need not have a shard for every rank
        if self.stream:
            other.reader.files.require_ranges()
        return other

    @property
    def ids(self) -> Sequence[str]:
        return self.reader.index.ids

    @cached_property
    def lengths(self) -> ROWS:
        return self.reader.index["length"].astype(np.int64)

    @cached_property
    def supervised(self) -> ROWS:
        return self.reader.index["supervised"].astype(np.int64)

    @cached_property
    def shards(self) -> ROWS:
        return self.reader.index["shard"].astype(np.int64)

    @property
    def content(self) -> str:
        return self.reader.manifest.index_hash

    @property
    def manifest(self) -> Manifest:
        """The manifest of the cache: fingerprint, configuration of the target, identity."""
        return self.reader.manifest

    @property
    def tables(self) -> Tables:
        """The target's frozen tables."""
        return self.reader.tables

    @property
    def target_name(self) -> str:
        return self.manifest.identity["target"]

    @property
    def target_config(self) -> dict[str, Any]:
        return self.manifest.target_config

    @property
    def lineage(self) -> dict[str, Any]:
        size = sum(shard["bytes"] for shard in self.manifest.shards)
        return {"fingerprint": self.manifest.fingerprint, "folder": str(self.folder), "bytes": size}

    @property
    def damage(self) -> list[Damage]:
        """Samples that were skipped so far."""
        return self.reader.damage

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.stream:
            self._require_stream()

    def _require_stream(self) -> None:
        """Refuse before step 0 what a stream cannot do."""
        trainer = self.trainer
        if trainer is not None and trainer.world_size != self.world:
            raise ValueError(f"world={self.world} of the data, and the Trainer has {trainer.world_size} ranks")
        counts = [sum(len(self._by_shard[shard]) for shard in own) for own in self._shards_of_ranks()]
        if len(self.rows[1]):
            self.reader.files.require_ranges()
        held = int(self.shuffle_buffer * self.reader.index["bytes"].mean())
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if held > memory:
            raise ValueError(
                f"shuffle_buffer={self.shuffle_buffer}: so many conversations fill {held >> 20} MiB, and this machine "
                f"has {memory >> 20} MiB of memory: choose fewer"
            )
        steps, full = self.steps_per_epoch, min(counts) // (self.samples_per_micro * self.micro_batches_per_rank)
        if steps - full > 1 + steps // 20:
            warnings.warn(
                f"the ranks of this stream have from {min(counts)} to {max(counts)} conversations, so from step {full} "
                f"of {steps} on some have nothing to train on: build the cache with more and smaller shards",
                stacklevel=2,
            )

    @property
    def micro_batches_per_rank(self) -> int:
        """Micro-batches of a step on one rank."""
        return self.micro_batches_per_step // self.world

    @cached_property
    def _by_shard(self) -> list[ROWS]:
        """Rows to train on of every shard, in the order in which they lie in it."""
        chosen = np.zeros(len(self.ids), bool)
        chosen[self.rows[0]] = True
        laid = np.lexsort((self.reader.index["offset"], self.shards))
        laid = laid[chosen[laid]]
        ends = np.searchsorted(self.shards[laid], np.arange(len(self.manifest.shards)), side="right")
        return np.split(laid, ends[:-1])

    def _shards_of_ranks(self) -> list[list[int]]:
        return deal_shards([len(rows) for rows in self._by_shard], self.world)

    @property
    def _readers(self) -> int:
        """Readers of a rank: the threads that were asked for, as far as every rank has shards for them."""
        return max(1, min(self._ahead.threads, *map(len, self._shards_of_ranks())))

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch. Those of a stream depend on the number of ranks."""
        return self.plan(0).steps if self.stream else super().steps_per_epoch

    def plan(self, epoch: int) -> EpochPlan | StreamPlan:
        """The micro-batches of an epoch."""
        if not self.stream:
            return super().plan(epoch)
        dealt = self._shards_of_ranks()
        if self._plan is None or (self._plan.epoch, self._plan.shards) != (epoch, dealt):
            readers = self._readers
            self._plan = StreamPlan(
                by_shard=self._by_shard,
                shards=dealt,
                seed=self.seed,
                epoch=epoch,
                readers=readers,
                buffer=-(-self.shuffle_buffer // readers),
                samples_per_micro=self.samples_per_micro,
                micro_batches=self.micro_batches_per_step,
            )
        return self._plan

    def steps(self, start: int = 0) -> EpochSteps:
        """The Steps from optimiser step `start` of the run to the end of its epoch."""
        if not self.stream:
            return super().steps(start)
        epoch, first = divmod(start, self.steps_per_epoch)
        return StreamSteps(
            self.plan(epoch),
            epoch,
            [self._packing],
            self.supervised,
            files=self.reader.files,
            reader=self.reader,
            memory=self._read,
            threads=self._ahead.threads,
            first=first,
            rank=self.rank,
            world=self.world,
        )

    @cached_property
    def _packing(self) -> ReadAhead:
        """The stage that decodes and packs what a stream has read for a micro-batch."""
        return ReadAhead(self._packed, self._ahead.threads, self._ahead.ahead)

    @cached_property
    def _read(self) -> Recycler:
        """Memory of what a stream has read and not yet decoded."""
        return Recycler()

    def _packed(self, stored: list[Stored]) -> Batch:
        if not stored:
            return self.empty()
        return pack(self.reader.decode(stored), self.row_length, self._memory.zeros)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued. The number of ranks may differ, unless they stream."""
        found = super().identity() | {"stream": None}
        if self.stream:
            order = {"ranks": self.world, "readers": self._readers, "shuffle_buffer": self.shuffle_buffer}
            # Another webdataset could shuffle otherwise under the same seed.
            found["stream"] = order | {"order": buffered(range(8), 4, self.seed)}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of other data or, as a stream's order depends on them, of other ranks or readers."""
        then, now = (_said(one.get("stream")) for one in (state_dict, self.identity()))
        if then != now:
            raise ValueError(
                f"this checkpoint was trained with stream={then} and this run has stream={now}: the "
                "step at which it stands would mean other conversations. Continue it with the same ranks, readers "
                "(threads) and shuffle_buffer; only a training by index may change its number of ranks"
            )
        super().load_state_dict(state_dict)

    def samples(self, rows: ROWS) -> list[Sample]:
        return [sample.clone() for sample in self.borrowed(rows)]

    def borrowed(self, rows: ROWS) -> list[Sample]:
        return self.reader.decode(self.reader.read(rows))

    def empty(self) -> Batch:
        return empty_batch(len(self.reader.taps), self.manifest.hidden_size, self.reader.dtype)

    def val_dataloader(self) -> EpochSteps | list:
        if self.validation is None:
            return super().val_dataloader()
        other = self.validation
        return other._epoch(
            EpochPlan(np.arange(len(other.lengths)), other.lengths, self.samples_per_micro, self.world, self.balance)
        )


def _said(order: dict[str, Any] | None) -> str:
    return (
        "false" if order is None else "true (" + ", ".join(f"{k} {v}" for k, v in order.items() if k != "order") + ")"
    )
