"""The states of a target for some conversations, as a cache stores them and OnlineTarget hands them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from specbench.blocks import Context
from specbench.data.cache.shards import EncodedConversation


def states_of(target: Any, conversations: Sequence[EncodedConversation]) -> Context:
    """Target states of some conversations in one right-padded batch."""
    lengths = torch.tensor([len(one.tokens) for one in conversations])
    tokens = torch.zeros(len(conversations), int(lengths.max()), dtype=torch.long)
    for row, one in zip(tokens, conversations, strict=True):
        row[: len(one.tokens)] = torch.as_tensor(one.tokens, dtype=torch.long)
    return target.states(tokens, lengths)
