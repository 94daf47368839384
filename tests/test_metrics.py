"""Every number of a decoding run against counting rounds one by one in plain Python."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from specbench.metrics import functional
from specbench.metrics.confidence import ConfidenceMetrics
from specbench.metrics.functional import (
    conditional_acceptance,
    deepspec_row,
    expected_lengths,
    histogram,
    slot_counts,
    suffix_decay,
)
from specbench.metrics.rounds import (
    AcceptanceRate,
    AcceptedLength,
    ConditionalAcceptance,
    DecodingMetrics,
    SuffixDecay,
    Survival,
    VerifiedPerRound,
)
from specbench.metrics.slot_statistics import SlotStatistics
from specbench.metrics.slots import ExpectedLength, SlotMetrics

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


def slope(conditional, n) -> float:
    """Slope of the Poisson regression of accepted counts, log link, offset log n: Newton's method in two unknowns."""
    cells = [(k, c * m, m) for k, (c, m) in enumerate(zip(conditional, n, strict=True), 1) if m]
    a, b = math.log(sum(passed for _, passed, _ in cells) / sum(m for *_, m in cells)), 0.0
    for _ in range(50):
        fitted = [(k, passed, m * math.exp(a + b * k)) for k, passed, m in cells]
        g0, g1 = sum(y - f for _, y, f in fitted), sum(k * (y - f) for k, y, f in fitted)
        h00, h01, h11 = (sum(k**power * f for k, _, f in fitted) for power in range(3))
        determinant = h00 * h11 - h01**2
        a, b = a + (h11 * g0 - h01 * g1) / determinant, b + (h00 * g1 - h01 * g0) / determinant
    return b


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
    values["suffix_decay"] = slope([values[f"conditional@{k}"] for k in range(1, K + 1)],
                                   [values[f"conditional_n@{k}"] for k in range(1, K + 1)])  # fmt: skip
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
        assert float(found[name]) == pytest.approx(value, rel=1e-9 if name == "suffix_decay" else 1e-14), name
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
    for one, other in zip(triples.values(), counted.values(), strict=True):
        assert torch.equal(one.histogram, fill(AcceptedLength(K), data).histogram)
        assert torch.equal(other.histogram, one.histogram) and torch.equal(other.counts, one.counts)
        assert one.histogram.dtype == torch.int64 and one.ratios.dtype == torch.float64


def test_survival_is_the_product_of_conditionals_when_every_round_proposes_all():
    counts = histogram([4] * 60, [min(4, int(random.Random(i).expovariate(0.4))) for i in range(60)], 4)
    conditional = conditional_acceptance(slot_counts(counts))
    metric = DecodingMetrics(4)
    metric.update(counts, 0)
    survived = [float(metric.compute()[f"survival@{k}"]) for k in range(1, 5)]
    assert conditional.cumprod(0).tolist() == pytest.approx(survived)


def test_a_stop_token_does_not_count_against_survival_as_a_product():
    """Rounds (2, 1) of blocks of three ended at an accepted stop token: they survived as far as they could be seen."""
    slots = slot_counts(histogram([3, 3, 3, 2, 2], [3, 1, 0, 2, 2], 3))
    assert functional.survival(slots).tolist() == pytest.approx([4 / 5, 3 / 5, 1 / 3])
    assert functional.survival_product(slots).tolist() == pytest.approx([4 / 5, 4 / 5 * 3 / 4, 4 / 5 * 3 / 4 * 1])
    none = functional.survival_product(slot_counts(histogram([2, 1], [0, 0], 2)))
    assert none.tolist() == [0.0, 0.0]  # nothing survives slot 1, whoever proposed slot 2


def test_what_was_never_observed_is_not_a_number():
    metric = DecodingMetrics(3)
    metric.update([(1, 0, 4)], committed=4)
    values = metric.compute()
    assert (
        float(values["survival@1"]) == 0.0 and math.isnan(values["survival@2"]) and math.isnan(values["suffix_decay"])
    )
    assert math.isnan(suffix_decay(torch.tensor([0.0, 0.0]).double(), torch.tensor([9, 4])))
    # Nothing was accepted after the first slot: no finite slope, and its worst slot is not left out.
    assert suffix_decay(torch.tensor([0.5, 0.0]).double(), torch.tensor([9, 4])) == -functional.SLOPE_LIMIT


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
    whole = fill(DecodingMetrics(K, sync_on_compute=False), data)
    shared = fill(DecodingMetrics(K), data[rank::2])
    slots, shared_slots = SlotMetrics(K, sync_on_compute=False), SlotMetrics(K)
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


