"""Claims about methods: the variance between trainings, intervals with it, verdicts, and how often they are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from analysis.read import runs
from analysis.statistics import intervals as statistics
from analysis.statistics import training_seeds
from analysis.statistics.histograms import Counts, Sums, count
from analysis.statistics.intervals import Difference
from analysis.statistics.training_seeds import SeedVariance
from analysis.tables import frames as tables
from analysis.tables import groups, tiers
from analysis.tables import sheets as layout
from tests.analysis.synthetic import simulate, write_run

SLOTS = 4


def trained(generator: np.random.Generator, ease: np.ndarray, sd: float, seeds: int, rounds: int = 25) -> list[Counts]:
    """One method trained `seeds` times: each training moves the chance of every slot by its own amount."""
    made = []
    for shift in generator.normal(0, sd, seeds):
        prompt = np.repeat(np.arange(len(ease)), rounds)
        chance = np.clip(ease + shift, 0.02, 0.98)[prompt, None]
        accepted = (generator.random((len(prompt), SLOTS)) < chance).cumprod(1).sum(1)
        committed = np.bincount(prompt, accepted + 1, minlength=len(ease))
        ones = np.ones_like(prompt)
        made.append(count(np.arange(len(ease)), committed, prompt, SLOTS * ones, accepted, ones))
    return made


def pooled(seeds: list[Counts]) -> Counts:
    """All trainings of a method, with a prompt's rounds in one row."""
    fields = ("committed", "rounds", "proposed", "accepted", "offered", "reached", "passed")
    return Counts(seeds[0].prompts, *(sum(getattr(counts, field) for counts in seeds) for field in fields))


def test_the_variance_between_trainings_is_what_prompts_do_not_explain():
    """By the analysis of variance of a table training x prompt (a ratio, linearised), written out in loops."""
    generator = np.random.default_rng(1)
    seeds = trained(generator, generator.beta(5, 3, 200), 0.008, 4)
    found = training_seeds.of_quantities(seeds, {"": lambda sums: sums.accepted_length})[""]
    lengths = [counts.committed.sum() / counts.rounds.sum() for counts in seeds]
    own = [(c.committed - length * c.rounds) / c.rounds.sum() for c, length in zip(seeds, lengths, strict=True)]
    noise = 0.0
    for column in zip(*own, strict=True):  # the residuals of one prompt over the trainings
        mean = sum(column) / 4
        noise += sum((value - mean) ** 2 for value in column) / 3
    raw = sum((length - sum(lengths) / 4) ** 2 for length in lengths) / 3
    assert found.freedom == 3
    # The bootstrap's variance is known to 4.5% of the part that it estimates.
    assert found.variance == pytest.approx(raw - noise, abs=4 * 0.045 * noise)
    assert 0.1 * raw < noise < raw


def test_variances_are_pooled_by_their_degrees_of_freedom():
    parts = [SeedVariance(np.float64(0.04), np.float64(2)), SeedVariance(np.float64(-0.01), np.float64(4))]
    found = training_seeds.pooled([*parts, training_seeds.UNKNOWN])
    assert found.freedom == 6 and found.variance == pytest.approx((0.08 - 0.04) / 6)
    assert training_seeds.pooled(parts[1:]).variance == 0  # no variance is below zero once it is used
    assert not training_seeds.pooled([training_seeds.UNKNOWN]).known
    curves = [SeedVariance(np.array([1.0, 2.0]), np.array([2.0, 2.0])), SeedVariance(np.array([3.0]), np.array([2.0]))]
    np.testing.assert_allclose(training_seeds.pooled(curves).variance, [2.0, 2.0])


