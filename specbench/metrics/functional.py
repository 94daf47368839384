"""The formulas of all metrics: pure functions of numpy arrays or torch tensors, which return the same kind of array.

First, counts of decoding rounds: a round proposes m tokens and accepts j <= m of them, and all numbers of a
decoding run follow from two things per prompt, the histogram H[m, j] of its rounds and the tokens that they committed.
Then teacher-forced acceptance, and the reliability of confidences. The torchmetrics classes in this folder,
calibration and the tables of `analysis` keep sums and call these functions.

A quantity without observations is NaN, not zero. torch is not imported here; a tensor brings its own library.

Axes: K slots, M blocks, P prompts, N observations; a histogram is (K+1, K+1) with axes m, j. Leading `axes` are groups
or bootstrap samples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

Array = Any  # a numpy array or a torch tensor; also a number where one is sufficient
Triples = Iterable[Sequence[int]]
BINS = 20


def array_namespace(*arrays: Array) -> Any:
    """torch if any of `arrays` is a tensor, numpy otherwise: both follow the array API standard for the functions used
    here (`xp.where(...)`, `xp.arange(..., device=x.device)`)."""
    torch = sys.modules.get("torch")  # if torch is not imported, nothing can be a tensor
    return torch if torch is not None and any(isinstance(x, torch.Tensor) for x in arrays) else np


def ratio(numerator: Array, denominator: Array) -> Float[Any, "*axes"]:
    """Elementwise division in fp64; NaN if the denominator is zero.

    >>> ratio(np.array([3, 0]), np.array([2, 0])).tolist()
    [1.5, nan]
    """
    xp = array_namespace(numerator, denominator)
    device = next((x.device for x in (numerator, denominator) if hasattr(x, "device")), None)
    above, below = (xp.asarray(x, dtype=xp.float64, device=device) for x in (numerator, denominator))
    some = below > 0
    return xp.where(some, above / xp.where(some, below, 1.0), xp.nan)


def histogram(proposed: Sequence[int], accepted: Sequence[int], slots: int) -> Int[np.ndarray, "m j"]:
    """H[m, j]: how many rounds proposed m and accepted j tokens, m and j in 0..slots.

    >>> histogram([2, 2, 1], [2, 0, 0], slots=2).tolist()
    [[0, 0, 0], [1, 0, 0], [1, 0, 1]]
    """
    return histogram_of(zip(proposed, accepted, [1] * len(proposed), strict=True), slots)


def histogram_of(triples: Triples, slots: int) -> Int[np.ndarray, "m j"]:
    """H[m, j] from a record's (proposed, accepted, count) triples. ValueError for an impossible round.

    >>> histogram_of([(2, 0, 1), (2, 2, 5)], slots=2).tolist()
    [[0, 0, 0], [0, 0, 0], [1, 0, 5]]
    """
    counts = np.zeros((slots + 1, slots + 1), dtype=np.int64)
    for m, j, count in triples:
        if not 0 <= j <= m <= slots or count < 0:
            raise ValueError(f"{count} rounds that accept {j} of {m} proposed tokens with {slots} slots cannot be")
        counts[m, j] += count
    return counts


class RoundTotals(NamedTuple):
    """Sums over the rounds of a histogram, fp64."""

    rounds: Float[Any, "*axes"]
    proposed: Float[Any, "*axes"]
    accepted: Float[Any, "*axes"]


def round_totals(counts: Num[Any, "*axes m j"]) -> RoundTotals:
    """Rounds, tokens proposed and tokens accepted.

    >>> [float(total) for total in round_totals(histogram([2, 2, 1], [2, 0, 0], slots=2))]
    [3.0, 5.0, 2.0]
    """
    xp = array_namespace(counts)
    counts = xp.asarray(counts, dtype=xp.float64)
    sizes = xp.arange(counts.shape[-1], dtype=xp.float64, device=counts.device)
    proposed, accepted = counts.sum(-1), counts.sum(-2)
    return RoundTotals(proposed.sum(-1), (proposed * sizes).sum(-1), (accepted * sizes).sum(-1))


class SlotCounts(NamedTuple):
    """Rounds by slot k = 1..K, fp64: `offered` proposed at least k tokens; `reached` of them accepted at least k-1;
    `passed` accepted at least k."""

    offered: Float[Any, "*axes K"]
    reached: Float[Any, "*axes K"]
    passed: Float[Any, "*axes K"]


def slot_counts(counts: Num[Any, "*axes m j"]) -> SlotCounts:
    """The counts of which the curves by slot are quotients.

    >>> [part.tolist() for part in slot_counts(histogram([2, 2, 1], [2, 1, 0], slots=2))]
    [[3.0, 2.0], [3.0, 2.0], [2.0, 1.0]]
    """
    xp = array_namespace(counts)
    counts = xp.asarray(counts, dtype=xp.float64)
    size = counts.shape[-1]
    # One column per slot over the cells (m, j), so that each sum is one product with the flattened histograms.
    place = {"dtype": xp.int64, "device": counts.device}
    m, j = xp.arange(size, **place)[:, None, None], xp.arange(size, **place)[None, :, None]
    k = xp.arange(1, size, **place)
    cells = counts.reshape((*counts.shape[:-2], size * size))
    columns = ((m >= k) & (j >= 0), (m >= k) & (j >= k - 1), (m >= 0) & (j >= k))
    return SlotCounts(*(cells @ xp.asarray(part.reshape(size * size, size - 1), dtype=xp.float64) for part in columns))


def accepted_length(committed: Array, rounds: Array) -> Float[Any, "*axes"]:
    """Tokens committed per round, the bonus or corrected token included, pooled over all rounds (the published
    definition).

    >>> float(accepted_length(7, 2))
    3.5
    """
    return ratio(committed, rounds)


class PromptRatios(NamedTuple):
    """Each prompt's own committed / rounds, 0 without a round, and `some`: 1.0 where it has rounds."""

    own: Float[Any, "*axes P"]
    some: Float[Any, "*axes P"]


