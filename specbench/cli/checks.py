"""Checks of every verb before any work.

`check_before(verb, cfg)` calls CHECKS, then `check(cfg)` of the verb's module if it has one. A check reads settings,
the environment and files; it writes nothing, loads no weights and is fast. It raises ValueError.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from specbench.cli.settings import check_settings
from specbench.cli.stages import Stage
from specbench.cli.verbs import VERBS
from specbench.runs.run_folder import folder_name
from specbench.runs.wandb_tracking import Tracking


def names(verb: str, cfg: DictConfig) -> None:
    """Check that every name of a folder is a valid name."""
    for key in ("name", "data.name", "target.name"):
        group, _, leaf = key.rpartition(".")
        holder = cfg.get(group) if group else cfg
        if holder is not None and holder.get(leaf) is not None:
            folder_name(holder[leaf], f"a folder ({key}=)")


def places(verb: str, cfg: DictConfig) -> None:
    """Check that the root is a folder, or can be created."""
    root = cfg.get("root")
    if root is None:
        return
    above = Path(str(root)).absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"root={root}: {above} is a file and no folder; choose another root=")


def environment(verb: str, cfg: DictConfig) -> None:
    """Check that the mode of tracking is possible in this environment."""
    if cfg.get("tracking") is None:
        return
    tracking = instantiate(cfg.tracking) if "_target_" in cfg.tracking else Tracking(**cfg.tracking)
    tracking.check()


CHECKS: list[Callable[[str, DictConfig], None]] = [names, places, environment]


def check_before(verb: str, cfg: DictConfig, module: str | None = None) -> None:
    """Raise the errors that can be detected before a run of `verb` begins. `module`: of a verb that is not in VERBS."""
    for one in CHECKS:
        one(verb, cfg)
    own = getattr(importlib.import_module(module or VERBS[verb].module), "check", None)
    if own is not None:
        own(cfg)


def ahead(verb: str, cfg: DictConfig, module: str | None = None) -> Stage | None:
    """Check a run that follows other stages; a folder that it could not use is refused now."""
    check_settings(verb, cfg)
    check_before(verb, cfg, module)
    stage_of = getattr(importlib.import_module(module or VERBS[verb].module), "stage_of", None)
    if stage_of is None:
        return None
    stage: Stage = stage_of(cfg)
    stage.decide()
    return stage


def sweep(verb: str, jobs: Sequence[DictConfig], module: str | None = None) -> None:
    """Check every job of a sweep; two jobs that would write different results into one folder are refused."""
    seen: dict[Path, str] = {}
    for cfg in jobs:
        stage = ahead(verb, cfg, module)
        if stage is not None and seen.setdefault(stage.folder, stage.identity.code) != stage.identity.code:
            raise ValueError(
                f"several jobs of this sweep would write to {stage.folder}: leave name out where it may be null, or "
                "put into it what differs, as in name='x-${seed}'"
            )
