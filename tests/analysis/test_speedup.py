"""Measured speedups: values by hand, and coverage of the interval."""

import numpy as np
import pytest

from analysis.statistics.speedup import by_benchmark, speedup


def batch(first, tokens, fast, slow, committed=6, rounds=3, prompts=1):
    times = {"speculative_tokens": tokens, "speculative_seconds": fast, "plain_tokens": tokens, "plain_seconds": slow}
    return {"first": first, "prompts": prompts, "committed": committed, "rounds": rounds, **times}


def test_a_speedup_is_a_ratio_of_sums():
    found = speedup([batch(0, 10, 1.0, 2.0), batch(1, 30, 4.0, 4.0)])
    assert found.value == pytest.approx((40 / 5) / (40 / 6))
    assert found.low <= found.value <= found.high
    alone = speedup([batch(0, 10, 1.0, 2.0)])
    assert alone.value == 2 and np.isnan(alone.low) and np.isnan(alone.high)


def test_every_benchmark_has_its_own_and_a_mixed_batch_is_of_none():
    rows = [batch(0, 10, 1, 2), batch(1, 10, 1, 3, committed=8), batch(2, 10, 1, 1), batch(3, 10, 5, 1, prompts=2)]
    found = by_benchmark(rows, ["math", "math", "code", "code", "math"])
    assert list(found) == ["code", "math"]
    assert found["math"]["speedup"] == pytest.approx(2.5) and found["math"]["prompts"] == 2
    assert found["math"]["accepted_length"] == pytest.approx(14 / 6)
    assert found["code"]["speedup"] == 1 and found["code"]["speedup_low"] is None


def test_the_interval_covers_the_speedup_of_the_population():
    """Of 300 experiments with 20 prompts 90% to 96% was covered over seeds 0 to 5 (94% with the seed used here)."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(300):
        slow = generator.gamma(4.0, 0.5, 20)
        gain = generator.lognormal(0.3, 0.3, 20)
        rows = [batch(i, 64, s / g, s) for i, (s, g) in enumerate(zip(slow, gain, strict=True))]
        # E[slow] / E[slow / gain] of independent factors.
        truth = 1 / np.exp(-0.3 + 0.3**2 / 2)
        covered += truth in speedup(rows, resamples=400)
    assert covered / 300 > 0.91
