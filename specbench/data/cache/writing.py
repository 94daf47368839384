"""Writing shards in a thread while the next states are computed; errors of full disks; files that ranks share."""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from specbench.data.cache.shards import write_shard

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WAITING = 4  # conversations in the queue of the writer; each can keep the states of its whole batch in memory


class NoRoom(ValueError):
    """The disk is full. Complete shards are kept."""


@contextmanager
def room_for(folder: Path) -> Iterator[None]:
    """Raise NoRoom with a one-sentence message if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise NoRoom(
            f"no space left for the cache in {folder}: its complete shards are kept, make room (or choose a smaller "
            "codec in another folder) and run the same command again"
        ) from error


class _Abandoned(Exception):
    """Tells the writer thread that the rest of its shard will not be delivered."""


def written(folder: Path, shard: int, samples: Iterable[Callable[[], dict[str, bytes]]]) -> list[dict[str, Any]]:
    """Write a shard in a thread while the caller's thread computes what goes into it. Returns the index rows."""
    waiting: queue.Queue = queue.Queue(WAITING)
    abandoned = threading.Event()

    def arriving() -> Iterator[dict[str, bytes]]:
        while True:
            try:
                encode = waiting.get(timeout=0.05)
            except queue.Empty:
                if abandoned.is_set():
                    raise _Abandoned from None
                continue
            if encode is None:
                return
            yield encode()

    with ThreadPoolExecutor(1, thread_name_prefix="specbench-write") as pool:
        writing = pool.submit(write_shard, folder, shard, arriving())
        try:
            for item in chain(samples, [None]):
                while not writing.done():
                    try:
                        waiting.put(item, timeout=0.05)
                        break
                    except queue.Full:
                        continue
                if writing.done():
                    break
        except BaseException:
            abandoned.set()
            raise
        return writing.result()


def create_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Create a file unless it exists. If several ranks try, one of them creates it and none reads an incomplete
    file."""
    if path.exists():
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
