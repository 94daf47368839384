"""Drafts without training: lossless through the whole loop, exact where the answer is known."""

import pytest
import torch
from scipy.stats import chisquare

from specbench.baselines import BASELINES, NGram, baseline, lookup
from specbench.blocks import Context
from specbench.decoding import Limits, decode, speculative_decode
from specbench.sampling import Sampling, warp
from tests import tiny

PROMPTS = [[5, 6, 7, 5, 6], [8, 9], [3, 4, 5, 6, 7, 8, 9, 10]]


def run(name, sampling, batch_size=1, prompts=PROMPTS, new=12, block_size=4):
    owner = tiny.target("qwen3")
    limits = Limits(max_new_tokens=new, batch_size=batch_size)
    own = {d.index: d.output_ids for d in decode(owner, prompts, sampling, limits)}
    draft = baseline(name, owner, block_size)
    return own, {d.index: d for d in speculative_decode(owner, draft, prompts, sampling, limits)}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_greedy_text_is_the_targets_own(name, batch_size):
    own, done = run(name, Sampling(), batch_size)
    assert {i: d.output_ids for i, d in done.items()} == own


def test_the_oracle_has_every_slot_accepted():
    _, done = run("oracle", Sampling(), batch_size=2)
    assert all(r.accepted == r.proposed == 4 for d in done.values() for r in d.rounds)


def test_lookup_proposes_what_followed():
    assert lookup([1, 2, 3, 4, 1, 2, 5, 1, 2], 2, longest=2) == [5, 1]  # the latest of two matches
    assert lookup([1, 2, 3, 4, 9, 2, 5, 1, 2], 2, longest=2) == [3, 4]  # the longer suffix before the later one
    assert lookup([1, 2, 3], 2, longest=3) == [3, 3]
    assert lookup([4], 1, longest=3) == [4]


def test_a_repeating_target_makes_lookup_accept():
    state = NGram(3).begin(_context(4), torch.tensor([[1, 2, 3, 1]]))
    proposal = NGram(3).propose(state, torch.tensor([2]), lambda logits: (logits.argmax(-1), None))
    assert proposal.tokens.tolist() == [[3, 1, 2]] and proposal.probabilities is None


@pytest.mark.parametrize("name", BASELINES)
def test_sampled_text_has_the_targets_law(name):
    """Chi-square on the second token, which a round decides: 400 draws, false alarm 1e-4, four merged classes."""
    owner, sampling = tiny.target("qwen3"), Sampling(1.0, top_k=4)
    prompts, limits = [[5, 6, 7, 5, 6]] * 400, Limits(max_new_tokens=2, batch_size=400)
    first = {d.index: d for d in speculative_decode(owner, baseline(name, owner, 2), prompts, sampling, limits)}
    pairs = [tuple(d.output_ids[:2]) for d in first.values()]
    head = max(set(p[0] for p in pairs), key=[p[0] for p in pairs].count)
    tokens = torch.tensor([[*prompts[0], head]])
    states = owner.states(tokens, torch.tensor([6]))
    law = warp(owner.logits(states.last[:, -1]), sampling)[0]
    seen = torch.bincount(torch.tensor([b for a, b in pairs if a == head]), minlength=len(law))
    support = law > 0
    assert int(seen[~support].sum()) == 0 and int(support.sum()) == 4
    expected = law[support].double() / law[support].double().sum() * int(seen.sum())
    assert chisquare(seen[support].numpy(), expected.numpy()).pvalue > 1e-4


def test_unknown_baselines_are_refused():
    with pytest.raises(ValueError, match="ngram, oracle"):
        baseline("nothing", tiny.target("qwen3"))


def _context(length):
    return Context(torch.zeros(1, length, 0, 2), torch.zeros(1, length, 2), torch.tensor([length]))
