"""TargetCache: a target cache as a LightningDataModule whose every batch is one optimiser step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specbench.blocks import Batch, Sample
from specbench.data.cache.cache_source import CacheSource
from specbench.data.cache.manifest import Manifest, require_same
from specbench.data.cache.remote_shards import RemoteFiles, is_remote
from specbench.data.cache.storage import storage
from specbench.data.loading.order import ROWS, EpochPlan
from specbench.data.loading.reading import CacheReader, Damage, LocalFiles, ShardFiles
from specbench.data.loading.step_data import StepData
from specbench.data.loading.steps import EpochSteps, TrainingStep, empty_batch
from specbench.models.embedding_head import Tables
from specbench.models.target import Target

__all__ = ["StepData", "TargetCache", "TrainingStep"]


class TargetCache(StepData):
    """Steps read from a target cache on disk or behind a URL; arguments beyond StepData's:

    folder: the cache, or its fsspec URL (https://, s3://, hf://); `local_folder` then mirrors it, with shards of
        at most `local_bytes` at a time.
    taps: layer ids to read, of those stored (None: all). [] reads no taps.
    needs_all_last: refuse a cache that kept `last` only where supervised.
    expect: fields of the cache's identity (target, weights, tokenizer, max_length, ...) that the run relies on.
    validation_folder: a cache to validate on, instead of a held-out fraction.
    dtype: of the states, by name; None takes the cache's own.
    on_damage: "raise", or "skip" to leave damaged samples out; `damage` lists them.
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
        **order: Any,
    ):
        super().__init__(**order)
        if validation_folder is not None and self.validation_fraction:
            raise ValueError("validation_folder and validation_fraction are both set: choose one")
        self.folder, self.validation_folder = folder, validation_folder
        self._options = (None if taps is None else tuple(taps), dtype and getattr(torch, dtype), on_damage)
        self._needs_all_last, self._expect = needs_all_last, dict(expect or {})
        self._local_folder, self._local_bytes = local_folder, local_bytes

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
        """Compute the states of `answers` (an answers.jsonl or its folder) into `folder`, and open them for training.

        codec: what the states are stored in (`specbench.data.cache.storage.PRESETS`). max_length: tokens at which a
        conversation is cut. thinking: passed to the chat template. order: arguments of TargetCache. A folder that is
        complete is opened, one that was interrupted is completed.

        Errors: ValueError for answers that cannot be used, CacheMismatch for a folder of another target, other answers
        or another codec, NoRoom on a full disk.
        """
        CacheSource.read(target, answers, storage(codec), max_length, thinking).build(folder)
        return cls(folder, **order)

    @cached_property
    def reader(self) -> CacheReader:
        """The opened cache; its papers and the sizes of its shards are checked here."""
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
        if self._local_folder is None:
            raise ValueError(f"folder={self.folder} is remote: name a local_folder for its shards")
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
        )
        other.setup()
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
        """The papers of the cache: fingerprint, target config, identity."""
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
