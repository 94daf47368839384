"""Is speculative text the target's own greedy text? Where the two part, was it a near-tie?

In short formats the same logit comes out a little differently from a block of tokens than from one token, so where two
tokens are almost equally likely either may win, and no comparison of texts says whether verification is right. The
audit decodes every prompt plainly too and looks at the first token that differs, the only one that both texts judge
after the same prefix: how far below the target's best logit does the speculative token lie?

Axes: T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specbench.decoding.loop import Limits, decode
from specbench.decoding.sampling import Sampling
from specbench.models.target import Target


@dataclass(frozen=True)
class Parting:
    """Where a speculative text leaves the target's own: the token's index in the output, and by how much it loses.

    `gap` is the target's best logit there less the speculative token's, from one pass over prompt and common prefix;
    infinite where a text ends without reason. `spacing` is the distance of neighbouring numbers of the target's format
    at the best logit: what rounding one logit can do.
    """

    position: int
    gap: float
    spacing: float

    def is_tie(self, spacings: float) -> bool:
        """Whether the gap is at most so many spacings."""
        return self.gap <= spacings * self.spacing

    def row(self) -> list[float | None]:
        """As a record keeps it; an infinite gap is null."""
        return [float(self.position), None if math.isinf(self.gap) else self.gap, self.spacing]

    @classmethod
    def of(cls, row: Sequence[float | None]) -> Parting:
        """From a record."""
        position, gap, spacing = row
        return cls(int(position), math.inf if gap is None else gap, spacing)


def spacing(value: float, dtype: torch.dtype) -> float:
    """Distance from |value| to the next number of `dtype`.

    >>> spacing(5.0, torch.bfloat16), spacing(1.0, torch.float32) == 2**-23
    (0.03125, True)
    """
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))


@torch.inference_mode()
def parting(target: Target, prompt: Sequence[int], speculative: Sequence[int], own: Sequence[int]) -> Parting | None:
    """The first difference of two greedy continuations of `prompt`; None where they are equal."""
    if list(speculative) == list(own):
        return None
    at = next((i for i, (a, b) in enumerate(zip(speculative, own, strict=False)) if a != b), None)
    if at is None:
        return Parting(min(len(speculative), len(own)), math.inf, 0.0)
    text = torch.tensor([[*prompt, *own[:at]]], device=target.device)
    logits = target.logits(target.states(text, torch.tensor([text.shape[1]])).last[0, -1]).double()
    best = float(logits.max())
    return Parting(at, best - float(logits[speculative[at]]), spacing(best, target.dtype))


def audit(
    target: Target, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], limits: Limits
) -> list[Parting | None]:
    """Hold speculative greedy outputs against plain greedy decoding of the same prompts, one entry a prompt."""
    own = {done.index: done.output_ids for done in decode(target, prompts, Sampling(), limits)}
    return [parting(target, prompts[i], outputs[i], own[i]) for i in range(len(prompts))]


def verdict(rows: Sequence[Sequence[float | None] | None], spacings: float) -> dict[str, Any]:
    """Counts over the `audit` entries of records: texts, identical ones, ties and violations, and the worst gap.

    `worst` is the largest gap in spacings (None: no text parted, or one ended without reason).
    """
    found = [Parting.of(row) for row in rows if row]
    ties = sum(parted.is_tie(spacings) for parted in found)
    worst = max((parted.gap / parted.spacing if parted.spacing else math.inf for parted in found), default=math.inf)
    return {
        "texts": len(rows),
        "identical": len(rows) - len(found),
        "ties": ties,
        "violations": len(found) - ties,
        "worst": None if math.isinf(worst) else worst,
        "spacings": spacings,
    }