def prompt_ratios(committed: Num[Any, "*axes P"], rounds: Num[Any, "*axes P"]) -> PromptRatios:
    """The two terms of which accepted_length_per_prompt is the quotient, after a sum over prompts."""
    xp = array_namespace(committed, rounds)
    some = xp.asarray(rounds) > 0
    return PromptRatios(xp.where(some, ratio(committed, rounds), 0.0), xp.asarray(some, dtype=xp.float64))


def accepted_length_per_prompt(committed: Num[Any, "*axes P"], rounds: Num[Any, "*axes P"]) -> Float[Any, "*axes"]:
    """Mean over prompts of each prompt's own committed / rounds; prompts without rounds have none.

    >>> float(accepted_length_per_prompt(np.array([9, 1, 0]), np.array([3, 1, 0])))
    2.0
    """
    own, some = prompt_ratios(committed, rounds)
    return ratio(own.sum(-1), some.sum(-1))


def acceptance_rate(accepted: Array, proposed: Array) -> Float[Any, "*axes"]:
    """Tokens accepted / tokens proposed.

    >>> float(acceptance_rate(3, 8))
    0.375
    """
    return ratio(accepted, proposed)


def verified_per_round(proposed: Array, rounds: Array) -> Float[Any, "*axes"]:
    """Tokens that the target reads in a round: the proposal and the anchor.

    >>> float(verified_per_round(5, 2))
    3.5
    """
    return ratio(proposed + rounds, rounds)


def survival(slots: SlotCounts) -> Float[Any, "*axes K"]:
    """survival@k = rounds with j >= k / rounds that proposed at least k; those are its counts n_k, `slots.offered`.

    >>> survival(slot_counts(histogram([2, 2, 1, 1], [2, 1, 0, 1], slots=2))).tolist()
    [0.75, 0.5]
    """
    return ratio(slots.passed, slots.offered)


def conditional_acceptance(slots: SlotCounts) -> Float[Any, "*axes K"]:
    """conditional@k = rounds with j >= k / rounds that proposed at least k and had j >= k-1; those are its counts n_k,
    `slots.reached`.

    >>> conditional_acceptance(slot_counts(histogram([2, 2, 2, 1], [2, 1, 0, 1], slots=2))).tolist()
    [0.75, 0.5]
    """
    return ratio(slots.passed, slots.reached)


def survival_product(slots: SlotCounts) -> Float[Any, "*axes K"]:
    """The product of conditional@1 ... @k (E. Kaplan, P. Meier, 1958): survival where the rounds that end before slot k
    for another reason (an accepted stop token, a short proposal) would have gone on like those that reached it.

    Equal to `survival` if every round proposes every slot. A stop token ends a round because it was accepted, so the
    raw share leaves rounds that did well out of its denominator.

    >>> survival_product(slot_counts(histogram([2, 2, 1, 1], [2, 1, 0, 1], slots=2))).tolist()
    [0.75, 0.375]
    """
    xp = array_namespace(slots.passed, slots.reached)
    conditional = conditional_acceptance(slots)
    unknown = xp.isnan(conditional)
    product = xp.where(unknown, 1.0, conditional).cumprod(-1)
    return xp.where(unknown & (product > 0), xp.nan, product)


