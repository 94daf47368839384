"""A folder that is replaced by another one whole: the new one is made beside it and takes its name at the end.

    NAME         what is there, untouched until the new one is complete
    .NAME.new    the new one while it is made
    .NAME.old    what was there, between the two renames of a swap

A kill at any point leaves a complete folder under one of these names, and `settle` puts it where it belongs.
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
    """Where the folder's successor is made: on the same file system, under a name that no run can have."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.new")


def aside(folder: Path) -> Path:
    """Where the folder lies between the two renames."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.old")


def swap(folder: Path) -> None:
    """Put the folder made beside `folder` in its place and remove what was there.

    Of several processes that do so at once the first one does it.
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
    """Finish a swap that a kill cut short; `complete` says whether a folder made beside another one is whole."""
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

    On any error it is removed and `folder` stays as it was.
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
