"""Composition of a configuration from overrides by Hydra, with a check of every override."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from specbench.cli.comments import comments
from specbench.cli.config_groups import SEVERAL, groups, loader, options
from specbench.cli.errors import nearest
from specbench.cli.following import text
from specbench.cli.recording import recorded
from specbench.cli.schema import takes_text
from specbench.cli.settings import SCHEMAS, check_settings, takes
from specbench.cli.sizes import PUBLISHED, offer_sizes
from specbench.cli.target_argument import quoted
from specbench.files.redaction import redacted

MANY_JOBS = 256

# The name of a target that is given by its folder or hub id alone.
OmegaConf.register_new_resolver("basename", lambda path: Path(str(path)).name, replace=True)
# What `specbench target` makes is called after the package or file that it comes from, else `otherwise`.
OmegaConf.register_new_resolver(
    "made_from",
    lambda package, path, otherwise: str(package or "") or (Path(str(path)).stem if path else otherwise),
    replace=True,
)
OmegaConf.register_new_resolver(
    "dtype_of", lambda package, path: "float32" if package or path else "bfloat16", replace=True
)


PLAIN = re.compile(r"([+~]{0,2}[\w./@-]+)=(.*)", re.DOTALL)
# Within quotes, backslashes count where a quote or the end follows them.
QUOTES = re.compile(r"(\\*)('|\Z)")


def compose(config: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration with Hydra's own settings under `hydra`; `${hydra:...}` resolves as it does in a sweep."""
    if search := [text for text in overrides if text.startswith("hydra.searchpath=")]:
        offer_sizes(loader(), search)
    cfg = hydra.compose(config, texts(config, overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return cfg


def without_hydra(cfg: DictConfig) -> DictConfig:
    """The configuration that a verb sees."""
    cfg = cfg.copy()
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def with_filters(config: str, overrides: Sequence[str]) -> list[str]:
    """`KEY=VALUE` becomes `filters.KEY=VALUE` for the keys of `filters`, and several values become a list:
    `target=qwen3_4b benchmark=gsm8k,math500` says which runs are meant where no target or suite is to be built.
    `where=method.draft.layers=2` is put in quotes, without which Hydra's grammar ends at the second sign.
    """
    keys = compose(config, []).filters.keys()
    found = []
    for word in overrides:
        key, sign, value = word.partition("=")
        short = key.removeprefix("filters.")
        if key == "where" and "=" in value and value[0] not in "[\"'":
            found.append(f'where="{value}"')
            continue
        if not sign or short not in keys or key not in (short, f"filters.{short}"):
            found.append(word)
            continue
        several = "," in value and value[:1] not in ("[", "'", '"')
        found.append(f"filters.{short}=[{value}]" if several else f"filters.{short}={value}")
    return found


def check(verb: str, config: str, overrides: Sequence[str]) -> None:
    """Raise ValueError for an unknown group option, an unknown key (the nearest is named) or a value of a wrong type.

    The values of a sweep are checked one by one, so that no job of it fails for that later.
    """
    named = [override for override in parse(overrides) if not override.key_or_group.startswith("hydra")]
    search = [text for text in overrides if text.startswith("hydra.searchpath=")]
    choices = [override for override in named if options(override.key_or_group, search)]
    for override in choices:
        for value in values(override):
            _check_option(override.key_or_group, value, search)
    chosen = compose(config, []).hydra.runtime.choices if choices else {}
    for override in choices:
        group = override.key_or_group
        if group not in chosen and not override.is_add() and not override.is_force_add():
            takes = [name for name in groups() if name in chosen]
            known = ", ".join(takes) or "no groups"
            raise ValueError(f"{verb} has no {group} to replace: it takes {known}, and +{group}=... adds one")
    base = without_hydra(compose(config, [*search, *(_first(override) for override in choices)]))
    for override in named:
        if override not in choices and not override.is_delete():
            _check_key(verb, config, base, override)


def texts(config: str, overrides: Sequence[str]) -> list[str]:
    """The overrides with quotes around values that look like a number and are a text: name=20260101, name=nan."""
    model = SCHEMAS.get(config)
    if model is None:
        return list(overrides)
    found = []
    for word, override in zip(overrides, parse(overrides), strict=True):
        given, path = values(override), override.key_or_group.split(".")
        plain = [value for value in given if isinstance(value, (bool, int, float))]
        if not plain or override.is_delete() or not takes_text(model, path):
            found.append(word)
            continue
        key, _, raw = word.partition("=")
        parts = raw.split(",") if override.is_sweep_override() else [raw]
        if len(parts) == len(given):
            parts = [f"'{part}'" if value in plain else part for part, value in zip(parts, given, strict=True)]
        found.append(f"{key}={','.join(parts)}")
    return found


def jobs(cfg: DictConfig, overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job of a sweep, axes of the configuration included.

    Of sweeps beyond MANY_JOBS, and of those of other sweepers than Hydra's own, every value of every axis, one at a
    time; a glob or an interval cannot be listed and stays at its default.
    """
    named = {override.key_or_group for override in parse(overrides)}
    own = str(cfg.hydra.sweeper.get("_target_", "")).endswith("BasicSweeper")
    axes = (cfg.hydra.sweeper.get("params") or {}) if own else {}
    words = [*overrides, *(f"{key}={value}" for key, value in axes.items() if key.lstrip("+") not in named)]
    listed = []
    for override in parse(texts(cfg.hydra.job.config_name, words)):
        if not override.is_sweep_override():
            listed.append([str(override.input_line)])
        elif override.is_discrete_sweep():
            key = str(override.input_line).partition("=")[0]
            listed.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    if own and math.prod(map(len, listed)) <= MANY_JOBS:
        return [list(job) for job in product(*listed)]
    first = [axis[0] for axis in listed]
    return [[*first[:at], value, *first[at + 1 :]] for at, axis in enumerate(listed) for value in axis]


def check_choice(cfg: DictConfig) -> None:
    """Raise ValueError for a choice, or sizes, of another method than the one that is trained: the label of a choice
    would be wrong, and the sizes would be those of another draft."""
    chosen = cfg.hydra.runtime.choices
    method, size = chosen.get("method"), chosen.get("size")
    others = {f"{trainer}_{other}" for other in options("method") for trainer in options("trainer") if other != method}
    if size in others and size not in {f"{trainer}_{method}" for trainer in options("trainer")}:
        raise ValueError(
            f"size={size} has the sizes of another method than method={method}: leave out size=, or choose "
            f"size={PUBLISHED} or size=TRAINER_{method}"
        )
    name = chosen.get("choice")
    if name is None:
        return
    for default in loader().repository.load_config(f"choice/{name}").defaults_list or ():
        group = getattr(default, "group", None)
        if group is not None and default.is_override():
            key = group.lstrip("/")
            if chosen.get(key) != default.value:
                raise ValueError(
                    f"choice={name} is a choice of {key}={default.value}, and {key}={chosen.get(key)} was asked for: "
                    f"leave out {key}=, or choose another choice"
                )


def values(override: Override) -> list[Any]:
    """What an override sets: one value, or those of a sweep; a glob or an interval cannot be listed and gives none."""
    if not override.is_sweep_override():
        return [override.value()]
    if not override.is_discrete_sweep():
        return []
    return [Override._convert_value(value) for value in override.sweep_iterator(transformer=Transformer.identity)]


def named(words: Sequence[str], key: str, several: bool) -> list[str]:
    """The words of a command line with `key=` before those that are no setting; `several` of them are one list."""
    settings = [word for word in words if "=" in word or word[:1] == "~"]
    bare = [word for word in words if word not in settings]
    if several and len(bare) > 1:
        return [f"{key}=[{','.join(map(quoted, bare))}]", *settings]
    return [*(f"{key}={word}" for word in bare), *settings]


def first_job(overrides: Sequence[str]) -> list[str]:
    """The overrides with every sweep replaced by its first value."""
    return [_first(override) for override in parse(overrides)]


def readable(overrides: Sequence[str], sweep: bool = False) -> list[str]:
    """The overrides, in quotes where the value is none of Hydra's grammar: a path with brackets or accents is a text.

    Errors: ValueError for a word that is no key=value, and within a `sweep` for one with a comma: it may be several.
    """
    found = []
    for word in overrides:
        try:
            parse([word])
        except OverrideParseException as error:
            split = PLAIN.fullmatch(word)
            if split is None:
                raise ValueError(f"{word!r} is no setting: settings are key=value") from error
            if sweep and "," in split[2]:
                raise ValueError(
                    f"{word}: cannot be read as the values of a sweep: put each text in quotes, {split[1]}=\"'A','B'\""
                ) from error
            quotes = QUOTES.sub(lambda ahead: ahead[1] * 2 + ("\\'" if ahead[2] else ""), split[2])
            word = f"{split[1]}='{quotes}'"
        found.append(word)
    return found


def parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's reading of the overrides."""
    return OverridesParser.create().parse_overrides(list(overrides))


def _first(override: Override) -> str:
    """The override itself, or with a sweep's first value."""
    if not override.is_discrete_sweep():
        return str(override.input_line)
    first = next(iter(override.sweep_string_iterator()))
    return f"{override.input_line.partition('=')[0]}={first}"


def _check_option(group: str, value: Any, search: Sequence[str]) -> None:
    known, several = options(group, search), group in SEVERAL
    if isinstance(value, dict) or (several and value == []):
        return  # nothing is added, or Hydra says what is wrong with settings in place of a name
    for name in value if isinstance(value, list) and several else [value]:
        if not isinstance(name, str):
            amount = "one of, or a list of," if several else "one of"
            raise ValueError(f"{group}={text(value)}: takes {amount} {', '.join(known)}")
        if name not in known and "/" not in name:
            raise ValueError(f"{group} has no option '{name}'{nearest(name, known)} (there are {', '.join(known)})")


def _check_key(verb: str, config: str, base: DictConfig, override: Override) -> None:
    key = override.key_or_group
    known = list(leaves(base))
    parent, _, _ = key.rpartition(".")
    added = override.is_add() or override.is_force_add()
    exists = _has(base, key)
    if not exists and not (added and parent and OmegaConf.is_dict(OmegaConf.select(base, parent))):
        suggestion = nearest(key, [*known, *groups()])
        raise ValueError(f"{verb} has no setting '{key}'{suggestion}; `specbench {verb} --help` lists them")
    # The schema checks more, when the configuration is complete.
    if exists and not takes(config, key, OmegaConf.to_container(base, resolve=False)):
        default = OmegaConf.select(base, key, throw_on_missing=False, throw_on_resolution_failure=False)
        for value in values(override):
            if wrong := mismatch(default, value):
                raise ValueError(f"{key} takes {wrong}, not {value!r}")


def _has(cfg: DictConfig, key: str) -> bool:
    node: Any = cfg
    *above, last = key.split(".")
    for part in above:
        if OmegaConf.is_dict(node) and part in node.keys():  # noqa: SIM118 - `in` alone is false for a missing value
            node = node._get_node(part) if OmegaConf.is_missing(node, part) else node[part]
        elif OmegaConf.is_list(node) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return False
    # Not read: a default may be made of settings that this command line has still to give.
    if OmegaConf.is_list(node):
        return last.isdigit() and int(last) < len(node)
    return OmegaConf.is_dict(node) and last in node.keys()  # noqa: SIM118 - `in` alone is false for a missing value


def mismatch(default: Any, value: Any) -> str | None:
    """What kind of value `default` stands for, when `value` is not of it; None when it may stand.

    A text may be replaced by anything (`auto` by a number), null by anything, and everything by null.
    """
    if default is None or value is None or isinstance(default, str) or (isinstance(value, str) and "${" in value):
        return None
    if isinstance(default, (DictConfig, dict)):
        return None if isinstance(value, dict) else "a group of settings"
    if isinstance(default, (ListConfig, list)):
        return None if isinstance(value, list) else "a list in brackets, as in [1,2]"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "a whole number" if isinstance(default, int) else "a number"
    if isinstance(default, int) and not isinstance(value, int):
        return "a whole number"
    return None


def leaves(cfg: DictConfig) -> dict[str, Any]:
    """Every dotted key that can be set, groups of settings included, with its value; interpolations as written."""
    found: dict[str, Any] = {}

    def walk(tree: Any, where: str) -> None:
        for key, value in tree.items():
            path = f"{where}.{key}" if where else str(key)
            found[path] = value
            if isinstance(value, dict):
                walk(value, path)

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return found


def require(verb: str, config: str, cfg: DictConfig) -> None:
    """Raise ValueError for a setting that has no default and was not given."""
    missing = sorted(OmegaConf.missing_keys(without_hydra(cfg))) or _inherited(config, cfg)
    if missing:
        said = comments(config, []).get(missing[0], "")
        raise ValueError(f"{verb} needs {missing[0]}=...{f' ({said})' if said else ''}")


def _inherited(config: str, cfg: DictConfig) -> list[str]:
    """Settings that the root file declares as ??? and that are null in the file it extends: a merge keeps the null."""
    sources = loader().get_sources()
    files = [source.load_config(config).config for source in sources if source.is_config(config)]
    declared = [str(key) for file in files for key in file if OmegaConf.is_missing(file, key)]
    return [key for key in declared if cfg[key] is None]


def check_values(verb: str, config: str, cfg: DictConfig) -> None:
    """Raise ValueError for what is missing, and for the first value that is not what the verb's settings may be."""
    require(verb, config, cfg)
    check_choice(cfg)
    check_settings(config, without_hydra(cfg))


def is_sweep(verb: str, cfg: DictConfig, overrides: Sequence[str]) -> bool:
    """Whether the configuration asks for a sweep itself; one that leaves axes open and was not asked to is an error."""
    if cfg.hydra.mode is not None and str(cfg.hydra.mode).endswith("MULTIRUN"):
        return True
    fixed = {override.key_or_group for override in parse(overrides)}
    open_axes = [axis for axis in cfg.hydra.sweeper.get("params") or () if axis.lstrip("+") not in fixed]
    if open_axes:
        raise ValueError(f"this is a sweep over {', '.join(open_axes)}: add -m, as in `specbench {verb} -m ...`")
    return False


def sweep_defaults(verb: str, cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Where a sweep keeps Hydra's own notes, unless the command line says so: below `root` with everything else."""
    root = cfg.get("root", "outputs")
    defaults = {
        "hydra.sweep.dir": f"{root}/sweeps/{verb}/${{now:%Y-%m-%d_%H-%M-%S}}",
        "hydra/job_logging": "none",
        # Every run folder has its own record, in which keys are redacted; that of Hydra would contain them.
        "hydra.output_subdir": "null",
        "+hydra.callbacks.withholding": "{_target_: specbench.cli.recording.Withholding}",
    }
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    return [f"{key}={value}" for key, value in defaults.items() if key.lstrip("+") not in given]


def as_yaml(cfg: DictConfig, part: str) -> str:
    """The resolved configuration as YAML: `job` the verb's own, `hydra` Hydra's, `all` both."""
    if part not in ("job", "hydra", "all"):
        raise ValueError(f"--cfg takes job, hydra or all, not '{part}'")
    if part == "job":
        return OmegaConf.to_yaml(OmegaConf.create(recorded(without_hydra(cfg))))
    kept = OmegaConf.to_container(cfg.hydra if part == "hydra" else cfg, resolve=False)
    return OmegaConf.to_yaml(OmegaConf.create(redacted(kept)))
