"""What a method gets under a protocol, before anything runs: how deep its draft is, its steps, and what they cost.

A time is measured once below a root and kept in root/timings, so that all seeds of a method, an interrupted training
that continues, and the plan that was shown have the same depth and the same number of steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from specbench.cli.assembly import build_draft, build_objective, draft_without_weights, load_target, target_config
from specbench.cli.launching import rank_and_world
from specbench.cli.recording import recorded
from specbench.cli.stages import say
from specbench.data.loading.step_data import StepData
from specbench.drafts.draft import Draft
from specbench.files.atomic import read_json, write_json
from specbench.models.target import Target
from specbench.profiling.decoding_speed import draft_cost, target_cost
from specbench.profiling.step_seconds import step_seconds
from specbench.runs.provenance import hardware
from specbench.runs.run_folder import folder_name
from specbench.training.budget import DEPTHS, Budget, ExpectedCost, depth_of, step_cost
from specbench.training.draft_training import DraftTraining, trainable_parameters

MORE = 2  # layers by which the two drafts differ whose rounds are timed
CONTEXT, REPEATS = 128, 30
# A plan times steps of at most so many operations, which takes seconds; a training under a budget of hours times any.
CHEAP = {"cpu": 1e11, "cuda": 1e15}
# What affects the time of a step or of a round, beside the machine.
TIMED = ("draft", "objective", "backbone", "vocabulary", "window")


@dataclass(frozen=True)
class Allotment:
    """What one training gets: its draft, its optimiser steps, and what they are expected to cost.

    `seconds`: of a step; None where it was not measured.
    """

    method: str
    protocol: str
    depth: str
    parameters: int
    steps: int
    cost: ExpectedCost
    seconds: float | None

    @property
    def text(self) -> str:
        """All of it in one line."""
        hours = "hours not measured"
        if self.seconds is not None:
            hours = f"{self.steps * self.seconds / 3600:.3g} h ({self.seconds:.3g} s a step)"
        return (
            f"{self.steps} steps, {self.steps * self.cost.tokens:.3g} supervised tokens, "
            f"{self.steps * self.cost.flops:.3g} FLOP, {self.parameters:,} trained parameters ({self.depth}), {hours}"
        )


def budget_of(cfg: DictConfig) -> Budget | None:
    """The budget of `protocol=`; None where every method has the trainer's steps."""
    return Budget(**cfg.protocol) if cfg.get("protocol") else None


def sized(cfg: DictConfig) -> DictConfig:
    """The configuration with a draft as deep as a budget of parameters or of a round's time allows; others as they are.

    Errors: ValueError if one layer is too much, or the draft of the method has no depth to choose.
    """
    budget = budget_of(cfg)
    if budget is None or not budget.of_size:
        return cfg
    key = depth_of(OmegaConf.to_container(cfg.method.draft, resolve=True))
    if budget.quantity == "parameters":
        costs = [float(_parameters(_deep(cfg, key, layers))) for layers in (1, 1 + MORE)]
    else:
        found = _measured_once(cfg, "round", key, lambda: _rounds(cfg, key))
        share = budget.quantity == "round_share"
        costs = [one["draft"] / one["target"] if share else one["draft"] + one["target"] for one in found["rounds"]]
    return _deep(cfg, key, budget.layers(*costs, MORE))


def allotment(cfg: DictConfig, data: StepData, seconds: float | None) -> Allotment:
    """What the training `cfg`, with its draft `sized` already, gets on `data`; `seconds`: of a step, where measured."""
    draft = draft_without_weights(cfg.method, cfg.target, data.target_config)
    cost, budget = step_cost(draft, data), budget_of(cfg)
    steps = None if budget is None else budget.steps(cost, seconds)
    if steps is None:
        steps = cfg.trainer.max_steps or cfg.trainer.epochs * data.steps_per_epoch
    depth = next((f"{draft.settings[key]} {key}" for key in DEPTHS if key in draft.settings), "no depth")
    name = "no protocol" if budget is None else budget.text
    return Allotment(cfg.method.name, name, depth, trainable_parameters(draft), steps, cost, seconds)


def seconds_of_a_step(cfg: DictConfig, data: StepData, needed: bool) -> float | None:
    """Seconds of an optimiser step, measured once below a root; None where it takes long and is not `needed`."""
    device = _training_device(cfg)
    draft = draft_without_weights(cfg.method, cfg.target, data.target_config)
    if not needed and (cfg.online or step_cost(draft, data).flops > CHEAP[device.type]):
        found = read_json(_kept(cfg, "step", None), None)
        return None if found is None else float(found["seconds"])
    return float(_measured_once(cfg, "step", None, lambda: {"seconds": _step(cfg, data, device)})["seconds"])


