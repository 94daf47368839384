"""Time and memory of training steps, several variants measured in turns.

Times of several variants are measured in turns in one process, so that other programs slow all of them equally. Memory
is measured in a new process for each variant: the highest resident set during its first steps, minus the resident set
before them (on CUDA: of the allocator). A variant is a function that builds its model and data and returns the step.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

TimedStep = Callable[[], Any]
PrepareStep = Callable[[], TimedStep]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class StepCost:
    """Medians of `repeats` steps, seconds; processor seconds of all threads; peak bytes above the resident model."""

    seconds: float
    low: float
    high: float
    processor_seconds: float
    peak_bytes: int
    resident_bytes: int
    repeats: int


def measure(
    variants: Mapping[str, PrepareStep], repeats: int = 5, warmup: int = 1, threads: int = 2
) -> dict[str, StepCost]:
    """Cost of every variant's step. Builds must be importable (they are sent to fresh processes)."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: time at least one step")
    costs = fresh(partial(_times, dict(variants), repeats, warmup, threads))
    for name, build in variants.items():
        resident, peak = fresh(partial(_memory, build, threads))
        costs[name] = replace(costs[name], peak_bytes=peak - resident, resident_bytes=resident)
    return costs


def fresh(task: Callable[[], Any]) -> Any:
    """The result of `task`, which must be importable, in a new interpreter."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(task)


def _times(variants: dict[str, PrepareStep], repeats: int, warmup: int, threads: int) -> dict[str, StepCost]:
    torch.set_num_threads(threads)
    steps = {name: build() for name, build in variants.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(warmup + repeats):
        for name, step in steps.items():
            _settle()
            wall, processor = time.perf_counter(), time.process_time()
            step()
            _settle()
            if turn >= warmup:
                taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    costs = {}
    for name, pairs in taken.items():
        wall = sorted(pair[0] for pair in pairs)
        processor = statistics.median(pair[1] for pair in pairs)
        costs[name] = StepCost(statistics.median(wall), wall[0], wall[-1], processor, 0, 0, repeats)
    return costs


def _memory(build: PrepareStep, threads: int) -> tuple[int, int]:
    """(resident before, peak during) two steps, in bytes."""
    torch.set_num_threads(threads)
    # The first call like this makes torch import 27 MB of Python, which is not part of a step.
    x = torch.zeros(1, requires_grad=True)
    torch.autograd.grad(2 * x, x, torch.ones(1))
    step = build()
    _settle()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _resident()
    for _ in range(2):
        step()
    _settle()
    return before, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _highest()


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _resident() -> int:
    """Resident bytes now; on Linux the high-water mark is set back to it, so that building a model does not count."""
    if not _STATUS.is_file():
        return _highest()
    _RESET.write_text("5")
    return _status("VmRSS")


def _highest() -> int:
    if _STATUS.is_file():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
