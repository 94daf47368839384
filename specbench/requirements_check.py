"""Refuse an installation whose packages are older than what this one requires, before any of them is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

PACKAGE = "specbench"


def required() -> list[str]:
    """The requirements of pyproject.toml as the installation recorded them; none in a clone without one."""
    try:
        return requires(PACKAGE) or []
    except PackageNotFoundError:
        return []


def check_requirements(
    wanted: Sequence[str] | None = None, installed: Callable[[str], str] = version, platform: str = sys.platform
) -> None:
    """Raise ImportError naming every package that is missing or of a version that is not supported.

    `wanted` are requirements as in pyproject.toml, those of extras are passed over; None: this package's own.
    """
    if platform == "win32":
        raise ImportError(f"{PACKAGE} needs Linux or macOS: on Windows, install it in the Windows Subsystem for Linux")
    faults, remedy = [], []
    for text in required() if wanted is None else wanted:
        one = Requirement(text)
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            found = installed(one.name)
        except PackageNotFoundError:
            fault = f"{one.name}{one.specifier}, which is not installed"
        else:
            if one.specifier.contains(found, prereleases=True):
                continue
            fault = f"{one.name}{one.specifier}, and {found} is installed"
        faults.append(fault)
        remedy.append(f"'{one.name}{one.specifier}'")
    if faults:
        raise ImportError(f"{PACKAGE} needs {'; '.join(faults)}: pip install --upgrade {' '.join(remedy)}")
