"""Check that the class of a method accepts the settings in its YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specbench.cli.schema import arguments_of

GIVEN = ("backbone", "tables", "draft_vocabulary")  # what the program passes itself


def fits(method: Mapping[str, Any]) -> None:
    """Refuse settings that the method's class does not take, with the reason where it is known."""
    draft = method["draft"]
    kind = draft["_target_"]
    takes = {
        field.alias or name for name, field in arguments_of(kind, (), "method.draft._target_").model_fields.items()
    }
    for name in draft.keys() - takes - {"_target_"}:
        if name.startswith(("markov", "confidence")):
            raise ValueError(
                f"method={method['name']} has no {name}: {kind.rpartition('.')[2]} has no Markov or confidence head; "
                "use method=dspark, or leave head= out"
            )
        known = ", ".join(sorted(takes.difference(GIVEN)))
        raise ValueError(f"method={method['name']} has no setting draft.{name}; it takes {known}")
