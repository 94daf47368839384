"""Samples, batches and blocks: the data layout in which every draft is trained, scored and measured.

Axes: B batch rows, T tokens of a row, N blocks, K slots of a block, C taps, D hidden size.

INDEXING. The anchor is at position a. Slot k = 1..K predicts token a+k. Its `previous` token is a+k-1. The target state
that predicts token a+k is at position a+k-1. The context that a parallel block may read lies strictly before a.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PADDING = -1
Zeros = Callable[[Tensor, tuple[int, ...]], Tensor]
# Whether slot k of an anchor a is supervised. "predicted": by the loss mask of a+1..a+k, so a prefix.
# "unshifted" (released EAGLE-3 code): by the loss mask of a+k-2 only, for every state at a+k-1 in the conversation.
# This also supervises the token after the last one, and a block can begin with an unsupervised slot.
SUPERVISIONS = ("predicted", "unshifted")


@dataclass(frozen=True)
class Sample:
    """One conversation as stored in the cache. `ordinal`: its row in the cache index, from which its anchors are
    seeded."""

    tokens: Int[Tensor, " T"]
    loss_mask: Bool[Tensor, " T"]
    taps: Float[Tensor, "T C D"]
    last: Float[Tensor, "T D"]
    ordinal: int = 0

    def clone(self) -> Sample:
        """A copy in new memory."""
        states = {name: getattr(self, name).clone() for name in ("tokens", "loss_mask", "taps", "last")}
        return replace(self, **states)


@dataclass(frozen=True)
class Context:
    """Target states of `lengths[b]` consecutive tokens of row b; later positions are padding and must not be read."""

    taps: Float[Tensor, "B T C D"]
    last: Float[Tensor, "B T D"]
    lengths: Int[Tensor, " B"]


@dataclass(frozen=True)
class Batch:
    """Conversations in rows, padded (one per row) or packed (several per row).

    `document`: the sample ordinal of each token, -1 on padding. `position`: its index in its conversation. `anchors`:
    row indices in ascending order, -1 where a row has fewer than N. `seed`: what they were drawn with, for all other
    random choices of a training step (`generator`). `previous`: the token before each slot (None: the text's), or
    `policy`, an OnPolicy of specbench.drafts.on_policy that draws them in the forward pass.
    """

    tokens: Int[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]
    document: Int[Tensor, "B T"]
    position: Int[Tensor, "B T"]
    taps: Float[Tensor, "B T C D"]
    last: Float[Tensor, "B T D"]
    anchors: Int[Tensor, "B N"] | None = None
    seed: tuple[int, ...] = (0,)
    previous: Int[Tensor, "B N K"] | None = None
    policy: Any = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The batch on `device`, its states in `dtype`."""
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "loss_mask", "document", "position")}
        states = {name: getattr(self, name).to(device=device, dtype=dtype) for name in ("taps", "last")}
        anchors = None if self.anchors is None else self.anchors.to(device)
        return Batch(**moved, **states, anchors=anchors, seed=self.seed, previous=self.previous, policy=self.policy)


@dataclass(frozen=True)
class Blocks:
    """N blocks of K slots. `mask` says which are supervised: a prefix of every block (but see SUPERVISIONS).

    Blocks overlap, so slots can share a target state: those with the same number in `source` do (None: not known).
    `lookups` (projection.SharedLookups) holds embeddings of `previous` that the draft looked up already.
    """

    hidden: Float[Tensor, "B N K D"]
    target: Float[Tensor, "B N K D"]
    previous: Int[Tensor, "B N K"]
    labels: Int[Tensor, "B N K"]
    mask: Bool[Tensor, "B N K"]
    source: Int[Tensor, "B N K"] | None = None
    lookups: Any = None


# Sharding strategies search for tensors in the outputs of a module, to register hooks on their gradients.
torch.utils._pytree.register_dataclass(Blocks)


def pack(samples: Sequence[Sample], length: int | None = None, zeros: Zeros = Tensor.new_zeros) -> Batch:
    """Concatenate conversations into rows of at most `length` tokens (None: one conversation per row, padded).

    First-fit in the given order. Errors: ValueError for a conversation longer than `length`. `zeros(like, shape)`
    allocates the memory of the states.
    """
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in samples:
        size = len(sample.tokens)
        if length is not None and size > length:
            raise ValueError(f"sample {sample.ordinal} holds {size} tokens and does not fit a row of {length}")
        fits = next((r for r, left in enumerate(room) if left >= size), None) if length is not None else None
        if fits is None:
            rows.append([sample])
            room.append((length or size) - size)
        else:
            rows[fits].append(sample)
            room[fits] -= size
    return _lay(rows, zeros)


def _lay(rows: list[list[Sample]], zeros: Zeros) -> Batch:
    width = max(sum(len(s.tokens) for s in row) for row in rows)
    first = rows[0][0]
    shape = (len(rows), width)
    tokens = torch.zeros(shape, dtype=torch.long)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    document = torch.full(shape, PADDING, dtype=torch.long)
    position = torch.zeros(shape, dtype=torch.long)
    taps = zeros(first.taps, (*shape, *first.taps.shape[1:]))
    last = zeros(first.last, (*shape, first.last.shape[-1]))
    for b, row in enumerate(rows):
        start = 0
        for s in row:
            span = slice(start, start + len(s.tokens))
            tokens[b, span], loss_mask[b, span], document[b, span] = s.tokens.long(), s.loss_mask, s.ordinal
            position[b, span] = torch.arange(len(s.tokens))
            taps[b, span], last[b, span] = s.taps, s.last
            start = span.stop
    return Batch(tokens, loss_mask, document, position, taps, last)


