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
from specbench.losses.row_pass import RowPass, SlotResults
from specbench.losses.terms import SlotWeight
from specbench.models.fast.projection import Linears

if TYPE_CHECKING:
    from specbench.drafts.draft import Draft
    from specbench.models.embedding_head import Tables

# Bytes of one [chunk x vocabulary] fp32 tensor; two or three are alive at once. Smaller chunks cost matrix products
# their efficiency: on a CPU core 448 rows of 151,936 took 3.9 s in chunks of 49, 3.2 s in chunks of 112, 2.6 s at once.
CHUNK_BYTES = {"cpu": 60 * 2**20, "cuda": 512 * 2**20}


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
        self.target_linears = Linears()
        self.rows = chunk_rows
        self.mask = blocks.mask.flatten(0, 1)
        self.target, self.labels = blocks.target[blocks.mask], blocks.labels[blocks.mask]
        # Slots that share a target state share its logits too; on the CPU, because chunk by chunk would synchronise.
        self.source = None if blocks.source is None else blocks.source[blocks.mask].cpu()
        slots = self.mask.shape[1]
        self.static = self.slot_weight.static(slots, self.mask.device).expand(self.mask.shape)[self.mask]
        if self.rows is None:
            vocabulary = tables.logits(self.target[:0]).shape[-1]
            self.rows = CHUNK_BYTES.get(self.mask.device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary)
        self.spans = list(_spans(self.mask.sum(-1).tolist(), self.rows))
        self.target_linears.room = min(self.rows, len(self.target))

    def __call__(self, row_pass: RowPass, linears: Linears, learning: bool = False) -> tuple[SlotResults, Tensor]:
        """Results of all rows, and if `learning` the gradient of the features (else empty)."""
        linears.room = self.target_linears.room
        parts = [self.chunk(row_pass, linears, learning, rows, blocks) for rows, blocks in self.spans]
        return SlotResults.join([rows for rows, _ in parts]), torch.cat([outer for _, outer in parts])

    def chunk(
        self, row_pass: RowPass, linears: Linears, learning: bool, rows: slice, blocks: slice
    ) -> tuple[SlotResults, Tensor]:
        """One chunk of whole blocks, forward and backward."""
        features = self.features[rows].detach().requires_grad_(learning)
        with torch.set_grad_enabled(learning), linears:
            logits = self.draft.project(features)
        states, of = self.distinct(rows)
        with self.target_linears:
            target = self.tables.logits(states)
        if not learning:
            return row_pass(logits, target, self.labels[rows], of=of), self.features[:0]
        # Written to in place: if something saved these logits for its backward, autograd refuses rather than errs.
        gradient = logits.detach().contiguous()
        if gradient.untyped_storage().data_ptr() == features.untyped_storage().data_ptr():
            gradient = gradient.clone()
        scale = torch.ones_like(self.static[rows]) if self.slot_weight.dynamic else self.static[rows]
        results = row_pass(gradient, target, self.labels[rows], scale, of)
        if self.slot_weight.dynamic:
            mask = self.mask[blocks]
            weight = self.slot_weight.weigh(mask, grid(results.probability, mask), grid(results.hit, mask))
            gradient.mul_(weight[mask][:, None])
        return results, linears.back(features, logits, gradient)

    def distinct(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """A copy of the distinct target states (u, D) of these rows, and which of them each row has."""
        if self.source is None:
            return self.target[rows].clone(), None
        numbers, of = self.source[rows].unique(return_inverse=True)
        first = torch.empty_like(numbers).scatter_(0, of, torch.arange(len(of)))
        return self.target[rows][first.to(self.target.device)], of.to(self.target.device)


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
