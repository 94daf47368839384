"""Parts of a long measurement, each kept in a file as soon as it is there: a stopped run continues behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from specbench.files.atomic import read_json, write_json

Measured = TypeVar("Measured")


class KeptParts:
    """What was measured so far, by name, in one JSON file.

    path: of the file; one that is there is continued if `resumes`, else replaced. tell: called with one line about a
    part when it is there.
    """

    def __init__(self, path: Path, resumes: bool, tell: Callable[[str], None] = print) -> None:
        self.path, self.tell = path, tell
        self.found: dict[str, Any] = read_json(path, {}) if resumes else {}

    def take(self, name: str, measure: Callable[[], Measured], line: Callable[[Measured], str]) -> Measured:
        """The part `name`: measured now and kept, or as a run before left it."""
        if name not in self.found:
            self.found[name] = measure()
            write_json(self.path, self.found)
        self.tell(f"{name}: {line(self.found[name])}")
        return self.found[name]
