"""The comments of the YAML files: a comment beside or above a key describes the setting."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra

if TYPE_CHECKING:
    from hydra.core.default_element import ResultDefault


def comments(config: str, overrides: Sequence[str]) -> dict[str, str]:
    """The comment beside or above every dotted key of the composed configuration."""
    from hydra.types import RunMode

    hydra_loader = GlobalHydra.instance().config_loader()
    defaults = hydra_loader.compute_defaults_list(config, list(overrides), RunMode.RUN).defaults
    found: dict[str, str] = {}
    for default in defaults:
        if default.config_path and not default.config_path.startswith("hydra"):
            text = _text(hydra_loader, default)
            package = "" if default.package in (None, "", "_global_") else f"{default.package}."
            found |= {f"{package}{key}": comment for key, comment in beside(text).items()}
    return found


def _text(hydra_loader: Any, default: ResultDefault) -> str:
    """The YAML text of one entry of the defaults list."""
    for source in hydra_loader.get_sources():
        if source.scheme() == "pkg" and source.is_config(default.config_path):
            return read(source.path, default.config_path)
    return ""


def read(package: str, config: str) -> str:
    from importlib.resources import files

    return files(package).joinpath(f"{config}.yaml").read_text(encoding="utf-8")


def beside(text: str) -> dict[str, str]:
    """The comments of one YAML text by dotted key: at the end of the key's line, or the lines right above it."""
    import yaml

    lines = text.splitlines()
    found: dict[str, str] = {}

    def walk(node: Any, where: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                path = f"{where}.{key.value}" if where else key.value
                if comment := _comment(lines, key.start_mark.line, key.start_mark.column):
                    found[path] = comment
                walk(value, path)

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return found


def _comment(lines: Sequence[str], at: int, indent: int) -> str:
    quoted = r"""(?:"[^"]*"|'[^']*'|[^#"'])*?"""
    if match := re.match(rf"^{quoted}\s#\s?(.*)$", lines[at]):
        return match.group(1).strip()
    above: list[str] = []
    while at > 0 and lines[at - 1].startswith(" " * indent + "#"):
        at -= 1
        above.insert(0, lines[at].strip().lstrip("# "))
    return " ".join(above) if at > 0 else ""  # a comment at the beginning of a file describes the whole file
