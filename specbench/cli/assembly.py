"""Construction of objects from a configuration, for several stages."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from specbench.checkpoints.draft_folder import taps_of
from specbench.cli.config_groups import configs, search_path
from specbench.cli.errors import naming
from specbench.cli.overrides import compose, without_hydra
from specbench.drafts.baselines import SLOTS, Baseline, baseline
from specbench.drafts.draft import Draft
from specbench.library.drafts import PLAIN, load_draft
from specbench.losses.objective import Objective
from specbench.models.backbone import backbone_of
from specbench.models.embedding_head import Tables
from specbench.models.target import Target, raw_config
from specbench.models.target_files import location

# Lightning sets its own level to INFO as it is imported, and its tips are no news of a run.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def composed(config: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of another verb, for stages that run stages."""
    # The command line is inside Hydra already, a library call is not.
    with nullcontext() if GlobalHydra.instance().is_initialized() else configs("configs"):
        return without_hydra(compose(config, [*search_path(), *overrides]))


THREADS = torch.get_num_threads()


def device_of(setting: str | None) -> torch.device:
    """`auto` is CUDA if there is a device."""
    if setting in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(setting).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={setting}: this machine has no CUDA device; use device=cpu or device=auto")
    try:
        found = torch.device(setting)
    except RuntimeError as error:
        raise ValueError(f"device={setting}: takes auto, cpu, cuda or cuda:NUMBER") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={setting}: this machine's CUDA devices are 0 to {torch.cuda.device_count() - 1}")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={setting}: this machine has no such device; use device=cpu or device=auto")
    return found


def load_target(cfg: DictConfig, device: str | None = None) -> Target:
    """The target of a `target` group: a hub id, a folder, or random weights from a configuration."""
    where = device_of(device if device is not None else cfg.device)
    if where.type == "cpu":
        # Set back for a target without a number of its own, which may follow another one in this process.
        torch.set_num_threads(cfg.get("threads") or THREADS)
    stops = None if cfg.stop_token_ids is None else list(cfg.stop_token_ids)
    taps = list(cfg.target_layer_ids or [])
    if cfg.get("config") is not None:
        config = OmegaConf.to_container(cfg.config, resolve=True)
        with naming("target.config", config.get("model_type")):
            return Target.from_config(config, taps, seed=cfg.seed, device=where, name=cfg.name, stop_token_ids=stops)
    with naming("target.id", cfg.id):
        return Target.load(
            cfg.id,
            taps,
            revision=cfg.revision,
            dtype=cfg.dtype,
            device=where,
            name=cfg.name,
            stop_token_ids=stops,
        )


def build_draft(
    method: DictConfig, target: DictConfig, config: Mapping[str, Any], tables: Tables, vocabulary: Tensor | None = None
) -> Draft:
    """A draft of `method` for a target with the raw configuration `config` and its `tables`.

    `vocabulary` (W,) are the token ids of a reduced draft vocabulary (None: the target's whole one).
    """
    # The scales belong to the tables, and the target's are as its library model has them.
    backbone = replace(
        backbone_of(config, method.backbone, method.window, target.get("max_length")),
        embedding_scale=tables.embedding_scale,
        soft_cap=tables.soft_cap,
        logit_scale=tables.logit_scale,
    )
    # Partial, because Hydra would turn the backbone's dataclass into a mapping and wrap the class's own errors.
    build = instantiate(method.draft, _partial_=True, _convert_="all")
    return build(
        backbone=backbone,
        tables=tables,
        target_layer_ids=list(target.target_layer_ids),
        mask_token_id=target.mask_token_id,
        draft_vocabulary=vocabulary,
    )


def target_config(target: DictConfig) -> dict[str, Any]:
    """The raw configuration of a target's model, without its weights: from the option itself, else its config.json."""
    for key in ("config", "shapes"):
        if target.get(key) is not None:
            return OmegaConf.to_container(target[key], resolve=True)
    return raw_config(location(target.id), target.revision)


def draft_without_weights(method: DictConfig, target: DictConfig, config: Mapping[str, Any]) -> Draft:
    """The draft on the meta device: its sizes, without memory for its weights."""
    facts = backbone_of(config, method.backbone, method.window)
    with torch.device("meta"):
        empty = torch.empty(facts.vocab_size, facts.hidden_size)
        return build_draft(method, target, config, Tables(empty, empty, facts.embedding_scale, facts.soft_cap))


def own_methods(names: Sequence[str] | None) -> list[type[Draft]]:
    """The classes of methods outside of this package that the user named, as PACKAGE.MODULE.CLASS."""
    found = []
    for name in names or ():
        try:
            kind = get_class(str(name))
        except Exception as error:  # importing it runs the user's own code, which may fail in any way
            raise ValueError(f"methods=[{name}] cannot be imported ({error}): give PACKAGE.MODULE.CLASS") from error
        if not issubclass(kind, Draft):
            raise ValueError(f"methods=[{name}] is no draft method: name a subclass of specbench.drafts.draft.Draft")
        found.append(kind)
    return found


def load_pair(cfg: DictConfig, folder: Path | None) -> tuple[Target, Draft | Baseline | None]:
    """The target with the taps of the draft, and the draft: of `folder`, or of `cfg.draft` without a folder."""
    about = cfg.target.copy()
    if cfg.get("stop_token_ids") is not None:
        about.stop_token_ids = list(cfg.stop_token_ids)
    if folder is None:
        with open_dict(about):
            about.target_layer_ids = []
        target = load_target(about, cfg.device)
        return target, None if cfg.draft == PLAIN else baseline(cfg.draft, target, cfg.get("slots") or SLOTS)
    methods = own_methods(cfg.get("methods"))
    with naming("draft", cfg.draft):
        about.target_layer_ids = taps_of(folder, methods)
    target = load_target(about, cfg.device)
    with naming("draft", cfg.draft):
        draft = load_draft(folder, target, methods=methods)
    if cfg.get("slots") is not None and cfg.slots > draft.block_size:
        raise ValueError(
            f"slots={cfg.slots}: the block of draft={cfg.draft} holds {draft.block_size}; ask for at most so many, or "
            "leave slots out"
        )
    return target, draft


def draft_settings(method: DictConfig, target: DictConfig) -> dict[str, Any]:
    """The constructor settings of a draft as stored in its folder."""
    settings = OmegaConf.to_container(method.draft, resolve=True)
    settings.pop("_target_")
    return settings | {"target_layer_ids": list(target.target_layer_ids), "mask_token_id": target.mask_token_id}


def build_objective(method: DictConfig) -> Objective:
    """The loss of a method from its dictionary of terms."""
    return Objective(**OmegaConf.to_container(method.objective, resolve=True))
