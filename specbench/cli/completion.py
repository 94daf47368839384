"""Shell completion: the possible continuations of the word that is being typed.

Hydra completes one application with one root configuration and composes it at every key press, which takes seconds;
`specbench` has one root configuration per verb. Here the YAML files are read directly: a root names its groups in
`defaults` and its settings by its keys, the folder of a group contains its options, and the file of the chosen option
names the settings of the group. Nothing is composed, and neither Hydra nor torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from specbench.cli.verbs import Verb

OPTIONS = ("--help", "--multirun", "--cfg")
ASK = "--complete"  # specbench --complete WORD ... : the words of the line after the first, the last one unfinished

# A bash splits words at "=" and completes only what follows it; `specbench` is told the words as bash has them.
SCRIPTS = {
    "bash": f"""\
_specbench() {{
    local IFS=$'\\n' word="${{COMP_WORDS[COMP_CWORD]}}"
    COMPREPLY=($("${{COMP_WORDS[0]}}" {ASK} "${{COMP_WORDS[@]:1:COMP_CWORD}}" 2>/dev/null))
    if [[ $word == = || ${{COMP_WORDS[COMP_CWORD-1]}} == = ]]; then
        COMPREPLY=("${{COMPREPLY[@]#*=}}")
    fi
    case "${{COMPREPLY[*]}}" in *=) compopt -o nospace 2>/dev/null ;; esac
}}
complete -o default -F _specbench specbench
""",
    "zsh": f"""\
_specbench() {{
    local -a found
    found=(${{(f)"$("${{words[1]}}" {ASK} "${{(@)words[2,CURRENT]}}" 2>/dev/null)"}})
    if (( ${{#found}} )); then
        compadd -Q -S '' -- ${{(M)found:#*=}}
        compadd -Q -- ${{found:#*=}}
    else
        compset -P '*='
        _files
    fi
}}
compdef _specbench specbench
""",
    "fish": f"""\
function __specbench_complete
    set -l words (commandline -opc) (commandline -ct)
    $words[1] {ASK} $words[2..-1] 2>/dev/null
end
complete -c specbench -a '(__specbench_complete)'
""",
}


def answers(words: Sequence[str], verbs: Mapping[str, Verb], package: str = "configs") -> list[str]:
    """Possible continuations of the last of `words`; none if the shell should offer files instead."""
    *before, last = joined(words)
    given = [word for word in before if not word.startswith("-")]
    if not given:
        return _starting(last, [*verbs, "--help"])
    name, *overrides = given
    if name not in verbs:
        return []
    if last.startswith("-"):
        return _starting(last, OPTIONS)
    verb, root = verbs[name], resources.files(package)
    key, sign, value = last.partition("=")
    bare = key.lstrip("+~")
    if sign:
        start = value.rpartition(",")[0]
        kept = f"{start}," if start else ""
        return _starting(last, [f"{key}={kept}{one}" for one in _values(root, verb.config, bare, overrides)])
    plus = key[: len(key) - len(bare)]
    # "+" adds a group that the verb does not have by default, as +experiment=NAME does.
    added = (path.name for path in root.iterdir() if plus and path.is_dir() and not path.name.startswith("_"))
    known = [f"{plus}{one}=" for one in (*_keys(root, verb.config, overrides), *added)]
    if verb.takes and not last.startswith("+"):
        known += _values(root, verb.config, verb.takes, overrides)
    found = _starting(last, known)
    # Settings of a group appear once its name and a dot are typed: there are hundreds of them.
    return [one for one in found if one.count(".") <= last.count(".")] or found


def joined(words: Sequence[str]) -> list[str]:
    """Words of a line as the command will get them, from words that a shell has split at "="; at least one."""
    found: list[str] = []
    after = False
    for word in words:
        if found and (word == "=" or after):
            found[-1] += word
        else:
            found.append(word)
        after = word == "="
    return found or [""]


def _starting(last: str, known: Sequence[str]) -> list[str]:
    return sorted({one for one in known if one.startswith(last)})


def _read(root: Traversable, name: str) -> dict[str, Any]:
    """One YAML file of the configuration as plain data; empty if there is no such file."""
    from specbench.files.plain_yaml import read

    file = root.joinpath(f"{name}.yaml")
    if not file.is_file():
        return {}
    found = read(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _groups(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, str | None]:
    """The groups of a root or of an option, with the option that is chosen on the line or by default."""
    given = dict(word.lstrip("+").split("=", 1) for word in overrides if "=" in word)
    found: dict[str, str | None] = {}
    for entry in config.get("defaults") or []:
        if isinstance(entry, dict):
            for name, option in entry.items():
                group = str(name).removeprefix("optional ").removeprefix("override ").strip("/")
                found[group] = given.get(group, option if isinstance(option, str) and "$" not in option else None)
    return found


def _keys(root: Traversable, config: str, overrides: Sequence[str]) -> Iterator[str]:
    written = _read(root, config)
    groups = _groups(written, overrides)
    yield from groups
    yield from (key for key, _ in _leaves(written, ""))
    for group, option in groups.items():
        if option is not None:
            yield from (key for key, _ in _option(root, group, option))


def _option(root: Traversable, group: str, option: str) -> Iterator[tuple[str, Any]]:
    """Settings of an option with their defaults, those of the options that it extends included."""
    written = _read(root, f"{group}/{option}")
    for entry in written.get("defaults") or []:
        if isinstance(entry, str) and entry != "_self_" and entry != option:
            yield from _option(root, group, entry)
    yield from _leaves(written, f"{group}.")


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if key == "defaults" or str(key).startswith("_"):
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _values(root: Traversable, config: str, key: str, overrides: Sequence[str]) -> list[str]:
    """Options of a group, or values of a setting that has only some."""
    folder = root.joinpath(*key.split("/"))
    if "." not in key and folder.is_dir():
        return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))
    written = _read(root, config)
    found = dict(_leaves(written, ""))
    for group, option in _groups(written, overrides).items():
        if option is not None and key.startswith(f"{group}."):
            found |= dict(_option(root, group, option))
    if isinstance(found.get(key), bool):
        return ["true", "false"]
    return _choices(config, key)


def _choices(config: str, key: str) -> list[str]:
    """Names that the schema allows for a setting of the root itself."""
    from typing import Literal, get_args, get_origin

    from specbench.cli.schema import annotation_at
    from specbench.cli.settings import SCHEMAS

    if config not in SCHEMAS or "." in key:
        return []
    kinds = [annotation_at(SCHEMAS[config], [key])[0]]
    for kind in kinds:
        kinds += [] if get_origin(kind) is Literal else get_args(kind)
    return [str(name) for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
