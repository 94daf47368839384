"""SIGTERM, as a batch system sends it, ends a run like Ctrl-C: what is done is kept, and the record says so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """While it is open, SIGTERM raises KeyboardInterrupt in the main thread.

    A handler that is there already stays: whoever installed it knows what to do. Outside of the main thread, where no
    handler can be installed, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
