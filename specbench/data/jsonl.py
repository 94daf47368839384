"""Lines of JSON on disk: read with the line's number in every error, appended durably, repaired after a kill."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specbench.atomic import json_line


class BrokenLine(ValueError):
    """A line that is not what the format promises; the message names file and line."""

    def __init__(self, path: Path | str, number: int, why: str) -> None:
        super().__init__(f"{path}, line {number}: {why}; repair or delete that line")


def read(path: Path | str, *required: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank; `required` keys must be there."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: check the path, or run the stage that writes it")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise BrokenLine(path, number, f"not JSON ({error})") from error
            if not isinstance(value, dict):
                raise BrokenLine(path, number, f"holds a {type(value).__name__}, not an object")
            absent = [key for key in required if key not in value]
            if absent:
                raise BrokenLine(path, number, f"lacks {', '.join(map(repr, absent))}")
            yield number, value


def check_messages(path: Path | str, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """The row, if `messages` is a list of objects with a text role and a text content; else BrokenLine."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BrokenLine(path, number, "`messages` is not a list with at least one message")
    for message in messages:
        texts = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not texts:
            raise BrokenLine(path, number, "a message needs a `role` and a `content`, both text")
    return row


def conversations(path: Path | str) -> Iterator[dict[str, Any]]:
    """Rows {"id", "messages", "source", ...} of a prompts or answers file."""
    for number, row in read(path, "id", "messages"):
        yield check_messages(path, number, row)


def repair(path: Path) -> int:
    """Cut a last line that a kill left unfinished; returns 1 if there was one, else 0.

    A line is finished by its newline: whatever follows the last newline was never acknowledged and is removed.
    """
    if not path.is_file():
        return 0
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end == size:
            return 0
        file.truncate(end)
        os.fsync(file.fileno())
    return 1


def line(row: dict[str, Any]) -> str:
    """One strict JSON line with its newline; text that UTF-8 cannot hold (lone surrogates) is escaped."""
    text = json_line(row)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(row, allow_nan=False) + "\n"
    return text


class Appender:
    """Appends one object a line; a line is written whole, and synced to disk every `lines` lines or `seconds`."""

    def __init__(self, path: Path, lines: int = 64, seconds: float = 2.0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._lines, self._seconds = lines, seconds
        self._unsynced, self._synced_at = 0, time.monotonic()

    def append(self, row: dict[str, Any]) -> None:
        """One line. A short write (full disk) raises OSError and leaves a partial line for `repair`."""
        data = line(row).encode()
        if self._file.write(data) != len(data):
            raise OSError(f"{self._file.name}: the disk took only a part of a line; free some space and run again")
        self._unsynced += 1
        if self._unsynced >= self._lines or time.monotonic() - self._synced_at >= self._seconds:
            self.sync()

    def sync(self) -> None:
        """Make every line so far survive a power cut."""
        if self._unsynced:
            os.fsync(self._file.fileno())
        self._unsynced, self._synced_at = 0, time.monotonic()

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
