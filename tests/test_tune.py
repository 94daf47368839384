"""Successive halving over learning rates."""

from itertools import pairwise

import pytest

from specbench.training.successive_halving import grid, rungs, search


def test_rates_are_equal_factors_apart():
    assert grid(2e-3, 4.0, 3) == pytest.approx([5e-4, 2e-3, 8e-3])
    found = grid(1e-3, 4.0, 8)
    assert [b / a for a, b in pairwise(found)] == pytest.approx([16 ** (1 / 7)] * 7)
    with pytest.raises(ValueError, match=r"span=1.0, trials=3"):
        grid(1e-3, 1.0, 3)


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        (2, [(2, 400)]),
        (3, [(3, 400)]),
        (4, [(4, 200), (2, 400)]),
        (8, [(8, 100), (4, 200), (2, 400)]),
        (9, [(9, 100), (5, 200), (3, 400)]),
    ],
)
def test_rungs(trials, expected):
    assert rungs(trials, 400) == expected


def test_the_better_half_goes_on_and_the_best_of_the_last_rung_is_taken():
    """An accepted length whose best rate moves with the steps: what is best at once is not what is best at the end."""
    asked = []

    def train(lr, steps):
        asked.append((lr, steps))
        best = {100: 3.9, 200: 2.9, 400: 2.9}[steps]
        return -abs(lr - best)

    best, trials = search([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 400, train)
    assert asked == [*((float(lr), 100) for lr in range(1, 9)), *((lr, 200) for lr in (2.0, 3.0, 4.0, 5.0))] + [
        (lr, 400) for lr in (2.0, 3.0)
    ]
    assert best == 3.0 and len(trials) == 14
    assert trials[2].accepted_length == pytest.approx(-0.9) and trials[2].lr == 3.0


def test_of_equal_rates_the_middle_one_is_taken():
    assert search([4.0, 1.0, 2.0], 10, lambda lr, steps: 2.0)[0] == 2.0
