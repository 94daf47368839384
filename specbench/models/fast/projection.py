"""The vocabulary projection of a draft or target, chunk by chunk, without making the same large tensors anew.

Left to autograd, every chunk would make a new [vocabulary x rank] weight gradient to be added up, and every product
would be mapped, zeroed and unmapped again. Linear layers that run inside `Linears` write their products into memory
kept between chunks and add their weight gradients straight into one sum; whatever else `project` does is left alone.

Axes: r rows of a chunk, F features, W vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function


class _Linear(torch.autograd.Function):
    """x weight^T with both conveniences; `index` names the weight's sum, None for a frozen weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, linears: Linears, index: int | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.linears, ctx.index = linears, index
        return linears.product(x, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _backward(ctx, gradient), None, None, None


class _AddLinear(torch.autograd.Function):
    """base += x weight^T with the weight gradient of _Linear."""

    @staticmethod
    def forward(ctx, base: Tensor, x: Tensor, weight: Tensor, linears: Linears, index: int | None) -> Tensor:
        ctx.mark_dirty(base)
        ctx.save_for_backward(x, weight)
        ctx.linears, ctx.index = linears, index
        return base.addmm_(x, weight.t())

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, _backward(ctx, gradient), None, None, None


def _backward(ctx, gradient: Tensor) -> Tensor | None:
    x, weight = ctx.saved_tensors
    if ctx.index is not None:
        ctx.linears.add_outer(ctx.index, gradient, x)
    return gradient @ weight if x.requires_grad else None


def add_linear_(base: Float[Tensor, "*r W"], x: Float[Tensor, "*r F"], weight: Float[Tensor, "W F"]) -> Tensor:
    """base + x weight^T, written into `base`: adds a bias of low rank without a second [rows x W] tensor."""
    if has_torch_function((base, x, weight)):
        return handle_torch_function(add_linear_, (base, x, weight), base, x, weight)
    return base.add_(F.linear(x, weight))


class Linears(TorchFunctionMode):
    """Catches the linear layers of one projection; `parameters` are those to differentiate, summed in at least fp32.

    `room` is the most rows that a chunk will have. Memory for them is asked for at once, because what is not written to
    costs nothing, while the pieces of a growing buffer stay with the process.
    """

    def __init__(self, parameters: Sequence[nn.Parameter] = ()):
        super().__init__()
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(self.parameters)
        self.memory: list[Tensor] = []
        self.room = 0
        self.calls = 0

    def __enter__(self) -> Linears:
        self.calls = 0
        super().__enter__()
        return self

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        base, operands, bias = None, args[:2], kwargs.get("bias")
        if func is add_linear_:
            base, operands = args[0], args[1:3]
        elif func is F.linear and len(args) >= 2:
            bias = args[2] if len(args) > 2 else bias
        else:
            return func(*args, **kwargs)
        x, weight = operands
        index = next((i for i, parameter in enumerate(self.parameters) if parameter is weight), None)
        learning = torch.is_grad_enabled()
        if not _plain(base, x, weight) or (learning and weight.requires_grad and index is None):
            return func(*args, **kwargs)
        learning = learning and (x.requires_grad or index is not None)
        if base is not None:
            if learning:
                return _AddLinear.apply(base, x, weight.detach(), self, index)
            return base.addmm_(x, weight.t())
        product = _Linear.apply(x, weight.detach(), self, index) if learning else self.product(x, weight)
        return product if bias is None else product.add_(bias)

    def product(self, x: Float[Tensor, "r F"], weight: Float[Tensor, "W F"]) -> Float[Tensor, "r W"]:
        """x weight^T; on CPU in memory that belongs to this call of a chunk and is written again in the next chunk."""
        if x.device.type != "cpu":
            return F.linear(x, weight)
        size, call = len(x) * len(weight), self.calls
        self.calls += 1
        if call == len(self.memory):
            self.memory.append(x.new_empty(0))
        if self.memory[call].numel() < size or self.memory[call].dtype != x.dtype:
            self.memory[call] = x.new_empty(max(size, self.room * len(weight)))
        # A tensor of its own over that memory: a view could not be written to in place under autograd.
        out = x.new_empty(0).set_(self.memory[call].untyped_storage(), 0, (len(x), len(weight)))
        return torch.mm(x, weight.t(), out=out)

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
            self.sums[index] = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).contiguous()
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


def _plain(base: Tensor | None, x: Tensor, weight: Tensor) -> bool:
    """Ordinary matrices of one dtype (no sharded parameters, no autocast, no extra axes)."""
    ordinary = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    alike = ordinary and x.dim() == 2 and x.dtype == weight.dtype == (x if base is None else base).dtype
    return alike and not torch.is_autocast_enabled(x.device.type)


class SharedLookups(TorchFunctionMode):
    """Within it, a repeated embedding lookup of the same tokens gives the first one's result.

    Features and confidence both read the Markov embedding; apart, each lookup would make a dense [vocabulary x rank]
    gradient of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        # Index and weight are kept with the result, so that nothing else can take their ids.
        self.known: dict[tuple, tuple[Tensor, int, Tensor, Tensor]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.embedding or len(args) != 2:
            return func(*args, **kwargs)
        key = (*map(id, args), *sorted(kwargs.items()), torch.is_grad_enabled())
        if key not in self.known or self.known[key][0]._version != self.known[key][1]:
            result = func(*args, **kwargs)
            self.known[key] = result, result._version, *args
        return self.known[key][0]


def return_memory(gradient: Tensor) -> None:
    """A hook that gives freed memory back to the system, where the C library can be asked to, before something large is
    made: what a CPU's backward pass has freed by then stays with the process in pieces too small for it."""
    if gradient.device.type == "cpu":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
