"""The loss of a draft's base logits beside that of its final ones (`Draft.project_base`, `Draft.project`).

Both are the same sum of terms with the same slot weights, so any method with base logits can be trained so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BaseLoss:
    """How both losses make one.

    {start: s, share: t}   (1 - lam) final + lam base; lam falls linearly from s to 0 over the first share t of the
                           training and is 0 after it: Domino (arXiv 2605.29707) with s = 1
    {add: c}               final + c base: DFlash2 with c = 1
    """

    start: float | int = 1.0
    share: float | int = 1.0
    add: float | int | None = None

    @classmethod
    def of(cls, setting: Mapping[str, float | int]) -> BaseLoss:
        """From a configuration. Errors: ValueError for other settings or values out of range."""
        known = ({"start", "share"}, {"add"})
        if set(setting) not in known:
            raise ValueError(f"objective base={dict(setting)}: give {{start: s, share: t}} or {{add: c}}")
        made = cls(**setting)
        if not 0 < made.share <= 1 or not 0 <= made.start <= 1:
            raise ValueError(
                f"objective base={dict(setting)}: start must be within 0 and 1, share above 0 and at most 1"
            )
        if made.add is not None and not 0 < made.add < float("inf"):
            raise ValueError(f"objective base={dict(setting)}: give a coefficient above 0")
        return made

    def factors(self, progress: float) -> tuple[float, float]:
        """Factors of the final and of the base loss when a share `progress` of the training is done.

        >>> BaseLoss(start=1.0, share=0.5).factors(0.125)
        (0.25, 0.75)
        """
        if self.add is not None:
            return 1.0, float(self.add)
        weight = self.start * max(0.0, 1 - progress / self.share)
        return 1 - weight, weight
