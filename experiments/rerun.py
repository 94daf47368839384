"""specbench rerun: repeat a run from its record, and compare the numbers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from omegaconf import DictConfig, OmegaConf

import configs
from specbench.cli.checks import check_before
from specbench.cli.stages import say
from specbench.cli.verbs import VERBS
from specbench.data.cache.remote_shards import is_command
from specbench.files.atomic import changes, read_json, write_json
from specbench.files.redaction import WITHHELD, redacted
from specbench.runs.provenance import differences, provenance
from specbench.runs.run_folder import read_settings, read_summary
from specbench.runs.run_schema import FINISHED, KINDS

# Measured times always differ.
SET_BY_VERBS = ("threads", "deterministic")
TIMED = ("seconds", "per_second", "speedup", "latency", "throughput", "overhead")


def run(cfg: DictConfig) -> Path:
    """Run the verb of the record with the record's configuration; returns the new run folder, rerun.json inside.

    Every run verb names its folder by the settings `root` and `name`, which are all that is changed.
    """
    check_before("rerun", cfg)
    old = Path(cfg.run)
    summary = read_summary(old)
    then = read_json(old / "provenance.json", {})
    # The path is set here; everything else comes from the record.
    config = {key: value for key, value in read_settings(old).items() if key not in ("root", "name", "force")}
    allowed = [str(name) for name in cfg.classes or ()]
    config = with_moved_classes(config)
    require_data(config, old / "config.yaml", allowed)
    if summary.get("kind") not in KINDS:
        raise ValueError(f"{old / 'summary.json'}: kind is {summary.get('kind')!r}, not one of {', '.join(KINDS)}")
    if summary["status"] != FINISHED:
        say(f"{old} is {summary['status']}: there may be no numbers to compare with")
    now, _ = provenance(sys.argv, then.get("seeds", {}), then.get("cache"))
    # What a verb sets itself (the threads of its target) is compared once it has: here it would seem to differ.
    told = differences(_before(then), _before(now)) + cache_differences(then.get("cache"))
    for line in told:
        say(f"differs from then: {line}")

    config["root"] = str(cfg.root or old.parents[2])
    config["name"] = cfg.name or f"{old.name}-rerun"
    config["force"] = bool(cfg.force)
    new = Path(config["root"]) / "runs" / summary["kind"] / config["name"]
    if "folder" in config:  # of a target, which may lie anywhere
        config["folder"] = str(new)
    if new.resolve() == old.resolve():
        raise ValueError(f"the rerun would overwrite {old}: give it another name=... or root=...")
    importlib.import_module(VERBS[summary["kind"]].module).run(OmegaConf.create(config))

    made = read_json(new / "provenance.json", {})
    differing = differences(then, made) + cache_differences(then.get("cache"))
    differing += changes(summary.get("lineage", {}), read_summary(new).get("lineage", {}), "lineage")
    for line in differing:
        if line not in told:
            say(f"differs from then: {line}")
    unequal, compared = compare(old, new, with_times=cfg.seconds)
    report = {"of": str(old), "differences": differing, "compared": compared, "unequal": unequal}
    write_json(new / "rerun.json", redacted(report))
    verdict = "all equal" if not unequal else f"{len(unequal)} differ"
    print(f"rerun: {compared} numbers compared, {verdict}; {new / 'rerun.json'}")
    for line in unequal[:20]:
        say(f"not the same number: {line}")
    if cfg.strict and (differing or unequal):
        raise ValueError(
            f"{new} is not a repetition of {old}: {len(differing)} facts and {len(unequal)} numbers differ"
        )
    return new


def _before(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance facts that do not change during a run."""
    own = {key: value for key, value in (facts.get("hardware") or {}).items() if key not in SET_BY_VERBS}
    return {**facts, "hardware": own}


@cache
def classes() -> set[str]:
    """Every class that the project's own configurations name, read from their files."""
    files = [file for folder in configs.__path__ for file in Path(folder).rglob("*.yaml")]
    return {name for file in files for name in _named(yaml.safe_load(file.read_text(encoding="utf-8"))).values()}


def with_moved_classes(tree: Any) -> Any:
    """A record's configuration with the classes of this package under their names of today."""
    if isinstance(tree, Mapping):
        return {k: _moved(str(v)) if k == "_target_" else with_moved_classes(v) for k, v in tree.items()}
    return [with_moved_classes(item) for item in tree] if isinstance(tree, list) else tree


