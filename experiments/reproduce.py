"""specbench reproduce: a whole experiment, from the prompts to its tables, figures and page, in one command.

    prompts -> answers -> cache(s) -> every training of the sweep -> its evaluations -> its speed -> comparison

The experiment is configs/experiment/NAME.yaml: a sweep (`hydra.sweeper.params`) and, where it is more than a sweep of
trainings, `study`: `verb` (train, evaluate or serve) with the trainings it needs in `train`, `calibrate`, `tune`
(learning rates tried for each method first), `target` (how to make the target first), `stages` (settings of the stages
before training), `speed` (settings of a speed measurement of each draft, with each tree of its evaluations), `trees`
(options of the group `tree` with which each draft is evaluated), `baselines` (drafts without training, evaluated beside
them), `caches`, `baseline`, and `group_by` of the comparison. Runs are named by what decides their result, so
experiments below one `root` share them, and `specbench train -m +experiment=NAME` makes the same ones.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import calibrate, compare, evaluate, report, serve, speed, train, tune
from experiments.quickstart import stage
from specbench.cli import checks, summary
from specbench.cli.allotments import budget_of, sized
from specbench.cli.assembly import composed
from specbench.cli.identity import identity
from specbench.cli.launching import as_command
from specbench.cli.recording import recorded
from specbench.cli.stages import MARKER, say
from specbench.cli.studies import Study, study_of, with_values
from specbench.cli.verbs import VERBS
from specbench.drafts.installed import installed
from specbench.files.atomic import read_json
from specbench.progress import duration

# Measured on two cores that other work kept busy: DSpark, 240 steps and probes in 88 s; 24 prompts per domain in 22 s.
STATED = {"target": "embedded", "step": 0.37, "evaluation": 22.0}
# Settings of this verb, and of `train` that the experiment decides.
OWN = ("name", "yes", "root", "force", "codec", "entity", "project", "stages")


def run(cfg: DictConfig, given: Sequence[str] | None = None) -> Path:
    """Print the plan, ask for confirmation, run what is missing; returns the folder of the comparison.

    `given` are the overrides for every run of the sweep; None: those of the command line.
    """
    began, given = time.monotonic(), command_line() if given is None else list(given)
    everywhere = [f"root={cfg.root}", f"force={str(cfg.force).lower()}"]
    for_runs = [text for text in given if key(text).split(".")[0] not in OWN]
    beside = [*everywhere, *(text for text in for_runs if key(text).split(".")[0] == "tracking")]
    study = study_of(cfg.name, for_runs)
    jobs = [composed("train", [*everywhere, *job]) for job in study.trainings]
    before = before_training(cfg, study, beside, for_runs)
    check_all(study, jobs, before, beside)
    plan(cfg, study, jobs)
    with summary.within():
        for verb, overrides in before:
            stage(verb, overrides)
        for line in shares(jobs)[0] if before else ():
            say(f"reproduce {cfg.name}: {line}")
        trained, decoded, calibrated, timed = [], [], [], []
        words_of = with_tuned_rates(study, everywhere) if study.tune else study.trainings
        jobs = [composed("train", [*everywhere, *words]) for words in words_of] if study.tune else jobs
        for number, (job, words) in enumerate(zip(jobs, words_of, strict=True), 1):
            say(f"reproduce {cfg.name}: run {number} of {len(jobs)}")
            with as_command(["train", *everywhere, *words, "evaluate=false"]):
                folder, own, trees = train.run(with_values(job, evaluate=False)), [], []
            for overrides in study.decodings(job.temperatures):
                asked = train.evaluation_of(job, folder, overrides)
                own.append(evaluate.run(asked))
                trees += [] if asked.get("tree") in trees else [asked.get("tree")]
            trained.append(folder)
            decoded += own
            if study.speed:
                timed += [speed.run(speed_of(job, folder, study.speed, tree)) for tree in trees]
            if study.calibrate:
                for rounds in own:
                    asked = [*beside, f"rounds={rounds}", f"name={rounds.name}"]
                    calibrated.append(calibrate.run(composed("calibrate", asked)))
        decoded += [evaluate.run(asked) for asked in baselines_of(study, jobs[0])]
        servings = study.servings([job.method.name for job in jobs], decoded)
        served = [serve.run(composed("serve", [*beside, *job])) for job in servings]
        asked = composed("report", [f"root={cfg.root}", f"name={cfg.name}", f"project={cfg.project}"])
        asked.entity, asked.title = cfg.entity, study.question
        asked.runs = [str(path) for path in (*decoded, *trained, *timed, *served)]
        asked.group_by, asked.calibrations = study.group_by, [str(path) for path in calibrated]
        output = (compare if cfg.entity is None else report).run(asked)
    facts = {"trainings": len(jobs), "evaluations": len(decoded), "page": str(output / "report.html")}
    summary.report(f"reproduce {cfg.name}", output, time.monotonic() - began, facts)
    return output


def with_tuned_rates(study: Study, everywhere: Sequence[str]) -> list[list[str]]:
    """The overrides of every training with the learning rate that was found for its method: one search for all seeds
    and protocols of a method, on the first seed."""
    found: dict[tuple[str, ...], float] = {}
    chosen = []
    for words in study.trainings:
        own = tuple(word for word in words if key(word).split(".")[0] not in ("seed", "protocol"))
        if own not in found:
            say(f"reproduce: {study.tune} learning rates, {' '.join(own[1:])}")
            first = [word for word in words if key(word).split(".")[0] != "protocol"]
            found[own] = tune.run(composed("tune", [*everywhere, *first, f"trials={study.tune}"]))
        chosen.append([*words, f"trainer.recipe.lr={found[own]:.6g}"])
    return chosen


def before_training(
    cfg: DictConfig, study: Study, everywhere: Sequence[str], given: Sequence[str]
) -> list[tuple[str, list[str]]]:
    """The stages before the trainings, in order, with the overrides of each; `given` are those of the runs."""
    own = study.common(("target", "data")) if study.stages else []
    for_data = own or [text for text in given if key(text).split(".")[0] in ("target", "data")]
    further = study.stages or cfg.stages
    stages = []
    if study.target and not any(key(text) in ("target", "target.id") for text in given):
        stages.append(("target", [*everywhere, *study.target]))
    for verb in ("prompts", "answers"):
        known = [t for t in for_data if verb != "prompts" or not key(t).startswith("target")]
        stages.append((verb, [*everywhere, *known, *further[verb]]))
    for codec in study.caches or [cfg.codec]:
        stages.append(("cache", [*everywhere, *for_data, f"codec={codec}", *further["cache"]]))
    return stages


def speed_of(job: DictConfig, folder: Path, overrides: Sequence[str], tree: DictConfig | None = None) -> DictConfig:
    """The configuration of a speed measurement of the draft that `job` trained in `folder`, on the prompts of its
    evaluation; `tree`: with the token trees of an evaluation."""
    child, own = composed("speed", overrides), OmegaConf.to_container(job, resolve=True)
    for group in ("root", "force", "target", "suite"):
        OmegaConf.update(child, group, own[group], merge=False)
    child.draft, child.tree = str(folder), tree
    if job.method.draft._target_ not in installed():
        child.methods = [job.method.draft._target_]
    return child


def baselines_of(study: Study, job: DictConfig) -> list[DictConfig]:
    """The configurations of the evaluations of the study's baselines, on the prompts of `job`'s evaluation."""
    return [
        train.evaluation_of(job, Path(name), [f"temperature={t}"]) for t in job.temperatures for name in study.baselines
    ]


def check_all(
    study: Study, jobs: Sequence[DictConfig], before: Sequence[tuple[str, list[str]]], everywhere: Sequence[str]
) -> None:
    """Check the settings of every stage, training, evaluation and simulation before the first of them starts."""
    for verb, overrides in before:
        checks.ahead(verb, composed(VERBS[verb].config, overrides))
    decoded: list[Path] = []
    for job in jobs:
        checks.ahead("train", job)
        for overrides in study.decodings(job.temperatures):
            decoded.append(Path("decoded") / str(len(decoded)))
            checks.check_before("evaluate", train.evaluation_of(job, decoded[-1], overrides))
        if study.speed:
            checks.check_before("speed", speed_of(job, Path("drafts") / str(len(decoded)), study.speed))
    for asked in baselines_of(study, jobs[0]):
        checks.check_before("evaluate", asked)
    for overrides in study.servings([job.method.name for job in jobs], decoded):
        checks.check_before("serve", composed("serve", [*everywhere, *overrides]))


def command_line() -> list[str]:
    """The overrides of the command that runs."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def key(override: str) -> str:
    """What an override sets."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def plan(cfg: DictConfig, study: Study, jobs: Sequence[DictConfig]) -> None:
    """Print runs and hours; ask for confirmation on a terminal, otherwise require yes=true.

    The time of a run is the mean of the runs finished below this root, the experiment's own statement before there
    are any. Errors: ValueError when nobody is there to confirm.
    """
    names = dict.fromkeys(train.run_name(job) for job in jobs)
    markers = [read_json(Path(cfg.root) / "runs" / "train" / name / MARKER, None) for name in names]
    missing = sum(cfg.force or marker is None or marker["status"] != "finished" for marker in markers)
    each = len(study.decodings(jobs[0].temperatures))
    print(f"{cfg.name}: {study.question}")
    print(f"  {len(names)} trainings on {jobs[0].target.name}, {missing} of them to do; {each} evaluations each")
    if study.baselines:
        print(f"  beside them {', '.join(study.baselines)}, which are not trained")
    lines, seconds_of_steps = shares(jobs)
    print("\n".join(f"  {line}" for line in lines))
    if study.tune:
        searches = len({job.method.name for job in jobs})
        print(f"  before them {searches} searches for a learning rate, of {study.tune} rates each")
    seconds, source = cost_of_a_run(Path(cfg.root), jobs[0], each)
    if seconds is None:
        print("  hours: not measured for this target; the first finished run tells")
    else:
        print(
            f"  about {missing * seconds / 3600:.2f} h ({duration(seconds)} a training with its evaluations, {source})"
        )
    if seconds_of_steps is not None:
        print(f"  of which {seconds_of_steps / 3600:.2f} h are the optimiser steps of all trainings, as timed here")
    print(f"  below {cfg.root}; the same command continues after a stop")
    if not missing or cfg.yes:
        return
    if not sys.stdin.isatty():
        raise ValueError(f"{missing} trainings are to be done and nobody is there to confirm: add yes=true")
    if input("start? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("not started; yes=true starts without asking")


def shares(jobs: Sequence[DictConfig]) -> tuple[list[str], float | None]:
    """One line for each configuration that is trained: what a training of it gets; and the seconds of the optimiser
    steps of all `jobs`, None where they were not all timed.

    Before there is a cache, lines say how much of what is equal, because the steps follow from the data.
    """
    lines: dict[str, str] = {}
    seconds: dict[str, float | None] = {}
    every = []
    for job in jobs:
        facts = {name: value for name, value in recorded(job).items() if name != "seed"}
        every.append(code := identity("train", facts).code)
        if code in lines:
            continue
        try:
            cfg = sized(job)
            gets = train.allotted(cfg)
        except OSError:  # of a target that an earlier stage makes
            gets = None
        budget = budget_of(job)
        named = f"{job.method.name}, {'no protocol' if budget is None else budget.text}"
        lines[code] = f"{named}: {gets.text if gets else 'the steps follow from the data, which are not there yet'}"
        seconds[code] = None if gets is None or gets.seconds is None else gets.steps * gets.seconds
    known = [seconds[code] for code in every]
    return list(lines.values()), None if None in known else sum(known)


def cost_of_a_run(root: Path, job: DictConfig, evaluations: int) -> tuple[float | None, str]:
    """Seconds of one training with its evaluations, and the source of this number."""
    means = {}
    for kind in ("train", "evaluate"):
        found = [read_json(path, {}) for path in sorted((root / "runs" / kind).glob(f"[!.]*/{MARKER}"))]
        own = [m["seconds"] for m in found if m.get("status") == "finished" and _same_work(m["config"], job)]
        means[kind] = sum(own) / len(own) if own else None
    if None not in means.values():
        return means["train"] + evaluations * means["evaluate"], "mean of the finished runs here"
    if job.target.name == STATED["target"] and job.trainer.max_steps is not None:
        steps = job.trainer.max_steps * STATED["step"]
        return steps + evaluations * STATED["evaluation"], "stated for two busy cores"
    return None, ""


def _same_work(config: dict[str, Any], job: DictConfig) -> bool:
    same = config["target"]["name"] == job.target.name
    return same and ("trainer" not in config or config["trainer"]["max_steps"] == job.trainer.max_steps)
