"""The identity of a run: its settings without those that do not affect the result
(specbench/runs/settings_without_effect.py), and its inputs by content.

Two commands describe the same run if their identities are equal, independent of the working folder, of the paths of
their inputs and of the number of devices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xxhash
from omegaconf import DictConfig

from specbench.cli.recording import recorded
from specbench.files.atomic import changes, read_json
from specbench.runs.settings_without_effect import without_effect

# Settings that name files: their content counts, not their path.
INPUTS = (
    *("draft", "start", "cache", "answers", "rounds", "held_out", "calibration", "prompts", "suite.prompts"),
    *("path", "target.id", "data.source.paths", "profile.path", "policies.*.rounds", "policies.*.calibration"),
    "scheduler.calibration.path",
)
# Values of these settings that do not name a file, even if a file of this name exists.
WORDS = ("target", "random", "plain", "ngram", "suffix", "suffix_all", "oracle")
PREFIX = "small:"  # of a draft that is a small language model

SAMPLED = 1 << 28  # bytes above which only the size and a part of a file are hashed
BLOCKS, BLOCK = 256, 1 << 16


@dataclass(frozen=True)
class Identity:
    """`settings` that affect the result, as plain data; `inputs`: dotted key -> fingerprint of the file or folder."""

    settings: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """Eight hex digits for the name of a run."""
        facts = {"settings": without(self.settings, self.inputs), "inputs": self.inputs}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]

    def against(self, verb: str, then: Mapping[str, Any]) -> list[str]:
        """Differences from the identity that a stage recorded, as `key: then -> now`.

        An input that one side does not have is compared by its path, unless that side searched for it.
        """
        before: dict[str, str] = then.get("inputs") or {}
        both = before.keys() & self.inputs.keys()
        found = {key for key in before if select(self.settings, key) is None}
        found |= {key for key in self.inputs if select(then["config"], key) is None}
        old = without(then["config"], [*without_effect(verb), *both, *found])
        lines = changes(old, without(self.settings, both | found))
        for key in sorted(both):
            if before[key] != self.inputs[key]:
                names = [select(settings, key) for settings in (then["config"], self.settings)]
                words = [
                    f"{name} ({code})" if name else code
                    for name, code in zip(names, (before[key], self.inputs[key]), strict=True)
                ]
                lines.append(f"{key}: {' -> '.join(words)}")
        return lines


def identity(verb: str, config: DictConfig | Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> Identity:
    """The identity of a run of `verb` with `config`; `inputs`: further fingerprints that the verb knows."""
    settings = without(recorded(config), without_effect(verb))
    if not settings.get("callbacks", True):
        del settings["callbacks"]  # settings that do not affect the result
    if settings.get("tree", ...) is None:
        del settings["tree"]  # chains, as runs had before there were trees
    found = {}
    for key in INPUTS:
        for path, value in matching(settings, key):
            if (seen := fingerprint(value, path.rpartition(".")[2])) is not None:
                found[path] = seen
    return Identity(settings, {**found, **(inputs or {})})


def without(tree: Mapping[str, Any], patterns: Iterable[str], where: str = "") -> dict[str, Any]:
    """`tree` without the dotted keys that match one of the patterns."""
    patterns, kept = list(patterns), {}
    for key, value in tree.items():
        path = f"{where}.{key}" if where else str(key)
        if not any(_matches(path, pattern) for pattern in patterns):
            kept[key] = without(value, patterns, path) if isinstance(value, Mapping) else value
    return kept


def matching(tree: Mapping[str, Any], pattern: str, where: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of `tree` that match the pattern, with their values."""
    for key, value in tree.items():
        path = f"{where}.{key}" if where else str(key)
        if _matches(path, pattern):
            yield path, value
        elif isinstance(value, Mapping):
            yield from matching(value, pattern, path)


def select(tree: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or None."""
    return next((value for _, value in matching(tree, key)), None)


def _matches(path: str, pattern: str) -> bool:
    return path.count(".") == pattern.count(".") and fnmatchcase(path, pattern)


def fingerprint(value: Any, kind: str = "") -> str | None:
    """Hash (16 hex digits) of the content at a path, or at each of several; None if there is no file or folder."""
    if isinstance(value, list):
        each = [fingerprint(one, kind) for one in value]
        return None if not each or None in each else xxhash.xxh3_64_hexdigest("\n".join(map(str, each)).encode())
    if not isinstance(value, str) or value in WORDS or not value:
        return None
    path = Path(value.removeprefix(PREFIX))
    try:
        if path.is_file():
            return content([path])
        return _folder(path, kind) if path.is_dir() else None
    except OSError:  # a name that no file can have; reading it raises the error
        return None


def _folder(path: Path, kind: str) -> str | None:
    if (path / "manifest.json").is_file():  # the manifest of a target cache has its fingerprint
        try:
            return str(read_json(path / "manifest.json", {})["fingerprint"])
        except (ValueError, KeyError, TypeError):  # damaged: opening it raises the error
            return None
    if kind in ("rounds", "held_out"):
        return content([path / "rounds.jsonl"]) if (path / "rounds.jsonl").is_file() else None
    if (path / "draft" / "config.json").is_file():
        path = path / "draft"
    if (path / "config.json").is_file():  # weights, and what turns text into their tokens
        beside = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        files = [path / name for name in beside if (path / name).is_file()]
        files += [*path.glob("*.safetensors"), *path.glob("*.bin")]
    else:
        files = [file for file in path.iterdir() if file.suffix in (".jsonl", ".parquet") and file.is_file()]
    return content(sorted(files)) if files else None


def content(files: Iterable[Path]) -> str:
    """Hash (16 hex digits) of the names and the contents of files; of a single file only the content.

    Of files above SAMPLED bytes, the size and BLOCKS blocks at equal distances are hashed.
    """
    files = list(files)
    digest = xxhash.xxh3_64()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if len(files) > 1 else ''}\n{size}\n".encode())
        with open(file, "rb") as stream:
            if size <= SAMPLED:
                while block := stream.read(1 << 20):
                    digest.update(block)
                continue
            for number in range(BLOCKS):
                stream.seek(number * (size - BLOCK) // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()
