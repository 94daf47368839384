"""Provenance of a run: code, versions, hardware, threads. It is sufficient to repeat a run and to list differences."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from specbench.files.atomic import changes
from specbench.files.redaction import redact_argument

SOURCE = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("specbench", "torch", "lightning", "transformers", "tokenizers", "datasets", "webdataset", "torchmetrics"),
    *("hydra-core", "omegaconf", "wandb", "safetensors", "numpy", "pandas", "pyarrow", "scipy", "zstandard", "xxhash"),
)


def provenance(
    command: Sequence[str],
    seeds: Mapping[str, int],
    cache: Mapping[str, Any] | None = None,
    first_prompt: str | None = None,
) -> tuple[dict[str, Any], str]:
    """The facts of a run (for provenance.json) and the uncommitted changes of the code (for dirty.diff, maybe empty).

    `command` is the command line, `seeds` one seed per purpose, `cache` the cache's fingerprint and folder,
    `first_prompt` the first sample as the model reads it, special tokens included.
    """
    code, diff = source_state(SOURCE)
    facts = {
        "command": [redact_argument(str(word)) for word in command],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "code": code,
        "python": platform.python_version(),
        "versions": versions(),
        "hardware": hardware(),
        "seeds": dict(seeds),
        "cache": None if cache is None else dict(cache),
        "first_prompt": first_prompt,
    }
    return facts, diff


def source_state(folder: Path) -> tuple[dict[str, Any], str]:
    """The commit of `folder`, and the difference of its files to this commit, new files included.

    Outside a git checkout (an installed wheel) the commit is None; the package version is recorded.
    """
    if _git(folder, "rev-parse", "--show-toplevel").strip() != str(folder):
        return {"commit": None, "dirty": None, "untracked": {}, "diff_sha256": None}, ""
    diff = _git(folder, "diff", "HEAD")
    new = [name for name in _git(folder, "ls-files", "--others", "--exclude-standard", "-z").split("\0") if name]
    untracked = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(new)}
    code = {
        "commit": _git(folder, "rev-parse", "HEAD").strip() or None,
        "dirty": bool(diff or untracked),
        "untracked": untracked,
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
    }
    return code, diff


def versions() -> dict[str, str | None]:
    """The installed version of every package that can change a number; None if it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, accelerators, and the thread count that decides the order of sums."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Facts that affect numbers and have changed, one line per fact: `versions.torch: 2.13.0 -> 2.14.0`.

    Compares code, versions, hardware and cache of two provenances; not the time, the command or the prompt.
    """
    kept = ("code", "python", "versions", "hardware", "seeds", "cache")
    return changes({key: then.get(key) for key in kept}, {key: now.get(key) for key in kept})


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str:
    """Output of git; empty if git or the repository is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
