"""Every number of a decoding run against counting rounds one by one in plain Python."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from specbench.metrics.functional import conditional_acceptance, deepspec_row, expected_lengths, histogram, suffix_decay
from specbench.metrics.rounds import (
    AcceptanceRate,
    AcceptedLength,
    ConditionalAcceptance,
    DecodingMetrics,
    ExpectedLength,
    SlotMetrics,
    SuffixDecay,
    Survival,
    VerifiedPerRound,
)
from specbench.metrics.slot_statistics import SlotStatistics

FIXTURE = Path(__file__).parent / "fixtures" / "deepspec_rounds.json"
K = 5


def prompts(seed: int, number: int = 12):
    """Rounds (proposed, accepted, committed) of prompts; some stop inside a round, one has no round."""
    rng = random.Random(seed)
    for index in range(number):
        rounds = []
        for _ in range(0 if index == 3 else rng.randint(1, 20)):
            proposed = rng.randint(0, K)
            accepted = min(proposed, int(rng.expovariate(0.5)))
            rounds.append((proposed, accepted, accepted + 1))
        if rounds and rng.random() < 0.5:
            proposed, accepted, _ = rounds[-1]
            rounds[-1] = (proposed, accepted, accepted)  # an accepted stop token: no bonus
        yield rounds


def by_hand(data) -> dict[str, float]:
    rounds = [r for prompt in data for r in prompt]
    own = [sum(c for _, _, c in prompt) / len(prompt) for prompt in data if prompt]
    values = {
        "accepted_length": sum(c for _, _, c in rounds) / len(rounds),
        "accepted_length_per_prompt": sum(own) / len(own),
        "acceptance_rate": sum(j for _, j, _ in rounds) / sum(m for m, _, _ in rounds),
        "verified_per_round": sum(m + 1 for m, _, _ in rounds) / len(rounds),
        "rounds": len(rounds),
        "committed": sum(c for _, _, c in rounds),
        "prompts": len(data),
        "prompts_without_rounds": sum(not prompt for prompt in data),
    }
    for k in range(1, K + 1):
        offered = [j for m, j, _ in rounds if m >= k]
        reached = [j for m, j, _ in rounds if m >= k and j >= k - 1]
        values[f"survival_n@{k}"], values[f"conditional_n@{k}"] = len(offered), len(reached)
        values[f"survival@{k}"] = sum(j >= k for j in offered) / len(offered)
        values[f"conditional@{k}"] = sum(j >= k for j in reached) / len(reached)
    points = [  # (slot, log conditional, weight) where the logarithm exists
        (k, math.log(values[f"conditional@{k}"]), values[f"conditional_n@{k}"])
        for k in range(1, K + 1)
        if values[f"conditional@{k}"] > 0
    ]
    mean = sum(w * k for k, _, w in points) / sum(w for _, _, w in points)
    top = sum(w * (k - mean) * y for k, y, w in points)
    values["suffix_decay"] = top / sum(w * (k - mean) ** 2 for k, _, w in points)
    return values


def fill(metric, data):
    for prompt in data:
        metric.update_rounds(*([list(column) for column in zip(*prompt, strict=True)] if prompt else ([], [], [])))
    return metric


@pytest.mark.parametrize("seed", range(4))
def test_every_number_equals_counting(seed):
    data = list(prompts(seed))
    expected, found = by_hand(data), fill(DecodingMetrics(K), data).compute()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-14), name
    curve = [expected[f"conditional@{k}"] for k in range(1, K + 1)]
    assert fill(ConditionalAcceptance(K), data).compute().tolist() == pytest.approx(curve)
    assert fill(Survival(K), data).compute().tolist() == pytest.approx(
        [expected[f"survival@{k}"] for k in range(1, K + 1)]
    )
    singles = {
        "accepted_length": AcceptedLength(K),
        "accepted_length_per_prompt": AcceptedLength(K, per_prompt=True),
        "acceptance_rate": AcceptanceRate(K),
        "verified_per_round": VerifiedPerRound(K),
        "suffix_decay": SuffixDecay(K),
    }
    for name, metric in singles.items():
        assert float(fill(metric, data).compute()) == pytest.approx(expected[name]), name


def test_histograms_and_triples_are_the_same_update():
    data = list(prompts(0))
    triples, counted = DecodingMetrics(K), DecodingMetrics(K)
    for prompt in data:
        committed = sum(c for _, _, c in prompt)
        triples.update([[m, j, 1] for m, j, _ in prompt], committed)
        counted.update(histogram([m for m, _, _ in prompt], [j for _, j, _ in prompt], K), committed)
    for metric in (triples, counted):
        assert torch.equal(metric.histogram, fill(DecodingMetrics(K), data).histogram)
        assert metric.histogram.dtype == torch.int64 and metric.ratios.dtype == torch.float64


def test_survival_is_the_product_of_conditionals_when_every_round_proposes_all():
    counts = histogram([4] * 60, [min(4, int(random.Random(i).expovariate(0.4))) for i in range(60)], 4)
    conditional, _ = conditional_acceptance(counts)
    metric = DecodingMetrics(4)
    metric.update(counts, 0)
    survived = [float(metric.compute()[f"survival@{k}"]) for k in range(1, 5)]
    assert conditional.cumprod(0).tolist() == pytest.approx(survived)


def test_what_was_never_observed_is_not_a_number():
    metric = DecodingMetrics(3)
    metric.update([(1, 0, 4)], committed=4)
    values = metric.compute()
    assert (
        float(values["survival@1"]) == 0.0 and math.isnan(values["survival@2"]) and math.isnan(values["suffix_decay"])
    )
    assert math.isnan(suffix_decay(torch.tensor([0.5, 0.0]).double(), torch.tensor([9, 4])))


@pytest.mark.parametrize("rounds", [[(2, 3, 1)], [(K + 1, 0, 1)], [(2, -1, 1)], [(2, 1, -1)]])
def test_impossible_rounds_are_refused(rounds):
    with pytest.raises(ValueError, match="cannot be"):
        DecodingMetrics(K).update(rounds, 1)


def test_impossible_commitments_are_refused():
    with pytest.raises(ValueError, match="cannot commit"):
        DecodingMetrics(K).update([(5, 2, 3)], 10)


def test_expected_length_is_a_mean_of_products():
    generator = torch.Generator().manual_seed(0)
    alpha, lengths = torch.rand(9, K, generator=generator, dtype=torch.float64), [5, 3, 0, 1, 2, 4, 5, 0, 5]
    mask = torch.arange(K) < torch.tensor(lengths)[:, None]
    blocks = zip(alpha.tolist(), lengths, strict=True)
    own = [1 + sum(math.prod(row[: k + 1]) for k in range(n)) if n else 0 for row, n in blocks]
    assert expected_lengths(alpha, mask).tolist() == pytest.approx(own)
    metric = ExpectedLength()
    metric.update(alpha[:4], mask[:4])
    metric.update(alpha[4:], mask[4:])
    assert float(metric.compute()) == pytest.approx(sum(own) / sum(n > 0 for n in lengths))


def test_the_released_evaluators_table_is_reproduced():
    for case, data in json.loads(FIXTURE.read_text()).items():
        columns = zip(*data["runs"], strict=True)
        positions = len(data["expected"]["summary"]["proposals_at_pos"])
        assert deepspec_row(*columns, slots=positions) == data["expected"], case


def statistics(seed: int) -> tuple[SlotStatistics, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(K) < torch.randint(0, K + 1, (8, 1), generator=generator)
    names = ("ce", "tv", "alpha", "agreement", "hit", "label_outside", "outside")
    values = {name: torch.rand(8, K, generator=generator, dtype=torch.float64) * mask for name in names}
    values["label_outside"] = (values["label_outside"] > 0.8).double()
    confidence = torch.randn(8, K, generator=generator, dtype=torch.float64)
    return SlotStatistics.of(mask, 2.0 * mask, values, confidence), values | {"mask": mask, "confidence": confidence}


def test_slot_metrics_are_means_over_supervised_slots():
    metric, seen = SlotMetrics(K), []
    for seed in range(3):
        slots, values = statistics(seed)
        metric.update(slots)
        seen.append(values)
    found = metric.compute()
    joined = {name: torch.cat([v[name] for v in seen]) for name in seen[0]}
    mask = joined["mask"]
    assert float(found["supervised"]) == int(mask.sum())
    for shown, name in (("acceptance", "alpha"), ("agreement", "agreement"), ("hit", "hit"), ("tv", "tv")):
        assert float(found[shown]) == pytest.approx(float(joined[name][mask].mean()))
        for k in range(K):
            assert float(found[f"{shown}@{k + 1}"]) == pytest.approx(float(joined[name][mask[:, k], k].mean()))
    labelled = mask & ~joined["label_outside"].bool()
    assert float(found["ce"]) == pytest.approx(float(joined["ce"][mask].sum() / labelled.sum()))
    error = (joined["confidence"].sigmoid() - joined["alpha"]).abs()[mask].mean()
    assert float(found["confidence_error"]) == pytest.approx(float(error))
    length = expected_lengths(joined["alpha"], mask).sum() / mask[:, 0].sum()
    assert float(found["expected_length"]) == pytest.approx(float(length))
    with pytest.raises(ValueError, match="slots"):
        SlotMetrics(K + 1).update(slots)


def test_a_draft_without_confidence_reports_none():
    slots, _ = statistics(0)
    metric = SlotMetrics(K)
    metric.update(replace(slots, confidence=torch.zeros(K).double(), confidence_error=torch.zeros(K).double()))
    assert not any(name.startswith("confidence") for name in metric.compute())


def _rank(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    data = list(prompts(7))
    whole, shared = fill(DecodingMetrics(K), data), fill(DecodingMetrics(K), data[rank::2])
    whole.distributed_available_fn = lambda: False
    slots, shared_slots = SlotMetrics(K), SlotMetrics(K)
    slots.distributed_available_fn = lambda: False
    for seed in range(3):
        slots.update(statistics(seed)[0])
        if seed % 2 == rank:
            shared_slots.update(statistics(seed)[0])
    for one, other in ((whole, shared), (slots, shared_slots)):
        expected, found = one.compute(), other.compute()
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-14, atol=0, equal_nan=True)
    dist.destroy_process_group()


def test_two_ranks_report_what_one_would(tmp_path):
    mp.start_processes(_rank, (tmp_path / "rendezvous",), nprocs=2, start_method="spawn")
