"""JSON lines files: reading with the line number in every error, durable appending, repair after a kill.

All files of JSON lines (prompts, answers, metrics, rounds) are read here. A line ends only at its newline byte, so
U+0085, U+2028 and similar characters do not split one. JSON is strict: UTF-8, no NaN, no repeated key.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NoReturn

from specbench.files.atomic import is_unicode, json_line

LONGEST = 1 << 26  # bytes of a line; a file without line ends is not read into memory whole
BOM = b"\xef\xbb\xbf"
# First bytes of files that are not text, and what to do with them.
BINARY = {
    b"\x1f\x8b": "is compressed with gzip: unpack it",
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstandard: unpack it",
    b"BZh": "is compressed with bzip2: unpack it",
    b"\xfd7zXZ": "is compressed with xz: unpack it",
    b"PAR1": "is a parquet file, which is read for prompts only: convert it to JSON lines",
    b"\xff\xfe": "is UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text: save it as UTF-8",
}


class BrokenLine(ValueError):
    """A line that does not have the required format; the message names file and line.

    unit: what the number counts: "line", "element" of an array or "row" of a table.
    """

    def __init__(self, path: Path | str, number: int, why: str, unit: str = "line") -> None:
        super().__init__(f"{path}, {unit} {number}: {why}; repair or delete that {unit}")


def require_file(path: Path | str, remedy: str = "check the path, or run the stage that writes it") -> Path:
    """The path, if it is a file; otherwise ValueError, which says what it is."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file: name a file in it")
    if not path.exists():
        raise ValueError(f"{path} does not exist: {remedy}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: write its content into one")
    return path


def require_text(path: Path | str, head: bytes) -> None:
    """ValueError for a file whose first bytes `head` show that it is not UTF-8 text."""
    for magic, why in BINARY.items():
        if head.startswith(magic):
            raise ValueError(f"{path} {why}")
    if b"\0" in head:
        raise ValueError(f"{path} is a binary file, not lines of JSON: give the file that holds the text")


class Malformed(ValueError):
    """Text that is not JSON. `at`: the position in the text at which the parser stopped."""

    def __init__(self, why: str, at: int, character: int) -> None:
        super().__init__(f"not JSON ({why} at character {character})")
        self.why, self.at = why, at


class _Refused(ValueError):
    """Text that the JSON parser of Python accepts and strict JSON does not."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(f"the key {twice[:80]!a} occurs twice")
    return found


def _constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is not a number that JSON has")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_constant)


def parse(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at text[start], and its end. ValueError with reason and position."""
    try:
        return _DECODER.raw_decode(text, start)
    except _Refused:
        raise
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None
    except json.JSONDecodeError as error:
        raise Malformed(error.msg, error.pos, error.pos - start + 1) from None
    except ValueError:  # Python's limit on the digits of a number
        raise ValueError("holds a number of thousands of digits") from None


def read(path: Path | str, *required: str, unfinished: str = "error") -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank; `required` keys must be present.

    unfinished: "drop" ignores what follows the last newline of a file that is still being written, or whose writer was
        killed; "error" reads a last line without newline like any other.
    """
    path = require_file(path)
    with path.open("rb") as file:
        yield from read_stream(file, path, *required, unfinished=unfinished)


def read_stream(
    stream: BufferedIOBase, path: Path | str, *required: str, unfinished: str = "error"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read` of an open file; `path` is used in error messages."""
    number = 0
    while line := stream.readline(LONGEST):
        number += 1
        if number == 1:
            line = line.removeprefix(BOM)
            require_text(path, line[:64])
        if not line.endswith(b"\n"):
            if len(line) == LONGEST:
                raise BrokenLine(path, number, f"longer than {LONGEST >> 20} MiB, which is not a single conversation")
            if unfinished == "drop":
                return
        line = line.strip()
        if not line:
            continue
        try:
            text = line.decode()
            value, end = parse(text)
        except UnicodeDecodeError as error:
            raise BrokenLine(path, number, f"not UTF-8 (byte {error.start + 1})") from None
        except ValueError as error:
            raise BrokenLine(path, number, str(error)) from None
        if end != len(text):
            raise BrokenLine(path, number, f"not JSON (more than one value, from character {end + 1} on)")
        if type(value) is not dict:
            raise BrokenLine(path, number, f"holds a {type(value).__name__}, not an object")
        for key in required:
            if key not in value:
                absent = [key for key in required if key not in value]
                raise BrokenLine(path, number, f"lacks {', '.join(map(repr, absent))}")
        yield number, value


def text_id(value: Any) -> str:
    """An id as text: a number keeps its digits. ValueError for a value that cannot be an id."""
    if isinstance(value, str) and value.strip() and is_unicode(value):
        return value
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, str):
        raise ValueError("`id` is empty or not Unicode text")
    raise ValueError(f"`id` is {'null' if value is None else f'a {type(value).__name__}'}, not a text or a number")


def check_messages(path: Path | str, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """The row with its id as text, if `messages` is a list of objects with a text role and content; else BrokenLine."""
    id = row["id"]
    if type(id) is not str or not (id.isascii() and id and not id.isspace()):
        try:
            row["id"] = text_id(id)
        except ValueError as error:
            raise BrokenLine(path, number, str(error)) from None
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BrokenLine(path, number, "`messages` is not a list with at least one message")
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if type(message) is dict else (None, None)
        if type(role) is not str or type(content) is not str:
            raise BrokenLine(path, number, "a message needs a `role` and a `content`, both text")
        if not (content.isascii() or is_unicode(content)) or not is_unicode(role):
            raise BrokenLine(path, number, "a message holds a lone surrogate, which is no Unicode text")
    for key in ("source", "domain"):
        if not isinstance(row.get(key, ""), str):
            raise BrokenLine(path, number, f"`{key}` is not a text")
    return row


def conversations(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row {"id", "messages", "source", ...}) of a prompts or answers file; a repeated id is an error."""
    lines: dict[str, int] = {}
    for number, row in read(path, "id", "messages"):
        row = check_messages(path, number, row)
        first = lines.setdefault(row["id"], number)
        if first != number:
            raise BrokenLine(path, number, f"repeats the id {row['id']!r} of line {first}")
        yield number, row


def repair(path: Path) -> int:
    """Remove a last line that a kill left incomplete; returns 1 if there was one, else 0.

    A line is complete with its newline; whatever follows the last newline is removed.
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
    return json_line(row)


class Appender:
    """Appends one object per line; each line is written completely, and synced to disk every `lines` lines or
    `seconds`."""

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
        """Make every line so far survive a power failure."""
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