def test_one_slot_has_a_curve_too():
    metric = DecodingMetrics(1)
    metric.update([(1, 1, 3), (1, 0, 1)], committed=7)
    assert float(metric.compute()["survival@1"]) == float(metric.compute()["conditional@1"]) == 0.75


@given(
    arrays(np.int64, (3, K + 1, K + 1), elements=st.integers(0, 50)),
    arrays(np.float64, (3, 4, K), elements=st.floats(0, 1)),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_numpy_torch_and_leading_axes_agree(cells, alpha):
    """The same formula on arrays, on tensors, on both with leading axes, and on each row alone."""
    cells = np.tril(cells)  # no round accepts more than it proposed

    def numbers(counts, alpha):
        slots, totals = functional.slot_counts(counts), functional.round_totals(counts)
        conditional, mask = conditional_acceptance(slots), alpha >= 0
        forced = functional.teacher_forced(functional.teacher_forced_sums(alpha, mask))
        yield from (*slots, *totals, conditional, functional.survival(slots), suffix_decay(conditional, slots.reached))
        yield functional.survival_product(slots)
        yield functional.acceptance_rate(totals.accepted, totals.proposed)
        yield functional.verified_per_round(totals.proposed, totals.rounds)
        yield from (*forced, functional.expected_length(alpha, mask))

    together = list(numbers(cells, alpha))
    for found, tensor in zip(together, numbers(torch.from_numpy(cells), torch.from_numpy(alpha)), strict=True):
        assert isinstance(tensor, torch.Tensor)
        np.testing.assert_allclose(tensor.numpy(), found, rtol=1e-9, atol=1e-9)
    for row in range(3):
        for found, own in zip(together, numbers(cells[row], alpha[row]), strict=True):
            np.testing.assert_allclose(found[row], own, rtol=1e-9, atol=1e-9)


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=30))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_reliability_is_what_plain_python_counts(rows):
    """Predictions in twentieths, so that ties and the edges of bins occur."""
    p, y = [n / 20 for n, _ in rows], [event for _, event in rows]
    bins: dict[int, list[tuple[float, bool]]] = {}
    for value, event in zip(p, y, strict=True):
        bins.setdefault(min(int(value * 20), 19), []).append((value, event))
    ece = sum(abs(sum(v for v, _ in b) - sum(e for _, e in b)) for b in bins.values()) / len(rows)
    pairs = [(a > b) + (a == b) / 2 for a, one in zip(p, y, strict=True) for b, o in zip(p, y, strict=True) if one > o]
    expected = {
        "ece": ece,
        "brier": sum((v - e) ** 2 for v, e in zip(p, y, strict=True)) / len(rows),
        "auroc": sum(pairs) / len(pairs) if pairs else math.nan,
    }
    metric = ConfidenceMetrics(1)
    for part in (slice(0, 7), slice(7, None)):
        if rows[part]:
            accepted = torch.tensor(y[part]).long()
            metric.update(torch.tensor(p[part], dtype=torch.float64)[:, None], accepted, torch.ones_like(accepted))
    twins = {"ece": functional.calibration_error, "brier": functional.brier_score, "auroc": functional.auroc}
    for name, value in metric.compute().items():
        assert float(value) == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name
        found = float(twins[name](np.array(p), np.array(y)))
        assert found == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("kind", [AcceptedLength, Survival, ConditionalAcceptance, SuffixDecay, AcceptanceRate])
def test_metrics_take_the_standard_arguments_and_draw_themselves(kind):
    import matplotlib

    matplotlib.use("agg")
    metric = kind(K, sync_on_compute=False, dist_sync_on_step=True)
    assert metric.dist_sync_on_step and not metric.sync_on_compute and metric.higher_is_better
    metric.update_rounds([5, 5, 5], [5, 2, 0], [6, 3, 1])
    figure, axes = metric.plot()
    assert axes.lines and figure is axes.figure
    with pytest.raises(ValueError, match="no_such"):
        kind(K, no_such=True)


def test_formulas_need_no_torch():
    code = "import sys, specbench.metrics.functional; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
