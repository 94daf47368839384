"""Assignment of conversations to batches of the target and to shards.

A pure function of the conversations' lengths and two sizes; it does not depend on the number of ranks. So a shard is
the same for every rank that could write it, and a build that was killed continues with the missing shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from specbench.data.loading.order import permutation


@dataclass(frozen=True)
class Layout:
    """`shards[s]` lists the batches of shard s, each an array of conversation ordinals of nearly the same length."""

    shards: list[list[Int[np.ndarray, _]]]

    @property
    def samples(self) -> int:
        return sum(len(batch) for shard in self.shards for batch in shard)


def lay_out(lengths: Int[np.ndarray, " L"], batch_tokens: int, shard_tokens: int) -> Layout:
    """Batches of similar length with at most `batch_tokens` padded tokens (or one conversation), in a fixed random
    order, so that every shard has short and long ones; a shard is closed when it has `shard_tokens` tokens."""
    if batch_tokens < 1 or shard_tokens < 1:
        raise ValueError(f"batch_tokens={batch_tokens}, shard_tokens={shard_tokens}: both must be at least 1")
    batches: list[list[int]] = []
    for ordinal in np.argsort(-lengths, kind="stable"):
        # The first of a batch is its longest: all others are padded to it.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(int(ordinal))
        else:
            batches.append([int(ordinal)])
    shards: list[list[np.ndarray]] = []
    filled = shard_tokens
    for number in permutation(len(batches), 0):
        if filled >= shard_tokens:
            shards.append([])
            filled = 0
        shards[-1].append(np.array(batches[number], np.int64))
        filled += int(lengths[batches[number]].sum())
    return Layout(shards)
