"""States computed on the fly are those of the cache."""

from __future__ import annotations

import pytest
import torch

from specbench.data.cache.build import build
from specbench.data.cache.storage import storage
from specbench.data.cache.target_states import states_of
from specbench.data.loading.online import OnlineTarget
from specbench.data.loading.reading import LocalFiles
from specbench.data.loading.target_cache import TargetCache
from tests.data.tiny_target import TinyTarget, talks

TALKS = talks(46)
ORDER = {"samples_per_micro": 3, "micro_batches_per_step": 6, "seed": 7}


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_online_steps_are_those_of_the_cache(tmp_path, name):
    """Same rows, same tensors: this target's states do not depend on batch mates, so they are equal bit by bit."""
    build(TinyTarget(), TALKS, tmp_path / name, storage(name), 24)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[name]
    options = ORDER | {"validation_fraction": 0.1, "limit_samples": 30, "row_length": 60}
    for rank in range(2):
        cached = TargetCache(tmp_path / name, rank=rank, world=2, threads=1, **options)
        cached.setup()
        online = OnlineTarget(TinyTarget(), TALKS, dtype=dtype, rank=rank, world=2, **options)
        online.setup()
        assert online.steps_per_epoch == cached.steps_per_epoch
        for start in (0, online.steps_per_epoch + 1):
            for ours, theirs in zip(online.steps(start), cached.steps(start), strict=True):
                assert repr(ours) == repr(theirs)
                for batch, stored in zip(ours, theirs, strict=True):
                    for field in ("tokens", "loss_mask", "document", "position", "taps", "last"):
                        assert torch.equal(getattr(batch, field), getattr(stored, field))
    assert torch.equal(online.tables.head, cached.tables.head)


def test_online_refuses_what_only_a_cache_has():
    with pytest.raises(ValueError, match="no shards to shuffle"):
        OnlineTarget(TinyTarget(), TALKS, shuffle_window=2)
    with pytest.raises(ValueError, match="conversations is empty"):
        OnlineTarget(TinyTarget(), [])


def test_states_of_pads_to_the_right():
    alone, together = states_of(TinyTarget(), TALKS[:1]), states_of(TinyTarget(), TALKS[:5])
    length = len(TALKS[0].tokens)
    assert torch.equal(alone.last[0], together.last[0, :length])
    assert together.lengths.tolist() == [len(talk.tokens) for talk in TALKS[:5]]
    assert LocalFiles("nowhere").size("x") is None
