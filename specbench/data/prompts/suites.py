"""A suite by name, from the same YAML files that the command line composes (configs/suite).

A suite's file lists its benchmarks and the suite that it extends under `defaults`, and sets limit, turns and seed.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from specbench.data.prompts.benchmarks import Benchmark, Benchmarks

BENCHMARK = "benchmark@benchmarks."


def names() -> list[str]:
    """Names of the suites."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))


def suite_of(
    suite: str | Path,
    prompts: str | Path | None = None,
    limit: int | None = None,
    turns: str | None = None,
    seed: int | None = None,
) -> Benchmarks:
    """The prompts of a suite's name, or of a file or folder of prompts; None leaves a setting as the suite has it.

    `prompts` are read instead of the suite's own (as `prompts=` of `specbench evaluate`). Errors: ValueError for a name
    that is neither a suite nor a path, and for settings that are not right.
    """
    if suite not in names():
        path = Path(suite).expanduser()
        if not path.exists():
            raise ValueError(f"suite={str(suite)!r} is none of {', '.join(names())}, and no file or folder of prompts")
        if prompts is not None:
            raise ValueError(f"suite={suite} and prompts={prompts} are both prompts: give one of them")
        name = path.stem if path.is_file() else path.name
        held = [] if path.is_file() else [Benchmark(f.stem, "own") for f in sorted(path.glob("*.jsonl"))]
        return Benchmarks(name, held, path, limit, turns or "all", seed or 0)
    held = _read(str(suite))
    given = {"limit": limit, "turns": turns, "seed": seed}
    settings = {key: value for key, value in given.items() if value is not None}
    known = {key: held[key] for key in ("name", "benchmarks", "title", "version", *given) if key in held}
    return Benchmarks(**(known | settings), prompts=prompts)


def _folder() -> Any:
    return resources.files("configs") / "suite"


def _read(name: str) -> dict[str, Any]:
    """A suite's settings with those of the suite that it extends, its benchmarks as objects."""
    own = yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    found: dict[str, Any] = {"benchmarks": {}}
    for entry in own.pop("defaults", []):
        if isinstance(entry, dict):
            ((key, value),) = entry.items()
            found["benchmarks"][key.removeprefix(BENCHMARK)] = _benchmark(value)
        elif entry != "_self_":
            extended = _read(entry)
            found |= extended | {"benchmarks": found["benchmarks"] | extended["benchmarks"]}
    return found | {key: value for key, value in own.items() if key not in ("_target_", "prompts")}


def _benchmark(name: str) -> Benchmark:
    settings = yaml.safe_load((_folder() / "benchmark" / f"{name}.yaml").read_text(encoding="utf-8"))
    settings.pop("_target_")
    return Benchmark(**settings)
