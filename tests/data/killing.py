"""Run something in a child process and kill it with SIGKILL after a while: no handler runs, nothing is flushed.

Children come from a fork server that has done the imports, so they start in milliseconds and inherit no threads.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["tests.data.tiny_target", "specbench.data.cache.build", "specbench.data.loading.target_cache"]
)


def _announced(pipe, work: Callable[..., object], *arguments: object) -> None:
    pipe.send(True)
    work(*arguments)


def in_child(work: Callable[..., object], *arguments: object, seconds: float | None = None) -> bool:
    """Run `work(*arguments)` in a child and kill -9 it after `seconds`. True if it ended by itself without an error."""
    ours, theirs = _CONTEXT.Pipe()
    child = _CONTEXT.Process(target=_announced, args=(theirs, work, *arguments))
    child.start()
    ours.recv()  # the clock starts with the work, not with the imports before it
    if seconds is not None:
        time.sleep(seconds)
        child.kill()
    child.join(120)
    return child.exitcode == 0
