"""One progress display for long stages: a bar with rate and time left, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from specbench.cli.stages import duration, first_rank

Item = TypeVar("Item")


class Progress:
    """Counts towards `total` units; a context manager.

    On a terminal a live bar on stderr; elsewhere a line every `every` seconds, and one at the end. `total=None` shows
    counts and rate alone. `start` is what an earlier attempt had done: it counts as done and not into the rate.
    """

    def __init__(
        self, what: str, total: int | None, unit: str = "it", *, start: int = 0, every: float = 15.0, shown: bool = True
    ) -> None:
        self.what, self.total, self.unit, self.count, self.every = what, total, unit, start, every
        self._start, self._note = start, ""
        self._began = self._last = time.monotonic()
        self._shown = shown and first_rank()
        self._bars: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._shown and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(self.unit),
                TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self._bars = Bars(*columns, console=Console(stderr=True))
            self._bars.start()
            self._task = self._bars.add_task(self.what, total=self.total, completed=self.count, rate="", note="")
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` is shown beside them, for example a loss."""
        self.count += count
        self._note = note or self._note
        if self._bars is not None:
            self._bars.update(self._task, completed=self.count, rate=self._rate(), note=self._note)
        elif self._shown and time.monotonic() - self._last >= self.every:
            self._last = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """What a plain line says: `answers: 240/1200 prompts, 35.2 prompts/s, 27.3 s left`."""
        parts = [f"{self.what}: {self.count}{'' if self.total is None else f'/{self.total}'} {self.unit}", self._rate()]
        done, elapsed = self.count - self._start, time.monotonic() - self._began
        if self.total is not None and done and self.count < self.total:
            parts.append(f"{duration((self.total - self.count) * elapsed / done)} left")
        return ", ".join(part for part in (*parts, self._note) if part)

    def _rate(self) -> str:
        rate = (self.count - self._start) / max(time.monotonic() - self._began, 1e-9)
        if not rate:
            return ""
        return f"{rate:.1f} {self.unit}/s" if rate >= 0.1 else f"{duration(1 / rate)} a {self.unit}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()
        elif self._shown:
            print(self.line(), file=sys.stderr, flush=True)
