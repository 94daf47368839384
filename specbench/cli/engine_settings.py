"""`export_for=vllm` or `sglang`: the settings of a method that an engine needs, set before a training, not after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from specbench.checkpoints.obstacles import obstacle, servable
from specbench.cli.assembly import draft_without_weights, target_config
from specbench.drafts.draft import Draft
from specbench.models.backbone import chosen


def fitted(cfg: DictConfig) -> tuple[DictConfig, list[str]]:
    """The configuration with the settings that the engine `cfg.export_for` needs, and what was changed, as
    KEY=VALUE. Errors: ValueError for a draft that the engine cannot decode with any settings."""
    engine = cfg.get("export_for")
    if engine is None:
        return cfg, []
    cfg = cfg.copy()
    config, changed = target_config(cfg.target), []
    for key, value in _needs(engine, cfg.method, config).items():
        if OmegaConf.select(cfg.method, key) != value:
            with open_dict(cfg):
                OmegaConf.update(cfg.method, key, value)
            changed.append(f"method.{key}={_said(value)}")
    draft = draft_without_weights(cfg.method, cfg.target, config)
    reason = obstacle(draft, engine, layers_of_target(config))
    if reason is not None:
        raise ValueError(f"export_for={engine} with method={cfg.method.name} and target={cfg.target.name}: {reason}")
    return cfg, changed


def said_servable(draft: Draft, config: Mapping[str, Any]) -> str:
    """The line that says which engines will decode with a draft of a target with this configuration."""
    return servable(draft, layers_of_target(config))


def layers_of_target(config: Mapping[str, Any]) -> int | None:
    """Number of layers in a target's raw configuration."""
    return (config.get("text_config") or config).get("num_hidden_layers")


def _needs(engine: str, method: DictConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings below `method` that the engine needs, for the published architecture of the method's class."""
    needs: dict[str, Any]
    kind = vars(get_class(method.draft._target_)).get("published_format")
    family = chosen(config, method.backbone).family
    if kind == "eagle3":
        one = {"draft.layers": 1, "window": None}
        if engine == "sglang":
            return one | {"backbone": "llama"}
        return one if family in ("llama", "qwen3") else one | {"backbone": "qwen3"}
    if kind == "eagle1":
        whole = {"vocabulary": None, "draft.train_tables": False, "window": None}
        return whole | {"backbone": "llama", "draft.fc_bias": engine == "sglang"}
    if kind == "p_eagle":
        needs = {"draft.fc_norm": False, "window": None}
        return needs if family in ("llama", "qwen3") else needs | {"backbone": "qwen3"}
    if kind == "medusa":
        needs = {"draft.train_tables": False}
        return needs if method.vocabulary is None else needs | {"draft.own_heads": False}
    if kind not in ("dflash", "dspark"):
        return {}
    needs = {"draft.causal_block": False, "window": None}
    if family != "qwen3":  # engines have block drafts with norms of queries and keys alone
        needs["backbone"] = "qwen3"
    if kind == "dflash":
        needs["draft.sample_from_anchor"] = False
    elif engine == "vllm":
        needs["draft.markov_head"] = "vanilla"
    if engine == "sglang":
        needs |= {"vocabulary": None, "draft.train_tables": False}
    return needs


def _said(value: Any) -> str:
    return "null" if value is None else str(value).lower()
