"""The next command, printed so that it can be copied: with root, target and data."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from specbench.cli import target_argument as targeting
from specbench.files.atomic import plain

# What a suite or a source of prompts is made of follows from its name.
UNSPOKEN = {"defaults", "benchmarks", "source.benchmarks"}
SIZES = "sizes."  # of a method, by trainer, of which the group `size` chooses one


def command(verb: str, cfg: DictConfig, groups: Sequence[str] = (), **settings: Any) -> str:
    """`specbench VERB root=... GROUP=... key=value` for a shell.

    `groups` are groups of `cfg` (target, data, suite) that the next verb has too: each is written as its option and
    whatever was set beside it. A setting `a__b` is `a.b`.
    """
    words = ["specbench", verb, f"root={text(str(cfg.root))}"]
    words += [word for group in groups for word in _option(group, cfg[group])]
    words += [f"{key.replace('__', '.')}={text(value)}" for key, value in settings.items()]
    return shlex.join(words)


def _option(group: str, chosen: DictConfig) -> list[str]:
    """The option of configs/GROUP of this name, or else the one that leaves the fewest keys to set, and those keys."""
    have = _leaves(OmegaConf.to_container(chosen, resolve=True))
    have = {key: value for key, value in have.items() if not key.startswith(SIZES)}
    best: list[str] = []
    folder = resources.files("configs") / group
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".yaml"):
            continue
        default = _leaves(OmegaConf.to_container(_written(folder, file.name), resolve=False))
        option = file.name.removesuffix(".yaml")
        trainer, size = _size(default, have)
        default |= size
        own = {key: value for key, value in have.items() if not _same(key, value, default)}
        words = [f"{group}={option}", *([f"size={trainer}_{option}"] if size else [])]
        # A key that the option does not have is appended.
        words += [f"{'' if key in default else '++'}{group}.{key}={text(value)}" for key, value in own.items()]
        if have.get("name") is not None and default.get("name") == have["name"]:
            return words
        if not best or len(words) < len(best):
            best = words
    return best


def _size(default: dict[str, Any], have: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The trainer whose smaller size of a method (`sizes` in its file) leaves the fewest keys to set, and the settings
    of this size; none where those of the file itself do."""
    sizes: dict[str, dict[str, Any]] = {"": {}}
    for key, value in default.items():
        if key.startswith(SIZES):
            trainer, _, name = key.removeprefix(SIZES).partition(".")
            sizes.setdefault(trainer, {})[f"draft.{name}"] = value
    return min(sizes.items(), key=lambda size: sum(not _same(k, v, default | size[1]) for k, v in have.items()))


def _written(folder: Traversable, name: str) -> DictConfig:
    """An option as its file has it, over the options of the same group that the file is built on."""
    own = OmegaConf.create((folder / name).read_text(encoding="utf-8"))
    below = [part for part in own.get("defaults") or () if isinstance(part, str) and part != "_self_"]
    return OmegaConf.merge(*(_written(folder, f"{part}.yaml") for part in below), own)


def _same(key: str, value: Any, default: dict[str, Any]) -> bool:
    """Whether the option gives a key this value: written there, or by a reference that is resolved by now."""
    found = default.get(key)
    if isinstance(found, str) and "${" in found:
        return "basename" in found or value is None
    return key in default and found == value


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if f"{prefix}{key}" in UNSPOKEN:
            continue
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def text(value: Any) -> str:
    """A value as Hydra's grammar reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return targeting.quoted(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {text(item)}" for key, item in value.items()) + "}"
    value = plain(value)
    return "[" + ",".join(map(text, value)) + "]" if isinstance(value, list) else str(value)