SLOPE_LIMIT = 5.0  # a slope beyond this, a factor of 150 from slot to slot, is given as this


def suffix_decay(conditional: Float[Any, "*axes K"], n: Num[Any, "*axes K"]) -> Float[Any, "*axes"]:
    """Slope b of log conditional@k over k in the model conditional@k = exp(a + b k). Below zero: acceptance falls along
    the block.

    Maximum likelihood for accepted counts with a log link and the n_k rounds as exposure (G. Zou, 2004, "A modified
    Poisson regression approach"): the b with sum_k k passed_k / sum_k passed_k = sum_k k n_k e^(bk) / sum_k n_k e^(bk).
    Every slot with a round counts, also one at which nothing was accepted. The likelihood gives the slope only; its
    interval comes from resampling prompts. Between -SLOPE_LIMIT and SLOPE_LIMIT, which stands for no finite slope; NaN
    if fewer than two slots were reached or nothing was accepted.

    >>> round(float(suffix_decay(np.array([0.8, 0.4, 0.2]), np.array([100, 80, 32]))), 4)
    -0.6931
    """
    xp = array_namespace(conditional, n)
    seen = n > 0
    reached = xp.where(seen, xp.asarray(n, dtype=xp.float64), 0.0)
    passed = reached * xp.where(seen, xp.asarray(conditional, dtype=xp.float64), 0.0)
    slot = xp.arange(1, conditional.shape[-1] + 1, dtype=xp.float64, device=conditional.device)
    total = passed.sum(-1)
    observed = ratio((passed * slot).sum(-1), xp.where(seen.sum(-1) >= 2, total, 0.0))
    low, high = xp.zeros_like(observed) - SLOPE_LIMIT, xp.zeros_like(observed) + SLOPE_LIMIT
    beyond = reached * (slot - observed[..., None])
    for _ in range(56):  # the expected mean increases with the slope, so halving finds it to the last bit
        middle = (low + high) / 2
        above = (beyond * xp.exp(middle[..., None] * slot)).sum(-1) > 0
        low, high = xp.where(above, low, middle), xp.where(above, middle, high)
    return xp.where(xp.isnan(observed), xp.nan, (low + high) / 2)


class RoundSums(NamedTuple):
    """What a quantity of rounds is computed from, summed over rounds and prompts: tokens committed, proposed and
    accepted, rounds, the two terms of accepted_length_per_prompt (`own`, `some`), and the counts of each slot."""

    committed: Num[Any, "*axes"]
    rounds: Num[Any, "*axes"]
    proposed: Num[Any, "*axes"]
    accepted: Num[Any, "*axes"]
    own: Num[Any, "*axes"]
    some: Num[Any, "*axes"]
    slots: SlotCounts


# Every quantity with one value a group of rounds: an evaluation logs it and reports it with its interval.
QUANTITIES: dict[str, Callable[[RoundSums], Float[Any, "*axes"]]] = {
    "accepted_length": lambda sums: accepted_length(sums.committed, sums.rounds),
    "accepted_length_per_prompt": lambda sums: ratio(sums.own, sums.some),
    "acceptance_rate": lambda sums: acceptance_rate(sums.accepted, sums.proposed),
    "verified_per_round": lambda sums: verified_per_round(sums.proposed, sums.rounds),
    "suffix_decay": lambda sums: suffix_decay(conditional_acceptance(sums.slots), sums.slots.reached),
}


def expected_lengths(alpha: Float[Any, "*axes K"], mask: Bool[Any, "*axes K"]) -> Float[Any, "*axes"]:
    """1 + sum_k prod_{i<=k} alpha_i over the supervised slots of each block (a prefix); 0 for a block without
    supervised slots. alpha_k is sum_v min(p, q) of draft and target: 1 - half their L1 distance.

    >>> expected_lengths(np.array([[0.5, 0.5], [1.0, 0.0]]), np.ones((2, 2), dtype=bool)).tolist()
    [1.75, 2.0]
    """
    return mask[..., 0] + (alpha * mask).cumprod(-1).sum(-1)


def expected_length(alpha: Float[Any, "*axes M K"], mask: Bool[Any, "*axes M K"]) -> Float[Any, "*axes"]:
    """Mean of `expected_lengths` over the blocks with a supervised slot; never a product of means.

    >>> float(expected_length(np.array([[0.5, 0.5], [1.0, 0.0]]), np.ones((2, 2), dtype=bool)))
    1.875
    """
    return ratio(expected_lengths(alpha, mask).sum(-1), mask[..., 0].sum(-1))


