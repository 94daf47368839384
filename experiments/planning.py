"""specbench train plan=true: parameters, memory and the largest micro-batch, without weights or data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from specbench.cli.assembly import build_draft
from specbench.cli.environment import free_memory
from specbench.cli.launching import shards_of
from specbench.cli.stages import say
from specbench.drafts.draft import Draft
from specbench.models.backbone import backbone_of, chosen
from specbench.models.embedding_head import Tables
from specbench.models.target import raw_config
from specbench.models.target_files import location
from specbench.training.memory_estimate import GIB, Footprint, footprint


def print_plan(cfg: DictConfig) -> Footprint:
    """Build the draft on the meta device and print what training it takes."""
    config = shapes(cfg.target)
    draft = _shape_of(cfg, config)
    memory = None if cfg.memory is None else float(cfg.memory)
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    lightning = cfg.trainer.lightning
    found = footprint(draft, cfg.target.max_length, lightning.precision, memory, shards_of(lightning))
    say(found.text())
    say(f"backbone          {chosen(config, cfg.method.backbone).reason}")
    return found


def require_memory(cfg: DictConfig, config: Mapping[str, Any], longest: int) -> None:
    """Raise ValueError where a micro-batch of the longest conversations (`longest` tokens) would take more than twice
    the memory that is free here: what then follows is the system's kill, without a word."""
    draft = _shape_of(cfg, config)
    lightning, conversations = cfg.trainer.lightning, cfg.trainer.data.samples_per_micro
    found = footprint(draft, longest, lightning.precision, None, shards_of(lightning))
    needed = (found.fixed + conversations * found.per_sample) / GIB
    there = (torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else free_memory()) / GIB
    if needed > 2 * there:
        raise ValueError(
            f"method.draft.block_size={draft.block_size}, anchors={draft.anchors_per_sample} and layers="
            f"{len(draft.layers)} with trainer.data.samples_per_micro={conversations}: about {needed:.0f} GiB for "
            f"conversations of {longest} tokens, and {there:.0f} GiB are free; lower one of them"
        )


def _shape_of(cfg: DictConfig, config: Mapping[str, Any]) -> Draft:
    """The draft without memory for its weights."""
    facts = backbone_of(config, cfg.method.backbone, cfg.method.window)
    with torch.device("meta"):
        empty = torch.empty(facts.vocab_size, facts.hidden_size)
        return build_draft(cfg.method, cfg.target, config, Tables(empty, empty, facts.embedding_scale, facts.soft_cap))


def shapes(target: DictConfig) -> dict[str, Any]:
    """A target's sizes as its raw configuration has them: from the option itself, else from its config.json."""
    for key in ("config", "shapes"):
        if target.get(key) is not None:
            return OmegaConf.to_container(target[key], resolve=True)
    return raw_config(location(target.id), target.revision)
