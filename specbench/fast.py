"""One switch between fast implementations and the plain ones that they replace.

If a plain implementation is too slow or needs too much memory, there is also a faster one with the same result: the
objective in chunks (losses/fused.py for losses/reference.py), and the modules in models/fast/. All are on, or all are
off:

    with specbench.fast.plain():      # in Python
        ...
    specbench train ... fast=false    # on the command line

docs/performance.md lists the gain of each, with the command that measures it. Tests compare every fast implementation
with its plain one, and both with recorded results of other implementations.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

# The choice outside of every context, then that of each open context. Contexts of several threads can end in any order.
_choices = [[True]]
_lock = threading.Lock()


def enabled() -> bool:
    """Whether the fast implementations are used."""
    return _choices[-1][0]


def enable(fast: bool = True) -> None:
    """Use the fast implementations from now on, or the plain ones (`enable(False)`); within a context until its end."""
    _choices[-1][0] = fast


def plain() -> AbstractContextManager[None]:
    """Context with the plain implementations, for the whole process with all threads."""
    return switched(False)


@contextmanager
def switched(fast: bool) -> Iterator[None]:
    """Context with the fast implementations, or the plain ones. Of several open contexts the last one counts."""
    choice = [fast]
    with _lock:
        _choices.append(choice)
    try:
        yield
    finally:
        with _lock:
            del _choices[next(i for i, one in enumerate(_choices) if one is choice)]
