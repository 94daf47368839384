"""Slot losses against sums over the vocabulary written out, and slot weights against loops."""

from __future__ import annotations

import math

import pytest
import torch

from specbench.losses.further_terms import FURTHER_TERMS
from specbench.losses.slot_weights import SlotWeight
from specbench.losses.terms import TERMS, Blend, slot_terms, softened_kl

V, IDS = 11, [0, 2, 3, 7, 10]


def by_hand(z: list[float], t: list[float], label: int, ids: list[int] | None) -> dict[str, float]:
    """Every term from its definition over the whole target vocabulary."""
    norm, target_norm = sum(map(math.exp, z)), sum(map(math.exp, t))
    q = [math.exp(x) / target_norm for x in t]
    p = [0.0] * len(t)
    for column, token in enumerate(ids if ids is not None else range(len(t))):
        p[token] = math.exp(z[column]) / norm
    seen = [v for v in range(len(t)) if p[v] > 0]
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    alpha = sum(map(min, p, q))
    return {
        "ce": -math.log(p[label]) if p[label] else 0.0,
        "soft_ce": -sum(q[v] * math.log(p[v]) for v in seen),
        "kl": sum(q[v] * math.log(q[v] / p[v]) for v in seen),
        "reverse_kl": sum(p[v] * math.log(p[v] / q[v]) for v in seen),
        "js": sum(a * math.log(a / m) for a, m in zip(p, middle, strict=True) if a) / 2
        + sum(b * math.log(b / m) for b, m in zip(q, middle, strict=True)) / 2,
        "tv": sum(abs(a - b) for a, b in zip(p, q, strict=True)),
        "accept": -math.log(alpha),
        "alpha": alpha,
        "outside": 1 - sum(q[v] for v in seen),
        "skew_kl": sum(b * math.log(b / (0.1 * b + 0.9 * a)) for a, b in zip(p, q, strict=True)),
    }


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "reduced"])
def test_terms_equal_their_definitions(ids):
    generator = torch.Generator().manual_seed(0)
    t = 2 * torch.randn(6, V, generator=generator, dtype=torch.float64)
    z = 2 * torch.randn(6, V if ids is None else len(ids), generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 9, 10])
    found = slot_terms(z, t, labels, None if ids is None else torch.tensor(ids), [*TERMS, *FURTHER_TERMS])
    for row in range(6):
        for term, value in by_hand(z[row].tolist(), t[row].tolist(), int(labels[row]), ids).items():
            assert float(found[term][row]) == pytest.approx(value, abs=1e-12), term


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "reduced"])
def test_kl_at_a_temperature_equals_its_definition(ids):
    generator, T = torch.Generator().manual_seed(4), 1.7
    t = 2 * torch.randn(4, V, generator=generator, dtype=torch.float64)
    z = 2 * torch.randn(4, V if ids is None else len(ids), generator=generator, dtype=torch.float64)
    found = softened_kl(z, t, T, None if ids is None else torch.tensor(ids))
    for row in range(4):
        cooled = by_hand((z[row] / T).tolist(), (t[row] / T).tolist(), 0, ids)
        assert float(found[row]) == pytest.approx(T * T * cooled["kl"], abs=1e-12)


def test_equal_distributions_cost_nothing():
    z = torch.randn(4, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = slot_terms(z, z + 3.0, torch.zeros(4, dtype=torch.long))
    for term in ("kl", "reverse_kl", "js", "tv", "accept"):
        assert found[term].abs().max() < 1e-14
    assert set(found) >= set(TERMS)


def test_low_precision_logits_are_judged_in_fp32():
    z = torch.randn(4, V, generator=torch.Generator().manual_seed(2)).bfloat16()
    t = torch.randn(4, V, generator=torch.Generator().manual_seed(3)).bfloat16()
    low, high = (slot_terms(z.to(d), t.to(d), torch.arange(4)) for d in (torch.bfloat16, torch.float32))
    for term in TERMS:
        assert torch.equal(low[term], high[term])


def test_static_weights():
    assert SlotWeight.of({"exp": 4.0}).static(3).tolist() == pytest.approx([1, math.exp(-0.25), math.exp(-0.5)])
    assert SlotWeight.of({"power": 0.8}).static(3).tolist() == pytest.approx([1, 0.8, 0.64])
    assert SlotWeight.of("uniform").static(2).tolist() == [1, 1]


def test_prefix_probability_weights_follow_the_paper_formula():
    probability = torch.tensor([[0.9, 0.2, 0.5, 0.0], [0.4, 0.6, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    a = 0.5
    expected = []
    for row, length in ((0, 3), (1, 2)):
        s = [(1 - a) * float(probability[row, k]) + a for k in range(length)]
        c = [math.prod(s[: k + 1]) for k in range(length)]
        expected.append([sum(c[k:]) for k in range(length)] + [0.0] * (4 - length))
    found = SlotWeight.of({"dpace": a}).weigh(mask, probability.requires_grad_(), torch.zeros_like(mask))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert not found.requires_grad


@pytest.mark.parametrize("name", ["first_failure", "specauf"])
def test_first_failure_keeps_the_block_up_to_and_including_the_first_miss(name):
    hit = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    found = SlotWeight.of(name).weigh(mask, torch.rand(4, 4, generator=torch.Generator().manual_seed(0)), hit)
    assert found.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]


def test_blend_weight():
    assert float(Blend.of({"scale": 0.9, "decay": 2}).weight(torch.tensor(0.5))) == pytest.approx(0.9 * math.exp(-1))


@pytest.mark.parametrize(
    "setting",
    ["expo", {"exp": 0.0}, {"power": 1.5}, {"dpace": -1.0}, {"exp": 4.0, "power": 0.8}, {"first_failure": 1.0}],
)
def test_unknown_slot_weights_are_refused(setting):
    with pytest.raises(ValueError, match="slot_weight"):
        SlotWeight.of(setting)


@pytest.mark.parametrize("setting", [{"over": "block"}, {"rate": 1.0}])
def test_unknown_blends_are_refused(setting):
    with pytest.raises(ValueError, match="blend"):
        Blend.of(setting)
