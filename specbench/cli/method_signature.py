"""Whether the class of a method takes the settings that its YAML gives it."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from hydra.utils import get_class


def fits(method: Mapping[str, Any]) -> None:
    """Refuse settings that the method's class does not take, with the reason where it is known."""
    draft = method["draft"]
    kind = get_class(draft["_target_"])
    takes = {name for part in kind.__mro__ if "__init__" in vars(part) for name in signature(part.__init__).parameters}
    for name in draft.keys() - takes - {"_target_"}:
        if name.startswith(("markov", "confidence")):
            raise ValueError(
                f"method={method['name']} has no {name}: {kind.__name__} has no Markov or confidence head; use "
                "method=dspark, or leave head= out"
            )
        known = ", ".join(sorted(takes - {"self", "args", "kwargs", "backbone", "tables", "draft_vocabulary"}))
        raise ValueError(f"method={method['name']} has no setting draft.{name}; it takes {known}")
