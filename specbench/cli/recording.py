"""The configuration in records: references to environment variables are kept, keys and passwords are redacted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from specbench.files.atomic import plain
from specbench.files.redaction import learn, redacted

# How a reference looks while the rest of the configuration is resolved: a word that every other resolver lets pass.
MARK = re.compile(r"qqEnv((?:[0-9a-f]{2})+)Qq")

# Settings that came later, at the value that means what runs without them did: they are not written down then, so that
# names, records and comparisons of earlier runs stay those of the same settings.
LATER = {
    "stream": False,
    "shuffle_buffer": 100,
    "start_previous": "method",
    "trainer.recipe.warmup_steps": None,
    "trainer.recipe.decay": None,
}


def recorded(config: DictConfig | Mapping[str, Any]) -> Any:
    """Plain dictionaries and lists, everything resolved but `${oc.env:NAME}`, without keys; to write and to compare.

    References to environment variables are not resolved, because the value can be a key.
    """
    if not OmegaConf.is_config(config):
        return redacted(plain(config))
    learn_from(config)
    with _references():
        resolved = OmegaConf.to_container(config, resolve=True)
    resolved = plain(resolved)
    for key, value in LATER.items():
        above, name = resolved, key
        while isinstance(above, dict) and "." in name:
            first, _, name = name.partition(".")
            above = above.get(first)
        if isinstance(above, dict) and name in above and above[name] == value:
            del above[name]
    return redacted(_with_references(resolved))


def learn_from(config: DictConfig) -> None:
    """Withhold the keys that `config` holds, by value or by reference, wherever they turn up from now on."""
    try:
        learn(OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException:  # a reference that leads nowhere is the business of whoever reads it
        learn(OmegaConf.to_container(config, resolve=False))


class Withholding(Callback):
    """Hydra's callback of a sweep: what Hydra keeps of the configuration beside the words is withheld, too."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        learn_from(without := OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
        with flag_override(config, ["readonly", "struct"], False):
            for key, value in redacted(OmegaConf.to_container(without, resolve=False)).items():
                config[key] = value


@contextmanager
def _references() -> Iterator[None]:
    """While it is open, `${oc.env:NAME}` resolves to a mark that stands for the reference."""
    from omegaconf.resolvers.oc import env

    OmegaConf.register_new_resolver("oc.env", _mark, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", env, replace=True)


def _mark(name: str, default: Any = None) -> str:
    return f"qqEnv{str(name).encode().hex()}Qq"


def _with_references(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _with_references(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_references(value) for value in tree]
    if not isinstance(tree, str):
        return tree
    return MARK.sub(lambda found: f"${{oc.env:{bytes.fromhex(found[1]).decode()}}}", tree)
