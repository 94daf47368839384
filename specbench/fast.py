"""One switch between fast computations and the plain ones that they stand for.

Where a plain computation is too slow or too large, a faster one with the same result stands beside it: the objective in
chunks (losses/fused.py against losses/reference.py), and what lies in models/fast/. All of it is on, or all of it off:

    with specbench.fast.plain():      # in Python
        ...
    specbench train ... fast=false    # on the command line

docs/performance.md lists what each buys, with the command that measures it. Tests hold every fast computation against
its plain one, and the recorded cases of other implementations against both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

_enabled = True


def enabled() -> bool:
    """Whether fast computations are used."""
    return _enabled


def enable(fast: bool = True) -> None:
    """Use fast computations from here on, or plain ones (`enable(False)`)."""
    global _enabled
    _enabled = fast


def plain() -> AbstractContextManager[None]:
    """Plain computations within it. It holds for the whole process, all threads included."""
    return switched(False)


@contextmanager
def switched(fast: bool) -> Iterator[None]:
    """Fast computations within it, or plain ones."""
    before = _enabled
    enable(fast)
    try:
        yield
    finally:
        enable(before)
