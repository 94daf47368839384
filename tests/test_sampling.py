"""Warping and drawing against exact cases and a plain implementation, one distribution at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from specbench.decoding import sampling
from specbench.decoding.sampling import Sampler, Sampling, draw, warp

HALVES = torch.tensor([0.5, 0.25, 0.125, 0.125])


def warped(**settings) -> list[float]:
    return warp(HALVES.log(), Sampling(**{"temperature": 1.0, **settings})).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 4}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_k": 99}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.501}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.75}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.76}, [4 / 7, 2 / 7, 1 / 7, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"min_p": 0.5}, [2 / 3, 1 / 3, 0, 0]),
        ({"min_p": 0.51}, [1, 0, 0, 0]),
        ({"min_p": 0.25}, [0.5, 0.25, 0.125, 0.125]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        # The order: temperature first, then top-k, whose survivors are normalised before top-p counts their mass.
        ({"temperature": 0.5, "top_p": 0.7}, [1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 2.0, "min_p": 0.7}, [math.sqrt(2) / (1 + math.sqrt(2)), 1 / (1 + math.sqrt(2)), 0, 0]),
    ],
    ids=str,
)
def test_exact_cases(settings, expected):
    assert warped(**settings) == pytest.approx(expected, abs=1e-6)


def plain(logits: list[float], sampling: Sampling) -> list[float]:
    """The same by sorting and loops."""
    size = len(logits)
    order = sorted(range(size), key=lambda i: (-logits[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = {i: math.exp((logits[i] - max(logits)) / sampling.temperature) for i in order}
    total = sum(weights.values())
    kept, mass = {}, 0.0
    for i in order:
        if mass < sampling.top_p:
            kept[i] = weights[i] / total
        mass += weights[i] / total
    largest = max(kept.values())
    kept = {i: p for i, p in kept.items() if p >= sampling.min_p * largest}
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(size)]


def test_every_combination_equals_the_plain_implementation():
    generator = np.random.default_rng(0)
    for _ in range(300):
        sampling = Sampling(
            temperature=float(generator.choice([0.3, 1.0, 2.5])),
            top_k=int(generator.choice([0, 1, 3, 10])),
            top_p=float(generator.choice([1.0, 0.9, 0.35])),
            min_p=float(generator.choice([0.0, 0.03, 0.4])),
        )
        logits = generator.normal(0, 2, 12).astype(np.float32)
        found = warp(torch.from_numpy(logits), sampling).tolist()
        assert found == pytest.approx(plain(logits.tolist(), sampling), abs=1e-5), sampling


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.999])
def test_top_p_after_top_k_is_exactly_the_sort_of_the_whole_vocabulary(top_p):
    """Many equal logits, so that the order of equal tokens counts."""
    logits = (torch.randn(6, 4096, generator=torch.Generator().manual_seed(3)) * 2).round() / 2
    left = (logits / 0.7).topk(50, -1).indices
    masked = torch.full_like(logits, -torch.inf).scatter_(-1, left, (logits / 0.7).gather(-1, left)).softmax(-1)
    whole = sampling._nucleus(masked, top_p, None)
    assert torch.equal(sampling._nucleus(masked, top_p, left), whole)
    assert torch.equal(warp(logits, Sampling(0.7, 50, top_p)), whole / whole.sum(-1, keepdim=True))


def test_equal_logits_leave_exactly_k_tokens():
    found = warp(torch.zeros(6), Sampling(1.0, top_k=4))
    assert sorted(found.tolist()) == pytest.approx([0, 0, 0.25, 0.25, 0.25, 0.25])


def test_rows_are_warped_apart_and_in_fp32():
    logits = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    sampling = Sampling(0.7, top_k=20, top_p=0.9, min_p=0.02)
    together = warp(logits, sampling)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.sum(-1), torch.ones(3, 5))
    for b in range(3):
        for s in range(5):
            torch.testing.assert_close(together[b, s], warp(logits[b, s], sampling), atol=0, rtol=1e-6)


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-45, 1e-40, 1e-38, 1e-30, 1e-20, 1e-12])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}])
def test_tiny_temperatures_take_the_largest_logit(temperature, settings):
    logits = 20 * torch.randn(50, 3, 40, generator=torch.Generator().manual_seed(5))
    logits[:, :, 7] = -torch.inf
    found = warp(logits, Sampling(temperature, **settings))
    assert torch.equal(found, warp(logits, Sampling(0.0)))
    tokens, _ = Sampler(Sampling(temperature, **settings), range(50))(logits)
    assert torch.equal(tokens, logits.argmax(-1))
    tied = warp(torch.tensor([[2.0, 5.0, 5.0, -1.0]]), Sampling(temperature))
    torch.testing.assert_close(tied, torch.tensor([[0.0, 0.5, 0.5, 0.0]]))


@pytest.mark.parametrize("temperature", [1e5, 1e6])
def test_huge_temperatures_flatten_the_distribution(temperature):
    logits = torch.randn(20, 40, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(warp(logits, Sampling(temperature)), torch.full((20, 40), 1 / 40), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"temperature": math.nan},
        {"temperature": math.inf},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)


def test_draw_inverts_the_cumulative_distribution():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities.expand(6, -1), uniforms).tolist() == [1, 1, 3, 3, 4, 4]


def test_draw_never_gives_a_token_of_probability_zero():
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.tensor([0.0, 2**-60, 0.5, 1 - 2**-24, 1 - 2**-52, 1 - 2**-53], dtype=torch.float64)
    for size in (1, 2, 7, 151_936):
        for share in (0.0, 0.5, 0.999):
            weights = torch.rand(size, generator=generator)
            weights[torch.rand(size, generator=generator) < share] = 0
            weights[int(size * 0.4)] = 1e-6  # never all zero, and sometimes alone and tiny
            probabilities = weights / weights.sum()
            tokens = draw(probabilities.expand(len(uniforms), -1), uniforms)
            assert (probabilities[tokens] > 0).all(), (size, share)


def test_draws_have_the_distribution_they_are_drawn_from():
    """A grid of uniforms gives each token its probability, to the width of the grid."""
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = torch.bincount(draw(probabilities.expand(10_000, -1), uniforms), minlength=4)
    assert counts.tolist() == pytest.approx([1000, 0, 6000, 3000], abs=1)


def test_a_request_does_not_depend_on_its_neighbours():
    logits = torch.randn(4, 6, 20, generator=torch.Generator().manual_seed(1))
    seeds, sampling = [11, 5, 11, 2**63], Sampling(1.0, top_p=0.9)
    together, probabilities = Sampler(sampling, seeds)(logits)
    for row, seed in enumerate(seeds):
        alone, own = Sampler(sampling, [seed])(logits[row : row + 1])
        assert torch.equal(alone[0], together[row])
        torch.testing.assert_close(own[0], probabilities[row])
    assert Sampler(Sampling(), [0])(logits[:1])[1] is None


def test_rows_keep_their_generators_as_requests_leave_and_join():
    def numbers(sampler: Sampler, rows: int) -> list[list[float]]:
        return sampler.uniforms(3).view(rows, 3).tolist()

    whole = {seed: Sampler(Sampling(1.0), [seed]).uniforms(9)[0].tolist() for seed in (1, 2, 3, 4)}
    sampler = Sampler(Sampling(1.0), [1, 2, 3])
    assert numbers(sampler, 3) == [whole[s][:3] for s in (1, 2, 3)]
    sampler = sampler.select([2, 0]).merge(Sampler(Sampling(1.0), [4]))
    assert numbers(sampler, 3) == [whole[3][3:6], whole[1][3:6], whole[4][:3]]
    assert numbers(sampler.select([1]), 1) == [whole[1][6:9]]
    assert all(0 <= u < 1 for row in whole.values() for u in row)
    assert len({u for row in whole.values() for u in row}) == 36
