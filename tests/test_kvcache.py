"""The key-value cache against plain lists, one a request, through writes, roll-backs, departures and arrivals."""

from __future__ import annotations

import random

import pytest
import torch

from specbench.models.kv_cache import KVCache

LAYERS, G, D = 2, 1, 2


class Writer:
    """A cache and, for each row, the list of what it should hold; every entry is a number of its own."""

    def __init__(self, rows: int):
        self.cache, self.rows, self.next = KVCache(rows), [[] for _ in range(rows)], 1.0

    def entries(self, size: int) -> torch.Tensor:
        count = len(self.rows) * size
        numbers = torch.arange(count).view(-1, size) + self.next
        self.next += count
        return numbers[..., None, None].expand(-1, -1, G, D).clone()

    def write(self, counts: list[int], size: int) -> None:
        """Write `size` entries a row and keep the first `counts` of each."""
        new, visible = self.entries(size), self.cache.visible(size)
        for layer in range(LAYERS):
            keys, values = self.cache.write(layer, new + 0.25 * layer, -new - 0.25 * layer)
            for b, row in enumerate(self.rows):
                for query in range(size):
                    seen = torch.ones(keys.shape[1], dtype=torch.bool) if visible is None else visible[b, 0, query]
                    expected = row + new[b, : query + 1, 0, 0].tolist()
                    assert (keys[b, seen, 0, 0] - 0.25 * layer).tolist() == expected
                    assert (-values[b, seen, 0, 1] - 0.25 * layer).tolist() == expected
        self.cache.advance(torch.tensor(counts))
        for b, count in enumerate(counts):
            self.rows[b] = self.rows[b] + new[b, :count, 0, 0].tolist()
        assert self.cache.lengths.tolist() == [len(row) for row in self.rows]
        assert self.cache.longest == max(len(row) for row in self.rows)


@pytest.mark.parametrize("seed", range(4))
def test_every_row_holds_what_it_kept(seed):
    chance = random.Random(seed)
    one = Writer(3)
    one.write([chance.randint(1, 9) for _ in range(3)], 9)
    for _ in range(25):
        size = chance.randint(1, 5)
        one.write([chance.randint(0, size) for _ in one.rows], size)
        if chance.random() < 0.3 and len(one.rows) > 1:
            kept = chance.sample(range(len(one.rows)), len(one.rows) - 1)
            one.rows = [one.rows[r] for r in kept]
            if chance.random() < 0.5:
                one.cache = one.cache.select(torch.tensor(kept))
            else:
                one.cache.shrink(torch.tensor(kept))
        if chance.random() < 0.4:
            other = Writer(chance.randint(1, 2))
            other.next = one.next + 1e5 * chance.randint(1, 9)
            length = chance.randint(1, 80)
            other.write([length] * len(other.rows), length)
            one.cache, one.rows = one.cache.merge(other.cache), one.rows + other.rows
            one.next = max(one.next, other.next)


def test_rows_of_one_length_are_written_side_by_side_until_they_part():
    writer = Writer(2)
    writer.write([4, 4], 4)
    assert writer.cache.even
    writer.write([1, 3], 3)
    assert not writer.cache.even
    writer.write([2, 0], 2)
    assert writer.cache.even and writer.cache.lengths.tolist() == [7, 7]
    writer.write([1, 1], 1)


def test_growing_keeps_what_was_there():
    writer = Writer(2)
    writer.write([60, 50], 60)
    writer.write([30, 1], 30)
    writer.write([300, 7], 300)
    writer.write([1, 1], 1)


def test_a_selection_shares_nothing_with_the_cache_it_came_from():
    writer = Writer(2)
    writer.write([5, 3], 5)
    chosen = writer.cache.select(torch.tensor([1]))
    chosen.write(0, *(torch.full((1, 2, G, D), 9e9) for _ in "kv"))
    writer.write([2, 2], 2)


def test_shrinking_copies_only_the_rows_that_move():
    writer = Writer(4)
    writer.write([5, 3, 4, 2], 5)
    keys, place = writer.cache.keys[0], writer.cache.keys[0].data_ptr()
    keys[2] = float("nan")  # of the row that leaves: it is overwritten by the last one
    writer.cache.shrink(torch.tensor([0, 1, 3]))
    writer.rows = [writer.rows[r] for r in (0, 1, 3)]
    assert writer.cache.keys[0].data_ptr() == place and len(writer.cache.keys[0]) == 3
    writer.write([1, 2, 3], 3)


def pairs(mask: torch.Tensor | None, rows: int, queries: int, stored: int) -> list:
    return (torch.ones(rows, queries, stored) if mask is None else mask[:, 0]).bool().tolist()


@pytest.mark.parametrize("lengths", [[3, 6], [4, 4]])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("behind", "new"), [(0, 1), (0, 3), (2, 1), (2, 2)])
def test_who_sees_whom(lengths, window, causal, behind, new):
    cache = KVCache(2)
    cache.advance(torch.tensor(lengths))
    expected = []
    for length in lengths:
        place = [length + behind + q for q in range(new)]
        near = [[window is None or p - t < window for t in range(cache.longest + behind + new)] for p in place]
        last = [p if causal else place[-1] for p in place]
        expected.append([[t <= last[q] and ok for t, ok in enumerate(row)] for q, row in enumerate(near)])
    found = cache.visible(new, behind=behind, causal=causal, window=window)
    assert pairs(found, 2, new, cache.longest + behind + new) == expected


def test_entries_behind_the_rows_end_wait_until_they_count():
    cache = KVCache(2)
    cache.write(0, *(torch.arange(8.0).view(2, 4, 1, 1) for _ in "kv"))
    cache.advance(torch.tensor([4, 2]))
    for behind, number in enumerate((70.0, 80.0)):
        keys, _ = cache.write(0, *(torch.full((2, 1, 1, 1), number) for _ in "kv"), behind=behind)
    assert keys[:, :, 0, 0].tolist()[0] == [0, 1, 2, 3, 70, 80]
    assert keys[:, :, 0, 0].tolist()[1][:4] == [4, 5, 70, 80]
    keys, _ = cache.write(0, *(torch.full((2, 1, 1, 1), 9.0) for _ in "kv"))
    assert [keys[0, 4, 0, 0].item(), keys[1, 2, 0, 0].item()] == [9.0, 9.0]
    assert cache.lengths.tolist() == [4, 2]


def test_a_cache_holds_an_eighth_more_than_it_needs_and_a_union_copies_only_what_is_filled():
    cache, other = KVCache(2), KVCache(1)
    for one, rows, length in ((cache, 2, 1600), (other, 1, 800)):
        for start in range(0, length, 40):
            one.write(0, torch.full((rows, 40, G, D), float(start)), torch.zeros(rows, 40, G, D))
            one.advance(40)
    assert cache.keys[0].shape[2] <= 1600 * 9 // 8 and other.keys[0].shape[2] <= 800 * 9 // 8
    both = cache.merge(other)
    assert both.keys[0].shape[0] == 3 and both.keys[0].shape[2] == 1600 * 9 // 8
    assert torch.equal(both.keys[0][:2, :, :1600], cache.keys[0][:, :, :1600])
    assert torch.equal(both.keys[0][2:, :, :800], other.keys[0][:, :, :800]) and both.lengths.tolist() == [
        1600,
        1600,
        800,
    ]
