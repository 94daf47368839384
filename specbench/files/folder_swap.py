"""Atomic replacement of a folder: the new one is written beside it and renamed at the end.

    NAME         the old folder, unchanged until the new one is complete
    .NAME.new    the new folder while it is written
    .NAME.old    the old folder, between the two renames of a swap

After a kill at any point there is a complete folder under one of these names; `settle` renames it to NAME.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from specbench.files.atomic import sync_folder


def beside(folder: Path) -> Path:
    """Path at which the new folder is written: on the same file system, with a name that no run can have."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.new")


def aside(folder: Path) -> Path:
    """Path of the old folder between the two renames."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.old")


def swap(folder: Path) -> None:
    """Replace `folder` by the folder that was written beside it, and remove the old one.

    If several processes do this at once, the first one does it.
    """
    folder = folder.resolve()
    new, old = beside(folder), aside(folder)
    if not new.is_dir():
        return
    with open(new / ".swap", "a") as turn:
        with suppress(OSError):  # a file system without locks, on which one process at a time may write
            fcntl.flock(turn, fcntl.LOCK_EX)
        if not new.exists():
            return
        remove(old)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
        sync_folder(folder.parent)
    (folder / ".swap").unlink(missing_ok=True)
    remove(old)


def settle(folder: Path, complete: Callable[[Path], bool]) -> None:
    """Finish a swap that was interrupted; `complete` tells whether the new folder is complete."""
    folder = folder.resolve()
    new, old = beside(folder), aside(folder)
    if new.is_dir() and complete(new):
        swap(folder)
    elif old.is_dir() and not folder.exists():
        os.rename(old, folder)
    elif folder.exists():
        remove(old)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; it takes the name of `folder` when the block ends without an error.

    On any error it is removed and `folder` is not changed.
    """
    settle(folder, lambda new: False)
    new = beside(folder)
    remove(new)
    new.mkdir(parents=True)
    try:
        yield new
        swap(folder)
    finally:
        remove(new)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, or nothing where there is none."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    with suppress(FileNotFoundError):
        shutil.rmtree(path)
