"""A folder is replaced whole or not at all: the process is killed before every single step of it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from specbench.files.folder_swap import aside, beside, replacing_folder, settle, swap

STEPS = ("rename", "rmdir", "unlink")


def filled(folder: Path, text: str) -> Path:
    (folder / "draft").mkdir(parents=True)
    for name in ("done", "draft/weights"):
        (folder / name).write_text(text)
    return folder


def whole(folder: Path) -> str | None:
    """The text that every file of a whole folder holds."""
    texts = {path.read_text() if path.is_file() else None for path in (folder / "done", folder / "draft" / "weights")}
    return texts.pop() if len(texts) == 1 else None


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Run `work` in a child that is killed before its call number `step` that changes the disk; False if it ended."""
    child = os.fork()
    if child == 0:
        left = [step]
        for name in STEPS:
            real = getattr(os, name)

            def counted(*args, real=real, **options):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return real(*args, **options)

            setattr(os, name, counted)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def complete(folder: Path) -> bool:
    return whole(folder) is not None


@pytest.mark.parametrize("old_is_there", [True, False])
def test_a_kill_at_any_step_of_a_swap_loses_nothing(tmp_path: Path, old_is_there: bool) -> None:
    kills = 0
    for step in range(100):
        folder = tmp_path / str(step) / "mine"
        if old_is_there:
            filled(folder, "old")
        filled(beside(folder), "new")
        killed = killed_at(step, lambda folder=folder: swap(folder))
        found = {whole(path) for path in (folder, beside(folder), aside(folder)) if path.is_dir()}
        assert "new" in found  # it was complete before the swap began, and is under one of the names
        assert whole(folder) in ("old", "new", None)
        # The next process finishes what was begun; it may be killed as well.
        second = 0
        while killed_at(second, lambda folder=folder: settle(folder, complete)):
            second += 1
        settle(folder, complete)
        assert whole(folder) == "new"
        assert [path.name for path in folder.parent.iterdir()] == ["mine"]
        kills += killed
        if not killed:
            break
    assert kills >= (4 if old_is_there else 1)


def test_an_incomplete_successor_replaces_nothing(tmp_path: Path) -> None:
    folder = filled(tmp_path / "mine", "old")
    beside(folder).mkdir()
    settle(folder, complete)
    assert whole(folder) == "old" and beside(folder).is_dir()
    os.rename(folder, aside(folder))
    settle(folder, complete)
    assert whole(folder) == "old" and not aside(folder).exists()


def test_a_block_that_fails_leaves_the_folder_alone(tmp_path: Path) -> None:
    folder = filled(tmp_path / "mine", "old")
    with pytest.raises(RuntimeError), replacing_folder(folder) as new:
        (new / "half").write_text("x")
        raise RuntimeError
    assert whole(folder) == "old" and [path.name for path in tmp_path.iterdir()] == ["mine"]
    with replacing_folder(folder) as new:
        filled(new / "below", "new")
    assert (folder / "below" / "done").is_file() and not (folder / "done").exists()
    shutil.rmtree(folder)
    with replacing_folder(folder) as new:
        (new / "first").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["first"]


def test_a_folder_behind_a_link_keeps_its_place(tmp_path: Path) -> None:
    real = filled(tmp_path / "large" / "mine", "old")
    link = tmp_path / "mine"
    link.symlink_to(real, target_is_directory=True)
    with replacing_folder(link) as new:
        filled(new / "x", "new")
    assert link.is_symlink() and (real / "x" / "done").is_file() and not (real / "done").exists()
