"""Branches: which of the tokens of one forward pass stand before which, if they form a tree and not a text.

A token sees the text before the tree, its ancestors and itself, and no token of another branch. Its position is that
of its depth: tokens of one depth, which continue the text in different ways, share one position.

Axes: B rows, S tokens of the tree (0 is its root), M the last of them, which are run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Branches:
    """Depths of S tokens behind a text (the root has 0), and which of them the last M see, themselves included."""

    depth: Int[Tensor, "B S"]
    seen: Bool[Tensor, "B M S"]

    @classmethod
    def of(cls, parents: Int[Tensor, "B S"], levels: int) -> Branches:
        """From the place of every token's parent (the root is its own), for trees of at most `levels` levels below the
        root."""
        S = parents.shape[1]
        own = torch.eye(S, dtype=torch.bool, device=parents.device).expand(len(parents), -1, -1)
        seen, at = own, parents[..., None].expand(-1, -1, S)
        for _ in range(levels):
            seen = own | seen.gather(1, at)
        return cls(seen.sum(-1) - 1, seen)
