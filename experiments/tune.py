"""specbench tune: choose the learning rate of a method by decoding held-out prompts, with successive halving."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments import train
from specbench.cli import summary
from specbench.cli.checks import check_before
from specbench.cli.following import command
from specbench.cli.recording import recorded
from specbench.cli.stages import Stage, say
from specbench.cli.tracked_stages import tracked_output
from specbench.files.atomic import read_json, write_json
from specbench.runs.run_folder import folder_name, read_summary
from specbench.training.successive_halving import grid, search

RESULTS = ("trials.json",)
# Settings of this verb beside those of `train`.
OWN = ("trials", "span")


def run(cfg: DictConfig) -> float:
    """Write root/tune/NAME/trials.json and print the best rate; returns it."""
    check_before("tune", cfg)
    center = cfg.trainer.recipe.lr
    rates, steps = grid(center, cfg.span, cfg.trials), cfg.trainer.max_steps
    folder = Path(cfg.root) / "tune" / folder_name(cfg.name or train.run_name(cfg), "a folder")
    with Stage("tune", folder, recorded(cfg), force=cfg.force, results=RESULTS) as stage:
        if not stage.done:
            # Every training is a run of its own on W&B, and only one can be open.
            with summary.within():
                best, trials = search(rates, steps, lambda lr, length: _trained(cfg, lr, length))
            rows = [asdict(trial) for trial in trials]
            facts = {"lr": best, "trainings": len(trials), "at_the_edge": best in (rates[0], rates[-1])}
            with tracked_output("tune", f"tune-{folder.name}", stage, cfg, dict(cfg.seed)) as (run, wandb):
                write_json(stage.work / "trials.json", {**facts, "trials": rows})
                wandb.rows("trials", rows)
                run.finish(**facts)
            if facts["at_the_edge"]:
                say(f"tune: {best:.3g} is the {'smallest' if best == rates[0] else 'largest'} rate tried: widen span=")
            # Of the recipe alone the rate is another than what was set.
            tuned = OmegaConf.merge(cfg, {"trainer": {"recipe": {"lr": float(f"{best:.4g}")}}})
            again = command("train", tuned, ("method", "trainer", "target", "data"))
            stage.finish(facts, next=again)
    return _best(folder)


def check(cfg: DictConfig) -> None:
    """Check what a training checks, and that there is a number of steps and a probe to judge by."""
    train.check(cfg)
    grid(cfg.trainer.recipe.lr, cfg.span, cfg.trials)
    if cfg.trainer.max_steps is None:
        raise ValueError("trainer.max_steps=null: give the number of steps for which the rate is chosen")
    if not cfg.trainer.probe.every:
        raise ValueError("trainer.probe.every=null: rates are judged by the decoding probe; give a number of steps")
    if cfg.get("protocol"):
        raise ValueError(f"protocol={cfg.protocol.name}: give the steps that it comes to as trainer.max_steps")


def _trained(cfg: DictConfig, lr: float, steps: int) -> float:
    """Accepted length on held-out prompts after a training of `steps` steps with this rate."""
    job = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in OWN])
    changes: dict[str, Any] = {"trainer.recipe.lr": lr, "trainer.max_steps": steps, "trainer.probe.every": steps}
    for key, value in changes.items():
        OmegaConf.update(job, key, value)
    job.name, job.evaluate, job.trainer.validate_every = None, False, None
    say(f"tune: rate {lr:.3g}, {steps} steps")
    return float(read_summary(train.run(job))["probe_accepted_length"])


def _best(folder: Path) -> float:
    return float(read_json(folder / "trials.json", {})["lr"])
