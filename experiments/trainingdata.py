"""Where training data comes from: a target cache that fits the run, or the target itself; and the probe's prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.cache import encoded
from specbench.data import prompts
from specbench.data.chat import prompt_ids
from specbench.data.datamodule import TargetCache
from specbench.data.manifest import Manifest
from specbench.data.online import OnlineTarget
from specbench.data.remote import is_remote
from specbench.data.stepdata import StepData
from specbench.data.storage import storage
from specbench.targets import Target


def open_data(cfg: DictConfig, target: Target | None) -> StepData:
    """The data module of a training run, with its `lineage` (fingerprint, folder, bytes) attached."""
    order = OmegaConf.to_container(cfg.trainer.data, resolve=True) | {
        "seed": cfg.seed.data,
        "limit_samples": cfg.limit_samples,
    }
    if cfg.online:
        source = Path(cfg.root) / "answers" / cfg.data.name / cfg.target.name
        conversations, _ = encoded(source, target.tokenizer, cfg.target.max_length, cfg.target.thinking)
        data = OnlineTarget(target, conversations, dtype=cfg.cache_dtype, **order)
        data.lineage = {"fingerprint": "online", "folder": str(source), "bytes": 0}
        return data
    folder = cfg.cache or find_cache(Path(cfg.root), cfg.target, cfg.data.name, cfg.cache_codec)
    mirror = str(Path(cfg.root) / "mirror") if is_remote(folder) else None
    reads_taps = cfg.method.name != "mtp"
    data = TargetCache(
        folder,
        taps=list(cfg.target.target_layer_ids) if reads_taps else None,
        needs_all_last=not reads_taps,
        expect={"target": cfg.target.name},
        dtype=cfg.cache_dtype,
        on_damage=cfg.on_damage,
        local_folder=mirror,
        **order,
    )
    manifest = data.manifest
    size = sum(shard["bytes"] for shard in manifest.shards)
    data.lineage = {"fingerprint": manifest.fingerprint, "folder": str(folder), "bytes": size}
    return data


def find_cache(root: Path, target: DictConfig, data: str, codec: str | None = None) -> Path:
    """The one complete cache below root/cache that was built from this target and these answers.

    `codec` is what it must be stored in; None takes any, and bf16 where several fit.

    Errors: ValueError naming what to run when there is none, and the candidates when there are several.
    """
    fitting, others = {}, []
    for path in sorted((root / "cache").glob("*/manifest.json")):
        identity = Manifest.read(path.parent).identity
        wanted = set(target.target_layer_ids or []) <= set(identity["taps"])
        stored = codec is None or storage(codec).facts() == identity["codec"]
        if identity["target"] == target.name and f"{data}/answers.jsonl" in identity["sources"] and wanted and stored:
            fitting[path.parent] = identity["codec"]
        else:
            built = f"target {identity['target']}, taps {identity['taps']}, {identity['codec']['taps']}"
            others.append(f"{path.parent.name} ({built})")
    if not fitting:
        there = f"; there are {', '.join(others)}" if others else ""
        raise ValueError(
            f"no cache below {root / 'cache'} fits target={target.name} data={data} with taps "
            f"{list(target.target_layer_ids or [])} in {codec or 'any codec'}{there}: run `specbench cache "
            f"target={target.name} data={data}{f' codec={codec}' if codec else ''}`"
        )
    plain = [path for path, stored in fitting.items() if stored == storage("bf16").facts()]
    chosen = plain if len(fitting) > 1 and len(plain) == 1 else list(fitting)
    if len(chosen) > 1:
        raise ValueError(
            f"{len(chosen)} caches fit target={target.name} data={data}; choose one with cache=FOLDER: "
            + ", ".join(map(str, chosen))
        )
    return chosen[0]


def probe_prompts(cfg: DictConfig, target: Target) -> list[list[int]]:
    """The first held-out prompts of the training data, as token ids; benchmarks are never used to choose."""
    folder = Path(cfg.root) / "prompts" / cfg.data.name
    count, found = cfg.trainer.probe.prompts, []
    for row in prompts.read(folder, "validation", count):
        first = next(i for i, m in enumerate(row["messages"]) if m["role"] == "user")
        found.append(prompt_ids(target.tokenizer, row["messages"][: first + 1], cfg.target.thinking))
    if len(found) < count:
        raise ValueError(f"the probe wants {count} validation prompts and {folder} holds {len(found)}: lower it")
    return found


def sizes(data: StepData) -> dict[str, Any]:
    """Conversations and supervised tokens of an epoch."""
    return {"conversations": len(data.rows[0]), "supervised_tokens": data.supervised_tokens}
