"""specbench prompts: convert a source to train.jsonl, validation.jsonl and a report of what was dropped and why."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from specbench.cli.checks import check_before
from specbench.cli.config_groups import configs
from specbench.cli.following import command
from specbench.cli.identity import content
from specbench.cli.stages import Stage
from specbench.cli.tracked_stages import tracked_output
from specbench.data.prompts import preparation as prompts
from specbench.data.prompts.benchmarks import Benchmarks
from specbench.data.prompts.sources import Files
from specbench.progress import Progress
from specbench.runs.run_folder import folder_name

RESULTS = ("train.jsonl", "validation.jsonl", "report.json")


def run(cfg: DictConfig) -> None:
    """Write `root/prompts/NAME` as `cfg` describes it."""
    check_before("prompts", cfg)
    source = instantiate(cfg.data.source, _convert_="all")
    with stage_of(cfg) as stage:
        if stage.done:
            return
        name = f"prompts-{cfg.data.name}"
        with tracked_output("prompts", name, stage, cfg, {"split": cfg.seed}, data=cfg.data.name) as (run, _):
            evaluation = evaluation_texts(cfg.decontaminate, cfg.prompts)
            with Progress("prompts", None, "conversations") as bar:
                report = prompts.build(
                    source,
                    stage.work,
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
            run.finish(**found)
        stage.finish(found, next=command("answers", cfg, ("data",)))


def stage_of(cfg: DictConfig) -> Stage:
    """The stage of these prompts, not entered."""
    folder = Path(cfg.root) / "prompts" / folder_name(cfg.data.name, "a folder (data.name=)")
    source = instantiate(cfg.data.source, _convert_="all")
    inputs = {"data.source.paths": content(source.files())} if isinstance(source, Files) else {}
    instead = "another data.name="
    return Stage("prompts", folder, cfg, force=cfg.force, results=RESULTS, inputs=inputs, instead=instead)


def check(cfg: DictConfig) -> None:
    """ValueError for sources that do not exist and for invalid shares."""
    source = instantiate(cfg.data.source, _convert_="all")
    if isinstance(source, Files):
        source.files()
    prompts.require_shares(cfg.validation, cfg.near_duplicate)


def evaluation_texts(suites: object, folder: str | None = None) -> dict[str, list[str]]:
    """Every user turn of the named suites, by benchmark; from `folder` instead of the Hub if it is given."""
    names = OmegaConf.to_container(suites) if OmegaConf.is_config(suites) else suites
    texts: dict[str, list[str]] = {}
    for name in [names] if isinstance(names, str) else names or []:
        with nullcontext() if GlobalHydra.instance().is_initialized() else configs("configs"):
            composed = hydra.compose(overrides=[f"+suite={name}"])
        suite: Benchmarks = instantiate(composed.suite, _convert_="all", prompts=folder)
        texts |= suite.texts()
    return texts
