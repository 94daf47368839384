"""Drafts that need no training, for the same decoding loop, records and clock as trained ones.

    NGram    prompt lookup: what followed the longest recent suffix when it last occurred (Saxena 2023)
    Oracle   the target's own greedy continuation: every slot is accepted at temperature 0, the upper row of a table

Both propose without probabilities: a one-hot law, which verification takes as such, so the output keeps the target's
law at every temperature. Their time is that of this implementation; the oracle's includes running the target.

Axes: B requests, S tokens, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from specbench.blocks import Context
from specbench.methods.draft import Proposal, Sample
from specbench.targets import Target, TargetState

BASELINES = ("ngram", "oracle")


class Baseline(nn.Module):
    """What the decoding loop asks of a draft beside begin, propose and commit."""

    halts_on_stop = False

    def __init__(self, block_size: int):
        super().__init__()
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: a block holds at least one slot")
        self.block_size = block_size


@dataclass
class Texts:
    """The tokens of every request so far, without its anchor."""

    rows: list[list[int]]

    def select(self, rows: Int[Tensor, " R"]) -> Texts:
        """The texts of the chosen rows."""
        return Texts([self.rows[r] for r in rows.tolist()])

    def merge(self, other: Texts) -> Texts:
        """Both states' texts."""
        return Texts(self.rows + other.rows)


def lookup(text: Sequence[int], count: int, longest: int) -> list[int]:
    """The `count` tokens that followed the latest earlier occurrence of the longest suffix (at most `longest` tokens).

    A continuation that reaches the end of the text goes on with what it has itself proposed; without any earlier
    occurrence the last token is repeated.

    >>> lookup([1, 2, 3, 9, 1, 2], 3, longest=3)
    [3, 9, 1]
    >>> lookup([7, 8, 7, 8], 3, longest=2)
    [7, 8, 7]
    """
    text = list(text)
    for size in range(min(longest, len(text) - 1), 0, -1):
        suffix = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == suffix:
                for k in range(count):
                    text.append(text[start + size + k])
                return text[-count:]
    return [text[-1]] * count


class NGram(Baseline):
    """Prompt lookup over the request's own prompt and answer."""

    def __init__(self, block_size: int = 7, longest: int = 3):
        super().__init__(block_size)
        if longest < 1:
            raise ValueError(f"longest={longest}: match at least one token")
        self.longest = longest

    def begin(self, context: Context, tokens: Int[Tensor, "B T"]) -> Texts:
        return self.commit(Texts([[] for _ in tokens]), context, tokens)

    def commit(self, state: Texts, context: Context, tokens: Int[Tensor, "B S"]) -> Texts:
        new = zip(state.rows, tokens.tolist(), context.lengths.tolist(), strict=True)
        return Texts([row + ids[:count] for row, ids, count in new])

    def propose(self, state: Texts, anchor: Int[Tensor, " B"], sample: Sample, slots: int | None = None) -> Proposal:
        count = self.block_size if slots is None else min(slots, self.block_size)
        pairs = zip(state.rows, anchor.tolist(), strict=True)
        found = [lookup([*row, first], count, self.longest) for row, first in pairs]
        return Proposal(torch.tensor(found, device=anchor.device), None, None)


class Oracle(Baseline):
    """The target as its own draft: a perfect one at temperature 0, the best deterministic one above."""

    def __init__(self, target: Target, block_size: int = 7):
        super().__init__(block_size)
        self._target = (target,)  # not a submodule: its parameters belong to no draft

    def begin(self, context: Context, tokens: Int[Tensor, "B T"]) -> TargetState:
        return self._target[0].prefill(tokens, context.lengths)[0]

    def commit(self, state: TargetState, context: Context, tokens: Int[Tensor, "B S"]) -> TargetState:
        self._target[0].extend(state, tokens)
        state.advance(context.lengths)
        return state

    def propose(
        self, state: TargetState, anchor: Int[Tensor, " B"], sample: Sample, slots: int | None = None
    ) -> Proposal:
        target, count = self._target[0], self.block_size if slots is None else min(slots, self.block_size)
        every = torch.arange(len(anchor), device=anchor.device)
        ahead, tokens = state.select(every), [anchor]
        for _ in range(count):
            states = target.extend(ahead, tokens[-1][:, None])
            ahead.advance(1)
            tokens.append(target.logits(states.last)[:, 0].argmax(-1))
        return Proposal(torch.stack(tokens[1:], 1), None, None)


def baseline(name: str, target: Target, block_size: int = 7) -> Baseline:
    """The baseline of a name in BASELINES."""
    if name not in BASELINES:
        raise ValueError(f"draft={name}: the baselines are {', '.join(BASELINES)}")
    return NGram(block_size) if name == "ngram" else Oracle(target, block_size)
