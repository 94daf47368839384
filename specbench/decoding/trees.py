"""Token trees: what a draft proposes to be verified in one forward pass, and the builders of such trees.

    static_tree       one shape for every round, a node a (depth, ranks) path      Medusa, Cai et al., arXiv 2401.10774
    dynamic_tree      expand the most probable nodes of each level, keep the best  EAGLE-2, Li et al., arXiv 2406.16858
    best_first_tree   the most probable nodes of all                               DDTree (liranringel/ddtree)
    shared_tree       the same with one list of candidates a depth                 JetSpec (hao-ai-lab/JetSpec)

Builders are pure functions of an Expansion (specbench/drafts/expansion.py) and a function that chooses children:
`most_likely`, or `drawn`, which draws them without replacement. Probable means the product of the draft's own
probabilities along the path, at temperature 1 for children that are chosen and under the sampling for those that are
drawn.

WHICH RULES FIT. The rule `deterministic_tree` (tree_verification.py) holds for any tree that was made without the
target's draws. The rule `drawn_children` needs children that were drawn, all of them: a node that is left out after it
was drawn, because of the token that it holds, changes the distribution of the rest. So a builder for drawn children
decides how many children a node gets before it draws them, and never removes one.

Axes: B requests, N nodes (without the anchor), L = N + 1 places (0 is the anchor, node n at n + 1), M nodes of a level,
C children, K depths, V vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specbench.decoding.sampling import Sampler, draw, warp
from specbench.drafts.draft import Proposal
from specbench.drafts.expansion import Expansion
from specbench.models.branches import Branches

Path = tuple[int, ...]  # the rank of each node from the first level down to a node


@dataclass(frozen=True)
class TokenTree:
    """A tree of proposed tokens a request; parents stand before their children, siblings have different tokens.

    `parents`: places of the parents. `depth`: from 1. `rank`: from 0, in the order of the siblings. `log_probs`: of the
    token among its siblings, by the draft. `real`: False for padding, which may stand anywhere and has no children.
    `law` (None: children are not drawn): the distribution from which the children of each place were drawn.
    """

    tokens: Int[Tensor, "B N"]
    parents: Int[Tensor, "B N"]
    depth: Int[Tensor, "B N"]
    rank: Int[Tensor, "B N"]
    log_probs: Float[Tensor, "B N"]
    real: Bool[Tensor, "B N"]
    levels: int
    law: Float[Tensor, "B L V"] | None = None

    @classmethod
    def chain(cls, proposal: Proposal) -> TokenTree:
        """A proposal of K slots as the tree without branches."""
        tokens, p = proposal.tokens, proposal.probabilities
        (B, K), places = tokens.shape, torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        log_probs, law = tokens.new_zeros(B, K, dtype=torch.float32), None
        if p is not None:
            log_probs = p.gather(-1, tokens[..., None])[..., 0].log()
            law = torch.cat([p, p.new_zeros(B, 1, p.shape[-1])], 1)
        real = torch.ones_like(tokens, dtype=torch.bool)
        return cls(tokens, places, places + 1, torch.zeros_like(tokens), log_probs, real, K, law)

    def branches(self) -> Branches:
        """Depths and ancestors of the anchor and all nodes, for one forward pass of the target."""
        root = torch.zeros_like(self.parents[:, :1])
        return Branches.of(torch.cat([root, self.parents], 1), self.levels)


class Children(NamedTuple):
    """C children of each of M nodes, as rows of the draft's vocabulary; `real` is False where there is none."""

    rows: Int[Tensor, "B M C"]
    log_probs: Float[Tensor, "B M C"]
    real: Bool[Tensor, "B M C"]
    law: Float[Tensor, "B M W"] | None


Choose = Callable[[Float[Tensor, "B M W"], int], Children]


def most_likely(logits: Float[Tensor, "B M W"], count: int) -> Children:
    """The `count` most likely children, the most likely first."""
    log_probs, rows = logits.float().log_softmax(-1).topk(min(count, logits.shape[-1]), -1)
    return Children(rows, log_probs, log_probs > -torch.inf, None)


