"""Products with frozen weights on a CPU, from weights in the order in which the processor reads them.

A product of a few rows is bound by reading the weights. The product behind `torch.nn.functional.linear` rearranges
them in each call of more than one row; oneDNN can keep them rearranged, as torch's own compiler does. Such a copy costs
the memory of the weights. Small weights stay in the processor's cache, and there the cost of the call decides.

Axes: R rows, n inputs, m outputs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import _is_torch_function_mode_enabled

from specbench import fast

# Weights of at most this many elements are read from the cache: 1024 x 256 takes 12 us of a row with mm and 25 packed,
# 960 x 576 takes 98 and 81 when it comes from memory.
SMALL = 2**18
# A table of more bytes is not copied.
LARGEST = 2**30
# Rows for which weights are arranged; others read the same arrangement.
ROWS = 8


class Product:
    """x -> x W^T + b for the present values of a weight (m, n) and a bias (m,), which are copied."""

    def __init__(self, weight: Float[Tensor, "m n"], bias: Float[Tensor, " m"] | None = None):
        self.outputs, self.bias = len(weight), bias
        self.packed = packs(weight)
        self.weight = arranged(weight) if self.packed else weight.t().contiguous()

    def __call__(self, x: Float[Tensor, "R n"]) -> Float[Tensor, "R m"]:
        if self.packed:
            return multiplied(x, self.weight, self.bias)
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def behind(self, x: Float[Tensor, "R n"], first: int) -> Float[Tensor, "R behind"]:
        """The outputs from `first` on. Arranged weights cannot be divided, so all outputs are computed."""
        if self.packed:
            return self(x)[:, first:]
        weight = self.weight[:, first:]
        return torch.mm(x, weight) if self.bias is None else torch.addmm(self.bias[first:], x, weight)

    def added(self, rows: Float[Tensor, "R m"], x: Float[Tensor, "R n"]) -> Float[Tensor, "R m"]:
        """rows + x W^T + b."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, rows, self.weight, self.bias, "add")
        return torch.addmm(rows if self.bias is None else rows + self.bias, x, self.weight)


class Kept:
    """F.linear(x, weight, bias) of a weight that its owner can change: arranged at the first decoding step that reads
    it, and anew when it has changed (changes through `Tensor.data`, which autograd does not count, go unseen).

    Only in inference mode, in which decoding runs; training, autocast, other devices and `specbench.fast.plain()` take
    F.linear. Copies and pickles of an owner leave the arranged weight out.
    """

    def __init__(self) -> None:
        self._seen: tuple[Any, ...] | None = None
        self._arranged: Tensor | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def weight(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """The arranged weight, or None where F.linear is to be taken."""
        if not (torch.is_inference_mode_enabled() and fast.enabled() and packs(weight) and x.dtype == weight.dtype):
            return None
        if torch.is_autocast_enabled("cpu") or weight.nbytes > LARGEST or _is_torch_function_mode_enabled():
            return None
        seen = (weight.data_ptr(), weight.shape, weight.dtype, version(weight))
        if seen != self._seen:
            self._seen, self._arranged = seen, arranged(weight)
        return self._arranged

    def __call__(self, x: Float[Tensor, "*b n"], weight: Float[Tensor, "m n"], bias: Tensor | None = None) -> Tensor:
        held = self.weight(x, weight)
        return F.linear(x, weight, bias) if held is None else multiplied(x, held, bias)

    def added(self, rows: Float[Tensor, "R m"], x: Float[Tensor, "R n"], weight: Float[Tensor, "m n"]) -> Tensor:
        """rows + x weight^T."""
        held = self.weight(x, weight)
        if held is None:
            return torch.addmm(rows, x, weight.t())
        return torch.ops.mkldnn._linear_pointwise.binary(x, rows, held, None, "add")


def packs(weight: Tensor) -> bool:
    """Whether the weight is one that a CPU reads faster when it is arranged."""
    return weight.device.type == "cpu" and weight.numel() > SMALL and _supported(weight.dtype)


def arranged(weight: Float[Tensor, "m n"]) -> Tensor:
    """A copy of the weight in oneDNN's order; only its own operations read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


def multiplied(x: Float[Tensor, "*b n"], weight: Tensor, bias: Tensor | None) -> Float[Tensor, "*b m"]:
    """x W^T + b for an arranged weight."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def version(weight: Tensor) -> int:
    """How often the weight was changed in place; 0 for one that does not count it."""
    return 0 if weight.is_inference() else weight._version


@functools.cache
def _supported(dtype: torch.dtype) -> bool:
    """Whether this build of torch has the operations and they give the product, tried on one of random numbers."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, rows, weight = (torch.randn(size, generator=generator) for size in ((3, 40), (3, 24), (24, 40)))
    x, rows, weight = x.to(dtype), rows.to(dtype), weight.to(dtype)
    expected, room = x.float() @ weight.float().t(), 1e-4 if dtype == torch.float32 else 0.2
    try:
        with torch.inference_mode():
            held = arranged(weight)
            ours = multiplied(x, held, None), torch.ops.mkldnn._linear_pointwise.binary(x, rows, held, None, "add")
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    pairs = (ours[0], expected), (ours[1], expected + rows.float())
    return all(bool(((found.float() - true).abs() <= room).all()) for found, true in pairs)
