"""Whether the class of a method takes the settings that its YAML gives it."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from hydra.utils import get_class

from specbench.drafts.parallel import ParallelDraft


def fits(method: Mapping[str, Any]) -> None:
    """Refuse settings that the method's class does not take, with the reason where it is known."""
    draft = method["draft"]
    kind = get_class(draft["_target_"])
    takes = {name for part in kind.__mro__ if "__init__" in vars(part) for name in signature(part.__init__).parameters}
    for name in draft.keys() - takes - {"_target_"}:
        if name.startswith(("markov", "confidence")):
            raise ValueError(
                f"method={method['name']} has no {name}: these heads tie the slots of DSpark's blocks, while "
                f"{kind.__name__}'s slots {'are independent' if issubclass(kind, ParallelDraft) else 'see each other'} "
                "by definition; use method=dspark, or leave head= out"
            )
        known = ", ".join(sorted(takes - {"self", "args", "kwargs", "backbone", "tables", "draft_vocabulary"}))
        raise ValueError(f"method={method['name']} has no setting draft.{name}; it takes {known}")
