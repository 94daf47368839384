"""Expansion: the child logits of the nodes of a draft's token tree, level by level.

A tree builder (specbench/decoding/trees.py) asks for the logits behind the anchor, chooses children, and asks for the
logits behind some of them, which are the nodes of the next level. A draft whose slots do not depend on each other
answers from one proposal; any other draft can be asked again for every path (`ExpansionByPath`), and a method that can
do better overrides `Draft.expand`.

Axes: B requests, M nodes of a level, K slots, W vocabulary of the draft.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

# (requests (R,), sample, slots) -> anything: propose `slots` tokens for some requests, drawn by `sample`.
Propose = Callable[[Tensor, Callable[[Tensor], tuple[Tensor, None]], int], Any]


@runtime_checkable
class Expansion(Protocol):
    """The child logits of one tree; an object serves one tree of each of B requests.

    `depth`: levels that the draft can give. `marginals` (B, K, W): logits of all slots if none depends on the tokens
    before it, otherwise None; known after `root`. Rows are tokens of the draft's vocabulary (`Draft.to_target`).
    """

    depth: int
    marginals: Float[Tensor, "B K W"] | None

    def root(self) -> Float[Tensor, "B 1 W"]:
        """Logits of the first level, the children of the anchor."""
        ...

    def below(self, rows: Int[Tensor, "B M"], parents: Int[Tensor, "B M"]) -> Float[Tensor, "B M W"]:
        """Logits of the children of M nodes, one level below those of the call before; `parents`: the place of each
        node's parent in that call (0 after `root`)."""
        ...


class ExpansionByPath:
    """Expansion by proposals whose tokens are given: for every draft that asks its `sample` for each slot.

    If a draft asks for all slots at once, no slot can depend on a token before it, and one proposal answers everything.
    Otherwise a level at depth d costs a proposal of d + 1 slots for each of its nodes.

    Raises:
        ValueError: the draft proposes without asking `sample`, so it has no distribution to branch on.
    """

    def __init__(self, propose: Propose, requests: int, depth: int, device: torch.device):
        self.propose, self.depth, self.marginals = propose, depth, None
        self.every = torch.arange(requests, device=device)
        self.paths = torch.zeros(requests, 1, 0, dtype=torch.long, device=device)

    def root(self) -> Float[Tensor, "B 1 W"]:
        asked = _Given(None)
        self.propose(self.every, asked, self.depth)
        if not asked.logits:
            raise ValueError("this draft proposes one chain without probabilities, so it has no tree: use tree=chain")
        if len(asked.logits) == 1:
            self.marginals = asked.logits[0]
        return asked.logits[0][:, :1]

    def below(self, rows: Int[Tensor, "B M"], parents: Int[Tensor, "B M"]) -> Float[Tensor, "B M W"]:
        inherited = self.paths.gather(1, parents[..., None].expand(-1, -1, self.paths.shape[2]))
        self.paths = torch.cat([inherited, rows[..., None]], 2)
        B, M, d = self.paths.shape
        if self.marginals is not None:
            return self.marginals[:, d : d + 1].expand(-1, M, -1)
        asked = _Given(self.paths.flatten(0, 1))
        self.propose(self.every.repeat_interleave(M), asked, d + 1)
        return asked.logits[d][:, 0].unflatten(0, (B, M))


class _Given:
    """A sample function that returns given tokens (R, d), then the most likely ones, and keeps the logits."""

    def __init__(self, tokens: Int[Tensor, "R d"] | None):
        self.tokens, self.logits = tokens, []

    def __call__(self, logits: Float[Tensor, "R S W"]) -> tuple[Int[Tensor, "R S"], None]:
        at = len(self.logits)
        self.logits.append(logits)
        if self.tokens is not None and at < self.tokens.shape[1]:
            return self.tokens[:, at : at + 1], None
        return logits.argmax(-1), None
