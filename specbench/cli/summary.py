"""The summary at the end of a verb: result, path, main numbers, time, next command."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specbench.progress import duration, first_rank

_within = 0  # verbs at work around the present one


@contextmanager
def within() -> Iterator[None]:
    """Context for a verb that is part of another one: it ends with one line and no next command."""
    global _within
    _within += 1
    try:
        yield
    finally:
        _within -= 1


def report(
    what: str, where: str | Path, seconds: float, facts: Mapping[str, Any] | None = None, next: str | None = None
) -> None:
    """Print the summary on stdout, from the first rank: a box on a terminal, lines elsewhere.

    `facts` that are not texts or numbers are left out. The next command is printed below the box, on one line to copy.
    """
    if not first_rank():
        return
    rows = {key.replace("_", " "): _text(value) for key, value in (facts or {}).items() if _is_plain(value)}
    if _within:
        found = "".join(f", {key} {value}" for key, value in rows.items() if value != "0")
        print(f"{what}: done in {duration(seconds)}{found} ({where})")
    elif sys.stdout.isatty():
        _box(f"{what}: done in {duration(seconds)}", {**rows, "in": str(where)})
        if next:
            print(f"next: {next}")
    else:
        print(f"{what}: done in {duration(seconds)}")
        for key, value in rows.items():
            print(f"  {key}: {value}")
        print(f"  in {where}")
        if next:
            print(f"  next: {next}")
    sys.stdout.flush()


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _text(value: str | int | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _box(title: str, rows: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        table.add_row(Text(key, "bold"), Text(value, overflow="fold"))
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    panel = Panel(table, title=Text(title, "bold"), title_align="left", expand=False, width=None)
    Console(width=width, highlight=False).print(panel)
