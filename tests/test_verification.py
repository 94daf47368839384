"""Verification: the distribution of its output, measured exactly on toy vocabularies.

Nothing is sampled. Every proposal is enumerated with its probability; for each, the chance of accepting a slot and the
distribution of the next token are found by bisecting verify() on its uniforms, to 1e-12. Summed over all proposals and
continued with the target's own tokens, they must be the target's joint distribution of K+1 tokens.

A model is a list of conditional distributions: entry k has shape (V,) * k + (V,), the distribution of token k+1 given
the k before it.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from specbench.decoding.sampling import draw
from specbench.decoding.verification import verify, verify_greedy

STEPS = 44  # bisections: 2^-44 < 1e-13


def model(vocabulary: int, slots: int, seed: int, sharpness: float = 1.0, zeros: float = 0.0) -> list[torch.Tensor]:
    """Random conditional distributions; `zeros` is the share of tokens that get no mass (never all of them)."""
    generator = torch.Generator().manual_seed(seed)
    distributions = []
    for k in range(slots):
        logits = sharpness * torch.randn((vocabulary,) * (k + 1), generator=generator, dtype=torch.float64)
        keep = torch.rand(logits.shape, generator=generator) >= zeros
        keep[..., 0] |= ~keep.any(-1)
        distributions.append(logits.masked_fill(~keep, -torch.inf).softmax(-1))
    return distributions


def along(distributions: list[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Conditional distributions (R, len(distributions), V) met along each row of tokens."""
    return torch.stack(
        [distribution[tuple(tokens[:, :k].T)].expand(len(tokens), -1) for k, distribution in enumerate(distributions)],
        1,
    )


def least(condition, shape: tuple[int, ...]) -> torch.Tensor:
    """The smallest u in [0, 1] from which a monotone condition(u) no longer holds, by bisection."""
    low, high = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    for _ in range(STEPS):
        middle = (low + high) / 2
        holds = condition(middle)
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return high


