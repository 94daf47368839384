"""Progress of long loops: one live line on a terminal, plain lines from time to time elsewhere.

Every long loop counts in a `Progress`: training, validation, decoding, caches, answers, measurements, comparisons. One
that begins inside another shows a second line while it runs.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from types import TracebackType
from typing import Any, ClassVar

# Seconds between plain lines: a tenth of the time so far, within these bounds, so that a log of a day stays readable.
SOONEST, LATEST = 5.0, 60.0
WINDOW = 60.0  # seconds that a rate looks back
FEWEST = 5  # times of counting that it looks back over at least, however long ago they are


def first_rank() -> bool:
    """Whether this process is the one that writes, under torchrun, Slurm or Lightning's own launcher."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return next((rank for rank in ranks if rank), "0") == "0"


def duration(seconds: float | int) -> str:
    """4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class RecentRate:
    """Recent rate in units per second, from times and counts; None until it is meaningful.

    The first unit only starts the clock, because it includes one-time work such as loading and compiling. There is no
    rate before as much time (at most WINDOW) has passed after it as before it, because units that are processed
    together also end together.
    """

    def __init__(self, began: float) -> None:
        self._began = began
        self._first: float | None = None
        self._marks: deque[tuple[float, int]] = deque()
        self._last = (began, 0)
        self._times = 0

    def add(self, now: float, count: int) -> None:
        """`count` units are done at the time `now`."""
        self._times += 1
        self._last = (now, count)
        if self._first is None:
            self._first = now
        elif now - self._marks[-1][0] < WINDOW / 60:
            return
        self._marks.append((now, count))
        while len(self._marks) > FEWEST and self._marks[1][0] <= now - WINDOW:
            self._marks.popleft()

    def at(self, now: float) -> float | None:
        """Units per second at the time `now`."""
        if self._first is None or self._times < 2:
            return None
        if now - self._first < min(WINDOW, max(1.0, self._first - self._began)):
            return None
        (since, before), (last, count) = self._marks[0], self._last
        usual = (last - self._first) / (self._times - 1)
        # Between two units the rate stands still; where the next one is long overdue it falls.
        until = last if now - last <= 2 * usual and last > since else now
        return (count - before) / (until - since) if count > before else None


class Progress:
    """Counts towards `total` units; a context manager.

        with Progress("answers", 1200, "prompts") as bar:
            for prompt in prompts:
                ...
                bar.advance(note="2 failed")

    `total=None` shows only count and rate. `start`: units done by an earlier attempt, which do not count in the rate.
    Output goes to stderr, from the first rank only; `shown=False` shows nothing.
    """

    _display: ClassVar[Any] = None  # rich's, of the outermost on a terminal
    _open: ClassVar[int] = 0  # how many of them are shown now

    def __init__(
        self, what: str, total: int | None, unit: str = "items", *, start: int = 0, shown: bool = True
    ) -> None:
        self.what, self.total, self.unit, self.count, self.note = what, total, unit, start, ""
        self._start = start
        self._shown = shown and first_rank()
        self._inner, self._task, self._owns = False, None, False
        self._restart()

    def _restart(self) -> None:
        self._began = self._said = time.monotonic()
        self._recent = RecentRate(self._began)

    def __enter__(self) -> Progress:
        self._restart()
        if not self._shown:
            return self
        self._inner, Progress._open = Progress._open > 0, Progress._open + 1
        if Progress._display is None and sys.stderr.isatty():
            Progress._display, self._owns = _display(), True
            Progress._display.start()
        if Progress._display is not None:
            self._task = Progress._display.add_task(self.what, total=self.total, completed=self.count, of=self)
        return self

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """`count` more units are done; `note` is shown beside them from now on, for example a loss."""
        self.count += count
        self.note = self.note if note is None else note
        now = time.monotonic()
        if count:
            self._recent.add(now, self.count - self._start)
        if self._task is not None:
            Progress._display.update(self._task, completed=self.count, total=self.total)
            self._said = now if note is not None else self._said
        elif self.count != self.total and self.due():  # that everything is done, the last line says
            self._said = now
            print(f"{self.what}: {self.state()}", file=sys.stderr, flush=True)

    def due(self) -> bool:
        """Whether something would be shown by the next `advance`, so that a note that costs something can wait."""
        now = time.monotonic()
        every = 1.0 if self._task is not None else min(LATEST, max(SOONEST, (now - self._began) / 10))
        return self._shown and now - self._said >= every

    def state(self) -> str:
        """`240/1,200 prompts, 35.2 prompts/s, 27 s left, 2 failed`."""
        rate = self._recent.at(time.monotonic())
        parts = [self._counted()]
        if rate is not None:
            parts.append(_speed(rate, self.unit))
        if self.total is not None and self.count < self.total:
            left = None if rate is None else _about((self.total - self.count) / rate)
            parts.append("estimating time left" if left is None else f"{left} left")
        return ", ".join(part for part in (*parts, self.note) if part)

    def _counted(self) -> str:
        return f"{self.count:,}{'' if self.total is None else f'/{self.total:,}'} {self.unit}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._shown:
            return
        Progress._open -= 1
        if self._task is not None:
            Progress._display.remove_task(self._task)
        if self._owns:
            Progress._display.stop()
            Progress._display = None
        taken = time.monotonic() - self._began
        # What another one contains is told by its own numbers; only where it was long is the time worth a line.
        if (self.count > self._start or kind is not None) and not (self._inner and taken < SOONEST):
            print(self._ended(taken, kind is not None), file=sys.stderr, flush=True)
        self._task, self._owns = None, False

    def _ended(self, taken: float, failed: bool) -> str:
        done = self.count - self._start
        if failed:
            return f"{self.what}: stopped at {self._counted()} after {duration(taken)}"
        rate = _speed(done / taken, self.unit) if taken > 0 else ""
        parts = [f"{self._counted()} in {duration(taken)}", rate if done > 1 else "", self.note]
        return f"{self.what}: {', '.join(part for part in parts if part)}"


def _about(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else duration(seconds)


def _speed(rate: float, unit: str) -> str:
    """`35.2 prompts/s`, `4,120 tokens/s`, `12.5 s a prompt`."""
    if rate < 0.5:
        one = unit.removesuffix("es") if unit.endswith("ches") else unit.removesuffix("s")
        return f"{duration(1 / rate)} a {one}"
    return f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.1f} {unit}/s"


def _display() -> Any:
    """rich's display of several lines, on stderr; what is printed meanwhile goes above them."""
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
    from rich.progress import Progress as Display
    from rich.table import Column
    from rich.text import Text

    class StateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(task.fields["of"].state(), no_wrap=True, overflow="ellipsis")

    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(24),
        StateColumn(Column(no_wrap=True, overflow="ellipsis")),
    )
    console = Console(stderr=True)
    # A stdout that is a file keeps what is printed there.
    return Display(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())