def drawn(sampler: Sampler) -> Choose:
    """Children drawn without replacement under the sampling of `sampler`, in the order of the draws.

    Child i is drawn from the distribution without the children before it, normalised. Every request takes M * C
    uniforms, whatever its neighbours do. A node has fewer children where top-k or top-p leave fewer tokens.
    """

    def choose(logits: Float[Tensor, "B M W"], count: int) -> Children:
        B, M, W = logits.shape
        law, count = warp(logits, sampler.sampling), min(count, W)
        uniforms = sampler.uniforms(M * count, logits.device).view(B, M, count)
        left, rows, real = law.clone(), [], []
        for i in range(count):
            real.append(left.sum(-1) > 0)
            rows.append(draw(left, uniforms[..., i]))
            left.scatter_(-1, rows[-1][..., None], 0)
        chosen = torch.stack(rows, -1)
        return Children(chosen, law.gather(-1, chosen).log(), torch.stack(real, -1), law)

    return choose


class _Growth:
    """A tree as it grows, level by level: its nodes, and the laws of the places whose children were drawn."""

    def __init__(self, expansion: Expansion, choose: Choose, logits: Float[Tensor, "B 1 W"], count: int):
        self.expansion, self.choose = expansion, choose
        self.levels: list[_Level] = []
        self.laws: list[tuple[Tensor, Tensor]] = []
        root = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
        self._add(choose(logits, count), root, torch.zeros_like(root, dtype=torch.float32))

    def expand(
        self,
        which: Int[Tensor, "B M"],
        count: int,
        alive: Bool[Tensor, "B M"] | None = None,
        keep: int | None = None,
    ) -> None:
        """Add `count` children of each of the nodes `which` of the last level, or of those that are `alive`; `keep`:
        only the most probable ones of the new level."""
        last = self.levels[-1]
        logits = self.expansion.below(last.rows.gather(1, which), last.asked.gather(1, which))
        joint = last.joint.gather(1, which)
        joint = joint if alive is None else joint.masked_fill(~alive, -torch.inf)
        self._add(self.choose(logits, count), self.places - last.rows.shape[1] + which, joint, keep)

    def _add(self, children: Children, places: Tensor, joint: Tensor, keep: int | None = None) -> None:
        B, M, C = children.rows.shape
        together = (joint[..., None] + children.log_probs).masked_fill(~children.real, -torch.inf)
        asked = torch.arange(M, device=places.device)[:, None].expand(B, M, C)
        rank = torch.arange(C, device=places.device).expand(B, M, C)
        parents = places[..., None].expand(B, M, C)
        parts = (children.rows, parents, rank, asked, children.log_probs, together)
        level = _Level(*(part.flatten(1) for part in parts))
        if keep is not None and keep < M * C:
            kept = most_probable(level.joint, keep)
            level = _Level(*(part.gather(1, kept) for part in level))
        self.levels.append(level)
        if children.law is not None:
            self.laws.append((places, children.law))

    @property
    def places(self) -> int:
        """Places taken so far, the anchor's included."""
        return 1 + sum(level.rows.shape[1] for level in self.levels)

    def tree(self, budget: int | None = None) -> TokenTree:
        """All nodes, or the `budget` most probable ones of each request."""
        found = _Level(*(torch.cat(parts, 1) for parts in zip(*self.levels, strict=True)))
        sizes = [level.rows.shape[1] for level in self.levels]
        depth = torch.repeat_interleave(torch.arange(1, len(sizes) + 1), torch.tensor(sizes))
        depth = depth.to(found.rows.device).expand(found.rows.shape)
        if budget is not None and budget < sum(sizes):
            kept = most_probable(found.joint, budget)
            new = torch.zeros(len(kept), self.places, dtype=torch.long, device=kept.device)
            new.scatter_(1, kept + 1, torch.arange(1, budget + 1, device=kept.device).expand_as(kept))
            found, depth = _Level(*(part.gather(1, kept) for part in found)), depth.gather(1, kept)
            found = found._replace(parents=new.gather(1, found.parents))
        real = found.joint > -torch.inf
        law = None
        if self.laws:
            law = self.laws[0][1].new_zeros(len(real), self.places, self.laws[0][1].shape[-1])
            for places, own in self.laws:
                law.scatter_(1, places[..., None].expand_as(own), own)
        parents = found.parents.masked_fill(~real, 0)
        return TokenTree(found.rows, parents, depth, found.rank, found.log_probs, real, len(sizes), law)