def _step(cfg: DictConfig, data: StepData, device: torch.device) -> float:
    with torch.random.fork_rng():
        draft = build_draft(cfg.method, cfg.target, data.target_config, data.tables, _some_vocabulary(cfg))
        draft.randomise()
    recipe = OmegaConf.to_container(cfg.trainer.recipe, resolve=True) | {"compile": False}
    module = DraftTraining(draft, build_objective(cfg.method), target_tables=data.tables, max_steps=1, **recipe)
    lightning = cfg.trainer.lightning
    devices = lightning.devices if isinstance(lightning.devices, int) else 1
    try:
        return step_seconds(module.to(device), data, str(lightning.precision), devices * lightning.num_nodes)
    finally:
        data.tables.to("cpu")  # which the module took along


def _rounds(cfg: DictConfig, key: str) -> dict[str, Any]:
    """Seconds of a proposal and its commit, and of the target's pass over what is verified, for two depths."""
    target, found = load_target(cfg.target), []
    for layers in (1, 1 + MORE):
        own = _deep(cfg, key, layers)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            draft = build_draft(own.method, own.target, target.config, target.tables, _some_vocabulary(own))
            draft.randomise()
        found.append(_round(target, draft.to(target.device, target.dtype).eval()))
    return {"rounds": found}


def _round(target: Target, draft: Draft) -> dict[str, float]:
    slots = draft.block_size
    (own,) = target_cost(target, [1], [slots + 1], CONTEXT, REPEATS)
    rows = draft_cost(target, draft, [1], [slots], CONTEXT, REPEATS)
    return {"draft": sum(row["seconds"] for row in rows), "target": own["seconds"]}


def _measured_once(cfg: DictConfig, what: str, key: str | None, measure: Callable[[], Mapping[str, Any]]) -> Any:
    """What `measure` finds, or found before below this root. The first of several processes decides."""
    path = _kept(cfg, what, key)
    known = read_json(path, None)
    if known is not None:
        return known
    if rank_and_world()[1] > 1:
        raise ValueError(
            f"protocol={cfg.protocol.name} with several ranks: every rank needs the same measurement; make it first "
            "with plan=true, on one device of the same machine"
        )
    say(f"{cfg.method.name}: timing a {what} for {path}")
    found = {**measure(), "what": what, "method": cfg.method.name, "machine": hardware()}
    if not path.exists():  # another process may have been faster
        write_json(path, found)
    return read_json(path, None)


def _kept(cfg: DictConfig, what: str, key: str | None) -> Path:
    """The file of a measurement: named by all that affects it, without the depth `key` that it is to decide."""
    facts = recorded(cfg)
    method = {name: facts["method"].get(name) for name in TIMED}
    if key is not None:
        method["draft"] = {name: value for name, value in method["draft"].items() if name != key}
    target = {name: value for name, value in facts["target"].items() if name not in ("sampling", "seed")}
    about: dict[str, Any] = {"method": method, "target": target}
    if what == "step":
        recipe, lightning = facts["trainer"]["recipe"], facts["trainer"]["lightning"]
        about |= {"data": facts["trainer"]["data"], "names": facts["data"]["name"], "cache": facts["cache"]}
        about |= {"lightning": lightning, "on_policy": recipe.get("on_policy"), "online": facts["online"]}
    code = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:8]
    name = folder_name(f"{what}-{cfg.method.name}-{cfg.target.name}-{code}", "a measurement")
    return Path(cfg.root) / "timings" / f"{name}.json"


def _deep(cfg: DictConfig, key: str, layers: int) -> DictConfig:
    """A copy of the configuration with a draft of so many layers."""
    own = cfg.copy()
    own.method.draft[key] = layers
    return own


def _parameters(cfg: DictConfig) -> int:
    return trainable_parameters(draft_without_weights(cfg.method, cfg.target, target_config(cfg.target)))


def _some_vocabulary(cfg: DictConfig) -> torch.Tensor | None:
    """Ids of a reduced vocabulary of the right size: which ones they are does not affect the time."""
    return None if cfg.method.vocabulary is None else torch.arange(cfg.method.vocabulary)


def _training_device(cfg: DictConfig) -> torch.device:
    named = cfg.trainer.lightning.accelerator
    cuda = torch.cuda.is_available() and named in ("auto", "gpu", "cuda")
    return torch.device("cuda" if cuda else "cpu")
