"""specbench prompts: a source becomes train.jsonl, validation.jsonl and a report of what was dropped and why."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from specbench.cli.config_groups import configs
from specbench.cli.following import command
from specbench.cli.progress import Progress
from specbench.cli.recording import recorded
from specbench.cli.stages import Stage
from specbench.data.prompts import preparation as prompts
from specbench.data.prompts.benchmarks import Benchmarks
from specbench.data.prompts.sources import Files


def run(cfg: DictConfig) -> None:
    """Write `root/prompts/NAME` as `cfg` describes it."""
    folder = Path(cfg.root) / "prompts" / cfg.data.name
    source = instantiate(cfg.data.source, _convert_="all")
    files = {path: [path.stat().st_size, path.stat().st_mtime_ns] for path in _files(source)}
    with Stage("prompts", folder, recorded(cfg) | {"files": files}, force=cfg.force) as stage:
        if stage.done:
            return
        evaluation = evaluation_texts(cfg.decontaminate, cfg.prompts)
        with Progress("prompts", None, "conversations") as bar:
            report = prompts.build(
                source,
                folder,
                evaluation,
                validation=cfg.validation,
                near_duplicate=cfg.near_duplicate,
                ngram=cfg.ngram,
                seed=cfg.seed,
                progress=lambda read: bar.advance(),
            )
        counted = ("read", "contaminated", "equal_questions", "near_duplicates")
        unfit = sum(report["unfit"].values())
        found = {k: report[k] for k in counted} | {"unfit": unfit} | report["kept"]
        stage.finish(found, next=command("answers", cfg, ("data",)))


def evaluation_texts(suites: object, folder: str | None = None) -> dict[str, list[str]]:
    """Every user turn of the named suites, by benchmark; from `folder` instead of the hub where it is given."""
    names = OmegaConf.to_container(suites) if OmegaConf.is_config(suites) else suites
    texts: dict[str, list[str]] = {}
    for name in [names] if isinstance(names, str) else names or []:
        with nullcontext() if GlobalHydra.instance().is_initialized() else configs("configs"):
            composed = hydra.compose(overrides=[f"+suite={name}"])
        suite: Benchmarks = instantiate(composed.suite, _convert_="all", prompts=folder)
        texts |= suite.texts()
    return texts


def _files(source: object) -> list[Path]:
    return source.files() if isinstance(source, Files) else []
