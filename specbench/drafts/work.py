"""Memory and operations of a draft's training view, computed from shapes only.

The vocabulary projection is left out: it is chunked and the same for every method. Operations are those of matrix
products, two for each multiply-add, of the forward pass; the backward pass takes twice as many.

Axes: T tokens, D hidden, M feed-forward, H query and G key-value heads, d head size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from specbench.blocks import Batch
from specbench.models.backbone import Backbone, Layer
from specbench.ranges import Number


@dataclass(frozen=True)
class Work:
    """`kept`: numbers that the forward pass keeps for the backward pass. `flops`: its floating-point operations."""

    kept: Number
    flops: Number

    def __add__(self, other: Work) -> Work:
        return Work(self.kept + other.kept, self.flops + other.flops)

    def __rmul__(self, times: Number) -> Work:
        return Work(times * self.kept, times * self.flops)


def of_forward(draft: nn.Module, batch: Batch) -> Work | None:
    """Memory and operations of `draft(batch)`, run on shapes without data; None for a forward pass that depends on
    values. `batch` and `draft` are not changed."""
    tensors = [*draft.parameters(), *draft.buffers(), *(t for one in draft.target_tables for t in one.buffers())]
    shapes: dict[int, Any] = {id(t): torch.empty_like(t, device="meta", requires_grad=t.requires_grad) for t in tensors}
    shapes |= {id(t): nn.Parameter(shapes[id(t)]) for t in tensors if isinstance(t, nn.Parameter) and t.requires_grad}
    empty, batch = copy.deepcopy(draft, shapes), batch.to(torch.device("meta"), torch.float32)
    given = {_storage(t) for t in (*empty.parameters(), *empty.buffers(), batch.taps, batch.last)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and _storage(tensor) not in given:
            kept[_storage(tensor)] = tensor
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), FlopCounterMode(display=False) as f:
            empty(batch)
    except (RuntimeError, TypeError):  # of operations that need values
        return None
    numbers = (one.untyped_storage().nbytes() // one.element_size() for one in kept.values())
    return Work(sum(numbers), f.get_total_flops())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def of_parameters(module: nn.Module, apart: Iterable[nn.Parameter] = ()) -> Work:
    """One use of every parameter except those in `apart`: a matrix keeps its input and output, a vector its factor and
    product, an embedding the row that was looked up."""
    skipped, kept, flops = {id(p) for p in apart}, 0, 0
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if id(parameter) in skipped:
                continue
            if isinstance(part, nn.Embedding):
                kept += parameter.shape[-1]
            elif parameter.dim() < 2:
                kept += 2 * parameter.numel()
            else:
                kept += parameter.shape[0] + parameter[0].numel()
                flops += 2 * parameter.numel()
    return Work(kept, flops)


def of_layer(layer: Layer, facts: Backbone, seen: Number) -> Work:
    """One query of a decoder layer that attends to `seen` keys. Attention keeps no matrix of scores."""
    attention = (2 * facts.heads + 2 * facts.kv_heads) * facts.head_dim
    kept = 6 * facts.hidden_size + 4 * facts.intermediate_size + 2 * attention
    return Work(kept, of_parameters(layer).flops + 4 * facts.heads * facts.head_dim * seen)


def of_context(layers: nn.ModuleList, facts: Backbone) -> Work:
    """One context position: the fused feature, and its keys and values in every layer."""
    pair = 2 * facts.kv_heads * facts.head_dim
    return Work(3 * facts.hidden_size + len(layers) * 2 * pair, sum(map(of_keys_values, layers)))


def of_keys_values(layer: Layer) -> int:
    """Operations of one position's keys and values; some families have no projection for values."""
    maps = (layer.self_attn.k_proj, layer.self_attn.v_proj)
    return sum(2 * one.weight.numel() for one in maps if one is not None)


def keys_seen(facts: Backbone, length: int, slots: int) -> Number:
    """Keys that a slot attends to on average: half of the conversation, at most the window, and its own block."""
    return min(length / 2, facts.window or length) + slots