class _Level(NamedTuple):
    """The nodes of one level; `asked`: where a node's parent stood in the call that gave its logits; `joint`: sum of
    the log-probabilities along its path, -inf where there is no node."""

    rows: Int[Tensor, "B M"]
    parents: Int[Tensor, "B M"]
    rank: Int[Tensor, "B M"]
    asked: Int[Tensor, "B M"]
    log_probs: Float[Tensor, "B M"]
    joint: Float[Tensor, "B M"]


def most_probable(joint: Float[Tensor, "B N"], count: int) -> Int[Tensor, "B n"]:
    """The `count` most probable nodes of each request, in the order of their places; of equal ones the first.

    No node is more probable than its parent, which stands before it, so the parents of these are among them.
    """
    return joint.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values


@dataclass(frozen=True)
class Shape:
    """A tree as the ranks along each path: levels of (parent in the level before, rank among its siblings)."""

    levels: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, paths: Sequence[Sequence[int]]) -> Shape:
        """From the paths of all nodes, for example [[0], [1], [0, 0]]: two children of the anchor, and one child of the
        first. Errors: ValueError for a path without its parent, with a gap before it, or given twice."""
        known: dict[Path, int] = {(): 0}
        levels: list[list[tuple[int, int]]] = []
        for path in sorted((tuple(path) for path in paths), key=lambda path: (len(path), path)):
            if path in known:
                raise ValueError(f"the path {list(path)} is given twice" if path else "a path holds at least one rank")
            needed = path[:-1] if path[-1] == 0 else (*path[:-1], path[-1] - 1)
            if path[-1] < 0 or needed not in known:
                raise ValueError(
                    f"the path {list(path)} needs {list(needed)}: give every node's parent, and ranks without gaps"
                )
            while len(levels) < len(path):
                levels.append([])
            levels[len(path) - 1].append((known[path[:-1]], path[-1]))
            known[path] = len(levels[len(path) - 1]) - 1
        if not levels:
            raise ValueError("paths=[]: a tree has at least one node")
        return cls(tuple(map(tuple, levels)))

    @property
    def nodes(self) -> int:
        return sum(map(len, self.levels))


def static_tree(expansion: Expansion, choose: Choose, shape: Shape) -> TokenTree:
    """The tree of `shape`, as deep as the draft can give: the node of rank r holds its parent's child r."""
    growth: _Growth | None = None
    for level in shape.levels[: expansion.depth]:
        count = 1 + max(rank for _, rank in level)
        inner = sorted({parent for parent, _ in level})
        if growth is None:
            growth = _Growth(expansion, choose, expansion.root(), count)
        else:
            which = torch.tensor(inner, device=growth.levels[-1].rows.device).expand(len(growth.levels[-1].rows), -1)
            growth.expand(which, count)
        found = growth.levels[-1]
        width = found.rows.shape[1] // len(inner)  # fewer than `count` in a vocabulary that is smaller
        at = [inner.index(parent) * width + rank if rank < width else None for parent, rank in level]
        picked = torch.tensor([0 if place is None else place for place in at], device=found.rows.device)
        missing = torch.tensor([place is None for place in at], device=found.rows.device)
        found = _Level(*(part[:, picked] for part in found))
        growth.levels[-1] = found._replace(joint=found.joint.masked_fill(missing, -torch.inf))
    return growth.tree()