def valid_anchors(batch: Batch, supervision: str = "predicted") -> Bool[Tensor, "B T"]:
    """Position a can be an anchor if it and the token after it are supervised and belong to one conversation.

    With "unshifted" supervision every position except the first of a conversation can be an anchor.
    """
    if supervision == "unshifted":
        return (batch.document != PADDING) & (batch.position > 0)
    valid = torch.zeros_like(batch.loss_mask)
    same = batch.document[:, :-1] == batch.document[:, 1:]
    valid[:, :-1] = batch.loss_mask[:, :-1] & batch.loss_mask[:, 1:] & same & (batch.document[:, :-1] != PADDING)
    return valid


def with_anchors(batch: Batch, count: int | None, seed: Sequence[int] = (0,), supervision: str = "predicted") -> Batch:
    """Choose up to `count` anchors per conversation, uniformly without replacement, sorted (None: every valid one).

    The anchors of a conversation depend only on `seed` and its ordinal, not on packing, batch size or the number of
    ranks.
    """
    valid, document = valid_anchors(batch, supervision).cpu(), batch.document.cpu()
    rows: list[list[int]] = []
    for b in range(len(valid)):
        chosen: list[int] = []
        candidates = valid[b].nonzero().flatten().numpy()
        owners = document[b].numpy()[candidates]
        for ordinal in dict.fromkeys(owners.tolist()):
            own = candidates[owners == ordinal]
            if count is not None and len(own) > count:
                own = np.sort(generator(seed, ordinal).choice(own, count, replace=False))
            chosen.extend(own.tolist())
        rows.append(chosen)
    width = max(1, max(map(len, rows)))
    padded = [row + [PADDING] * (width - len(row)) for row in rows]
    anchors = torch.tensor(padded, dtype=torch.long, device=batch.tokens.device)
    return replace(batch, anchors=anchors, seed=tuple(seed))


def generator(seed: Sequence[int], ordinal: int, *choice: int) -> np.random.Generator:
    """The random numbers of one conversation for one choice (none: its anchors), which depend on nothing else."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, ordinal, *choice])))


def take(values: Tensor, index: Int[Tensor, "B ..."]) -> Tensor:
    """Gather rows of `values` (B, T, ...) at `index` (B, ...) -> (B, ..., *values.shape[2:])."""
    batch = torch.arange(len(values), device=values.device).view(-1, *[1] * (index.dim() - 1))
    return values[batch, index]


def slot_positions(
    batch: Batch, slots: int
) -> tuple[Int[Tensor, "B N K"], Int[Tensor, "B N K"], Bool[Tensor, "B N K"]]:
    """Row indices a+k and a+k-1 of every slot, clamped into the row, and the default supervision (a prefix per
    block)."""
    assert batch.anchors is not None, "choose anchors with with_anchors() first"
    anchors = batch.anchors.clamp_min(0)
    raw = anchors[..., None] + torch.arange(1, slots + 1, device=anchors.device)
    index, before = (x.clamp_max(batch.tokens.shape[1] - 1) for x in (raw, raw - 1))
    same = take(batch.document, index) == take(batch.document, anchors)[..., None]
    usable = (raw == index) & same & take(batch.loss_mask, index) & (batch.anchors != PADDING)[..., None]
    return index, before, usable.cumprod(-1).bool()


def previous_tokens(batch: Batch, slots: int) -> Int[Tensor, "B N K"]:
    """The token before every slot: token a+k-1 of the text, unless the batch says otherwise."""
    return take(batch.tokens, slot_positions(batch, slots)[1]) if batch.previous is None else batch.previous


def unshifted_mask(batch: Batch, slots: int) -> Bool[Tensor, "B N K"]:
    """Supervision of the released EAGLE-3 code: slot k uses the loss mask of token a+k-2, if the state at a+k-1
    exists."""
    anchors = batch.anchors.clamp_min(0)
    raw = anchors[..., None] + torch.arange(slots, device=anchors.device)  # a+k-1
    state = raw.clamp_max(batch.tokens.shape[1] - 1)
    same = take(batch.document, state) == take(batch.document, anchors)[..., None]
    known = (raw == state) & same & (batch.anchors != PADDING)[..., None]
    return known & take(batch.loss_mask, (state - 1).clamp_min(0))


def assemble(batch: Batch, hidden: Float[Tensor, "B N K D"], supervision: str = "predicted") -> Blocks:
    """Combine a draft's hidden states with targets, labels and supervision (see INDEXING).

    With "unshifted" supervision the last slot of a conversation has a target but no label; its label must not be read.
    """
    index, before, mask = slot_positions(batch, hidden.shape[2])
    first = torch.arange(len(before), device=before.device)[:, None, None] * batch.tokens.shape[1]
    return Blocks(
        hidden=hidden,
        target=take(batch.last, before),
        previous=previous_tokens(batch, hidden.shape[2]),
        labels=take(batch.tokens, index),
        mask=unshifted_mask(batch, hidden.shape[2]) if supervision == "unshifted" else mask,
        source=first + before,
    )
