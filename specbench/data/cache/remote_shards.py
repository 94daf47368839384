"""A remote cache: copied shard by shard, or streamed.

`RemoteFiles` downloads a shard when it is first needed and deletes the least recently used ones to stay within a size:
random access to a cache that is larger than the disk. `StreamedFiles` downloads manifest, index and tables only; shards
are read from beginning to end, and nothing of them is written to the disk.
"""

from __future__ import annotations

import io
import os
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import aiohttp
import fsspec

from specbench.data.cache.manifest import INDEX, MANIFEST, TABLES, Manifest, sha256
from specbench.data.cache.shards import read_and_close
from specbench.data.cache.writing import NO_ROOM
from specbench.files.redaction import redact

CHUNK = 1 << 22  # bytes copied at a time
PARTIAL_CONTENT = 206  # HTTP status of an answer with the requested part only
SILENCE = 300  # seconds without a byte after which a transfer counts as broken off
PIPE, NAME = "pipe:", "{name}"
ATTEMPTS, PAUSE = 3, 1.0  # attempts to read a shard before it counts as unreadable; seconds before the second


def is_remote(folder: str | Path) -> bool:
    """True for fsspec URLs (https://, s3://, hf://, ...) and commands (pipe:...), false for paths."""
    return is_command(folder) or "://" in str(folder)


def is_command(folder: str | Path) -> bool:
    """True for pipe:COMMAND."""
    return str(folder).startswith(PIPE)


