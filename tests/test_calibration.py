"""Calibration against independent computations, known temperatures, and its refusal to judge itself."""

import json

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import mannwhitneyu
from torchmetrics.functional.classification import binary_calibration_error

from specbench.decoding.calibration import GRID, Calibrated, Calibration, by_slot, fit, probabilities, reliability
from specbench.decoding.calibration_error import calibration_noise
from specbench.decoding.scheduling import HardwareAware, StaticThreshold
from specbench.evaluation.recorded_rounds import digest, flatten, from_lines, read_rounds, split


def drawn(rounds=20_000, slots=3, seed=0, sharpness=(1.0, 1.0, 1.0)):
    """Rounds whose true conditional acceptance is sigmoid(z); the head reports z * sharpness."""
    generator = np.random.default_rng(seed)
    z = generator.normal(0.8, 1.2, (rounds, slots))
    kept = (generator.random((rounds, slots)) < expit(z)).cumprod(1)
    return z * np.asarray(sharpness[:slots]), kept.sum(1), np.full(rounds, slots)


def names(rounds, first=0):
    return [f"{first + r // 10:016x}" for r in range(rounds)]


def test_ece_is_torchmetrics_ece():
    generator = np.random.default_rng(1)
    predicted = generator.random(3000) * 0.999
    observed = generator.random(3000) < predicted**2
    expected = binary_calibration_error(
        torch.from_numpy(predicted), torch.from_numpy(observed.astype(np.int64)), n_bins=20, norm="l1"
    )
    assert reliability(predicted, observed).ece == pytest.approx(float(expected), abs=1e-6)


def test_reliability_by_hand():
    diagram = reliability(np.array([0.0, 0.04, 0.05, 1.0]), np.array([False, True, True, True]))
    assert diagram.count.tolist() == [2, 1, *[0] * 17, 1]
    assert diagram.predicted[[0, 1, 19]].tolist() == pytest.approx([0.02, 0.05, 1.0])
    assert diagram.observed[[0, 1, 19]].tolist() == [0.5, 1.0, 1.0]
    assert diagram.ece == pytest.approx((2 * 0.48 + 0.95 + 0.0) / 4)


def test_slot_numbers_against_scipy_and_by_hand():
    logits, accepted, _ = drawn(800)
    proposed = np.random.default_rng(5).integers(1, 4, 800)
    accepted = np.minimum(accepted, proposed)
    rows = by_slot(expit(logits), accepted, proposed)
    for k, row in enumerate(rows, start=1):
        seen = proposed >= k
        p, y = np.prod(expit(logits[seen, :k]), axis=1), accepted[seen] >= k
        u = mannwhitneyu(p[y], p[~y]).statistic
        assert row["n"] == seen.sum() and row["survival"] == pytest.approx(y.mean())
        assert row["auroc"] == pytest.approx(u / (y.sum() * (~y).sum()), abs=1e-6)
        assert row["brier"] == pytest.approx(np.mean((p - y) ** 2))
        assert sum(row["reliability"]["count"]) == row["n"]


def test_a_perfect_head_stays_in_the_band_of_noise_and_has_no_error_without_it():
    """200 perfect heads on 300 rounds of 30 prompts: the ECE is about .08 and exceeds its 95% band in 5% of them (above
    22 with probability 1e-4), and the interval of the error without noise holds zero (below 178 likewise)."""
    generator = np.random.default_rng(4)
    above, zero, errors, floors = 0, 0, [], []
    for _ in range(200):
        predicted = generator.random(300)
        observed = generator.random(300) < predicted
        noise = calibration_noise(predicted, observed, names(300))
        errors.append(float(reliability(predicted, observed).ece))
        floors.append(noise.floor)
        above += errors[-1] > noise.band
        zero += noise.low == 0
    assert np.mean(errors) == pytest.approx(0.076, abs=0.01) and np.mean(floors) == pytest.approx(0.076, abs=0.01)
    assert above <= 22 and zero >= 178


def test_the_error_without_noise_covers_the_true_one():
    """A head that says .1, .5 or .9 where .2, .5 and .8 of the rounds are accepted, by prompts of several eases: the
    true root mean square is sqrt(2/3) / 10. 200 experiments; below 178 with probability 1e-4 for an interval of 95%."""
    generator = np.random.default_rng(5)
    inside, estimates = 0, []
    for _ in range(200):
        said = generator.choice([0.1, 0.5, 0.9], 600)
        chance = np.select([said == 0.1, said == 0.9], [0.2, 0.8], 0.5) + np.repeat(generator.normal(0, 0.05, 60), 10)
        noise = calibration_noise(said, generator.random(600) < chance, names(600))
        inside += noise.low <= np.sqrt(2 / 3) / 10 <= noise.high
        estimates.append(noise.rms)
    assert inside >= 178 and np.mean(estimates) == pytest.approx(np.sqrt(2 / 3) / 10, abs=0.005)


