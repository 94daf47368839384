"""The size of a token tree, chosen by the scheduler of chains from the draft's own probabilities.

A node is accepted if its whole path is, so the expected number of accepted tokens of a tree is the sum over its nodes
of the probability of their paths. The draft predicts it by `joint`, the product of its probabilities along the path.
The nodes of a request in the order of decreasing joint probability therefore stand where a chain has its slots: the
first l of them are the best tree of l nodes, a parent always before its children, and node l adds its joint
probability as slot l adds its survival. So a scheduler (scheduling.py) that reads survivals alone chooses l for every
request as it does for chains.

LOSSLESS: the children are chosen and not drawn (rule deterministic_tree), so a tree, its joint probabilities and those
of the other requests are functions of texts that were committed before the round. No decision can depend on a draw of
the target in this round, and the rule holds for every such tree. Children that were drawn must all be kept, so the
rule drawn_children is refused.

Axes: B requests, N nodes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from specbench.decoding.scheduling import Scheduler, ratios
from specbench.decoding.trees import TokenTree


def check_pair(scheduler: Scheduler, tree_draws: bool) -> None:
    """Errors: ValueError for a scheduler without a meaning for nodes, or for trees whose children are drawn."""
    if scheduler.label == "fixed":
        return
    if not scheduler.orders_nodes:
        raise ValueError(
            f"scheduler={scheduler.label} reads the confidences of slots, and a tree has nodes: use fixed, "
            "cumulative_threshold, hardware_aware or delayed_global with a tree, or tree=chain"
        )
    if tree_draws:
        raise ValueError(
            f"scheduler={scheduler.label} leaves nodes out, and with rule=drawn_children all that were drawn must be "
            "kept, or the text loses the target's distribution; use rule=deterministic_tree or scheduler=fixed"
        )


def joint_log_probs(tree: TokenTree) -> Float[Tensor, "B N"]:
    """Log-probability of the path to each node, by the draft; -inf for padding."""
    joint = torch.zeros_like(tree.log_probs)
    for depth in range(1, tree.levels + 1):
        above = torch.cat([torch.zeros_like(joint[:, :1]), joint], 1).gather(1, tree.parents)
        joint = torch.where(tree.depth == depth, above + tree.log_probs, joint)
    return joint.masked_fill(~tree.real, -torch.inf)


def by_probability(tree: TokenTree) -> tuple[Int[Tensor, "B N"], Float[np.ndarray, "B N"]]:
    """The nodes in the order of decreasing joint probability (equal ones: as they stand), and these probabilities."""
    joint, order = joint_log_probs(tree).sort(dim=-1, descending=True, stable=True)
    return order, joint.double().exp().cpu().numpy()


def shortened(tree: TokenTree, scheduler: Scheduler, requests: Sequence[Hashable]) -> TokenTree:
    """The tree of each request with as many of its most probable nodes as the scheduler chooses; the row is as wide as
    the largest needs."""
    order, joint = by_probability(tree)
    lengths = scheduler.lengths(ratios(joint), tree.real.sum(-1).cpu().numpy(), requests)
    chosen = torch.arange(order.shape[1], device=order.device) < torch.from_numpy(lengths).to(order.device)[:, None]
    return kept(tree, torch.zeros_like(tree.real).scatter_(1, order, chosen))


def kept(tree: TokenTree, keep: Tensor) -> TokenTree:
    """The nodes `keep` (B, N) of each request, a parent with each of its children, in the order in which they stand."""
    keep = keep & tree.real
    width = max(int(keep.sum(-1).max()), 1)  # a row without nodes is one of padding
    front = (~keep).int().sort(dim=-1, stable=True).indices[:, :width]
    places = torch.cat([torch.zeros_like(front[:, :1]), keep.long().cumsum(-1)], 1)
    parents = places.gather(1, tree.parents)
    parts = (tree.tokens, parents, tree.depth, tree.rank, tree.log_probs, keep)
    tokens, parents, depth, rank, log_probs, real = (part.gather(1, front) for part in parts)
    parents = parents.masked_fill(~real, 0)
    return replace(
        tree, tokens=tokens, parents=parents, depth=depth, rank=rank, log_probs=log_probs, real=real, law=None
    )
