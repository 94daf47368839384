"""target=FOLDER_OR_ID on the command line: any model in a folder or on the Hub, in addition to those of
configs/target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

KEY = "target="


def expand(overrides: Sequence[str], known: Sequence[str]) -> list[str]:
    """`target=VALUE` becomes `target=folder target.id=VALUE` when VALUE is none of `known` and is a path or a hub id.

    Values of a sweep, and names without a slash that are not a path, are not changed, so a misspelt name gives an
    error.
    """
    found: list[str] = []
    for word in overrides:
        value = word.removeprefix(KEY)
        named = not word.startswith(KEY) or value in known or "," in value or not known
        if named or not ("/" in value or Path(value).exists()):
            found.append(word)
        else:
            found += ["target=folder", f"target.id={quoted(value)}"]
    return found


def quoted(value: str) -> str:
    """A value as Hydra's grammar reads it whole."""
    if re.fullmatch(r"[\w./:~-]+", value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
