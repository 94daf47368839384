"""The callbacks and loggers of Lightning that a configuration adds to those of every training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar

from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

PLACES = ("dirpath", "save_dir")
LightningPart = TypeVar("LightningPart", Callback, Logger)


def callbacks_of(cfg: DictConfig, folder: Path) -> list[Callback]:
    """The callbacks of `cfg.callbacks`, which write below the run folder `folder`."""
    return _built("callbacks", cfg.get("callbacks"), Callback, folder)


def loggers_of(cfg: DictConfig, folder: Path) -> list[Logger]:
    """The loggers of `cfg.logger`, in addition to those of the run folder and W&B."""
    return _built("logger", cfg.get("logger"), Logger, folder)


def _built(group: str, entries: Any, kind: type[LightningPart], folder: Path) -> list[LightningPart]:
    """One object an entry; an entry that is null is left out.

    Errors: ValueError for a class of another kind, arguments that it does not take, or a place outside of the folder.
    """
    if not isinstance(entries or {}, (Mapping, DictConfig)):  # a record may hold anything
        raise ValueError(f"{group}={entries}: takes names with the settings of one {kind.__name__} each")
    found = []
    for name, entry in (entries or {}).items():
        if entry is None:
            continue
        where = f"{group}.{name}"
        if not isinstance(entry, DictConfig):
            raise ValueError(f"{where}={entry}: takes the settings of one {kind.__name__}, with its class as _target_")
        settings = OmegaConf.to_container(entry, resolve=True)
        _require_inside(settings, where)
        for key in PLACES:
            if key in settings:
                settings[key] = str(folder / (settings[key] or "."))
        try:
            one = instantiate(settings, _convert_="all")
        except Exception as error:  # the class's own, of any kind: an argument, or a package that is not installed
            cause = error.__cause__ or error
            raise ValueError(f"{where} cannot be made: {' '.join(str(cause).split())}") from error
        if not isinstance(one, kind):
            raise ValueError(f"{where}._target_={settings.get('_target_')}: is no {kind.__name__} of Lightning")
        found.append(one)
    return found


def _require_inside(tree: Any, where: str) -> None:
    """Refuse a path outside of the run folder, because a record can come from someone else and these settings name
    files."""
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if isinstance(value, (Mapping, list)):
            _require_inside(value, f"{where}.{key}")
        elif isinstance(value, str) and (PurePath(value).is_absolute() or ".." in PurePath(value).parts):
            raise ValueError(f"{where}.{key}={value}: takes a place inside of the run folder, as a relative path")
