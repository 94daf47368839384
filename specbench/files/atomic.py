"""Atomic writing of files, and strict JSON.

A file is written under a temporary name with the ending `.tmp`, synced to the disk and renamed, so a kill or a full
disk leaves the old version (or none) and never an incomplete one. JSON is strict: no NaN, no Infinity.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; sync it and rename it to `path` when the block ends without an error.

    On any error the temporary file is removed and `path` is not changed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure, if the file system can sync a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse; the rename itself has happened
        pass
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 by an atomic rename."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented strict JSON by an atomic rename. Errors: ValueError on NaN or Infinity."""
    write_text(path, _dumped(value, indent=2) + "\n")


def read_json(path: Path, default: Any) -> Any:
    """The content of a JSON file, or `default` if the file does not exist. ValueError for a file that is not JSON."""
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no JSON ({error}): write it again, or name another file") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Errors: FileNotFoundError, or ValueError for a file that is not a JSON object."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
    found = read_json(path, None)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__} and not an object of names and values")
    return found


def json_line(value: Any) -> str:
    """One strict JSON line with its line end. Errors: ValueError on NaN or Infinity."""
    return _dumped(value, separators=(",", ":")) + "\n"


def _dumped(value: Any, **form: Any) -> str:
    """`value` as JSON text; characters that UTF-8 cannot encode (lone surrogates) are escaped."""
    value = plain(value)
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, **form)
    return text if is_unicode(text) else json.dumps(value, allow_nan=False, **form)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode the text, that is, it has no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain(value: Any, where: str = "") -> Any:
    """`value` with arrays, numbers of other libraries, paths and tuples converted to JSON types.

    Errors: ValueError with the key if a number is not finite, or if the value has no JSON type.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where or 'the value'} is {value}: strict JSON holds finite numbers only, write null")
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}" if where else str(key)) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return [plain(item, where) for item in sorted(value)]
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch, scalars included
        return plain(value.tolist(), where)
    raise ValueError(f"{where or 'the value'} is of type {type(value).__name__}, which JSON cannot hold")


def changes(then: Any, now: Any, where: str = "") -> list[str]:
    """The leaves in which two plain trees differ, as `key.path: then -> now`."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        lines = []
        for key in [*then, *(key for key in now if key not in then)]:
            path = f"{where}.{key}" if where else str(key)
            lines += changes(then.get(key), now.get(key), path)
        return lines
    return [] if then == now else [f"{where}: {then} -> {now}"]
