"""Conversations as padded rows of tokens, batched by length: every one starts at position 0 and attends to no other.

Axes: B conversations of a batch, T tokens of the longest one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class PaddedRows(NamedTuple):
    """Conversations of similar length, padded on the right; `weight` 0 on padding, `domain` an index into DOMAINS."""

    tokens: Int[Tensor, "B T"]
    weight: Float[Tensor, "B T"]
    domain: Int[Tensor, " B"]


class CorpusText(NamedTuple):
    tokens: list[int]
    supervised: list[int]
    domain: int


def batches(
    examples: Sequence[CorpusText], tokens: int, prompt_weight: float, order: random.Random | None
) -> Iterator[PaddedRows]:
    """One pass over `examples` in batches of at most `tokens` padded tokens (one conversation at the least).

    `order` shuffles the conversations, sorts pools of 2,000 by length and shuffles the batches; None keeps the order.
    """
    drawn = list(examples)
    if order is not None:
        order.shuffle(drawn)
    for start in range(0, len(drawn), 2000):
        pool = drawn[start : start + 2000]
        groups: list[list[CorpusText]] = [[]]
        for example in sorted(pool, key=lambda e: len(e.tokens)) if order is not None else pool:
            width = max(len(e.tokens) for e in [*groups[-1], example])
            if groups[-1] and width * (len(groups[-1]) + 1) > tokens:
                groups.append([])
            groups[-1].append(example)
        if order is not None:
            order.shuffle(groups)
        yield from (_pad(group, prompt_weight) for group in groups if group)


def _pad(group: Sequence[CorpusText], prompt_weight: float) -> PaddedRows:
    width = max(len(e.tokens) for e in group)
    tokens = torch.zeros(len(group), width, dtype=torch.long)
    weight = torch.zeros(len(group), width)
    for row, e in enumerate(group):
        tokens[row, : len(e.tokens)] = torch.tensor(e.tokens)
        weight[row, : len(e.tokens)] = torch.tensor(e.supervised).float().clamp_min(prompt_weight)
    return PaddedRows(tokens, weight, torch.tensor([e.domain for e in group]))


def unigram_loss(examples: Iterable[CorpusText]) -> float:
    """Nats per supervised token of the best model that ignores the context: a baseline for trained models."""
    counts: dict[int, int] = {}
    for e in examples:
        for token, supervised in zip(e.tokens, e.supervised, strict=True):
            if supervised:
                counts[token] = counts.get(token, 0) + 1
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())
