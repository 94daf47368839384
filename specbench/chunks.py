"""The way through a step's supervised slots, a chunk of whole blocks at a time, forward and backward.

Axes: M blocks, K slots, R supervised slots, D hidden, F features, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from specbench.blocks import Blocks
from specbench.losses import SlotWeight
from specbench.projection import Accumulators
from specbench.rowpass import RowPass, Rows

if TYPE_CHECKING:
    from specbench.methods.draft import Draft
    from specbench.tables import Tables

# Bytes of one [chunk x vocabulary] fp32 tensor. On CPU just under glibc's largest heap allocation (32 MiB): beyond it
# every such tensor would be mapped, zeroed page by page and unmapped anew.
CHUNK_BYTES = {"cpu": 31 * 2**20, "cuda": 512 * 2**20}


class Chunks:
    """The supervised slots of one step. `features` (R, F) are theirs, without gradient."""

    def __init__(
        self,
        draft: Draft,
        tables: Tables,
        blocks: Blocks,
        features: Tensor,
        slot_weight: SlotWeight,
        chunk_rows: int | None = None,
    ):
        self.draft, self.tables, self.features, self.slot_weight = draft, tables, features, slot_weight
        self.mask = blocks.mask.flatten(0, 1)
        self.target, self.labels = blocks.target[blocks.mask], blocks.labels[blocks.mask]
        slots = self.mask.shape[1]
        self.static = self.slot_weight.static(slots, self.mask.device).expand(self.mask.shape)[self.mask]
        rows = chunk_rows
        if rows is None:
            vocabulary = tables.logits(self.target[:0]).shape[-1]
            rows = CHUNK_BYTES.get(self.mask.device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary)
        self.spans = list(_spans(self.mask.sum(-1).tolist(), rows))

    def __call__(self, row_pass: RowPass, accumulators: Accumulators | None = None) -> tuple[Rows, Tensor]:
        """Results of all rows, and the gradient of the features (empty without accumulators)."""
        parts = [self.chunk(row_pass, accumulators, rows, blocks) for rows, blocks in self.spans]
        return Rows.join([rows for rows, _ in parts]), torch.cat([outer for _, outer in parts])

    def chunk(
        self, row_pass: RowPass, accumulators: Accumulators | None, rows: slice, blocks: slice
    ) -> tuple[Rows, Tensor]:
        """One chunk of whole blocks, forward and backward."""
        if accumulators is None:
            logits = self.draft.project(self.features[rows])
            return row_pass(logits, self.tables.logits(self.target[rows]), self.labels[rows]), self.features[:0]
        features = self.features[rows].detach().requires_grad_()
        with torch.enable_grad(), accumulators:
            logits = self.draft.project(features)
        # Written to in place: if something saved these logits for its backward, autograd refuses rather than errs.
        gradient = logits.detach().contiguous()
        if gradient.untyped_storage().data_ptr() == features.untyped_storage().data_ptr():
            gradient = gradient.clone()
        scale = torch.ones_like(self.static[rows]) if self.slot_weight.dynamic else self.static[rows]
        results = row_pass(gradient, self.tables.logits(self.target[rows]), self.labels[rows], scale)
        if self.slot_weight.dynamic:
            mask = self.mask[blocks]
            weight = self.slot_weight.weigh(mask, grid(results.probability, mask), grid(results.hit, mask))
            gradient.mul_(weight[mask][:, None])
        return results, accumulators.back(features, logits, gradient)


def _spans(lengths: list[int], rows: int) -> Iterator[tuple[slice, slice]]:
    """Consecutive chunks of whole blocks with at most `rows` supervised slots (one block at least): rows and blocks."""
    start = stop = first = 0
    for block, length in enumerate(lengths):
        if stop > start and length and stop + length - start > rows:
            yield slice(start, stop), slice(first, block)
            start, first = stop, block
        stop += length
    yield slice(start, stop), slice(first, len(lengths))


def grid(values: Shaped[Tensor, " R"], mask: Bool[Tensor, "M K"]) -> Shaped[Tensor, "M K"]:
    """Values of the supervised slots on the block grid, zero elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