def test_the_interval_of_a_method_by_hand():
    variance = SeedVariance(np.float64(0.01), np.float64(8))
    low, high = training_seeds.widened(2.0, 1.9, 2.2, variance, 2 / 3)
    more = stats.t.ppf(0.975, 8) ** 2 * 0.01 * 2 / 3
    assert (low, high) == (pytest.approx(2 - math.sqrt(0.01 + more)), pytest.approx(2 + math.sqrt(0.04 + more)))
    assert np.isnan(training_seeds.widened(2.0, 1.9, 2.2, training_seeds.UNKNOWN, 1.0)).all()


def test_p_inverts_the_interval():
    assert statistics.p_value(0.3, 0.3, 11, 12) == pytest.approx(0.05)
    for value in (0.29, 0.31):
        assert (statistics.p_value(value, 0.3, 11, 12) < 0.05) == (value > 0.3)
    # Half of the quantile's reach: t = t_0.975 / 2, by scipy.
    assert statistics.p_value(-0.15, 0.3, 11, 12) == pytest.approx(2 * stats.t.sf(stats.t.ppf(0.975, 11) / 2, 11))
    assert statistics.p_value(9.0, 0.1, 4, 5) == 2**-4  # five prompts swap signs in 32 ways, two of them as far out
    assert statistics.p_value(0.0, 0.1, 4, 5) == 1.0 and math.isnan(statistics.p_value(1.0, float("nan"), 4, 5))


def test_a_method_without_variance_between_trainings_has_the_verdict_of_its_checkpoints():
    found = Difference(0.2, 0.05, 0.36, 0.01, 24, 1.0, 24, (0.14, 0.16))
    found = Difference(**{**found.__dict__, "p": statistics.p_value(0.2, 0.15, 23, 24)})
    own = training_seeds.of_checkpoints(found)
    same = training_seeds.of_methods(found, SeedVariance(np.float64(0.0), np.float64(4)), 2 / 3)
    assert own.p_least < own.p < own.p_most
    for name in ("low", "high", "p", "p_least", "p_most"):
        assert getattr(same, name) == pytest.approx(getattr(own, name))
    wider = training_seeds.of_methods(found, SeedVariance(np.float64(0.01), np.float64(4)), 2 / 3)
    assert wider.low < own.low and wider.p > own.p
    assert (wider.p < 0.05) == (wider.low > 0)


def test_an_interval_about_methods_covers_and_one_about_checkpoints_does_not():
    """300 pairs of equal methods, 100 prompts, three trainings each whose chance of a slot differs by sd .03 (accepted
    length by .1). An interval that covers 95% leaves [.90, .99] with probability 2e-4, before the seed was fixed."""
    generator = np.random.default_rng(2)
    inside = {"checkpoints": 0, "methods": 0}
    for trial in range(300):
        ease = generator.beta(5, 3, 100)
        pair = [trained(generator, ease, 0.03, 3, 10) for _ in range(2)]
        a, b = ([pooled(seeds)] for seeds in pair)
        found = statistics.difference(a, b, 400, trial)
        quantity = {"": lambda sums: sums.accepted_length}
        variance = training_seeds.pooled([training_seeds.of_quantities(seeds, quantity, trial)[""] for seeds in pair])
        verdict = training_seeds.of_methods(found, variance, 2 / 3)
        inside["checkpoints"] += found.low <= 0 <= found.high
        inside["methods"] += verdict.low <= 0 <= verdict.high
    assert inside["checkpoints"] / 300 < 0.85
    assert 0.90 <= inside["methods"] / 300 <= 0.99


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for method in ("dspark", "dflash"):
        for seed in (0, 1, 2):
            write_run(root, f"{method}-{seed}", simulate(method, 20, seed))
    return groups.collect(runs.load(root))


