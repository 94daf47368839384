"""Quantities by hand: three prompts, a round list each."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from scipy import optimize

from analysis.statistics.histograms import Counts, Sums, count, join
from specbench.metrics.functional import suffix_decay

ROUNDS = {
    "a": [(3, 3), (3, 0), (3, 2)],  # commits 4 + 1 + 3 = 8
    "b": [(2, 1)],  # a shortened proposal: commits 2
    "c": [],
}


def counts(rounds=ROUNDS, stops=0) -> Counts:
    cells = [(i, p, a, 1) for i, own in enumerate(rounds.values()) for p, a in own]
    committed = np.array([sum(a + 1 for _, a in own) for own in rounds.values()], float)
    committed[0] -= stops
    columns = np.array(cells, int).reshape(-1, 4).T
    return count(np.array(list(rounds)), committed, *columns)


def test_known_answers():
    made = counts()
    total = made.total()
    assert made.prompts.tolist() == ["a", "b", "c"]
    assert made.rounds.tolist() == [3, 1, 0]
    assert total.accepted_length == 10 / 4
    assert total.accepted_length_per_prompt == pytest.approx((8 / 3 + 2) / 2)  # c has no ratio of its own
    assert total.acceptance_rate == 6 / 11
    assert total.verified_per_round == (11 + 4) / 4
    assert total.offered.tolist() == [4, 4, 3]
    assert total.reached.tolist() == [4, 3, 2]  # b's round stopped being offered at slot 3
    assert total.passed.tolist() == [3, 2, 1]
    assert total.survival.tolist() == [3 / 4, 2 / 4, 1 / 3]
    assert total.conditional.tolist() == [3 / 4, 2 / 3, 1 / 2]


def test_a_stop_token_takes_the_bonus_away():
    assert counts(stops=1).total().accepted_length == 9 / 4


def test_nothing_decoded_gives_no_number():
    total = counts({"a": [], "b": []}).total()
    assert np.isnan(total.accepted_length) and np.isnan(total.accepted_length_per_prompt)
    assert total.conditional.shape == (0,) and np.isnan(total.suffix_decay)


def test_suffix_decay_maximises_the_likelihood_of_the_counts():
    conditional, n = np.array([0.9, 0.8, 0.5, 0.4]), np.array([100.0, 60.0, 30.0, 2.0])
    slot, passed = np.arange(1, 5), conditional * n

    def unlikely(parameters):
        rate = parameters[0] + parameters[1] * slot
        return -(passed * rate - n * np.exp(rate)).sum()

    best = optimize.minimize(unlikely, [0.0, 0.0], tol=1e-12).x
    assert suffix_decay(conditional, n) == pytest.approx(best[1], abs=1e-5)


def test_suffix_decay_of_a_geometric_curve_is_its_rate():
    conditional = 0.9 * np.exp(-0.07 * np.arange(6))
    assert suffix_decay(conditional, np.full(6, 10.0)) == pytest.approx(-0.07, abs=1e-12)


def test_suffix_decay_counts_slots_where_nothing_was_accepted():
    conditional, n = np.array([0.8, 0.6, 0.0, np.nan]), np.array([10.0, 8.0, 4.0, 0.0])
    without = suffix_decay(conditional[:2], n[:2])
    assert without == pytest.approx(np.log(0.6 / 0.8)) and suffix_decay(conditional, n) < without
    assert suffix_decay(conditional[:3], n[:3]) == suffix_decay(
        conditional, n
    )  # a slot without a round changes nothing
    assert np.isnan(suffix_decay(np.array([0.8]), np.array([5.0])))


def test_equal_to_a_loop_over_rounds():
    generator = np.random.default_rng(0)
    rounds = {f"p{i}": [] for i in range(9)}
    for name in list(rounds)[:-1]:
        for _ in range(generator.integers(0, 12)):
            proposed = int(generator.integers(1, 6))
            rounds[name].append((proposed, int(generator.integers(0, proposed + 1))))
    naive: dict[str, dict[int, int]] = {key: defaultdict(int) for key in ("offered", "reached", "passed")}
    for proposed, accepted in (pair for own in rounds.values() for pair in own):
        for slot in range(1, 6):
            naive["offered"][slot] += proposed >= slot
            naive["reached"][slot] += proposed >= slot and accepted >= slot - 1
            naive["passed"][slot] += accepted >= slot
    total = counts(rounds).total()
    for key, by_slot in naive.items():
        assert getattr(total, key).tolist() == [by_slot[slot] for slot in range(1, 6)]


def test_records_of_one_prompt_are_one_cluster():
    made = count(
        np.array(["a", "b", "a"]), np.array([3, 2, 1]), *np.array([[0, 2, 2, 1], [1, 1, 0, 1], [2, 1, 1, 1]]).T
    )
    assert made.prompts.tolist() == ["a", "b"]
    assert made.committed.tolist() == [4, 2] and made.rounds.tolist() == [2, 1]


def test_join_keeps_sums_and_pads_slots():
    one, two = counts(), counts({"d": [(5, 4)]})
    joined = join([one, two])
    assert joined.prompts.tolist() == ["a", "b", "c", "d"] and joined.slots == 5
    assert joined.total().passed.tolist() == [4, 3, 2, 1, 0]
    assert joined.total().accepted_length == 15 / 5


def test_take_reorders_rows():
    part = counts().take(np.array(["b", "a"]))
    assert part.rounds.tolist() == [1, 3]
    assert Sums(part.features().sum(0)).accepted_length == 10 / 4
