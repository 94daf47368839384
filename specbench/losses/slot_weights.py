"""Weights of the slots of a block in the loss.

Axes: M blocks, K slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class SlotWeight:
    """The weight w_k of slot k = 1..K, the same for every term of the objective.

    exp g          exp(-(k-1)/g). DSpark's paper prints g = K; its released configurations use g = 4 with K = 7.
    power beta     beta^(k-1): Eagle3 0.8, MTP 0.6
    uniform        1
    dpace a        D-PACE (arXiv 2605.18810): s_k = (1-a) p_k(y_k) + a, c_k = prod_{j<=k} s_j, w_k = sum_{j>=k} c_j
                   over the supervised slots, without gradient
    first_failure  Spec-AUF (arXiv 2607.01893; also `specauf`): 1 up to and including the draft's first miss
                   (argmax p is not y), 0 after it
    """

    kind: str
    constant: float = math.nan

    @classmethod
    def of(cls, setting: str | Mapping[str, float | int]) -> SlotWeight:
        """From a configuration: 'uniform', 'first_failure', {'exp': 4.0}, {'power': 0.8}, {'dpace': 0.5}."""
        if isinstance(setting, str):
            kind = "first_failure" if setting == "specauf" else setting
            if kind in ("uniform", "first_failure"):
                return cls(kind)
        elif len(setting) == 1:
            ((kind, constant),) = setting.items()
            ranges = {"exp": (0.0, math.inf), "power": (0.0, 1.0), "dpace": (0.0, 1.0)}
            if kind in ranges:
                low, high = ranges[kind]
                if not low < float(constant) <= high:
                    raise ValueError(f"slot_weight {kind}={constant} must be above {low:g} and at most {high:g}")
                return cls(kind, float(constant))
        raise ValueError(
            f"slot_weight={setting!r} is unknown; choose 'uniform', 'first_failure', {{'exp': g}}, {{'power': beta}} "
            "or {'dpace': a}"
        )

    @property
    def dynamic(self) -> bool:
        """Whether the weights depend on what the draft predicts in the block."""
        return self.kind in ("dpace", "first_failure")

    def static(self, slots: int, device: torch.device | None = None) -> Float[Tensor, " K"]:
        """w_1 .. w_K of a weight that depends only on the slot (fp64)."""
        k = torch.arange(slots, dtype=torch.float64, device=device)
        if self.kind == "exp":
            return torch.exp(-k / self.constant)
        return self.constant**k if self.kind == "power" else torch.ones_like(k)

    def weigh(
        self, mask: Bool[Tensor, "M K"], probability: Float[Tensor, "M K"], hit: Bool[Tensor, "M K"]
    ) -> Float[Tensor, "M K"]:
        """Weights of whole blocks, 0 where unsupervised; `probability` is p(y), `hit` whether argmax p is y."""
        probability = probability.detach()
        if self.kind == "dpace":
            survives = ((1 - self.constant) * probability + self.constant).masked_fill(~mask, 0.0).cumprod(-1)
            weights = survives.flip(-1).cumsum(-1).flip(-1)
        elif self.kind == "first_failure":
            misses = (~hit & mask).long().cumsum(-1)
            weights = ((misses - (~hit & mask).long()) == 0).to(probability.dtype)
        else:
            weights = self.static(mask.shape[-1], mask.device).to(probability.dtype).expand_as(probability)
        return weights * mask
