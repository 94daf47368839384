"""The environment of a command: standard output, ranks set by launchers, memory. It is checked before any work."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Places in pairs (rank, number of ranks) under torchrun, Slurm and Lightning's own launcher.
PLACES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
OTHERS = ("NODE_RANK", "GROUP_RANK", "OMP_NUM_THREADS")
MOST = 1 << 20


def check_environment(variables: Mapping[str, str] = os.environ) -> None:
    """ValueError for a launcher's variable that is not a number, or a rank that is not below the number of ranks."""
    for rank, world in PLACES:
        place, count = _number(variables, rank, 0), _number(variables, world, 1)
        if place is not None and count is not None and place >= count:
            raise ValueError(f"{rank}={place} with {world}={count}: ranks are counted from 0 to {count - 1}")
    for name in OTHERS:
        _number(variables, name, 0)


def _number(variables: Mapping[str, str], name: str, least: int) -> int | None:
    text = variables.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or not least <= int(text) <= MOST:
        raise ValueError(
            f"{name}={text!r} in the environment: takes a whole number from {least}, as a launcher sets it; unset it "
            "to run without one"
        )
    return int(text)


def free_memory() -> float:
    """Bytes of available memory; infinite if the system does not report it."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024.0
    except (OSError, KeyError, ValueError):
        return math.inf


class Outlet:
    """stdout during a command: a closed pipe or a full disk does not stop the work.

    Output up to this point is kept; later output is dropped, and `fault` keeps the reason.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.fault: OSError | None = None

    def write(self, text: str) -> int:
        """Number of characters taken."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._gone(error)
            return len(text)

    def flush(self) -> None:
        """Hand on what waits."""
        try:
            self._stream.flush()
        except OSError as error:
            self._gone(error)

    def _gone(self, error: OSError) -> None:
        self.fault = self.fault or error
        # The buffer of the stream must be emptied, otherwise Python writes it again when the process ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def outlet() -> Iterator[Outlet]:
    """sys.stdout as an Outlet. Errors: ValueError where stdout is closed."""
    before = sys.stdout
    if before is None or before.closed:
        # The first file that is opened would take its place, and be written into by whoever prints.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        raise ValueError("stdout is closed: send it to a file or to /dev/null")
    found = Outlet(before)
    sys.stdout = found
    try:
        yield found
    finally:
        found.flush()
        sys.stdout = before
