"""Schedulers: the distribution of the output computed exactly, algorithm 1 against brute force, and the cost."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import configs
from specbench.decoding.cost_profile import CostProfile
from specbench.decoding.scheduling import (
    DelayedGlobal,
    FixedLength,
    HardwareAware,
    OracleScheduler,
    StaticThreshold,
    prefix_schedule,
    prefix_schedule_reference,
    survival,
    thresholded,
)

APPENDIX_A = CostProfile([1, 2, 3], [1.0, 0.5, 0.45], "appendix A", "illustrative")


def outcome_distribution(q, p, slots, confidence, choose):
    """The exact distribution of the first slots + 1 tokens of every request after one round and plain decoding from
    there.

    q[v], p[v]: target and draft over a small vocabulary, the same at every position. `confidence(x)` is the row of a
    request whose draft tokens are x; `choose` maps rows (R, K) to lengths (R,). Returns the chance of
    every outcome (the tokens of all requests).
    """
    residual = np.maximum(q - p, 0)
    residual = residual / residual.sum() if residual.sum() else q
    tokens = range(len(q))

    def one(x, length):
        """[(committed, chance)] of a request given its draft tokens and its length."""
        paths, alive = [], 1.0
        for k in range(length):
            keep = min(1.0, q[x[k]] / p[x[k]])
            paths += [((*x[:k], v), alive * (1 - keep) * residual[v]) for v in tokens]
            alive *= keep
        return paths + [((*x[:length], v), alive * q[v]) for v in tokens]

    def completed(paths):
        for committed, chance in paths:
            for rest in itertools.product(tokens, repeat=slots + 1 - len(committed)):
                yield committed + rest, chance * float(np.prod([q[v] for v in rest]))

    distribution = {}
    requests = choose.requests
    for drafts in itertools.product(itertools.product(tokens, repeat=slots), repeat=requests):
        chance = float(np.prod([p[v] for x in drafts for v in x]))
        lengths = choose(np.array([confidence(x) for x in drafts]))
        parts = [list(completed(one(x, int(n)))) for x, n in zip(drafts, lengths, strict=True)]
        for combination in itertools.product(*parts):
            outcome = tuple(text for text, _ in combination)
            distribution[outcome] = distribution.get(outcome, 0.0) + chance * float(
                np.prod([c for _, c in combination])
            )
    return distribution


def choosing(scheduler, requests, slots):
    def choose(confidence):
        proposed = np.full(requests, slots)
        return scheduler.lengths(confidence, proposed, requests=range(requests))

    choose.requests = requests
    return choose


def first_token(distribution):
    marginal = np.zeros(2)
    for (text,), chance in distribution.items():
        marginal[text[0]] += chance
    return marginal


def knowing(x):
    """c_1 is the true acceptance 0.8; c_2 reads x_1, as a Markov confidence head does."""
    return [0.8, 1.0 if x[0] == 0 else 0.0]


def test_appendix_a_early_stop_keeps_the_distribution():
    q, p = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    distribution = outcome_distribution(q, p, 2, knowing, choosing(HardwareAware(APPENDIX_A), 1, 2))
    np.testing.assert_allclose(first_token(distribution), [0.7, 0.3], atol=1e-12)


def test_appendix_a_undelayed_global_search_breaks_it():
    q, p = np.array([0.7, 0.3]), np.array([0.5, 0.5])

    def choose(confidence):
        return prefix_schedule(confidence, np.array([2]), APPENDIX_A, early_stop=False)

    choose.requests = 1
    np.testing.assert_allclose(first_token(outcome_distribution(q, p, 2, knowing, choose)), [0.85, 0.15], atol=1e-12)


def test_appendix_a_delayed_global_search_keeps_it():
    q, p = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    for history in itertools.product([knowing((0, 0)), knowing((1, 0))], repeat=2):
        scheduler = DelayedGlobal(APPENDIX_A)

        def choose(confidence, scheduler=scheduler, history=history):
            scheduler.reset()
            for row in history:
                scheduler.lengths(np.array([row]), np.array([2]), requests=[0])
            return scheduler.lengths(confidence, np.array([2]), requests=[0])

        choose.requests = 1
        np.testing.assert_allclose(first_token(outcome_distribution(q, p, 2, knowing, choose)), [0.7, 0.3], atol=1e-12)


SCHEDULERS = [
    FixedLength(1),
    FixedLength(),
    StaticThreshold(0.5),
    StaticThreshold(0.4, cumulative=True),
    HardwareAware(CostProfile([1, 2, 3, 4, 6], [1.0, 0.85, 0.6, 0.55, 0.3], "jagged", "illustrative")),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: s.label)
@pytest.mark.parametrize("requests", [1, 2])
def test_lossless_schedulers_keep_the_joint_distribution_of_all_requests(scheduler, requests):
    """Exact: three-token vocabulary for one request, two for a pair; any confidence that reads x_1..x_{k-1}."""
    vocabulary = 3 if requests == 1 else 2
    generator = np.random.default_rng(7)
    for _ in range(12 if requests == 1 else 4):
        q, p = generator.dirichlet(np.ones(vocabulary), 2)
        first, second = generator.random(), generator.random(vocabulary)
        distribution = outcome_distribution(
            q, p, 2, lambda x, a=first, b=second: [a, b[x[0]]], choosing(scheduler, requests, 2)
        )
        for outcome, chance in distribution.items():
            expected = np.prod([q[v] for text in outcome for v in text])
            assert chance == pytest.approx(expected, abs=1e-12)


def test_a_rule_that_reads_one_confidence_too_many_is_caught():
    """Negative control: a rule for slot k that reads c_{k+1}."""

    def choose(confidence):
        return (confidence[:, 1:] > 0.5).cumprod(1).sum(1)

    choose.requests = 1
    distribution = outcome_distribution(np.array([0.7, 0.3]), np.array([0.5, 0.5]), 2, knowing, choose)
    assert abs(first_token(distribution)[0] - 0.7) > 0.1


def tables(requests, slots):
    return st.lists(
        st.lists(st.floats(0, 1, width=32), min_size=slots, max_size=slots), min_size=requests, max_size=requests
    )


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(SHAPES.flatmap(lambda s: st.tuples(tables(*s), st.data())))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_global_search_is_brute_force_and_early_stop_is_where_the_objective_is_unimodal(drawn):
    rows, data = drawn
    confidence = np.array(rows, dtype=np.float64)
    requests, slots = confidence.shape
    proposed = np.array([data.draw(st.integers(0, slots)) for _ in range(requests)])
    total = int(proposed.sum())
    a = survival(confidence, proposed)
    ranked = np.sort(a[a >= 0])[::-1]
    tau = requests + np.concatenate([[0.0], np.cumsum(ranked)])
    unimodal = data.draw(st.booleans())
    if unimodal:  # an objective that rises to a peak and falls, and the SPS(B) that makes it
        rises = data.draw(st.integers(0, total))
        values = np.concatenate(
            [1 + 0.1 * np.arange(rises + 1), 1 + 0.1 * rises - 0.07 * np.arange(1, total - rises + 1)]
        )
    else:
        values = np.array([data.draw(st.floats(0.2, 3.0)) for _ in range(total + 1)])
    assume((values > 0.05).all())
    profile = CostProfile(range(requests, requests + total + 1), values / tau, "drawn", "illustrative")

    def objective(lengths):
        gain = sum(a[r, :n].sum() for r, n in enumerate(lengths))
        return (requests + gain) * profile.rates(requests, int(sum(lengths)))[-1]

    best = max(map(objective, itertools.product(*(range(n + 1) for n in proposed))))
    found = prefix_schedule(confidence, proposed, profile, early_stop=False)
    assert objective(found) == pytest.approx(best, rel=1e-9)
    greedy = prefix_schedule(confidence, proposed, profile)
    assert (greedy >= 0).all() and (greedy <= proposed).all()
    if unimodal:
        assert objective(greedy) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("early_stop", [True, False])
def test_the_fast_schedule_is_algorithm_1_word_for_word(early_stop):
    generator = np.random.default_rng(3)
    for trial in range(200):
        requests, slots = generator.integers(1, 9), generator.integers(1, 8)
        confidence = generator.random((requests, slots)) ** generator.choice([0.1, 0.5, 1.0])
        if trial % 3 == 0:  # many ties, zeros and ones among them
            confidence = generator.choice([0.0, 0.5, 1.0], (requests, slots))
        proposed = generator.integers(0, slots + 1, requests)
        rates = 1 / (1 + 0.02 * np.arange(64) + 0.1 * generator.random(64))
        profile = CostProfile(range(1, 101), np.interp(np.arange(100), np.arange(64), rates), "random", "illustrative")
        fast = prefix_schedule(confidence, proposed, profile, early_stop)
        slow = prefix_schedule_reference(confidence, proposed, profile, early_stop)
        np.testing.assert_array_equal(fast, slow)


def test_light_load_verifies_more_than_heavy_load():
    tokens = np.arange(1, 2049)
    profile = CostProfile(tokens, 1 / np.maximum(0.01, 5e-5 * tokens), "knee at 200", "illustrative")
    confidence = np.tile([0.9, 0.85, 0.8, 0.8, 0.75, 0.7, 0.7], (200, 1))
    light = prefix_schedule(confidence[:8], np.full(8, 7), profile)
    heavy = prefix_schedule(confidence, np.full(200, 7), profile)
    np.testing.assert_array_equal(light, 7)  # 8 x 8 tokens stay on the flat part, where verifying is free
    np.testing.assert_array_equal(heavy, 0)  # past the knee a draft token of a < 1 costs a whole sure one


def test_threshold_cuts_at_the_first_slot_below_and_never_beyond_the_proposal():
    c = np.array([[0.9, 0.5, 0.95], [0.2, 0.9, 0.9], [0.6, 0.6, 0.6]])
    full = np.array([3, 3, 3])
    np.testing.assert_array_equal(thresholded(c, full, 0.55), [1, 0, 3])
    np.testing.assert_array_equal(thresholded(c, full, 0.5), [3, 0, 3])  # not below: stays
    np.testing.assert_array_equal(thresholded(c, full, 0.4, cumulative=True), [3, 0, 1])
    np.testing.assert_array_equal(thresholded(c, np.array([2, 3, 1]), 0.0), [2, 3, 1])
    np.testing.assert_array_equal(FixedLength(2).lengths(None, np.array([3, 1, 0])), [2, 1, 0])


def test_delayed_global_plans_on_confidences_two_rounds_old():
    profile = CostProfile([1, 4], [1.0, 0.5], "two sizes", "illustrative")
    scheduler, full = DelayedGlobal(profile), np.array([3])
    high, low = np.array([[0.99, 0.99, 0.99]]), np.array([[0.01, 0.01, 0.01]])
    plans = [int(scheduler.lengths(row, full, requests=["a"])[0]) for row in (high, low, low, low, high)]
    assert plans == [3, 3, 3, 0, 0]  # rounds 1 and 2 have no plan; 3 sees round 1 (high), 4 and 5 see low ones
    assert scheduler.lengths(low, full, requests=["b"])[0] == 3  # another request, its first round
    assert scheduler.lengths(low, full, requests=["a"])[0] == 3  # who left and came back begins anew


def test_errors_say_what_to_do_instead():
    full = np.array([3])
    with pytest.raises(ValueError, match=r"confidence head.*scheduler=fixed"):
        StaticThreshold(0.5).lengths(None, full)
    with pytest.raises(ValueError, match="delay=0"):
        DelayedGlobal(APPENDIX_A, delay=0)
    with pytest.raises(ValueError, match=r"threshold=1.5"):
        StaticThreshold(1.5)
    with pytest.raises(ValueError, match="recorded rounds only"):
        OracleScheduler().lengths(None, full)
    with pytest.raises(ValueError, match=r"covers 1 to 3 tokens.*asked for 1 to 4"):
        HardwareAware(APPENDIX_A).lengths(np.full((1, 3), 0.5), full)
    assert not OracleScheduler.lossless
    np.testing.assert_array_equal(OracleScheduler().lengths(None, np.array([3, 1]), accepted=np.array([2, 2])), [2, 1])


def test_256_requests_of_7_slots_cost_well_under_a_millisecond():
    """The best of many calls, bounded at ten times what an idle core needs, so that a busy machine passes."""
    tokens = np.arange(1, 2049)
    profile = CostProfile(tokens, 1 / (0.01 + 2e-5 * tokens), "smooth", "illustrative")
    confidence, proposed = np.random.default_rng(0).random((256, 7)) ** 0.2, np.full(256, 7)
    best = np.inf
    for _ in range(200):
        start = time.perf_counter()
        prefix_schedule(confidence, proposed, profile)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3


@pytest.mark.parametrize("name", ["fixed", "threshold", "cumulative_threshold", "hardware_aware", "delayed_global"])
@pytest.mark.parametrize("profile", ["h200_smooth", "h200_jagged"])
def test_every_committed_scheduler_config_builds_and_schedules(name, profile):
    overrides = [f"+scheduler={name}"]
    if name in ("hardware_aware", "delayed_global"):
        overrides.append(f"profile@scheduler.profile={profile}")
    with initialize_config_dir(str(Path(configs.__file__).parent), version_base="1.3"):
        scheduler = instantiate(compose(overrides=overrides).scheduler)
    lengths = scheduler.lengths(np.full((2, 7), 0.9), np.array([7, 3]), requests=[0, 1])
    assert lengths[0] >= 3 and lengths[1] == 3
    if hasattr(scheduler, "profile"):
        assert scheduler.profile.source == "illustrative" and "made up" in scheduler.profile.label
