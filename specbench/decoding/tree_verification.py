"""Verification of token trees, without models: two rules, both lossless, for two ways to make a tree.

    deterministic_tree  draw x from the target at the node; if a child holds x go there, else x is the next token.
                        Accepts with the target's mass on the children. For every tree that was made without the
                        target's draws. EAGLE's rule of zeroing and renormalising, with one-hot proposals, is this law.
    drawn_children      try the children in the order in which they were drawn from p without replacement: child i with
                        probability min(1, q_i / p_i); after a refusal q_{i+1} = norm(max(q_i - p_i, 0)) and p_{i+1} is
                        p_i without that child, normalised; when all are refused draw from the last q (SpecInfer, Miao
                        et al., arXiv 2305.09781; without replacement: Jeon et al., arXiv 2402.14160).

With one child a node, `drawn_children` is the rule of chains (verification.py). At temperature 0 both are
`deterministic_tree` of the target's most likely tokens. p is the draft's distribution and q the target's, under the
same sampling.

Axes: B requests, N nodes, L = N + 1 places (0 is the anchor), K levels, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specbench.decoding.sampling import draw
from specbench.decoding.trees import TokenTree

RULES = ("deterministic_tree", "drawn_children")


class Descent(NamedTuple):
    """The accepted path of each request: its places from the anchor down (0 beyond its end), the number of accepted
    nodes, and the next token."""

    path: Int[Tensor, "B P"]
    accepted: Int[Tensor, " B"]
    following: Int[Tensor, " B"]


def greedy(tree: TokenTree, target: Int[Tensor, "B L"]) -> Descent:
    """Temperature 0: follow the target's most likely tokens, as long as a child holds them."""
    return _follow(tree, lambda at, level: target.gather(1, at[:, None])[:, 0])


def deterministic_tree(tree: TokenTree, target: Float[Tensor, "B L V"], uniforms: Float[Tensor, "B P"]) -> Descent:
    """Follow tokens drawn from the target: P = K + 1 uniforms, one a level and one for the next token."""
    rows = torch.arange(len(target), device=target.device)
    return _follow(tree, lambda at, level: draw(target[rows, at], uniforms[:, level]))


def _follow(tree: TokenTree, chosen) -> Descent:
    at = torch.zeros_like(tree.tokens[:, 0])
    going, accepted, following, path = torch.ones_like(at, dtype=torch.bool), at, at, [at]
    for level in range(tree.levels + 1):
        token = chosen(at, level)
        matches = tree.real & (tree.parents == at[:, None]) & (tree.tokens == token[:, None])
        found = matches.any(1)
        following = torch.where(going, token, following)
        going = going & found
        at = torch.where(going, matches.int().argmax(1) + 1, at)
        accepted = accepted + going
        path.append(torch.where(going, at, 0))
    return Descent(torch.stack(path[:-1], 1), accepted, following)


def drawn_children(tree: TokenTree, target: Float[Tensor, "B L V"], uniforms: Float[Tensor, "B L"]) -> Descent:
    """Try drawn children by rejection: one uniform a node, the last for the next token."""
    rows = torch.arange(len(target), device=target.device)
    most = int(tree.rank.max()) + 1
    at = torch.zeros_like(tree.tokens[:, 0])
    going, accepted, path = torch.ones_like(at, dtype=torch.bool), at, [at]
    left = target[rows, at].double()
    for _ in range(tree.levels):
        q, p = target[rows, at].double(), tree.law[rows, at].double()
        here, went = at, torch.zeros_like(going)
        for rank in range(most):
            matches = tree.real & (tree.parents == here[:, None]) & (tree.rank == rank)
            node = matches.int().argmax(1)
            trying = going & ~went & matches.any(1)
            token = tree.tokens[rows, node]
            took = trying & (uniforms[rows, node].double() * p[rows, token] < q[rows, token])
            at, went = torch.where(took, node + 1, at), went | took
            refused = (trying & ~took)[:, None]
            residual = (q - p).clamp_min(0)
            # Rounding can leave nothing only where p equals q; a refusal then has probability zero.
            refused = refused & (residual.sum(-1, keepdim=True) > 0)
            q = torch.where(refused, _normalised(residual), q)
            p = torch.where(refused, _normalised(p.scatter(1, token[:, None], 0)), p)
        left = torch.where(went[:, None], target[rows, at].double(), torch.where(going[:, None], q, left))
        going = going & went
        accepted = accepted + going
        path.append(torch.where(going, at, 0))
    return Descent(torch.stack(path, 1), accepted, draw(left, uniforms[:, -1]))


def _normalised(weights: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