def test_the_squared_error_without_noise_by_hand():
    """Two prompts in one bin: residuals 2 of 4 rounds and 0 of 4. Bias 2/8, of which each is 1 off; variance 2 (1 + 1)
    / 64."""
    said = np.full(8, 0.5)
    observed = np.array([1, 1, 1, 1, 1, 1, 0, 0], dtype=bool)
    noise = calibration_noise(said, observed, ["a"] * 4 + ["b"] * 4, bins=1)
    assert noise.rms == pytest.approx(np.sqrt(max(0, (2 / 8) ** 2 - 2 * 2 / 64)))
    assert noise.floor == pytest.approx(np.sqrt(2) * np.mean([2, 0]) / 8, rel=0.1)
    assert np.isnan(calibration_noise(said, observed, ["a"] * 8).rms)
    with pytest.raises(ValueError, match="no observation of this slot"):
        calibration_noise(said[:0], observed[:0], [])


def test_a_slot_that_was_not_proposed_is_not_observed():
    confidence = np.array([[0.9, 0.9], [0.9, np.nan]])
    rows = by_slot(confidence, np.array([2, 1]), np.array([2, 1]))
    assert [row["n"] for row in rows] == [2, 1] and rows[1]["survival"] == 1.0 and rows[1]["auroc"] is None
    rows = by_slot(confidence, np.array([1, 1]), np.array([1, 1]))
    assert rows[1]["n"] == 0 and rows[1]["ece"] is None


def test_sequential_scaling_finds_the_temperatures_that_spoiled_each_slot():
    """20,000 rounds; the head is 2.5x, 0.5x and 1.6x too sharp. The grid's step is 2.3%, sampling allows 15%."""
    sharpness = (2.5, 0.5, 1.6)
    logits, accepted, proposed = drawn(sharpness=sharpness)
    fitted = fit(logits, accepted, proposed, names(len(logits)))
    np.testing.assert_allclose(fitted.temperatures, sharpness, rtol=0.15)
    assert fitted.at_edge == () and fitted.observations == (20_000,) * 3
    other, accepted, proposed = drawn(seed=9, sharpness=sharpness)
    rows = fitted.judge(other, accepted, proposed, names(len(other), first=10**6))
    before, after = rows[:3], rows[3:]
    assert not any(r["calibrated"] for r in before) and all(r["calibrated"] for r in after)
    for b, a in zip(before, after, strict=True):
        assert a["ece"] < 0.02 < b["ece"]
        assert a["survival"] == b["survival"]


def test_each_step_is_the_grid_minimum_with_earlier_slots_held():
    """Against torchmetrics' error over the whole grid, slot by slot."""
    logits, accepted, proposed = drawn(600, sharpness=(2.0, 0.7, 1.0))
    grid = GRID[::20]
    fitted = fit(logits, accepted, proposed, names(600), grid=grid)
    for k in range(3):
        held = np.prod(expit(logits[:, :k] / np.asarray(fitted.temperatures[:k])), axis=1)
        y = torch.from_numpy((accepted >= k + 1).astype(np.int64))
        errors = {
            t: float(binary_calibration_error(torch.from_numpy(held * expit(logits[:, k] / t)), y, n_bins=20))
            for t in grid
        }
        assert errors[fitted.temperatures[k]] == pytest.approx(min(errors.values()), abs=1e-6)


def test_an_honest_head_keeps_temperature_one_on_ties_and_edges_are_reported():
    certain = np.full((50, 1), 40.0)  # any temperature of the grid leaves it in the last bin; the smallest change wins
    assert fit(certain, np.ones(50, np.int64), np.ones(50, np.int64), names(50), grid=(0.5, 1.0, 0.9)).temperatures == (
        1.0,
    )
    wrong = np.tile([[3.0]], (100, 1))  # says 95%, half are accepted: the flattest temperature is best and not enough
    edge = fit(wrong, np.arange(100) % 2, np.ones(100, np.int64), names(100))
    assert edge.at_edge == (1,) and edge.temperatures[0] == max(GRID)


def test_it_refuses_to_judge_what_it_was_fitted_on(tmp_path):
    logits, accepted, proposed = drawn(200)
    fitted = fit(logits, accepted, proposed, names(200))
    mixed = [*names(190, first=10**6), *names(10)]
    with pytest.raises(ValueError, match=r"1 of 20 prompts were used to fit"):
        fitted.judge(logits, accepted, proposed, mixed)
    fitted.save(tmp_path / "calibration.json")
    loaded = Calibration.load(tmp_path / "calibration.json")
    assert loaded == fitted  # prompts and the fingerprint of the rounds included
    with pytest.raises(ValueError, match="used to fit"):
        loaded.judge(logits, accepted, proposed, names(200))


def test_the_fingerprint_tells_the_fitted_rounds_apart():
    logits, accepted, proposed = drawn(200)
    marks = {fit(logits, accepted, proposed, names(200)).fingerprint for _ in range(2)}
    accepted[7] = 3 - accepted[7]
    assert len(marks | {fit(logits, accepted, proposed, names(200)).fingerprint}) == 2


