"""Training budgets: how many optimiser steps a draft gets for a stated amount of supervised tokens or of operations.

Methods differ in what a step costs: a sequential draft runs its layers once per slot, a parallel draft once. With equal
steps one method then gets several times the arithmetic of another. A budget states the amount that is equal.

Tokens are supervised slots, as `trained_tokens` counts them. Operations are those of `memory_estimate.flops_of`:
forward and backward pass of the draft, and the projections of draft and target on the vocabulary. Both are means over
the training conversations, computed before training; what a training spent is in its summary.

Axes: N conversations, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from specbench.drafts.draft import Draft
from specbench.ranges import Amount
from specbench.training.memory_estimate import flops_of

SAMPLE = 64  # conversations, spread over all lengths, whose mean stands for all


@dataclass(frozen=True)
class ExpectedCost:
    """Expected supervised slots and floating-point operations of one optimiser step."""

    tokens: float
    flops: float


@dataclass(frozen=True)
class Budget:
    """The amount of one quantity that every method of a comparison gets.

    Args:
        name: of the protocol, which tables show.
        quantity: what is equal: optimiser steps, supervised tokens, or floating-point operations.
        amount: of it.
    """

    name: str
    quantity: Literal["steps", "tokens", "flops"]
    amount: Amount

    def steps(self, cost: ExpectedCost) -> int:
        """Optimiser steps that use the amount up, rounded down.

        Raises:
            ValueError: the amount is less than one step.
        """
        a_step = {"steps": 1.0, "tokens": cost.tokens, "flops": cost.flops}[self.quantity]
        steps = int(self.amount / a_step)
        if steps < 1:
            raise ValueError(
                f"protocol={self.name} protocol.amount={self.amount:g}: one optimiser step of this draft takes "
                f"{a_step:.3g} {self.quantity}; give at least that"
            )
        return steps


def step_cost(
    draft: Draft, lengths: Int[np.ndarray, " N"], supervised: Int[np.ndarray, " N"], conversations: int
) -> ExpectedCost:
    """Expected cost of a step of `conversations` conversations, drawn from those of `lengths` and `supervised`
    tokens."""
    order = np.argsort(lengths, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(SAMPLE, len(order))).round().astype(int))]
    tokens, flops = [], []
    for row in chosen:
        length, answer = int(lengths[row]), int(supervised[row])
        # An anchor is itself a supervised token, and one follows it; or it is any token but the first.
        valid = max(0, (length if draft.supervision == "unshifted" else answer) - 1)
        anchors = min(valid, draft.anchors_per_sample or valid)
        tokens.append(anchors * slots_per_anchor(valid, draft.block_size))
        flops.append(flops_of(draft, length, anchors) if anchors else 0.0)
    return ExpectedCost(conversations * float(np.mean(tokens)), conversations * float(np.mean(flops)))


def slots_per_anchor(anchors: int, slots: int) -> float:
    """Supervised slots of an anchor, on average over the `anchors` valid ones of one answer: an anchor with r
    supervised tokens after it supervises min(r, K) slots, r = 1..anchors."""
    short = min(anchors, slots)
    total = short * (short + 1) / 2 + slots * max(0, anchors - slots)
    return total / anchors if anchors else 0.0
