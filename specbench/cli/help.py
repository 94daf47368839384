"""Output of `--help`: the verbs, and for each verb its groups and every key with its default, its comment and its
type."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specbench.cli.comments import comments, read
from specbench.cli.verbs import Verb

if TYPE_CHECKING:
    pass


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

    from specbench.cli import config_groups
    from specbench.cli import overrides as composing
    from specbench.cli.settings import takes

    cfg = composing.compose(verb.config, overrides)
    chosen = cfg.hydra.runtime.choices
    lines = [f"specbench {name} [key=value ...]    {verb.does}", *_header(verb.config), ""]
    used = [group for group in config_groups.groups() if group in chosen]
    extra = ["experiment"] if verb.experiments and "experiment" not in chosen else []
    if used or extra:
        lines.append("Groups")
        rows = [(f"{group}={chosen[group]}", "one of " + ", ".join(config_groups.options(group))) for group in used]
        rows += [(f"+{group}=...", "one of " + ", ".join(config_groups.options(group))) for group in extra]
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
    from specbench.cli import config_groups

    for source in config_groups.loader().get_sources():
        if source.scheme() == "pkg" and source.is_config(config):
            lines = read(source.path, config).splitlines()
            last = next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))
            return ["", *(line[1:].replace(" ", "", 1) for line in lines[:last])]
    return []


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ",".join(map(_show, value)) + "]"
    return str(value)


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Two columns; a long comment is continued on the next line."""
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
