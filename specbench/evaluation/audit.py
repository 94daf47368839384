"""Check that speculative text equals the greedy text of the target, up to ties of nearly equal logits.

The reference is the forward pass of the model in transformers without a cache and with its own head, which is
independent of the pass that decoded the text. One pass over prompt and text gives the target's most likely token after
every prefix, and each token must be this one. In 16-bit formats the same logit differs slightly between a block of
tokens and a whole text, so either of two almost equally likely tokens can be chosen: the audit reports the largest
distance between the logit of a token and the best logit.

Axes: T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specbench.decoding.loop import Limits
from specbench.models.target import Target


@dataclass(frozen=True)
class Parting:
    """The largest deviation of a speculative text from the greedy text of the target: index of the token, and size.

    `gap`: the best logit of the target at this position minus the logit of the token in the text, from one pass over
    the text before it; infinite if a text ends without reason. `spacing`: the distance of neighbouring numbers of the
    target's format at the best logit, which is the error of rounding one logit.
    """

    position: int
    gap: float
    spacing: float

    def is_tie(self, spacings: float) -> bool:
        """Whether the gap is at most so many spacings."""
        return self.gap <= spacings * self.spacing

    def row(self) -> list[float | None]:
        """The entry in a record; an infinite gap is null."""
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
def parting(target: Target, prompt: Sequence[int], text: Sequence[int], limits: Limits) -> Parting | None:
    """The token of a greedy continuation of `prompt` with the largest gap; None if every token is the target's choice.

    A text that continues after a stop token, or ends without one before its maximum length, has an infinite gap there.
    """
    stop = next((i for i, token in enumerate(text) if token in limits.stop_token_ids), None)
    if stop is not None and stop < len(text) - 1:
        return Parting(stop + 1, math.inf, 0.0)
    if stop is None and len(text) < limits.max_new_tokens:
        return Parting(len(text), math.inf, 0.0)
    whole = _choices(target, [*prompt, *text[:-1]], len(text))
    best, chosen = whole.max(-1).values, whole[torch.arange(len(text)), torch.tensor(text)]
    loses = (best - chosen) / torch.tensor([spacing(float(value), target.dtype) for value in best])
    for at in loses.argsort(descending=True).tolist():
        if loses[at] <= 0:
            break
        # The same from the text up to this position only, from which the target would have continued.
        logits = _choices(target, [*prompt, *text[:at]], 1)[0]
        top = float(logits.max())
        if top > float(logits[text[at]]):
            return Parting(at, top - float(logits[text[at]]), spacing(top, target.dtype))
    return None


def _choices(target: Target, tokens: Sequence[int], count: int) -> Tensor:
    """Logits of the model in transformers at the last `count` positions of a text, in double precision on the CPU."""
    text = torch.tensor([list(tokens)], device=target.device)
    return target.live_logits(text, torch.tensor([len(tokens)]), count)[0, -count:].double().cpu()


def audit(
    target: Target, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], limits: Limits
) -> list[Parting | None]:
    """Compare greedy outputs of prompts with the choices of the model in transformers, one entry per prompt."""
    return [parting(target, prompt, output, limits) for prompt, output in zip(prompts, outputs, strict=True)]


def verdict(rows: Sequence[Sequence[float | None] | None], spacings: float) -> dict[str, Any]:
    """Counts over the `audit` entries of records: texts, identical ones, ties and violations, and the worst gap.

    `worst` is the largest gap in spacings (None: no text deviated, or one ended without reason).
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
