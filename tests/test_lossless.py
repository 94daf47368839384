"""Sampled output of the whole decoding loop against the target's exact distribution, for every method.

The joint distribution of the first four tokens (625 texts) is enumerated from whole forward passes of a target of five
tokens; speculative_decode writes many texts from one prompt, in batches of 256, and a chi-square test compares. Texts
expected fewer than five times are pooled. False alarms: with other seeds, a correct loop would fail a single test with
probability 1e-4. The seeds are fixed, so a test that passes keeps passing.
"""

from __future__ import annotations

import os

import pytest
import torch
from scipy import stats

import specbench.decoding.loop
from specbench.decoding.cost_profile import CostProfile
from specbench.decoding.loop import Decoded, Limits, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.decoding.scheduling import DelayedGlobal, FixedLength, HardwareAware, Scheduler, StaticThreshold
from specbench.decoding.verification import verify
from tests import toys

ALARM = 1e-4
MOST = 100_000
# Of the long tests, but for those of every warping at once, which always take MOST; set 100000 for sharper ones.
MANY = int(os.environ.get("SPECBENCH_LOSSLESS_DRAWS", "20000"))
LENGTH, PROMPT = 4, [0, 3, 1]
PROFILE = CostProfile([1, 256, 512, 1100], [10.0, 9.0, 8.0, 2.0], "made up", "illustrative")
SAMPLINGS = {
    "warm": Sampling(1.0),
    "top-k": Sampling(0.8, top_k=3),
    "top-p": Sampling(1.2, top_p=0.8),
    "min-p": Sampling(0.7, min_p=0.1),
    "all": Sampling(1.5, top_k=4, top_p=0.9, min_p=0.05),
}
SCHEDULERS = {
    "fixed": FixedLength(),
    "fixed-1": FixedLength(1),
    "threshold": StaticThreshold(0.5),
    "cumulative": StaticThreshold(0.3, cumulative=True),
    "hardware": HardwareAware(PROFILE),
    "delayed": DelayedGlobal(PROFILE, delay=1),
}


def write(
    method: str, sampling: Sampling, scheduler: Scheduler, draws: int, seed: int = 0, **settings
) -> list[Decoded]:
    limits = Limits(LENGTH, batch_size=256)
    seeds = range(seed, seed + draws)
    draft = toys.draft(method, **settings)
    return list(speculative_decode(toys.target(), draft, [PROMPT] * draws, sampling, limits, seeds, scheduler))


def p_value(written: list[Decoded], sampling: Sampling) -> float:
    """Chi-square of the texts against the exact distribution; a text of probability zero gives 0."""
    distribution = toys.joint_distribution(PROMPT, LENGTH, sampling)
    places = torch.tensor([toys.VOCABULARY**k for k in reversed(range(LENGTH))])
    found = torch.bincount((torch.tensor([d.output_ids for d in written]) * places).sum(1), minlength=len(distribution))
    if found[distribution == 0].any():
        return 0.0
    expected = distribution * len(written)
    common = expected >= 5
    observed = torch.cat([found[common], found[~common].sum()[None]]).double()
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    if wanted[-1] < 5:  # too few even together: they join the smallest of the others
        smallest = wanted[:-1].argmin()
        for counts in (observed, wanted):
            counts[smallest] += counts[-1]
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) > 8, "too few texts to tell distributions apart"
    return float(stats.chisquare(observed.numpy(), (wanted * observed.sum() / wanted.sum()).numpy()).pvalue)


DEFAULT = [
    ("dflash", "top-p", "fixed"),
    ("dspark", "warm", "threshold"),
    ("dspark", "all", "hardware"),
    ("eagle3", "top-k", "fixed"),
    ("mtp", "min-p", "fixed-1"),
    ("dflash2", "warm", "fixed"),
    ("medusa", "warm", "fixed"),
    ("p_eagle", "top-k", "fixed"),
    pytest.param("eagle1", "top-p", "fixed", marks=pytest.mark.long),
    pytest.param("hydra", "top-k", "fixed", marks=pytest.mark.long),
    ("small", "warm", "fixed"),
]


@pytest.mark.parametrize(("method", "sampling", "scheduler"), DEFAULT)
def test_the_loop_has_the_targets_distribution(method, sampling, scheduler):
    written = write(method, SAMPLINGS[sampling], SCHEDULERS[scheduler], draws=2048)
    rounds = [r for d in written for r in d.rounds]
    share = sum(r.accepted for r in rounds) / sum(r.proposed for r in rounds)
    assert 0.2 < share < 0.95, "a draft that is always or never accepted tests half of the rule"
    assert p_value(written, SAMPLINGS[sampling]) > ALARM


def lenient(proposed, draft, target, lengths, uniforms):
    """Accepts with probability min(1, 1.5 q/p)."""
    return verify(proposed, draft, target, lengths, torch.cat([uniforms[:, :-1] / 1.5, uniforms[:, -1:]], 1))


@pytest.mark.parametrize("method", toys.METHODS)
def test_a_biased_acceptance_rule_is_found_out(method, monkeypatch):
    monkeypatch.setattr(specbench.decoding.loop, "verify", lenient)
    assert p_value(write(method, SAMPLINGS["warm"], FixedLength(), draws=2048), SAMPLINGS["warm"]) < ALARM


def test_a_scheduler_that_sees_the_token_it_judges_is_found_out(monkeypatch):
    """Cutting by the next slot's confidence has read this slot's token."""
    plain = StaticThreshold.choose

    def late(self, confidence, proposed, requests, accepted):
        return plain(self, torch.tensor(confidence).roll(-1, 1).numpy(), proposed, requests, accepted)

    monkeypatch.setattr(StaticThreshold, "choose", late)
    assert p_value(write("dspark", SAMPLINGS["warm"], StaticThreshold(0.5), draws=4096), SAMPLINGS["warm"]) < ALARM


@pytest.mark.parametrize("method", toys.CLASSES)
@pytest.mark.parametrize(
    "sampling",
    [pytest.param(name, marks=pytest.mark.long if name == "warm" else pytest.mark.nightly) for name in SAMPLINGS],
)
def test_the_distribution_with_many_draws(method, sampling):
    draws = max(MANY, MOST) if sampling == "all" else MANY
    written = write(method, SAMPLINGS[sampling], FixedLength(), draws=draws, seed=1 << 20)
    assert p_value(written, SAMPLINGS[sampling]) > ALARM


@pytest.mark.long
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_distribution_under_every_scheduler_with_many_draws(scheduler):
    written = write("dspark", SAMPLINGS["warm"], SCHEDULERS[scheduler], draws=MANY, seed=1 << 21)
    assert p_value(written, SAMPLINGS["warm"]) > ALARM


@pytest.mark.long
@pytest.mark.parametrize(
    "settings", [{"markov_head": "gated"}, {"markov_head": "rnn"}, {"confidence_with_markov": False}], ids=str
)
def test_the_distribution_under_other_heads_with_many_draws(settings):
    written = write("dspark", SAMPLINGS["all"], SCHEDULERS["threshold"], draws=MANY, **settings)
    assert p_value(written, SAMPLINGS["all"]) > ALARM