def teacher_forced_sums(alpha: Float[Any, "*axes N K"], mask: Bool[Any, "*axes N K"]) -> Float[Any, "*axes K four"]:
    """For each slot k over N anchors: anchors with that slot, sum of alpha_k, of prod_{i<=k} alpha_i, of
    prod_{i<k} alpha_i. `mask` is false where the text ends before the slot.

    >>> teacher_forced_sums(np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([[True, True], [True, False]])).tolist()
    [[2.0, 1.5, 1.5, 2.0], [1.0, 0.5, 0.25, 0.5]]
    """
    xp = array_namespace(alpha, mask)
    alpha, mask = (xp.asarray(x, dtype=xp.float64) for x in (alpha, mask))
    survived = alpha.cumprod(-1)
    reached = xp.concatenate([xp.ones_like(survived[..., :1]), survived[..., :-1]], -1)
    return xp.stack([(x * mask).sum(-2) for x in (mask, alpha, survived, reached)], -1)


class TeacherForced(NamedTuple):
    """Curves by slot: `acceptance` mean alpha_k; `conditional` and `survival` correspond to conditional@k and
    survival@k of rounds; `expected_length` 1 + sum_k survival_k, each slot over the anchors that have it, so that
    blocks at the end of a text do not reduce it."""

    acceptance: Float[Any, "*axes K"]
    conditional: Float[Any, "*axes K"]
    survival: Float[Any, "*axes K"]
    expected_length: Float[Any, "*axes"]


def teacher_forced(sums: Float[Any, "*axes K four"], slots: int | None = None) -> TeacherForced:
    """The quotients of `teacher_forced_sums`, of the first `slots` slots (default: all).

    >>> found = teacher_forced(np.array([[2.0, 1.5, 1.5, 2.0], [1.0, 0.5, 0.25, 0.5]]))
    >>> found.survival.tolist(), found.conditional.tolist(), float(found.expected_length)
    ([0.75, 0.25], [0.75, 0.5], 2.0)
    """
    xp = array_namespace(sums)
    anchors, alpha, survived, reached = (sums[..., :slots, part] for part in range(4))
    surviving = ratio(survived, anchors)
    return TeacherForced(ratio(alpha, anchors), ratio(survived, reached), surviving, 1 + xp.nansum(surviving, -1))


class PrefixEvents(NamedTuple):
    """Predictions and events of a confidence head at slot k, one row per round: the product `predicted` = c_1 ... c_k,
    the event `passed` that the round accepted at least k tokens, and where it was `seen` (at least k proposed)."""

    predicted: Float[Any, "R K"]
    passed: Bool[Any, "R K"]
    seen: Bool[Any, "R K"]


def prefix_events(confidence: Float[Any, "R K"], accepted: Int[Any, " R"], proposed: Int[Any, " R"]) -> PrefixEvents:
    """From probabilities of conditional acceptance (NaN beyond what was proposed) and the rounds' counts."""
    xp = array_namespace(confidence, accepted, proposed)
    k = xp.arange(1, confidence.shape[-1] + 1, device=confidence.device)
    return PrefixEvents(confidence.cumprod(-1), accepted[:, None] >= k, proposed[:, None] >= k)


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: per equal-width bin the count, the mean prediction and the observed rate (0 if empty)."""

    count: Num[Any, "*axes bins"]
    predicted: Float[Any, "*axes bins"]
    observed: Float[Any, "*axes bins"]

    @property
    def ece(self) -> Float[Any, "*axes"]:
        """Expected calibration error: the mean over observations of their bin's |predicted - observed|."""
        return ratio((self.count * abs(self.predicted - self.observed)).sum(-1), self.count.sum(-1))


def reliability_sums(
    predicted: Float[Any, " N"], observed: Bool[Any, " N"], bins: int = BINS
) -> Float[Any, "bins three"]:
    """For each of the bins [0, 1/bins), ..., [1 - 1/bins, 1]: observations, sum of predictions, sum of events; fp64.

    >>> reliability_sums(np.array([0.25, 0.375, 1.0]), np.array([True, False, True]), bins=2).tolist()
    [[2.0, 0.625, 1.0], [1.0, 1.0, 1.0]]
    """
    xp = array_namespace(predicted, observed)
    predicted, observed = (xp.asarray(x, dtype=xp.float64) for x in (predicted, observed))
    index = xp.asarray(predicted * bins, dtype=xp.int64)
    index = xp.where(index < bins, index, bins - 1)
    columns = (xp.ones_like(predicted), predicted, observed)
    return xp.stack([xp.bincount(index, weights=values, minlength=bins) for values in columns], -1)


