"""Convergence: the slope at the end of a training, its interval and verdict; nested schedules of the learning rate."""

import numpy as np
import pytest

from specbench.losses.objective import Objective
from specbench.training.convergence import FEWEST, convergence, slope_of_ratios
from specbench.training.draft_training import DraftTraining, warmup_constant
from tests import toys


def probes(steps, gain, prompts=400, noise=0.3, seed=0, jitter=0.0):
    """Counts of a draft whose accepted length grows by `gain` per doubling, from 3 at step 100; each prompt has its own
    level, the same at every probe, and its own number of rounds."""
    generator = np.random.default_rng(seed)
    rounds, own = generator.integers(5, 30, prompts), generator.normal(0, noise, prompts)
    found = []
    for step in steps:
        length = 3 + gain * np.log2(step / 100) + own + generator.normal(0, jitter, prompts)
        found.append(np.stack([np.rint(100 * rounds * length), 100 * rounds], 1).astype(int))
    return found


def test_the_slope_is_the_gain_per_doubling_of_the_last_half():
    steps = [25, 50, 100, 150, 200]
    counts = probes(steps, 0.4)
    counts[0][:, 0] = 0  # an early probe, which takes no part
    found = convergence(steps, counts)
    assert found.gain_per_doubling == pytest.approx(0.4, abs=0.01)
    assert (found.probes, found.prompts, found.converged) == (3, 400, False)
    assert "not converged" in found.text
    still = convergence(steps, probes(steps, 0.0))
    assert still.converged and still.gain_high < 0.06
    assert convergence([50, 200], probes([50, 200], 0.1)) is None  # one probe in the last half
    assert convergence([], []) is None
    assert convergence([100, 200], probes([100, 200], 0.0, FEWEST - 1)) is None


def test_few_prompts_cannot_certify():
    """The same flat curve, measured with noise of its own at each probe: with few prompts the interval is too wide."""
    steps = [100, 150, 200]
    few, many = (convergence(steps, probes(steps, 0.0, count, jitter=0.5)) for count in (6, 3000))
    assert not few.converged and many.converged
    assert few.gain_high - few.gain_low > 5 * (many.gain_high - many.gain_low)


def test_the_interval_covers_the_slope_over_prompts():
    """Against the jackknife, and by simulation: 95% intervals hold the true gain about as often."""
    steps = [100, 140, 200]
    counts = [np.array(c, float) for c in probes(steps, 0.2, 40, jitter=0.3)]
    x = np.log2(steps)
    upper, lower = np.stack([c[:, 0] for c in counts]), np.stack([c[:, 1] for c in counts])
    without = [slope_of_ratios(x, np.delete(upper, i, 1), np.delete(lower, i, 1))[0] for i in range(40)]
    jackknife = np.sqrt(39 / 40 * ((np.array(without) - np.mean(without)) ** 2).sum())
    assert slope_of_ratios(x, upper, lower)[1] == pytest.approx(jackknife, rel=0.05)
    held = [
        found.gain_low <= 0.2 <= found.gain_high
        for seed in range(600)
        for found in [convergence(steps, probes(steps, 0.2, 12, seed=seed, jitter=0.3))]
    ]
    assert 0.92 < np.mean(held) < 0.98


def test_a_short_training_is_the_prefix_of_a_longer_one():
    """With a constant rate and a warm-up in steps: equal rates up to the decay of the shorter one, then to 0."""
    short, long = ([warmup_constant(step, total, 12, 0.2) for step in range(total)] for total in (200, 600))
    assert short[:161] == long[:161] and short[12:161] == [1.0] * 149
    assert short[161] < 1 and short[-1] == pytest.approx(1 / 40) and long[161:481] == [1.0] * 320
    assert warmup_constant(200, 200, 12, 0.2) == 0
    draft = toys.draft("mtp")
    loss = Objective(ce=1.0, slot_weight="uniform")
    module = DraftTraining(draft, loss, target_tables=draft.tables, max_steps=200, decay=0.2, warmup_steps=12)
    module.steps_in_all, module.warmup = 200, 12
    assert [module.rate(step) for step in range(200)] == short
    assert module.hparams["training"]["decay"] == 0.2
    assert "decay" not in DraftTraining(draft, loss, target_tables=draft.tables, max_steps=2).hparams["training"]