def dynamic_tree(
    expansion: Expansion, choose: Choose, width: int, depth: int, budget: int, prune: bool = True
) -> TokenTree:
    """EAGLE-2's tree: in each level the `width` most probable nodes get `width` children each; the `budget` most
    probable nodes of all are kept.

    Without `prune` no node is removed, so the children may be drawn: a level expands as many nodes as the budget
    leaves room for.
    """
    width = min(width, budget)  # of more children none beyond the budget could be kept
    growth = _Growth(expansion, choose, expansion.root(), width)
    for _ in range(1, min(depth, expansion.depth)):
        joint = growth.levels[-1].joint
        count = min(width, joint.shape[1])
        if not prune:
            count = min(count, (budget - growth.places + 1) // width)
        if count < 1:
            break
        growth.expand(most_probable(joint, count), width)
    return growth.tree(budget if prune else None)


def best_first_tree(expansion: Expansion, budget: int, depth: int, width: int | None = None) -> TokenTree:
    """The tree of the `budget` most probable nodes of all that are at most `depth` levels deep, exactly.

    If slots are independent, best first over their marginals gives it. Otherwise it grows level by level: a node whose
    parent is not among the `budget` most probable nodes found so far cannot be among those of all. `width`: the most
    children of a node (None: no limit).
    """
    width = budget if width is None else min(width, budget)
    depth, logits = min(depth, expansion.depth), expansion.root()
    if expansion.marginals is not None:
        return best_first(expansion.marginals[:, :depth], budget, width)
    growth = _Growth(expansion, most_likely, logits, width)
    for _ in range(1, depth):
        joint = torch.cat([level.joint for level in growth.levels], 1)
        last = growth.levels[-1].joint.shape[1]
        inside = torch.zeros_like(joint, dtype=torch.bool).scatter_(1, most_probable(joint, budget), True)
        inside = (inside & (joint > -torch.inf))[:, -last:]
        count = int(inside.sum(-1).max())
        if count == 0:
            break
        which = inside.int().sort(dim=-1, descending=True, stable=True).indices[:, :count]
        growth.expand(which, width, inside.gather(1, which), keep=budget)
    # Whatever the other requests' trees are: rounds of a request take the same uniforms beside any neighbour.
    return replace(growth.tree(budget), levels=depth)


def shared_tree(expansion: Expansion, width: int, depth: int, budget: int) -> TokenTree:
    """JetSpec's tree: every node of a depth has the same `width` candidates as children; the `budget` most probable
    paths are kept, by the sum of their log-probabilities.

    The candidates are the most likely tokens of the slot. A draft whose slots depend on each other is asked along its
    most likely chain.
    """
    depth, logits = min(depth, expansion.depth), expansion.root()
    if expansion.marginals is not None:
        return best_first(expansion.marginals[:, :depth], budget, width)
    chain, parents = [logits], torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
    for _ in range(1, depth):
        chain.append(expansion.below(chain[-1].argmax(-1), parents))
    return best_first(torch.cat(chain, 1), budget, width)


def best_first(logits: Float[Tensor, "B K W"], budget: int, width: int) -> TokenTree:
    """The `budget` most probable nodes over independent slots, of which each has its `width` most likely tokens."""
    width = min(width, logits.shape[-1])
    log_probs, rows = logits.float().log_softmax(-1).topk(width, -1)
    B, N, device = len(rows), budget, rows.device
    parts = {name: np.zeros((B, N), np.int64) for name in ("parents", "depth", "rank")}
    real = np.zeros((B, N), bool)
    for b, own in enumerate(log_probs.double().cpu().numpy()):
        paths = best_paths(own, budget)
        place = {(): 0} | {path: n + 1 for n, path in enumerate(sorted(paths, key=len))}
        for path, n in place.items():
            if n:
                parts["parents"][b, n - 1], parts["depth"][b, n - 1] = place[path[:-1]], len(path)
                parts["rank"][b, n - 1], real[b, n - 1] = path[-1], True
    parents, depth, rank = (torch.from_numpy(parts[name]).to(device) for name in ("parents", "depth", "rank"))
    slot = (depth - 1).clamp_min(0)
    every = torch.arange(B, device=device)[:, None]
    tree = rows[every, slot, rank], parents, depth, rank, log_probs[every, slot, rank]
    return TokenTree(*tree, torch.from_numpy(real).to(device), logits.shape[1])


def best_paths(log_probs: Float[np.ndarray, "K C"], budget: int) -> list[Path]:
    """The `budget` paths of ranks with the largest sums, over K slots with C candidates each, in descending order.

    A path's successors are its next sibling and its first child: neither is more probable, and every path is the
    successor of one other, so a heap of them gives all paths in order.
    """
    depth, width = log_probs.shape
    heap = [(-log_probs[0, 0], (0,), 0.0)] if depth and width else []
    found: list[Path] = []
    while heap and len(found) < budget:
        negative, path, above = heapq.heappop(heap)
        if negative == np.inf:
            break
        found.append(path)
        level = len(path) - 1
        if path[-1] + 1 < width:
            heapq.heappush(heap, (-(above + log_probs[level, path[-1] + 1]), (*path[:-1], path[-1] + 1), above))
        if len(path) < depth:
            heapq.heappush(heap, (-(-negative + log_probs[len(path), 0]), (*path, 0), -negative))
    return found
