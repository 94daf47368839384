"""The vocabulary part of a training step alone: DSpark's head with its loss, chunked against straightforward.

Axes: N blocks, K slots, D hidden, R Markov rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.blocks import Blocks
from specbench.objective import Objective
from specbench.oracle import reference_objective
from specbench.projection import add_linear_
from specbench.stepspeed import StepCost, measure
from specbench.tables import Tables

DSPARK = {"ce": 0.1, "tv": 0.9, "confidence": 1.0, "slot_weight": {"exp": 4.0}}


@dataclass(frozen=True)
class Shape:
    """Sizes of the step; every slot is supervised, so that chunked and straightforward project as many rows."""

    anchors: int = 64
    slots: int = 7
    hidden: int = 256
    vocabulary: int = 151936
    rank: int = 256
    device: str = "cpu"
    dtype: str = "float32"
    objective: Mapping[str, Any] = field(default_factory=lambda: dict(DSPARK))


class MarkovReadout(nn.Module):
    """A frozen head with a vanilla Markov bias and a confidence head: what DSpark does after its last layer."""

    draft_vocabulary = None

    def __init__(self, tables: Tables, hidden: int, vocabulary: int, rank: int):
        super().__init__()
        self.tables, self.size = tables, hidden
        self.w1, self.w2 = nn.Embedding(vocabulary, rank), nn.Linear(rank, vocabulary, bias=False)
        self.own = nn.Linear(hidden + rank, 1)

    def features(self, hidden: Float[Tensor, "*b D"], previous: Int[Tensor, "*b"]) -> Float[Tensor, "*b F"]:
        return torch.cat([hidden, self.w1(previous)], -1)

    def project(self, features: Float[Tensor, "r F"]) -> Float[Tensor, "r V"]:
        return add_linear_(self.tables.logits(features[:, : self.size]), features[:, self.size :], self.w2.weight)

    def projection_parameters(self) -> list[nn.Parameter]:
        return [self.w2.weight]

    def confidence(self, hidden: Float[Tensor, "*b D"], previous: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self.own(self.features(hidden, previous)).squeeze(-1)


def build(shape: Shape, chunked: bool) -> Callable[[], Tensor]:
    """One step of the head: loss, backward, gradients dropped."""
    torch.manual_seed(0)
    place = {"device": shape.device, "dtype": getattr(torch, shape.dtype)}
    head = torch.randn(shape.vocabulary, shape.hidden, **place).mul_(shape.hidden**-0.5)
    tables = Tables(head[:1], head)
    draft = MarkovReadout(tables, shape.hidden, shape.vocabulary, shape.rank).to(**place)
    size = (1, shape.anchors, shape.slots)
    hidden = 3 * torch.randn(*size, shape.hidden, **place)
    previous, labels = torch.randint(0, shape.vocabulary, (2, *size), device=shape.device)
    blocks = Blocks(
        hidden=hidden.requires_grad_(),
        target=hidden.detach() + torch.randn(*size, shape.hidden, **place),
        previous=previous,
        labels=labels,
        mask=torch.ones(size, dtype=torch.bool, device=shape.device),
    )
    objective = Objective(**shape.objective)

    def step() -> Tensor:
        loss = (objective if chunked else partial(reference_objective, objective))(draft, tables, blocks)
        loss.mean.backward()
        draft.zero_grad(set_to_none=True)
        hidden.grad = None
        return loss.value.detach()

    return step


def compare(shape: Shape | None = None, repeats: int = 5, threads: int = 2) -> dict[str, StepCost]:
    """Costs of the chunked step and of the straightforward one."""
    shape = shape or Shape()
    variants = {"chunked": partial(build, shape, True), "straightforward": partial(build, shape, False)}
    return measure(variants, repeats=repeats, threads=threads)