def committed_distribution(rule, p, q, lengths_of=None) -> torch.Tensor:
    """The joint distribution (V,) * (K+1) of what a round commits, continued by the target to K+1 tokens.

    `p=None`: a deterministic draft proposes token (k mod V) at slot k. `lengths_of(tokens)` cuts each proposal.
    """
    K, V = len(q) - 1, q[0].shape[0]
    if p is None:
        tokens, weight = torch.arange(K)[None] % V, torch.ones(1, dtype=torch.float64)
        proposal = None
    else:
        tokens = torch.tensor(list(itertools.product(range(V), repeat=K)), dtype=torch.long).view(V**K, K)
        proposal = along(p, tokens) if K else torch.zeros(1, 0, V, dtype=torch.float64)
        weight = proposal.gather(-1, tokens[..., None])[..., 0].prod(-1)
    target = along(q, tokens)
    lengths = torch.full((len(tokens),), K) if lengths_of is None else lengths_of(tokens)
    uniforms = torch.zeros(len(tokens), K + 1, dtype=torch.float64)

    def run(changed: torch.Tensor, rows=slice(None)):
        return rule(
            tokens[rows], proposal if proposal is None else proposal[rows], target[rows], lengths[rows], changed
        )

    chance = torch.zeros(len(tokens), K + 1, dtype=torch.float64)  # of accepting slot k, given those before it
    for k in range(K):

        def accepts(u, k=k):
            return run(uniforms.index_copy(1, torch.tensor([k]), u[:, None]))[0] > k

        found = least(accepts, (len(tokens),))
        chance[:, k] = torch.where(lengths > k, torch.where(found < 1e-12, 0.0, found), 0.0)
    # Slots are judged apart: any uniforms accept just the leading slots whose uniform lies below the slot's chance.
    mixed = torch.rand(uniforms.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(run(mixed)[0], (mixed < chance).cumprod(-1).sum(-1))
    total = torch.zeros((V,) * (K + 1), dtype=torch.float64)
    for a in range(K + 1):
        reached = weight * chance[:, :a].prod(-1) * (1 - chance[:, a])
        rows = (reached > 1e-12).nonzero().flatten().tolist()
        fixed = uniforms.clone()
        fixed[:, a:K] = 1 - 2**-53
        everyone, token = torch.arange(len(tokens)).repeat_interleave(V), torch.arange(V).repeat(len(tokens))

        def at_most(u, fixed=fixed, everyone=everyone, token=token):
            return run(torch.cat([fixed[everyone, :K], u[:, None]], 1), everyone)[1] <= token

        below = least(at_most, everyone.shape).view(-1, V)
        following = below.diff(dim=1, prepend=torch.zeros_like(below[:, :1]))
        for row in rows:
            prefix = tuple(tokens[row, :a].tolist())
            for v in range(V):
                mass = reached[row] * following[row, v]
                total[(*prefix, v)] += mass * continuation(q, (*prefix, v))
    return total


def continuation(q: list[torch.Tensor], prefix: tuple[int, ...]) -> torch.Tensor:
    """The target's joint distribution of the tokens after `prefix`, up to the last of q."""
    joint = torch.ones((), dtype=torch.float64)
    for k in range(len(prefix), len(q)):
        joint = joint[..., None] * q[k][prefix]
    return joint


CASES = {
    "random": (model(4, 2, 0), model(4, 3, 1)),
    "three slots": (model(3, 3, 2, 2.0), model(3, 4, 3, 2.0)),
    "eight tokens": (model(8, 1, 4, 2.0), model(8, 2, 5, 2.0)),
    "truncated": (model(4, 2, 6, zeros=0.4), model(4, 3, 7, zeros=0.4)),
    "equal": (model(4, 2, 8), [*model(4, 2, 8), model(4, 3, 9)[2]]),
    "disjoint": ([torch.tensor([1.0, 0, 0]).double()], [torch.tensor([0, 0.3, 0.7]).double(), model(3, 2, 10)[1]]),
    "one-hot distributions": ([torch.eye(3)[1].double()], model(3, 2, 11)),
    "deterministic draft": (None, model(4, 3, 12)),
    "no slot": ([], model(5, 1, 13)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_committed_has_the_targets_distribution(case):
    p, q = CASES[case]
    torch.testing.assert_close(committed_distribution(verify, p, q), continuation(q, ()), atol=1e-9, rtol=0)


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("deterministic", [False, True])
def test_any_prefix_of_the_proposal_may_be_verified(length, deterministic):
    p, q = None if deterministic else model(4, 2, 20), model(4, 3, 21)
    found = committed_distribution(verify, p, q, lambda tokens: torch.full((len(tokens),), length))
    torch.testing.assert_close(found, continuation(q, ()), atol=1e-9, rtol=0)


def test_a_cut_may_read_the_tokens_before_the_slot_and_no_others():
    p, q = model(4, 2, 22), model(4, 3, 23)
    before = committed_distribution(verify, p, q, lambda tokens: 1 + (tokens[:, 0] < 2).long())
    torch.testing.assert_close(before, continuation(q, ()), atol=1e-9, rtol=0)
    own = committed_distribution(verify, p, q, lambda tokens: 2 * (tokens[:, 0] < 2).long())
    assert (own - continuation(q, ())).abs().max() > 1e-2


def test_the_papers_counterexample():
    """Appendix A: cutting token 0's proposals turns the target's (0.7, 0.3) into (0.85, 0.15)."""
    p, q = (
        [torch.tensor([0.5, 0.5], dtype=torch.float64)],
        [torch.tensor([0.7, 0.3], dtype=torch.float64), torch.full((2, 2), 0.5).double()],
    )
    kept = committed_distribution(verify, p, q).sum(1)
    assert kept.tolist() == pytest.approx([0.7, 0.3], abs=1e-9)
    cut = committed_distribution(verify, p, q, lambda tokens: (tokens[:, 0] == 0).long()).sum(1)
    assert cut.tolist() == pytest.approx([0.85, 0.15], abs=1e-9)


def lenient(proposed, draft, target, lengths, uniforms):
    """Accepts too much: with probability min(1, 1.25 q/p)."""
    return verify(proposed, draft, target, lengths, torch.cat([uniforms[:, :-1] * 0.8, uniforms[:, -1:]], 1))


def uncorrected(proposed, draft, target, lengths, uniforms):
    """Draws the next token from the target itself after a rejection."""
    accepted, _ = verify(proposed, draft, target, lengths, uniforms)
    return accepted, draw(target[torch.arange(len(target)), accepted], uniforms[:, -1])


@pytest.mark.parametrize("rule", [lenient, uncorrected])
@pytest.mark.parametrize("case", ["random", "three slots", "deterministic draft"])
def test_a_biased_rule_is_found_out(rule, case):
    p, q = CASES[case]
    assert (committed_distribution(rule, p, q) - continuation(q, ())).abs().max() > 1e-3


def test_rows_are_verified_apart():
    """A batch with rows of every length, proposal padding included, equals its rows one by one."""
    p, q = model(4, 3, 30), model(4, 4, 31)
    tokens = torch.tensor(list(itertools.product(range(4), repeat=3)))
    lengths = torch.arange(len(tokens)) % 4
    uniforms = torch.rand(len(tokens), 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draft, target = along(p, tokens), along(q, tokens)
    together = verify(tokens, draft, target, lengths, uniforms)
    for row, length in enumerate(lengths.tolist()):
        one, keep = slice(row, row + 1), slice(0, length)
        drawn = torch.cat([uniforms[one, keep], uniforms[one, -1:]], 1)
        alone = verify(tokens[one, keep], draft[one, keep], target[one, : length + 1], lengths[one], drawn)
        assert [x[row].item() for x in together] == [x.item() for x in alone]


def test_greedy_is_the_same_distribution_on_one_hot_laws():
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(0, 3, (200, 4), generator=generator)
    proposed = torch.randint(0, 3, (200, 3), generator=generator)
    lengths = torch.randint(0, 4, (200,), generator=generator)
    uniforms = torch.rand(200, 4, generator=generator, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(target, 3).double()
    greedy, distribution = verify_greedy(proposed, target, lengths), verify(proposed, None, one_hot, lengths, uniforms)
    assert torch.equal(greedy[0], distribution[0]) and torch.equal(greedy[1], distribution[1])
    expected = [
        next((k for k in range(n) if x[k] != y[k]), n)
        for x, y, n in zip(proposed.tolist(), target.tolist(), lengths.tolist(), strict=True)
    ]
    assert greedy[0].tolist() == expected
