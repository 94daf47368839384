"""specbench train plan=true: parameters, memory and the largest micro-batch, without weights or data."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from specbench.cli.assembly import build_draft, location
from specbench.cli.launching import shards_of
from specbench.cli.stages import say
from specbench.models.backbone import backbone_of
from specbench.models.embedding_head import Tables
from specbench.models.target import raw_config
from specbench.training.memory_estimate import Footprint, footprint


def print_plan(cfg: DictConfig) -> Footprint:
    """Build the draft on the meta device and print what training it takes."""
    config = shapes(cfg.target)
    facts = backbone_of(config, cfg.method.backbone, cfg.method.window)
    with torch.device("meta"):
        empty = torch.empty(facts.vocab_size, facts.hidden_size)
        draft = build_draft(cfg.method, cfg.target, config, Tables(empty, empty, facts.embedding_scale, facts.soft_cap))
    memory = None if cfg.memory is None else float(cfg.memory)
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    lightning = cfg.trainer.lightning
    found = footprint(draft, cfg.target.max_length, lightning.precision, memory, shards_of(lightning))
    say(found.text())
    return found


def shapes(target: DictConfig) -> dict[str, Any]:
    """A target's sizes as its raw configuration has them: from the option itself, else from its config.json."""
    for key in ("config", "shapes"):
        if target.get(key) is not None:
            return OmegaConf.to_container(target[key], resolve=True)
    return raw_config(location(target.id), target.revision)
