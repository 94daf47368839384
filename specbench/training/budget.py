"""Training budgets: what every method of a comparison gets of one quantity, and what that comes to.

Methods differ in what a training step costs: a sequential draft runs its layers once per slot, a parallel draft once.
With equal steps one method then gets several times the arithmetic of another. A budget states the amount that is
equal. Three quantities decide the number of optimiser steps (tokens, operations, hours, beside the steps themselves),
three the depth of the draft (parameters, and the time of a round, in seconds or as a share of the target's pass).

Tokens are supervised slots, as `trained_tokens` counts them. Operations are those of `memory_estimate.flops_of`:
forward and backward pass of the draft, and the projections of draft and target on the vocabulary. Both are means over
the training conversations, computed before training; what a training spent is in its summary. Seconds are measured
(specbench/profiling) and given to the functions here.

Axes: N conversations, K slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from specbench.data.loading.step_data import StepData
from specbench.drafts.draft import Draft
from specbench.ranges import MANY, MOST_LAYERS, Amount
from specbench.training.memory_estimate import flops_of

SAMPLE = 64  # conversations, spread over all lengths, whose mean stands for all
EqualQuantity = Literal["recipe", "steps", "tokens", "flops", "hours", "parameters", "round_share", "round_seconds"]
OF_SIZE = ("parameters", "round_share", "round_seconds")
# What an amount of a quantity is called in messages.
UNITS = {
    "steps": "optimiser steps",
    "tokens": "supervised tokens",
    "flops": "floating-point operations",
    "hours": "hours of optimiser steps",
    "parameters": "trained parameters",
    "round_share": "of the target's pass",
    "round_seconds": "seconds a round",
}
# Settings of a draft that say how deep it is, in the order in which they are looked for.
DEPTHS = ("layers", "depth")


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
        quantity: what is equal: steps, tokens, flops or hours of training, parameters of the draft, or the time of a
            round; "recipe": nothing, every method has the steps of its own recipe.
        amount: of it. For "recipe" it has no effect, so that one command can set it for all protocols of a sweep.

    Raises:
        ValueError: there is no amount of what is equal.
    """

    name: str
    quantity: EqualQuantity
    amount: Amount | None

    def __post_init__(self) -> None:
        if self.amount is None and self.quantity != "recipe":
            raise ValueError(f"protocol.quantity={self.quantity} protocol.amount=null: give an amount of what is equal")

    @property
    def of_size(self) -> bool:
        """Whether it decides how deep a draft is, and leaves the steps to the trainer."""
        return self.quantity in OF_SIZE

    @property
    def text(self) -> str:
        """`matched_flops: 2e+13 floating-point operations`."""
        if self.quantity == "recipe":
            unused = "" if self.amount is None else f" (protocol.amount={self.amount:g} has no effect)"
            return f"{self.name}: the steps of each recipe{unused}"
        return f"{self.name}: {self.amount:g} {UNITS[self.quantity]}"

    def steps(self, cost: ExpectedCost, seconds: float | None = None) -> int | None:
        """Optimiser steps that use the amount up, rounded down; None where it does not decide them.

        Args:
            cost: of a step of this draft.
            seconds: of a step of this draft, for a budget of hours.

        Raises:
            ValueError: the amount is less than one step, or more than MANY of them.
        """
        if self.quantity == "recipe" or self.of_size:
            return None
        a_step = {
            "steps": 1.0,
            "tokens": cost.tokens,
            "flops": cost.flops,
            "hours": math.nan if seconds is None else seconds / 3600,
        }[self.quantity]
        if math.isnan(a_step):
            raise ValueError(f"protocol={self.name}: the seconds of a step of this draft were not measured")
        steps = int(self.amount / a_step)
        if steps < 1:
            raise ValueError(
                f"protocol={self.name} protocol.amount={self.amount:g}: one optimiser step of this draft takes "
                f"{a_step:.3g} {self.quantity}; give at least that"
            )
        if steps > MANY:
            raise ValueError(
                f"protocol={self.name} protocol.amount={self.amount:g}: these are {steps:.3g} optimiser steps of this "
                f"draft, and a training has at most {MANY:,}; give at most {MANY * a_step:.3g}"
            )
        return steps

    def layers(self, shallow: float, deep: float, between: int) -> int:
        """Layers of the deepest draft whose cost is within the amount, if a layer always costs the same.

        Args:
            shallow: cost of a draft of one layer, in the unit of the amount.
            deep: cost of one with `between` layers more.

        Raises:
            ValueError: one layer is more than the amount, layers cost nothing, or more than MOST_LAYERS fit.
        """
        each = (deep - shallow) / between
        if shallow > self.amount:
            raise ValueError(
                f"protocol={self.name} protocol.amount={self.amount:g}: a draft of one layer has {shallow:.3g} "
                f"{UNITS[self.quantity]}; give at least that"
            )
        if each <= 0:
            raise ValueError(
                f"protocol={self.name}: {between + 1} layers were measured at {deep:.3g} {UNITS[self.quantity]} and "
                f"one at {shallow:.3g}, so the depth that fits cannot be told; repeat it on a quiet machine"
            )
        layers = 1 + int((self.amount - shallow) / each + 1e-9)
        if layers > MOST_LAYERS:
            raise ValueError(
                f"protocol={self.name} protocol.amount={self.amount:g}: a draft of {layers:.3g} layers fits, and one "
                f"has at most {MOST_LAYERS}; give at most {shallow + (MOST_LAYERS - 1) * each:.3g}"
            )
        return layers


def depth_of(settings: dict[str, object]) -> str:
    """The setting of a draft that says how deep it is. Errors: ValueError for a draft without one."""
    found = next((key for key in DEPTHS if key in settings), None)
    if found is None:
        raise ValueError(f"a draft without {' or '.join(DEPTHS)} cannot be made as deep as a budget allows")
    return found


def step_cost(draft: Draft, data: StepData) -> ExpectedCost:
    """Expected cost of an optimiser step on the training conversations of `data`.

    A step with replay takes some conversations from each of two caches, so the two are averaged apart. The last step
    of an epoch can have fewer conversations, which the mean over the steps of an epoch holds.
    """
    parts = [
        (count, conversation_cost(draft, data.lengths[rows], data.supervised[rows])) for rows, count in data.a_step()
    ]
    return ExpectedCost(sum(n * cost.tokens for n, cost in parts), sum(n * cost.flops for n, cost in parts))


def conversation_cost(draft: Draft, lengths: Int[np.ndarray, " N"], supervised: Int[np.ndarray, " N"]) -> ExpectedCost:
    """Expected cost of one conversation, drawn from those of `lengths` and `supervised` tokens."""
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
    return ExpectedCost(float(np.mean(tokens)), float(np.mean(flops)))


def slots_per_anchor(anchors: int, slots: int) -> float:
    """Supervised slots of an anchor, on average over the `anchors` valid ones of one answer: an anchor with r
    supervised tokens after it supervises min(r, K) slots, r = 1..anchors."""
    short = min(anchors, slots)
    total = short * (short + 1) / 2 + slots * max(0, anchors - slots)
    return total / anchors if anchors else 0.0
