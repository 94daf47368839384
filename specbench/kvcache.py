"""A key-value cache for ragged batches: every row has its own length, and rolling back is not advancing.

Axes: B rows, S new tokens, T stored tokens, G key-value heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor


class KVCache:
    """Keys and values (B, T, G, d) of several layers with one length a row.

    `write` puts new entries behind each row's length and returns everything up to the longest row; `advance` says how
    many of them count. What lies beyond a row's length is overwritten later and must be masked by the reader.
    """

    def __init__(self, rows: int, device: torch.device | str = "cpu"):
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0
        self.even = True
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store S new entries of every row; returns views (B, longest + S, G, d) of keys and values."""
        size, end = keys.shape[1], self.longest + keys.shape[1]
        if layer not in self.keys or self.keys[layer].shape[1] < end:
            self._grow(layer, keys, values, end)
        stored_keys, stored_values = self.keys[layer], self.values[layer]
        if self.even:
            stored_keys[:, self.longest : end] = keys
            stored_values[:, self.longest : end] = values
        else:
            rows = torch.arange(len(self.lengths), device=self.lengths.device)[:, None]
            at = self.lengths[:, None] + torch.arange(size, device=self.lengths.device)
            stored_keys[rows, at], stored_values[rows, at] = keys, values
        return stored_keys[:, :end], stored_values[:, :end]

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of what is stored up to the longest row."""
        return self.keys[layer][:, : self.longest], self.values[layer][:, : self.longest]

    def advance(self, counts: Int[Tensor, " B"] | int) -> None:
        """Count `counts` of the entries written last as part of each row."""
        self.lengths = self.lengths + counts
        low, high = torch.aminmax(self.lengths)
        self.longest, self.even = int(high), bool(low == high)

    def visible(self, new: int = 0) -> Bool[Tensor, "B 1 q T"]:
        """Mask of stored entries: those of the row (new = 0), or causal for `new` queries just written."""
        stored = torch.arange(self.longest + new, device=self.lengths.device)
        if new == 0:
            return (stored < self.lengths[:, None])[:, None, None]
        limit = self.lengths[:, None] + torch.arange(new, device=self.lengths.device)
        return (stored <= limit[..., None])[:, None]

    def select(self, rows: Int[Tensor, " R"]) -> KVCache:
        """A cache of the chosen rows."""
        chosen = KVCache(len(rows), self.lengths.device)
        for layer in self.keys:
            chosen.keys[layer], chosen.values[layer] = self.keys[layer][rows], self.values[layer][rows]
        chosen.lengths = self.lengths[rows]
        chosen.advance(0) if len(rows) else None
        return chosen

    def merge(self, other: KVCache) -> KVCache:
        """Both caches' rows, this one's first."""
        both = KVCache(0, self.lengths.device)
        for layer in self.keys:
            width = max(self.keys[layer].shape[1], other.keys[layer].shape[1])
            for name in ("keys", "values"):
                pair = [getattr(c, name)[layer] for c in (self, other)]
                padded = [F.pad(x, (0, 0, 0, 0, 0, width - x.shape[1])) for x in pair]
                getattr(both, name)[layer] = torch.cat(padded)
        both.lengths = torch.cat([self.lengths, other.lengths])
        both.advance(0)
        return both

    def _grow(self, layer: int, keys: Tensor, values: Tensor, end: int) -> None:
        capacity = max(64, 2 * end)
        for store, new in ((self.keys, keys), (self.values, values)):
            fresh = new.new_zeros(new.shape[0], capacity, *new.shape[2:])
            if layer in store:
                fresh[:, : self.longest] = store[layer][:, : self.longest]
            store[layer] = fresh
