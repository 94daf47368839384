"""Where training data comes from: a target cache that fits the run, or the target itself; and the probe's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.utils import get_class
from jaxtyping import Int
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from experiments.cache import encoded
from specbench.cli.stages import say
from specbench.data.answers.chat import prompt_ids
from specbench.data.cache.manifest import DamagedManifest, Manifest
from specbench.data.cache.remote_shards import is_remote
from specbench.data.cache.storage import storage
from specbench.data.loading.online import OnlineTarget
from specbench.data.loading.step_data import StepData
from specbench.data.loading.target_cache import TargetCache
from specbench.data.prompts import preparation as prompts
from specbench.models.target import Target


def open_data(cfg: DictConfig, target: Target | None) -> StepData:
    """The data module of a training run, with its `lineage` (fingerprint, folder, bytes) attached."""
    order = OmegaConf.to_container(cfg.trainer.data, resolve=True) | {
        "seed": cfg.seed.data,
        "limit_samples": cfg.limit_samples,
    }
    if cfg.online:
        source = answers_of(cfg)
        conversations, _ = encoded(
            source, target.tokenizer, cfg.target.max_length, cfg.target.thinking, len(target.tables.embedding)
        )
        data = OnlineTarget(target, conversations, dtype=cfg.cache_dtype, **order)
        data.lineage = {"fingerprint": "online", "folder": str(source), "bytes": 0}
        return data
    folder = cfg.cache or find_cache(Path(cfg.root), cfg.target, cfg.data.name, cfg.cache_codec)
    mirror = str(Path(cfg.root) / "mirror") if is_remote(folder) else None
    method = get_class(cfg.method.draft._target_)
    data = TargetCache(
        folder,
        taps=list(cfg.target.target_layer_ids) if method.reads_taps else [],
        needs_all_last=method.reads_last,
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


def answers_of(cfg: DictConfig) -> Path:
    """The folder of the answers that a run learns from."""
    return Path(cfg.root) / "answers" / cfg.data.name / cfg.target.name


def find_cache(root: Path, target: DictConfig, data: str, codec: str | None = None) -> Path:
    """The one complete cache below root/cache that was built from this target and these answers.

    `codec` is what it must be stored in; None takes any, and bf16 where several fit.

    Errors: ValueError naming what to run when there is none, and the candidates when there are several.
    """
    fitting, others = {}, []
    for path in sorted((root / "cache").glob("[!.]*/manifest.json")):
        try:
            identity = Manifest.read(path.parent).identity
        except DamagedManifest as error:
            say(f"train: passed over a cache: {error}")
            continue
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
        raise ValueError(
            f"trainer.probe.prompts={count} and {folder} holds {len(found)} validation prompts: lower it, or hold out "
            "more in `specbench prompts`"
        )
    return found


def frequent_tokens(cfg: DictConfig, data: StepData, always: Sequence[int]) -> Int[Tensor, " W"] | None:
    """Ids of the `method.vocabulary` most frequent supervised tokens of the training data, ascending.

    `always` (stop tokens) belong to it whatever their count. None when the draft keeps the whole vocabulary.
    """
    size, whole = cfg.method.vocabulary, len(data.tables.embedding)
    if size is None:
        return None
    if not len(always) < size <= whole:
        raise ValueError(f"method.vocabulary={size}: choose more than {len(always)} and at most {whole} tokens")
    counts = torch.zeros(whole, dtype=torch.long)
    rows = data.rows[0]
    source = data if isinstance(data, OnlineTarget) else TargetCache(data.folder, taps=[])
    for start in range(0, len(rows), 64):
        for sample in source.samples(rows[start : start + 64]):
            counts += torch.bincount(sample.tokens[sample.loss_mask].long(), minlength=whole)
    total = int(counts.sum())
    counts[list(always)] = total + 1
    ids = counts.argsort(descending=True, stable=True)[:size].sort().values
    counts[list(always)] = 0
    covered = int(counts[ids].sum()) / total
    say(f"train: the draft's vocabulary of {size} tokens covers {covered:.2%} of the supervised text")
    return ids
