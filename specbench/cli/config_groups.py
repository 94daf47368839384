"""The groups of the configuration and their options, as known to Hydra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType

from specbench.cli.following import text
from specbench.cli.sizes import offer_sizes, repository_of

# The groups whose options add up: `callbacks=[default,learning_rate_monitor]`. Of every other group one is chosen.
SEVERAL = ("callbacks", "choice", "experiment", "logger")


@contextmanager
def configs(package: str) -> Iterator[None]:
    """Hydra, looking for configurations in the importable package `package`."""
    with hydra.initialize_config_module(package, version_base="1.3"):
        offer_sizes(loader())
        yield


def loader() -> Any:
    """Hydra's own view of groups, options and files."""
    return GlobalHydra.instance().config_loader()


def options(group: str, search: Sequence[str] = ()) -> list[str]:
    """The options of a group, or nothing when there is no such group; `search` are overrides of hydra.searchpath."""
    if search:
        offer_sizes(loader(), search)
    return repository_of(loader(), search).get_group_options(group, ObjectType.CONFIG)


def known_options(group: str) -> list[str]:
    """The same outside of the command line, too, where Hydra is not at work yet."""
    with nullcontext() if GlobalHydra.instance().is_initialized() else configs("configs"):
        return options(group, search_path())


def search_path() -> list[str]:
    """The folders of configurations of the user's own that this command was given, as an override; nothing if none."""
    inside = GlobalHydra.instance().is_initialized() and HydraConfig.initialized()
    folders = list(HydraConfig.get().searchpath) if inside else []
    return [f"hydra.searchpath={text(folders)}"] if folders else []


def groups() -> list[str]:
    """Every group that holds options, without Hydra's own."""
    names = repository_of(loader()).get_group_options("", ObjectType.GROUP)
    return [name for name in names if name != "hydra" and options(name)]