def _moved(name: str) -> str:
    """The class of the project's configurations with the same class name as `name`, in its present module."""

    def called(full: str) -> str:  # DSpark, or CostProfile.load
        return ".".join(part for part in full.split(".") if part[:1].isupper() or part == "load")

    there = sorted(full for full in classes() if full.startswith("specbench.") and called(full) == called(name))
    return there[0] if name.startswith("specbench.") and name not in classes() and len(there) == 1 else name


def require_data(config: Mapping[str, Any], file: Path, allowed: Sequence[str]) -> None:
    """Refuse a record that asks for more than the classes of the project's own configurations and those `allowed`.

    A record may be anybody's: a class that it names would be built with arguments that it names, a reference would be
    resolved with the environment of this machine, a command would be run on it, and a key that was withheld from it
    cannot be used again.
    """
    known = classes() | set(allowed)
    for where, name in _named(config).items():
        if name not in known:
            raise ValueError(
                f"{file}: {where} is {name!r}, a class that no configuration of specbench names; if it is one of "
                "your own, allow it on the command line: classes=[PACKAGE.MODULE.CLASS]"
            )
    others = [str(name) for _, name in _children(config.get("methods")) if name not in known]
    if others:
        raise ValueError(f"{file} asks for methods={others}: allow them on the command line, classes=[...]")
    for where, text in _texts(config):
        if "${" in text or WITHHELD in text:
            raise ValueError(
                f"{file}: {where} is {text!r}, and neither references nor keys are in a record: run the command of "
                f"{file.with_name('provenance.json')} again instead"
            )
        if is_command(text):
            raise ValueError(
                f"{file}: {where} is the command {text!r}, and commands of a record are not run: give it yourself, to "
                f"the command of {file.with_name('provenance.json')}"
            )


def _named(tree: Any, where: str = "") -> dict[str, str]:
    """Dotted key -> class, of every `_target_` in a configuration."""
    found = {}
    for key, value in _children(tree):
        path = f"{where}.{key}" if where else str(key)
        found |= {path: str(value)} if key == "_target_" else _named(value, path)
    return found


def _texts(tree: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a configuration, keys included, with its dotted key."""
    for key, value in _children(tree):
        path = f"{where}.{key}" if where else str(key)
        yield path, str(key)
        if isinstance(value, str):
            yield path, value
        yield from _texts(value, path)


def _children(tree: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        return tree.items()
    return enumerate(tree) if isinstance(tree, list) else ()


def cache_differences(cache: Mapping[str, Any] | None) -> list[str]:
    """Whether the cache that the run read is still there with the same fingerprint."""
    if not cache or not cache.get("folder"):
        return []
    manifest = read_json(Path(cache["folder"]) / "manifest.json", None)
    found = None if manifest is None else manifest.get("fingerprint")
    return [] if found == cache["fingerprint"] else [f"cache {cache['folder']}: {cache['fingerprint']} -> {found}"]


def compare(old: Path, new: Path, with_times: bool = False) -> tuple[list[str], int]:
    """The numbers of two runs that are not exactly equal (`metrics.x: 1 -> 2`), and how many were compared.

    Headline metrics of summary.json, then every column of records.parquet row by row, `run` aside.
    """
    before, after = read_summary(old).get("metrics", {}), read_summary(new).get("metrics", {})
    if not with_times:
        before, after = _untimed(before), _untimed(after)
    unequal = changes(before, after, "metrics")
    compared = _count(before)
    records = [folder / "records.parquet" for folder in (old, new)]
    if records[0].exists():
        tables = [pq.read_table(file).to_pylist() if file.exists() else [] for file in records]
        if len(tables[0]) != len(tables[1]):
            unequal.append(f"records: {len(tables[0])} -> {len(tables[1])} rows")
        for first, second in zip(*tables, strict=False):
            kept = [key for key in first if key != "run" and (with_times or not _timed(key))]
            where = f"records[{first['prompt_id']}, {first['turn']}]"
            unequal += changes({key: first[key] for key in kept}, {key: second.get(key) for key in kept}, where)
            compared += len(kept)
    return unequal, compared


def _timed(key: str) -> bool:
    return any(word in key for word in TIMED)


def _untimed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` without measured times and speeds."""
    kept = {key: value for key, value in tree.items() if not _timed(key)}
    return {key: _untimed(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _count(tree: Any) -> int:
    return sum(map(_count, tree.values())) if isinstance(tree, Mapping) else 1