def reliability_of(sums: Float[Any, "*axes bins three"]) -> Reliability:
    """The reliability diagram of `reliability_sums`."""
    xp = array_namespace(sums)
    count, predicted, observed = (sums[..., part] for part in range(3))
    each = xp.where(count > 0, count, 1.0)
    return Reliability(count, predicted / each, observed / each)


def calibration_error(predicted: Float[Any, " N"], observed: Bool[Any, " N"], bins: int = BINS) -> Float[Any, ""]:
    """Expected calibration error of probabilities of events. NaN without an observation.

    >>> round(float(calibration_error(np.array([0.81, 0.83, 0.32]), np.array([True, False, False]))), 4)
    0.32
    """
    return reliability_of(reliability_sums(predicted, observed, bins)).ece


def brier_score(predicted: Float[Any, " N"], observed: Bool[Any, " N"]) -> Float[Any, ""]:
    """Mean squared difference of a probability and its event (0 or 1).

    >>> float(brier_score(np.array([0.5, 1.0]), np.array([False, True])))
    0.125
    """
    xp = array_namespace(predicted, observed)
    distance = xp.asarray(predicted, dtype=xp.float64) - xp.asarray(observed, dtype=xp.float64)
    return ratio((distance**2).sum(), len(distance))


def auroc(predicted: Float[Any, " N"], observed: Bool[Any, " N"]) -> Float[Any, ""]:
    """Area under the receiver operating characteristic curve: the probability that an event has a higher predicted
    probability than a non-event, ties counted half. NaN unless there are both.

    >>> float(auroc(np.array([0.9, 0.4, 0.4]), np.array([True, True, False])))
    0.75
    """
    xp = array_namespace(predicted, observed)
    if not len(predicted):
        return ratio(predicted.sum(), 0)
    values, place = xp.unique(xp.asarray(predicted), return_inverse=True)
    events = xp.asarray(observed, dtype=xp.float64)
    one, other = (xp.bincount(place, weights=part, minlength=len(values)) for part in (events, 1 - events))
    below = other.cumsum(-1) - other
    return ratio((one * (below + other / 2)).sum(), one.sum() * other.sum())


def deepspec_row(
    acceptance_lengths: Sequence[Sequence[int]],
    proposal_lengths: Sequence[Sequence[int]],
    accepted_draft_lengths: Sequence[Sequence[int]],
    slots: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The table row of DeepSpec's evaluator from its lists, one per sample (accounting "deepspec").

    `summary` holds the sums, `row` its numbers: acceptance_length = committed / rounds; verify_rate = committed /
    (proposed + rounds); accept_rates_by_position[k-1] is survival@k under another name. `slots`: positions listed
    (default: the longest proposal). Source: the released evaluator (revision afdfa7c). None where it divides by zero.

    >>> deepspec_row([[3, 1], []], [[2, 2], []], [[2, 0], []])["row"]["verify_rate"]
    0.6666666666666666
    """
    rounds = [
        pair
        for proposals, accepted in zip(proposal_lengths, accepted_draft_lengths, strict=True)
        for pair in zip(proposals, accepted, strict=True)
    ]
    if [len(sample) for sample in acceptance_lengths] != [len(sample) for sample in proposal_lengths]:
        raise ValueError("every sample needs one acceptance length per round; these lists differ in length")
    slots = max((proposed for proposed, _ in rounds), default=0) if slots is None else slots
    committed, proposed = sum(map(sum, acceptance_lengths)), sum(proposed for proposed, _ in rounds)
    offered = [sum(m > k for m, _ in rounds) for k in range(slots)]
    accepted = [sum(j > k for _, j in rounds) for k in range(slots)]
    summary = {
        "sample_count": len(proposal_lengths),
        "proposal_count": len(rounds),
        "acceptance_length_sum": committed,
        "proposal_length_sum": proposed,
        "proposals_at_pos": offered,
        "accepted_at_pos": accepted,
    }
    row = {
        "num_samples": len(proposal_lengths),
        "draft_tokens_per_proposal": proposed / len(rounds) if rounds else None,
        "acceptance_length": committed / len(rounds) if rounds else None,
        "verify_rate": committed / (proposed + len(rounds)) if rounds else None,
        "accept_rates_by_position": [a / o if o else None for a, o in zip(accepted, offered, strict=True)],
    }
    return {"summary": summary, "row": row}
