"""A key-value cache for ragged batches: every row has its own length; to roll back, the length is not advanced.

Axes: B rows, S new tokens, T stored tokens, G key-value heads, d head size.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from specbench.models.branches import Branches


class KVCache:
    """Keys and values of several layers with one length per row, passed as (B, T, G, d).

    `write` puts new entries after each row's length and returns all entries up to the longest row; `advance` counts
    some of them as part of the row. Entries beyond a row's length are overwritten later and must be masked by the
    reader. Stored as (B, G, T, d), so that a product over all rows and heads needs no copy.
    """

    def __init__(self, rows: int, device: torch.device | str = "cpu"):
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0
        self.even = True
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._at: dict[tuple[int, int], Tensor] = {}

    def write(self, layer: int, keys: Tensor, values: Tensor, behind: int = 0) -> tuple[Tensor, Tensor]:
        """Store S new entries of every row, `behind` entries after its length; returns views (B, longest + behind + S,
        G, d) of keys and values.
        """
        start, size = self.longest + behind, keys.shape[1]
        end = start + size
        if layer not in self.keys or self.keys[layer].shape[2] < end:
            self._grow(layer, keys, values, end)
        pair = (self.keys[layer], keys), (self.values[layer], values)
        if self.even:
            for stored, new in pair:
                stored.narrow(2, start, size).copy_(new.transpose(1, 2))
        else:
            at = self._places(behind, size)
            for stored, new in pair:
                stored.scatter_(2, at.expand(-1, new.shape[2], -1, new.shape[3]), new.transpose(1, 2))
        return tuple(stored.narrow(2, 0, end).transpose(1, 2) for stored, _ in pair)

    def advance(self, counts: Int[Tensor, " B"] | int) -> None:
        """Count the first `counts` of the entries written last as part of each row."""
        self.lengths = self.lengths + counts
        low, high = torch.stack(torch.aminmax(self.lengths)).tolist()
        self.longest, self.even = high, low == high
        self._at.clear()

    def visible(
        self, new: int, behind: int = 0, causal: bool = True, window: int | None = None
    ) -> Bool[Tensor, "B 1 S T"] | None:
        """The mask of `new` queries that were written `behind` entries after each row's length, as by `write`.

        They attend to all earlier entries of their row and to each other: up to themselves if `causal`, all of them
        otherwise; with `window`, to nothing further back than window - 1 entries. None: they attend to all entries.
        """
        if self.even and window is None and (new == 1 or not causal):
            return None
        position = self.lengths[:, None, None] + torch.arange(behind, behind + new, device=self.lengths.device)[:, None]
        stored = torch.arange(self.longest + behind + new, device=self.lengths.device)
        seen = stored <= (position if causal else position[:, -1:])
        if window is not None:
            seen = seen & (position - stored < window)
        return seen.expand(-1, new, -1)[:, None]

    def branching(self, branches: Branches, window: int | None = None) -> Bool[Tensor, "B 1 M T"]:
        """The mask of the last M of the S tokens of `branches`, all of which were written after each row's length.

        They attend to all earlier entries of their row and to their own branch; with `window`, to nothing at a position
        further back than window - 1.
        """
        size = branches.depth.shape[1]
        place = torch.arange(self.longest + size, device=self.lengths.device) - self.lengths[:, None]
        inside = place.clamp(0, size - 1)
        own = branches.seen.gather(2, inside[:, None].expand(-1, branches.seen.shape[1], -1))
        seen = (place < 0)[:, None] | (own & ((place >= 0) & (place < size))[:, None])
        if window is not None:
            position = branches.depth[:, -branches.seen.shape[1] :]
            back = position[..., None] - torch.where(place < 0, place, branches.depth.gather(1, inside))[:, None]
            seen = seen & (back < window)
        return seen[:, None]

    def keep(self, path: Int[Tensor, "B P"]) -> None:
        """Move the entries at the places `path` behind each row's length to the places 0..P-1; none is counted."""
        source = (self.lengths[:, None] + path)[:, None, :, None]
        target = self._places(0, path.shape[1])
        for stores in (self.keys, self.values):
            for stored in stores.values():
                at = source.expand(-1, stored.shape[1], -1, stored.shape[3])
                stored.scatter_(2, target.expand_as(at), stored.gather(2, at))

    def select(self, rows: Int[Tensor, " R"]) -> KVCache:
        """A cache of the chosen rows."""
        chosen = KVCache(len(rows), self.lengths.device)
        for layer in self.keys:
            chosen.keys[layer], chosen.values[layer] = self.keys[layer][rows], self.values[layer][rows]
        chosen.lengths = self.lengths[rows]
        chosen.advance(0) if len(rows) else None
        return chosen

    @torch.inference_mode()
    def shrink(self, rows: Int[Tensor, " R"]) -> None:
        """Keep the chosen rows, different ones, in this order. Rows that stay in their place are not copied, as all are
        by `select`: of a large batch that loses a request now and then, that would be most of the time."""
        chosen = torch.arange(len(rows), device=rows.device)
        moved = rows != chosen
        for stores in (self.keys, self.values):
            for layer, stored in stores.items():
                if moved.any():
                    stored[chosen[moved]] = stored[rows[moved]]
                stores[layer] = stored[: len(rows)]
        self.lengths = self.lengths[rows]
        self.advance(0)

    def merge(self, other: KVCache) -> KVCache:
        """Both caches' rows, this one's first."""
        both = KVCache(0, self.lengths.device)
        room = _capacity(max(self.longest, other.longest))
        for layer in self.keys:
            for name in ("keys", "values"):
                # Only what is filled is copied, once, into tensors that have room for the next entries.
                pair = [getattr(c, name)[layer] for c in (self, other)]
                B, G, _, d = pair[0].shape
                fresh = pair[0].new_zeros(B + len(pair[1]), G, room, d)
                for store, filled, start in ((pair[0], self.longest, 0), (pair[1], other.longest, B)):
                    fresh[start : start + len(store), :, :filled] = store[:, :, :filled]
                getattr(both, name)[layer] = fresh
        both.lengths = torch.cat([self.lengths, other.lengths])
        both.advance(0)
        return both

    def keep_layer(self, layer: int) -> None:
        """Forget the entries of every other layer."""
        for stored in (self.keys, self.values):
            for other in stored.keys() - {layer}:
                del stored[other]

    def _places(self, behind: int, size: int) -> Int[Tensor, "B 1 S 1"]:
        """Positions of each row's new entries: the same for every layer until the lengths change."""
        if (behind, size) not in self._at:
            steps = torch.arange(behind, behind + size, device=self.lengths.device)
            self._at[behind, size] = (self.lengths[:, None] + steps)[:, None, :, None]
        return self._at[behind, size]

    def _grow(self, layer: int, keys: Tensor, values: Tensor, end: int) -> None:
        capacity = _capacity(end)
        for store, new in ((self.keys, keys), (self.values, values)):
            B, _, G, d = new.shape
            fresh = new.new_zeros(B, G, capacity, d)
            if layer in store:
                fresh[:, :, : store[layer].shape[2]] = store[layer]
            store[layer] = fresh


def _capacity(entries: int) -> int:
    """Room for `entries` and the next ones: an eighth more, at least 64. Each growth copies one layer at a time, so at
    most a quarter more than what is filled is held, where doubling held up to twice as much and copies of it."""
    return entries + max(64, entries // 8)
