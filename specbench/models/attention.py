"""Attention of blocks over a shared context and over themselves: one definition of the mask, three implementations.

The attention of every draft has the same form: Q queries in each of N blocks attend to T context keys (those of their
conversation before the anchor, and inside the sliding window if there is one) and to S keys of their own block.
`sees_context` and `sees_own` define the mask; `attend` evaluates it densely, `attend_spans` conversation by
conversation, and `attend_flex` compiles it into a FlexAttention block mask on CUDA.

THE WINDOW. With a window w, a query at position p attends only to keys at positions above p - w, in the context and in
its own block, so if w is smaller than the block a late slot reads neither the anchor nor any context. The window limits
how far back a query attends; it does not limit later slots of its block. `KVCache.visible` applies the same rule in
decoding.

Axes: B batch, N blocks, Q queries of a block, T context keys, S own keys, H query and G key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Visibility:
    """The attention mask as tensors on the device of the keys.

    `limit` (B, N): context keys with a row index below it are visible. `document` (B, T) and `owner` (B, N): a key is
    visible only to blocks of its own conversation (None: one conversation per row). `query_position` (B, N, Q) and
    `key_position` (B, T) with `window`: a key further back than `window` - 1 positions is not visible. Own keys have
    consecutive positions, as queries do; query 0 is `ahead` positions after own key 0.
    """

    limit: Int[Tensor, "B N"]
    document: Int[Tensor, "B T"] | None = None
    owner: Int[Tensor, "B N"] | None = None
    query_position: Int[Tensor, "B N Q"] | None = None
    key_position: Int[Tensor, "B T"] | None = None
    window: int | None = None
    causal_own: bool = False
    ahead: int = 0

    # FlexAttention traces the predicates, and a type checker's wrapper around them cannot be traced.
    @no_type_check
    def sees_context(self, b: Tensor, n: Tensor, q: Tensor, t: Tensor) -> Tensor:
        """Whether query q of block n attends to context key t; the arguments are index tensors that broadcast."""
        seen = t < self.limit[b, n]
        if self.document is not None:
            seen = seen & (self.document[b, t] == self.owner[b, n])
        if self.window is not None:
            seen = seen & (self.query_position[b, n, q] - self.key_position[b, t] < self.window)
        return seen

    @no_type_check
    def sees_own(self, q: Tensor, s: Tensor) -> Tensor:
        """Whether query q attends to own key s: those inside the window, and only those up to itself if
        `causal_own`."""
        back = q + self.ahead - s
        seen = back >= 0 if self.causal_own else torch.ones_like(back, dtype=torch.bool)
        return seen if self.window is None else seen & (back < self.window)

    def own_mask(self, queries: int, keys: int) -> Bool[Tensor, "q s"] | None:
        """`sees_own` as a tensor; None if every query attends to every own key."""
        if not self.causal_own and (self.window is None or queries - 1 + self.ahead < self.window):
            return None
        device = self.limit.device
        return self.sees_own(torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device))

    def context_mask(self, keys: int, queries: int) -> Bool[Tensor, "B N q T"]:
        """The context mask as a tensor; q is 1 where it does not depend on the query."""
        device = self.limit.device
        b = torch.arange(self.limit.shape[0], device=device)[:, None, None, None]
        n = torch.arange(self.limit.shape[1], device=device)[:, None, None]
        q = torch.arange(queries if self.window is not None else 1, device=device)[:, None]
        return self.sees_context(b, n, q, torch.arange(keys, device=device))


def attend(
    query: Float[Tensor, "B N Q H d"],
    context: tuple[Float[Tensor, "B T G d"], Float[Tensor, "B T G d"]],
    own: tuple[Float[Tensor, "B N S G d"], Float[Tensor, "B N S G d"]] | None,
    mask: Bool[Tensor, "B N q T"],
    scale: float,
    own_mask: Bool[Tensor, "Q S"] | None = None,
    soft_cap: float | None = None,
) -> Float[Tensor, "B N Q H d"]:
    """Dense attention over context and own keys under one softmax (in fp32).

    Own keys are scored block by block, so the cost is N*Q*(T + S) and not N*Q*(T + N*S). A query without visible keys
    gets a finite, meaningless row. `soft_cap` c replaces every score s by c tanh(s / c).
    """
    (B, N, Q, H, d), G = query.shape, context[0].shape[2]
    r = H // G
    q = query.mul(scale).view(B, N, Q, G, r, d).permute(0, 3, 4, 1, 2, 5)  # B G r N Q d
    keys, values = (x.transpose(1, 2) for x in context)  # B G T d
    scores = (q.reshape(B, G, r * N * Q, d) @ keys.transpose(-1, -2)).view(B, G, r, N, Q, -1)
    lowest = torch.finfo(scores.dtype).min
    scores = capped(scores, soft_cap)
    scores = scores.masked_fill_(~mask[:, None, None], lowest)  # not needed for the backward pass, and they are large
    if own is None:
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        seen = weights.reshape(B, G, r * N * Q, -1) @ values
        return seen.view(B, G, r, N, Q, d).permute(0, 3, 4, 1, 2, 5).reshape(B, N, Q, H, d)
    own_keys, own_values = (x.permute(0, 3, 1, 2, 4) for x in own)  # B G N S d
    by_block = q.transpose(2, 3)  # B G N r Q d
    S = own_keys.shape[3]
    inner = (by_block.reshape(B, G, N, r * Q, d) @ own_keys.transpose(-1, -2)).view(B, G, N, r, Q, S)
    inner = capped(inner, soft_cap)
    if own_mask is not None:
        inner = inner.masked_fill(~own_mask, lowest)
    weights = torch.cat([scores, inner.transpose(2, 3)], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    outer, inner = weights.split([scores.shape[-1], S], -1)
    seen = (outer.reshape(B, G, r * N * Q, -1) @ values).view(B, G, r, N, Q, d)
    seen = seen + (inner.transpose(2, 3).reshape(B, G, N, r * Q, S) @ own_values).view(B, G, N, r, Q, d).transpose(2, 3)
    return seen.permute(0, 3, 4, 1, 2, 5).reshape(B, N, Q, H, d)


def capped(scores: Float[Tensor, "*b"], soft_cap: float | None) -> Float[Tensor, "*b"]:
    """Scores s as c tanh(s / c), or unchanged without a cap."""
    return scores if soft_cap is None else torch.tanh(scores / soft_cap) * soft_cap


@dataclass(frozen=True)
class Span:
    """Consecutive blocks `first_block:last_block` of one conversation, and the context `first:last` of its `row` that
    the last of them reads; `mask` as in attend, for one row."""

    row: int
    first_block: int
    last_block: int
    first: int
    last: int
    mask: Bool[Tensor, "1 n q t"]


def spans(visible: Visibility, rows: Int[Tensor, " M"], places: Int[Tensor, " M"]) -> list[Span]:
    """The M blocks at (rows, places) of `visible`, row by row, cut where the conversation changes."""
    if not len(rows):
        return []
    limit = visible.limit[rows, places]
    owner = rows if visible.owner is None else visible.owner[rows, places]
    changes = (rows[1:] != rows[:-1]) | (owner[1:] != owner[:-1])
    edges = [0, *(changes.nonzero()[:, 0] + 1).tolist(), len(rows)]
    found = []
    for first_block, last_block in pairwise(edges):
        row, first = int(rows[first_block]), 0
        if visible.document is not None:
            first = int((visible.document[row] == owner[first_block]).int().argmax())
        last = max(first, int(limit[first_block:last_block].max()))
        keys = torch.arange(first, last, device=limit.device)
        mask = (keys < limit[first_block:last_block, None])[:, None]
        if visible.window is not None:
            asked = visible.query_position[row, places[first_block:last_block]]
            mask = mask & (asked[..., None] - visible.key_position[row, first:last] < visible.window)
        found.append(Span(row, first_block, last_block, first, last, mask[None]))
    return found


def attend_spans(
    query: Float[Tensor, "1 M Q H d"],
    context: tuple[Float[Tensor, "B T G d"], Float[Tensor, "B T G d"]],
    own: tuple[Float[Tensor, "1 M S G d"], Float[Tensor, "1 M S G d"]],
    mask: list[Span],
    scale: float,
    own_mask: Bool[Tensor, "Q S"] | None = None,
    soft_cap: float | None = None,
) -> Float[Tensor, "1 M Q H d"]:
    """`attend` for consecutive blocks, each over its own conversation only: blocks and keys of padding or of other
    conversations in a packed row are not computed. `mask` is the result of `spans`."""
    seen = []
    for span in mask:
        blocks = slice(span.first_block, span.last_block)
        keys, values = (x[span.row : span.row + 1, span.first : span.last] for x in context)
        inner = own[0][:, blocks], own[1][:, blocks]
        seen.append(attend(query[:, blocks], (keys, values), inner, span.mask, scale, own_mask, soft_cap))
    return torch.cat(seen, 1)


def attend_stored(
    query: Float[Tensor, "B Q H d"],
    stored: tuple[Float[Tensor, "B T G d"], Float[Tensor, "B T G d"]],
    mask: Bool[Tensor, "B 1 Q T"] | None,
    scale: float,
    soft_cap: float | None = None,
) -> Float[Tensor, "B Q H d"]:
    """Attention of the tokens being decoded to everything in a key-value cache, their own entries included.

    `mask` None: every query attends to every entry.
    """
    keys, values = (x.transpose(1, 2) for x in stored)
    if soft_cap is not None:
        if mask is None:
            mask = query.new_ones(len(query), 1, 1, keys.shape[2], dtype=torch.bool)
        return attend(query[:, None], stored, None, mask, scale, None, soft_cap)[:, 0]
    out = scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, attn_mask=mask, scale=scale, enable_gqa=keys.shape[1] != query.shape[2]
    )
    return out.transpose(1, 2)


def block_mask(visible: Visibility, shape: tuple[int, int, int, int, int]):
    """FlexAttention block mask of `visible` for shape (B, N, Q, T, S): keys are the context, then every block's own."""
    from torch.nn.attention.flex_attention import create_block_mask

    B, N, Q, T, S = shape

    @no_type_check
    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        n, slot = q // Q, q % Q
        seen = visible.sees_context(b, n, slot, kv.clamp(max=T - 1)) & (kv < T)
        if S == 0:
            return seen
        inner = kv - T
        return seen | ((kv >= T) & (inner // S == n) & visible.sees_own(slot, inner % S))

    return create_block_mask(sees, B, None, N * Q, T + N * S, device=visible.limit.device)


def attend_flex(
    query: Float[Tensor, "B N Q H d"],
    context: tuple[Float[Tensor, "B T G d"], Float[Tensor, "B T G d"]],
    own: tuple[Float[Tensor, "B N S G d"], Float[Tensor, "B N S G d"]] | None,
    mask,
    scale: float,
    own_mask: None = None,
    soft_cap: float | None = None,
) -> Float[Tensor, "B N Q H d"]:
    """The same attention through FlexAttention (compiled on CUDA; forward only on CPU).

    `mask` is a `block_mask`, which holds the rule of own keys too: `own_mask` is None.
    """
    from torch.nn.attention.flex_attention import flex_attention

    @no_type_check
    def cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return soft_cap * torch.tanh(score / soft_cap)

    B, N, Q, H, d = query.shape
    keys, values = context
    if own is not None:
        keys = torch.cat([keys, own[0].flatten(1, 2)], 1)
        values = torch.cat([values, own[1].flatten(1, 2)], 1)
    run = _compiled_flex() if query.is_cuda else flex_attention
    out = run(
        query.flatten(1, 2).transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        score_mod=None if soft_cap is None else cap,
        block_mask=mask,
        scale=scale,
        enable_gqa=keys.shape[2] != H,
    )
    return out.transpose(1, 2).reshape(B, N, Q, H, d)


_COMPILED: list = []


def _compiled_flex():
    """Compile once a process: FlexAttention without compilation is a dense reference."""
    from torch.nn.attention.flex_attention import flex_attention

    if not _COMPILED:
        _COMPILED.append(torch.compile(flex_attention))
    return _COMPILED[0]
