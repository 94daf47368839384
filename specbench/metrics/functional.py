"""What is measured, defined once: pure functions on counts of decoding rounds.

A round proposes m tokens and accepts j <= m of them. All numbers of a decoding run follow from two things a prompt: the
histogram H[m, j] of its rounds and the tokens that they committed. What was never observed is NaN, never zero.

Axes: K slots, M blocks; a histogram is (K+1, K+1), m j.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Triples = Iterable[Sequence[int]]


def histogram(proposed: Sequence[int], accepted: Sequence[int], slots: int) -> Int[Tensor, "m j"]:
    """H[m, j]: how many rounds proposed m and accepted j tokens, m and j in 0..slots.

    >>> histogram([2, 2, 1], [2, 0, 0], slots=2).tolist()
    [[0, 0, 0], [1, 0, 0], [1, 0, 1]]
    """
    return histogram_of(zip(proposed, accepted, [1] * len(proposed), strict=True), slots)


def histogram_of(triples: Triples, slots: int) -> Int[Tensor, "m j"]:
    """H[m, j] from a record's (proposed, accepted, count) triples. ValueError for a round that cannot be.

    >>> histogram_of([(2, 0, 1), (2, 2, 5)], slots=2).tolist()
    [[0, 0, 0], [0, 0, 0], [1, 0, 5]]
    """
    counts = torch.zeros(slots + 1, slots + 1, dtype=torch.int64)
    for m, j, count in triples:
        if not 0 <= j <= m <= slots or count < 0:
            raise ValueError(f"{count} rounds that accept {j} of {m} proposed tokens with {slots} slots cannot be")
        counts[m, j] += count
    return counts


def accepted_length(committed: Tensor, rounds: Tensor) -> Tensor:
    """Tokens committed a round, the bonus or corrected token included.

    >>> accepted_length(torch.tensor(7), torch.tensor(2))
    tensor(3.5000, dtype=torch.float64)
    """
    return committed.double() / rounds.double()


def survival(counts: Int[Tensor, "m j"]) -> tuple[Float[Tensor, " K"], Int[Tensor, " K"]]:
    """survival@k = rounds with j >= k / rounds that proposed at least k; and those counts n_k.

    >>> values, n = survival(histogram([2, 2, 1], [2, 1, 0], slots=2))
    >>> [round(v, 4) for v in values.tolist()], n.tolist()
    ([0.6667, 0.5], [3, 2])
    """
    proposed, accepted = _at_least(counts.sum(1)), _at_least(counts.sum(0))
    return accepted / proposed.double(), proposed


def conditional_acceptance(counts: Int[Tensor, "m j"]) -> tuple[Float[Tensor, " K"], Int[Tensor, " K"]]:
    """conditional@k = rounds with j >= k / rounds that proposed at least k and had j >= k-1; and those counts n_k.

    >>> values, n = conditional_acceptance(histogram([2, 2, 1, 1], [2, 1, 0, 1], slots=2))
    >>> values.tolist(), n.tolist()
    ([0.75, 0.5], [4, 2])
    """
    slots = len(counts) - 1
    k = torch.arange(1, slots + 1, device=counts.device)
    m = torch.arange(slots + 1, device=counts.device)
    # reached[k]: sum over m >= k and j >= k-1
    wide, long = (m[None] >= k[:, None]).to(counts.dtype), (m[None] >= k[:, None] - 1).to(counts.dtype)
    reached = torch.einsum("km,mj,kj->k", wide.double(), counts.double(), long.double())
    return _at_least(counts.sum(0)) / reached, reached.long()


def _at_least(counts: Int[Tensor, " n"]) -> Int[Tensor, " K"]:
    """Counts of values >= k for k = 1..K."""
    return counts.flip(0).cumsum(0).flip(0)[1:]


def suffix_decay(conditional: Float[Tensor, " K"], n: Int[Tensor, " K"]) -> Float[Tensor, ""]:
    """Slope of log conditional@k over k, least squares weighted by n_k: below zero, later slots are worse.

    A slot that nothing reached, or where nothing was ever accepted (no logarithm), carries no weight; NaN when fewer
    than two slots are left.

    >>> suffix_decay(torch.tensor([0.8, 0.4, 0.2]).double(), torch.tensor([100, 80, 32]))
    tensor(-0.6931, dtype=torch.float64)
    """
    usable = (n > 0) & (conditional > 0)
    if usable.sum() < 2:
        return conditional.new_full((), float("nan"))
    weight = n[usable].double()
    slot = torch.arange(1, len(n) + 1, device=n.device)[usable].double()
    level = conditional[usable].log()
    centred = slot - (weight * slot).sum() / weight.sum()
    return (weight * centred * level).sum() / (weight * centred**2).sum()


def expected_lengths(alpha: Float[Tensor, "M K"], mask: Bool[Tensor, "M K"]) -> Float[Tensor, " M"]:
    """1 + sum_k prod_{i<=k} alpha_i over the supervised slots of each block (a prefix); 0 for a block without any.

    >>> expected_lengths(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.ones(2, 2, dtype=torch.bool)).tolist()
    [1.75, 2.0]
    """
    return mask[:, 0] + (alpha * mask).cumprod(-1).sum(-1)


def deepspec_row(
    acceptance_lengths: Sequence[Sequence[int]],
    proposal_lengths: Sequence[Sequence[int]],
    accepted_draft_lengths: Sequence[Sequence[int]],
    slots: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The table row of DeepSpec's evaluator from its lists, one a sample (accounting "deepspec").

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
        raise ValueError("every sample needs one acceptance length a round; these lists differ in length")
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
