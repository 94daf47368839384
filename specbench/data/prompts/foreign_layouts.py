"""Rows of files from other projects: JSON lines, one JSON array, CSV, TSV and parquet, plain or compressed with gzip.

The content of a file decides its format (the name only distinguishes CSV and TSV). Everything is streamed: an array is
read one element at a time, so neither a large file nor a broken one fills the memory.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specbench.files import json_lines as jsonl

CHUNK = 1 << 20  # bytes of an array read at a time
HEAD = 4096  # bytes from which the format of a file is recognised
SPACE = " \t\r\n"
FORMATS = "JSON lines, one JSON array, CSV, TSV or parquet (JSON and CSV also compressed with gzip)"
Row = tuple[int, dict[str, Any]]  # number from 1, columns
LISTS = ("messages", "conversations", "turns")  # columns in which CSV holds JSON


@dataclass(frozen=True)
class FileRows:
    """The rows of one file as (number from 1, columns). `unit`: what the numbers count (line, element or row)."""

    path: Path
    unit: str
    _rows: Iterator[Row]

    def __iter__(self) -> Iterator[Row]:
        return self._rows

    def place(self, number: int) -> str:
        """Where a row is, for reports."""
        return f"{self.path}, {self.unit} {number}"

    def broken(self, number: int, why: str) -> jsonl.BrokenLine:
        """The error for a row that cannot be used."""
        return jsonl.BrokenLine(self.path, number, why, self.unit)


def rows(path: Path | str, remedy: str = "check the path") -> FileRows:
    """The rows of a file. ValueError if it has none of the formats; BrokenLine, while reading, for a broken row."""
    path = jsonl.require_file(path, remedy)
    with path.open("rb") as file:
        head = file.read(HEAD)
        packed = head.startswith(b"\x1f\x8b")
    if head.startswith(b"PAR1"):
        return FileRows(path, "row", _parquet(path))
    if packed:
        with _unpacking(path), gzip.open(path) as file:
            head = file.read(HEAD)
    jsonl.require_text(path, head)
    names = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    name = names[-1] if names else ""
    if name in (".csv", ".tsv"):
        return FileRows(
            path, "line", _stream(path, packed, lambda file: _table(file, path, "\t" if name == ".tsv" else ","))
        )
    first = _first(path, packed)
    if first == b"[":
        return FileRows(path, "element", _stream(path, packed, lambda file: _array(file, path)))
    if first in (b"{", b"") or name in (".json", ".jsonl", ".ndjson"):
        return FileRows(path, "line", _stream(path, packed, lambda file: jsonl.read_stream(file, path)))
    raise ValueError(f"{path} has no format that can be read as prompts: convert it to {FORMATS}")


def _open(path: Path, packed: bool) -> BufferedIOBase:
    return gzip.open(path) if packed else path.open("rb")


def _first(path: Path, packed: bool) -> bytes:
    """The first byte that is not a space."""
    with _unpacking(path), _open(path, packed) as file:
        chunk = file.read(HEAD).removeprefix(jsonl.BOM)
        while chunk and not chunk.strip():
            chunk = file.read(HEAD)
        return chunk.strip()[:1]


@contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    """Context in which a damaged gzip file raises an error that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is a truncated or damaged gzip file ({error}): download it again") from error


def _stream(path: Path, packed: bool, read: Callable[[BufferedIOBase], Iterator[Row]]) -> Iterator[Row]:
    with _unpacking(path), _open(path, packed) as file:
        yield from read(file)


class _Text:
    """A window of UTF-8 text, of which more is read when it is needed."""

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> None:
        """Read more text; the text before `at` is dropped."""
        rest = self.text[self.at :]
        data = self._stream.read(max(CHUNK, len(rest)))
        self.ended = not data
        self.text, self.at = rest + self._decoder.decode(data, self.ended), 0

    def peek(self) -> str:
        """The next character that is not a space, or "" at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in SPACE:
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self.more()

    def value(self) -> Any:
        """The JSON value that begins at `at`. ValueError says what is wrong with it."""
        while True:
            try:
                found, self.at = jsonl.parse(self.text, self.at)
                return found
            except jsonl.Malformed as error:
                # If only the end of the window is the cause, the parser stopped there or inside an unfinished text.
                cut = error.at > len(self.text) - 16 or error.why.startswith("Unterminated string")
                if self.ended or not cut or len(self.text) - self.at > jsonl.LONGEST:
                    raise
                self.more()


def _array(stream: BufferedIOBase, path: Path) -> Iterator[Row]:
    """The objects of a file that is one JSON array."""
    text, number = _Text(stream), 1
    try:
        text.more()
        text.peek()
        text.at += 1
        while text.peek() != "]" or number > 1:
            found = text.value()
            if not isinstance(found, dict):
                raise ValueError(f"holds a {type(found).__name__}, not an object")
            yield number, found
            number += 1
            mark = text.peek()
            if mark == "]":
                break
            if mark != ",":
                raise ValueError("the array ends here without its bracket" if not mark else f"{mark!a} follows it")
            text.at += 1
            text.peek()
        text.at += 1
        if text.peek():
            raise ValueError("text follows the array's bracket; a file holds one array, or one object per line")
    except UnicodeDecodeError:
        raise jsonl.BrokenLine(path, number, "not UTF-8", "element") from None
    except (jsonl.Malformed, ValueError) as error:
        raise jsonl.BrokenLine(path, number, str(error), "element") from None


def _table(stream: BufferedIOBase, path: Path, delimiter: str) -> Iterator[Row]:
    """The rows of CSV or TSV under its first line; empty cells are absent."""
    csv.field_size_limit(jsonl.LONGEST)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) != len(names) or not all(name.strip() for name in names):
            raise jsonl.BrokenLine(path, 1, "the first line of a table names its columns, each once")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise jsonl.BrokenLine(path, reader.line_num, f"holds {len(cells)} cells for {len(names)} columns")
            row: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
            for name in LISTS:
                if row.get(name, "").startswith("["):
                    row[name] = _cell(path, reader.line_num, name, row[name])
            yield reader.line_num, row
    except UnicodeDecodeError as error:
        why = f"not UTF-8 ({error.reason}); save the table as UTF-8"
        raise jsonl.BrokenLine(path, reader.line_num + 1, why) from None
    except csv.Error as error:
        raise jsonl.BrokenLine(path, reader.line_num, f"not a row of the table ({error})") from None


def _cell(path: Path, number: int, name: str, text: str) -> Any:
    try:
        found, end = jsonl.parse(text)
    except ValueError as error:
        raise jsonl.BrokenLine(path, number, f"column {name!r} is {error}") from None
    if text[end:].strip():
        raise jsonl.BrokenLine(path, number, f"column {name!r} holds more than one JSON value")
    return found


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as parquet after row {number} ({said}): download it again") from error
