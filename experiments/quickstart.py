"""specbench quickstart: the whole flow on the embedded target, stage by stage, through the same code as any target."""

from __future__ import annotations

import importlib
import shutil
import time
from pathlib import Path

from omegaconf import DictConfig

from specbench.cli.assembly import composed
from specbench.cli.settings import check_settings
from specbench.cli.stages import report, say
from specbench.cli.verbs import VERBS

SHOWN = ("conditional_acceptance_t0.png", "survival_t0.png")


def run(cfg: DictConfig) -> Path:
    """Run every stage that is not finished yet; returns the folder of the comparison."""
    began = time.monotonic()
    root = [f"root={cfg.root}", f"force={str(cfg.force).lower()}"]
    target = ["target=embedded"]
    if cfg.target.remake:
        stage("target", [*root, f"training.seconds={cfg.target.seconds}", "trainer.max_steps=100000"])
        target.append(f"target.id={cfg.root}/runs/target/embedded")
    counts = f"data.source.counts={{train: {cfg.prompts}, validation: {cfg.held_out}}}"
    stage("prompts", [*root, counts])
    # Sixty-four requests at once are work enough for every core; the stages after this one are not.
    answers = [f"max_new_tokens={cfg.max_new_tokens}", "batch_size=64", "target.threads=null"]
    stage("answers", [*root, *target, *answers])
    folder = stage("cache", [*root, *target, f"codec={cfg.codec}"])
    tracking = [f"tracking.{key}={cfg.tracking[key] or 'null'}" for key in ("mode", "project", "entity")]
    tracking.append(f"tracking.group={cfg.tracking.group or 'quickstart'}")
    runs = []
    for method in cfg.methods:
        trained = stage(
            "train",
            [
                *(*root, *target, *tracking),
                f"method={method}",
                f"name={method}-s{cfg.seed}",
                f"cache={folder}",
                f"seed.init={cfg.seed}",
                f"trainer.max_steps={cfg.steps}",
                "evaluate=false",
            ],
        )
        for temperature in cfg.temperatures:
            runs.append(
                stage(
                    "evaluate",
                    [
                        *(*root, *target, *tracking),
                        f"draft={trained}",
                        f"name={method}-s{cfg.seed}-t{temperature:g}",
                        f"temperature={temperature}",
                        f"max_new_tokens={cfg.max_new_tokens}",
                        f"suite.limit={cfg.benchmark_prompts}",
                    ],
                )
            )
        if cfg.clock.prompts:
            runs.append(
                stage(
                    "speed",
                    [
                        *(*root, *target),
                        f"draft={trained}",
                        f"name={method}-s{cfg.seed}",
                        f"clock_prompts={cfg.clock.prompts}",
                        f"clock_repeats={cfg.clock.repeats}",
                        f"max_new_tokens={cfg.clock.max_new_tokens}",
                        "batch_sizes=[1]",
                        "lengths=[]",
                        "step_tokens=16",
                        "repeats=60",
                        "check=[]",
                    ],
                )
            )
    listed = ",".join(map(str, runs))
    stage("compare", [f"root={cfg.root}", "name=quickstart", f"runs=[{listed}]"])
    output = Path(cfg.root) / "compare" / "quickstart"
    report("quickstart", output, time.monotonic() - began, {"report": output / "report.html"})
    say(f"figures: {output / 'figures'}")
    if cfg.docs:
        publish(output, Path(cfg.docs))
    return output


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
