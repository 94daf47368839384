"""Successive halving over learning rates: many short trainings, of which the better half is trained twice as long,
and so on (K. Jamieson, A. Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2016).

Every training of a rung is whole, with its own warm-up and decay, because a rate is judged by a finished schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specbench.ranges import Count, LearningRate


@dataclass(frozen=True)
class Trial:
    """One training: its learning rate, its optimiser steps, and the accepted length on held-out prompts."""

    lr: float
    steps: int
    accepted_length: float


def grid(center: LearningRate, span: float, trials: Count) -> list[float]:
    """`trials` rates from center / span to center * span, equal factors apart.

    Raises:
        ValueError: `span` is not above 1, or `trials` is below 2.
    """
    if span <= 1 or trials < 2:
        raise ValueError(f"span={span}, trials={trials}: give a span above 1 and at least 2 trials")
    return [center * span ** (2 * i / (trials - 1) - 1) for i in range(trials)]


def rungs(trials: Count, steps: Count) -> list[tuple[int, int]]:
    """(trainings, optimiser steps of each) of every rung, the last with `steps` steps.

    >>> rungs(8, 400)
    [(8, 100), (4, 200), (2, 400)]
    """
    counts = [trials]
    while counts[-1] > 3:
        counts.append(-(-counts[-1] // 2))
    return [(count, max(1, steps >> (len(counts) - 1 - i))) for i, count in enumerate(counts)]


def search(rates: Sequence[float], steps: Count, train: Callable[[float, int], float]) -> tuple[float, list[Trial]]:
    """The best rate, and every trial in order. `train(lr, steps)` returns the accepted length on held-out prompts.

    The better half of a rung goes on; of equal ones the rate nearest to the middle of the grid.
    """
    middle = math.sqrt(min(rates) * max(rates))
    alive, trials = list(rates), []
    for count, length in rungs(len(rates), steps):
        rung = [Trial(lr, length, train(lr, length)) for lr in sorted(alive[:count])]
        trials += rung
        ranked = sorted(rung, key=lambda trial: (-trial.accepted_length, abs(math.log(trial.lr / middle))))
        alive = [trial.lr for trial in ranked]
    return alive[0], trials
