"""Recycled memory: used again when nobody holds it, never while somebody does."""

from __future__ import annotations

import torch

from specbench.data.loading.buffers import SMALL, Recycler
from specbench.profiling.reading_speed import compare


def test_a_kept_batch_is_never_overwritten_and_a_dropped_one_is_used_again():
    recycler, like = Recycler(), torch.empty(0, dtype=torch.bfloat16)
    shape = (2, SMALL)
    first = recycler.zeros(like, shape)
    first.fill_(1)
    view = first[1, 5:9]  # a view keeps the memory just as well
    place = first.data_ptr()
    del first
    second = recycler.zeros(like, shape)
    assert second.data_ptr() != place and view.tolist() == [1, 1, 1, 1]
    assert second.dtype == torch.bfloat16 and second.shape == shape and not second.any()
    second.fill_(2)
    del view
    third = recycler.zeros(like, (SMALL,))  # smaller, so the same store fits, and it is zeroed
    assert third.data_ptr() == place and not third.any()
    del second, third
    bigger = recycler.zeros(like, (4, SMALL))
    assert not bigger.any() and len(recycler._stores) == 2  # it took the place of one that was too small


def test_small_tensors_are_left_to_the_allocator():
    recycler = Recycler()
    assert recycler.zeros(torch.empty(0), (3, 4)).shape == (3, 4)
    assert recycler._stores == []


def test_the_reading_benchmark_measures_every_reader(tmp_path):
    speeds = compare(tmp_path, samples=3, shortest=20, longest=30, hidden_size=64, taps=2, repeats=1, codecs=("bf16",))
    ways = ["by index", "stream", "stream of a command", "stock webdataset"]
    assert [speed.reader for speed in speeds] == [*(f"bf16 {way}" for way in ways), "memory-mapped, collated"]
    assert all(speed.gigabytes_per_second > 0 for speed in speeds)
