"""The released toolkit's cache gives what its own reader gives (three samples of a tiny target, made by it)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specbench.data.cache.released_cache import ReleasedCache

FOLDER = Path(__file__).parents[1] / "fixtures" / "target_cache_v2"


def test_samples_are_those_of_the_toolkits_own_reader():
    cache, expected = ReleasedCache(FOLDER), load_file(FOLDER / "expected.safetensors")
    assert len(cache) == 3 and cache.target_layer_ids == (1, 2, 3, 4)
    for number in range(3):
        sample = cache.sample(number)
        assert torch.equal(sample.tokens, expected[f"{number}.input_ids"])
        assert torch.equal(sample.loss_mask, expected[f"{number}.loss_mask"].bool())
        assert torch.equal(sample.taps.flatten(1), expected[f"{number}.target_hidden_states"])
        assert torch.equal(sample.last, expected[f"{number}.target_last_hidden_states"])
        assert sample.ordinal == number


def test_damage_is_named(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "cache")
    shard = folder / "shard-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"shard-00001\.bin.*sample 1 is truncated in its last"):
        ReleasedCache(folder).sample(1)
    index = folder / "samples.idx"
    index.write_bytes(index.read_bytes()[:-56])
    with pytest.raises(ValueError, match="lists 2 samples, the manifest 3"):
        ReleasedCache(folder)
    with pytest.raises(ValueError, match="not a cache"):
        ReleasedCache(tmp_path)
