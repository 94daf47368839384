"""Replay: every step has its share of the older cache, an epoch is one pass over the new one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specbench.data.cache.build import build
from specbench.data.cache.manifest import CacheMismatch
from specbench.data.cache.storage import storage
from specbench.data.loading.replay import Replay
from specbench.data.loading.target_cache import TargetCache
from specbench.training.budget import conversation_cost, step_cost
from tests import toys
from tests.data.tiny_target import TinyTarget, talks

ORDER = {"samples_per_micro": 2, "micro_batches_per_step": 4, "seed": 7, "threads": 1}
NEW, OLD = talks(20, seed=1), talks(9, seed=2)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folders = {}
    for name, owner, conversations in (
        ("new", TinyTarget(), NEW),
        ("old", TinyTarget(), OLD),
        ("other", TinyTarget(seed=1), OLD),
    ):
        folders[name] = tmp_path_factory.mktemp(name)
        build(owner, conversations, folders[name], storage("fp32"), 24, batch_tokens=48)
    return folders


def made(caches, share=0.25, **options):
    data = Replay(TargetCache(caches["new"], **(ORDER | options)), TargetCache(caches["old"], **ORDER), share)
    data.setup()
    return data


def ordinals(data, start=0):
    """Rows of every step."""
    return [
        sorted(int(row) for batch in step for row in np.unique(batch.document) if row >= 0)
        for step in data.steps(start)
    ]


def test_every_step_has_its_share_and_an_epoch_passes_over_the_new_cache(caches):
    data = made(caches)
    assert data.steps_per_epoch == 4  # 20 new ones, six a step beside two replayed ones
    epochs = [ordinals(data, epoch * 4) for epoch in range(3)]
    for epoch in epochs:
        assert [sum(row >= 20 for row in step) for step in epoch] == [2, 2, 2, 2]
        assert sorted(row for step in epoch for row in step if row < 20) == list(range(20))
    assert epochs[0] != epochs[1]
    # The older cache is passed over whatever the epochs: of 24 replayed rows, each of the nine two or three times.
    counts = np.bincount([row - 20 for epoch in epochs for step in epoch for row in step if row >= 20], minlength=9)
    assert counts.sum() == 24 and set(counts.tolist()) <= {2, 3}


def test_the_cost_of_a_step_is_that_of_its_share_of_each_cache(caches):
    """Counted over whole epochs: what the steps take from each cache, however long its conversations are."""
    data = made(caches)
    steps = [step for epoch in range(9) for step in ordinals(data, epoch * 4)]
    new, old = data.a_step()
    taken = [np.mean([sum((row >= 20) == of_old for row in step) for step in steps]) for of_old in (False, True)]
    assert (new[1], old[1]) == pytest.approx(taken)
    assert new[0].tolist() == list(range(20)) and old[0].tolist() == list(range(20, 29))
    draft = toys.draft("mtp")
    parts = [(count, conversation_cost(draft, data.lengths[rows], data.supervised[rows])) for rows, count in (new, old)]
    assert step_cost(draft, data).flops == pytest.approx(sum(count * cost.flops for count, cost in parts))
    assert parts[0][1].flops != pytest.approx(parts[1][1].flops, rel=1e-3)


def test_a_step_depends_on_its_number_alone(caches):
    """So an interrupted training goes on where it was, on any number of ranks."""
    whole = ordinals(made(caches), 4)
    assert ordinals(made(caches), 6) == whole[2:]
    shared = [ordinals(made(caches, rank=rank, world=2), 4) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*shared, strict=True)] == whole


def test_conversations_are_those_of_their_caches(caches):
    data = made(caches, row_length=64)
    texts = {row: talk.tokens for row, talk in enumerate([*NEW, *OLD])}
    seen = set()
    for step in data.steps(0):
        for batch in step:
            for row in np.unique(batch.document):
                if row >= 0:
                    assert batch.tokens[batch.document == int(row)].tolist() == texts[int(row)][:24]
                    seen.add(int(row))
    assert seen >= set(range(20)) and len(seen) > 20
    owner = TinyTarget()
    (sample,) = data.samples(np.array([22]))
    expected = owner.states(torch.tensor([OLD[2].tokens]), torch.tensor([len(OLD[2].tokens)]))
    torch.testing.assert_close(sample.taps, expected.taps[0], rtol=0, atol=0)


def test_what_does_not_belong_together_is_refused(caches):
    new, other = (TargetCache(caches[name], **ORDER) for name in ("new", "other"))
    with pytest.raises(CacheMismatch, match=r"replay=.* has weights"):
        Replay(new, other)
    for share in (0.0, 0.95, 1.0):
        with pytest.raises(ValueError, match=f"replay_share={share}"):
            made(caches, share)
    assert made(caches, 0.25).content != made(caches, 0.5).content