def test_three_trainings_make_a_table_about_methods(found):
    pairs = tables.differences(found, 400)
    lengths, macros = tables.accepted_length(found, 400), tables.macro_average(found, 400)
    (sheet,) = layout.main(found, lengths, macros, pairs)
    assert tiers.of_methods(found)
    notes = " ".join(sheet.notes)
    assert "about this method" in notes and "3 trainings each" in notes
    # Two methods in three benchmarks and their macro average; the macro of one benchmark is not a test of its own.
    assert "after Holm's correction over the 4 tests of this table" in notes
    row = lengths[(lengths["method"] == "dspark") & (lengths["benchmark"] == "gsm8k")].iloc[0]
    assert row["method_low"] <= row["low"] and row["method_high"] >= row["high"]
    shown = sheet.rows[1][1].text
    assert shown == f"{row['accepted_length']:.2f} [{row['method_low']:.2f}, {row['method_high']:.2f}]"
    assert all(cell.best for cell in sheet.rows[1][1:5]) and not any(cell.best for cell in sheet.rows[0])
    assert pairs["resolved"].all() and set(pairs["note"]) == {"resolved"}


def test_holm_is_over_the_whole_table(found):
    frame = tables.differences(found, 400)
    tests = frame.drop_duplicates("benchmark")
    assert len(tests) == 4 and len(frame) == 7
    for tier in ("p", "p_method"):
        order = tests[tier].sort_values().tolist()
        steps = [min(1.0, max((4 - k) * order[k] for k in range(last + 1))) for last in range(4)]
        assert sorted(tests[f"{tier}_holm"]) == pytest.approx(steps)
    macro = frame[(frame["scope"] == "macro") & (frame["domain"] == "math")].iloc[0]
    assert macro["p_method_holm"] == frame[frame["benchmark"] == "gsm8k"].iloc[0]["p_method_holm"]


def test_a_verdict_that_the_bootstrap_does_not_decide_is_called_borderline(monkeypatch, found):
    """A difference that reaches zero within the uncertainty of its bound: one draw more or less turns it."""
    real = statistics.difference

    def at_the_edge(*args, **kwargs):
        made = real(*args, **kwargs)
        far = abs(made.value)
        return Difference(**{**made.__dict__, "low": made.value - far * 0.99, "high": made.value + far * 0.99,
                             "p": statistics.p_value(made.value, far * 0.99, made.fewest - 1, made.fewest),
                             "reaches": (far * 0.97, far * 1.01)})  # fmt: skip

    monkeypatch.setattr(statistics, "difference", at_the_edge)
    monkeypatch.setattr(training_seeds, "pooled", lambda parts: SeedVariance(np.float64(0.0), np.float64(4)))
    frame = tables.differences(found, 50, holm=False)
    assert frame["resolved"].all() and frame["borderline"].all() and set(frame["note"]) == {"resolved, borderline"}


def test_curves_of_methods_hold_those_of_checkpoints(found):
    frame = tables.conditional_acceptance(found, 200)
    known = frame.dropna(subset=["low"])
    assert (known["method_low"] <= known["low"] + 1e-12).all() and (known["method_high"] >= known["high"] - 1e-12).all()
    assert known["method_low"].ge(0).all() and known["method_high"].le(1).all()
    for _, curve in frame.groupby(["method", "benchmark"]):
        for bound in ("survival_low", "survival_high", "survival_method_low", "survival_method_high"):
            assert (np.diff(curve[bound].dropna()) <= 0).all(), bound


def test_trainings_that_decoded_other_prompts_are_compared_on_the_common_ones():
    generator = np.random.default_rng(3)
    seeds = trained(generator, generator.beta(5, 3, 60), 0.05, 3)
    part = [seeds[0].take(np.arange(40)), seeds[1].take(np.arange(20, 60)), seeds[2]]
    common = [counts.take(np.arange(20, 40)) for counts in seeds]
    quantity = {"": lambda sums: sums.accepted_length}
    assert training_seeds.of_quantities(part, quantity) == training_seeds.of_quantities(common, quantity)
    assert not training_seeds.of_quantities([seeds[0], seeds[1].take(np.arange(0))], quantity)[""].known
    assert isinstance(common[0].total(), Sums)