def test_errors_name_the_remedy(tmp_path):
    logits, accepted, _ = drawn(20)
    with pytest.raises(ValueError, match=r"slot 3 was never proposed in the 20 rounds.*scheduler=fixed"):
        fit(logits, np.minimum(accepted, 2), np.full(20, 2), names(20))
    fitted = fit(logits, accepted, np.full(20, 3), names(20))
    with pytest.raises(ValueError, match=r"holds 3 slots.*has 4"):
        fitted.apply(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="specbench calibrate"):
        Calibration.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text(json.dumps({"schema": "x"}))
    with pytest.raises(ValueError, match=r"specbench\.calibration/1"):
        Calibration.load(tmp_path / "other.json")


def test_calibrated_scheduler_sees_scaled_confidences():
    logits = np.array([[2.0, 2.0], [0.0, np.inf]])
    calibration = Calibration((4.0, 0.5), frozenset(), "", (1, 1))
    scheduler = Calibrated(StaticThreshold(0.7), calibration)
    assert StaticThreshold(0.7).lengths(expit(logits), np.array([2, 2])).tolist() == [2, 0]
    assert scheduler.lengths(expit(logits), np.array([2, 2])).tolist() == [0, 0]  # sigmoid(0.5) = 0.62
    assert Calibrated(StaticThreshold(0.6), calibration).lengths(expit(logits), np.array([2, 2])).tolist() == [2, 0]
    assert scheduler.lossless and "calibrated" in scheduler.label
    np.testing.assert_allclose(calibration.apply(logits)[:, 0], expit([0.5, 0.0]))
    np.testing.assert_allclose(probabilities(logits), expit(logits))
    assert HardwareAware.needs_confidence


LINE = {"prompt_ids": [1, 2], "output_ids": [5, 6, 7, 8, 9], "proposed": [2, 2], "accepted": [2, 0]}
LINE |= {"seconds": [0.1, 0.1], "confidence": [[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]]}


def test_rounds_come_back_from_disk(tmp_path):
    short = {**LINE, "prompt_ids": [3], "proposed": [1], "accepted": [1], "seconds": [0.2], "confidence": [[0.5]]}
    short["output_ids"] = [4, 4]  # the accepted token was a stop token: one committed, no bonus
    empty = {**LINE, "prompt_ids": [9], "output_ids": [5], "proposed": [], "accepted": [], "seconds": []}
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (LINE, short, empty)))
    first, second = read_rounds(tmp_path)
    assert (first.tokens, second.tokens) == (4, 1)
    assert first.prompt == digest([1, 2]) != second.prompt
    rounds = flatten([first, second])
    assert rounds.logits.shape == (3, 3) and np.isnan(rounds.logits[2, 1:]).all()
    assert rounds.prompts == (first.prompt, first.prompt, second.prompt)


def test_turns_of_a_conversation_are_one_prompt():
    where = [{"benchmark": b, "prompt_id": "7", "turn": t} for b, t in (("a", 0), ("b", 0), ("a", 1), ("b", 1))]
    read = from_lines([{**LINE, **w, "prompt_ids": [i]} for i, w in enumerate(where)])
    assert [p.prompt for p in read] == [digest([0]), digest([1])] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accepted": [3, 0]}, "more than it proposed"),
        ({"accepted": [1]}, "2 proposals, 1 acceptances"),
        ({"output_ids": [1, 2, 5, 6, 7, 8, 9]}, "without the prompt"),
        ({"confidence": [[1.0], [0.0, 1.0]]}, "2 slots proposed and 1 confidences"),
        ({"confidence": [[1.0, 2.0, 3.0]]}, "`confidence` is not one list of numbers per round"),
        ({"confidence": [["a"], [True]]}, "`confidence` is not one list of numbers per round"),
        *(
            ({key: value}, f"line 1: `{key}` is not a list of numbers")
            for key in ("proposed", "accepted", "seconds", "prompt_ids", "output_ids")
            for value in (None, 3, "3", [True], [None], ["1"], [-1], {"a": 1})
        ),
        *(({key: [1.5, 2]}, f"line 1: `{key}` is not a list of numbers") for key in ("proposed", "prompt_ids")),
        ({"proposed": [10**400, 1]}, "`proposed` holds a number of 2"),
    ],
)
def test_damaged_rounds_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_lines([{**LINE, **change}])


def test_split_keeps_a_repeated_prompt_on_one_side():
    prompts = from_lines([{**LINE, "prompt_ids": [i // 2]} for i in range(20)])
    left, right = split(prompts, 0.3)
    assert (len(left), len(right)) == (6, 14)
    assert not {p.prompt for p in left} & {p.prompt for p in right}
    assert [p.prompt for p in split(prompts, 0.3, seed=1)[0]] != [p.prompt for p in left]
    with pytest.raises(ValueError, match="one side empty"):
        split(prompts[:2], 0.5)