def is_http(url: str) -> bool:
    """True for http:// and https://."""
    return url.startswith(("http://", "https://"))


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem of a URL, and the path in it. ValueError where a package is missing."""
    # A shard may take longer to arrive than the five minutes after which aiohttp ends a request.
    patient = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=SILENCE)}}
    try:
        return fsspec.core.url_to_fs(url, **(patient if is_http(url) else {}))
    except ImportError as error:
        raise ValueError(f"{redact(url)} needs a package that is missing ({error}): install it with pip") from error


def copy_metadata(copy: Callable[[str], None], folder: Path) -> Manifest:
    """Copy manifest, index and tables into `folder`, those that are there already only if they are others."""
    copy(MANIFEST)  # always anew: it names what the rest must be
    manifest = Manifest.read(folder)
    for name, wanted in ((INDEX, manifest.index_hash), (TABLES, manifest.tables_hash)):
        if not (folder / name).exists() or sha256(folder / name) != wanted:
            copy(name)
    return manifest


def copied(source: Callable[[], io.IOBase], path: Path) -> None:
    """Write a stream to `path`, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with source() as stream, open(temporary, "wb") as local:
            while chunk := stream.read(CHUNK):
                local.write(chunk)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RemoteFiles:
    """Local copy of a remote cache in `folder`: manifest, index and tables, and shards up to `capacity` bytes at a
    time.

    Several processes of a machine can share the folder: a file is renamed into place when it is complete, and a file
    that is open stays readable after its removal. Each process has its own order of use.
    """

    sized = True

    def __init__(self, url: str, folder: str | Path, capacity: int):
        self.url, self.folder, self.capacity = url.rstrip("/"), Path(folder), capacity
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fetched = 0
        self._files, self._root = filesystem(self.url)
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        index = self.folder / INDEX
        copied_before = sha256(index) if index.exists() else None
        manifest = copy_metadata(self._fetch, self.folder)
        self._sizes = {shard["name"]: int(shard["bytes"]) for shard in manifest.shards}
        # Shards of another cache have the same names and may have the same sizes.
        same = copied_before == manifest.index_hash
        for path in self.folder.glob("shard-*.tar"):
            if not same or path.stat().st_size != self._sizes.get(path.name):
                path.unlink()
        present = sorted(self.folder.glob("shard-*.tar"), key=lambda path: path.stat().st_mtime)
        self._used: dict[str, int] = {path.name: path.stat().st_size for path in present}  # least recently used first

    @property
    def source(self) -> str:
        """Where the shards are, for messages."""
        return redact(self.url)

    def require_window(self, shards: Sequence[dict[str, Any]], window: int | None) -> None:
        """Refuse an order that would download shards repeatedly: the shards in use at one time must fit."""
        sizes = sorted((int(shard["bytes"]) for shard in shards), reverse=True)
        # Reading ahead may already touch the next window while this one is being finished.
        needed = sum(sizes) if window is None else sum(sizes[: 2 * window])
        if needed > self.capacity:
            raise ValueError(
                f"local_bytes={self.capacity} cannot hold the {needed} bytes of shards that shuffle_window={window} "
                f"reads at a time from {redact(self.url)}: raise local_bytes, set a smaller shuffle_window, or set "
                "stream=true to keep no shard at all"
            )

    def size(self, name: str) -> int | None:
        """Size in bytes of a local file (manifest, index, tables), or of a shard at its source."""
        if name in self._sizes:
            try:
                return int(self._files.size(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None
        path = self.folder / name
        return path.stat().st_size if path.exists() else None

    def read_into(self, name: str, view: memoryview, offset: int) -> int:
        """Fill `view` from the local copy of a shard at `offset`; returns how many bytes there were."""
        return read_and_close(self.open(name), view, offset)

    def open(self, name: str) -> int:
        """A file descriptor of the local copy, which is downloaded first if necessary."""
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            try:
                descriptor = os.open(self.folder / name, os.O_RDONLY)
            except FileNotFoundError:
                self._make_room(name)
                self._fetch(name)
                descriptor = os.open(self.folder / name, os.O_RDONLY)
        with self._guard:
            self._used.pop(name, None)
            self._used[name] = self._sizes[name]
        return descriptor

    def _make_room(self, name: str) -> None:
        with self._guard:
            while self._used and sum(self._used.values()) + self._sizes[name] > self.capacity:
                oldest = next(iter(self._used))
                del self._used[oldest]
                (self.folder / oldest).unlink(missing_ok=True)
            self._used[name] = self._sizes[name]

    def _fetch(self, name: str) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                copied(lambda: self._files.open(f"{self._root}/{name}", "rb"), self.folder / name)
                break
            except FileNotFoundError as error:
                raise _no_cache(f"{self.url}/{name}") from error
            except Exception as error:  # each transport has exceptions of its own
                if getattr(error, "errno", None) in NO_ROOM:
                    raise
                if attempt == ATTEMPTS:
                    cause = redact(str(error) or type(error).__name__)
                    raise OSError(
                        f"{name} cannot be read from {redact(self.url)}: {cause} (tried {ATTEMPTS} times)"
                    ) from error
            time.sleep(PAUSE * 2 ** (attempt - 1))
        with self._guard:
            self.fetched += 1


class StreamedFiles:
    """A remote cache of which `folder` (None: a temporary one) keeps manifest, index and tables, and no shard.

    place: an fsspec URL, or `pipe:COMMAND` with {name} where the name of a file belongs, whose output is the file, such
        as `pipe:ssh host cat /caches/x/{name}`.
    """

    def __init__(self, place: str, folder: str | Path | None = None):
        self.place = place.rstrip("/")
        self._source: _Source = _Command(self.place) if is_command(place) else _Address(self.place)
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="specbench-cache-")
            folder = self._temporary.name
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = copy_metadata(self._fetch, self.folder)
        self._sizes = {shard["name"]: int(shard["bytes"]) for shard in manifest.shards}

    @property
    def source(self) -> str:
        """Where the shards are, for messages."""
        return redact(self.place)

    @property
    def sized(self) -> bool:
        """Whether the source tells the size of a shard; a command does not."""
        return isinstance(self._source, _Address)

    def size(self, name: str) -> int | None:
        """Bytes of a shard at its source, or of another file here."""
        if name in self._sizes:
            return self._source.size(name)
        path = self.folder / name
        return path.stat().st_size if path.exists() else None

    def read_into(self, name: str, view: memoryview, offset: int) -> int:
        """Fill `view` from a shard at `offset` by one request for these bytes."""
        try:
            found = self._source.part(name, offset, len(view))
        except ValueError:
            raise
        except Exception as error:  # each transport has exceptions of its own
            raise OSError(redact(str(error) or type(error).__name__)) from error
        view[: len(found)] = found
        return len(found)

    def stream(self, name: str) -> io.IOBase:
        """A shard to read from its beginning; a transfer that breaks off is taken up again."""
        return _Resumed(lambda offset: self._source.open(name, offset), self._sizes[name])

    def require_ranges(self) -> None:
        """ValueError where nothing but whole files can be had."""
        self._source.require_ranges(next(iter(self._sizes)))

    def _fetch(self, name: str) -> None:
        try:
            copied(lambda: self._source.open(name, 0)[0], self.folder / name)
        except FileNotFoundError as error:
            raise _no_cache(f"{self.place}/{name}") from error
        except Exception as error:  # each transport has exceptions of its own
            raise ValueError(f"{name} cannot be read from {redact(self.place)}: {redact(str(error))}") from error


def _no_cache(place: str) -> ValueError:
    return ValueError(f"{redact(place)} does not exist: is this the folder of a complete cache?")


def _whole_files_only(place: str, why: str) -> ValueError:
    return ValueError(
        f"{redact(place)} gives whole files only ({why}), and held-out conversations are read one by one: set "
        "validation_fraction=0, with validation_folder for a cache to validate on"
    )


@runtime_checkable
class _Source(Protocol):
    """Files of one cache by their names. `open` gives a stream and where it begins: at `offset` if the place can do
    that, else at 0."""

    def open(self, name: str, offset: int) -> tuple[io.IOBase, int]: ...
    def size(self, name: str) -> int | None: ...
    def part(self, name: str, offset: int, count: int) -> bytes: ...
    def require_ranges(self, name: str) -> None: ...


class _Address:
    """Behind an fsspec URL."""

    def __init__(self, url: str):
        self.url = url
        self._files, self._root = filesystem(url)

    def open(self, name: str, offset: int) -> tuple[io.IOBase, int]:
        path = f"{self._root}/{name}"
        if is_http(self.url):
            # Block size 0 asks for one answer that is read as it arrives, whether or not the server supports ranges.
            part = {"headers": {"Range": f"bytes={offset}-"}} if offset else {}
            stream = self._files.open(path, "rb", block_size=0, **part)
            return stream, offset if stream.r.status == PARTIAL_CONTENT else 0
        stream = self._files.open(path, "rb")
        stream.seek(offset)
        return stream, offset

    def size(self, name: str) -> int | None:
        try:
            size = self._files.size(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        if size is None:
            raise ValueError(f"{redact(self.url)}/{name}: the server does not tell its size")
        return int(size)

    def part(self, name: str, offset: int, count: int) -> bytes:
        found = self._files.cat_file(f"{self._root}/{name}", start=offset, end=offset + count)
        if len(found) > count:
            raise _whole_files_only(self.url, "the server answers a request for a part with all of it")
        return found

    def require_ranges(self, name: str) -> None:
        try:
            with self._files.open(f"{self._root}/{name}", "rb", block_size=1, cache_type="none") as file:
                file.seek(1)
                file.read(1)
        except ValueError as error:
            raise _whole_files_only(self.url, "the server refuses requests for a part") from error


class _Command:
    """The output of a command: a setting of the user. Manifest checks the names of the files that are put into it."""

    def __init__(self, place: str):
        if NAME not in place:
            raise ValueError(
                f"folder={redact(place)}: write {NAME} where the name of a file belongs, as in "
                f"pipe:ssh host cat /caches/x/{NAME}"
            )
        self.place = place

    def open(self, name: str, offset: int) -> tuple[io.IOBase, int]:
        return _Output(self.place.removeprefix(PIPE).replace(NAME, name)), 0

    def size(self, name: str) -> int | None:
        raise ValueError(f"{redact(self.place)}: a command does not tell the size of {name}")

    def part(self, name: str, offset: int, count: int) -> bytes:
        raise _whole_files_only(self.place, "a command writes from the beginning")

    def require_ranges(self, name: str) -> None:
        self.part(name, 0, 1)


class _Output(io.RawIOBase):
    """The output of a shell command. OSError when it ends with another status than 0, or is silent for too long."""

    def __init__(self, command: str):
        self._command = command
        self._process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=0)

    def readable(self) -> bool:
        return True

    def readinto(self, view: Any) -> int:
        waiting = select.poll()
        waiting.register(self._process.stdout, select.POLLIN)
        if not waiting.poll(1000 * SILENCE):
            raise OSError(f"the command `{redact(self._command)}` gave nothing for {SILENCE} seconds")
        count = self._process.stdout.readinto(view)
        if len(view) and not count and (status := self._process.wait()):
            raise OSError(f"the command `{redact(self._command)}` ended with status {status}")
        return count

    def close(self) -> None:
        if not self.closed:
            self._process.stdout.close()  # a command that still writes ends by that
            if self._process.poll() is None:
                self._process.terminate()
                self._process.wait()
        super().close()


class _Resumed(io.RawIOBase):
    """`size` bytes of a stream that `start` opens at an offset. If it breaks off or ends early, it is opened again
    where it ended. OSError after ATTEMPTS attempts without a further byte."""

    def __init__(self, start: Callable[[int], tuple[io.IOBase, int]], size: int):
        self._start, self._size = start, size
        self._stream: io.IOBase | None = None
        self._done = self._failed = 0

    def readable(self) -> bool:
        return True

    def readinto(self, view: Any) -> int:
        view = memoryview(view)[: self._size - self._done]
        while len(view):
            try:
                count = self._opened().readinto(view)
                why: BaseException = OSError(f"it ends {self._size - self._done} bytes early")
            except Exception as error:  # each transport has exceptions of its own, for the same few causes
                count, why = 0, error
            if count:
                self._done, self._failed = self._done + count, 0
                return count
            self._drop_stream()
            self._failed += 1
            if self._failed >= ATTEMPTS:
                cause = f"there is no {why}" if isinstance(why, FileNotFoundError) else str(why) or type(why).__name__
                raise OSError(redact(f"{cause} (tried {ATTEMPTS} times)")) from why
            time.sleep(PAUSE * 2 ** (self._failed - 1))
        return 0

    def _opened(self) -> io.IOBase:
        if self._stream is None:
            self._stream, begins = self._start(self._done)
            left = self._done - begins
            scratch = memoryview(bytearray(min(CHUNK, left)))
            while left:
                count = self._stream.readinto(scratch[:left])
                if not count:
                    raise OSError(f"it ends {self._size - self._done + left} bytes early")
                left -= count
        return self._stream

    def _drop_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def close(self) -> None:
        self._drop_stream()
        super().close()
