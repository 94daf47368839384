"""The order of an epoch: fixed by its key, dealt whole, balanced, split by hash."""

from __future__ import annotations

import numpy as np
import pytest

from specbench.data.loading.order import EpochPlan, epoch_order, permutation, split


def test_a_permutation_is_fixed_by_its_key():
    assert permutation(5, 1, 2).tolist() == [3, 4, 0, 1, 2]
    assert sorted(permutation(1000, 3).tolist()) == list(range(1000))
    assert permutation(1000, 3).tolist() != permutation(1000, 4).tolist()


def test_windowed_order_keeps_to_a_few_shards_at_a_time():
    shards = np.repeat(np.arange(10), 7)[permutation(70, 9)]
    rows = np.arange(70)
    order = epoch_order(rows, shards, seed=1, epoch=2, window=3)
    assert sorted(order.tolist()) == rows.tolist()
    read = shards[order]
    for start in range(0, 70, 21):
        assert len(set(read[start : start + 21])) <= 3
    assert len(set(read[:6])) > 1  # mixed inside the window
    assert order.tolist() != epoch_order(rows, shards, seed=1, epoch=3, window=3).tolist()


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("count", [1, 17, 18, 19, 100])
def test_a_plan_deals_every_row_once_and_every_rank_the_same_steps(count, balance):
    lengths = np.random.default_rng(0).integers(5, 500, 100)
    order = permutation(100, 0)[:count]
    plan = EpochPlan(order, lengths, samples_per_micro=3, micro_batches=6, balance=balance)
    assert plan.steps == -(-count // 18)
    dealt = []
    for step in range(plan.steps):
        hands = plan.deal(step)
        assert len(hands) == 6 and max(len(hand) for hand in hands) <= 3
        assert sorted(np.concatenate(hands)) == sorted(plan.rows(step))
        for world in (1, 2, 3, 6):
            shares = [plan.share(step, rank, world) for rank in range(world)]
            assert {len(share) for share in shares} == {6 // world}
            assert sorted(r for share in shares for hand in share for r in hand) == sorted(plan.rows(step))
        dealt += [row for hand in hands for row in hand]
    assert sorted(dealt) == sorted(order)


def test_balanced_hands_hold_nearly_the_same_number_of_tokens():
    lengths = np.random.default_rng(0).integers(5, 500, 1200)
    spread = {}
    for balance in (True, False):
        plan = EpochPlan(permutation(1200, 0), lengths, 8, 8, balance)
        loads = [[lengths[hand].sum() for hand in plan.deal(step)] for step in range(plan.steps - 1)]
        spread[balance] = np.mean([max(load) / np.mean(load) for load in loads])
    assert spread[True] < 1.02 < spread[False]


def test_split_is_by_hash_and_smaller_limits_are_nested():
    ids = [f"talk-{n}" for n in range(200)]
    train, held = split(ids, 0.1)
    assert len(held) == 20 and sorted([*train, *held]) == list(range(200))
    shuffled = [ids[n] for n in permutation(200, 5)]
    assert {shuffled[row] for row in split(shuffled, 0.1)[1]} == {ids[row] for row in held}
    small, large = (set(split(ids, 0.1, limit)[0].tolist()) for limit in (30, 90))
    assert len(small) == 30 and small < large < set(train.tolist())
    with pytest.raises(ValueError, match=r"limit_samples=181: there are 180"):
        split(ids, 0.1, 181)
    with pytest.raises(ValueError, match=r"validation_fraction=1\.0"):
        split(ids, 1.0)
    with pytest.raises(ValueError, match="leaves none"):
        split(["one"], 0.1)
