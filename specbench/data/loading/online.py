"""OnlineTarget: the same Steps without a cache. The target stays resident and its states are computed as they are read.

Axes: B batch rows, T tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specbench.blocks import Batch, Sample
from specbench.data.answers.generation import all_encoded
from specbench.data.cache.manifest import conversations_hash
from specbench.data.cache.shards import EncodedConversation
from specbench.data.cache.target_states import states_of
from specbench.data.loading.order import ROWS
from specbench.data.loading.step_data import StepData
from specbench.data.loading.steps import empty_batch
from specbench.models.embedding_head import Tables


class OnlineTarget(StepData):
    """Training data without a cache: the target stays in memory and computes the states when they are read.

    A Lightning data module. The conversations of a step and their order are those of a cache of the same conversations;
    states can differ by rounding, because batches have another shape.

    Args:
        target: the loaded target.
        conversations: encoded conversations, or the path of an answers.jsonl, which is encoded with the target's
            template.
        dtype: number format of the states, by name, as in a cache ("bfloat16" rounds as the bf16 cache does). None:
            that of the target.
        states_device: device of the states. None: that of the target.
        max_length: maximum tokens of a conversation, which is cut there. None: no limit.
        thinking: passed to the chat template. None: not passed.
        **order: samples_per_micro, micro_batches_per_step, row_length, seed, validation_fraction, limit_samples and the
            other arguments of `TargetCache` about steps and order.
    """

    def __init__(
        self,
        target: Any,
        conversations: Sequence[EncodedConversation] | str | Path,
        dtype: str | None = None,
        states_device: str | None = None,
        max_length: int | None = None,
        thinking: bool | None = None,
        **order: Any,
    ):
        super().__init__(**order)
        self._source = str(conversations) if isinstance(conversations, (str, Path)) else None
        if isinstance(conversations, (str, Path)):
            rows = len(target.tables.embedding)
            conversations, _ = all_encoded(conversations, target.tokenizer, max_length, thinking, rows)
        if not len(conversations):
            raise ValueError("conversations is empty: the answers stage has to run first")
        if self.shuffle_window is not None:
            raise ValueError(f"shuffle_window={self.shuffle_window}: without a cache there are no shards to shuffle by")
        self.target, self.conversations, self.states_device = target, conversations, states_device
        self._dtype = dtype and getattr(torch, dtype)
        self._lengths = np.array([len(one.tokens) for one in conversations], np.int64)
        self._supervised = np.array([int(np.sum(one.loss_mask)) for one in conversations], np.int64)
        self._content = conversations_hash(conversations)
        self._lock = threading.Lock()

    @property
    def ids(self) -> Sequence[str]:
        return [one.id for one in self.conversations]

    @property
    def lengths(self) -> ROWS:
        return self._lengths

    @property
    def supervised(self) -> ROWS:
        return self._supervised

    @property
    def shards(self) -> ROWS:
        return np.zeros(len(self.conversations), np.int64)

    @property
    def content(self) -> str:
        return self._content

    @property
    def tables(self) -> Tables:
        """The target's frozen tables."""
        return self.target.tables

    @property
    def target_name(self) -> str:
        return self.target.name

    @property
    def target_config(self) -> dict[str, Any]:
        return self.target.config

    @property
    def lineage(self) -> dict[str, Any]:
        return {"fingerprint": "online", "folder": self._source, "bytes": 0}

    def samples(self, rows: ROWS) -> list[Sample]:
        chosen = [self.conversations[row] for row in rows]
        with self._lock:  # the target captures one forward pass at a time
            context = states_of(self.target, chosen)
        taps = context.taps.to(self.states_device, self._dtype)
        last = context.last.to(self.states_device, self._dtype)
        found = []
        for at, (row, one) in enumerate(zip(rows, chosen, strict=True)):
            length = len(one.tokens)
            tokens = torch.as_tensor(one.tokens, dtype=torch.int32)
            loss_mask = torch.as_tensor(one.loss_mask, dtype=torch.bool)
            found.append(Sample(tokens, loss_mask, taps[at, :length], last[at, :length], int(row)))
        return found

    def empty(self) -> Batch:
        embedding = self.target.tables.embedding
        return empty_batch(len(self.target.target_layer_ids), embedding.shape[-1], self._dtype or embedding.dtype)
