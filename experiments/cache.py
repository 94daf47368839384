"""specbench cache: from answers to a target cache; plan=true prints size, time and disk first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from specbench.cli.assembly import load_target
from specbench.cli.checks import check_before
from specbench.cli.following import command
from specbench.cli.launching import rank_and_world
from specbench.cli.stages import Stage, say
from specbench.cli.tracked_stages import tracked_output
from specbench.data.cache.cache_source import CacheSource
from specbench.data.cache.manifest import Manifest, require_same
from specbench.data.cache.storage import storage
from specbench.files.atomic import read_json
from specbench.progress import Progress, first_rank

RESULTS = ("manifest.json", "index.parquet", "tables.safetensors")


def run(cfg: DictConfig) -> Path | None:
    """Build the cache that `cfg` describes and return its folder (None after plan=true)."""
    check_before("cache", cfg)
    answers = Path(cfg.answers or Path(cfg.root) / "answers" / cfg.data.name / cfg.target.name)
    source = CacheSource.read(
        load_target(cfg.target, cfg.device),
        answers,
        storage(cfg.codec, cfg.last_codec, cfg.last_rows),
        cfg.max_length,
        cfg.thinking,
        name=f"{cfg.data.name}/answers.jsonl",
        left_out=lambda text: say(f"cache: {text}"),
        kept_states=cfg.get("kept_states", True),  # records of earlier versions lack it
    )
    place = Path(cfg.folder) if cfg.folder else None
    if cfg.plan:
        found = source.plan(place or Path(cfg.root) / "cache")
        say(found.text())
        found.require_room()
        return None
    place = place or Path(cfg.root) / "cache" / source.fingerprint
    rank, world = rank_and_world()
    built = read_json(place / "build.json", None)
    if built is not None and not cfg.force:
        there = "choose another folder=, or force=true to replace it once the new cache is complete"
        require_same(built["identity"], source.identity, place, there)
    # The folder's own identity file says what the cache holds; the stage only says whether it is complete.
    seen = {"cache": source.fingerprint}
    with Stage("cache", place, {}, force=cfg.force, results=RESULTS, inputs=seen, instead="another folder=") as stage:
        if stage.done and not (damaged := _damaged(place)):
            return place
        if stage.done:
            for shard in damaged:
                say(f"cache: {place / shard} is not as long as it was written, and is built again")
                (place / shard).unlink(missing_ok=True)
            stage.reopen()
        if stage.resumes and first_rank():  # whatever is missing of it: it is written last, from the shards
            (stage.work / "manifest.json").unlink(missing_ok=True)
        about = {"target": cfg.target.name, "data": cfg.data.name, "fingerprint": seen["cache"], "ranks": world}
        with (
            tracked_output("cache", f"cache-{seen['cache']}", stage, cfg, {}, **about) as (run, _),
            Progress("cache", sum(len(c.tokens) for c in source.conversations), "tokens") as bar,
        ):
            before = 0

            def progress(done: int, total: int) -> None:
                nonlocal before
                bar.advance(done - before)
                before = done

            sizes = {"shard_bytes": cfg.shard_bytes, "batch_tokens": cfg.batch_tokens}
            manifest = source.build(stage.work, rank, world, progress, **sizes)
            # Of several ranks the last one knows the whole; the W&B run is the first one's.
            run.finish(**({} if manifest is None else facts(manifest)), **source.counts)
        if manifest is None:
            say(f"cache: rank {rank} is done; the last rank writes the manifest")
            return place
        then = command("train", cfg, ("target", "data"), cache=str(place))
        stage.finish(facts(manifest) | source.counts, next=then, last_rank=True)
    return place


def check(cfg: DictConfig) -> None:
    """ValueError for unknown codecs and for sizes below 1."""
    storage(cfg.codec, cfg.last_codec, cfg.last_rows)
    for key in ("max_length", "shard_bytes", "batch_tokens"):
        if cfg[key] < 1:
            raise ValueError(f"{key}={cfg[key]}: give 1 or more")


def _damaged(folder: Path) -> list[str]:
    """Shards of a complete cache that are missing or have another size than in its manifest."""
    shards = Manifest.read(folder).shards
    return [s["name"] for s in shards if not _holds(folder / s["name"], s["bytes"])]


def _holds(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def facts(manifest: Manifest) -> dict[str, Any]:
    """The summary of a cache."""
    return {
        "fingerprint": manifest.fingerprint,
        "samples": manifest.samples,
        "tokens": manifest.tokens,
        "supervised_tokens": manifest.supervised,
        "bytes": sum(shard["bytes"] for shard in manifest.shards),
        "agreement": manifest.agreement,
    }
