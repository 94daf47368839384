"""One writer a folder: a lock on a file in it, which says who holds it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def locked(folder: Path, named: Path, warn: Callable[[str], None]) -> Any:
    """The open lock file of `folder`; the lock ends when it is closed or the process ends.

    named: the folder as errors call it. warn: called with a line where the file system has no locks.
    Errors: ValueError if another process holds the lock.
    """
    lock = open(folder / ".lock", "a+")  # noqa: SIM115 - it stays open for as long as the work takes
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        raise ValueError(f"{named} is being written by {owner}: wait for it, or choose another root or name") from None
    except OSError:
        warn(f"{folder} lies on a file system without locks: take care that one process at a time writes there")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {os.uname().nodename}")
    lock.flush()
    return lock
