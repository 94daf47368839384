"""specbench quickstart: all stages on the deep embedded target, with the same code as for any target."""

from __future__ import annotations

import importlib
import shlex
import shutil
import time
from pathlib import Path

from omegaconf import DictConfig

from specbench.cli.assembly import composed
from specbench.cli.checks import ahead, check_before
from specbench.cli.config_groups import search_path
from specbench.cli.settings import check_settings
from specbench.cli.stages import say
from specbench.cli.summary import report, within
from specbench.cli.verbs import VERBS
from specbench.data.prompts.embedded_corpus import DOMAINS
from specbench.drafts.installed import installed

TARGET = "embedded_deep"
SHOWN = ("conditional_acceptance_t0.png", "survival_t0.png")


def run(cfg: DictConfig) -> Path:
    """Run every stage that is not finished yet; returns the folder of the comparison."""
    began = time.monotonic()
    check_before("quickstart", cfg)
    folder: Path | None = None
    made = []
    with within():
        for verb, overrides in before_training(cfg):
            folder = stage(verb, overrides)
        for verb, overrides in drafts(cfg, folder):
            path = stage(verb, overrides)
            if verb != "train":
                made.append(path)
        listed = ",".join(map(str, made))
        stage("compare", [f"root={cfg.root}", "name=quickstart", f"runs=[{listed}]"])
    output = Path(cfg.root) / "compare" / "quickstart"
    facts = {"drafts": ", ".join(cfg.methods), "page": str(output / "report.html"), "figures": str(output / "figures")}
    then = shlex.join(["specbench", "status", f"root={cfg.root}"])
    report("quickstart", output, time.monotonic() - began, facts, next=then)
    if cfg.docs:
        publish(output, Path(cfg.docs))
    return output


def check(cfg: DictConfig) -> None:
    """Check every stage before the first one starts."""
    check_settings("quickstart", cfg)
    for verb, overrides in [*before_training(cfg), *drafts(cfg, None)]:
        stage_cfg = composed(VERBS[verb].config, overrides)
        ahead(verb, stage_cfg)
        if verb == "train" and len(DOMAINS) * cfg.held_out < stage_cfg.trainer.probe.prompts:
            raise ValueError(
                f"held_out={cfg.held_out} holds out {len(DOMAINS) * cfg.held_out} prompts and the decoding probe of a "
                f"training uses {stage_cfg.trainer.probe.prompts}: raise held_out"
            )


def before_training(cfg: DictConfig) -> list[tuple[str, list[str]]]:
    """The stages up to the cache, in order, with the overrides of each."""
    target, counts = target_of(cfg), f"data.source.counts={{train: {cfg.prompts}, validation: {cfg.held_out}}}"
    # Sixty-four requests at once can use every core; the later stages cannot.
    answers = [f"max_new_tokens={cfg.max_new_tokens}", "batch_size=64", "target.threads=null"]
    stages = [
        ("prompts", [*everywhere(cfg), counts]),
        ("answers", [*everywhere(cfg), *target, *answers]),
        ("cache", [*everywhere(cfg), *target, f"codec={cfg.codec}"]),
    ]
    if cfg.target.remake:
        grown = [f"name={TARGET}", "start=package:data/embedded", "model.num_hidden_layers=24"]
        budget = [f"training.seconds={cfg.target.seconds}", "trainer.max_steps=100000"]
        stages.insert(0, ("target", [*everywhere(cfg), *grown, *budget]))
    return stages


def drafts(cfg: DictConfig, cache: Path | None) -> list[tuple[str, list[str]]]:
    """The training, the evaluations and the timing of every method, in order, from the finished `cache`."""
    common = [*everywhere(cfg), *target_of(cfg)]
    stages = []
    for method in cfg.methods:
        name = f"{method}-s{cfg.seed}"
        draft = f"draft={Path(cfg.root) / 'runs' / 'train' / name}"
        own = own_class(method)
        training = [f"method={method}", f"name={name}", f"seed.init={cfg.seed}", f"trainer.max_steps={cfg.steps}"]
        training += [
            f"method.draft.block_size={cfg.slots}",
            "evaluate=false",
            *([] if cache is None else [f"cache={cache}"]),
        ]
        stages.append(("train", [*common, *training]))
        for temperature in cfg.temperatures:
            decoding = [draft, *own, f"name={name}-t{temperature:g}", f"temperature={temperature}"]
            decoding += [f"max_new_tokens={cfg.max_new_tokens}", f"suite.limit={cfg.benchmark_prompts}"]
            stages.append(("evaluate", [*common, *decoding]))
        if cfg.clock.prompts:
            timing = [
                draft,
                *own,
                f"name={name}",
                f"clock_prompts={cfg.clock.prompts}",
                f"clock_repeats={cfg.clock.repeats}",
            ]
            timing += [f"max_new_tokens={cfg.clock.max_new_tokens}", "batch_sizes=[1]", "lengths=[]", "step_tokens=16"]
            stages.append(("speed", [*common, *timing, "repeats=60", "check=[]"]))
    return stages


def own_class(method: str) -> list[str]:
    """What allows a draft folder to ask for a method of the user's own; nothing for the methods of this package."""
    if not search_path():
        return []
    kind = composed("train", [f"method={method}"]).method.draft._target_
    return [] if kind in installed() else [f"methods=[{kind}]"]


def everywhere(cfg: DictConfig) -> list[str]:
    """Where every stage writes, whether it redoes what is finished, and how it is mirrored to W&B."""
    tracking = [f"tracking.{key}={cfg.tracking[key] or 'null'}" for key in ("mode", "project", "entity")]
    tracking.append(f"tracking.group={cfg.tracking.group or 'quickstart'}")
    return [f"root={cfg.root}", f"force={str(cfg.force).lower()}", *tracking]


def target_of(cfg: DictConfig) -> list[str]:
    """The deep embedded target, or the one that was made here."""
    made = [f"target.id={cfg.root}/runs/target/{TARGET}"] if cfg.target.remake else []
    return [f"target={TARGET}", *made]


def publish(output: Path, folder: Path) -> None:
    """Copy the table and the two figures that documentation shows; README.md holds the table itself."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (output / "accepted_length.md", *(output / "figures" / name for name in SHOWN)):
        shutil.copyfile(file, folder / file.name)
    say(f"table and figures copied to {folder}")


def stage(verb: str, overrides: list[str]) -> Path | None:
    """Compose and run one stage."""
    known = VERBS[verb]
    cfg = composed(known.config, overrides)
    check_settings(verb, cfg)
    return importlib.import_module(known.module).run(cfg)
