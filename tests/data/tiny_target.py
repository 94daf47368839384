"""A small causal target with the surface that the cache asks of one, for tests of the data rooms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from specbench.blocks import Context
from specbench.models.embedding_head import Tables


@dataclass(frozen=True)
class Talk:
    """A conversation."""

    id: str
    tokens: list[int]
    loss_mask: list[bool]
    source: str = "tests"


def talks(count: int, vocabulary: int = 50, longest: int = 24, seed: int = 0) -> list[Talk]:
    """Conversations of random tokens: a prompt, then a supervised answer."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(generator.integers(6, longest + 1))
        prompt = int(generator.integers(1, length - 3))
        tokens = generator.integers(0, vocabulary, length).tolist()
        made.append(Talk(f"talk-{number}", tokens, [at >= prompt for at in range(length)]))
    return made


class TinyTarget(nn.Module):
    """Three causal layers, a final norm and an untied head.

    Layers work element by element (a running mean over the past, shifted across channels), so padding and batch mates
    cannot change a single bit of a state.
    """

    def __init__(self, hidden: int = 16, vocabulary: int = 50, taps: tuple[int, ...] = (0, 1), seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(vocabulary, hidden, generator=generator)
        self.layers = [torch.randn(2, hidden, generator=generator) for _ in range(3)]
        self.norm = 1 + 0.1 * torch.randn(hidden, generator=generator)
        self.tables = Tables(self.embedding, torch.randn(vocabulary, hidden, generator=generator))
        self.name, self.revision, self.weights_hash = f"tiny-{hidden}", None, f"seed{seed}"
        self.target_layer_ids, self.tokenizer, self.config = taps, None, {"hidden_size": hidden}

    def states(self, tokens: Tensor, lengths: Tensor) -> Context:
        x = self.embedding[tokens]
        outputs = []
        for own, other in self.layers:
            past, rows = torch.zeros_like(x[:, 0]), []
            for token in x.unbind(1):
                rows.append(token + torch.tanh(own * token + other * past.roll(3, -1)))
                past = 0.5 * past + 0.5 * token
            x = torch.stack(rows, 1)
            outputs.append(x)
        last = x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.norm
        return Context(torch.stack([outputs[i] for i in self.target_layer_ids], 2), last, lengths)

    def logits(self, last: Tensor) -> Tensor:
        return self.tables.logits(last)

    def live_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        logits = self.states(tokens, lengths).last @ self.tables.head.T
        cap = self.tables.soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)
