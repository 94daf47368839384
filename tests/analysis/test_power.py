"""From pilot runs to prompts and seeds: the variances of a difference, and the gap that they resolve."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.read import runs
from analysis.statistics.histograms import count
from analysis.statistics.pilot import Pilot, pilot
from analysis.statistics.training_seeds import SeedVariance
from analysis.tables import groups, power
from tests.analysis.synthetic import simulate, write_run


def test_the_resolved_gap_by_hand():
    known = Pilot(prompt=0.5, decoding=0.3, training=0.001, methods=4)
    over_prompts, over_seeds = 0.5 / 72 + 0.3 / (72 * 3), 2 * 0.001 / 3
    assert known.error(72, 3) == pytest.approx(np.sqrt(over_prompts + over_seeds))
    freedom = (over_prompts + over_seeds) ** 2 / (over_prompts**2 / 71 + over_seeds**2 / 8)
    t = stats.t.ppf(1 - 0.05 / 2 / 6, freedom) + stats.t.ppf(0.8, freedom)
    assert known.gap(72, 3, 0.8, 6) == pytest.approx(t * known.error(72, 3))


def test_the_fewest_prompts_are_the_fewest():
    known = Pilot(0.5, 0.3, 0.0004, 4)
    fewest = known.prompts_for(0.15, 3, 0.8, 6)
    assert known.gap(fewest, 3, 0.8, 6) <= 0.15 < known.gap(fewest - 1, 3, 0.8, 6)
    assert known.prompts_for(0.15, 10, 0.8, 6) < fewest
    assert known.prompts_for(0.05, 3, 0.8, 6) is None  # the trainings alone vary by more


def test_the_variances_are_those_that_the_rounds_were_drawn_with():
    """Three trainings of two methods on 4,000 prompts of ten rounds: accepted 0 or 1 with a chance of the prompt and
    method; sd of the chance .1 (method on prompt). decoding = sum over methods of E[p(1-p)] / 10; prompt = 2 x .1^2."""
    generator = np.random.default_rng(0)
    own, prompts = [], np.arange(4000)
    for _ in range(2):
        chance = np.clip(0.5 + generator.normal(0, 0.1, 4000), 0, 1)
        trained = []
        for _ in range(3):
            hits = generator.binomial(10, chance)
            cells = np.concatenate([prompts, prompts]), np.ones(8000, int), np.repeat([1, 0], 4000)
            trained.append(count(prompts, hits + 10, *cells, np.concatenate([hits, 10 - hits])))
        own.append([trained])
    found = pilot(*own, SeedVariance(np.float64(0.01), np.float64(4)), 2)
    assert found.decoding == pytest.approx(2 * (0.25 - 0.01) / 10, rel=0.05)
    assert found.prompt == pytest.approx(2 * 0.01, rel=0.15)
    assert (found.training, found.methods) == (0.01, 2)


def test_a_table_from_runs(tmp_path):
    for method in ("dspark", "dflash"):
        for seed in (0, 1):
            write_run(tmp_path, f"{method}-{seed}", simulate(method, 12, seed))
    found = groups.collect(runs.load(tmp_path))
    table = power.frame(found, 0.2, prompts=[50, 500], seeds=[3, 5])
    assert table["seeds"].tolist() == [3, 5] and (table["tests"] == 4).all()
    assert (table["gap_at_500"] <= table["gap_at_50"]).all()
    assert table["gap_at_50"].is_monotonic_decreasing
    (sheet,) = power.sheets(found, table)
    assert sheet.rows[0][0].text == "dflash - dspark" and "80% power at 5%" in sheet.notes[0]
    alone = groups.collect(runs.load(tmp_path).where("run=dspark-0,dflash-0"))
    with pytest.raises(ValueError, match="one training of each row tells nothing about other trainings"):
        power.frame(alone, 0.2)
    assert len(power.frame(alone, 0.2, spread=0.03, seeds=[3])) == 1
    with pytest.raises(ValueError, match="needs 3 trainings"):
        power.frame(found, 0.2, seeds=[2])
