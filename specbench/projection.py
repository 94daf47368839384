"""A draft's vocabulary projection, chunk by chunk, with its gradient accumulated as it goes.

Autograd would make a new [vocabulary x rank] weight gradient for every chunk and then add it up. Linear layers on the
draft's `projection_parameters` add theirs straight into one accumulator instead; whatever else `project` does goes
through autograd as usual.

Axes: r rows of a chunk, F features, W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Linear(torch.autograd.Function):
    """x weight^T whose weight gradient goes into an accumulator instead of through autograd."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, sums: Accumulators, index: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sums, ctx.index = sums, index
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        ctx.sums.add_outer(ctx.index, gradient, x)
        return gradient @ weight if ctx.needs_input_grad[0] else None, None, None, None


class Accumulators(TorchFunctionMode):
    """One gradient sum a parameter, in at least fp32; as a context manager it catches their linear layers."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        super().__init__()
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and len(args) >= 2:
            x, weight = args[:2]
            index = next((i for i, parameter in enumerate(self.parameters) if parameter is weight), None)
            plain = type(x) is Tensor and x.dim() == 2 and x.dtype == weight.dtype
            if index is not None and plain and not torch.is_autocast_enabled(x.device.type):
                product = _Linear.apply(x, weight.detach(), self, index)
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                return product if bias is None else product + bias
        return func(*args, **kwargs)

    def add_outer(self, index: int, gradient: Float[Tensor, "r W"], x: Float[Tensor, "r F"]) -> None:
        """Add gradient^T x to the sum of one parameter."""
        held = self.sums[index]
        if held is None or gradient.dtype != held.dtype:
            self.add(index, gradient.t() @ x)
        else:
            held.addmm_(gradient.t(), x)

    def add(self, index: int, gradient: Tensor | None) -> None:
        """Add a whole gradient to the sum of one parameter."""
        if gradient is None:
            return
        held = self.sums[index]
        if held is None:
            self.sums[index] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        else:
            held += gradient

    def totals(self) -> list[Tensor]:
        """The gradients in the parameters' own dtype; zeros where nothing was read."""
        return [
            torch.zeros_like(parameter) if held is None else held.to(parameter.dtype)
            for parameter, held in zip(self.parameters, self.sums, strict=True)
        ]

    def back(self, features: Tensor, logits: Tensor, gradient: Float[Tensor, "r W"]) -> Float[Tensor, "r F"]:
        """Backward of one chunk: its features' gradient; the parameters' are added to the sums."""
        outer, *others = torch.autograd.grad(logits, [features, *self.parameters], gradient, allow_unused=True)
        for index, other in enumerate(others):
            self.add(index, other)
        return torch.zeros_like(features) if outer is None else outer


class Known(torch.autograd.Function):
    """A value whose gradients were already computed: backward scales them in place and hands them over, once."""

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


def only_own(term: Tensor, features: Tensor, shared: Sequence[nn.Parameter]) -> Tensor:
    """`term` with gradient into those parameters alone that neither `features` nor the projection reads.

    For a confidence head that is trained without pulling on backbone or Markov embedding.
    """
    leaves = [leaf for key, leaf in _leaves(term).items() if key not in _leaves(features) | {id(p): p for p in shared}]
    if not leaves:
        return term.detach()
    return Known.apply(term.detach(), list(torch.autograd.grad(term, leaves)), *leaves)


def _leaves(value: Tensor) -> dict[int, Tensor]:
    """The tensors at which the autograd graph of `value` ends."""
    found, seen, open_nodes = {}, set(), [value.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        open_nodes.extend(parent for parent, _ in node.next_functions)
    return found
