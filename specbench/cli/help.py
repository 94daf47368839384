"""What `--help` prints: the verbs, and for each verb its groups and every key with its default, its comment and
what it takes."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specbench.cli.verbs import Verb

if TYPE_CHECKING:
    from hydra.core.default_element import ResultDefault


def overview(verbs: Mapping[str, Verb]) -> str:
    """The page of `specbench --help`."""
    width = max(map(len, verbs))
    lines = [
        "specbench VERB [key=value ...]    the laboratory for speculative-decoding draft models",
        "",
        *(f"  {name:<{width}}  {verb.does}" for name, verb in verbs.items()),
        "",
        "  specbench VERB --help           everything that can be set, with defaults",
        "  specbench VERB --cfg job        the configuration that would run",
        "  specbench VERB -m key=1,2,3     a sweep; hydra/launcher=submitit_slurm runs it on a cluster",
        "",
        "root=DIR says where everything is written (outputs/), force=true redoes what is finished.",
    ]
    return "\n".join(lines)


def page(name: str, verb: Verb, overrides: Sequence[str]) -> str:
    """The page of `specbench VERB --help`, for the groups that the overrides choose."""
    from omegaconf import OmegaConf

    from specbench.cli import overrides as composing
    from specbench.cli.settings import takes

    cfg = composing.compose(verb.config, overrides)
    chosen = cfg.hydra.runtime.choices
    lines = [f"specbench {name} [key=value ...]    {verb.does}", *_header(verb.config), ""]
    used = [group for group in composing.groups() if group in chosen]
    extra = [group for group in composing.groups() if group == "experiment" and group not in chosen]
    if used or extra:
        lines.append("Groups")
        rows = [(f"{group}={chosen[group]}", "one of " + ", ".join(composing.options(group))) for group in used]
        rows += [(f"+{group}=...", "one of " + ", ".join(composing.options(group))) for group in extra]
        lines += [*_columns(rows), ""]
    said = comments(verb.config, overrides)
    tree = OmegaConf.to_container(composing.without_hydra(cfg), resolve=False)
    lines.append("Settings")
    rows = []
    for key, value in composing.leaves(composing.without_hydra(cfg)).items():
        shown = not isinstance(value, dict) or not value
        if shown and not key.endswith("_target_"):
            text = "(must be given)" if value == "???" else _show(value)
            range_of = takes(verb.config, key, tree)
            comment = said.get(key, "")
            rows.append((f"{key}={text}", f"{comment} [{range_of}]".strip() if range_of else comment))
    return "\n".join([*lines, *_columns(rows)])


def _header(config: str) -> list[str]:
    """The comment that opens a root configuration."""
    from specbench.cli import overrides as composing

    for source in composing.loader().get_sources():
        if source.scheme() == "pkg" and source.is_config(config):
            lines = _read(source.path, config).splitlines()
            last = next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))
            return ["", *(line[1:].replace(" ", "", 1) for line in lines[:last])]
    return []


def comments(config: str, overrides: Sequence[str]) -> dict[str, str]:
    """For every dotted key of the composed configuration the comment that stands beside or above it in its file."""
    from hydra.types import RunMode

    from specbench.cli.overrides import loader

    hydra_loader = loader()
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
            return _read(source.path, default.config_path)
    return ""


def _read(package: str, config: str) -> str:
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
    return " ".join(above) if at > 0 else ""  # what opens a file speaks of all of it


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ",".join(map(_show, value)) + "]"
    return str(value)


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Two columns; a comment that is too long goes on below itself."""
    left = min(max((len(row[0]) for row in rows), default=0), 44)
    room = max(shutil.get_terminal_size((110, 24)).columns - left - 4, 40)
    lines = []
    for setting, comment in rows:
        wrapped = textwrap.wrap(comment, room) or [""]
        if len(setting) > left and comment:
            lines.append(f"  {setting}")
            setting = ""
        lines.append(f"  {setting:<{left}}  {wrapped[0]}".rstrip())
        lines += [f"  {'':<{left}}  {line}" for line in wrapped[1:]]
    return lines
