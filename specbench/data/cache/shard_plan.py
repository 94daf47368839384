"""Which conversation lies in which shard, and with which others it runs through the target.

A pure function of the conversations' lengths and two sizes; the number of ranks has no part in it. A shard is therefore
the same whoever writes it and whenever, and a build that was killed continues with the shards that are missing.
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
    order, so that every shard holds short and long ones; a shard is closed once it has `shard_tokens` tokens."""
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
