"""Experiments: their configuration as lists of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any, get_args

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from specbench.cli import settings
from specbench.cli.config_groups import configs, loader, options
from specbench.cli.errors import nearest
from specbench.cli.overrides import parse

# The verbs that an experiment may ask for.
STUDIED = get_args(settings.StudySettings.model_fields["verb"].annotation)


@dataclass(frozen=True)
class Study:
    """An experiment: every list of runs as the overrides of each.

    `evaluations` is empty where each training is evaluated as its own `temperatures` say, at each of them with every
    option of the group `tree` in `trees` (none: chains). `baselines`: drafts without training, evaluated with chains.
    `target`: overrides of `specbench target`, which makes the target first; empty where it is there. `tune`: learning
    rates that are tried for each method before its trainings; None: the recipe's is taken. `stages`: overrides of the
    stages before training, by verb; empty for those of the data set. `speed`: overrides of `specbench speed`, which
    times every draft; empty for none.
    """

    name: str
    question: str
    trainings: list[list[str]]
    evaluations: list[list[str]] = field(default_factory=list)
    simulations: list[list[str]] = field(default_factory=list)
    calibrate: bool = False
    tune: int | None = None
    target: list[str] = field(default_factory=list)
    stages: Mapping[str, list[str]] = field(default_factory=dict)
    speed: list[str] = field(default_factory=list)
    trees: list[str] = field(default_factory=list)
    baselines: list[str] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)
    group_by: list[str] = field(default_factory=list)
    baseline: Mapping[str, str] = field(default_factory=dict)

    def common(self, groups: Sequence[str]) -> list[str]:
        """The overrides of `groups` that all trainings have, for the stages before them."""
        shared = [word for word in self.trainings[0] if all(word in job for job in self.trainings)]
        return [word for word in shared if word.partition("=")[0].lstrip("+~").split(".")[0] in groups]

    def decodings(self, temperatures: Sequence[float]) -> list[list[str]]:
        """The overrides of every evaluation of a draft whose training asks for these temperatures."""
        return self.evaluations or [
            [f"temperature={t}", f"tree={tree}"] for t in temperatures for tree in self.trees or ["chain"]
        ]

    def servings(self, methods: Sequence[str], decoded: Sequence[Path]) -> list[list[str]]:
        """Overrides of every simulation, given whose rounds lie where; the baseline replays its own draft's."""
        if not self.simulations:
            return []
        if len(methods) != len(decoded):
            raise ValueError(
                f"{self.name} replays one evaluation of each draft, and {len(decoded)} of {len(methods)} drafts are "
                "asked for: leave out temperatures="
            )
        rounds = dict(zip(methods, decoded, strict=True))
        own = self.baseline["method"]
        if own not in rounds or len(rounds) < 2:
            raise ValueError(
                f"{self.name} compares with {own}, so it needs its draft and another one: leave out method="
            )
        fixed = f"policies.{self.baseline['policy']}.rounds={rounds.pop(own)}"
        return [[*job, f"rounds={folder}", fixed] for folder in rounds.values() for job in self.simulations]


def study_of(name: str, given: Sequence[str] = ()) -> Study:
    """The experiment `name` with the overrides `given` for every training; one that sets an axis replaces it.

    Errors: ValueError for an experiment that is not there, or whose `study` asks for an unknown verb.
    """
    # The command line is inside Hydra already, a library call is not.
    with nullcontext() if GlobalHydra.instance().is_initialized() else configs("configs"):
        known = options("experiment")
        if name not in known:
            raise ValueError(f"there is no experiment '{name}'{nearest(name, known)} (there are {', '.join(known)})")
        found = loader().repository.load_config(f"experiment/{name}")
        text = _text(found.path, name)
    written = OmegaConf.to_container(found.config, resolve=False)
    study, axes = written.get("study", {}), written["hydra"]["sweeper"]["params"]
    verb, chosen = study.get("verb", "train"), [f"+experiment={name}"]
    if verb not in STUDIED:
        raise ValueError(f"experiment {name}: study.verb={verb}; choose one of {', '.join(STUDIED)}")
    runs = [[*chosen, *job] for job in jobs(axes, given if verb == "train" else ())]
    return Study(
        name,
        question(text),
        [[*job, *given] for job in (runs if verb == "train" else jobs(study["train"], given))],
        runs if verb == "evaluate" else [],
        runs if verb == "serve" else [],
        study.get("calibrate", False),
        study.get("tune"),
        list(study.get("target", [])),
        dict(study.get("stages", {})),
        list(study.get("speed", [])),
        list(study.get("trees", [])),
        list(study.get("baselines", [])),
        list(study.get("caches", [])),
        list(study.get("group_by", [])),
        study.get("baseline", {}),
    )


def jobs(axes: Mapping[str, Any], given: Sequence[str] = ()) -> list[list[str]]:
    """Every combination of the axes' values as overrides, the last axis fastest, without axes that `given` sets.

    Where an axis is one option of a group, the axes below that group belong to the option: when `given` replaces it,
    they go with it. Axes below a group that is swept over several options hold for every option and stay.
    """
    taken = {override.key_or_group for override in parse(given)}

    def replaced(axis: str) -> bool:
        name, group = axis.lstrip("+"), axis.lstrip("+").partition(".")[0]
        return name in taken or (group in taken and group in axes and len(values(group, axes[group])) == 1)

    return [list(job) for job in product(*(values(k, v) for k, v in axes.items() if not replaced(k)))]


def values(axis: str, text: Any) -> list[str]:
    """`layers` and `1,2` as `layers=1` and `layers=2`, read by Hydra's own grammar."""
    override = parse([f"{axis}={text}"])[0]
    if not override.is_discrete_sweep():
        return [f"{axis}={text}"]
    return [f"{axis}={value}" for value in override.sweep_string_iterator()]


def with_values(cfg: DictConfig, **values: Any) -> DictConfig:
    """A copy of `cfg` with these top-level settings."""
    return OmegaConf.merge(cfg, values)


def question(text: str) -> str:
    """The first comment line of an experiment's file that is not Hydra's."""
    lines = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#"))
    return next((line for line in lines if line and not line.startswith("@package")), "")


def _text(source: str, name: str) -> str:
    kind, _, where = source.rpartition("://")
    folder = files(where.replace("/", ".")) if kind == "pkg" else Path(where)
    return folder.joinpath("experiment", f"{name}.yaml").read_text(encoding="utf-8")
