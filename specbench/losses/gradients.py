"""Gradients computed before the backward pass, and terms without gradient for some parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Known(torch.autograd.Function):
    """A value whose gradients were already computed: backward scales them in place and returns them, once."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, outer: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the objective's gradient was already taken; evaluate the objective again")
        if outer.device.type != "cpu" or outer.item() != 1.0:
            for gradient in gradients:
                gradient.mul_(outer)
        return None, None, *gradients


def without(term: Tensor, shared: Sequence[Tensor]) -> Tensor:
    """`term` with a gradient only for leaves that are not in `shared`.

    It trains a confidence head without changing backbone or Markov embedding.
    """
    known = {id(leaf) for leaf in shared}
    own = [leaf for leaf in leaves(term) if id(leaf) not in known]
    if not own:
        return term.detach()
    return Known.apply(term.detach(), list(torch.autograd.grad(term, own, retain_graph=True)), *own)


def leaves(value: Tensor) -> list[Tensor]:
    """The tensors at which the autograd graph of `value` ends."""
    found, seen, open_nodes = [], set(), [value.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        open_nodes.extend(parent for parent, _ in node.next_functions)
    return found
