"""specbench train: train one draft from a target cache, select the checkpoint by decoding, and evaluate it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import ProgressBar
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from experiments.evaluate import run as evaluate
from specbench.checkpoints.exports import require_names
from specbench.cli.allotments import Allotment, allotment, budget_of, seconds_of_a_step, sized
from specbench.cli.assembly import (
    build_draft,
    build_objective,
    composed,
    draft_without_weights,
    load_target,
    target_config,
)
from specbench.cli.checks import check_before
from specbench.cli.engine_settings import fitted, said_servable
from specbench.cli.environment import free_memory
from specbench.cli.following import command
from specbench.cli.identity import content, fingerprint, identity
from specbench.cli.launching import rank_and_world, ranks, repeats_the_command, shards_of
from specbench.cli.lightning_parts import callbacks_of, loggers_of
from specbench.cli.recording import recorded
from specbench.cli.sizes import smaller
from specbench.cli.stages import Stage, say
from specbench.cli.tracked_stages import tracking_of
from specbench.data.answers.chat import prompt_ids
from specbench.data.cache.lookup import find_cache
from specbench.data.cache.remote_shards import is_command, is_remote
from specbench.data.loading.frequent_tokens import frequent_tokens
from specbench.data.loading.online import OnlineTarget
from specbench.data.loading.replay import Replay
from specbench.data.loading.step_data import StepData
from specbench.data.loading.target_cache import TargetCache
from specbench.data.prompts import preparation as prompts
from specbench.decoding.sampling import Sampling
from specbench.drafts.draft import Draft
from specbench.drafts.initialisation import AUTO, PREVIOUS, STARTS, Begun, first_weights
from specbench.drafts.installed import installed
from specbench.library.training import train_into
from specbench.models.backbone import chosen
from specbench.models.embedding_head import Tables
from specbench.models.target import Target
from specbench.progress import first_rank
from specbench.runs.provenance import provenance
from specbench.runs.run_folder import RunFolder, folder_name
from specbench.runs.tracked_run import tracked
from specbench.training.callbacks import DecodeProbe
from specbench.training.draft_training import DraftTraining, require_precision
from specbench.training.memory_estimate import Footprint, footprint, require_memory
from specbench.training.warm_start import from_draft

RESULTS = ("draft/config.json", "draft/*.safetensors", "summary.json", "config.yaml")


def run(cfg: DictConfig) -> Path:
    """Train, choose the checkpoint, write draft/, evaluate; returns the run folder."""
    cfg, changed = fitted(cfg)
    if changed:
        say(f"train: export_for={cfg.export_for} sets {', '.join(changed)}")
    if cfg.plan:
        print_plan(cfg)
        return Path(cfg.root)
    check_before("train", cfg)
    with stage_of(cfg) as stage:
        folder = stage.folder
        if not stage.done:
            with ranks():
                _train(cfg, stage, folder.name)
    if repeats_the_command():
        raise SystemExit(0)  # what the first rank does next, an evaluation or another training, is its own
    # The other ranks of a training are done; an evaluation over several devices is a command of its own.
    if cfg.evaluate and first_rank():
        for temperature in cfg.temperatures:
            evaluate(evaluation_of(cfg, folder, [f"temperature={temperature}"]))
    return folder


def run_name(cfg: DictConfig) -> str:
    """Method, target, seed, and a digest of everything else that affects the result."""
    facts = recorded(cfg)
    facts["seed"] = {key: value for key, value in facts["seed"].items() if key != "init"}
    return f"{cfg.method.name}-{cfg.target.name}-s{cfg.seed.init}-{identity('train', facts).code}"


def stage_of(cfg: DictConfig) -> Stage:
    """The stage of this training, not entered."""
    folder = Path(cfg.root) / "runs" / "train" / folder_name(cfg.name or run_name(cfg), "a run folder")
    return Stage("train", folder, cfg, force=cfg.force, results=RESULTS, inputs=data_of(cfg))


def data_of(cfg: DictConfig) -> dict[str, str]:
    """The fingerprint of the data that a training finds by itself; nothing where there is none (any more)."""
    if cfg.online:
        lines = answers_of(cfg) / "answers.jsonl"
        return {"answers": content([lines])} if lines.is_file() else {}
    if cfg.cache is not None:
        return {}
    try:
        found = _found_cache(cfg)
    except ValueError:  # said when it is needed: a finished training does not need it
        return {}
    seen = fingerprint(str(found))
    return {} if seen is None else {"cache": seen}


def check(cfg: DictConfig) -> None:
    """Check precision, devices, optimiser settings, method and loss, which would otherwise cause an error after
    minutes."""
    shards_of(cfg.trainer.lightning)
    require_precision(cfg.trainer.lightning.precision)
    for key in ("max_steps", "epochs"):
        value = cfg.trainer[key]
        if value is not None and value < 1:
            raise ValueError(f"trainer.{key}={value}: train for at least one, or set it to null")
    if cfg.trainer.max_steps is None and cfg.trainer.epochs is None:
        raise ValueError("trainer.max_steps and trainer.epochs are both null: set one of them")
    callbacks_of(cfg, Path(cfg.root)), loggers_of(cfg, Path(cfg.root))
    objective = build_objective(cfg.method)
    try:
        config = target_config(cfg.target)
    except (OSError, ValueError):  # a target that an earlier stage has still to make, or that loading will refuse
        return
    budget = budget_of(cfg)
    draft = draft_without_weights(
        (sized(cfg) if budget is not None and budget.quantity == "parameters" else cfg).method, cfg.target, config
    )
    require_names(draft)
    recipe = OmegaConf.to_container(cfg.trainer.recipe, resolve=True) | {"compile": False}
    DraftTraining(draft, objective, target_tables=draft.tables, max_steps=cfg.trainer.max_steps or 1, **recipe)


def print_plan(cfg: DictConfig) -> Footprint:
    """Print the cost of training the draft: parameters, memory, the largest micro-batch; and what the training gets:
    steps, supervised tokens, operations and hours, where there is a cache of its data."""
    cfg, config = sized(cfg), target_config(cfg.target)
    draft = draft_without_weights(cfg.method, cfg.target, config)
    memory = None if cfg.memory is None else float(cfg.memory)
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    lightning = cfg.trainer.lightning
    found = footprint(draft, cfg.target.max_length, lightning.precision, memory, shards_of(lightning))
    say(found.text())
    if (budget := budget_of(cfg)) is not None:
        say(f"budget            {budget.text}")
    gets = allotted(cfg)
    say(f"this training     {gets.text if gets else 'its steps follow from the data, of which there is no cache'}")
    say(f"backbone          {chosen(config, cfg.method.backbone).reason}")
    say(f"servable          {said_servable(draft, config)}")
    if (small := smaller(cfg.method)) is not None:
        say(f"sizes             {small}")
    return found


def allotted(cfg: DictConfig) -> Allotment | None:
    """What a training gets, with its draft `sized` already; None where there is no cache of its data (yet)."""
    if cfg.online:
        return None
    try:
        data = open_data(cfg, None)
    except ValueError:
        return None
    budget = budget_of(cfg)
    return allotment(cfg, data, seconds_of_a_step(cfg, data, budget is not None and budget.quantity == "hours"))


def _train(cfg: DictConfig, stage: Stage, name: str) -> None:
    cfg, budget = sized(cfg), budget_of(cfg)
    rank, _ = rank_and_world()
    record = RunFolder(cfg.root, "train", name, recorded(cfg), writes=rank == 0, folder=stage.work)
    headline = {"method": cfg.method.name, "target": cfg.target.name, "seed": cfg.seed.init}
    with tracked(tracking_of(cfg), record, **headline) as (run, tracking):
        target = load_target(cfg.target) if needs_target(cfg) else None
        data = open_data(cfg, target)
        config = data.target_config
        free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else free_memory()
        require_memory(
            draft_without_weights(cfg.method, cfg.target, config),
            int(data.lengths.max()),
            cfg.trainer.data.samples_per_micro,
            cfg.trainer.lightning.precision,
            free,
            shards_of(cfg.trainer.lightning),
        )
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed.init)
            draft = build_draft(cfg.method, cfg.target, config, data.tables, _vocabulary(cfg, data, target))
            begun = initialise(draft, cfg.start, target, data.tables, cfg.get("start_previous") or PREVIOUS[0])
        choice = chosen(config, cfg.method.backbone)
        say(f"train: {choice.reason}")
        say(f"train: servable: {said_servable(draft, config)}")
        if (small := smaller(cfg.method)) is not None:
            say(f"train: {small}")
        hours = budget is not None and budget.quantity == "hours"
        gets = allotment(cfg, data, seconds_of_a_step(cfg, data, needed=True) if hours else None)
        steps = gets.steps
        say(f"train: {gets.protocol}: {gets.text}")
        module = DraftTraining(
            draft,
            build_objective(cfg.method),
            target_tables=data.tables,
            tables_from=tables_from(cfg, data),
            max_steps=steps,
            anchor_seed=cfg.seed.anchors,
            **OmegaConf.to_container(cfg.trainer.recipe, resolve=True),
        )
        probe = None if not cfg.trainer.probe.every else probe_of(cfg, target)
        rendered = None
        if probe is not None and probe.prompts and target.tokenizer is not None:
            rendered = target.tokenizer.decode(probe.prompts[0])
        run.write_provenance(*provenance(sys.argv, dict(cfg.seed), data.lineage, rendered))
        facts = {"method": cfg.method.name, "target": cfg.target.name}
        tracking.describe(**data.lineage)
        tracking.uses(f"cache-{data.lineage['fingerprint']}", "cache", **data.lineage)
        watching, lightning = callbacks_of(cfg, run.path), instantiate(cfg.trainer.lightning, _convert_="all")
        if not any(isinstance(one, ProgressBar) for one in watching):
            lightning["enable_progress_bar"] = False
        trained = train_into(
            run,
            module,
            data,
            steps=steps,
            probe=probe,
            validate_every=cfg.trainer.validate_every,
            callbacks=watching,
            loggers=[*tracking.loggers, *loggers_of(cfg, run.path)],
            resumes=stage.resumes,
            facts={
                **facts,
                "budget": OmegaConf.to_container(cfg.protocol) if cfg.get("protocol") else None,
                "flops_per_step": gets.cost.flops,
                "backbone": {"family": choice.family, "own": choice.own, "reason": choice.reason},
                "lineage": {"cache": data.lineage, "start": begun.start, "copied": len(begun.copied)},
            },
            **lightning,
        )
        summary = trained.summary
        if probe is not None:
            found = probe.convergence
            say(f"train: {'too few probes or prompts to tell whether it converged' if found is None else found.text}")
        tracking.artifact(f"draft-{name}", "draft", run.path / "draft", **summary["lineage"])
        tracking.finish()
        shown = {k: summary[k] for k in ("probe_accepted_length", "best_step", "steps", "parameters")}
        # An evaluation that follows by itself is not the user's next command.
        then = None if cfg.evaluate else command("evaluate", cfg, ("target", "suite"), draft=str(stage.folder))
        stage.finish(shown, next=then)


def open_data(cfg: DictConfig, target: Target | None) -> StepData:
    """The data module of a training run: a target cache that fits it, or the target itself."""
    order = OmegaConf.to_container(cfg.trainer.data, resolve=True) | {
        "seed": cfg.seed.data,
        "limit_samples": cfg.limit_samples,
    }
    if cfg.online:
        about = cfg.target
        return OnlineTarget(
            target, answers_of(cfg), cfg.cache_dtype, max_length=about.max_length, thinking=about.thinking, **order
        )
    method = get_class(cfg.method.draft._target_)

    def opened(folder: str | Path) -> TargetCache:
        return TargetCache(
            folder,
            taps=list(cfg.target.target_layer_ids) if method.reads_taps else [],
            needs_all_last=method.reads_last,
            expect={"target": cfg.target.name},
            dtype=cfg.cache_dtype,
            on_damage=cfg.on_damage,
            local_folder=_copy_of(cfg.root, str(folder)) if is_remote(folder) else None,
            **order,
            **streaming_of(cfg),
        )

    data = opened(cfg.cache or _found_cache(cfg))
    # Records of earlier versions lack the setting.
    return (
        data
        if cfg.get("replay") is None or not cfg.replay_share
        else Replay(data, opened(cfg.replay), cfg.replay_share)
    )


def _copy_of(root: str, place: str) -> Path:
    """The folder for local files of a remote cache; caches of several runs at once do not share one."""
    return Path(root) / "mirror" / hashlib.sha256(place.encode()).hexdigest()[:16]


def streaming_of(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of TargetCache for `stream=true`, the number of ranks included: every rank has its own shards, and the
    number of steps of an epoch is needed before the trainer can tell the number of ranks."""
    if not cfg.get("stream"):  # records lack it where it is false
        return {}
    rank, _ = rank_and_world()
    world = cfg.trainer.lightning.devices * cfg.trainer.lightning.num_nodes
    return {"stream": True, "shuffle_buffer": cfg.shuffle_buffer, "rank": rank, "world": world}


def answers_of(cfg: DictConfig) -> Path:
    """The folder of the answers on which a run is trained."""
    return Path(cfg.root) / "answers" / cfg.data.name / cfg.target.name


def _found_cache(cfg: DictConfig) -> Path:
    taps = list(cfg.target.target_layer_ids or [])
    return find_cache(Path(cfg.root), cfg.target.name, taps, cfg.data.name, cfg.cache_codec)


def probe_of(cfg: DictConfig, target: Target) -> DecodeProbe:
    """The decoding probe, on the first held-out prompts of the data; benchmarks are never used to select a
    checkpoint."""
    asked, folder, found = cfg.trainer.probe, Path(cfg.root) / "prompts" / cfg.data.name, []
    own = {"every": asked.every, "sampling": Sampling(asked.temperature), "max_new_tokens": asked.max_new_tokens}
    if cfg.cache is not None and not folder.is_dir():
        say(f"train: {folder} is not there: the probe decodes held-out conversations of cache={cfg.cache}")
        return DecodeProbe(target, None, **own)
    for row in prompts.read(folder, "validation", asked.prompts):
        first = next(i for i, m in enumerate(row["messages"]) if m["role"] == "user")
        found.append(prompt_ids(target.tokenizer, row["messages"][: first + 1], cfg.target.thinking))
    if len(found) < asked.prompts:
        raise ValueError(
            f"trainer.probe.prompts={asked.prompts} and {folder} holds {len(found)} validation prompts: lower it, or "
            "hold out more in `specbench prompts`"
        )
    return DecodeProbe(target, found, **own)


def _vocabulary(cfg: DictConfig, data: StepData, target: Target | None) -> Tensor | None:
    """Token ids of the draft's vocabulary; None: the target's whole one."""
    if cfg.method.vocabulary is None:
        return None
    ids, covered = frequent_tokens(data, cfg.method.vocabulary, () if target is None else target.stop_token_ids)
    say(f"train: the draft's vocabulary of {len(ids)} tokens covers {covered:.2%} of the supervised text")
    return ids


def needs_target(cfg: DictConfig) -> bool:
    """Whether the target itself must be in memory: to copy layers, to probe, or to compute states online."""
    return cfg.start in ("target", AUTO) or bool(cfg.trainer.probe.every) or cfg.online


def tables_from(cfg: DictConfig, data: StepData) -> dict[str, str | None] | None:
    """Where a checkpoint's reader finds the target's tables; None: the checkpoint contains them."""
    if not cfg.online and not is_command(data.folder):  # a command that a checkpoint names is not run
        return {"cache": str(data.folder) if is_remote(data.folder) else str(Path(data.folder).resolve())}
    id = cfg.target.get("id")
    return None if id is None else {"target": id, "revision": cfg.target.get("revision")}


def initialise(draft: Draft, start: str, target: Any, tables: Tables, previous: str = PREVIOUS[0]) -> Begun:
    """Give the draft its first weights as `start` and `previous` (start_previous=) say. `tables` are the target's."""
    if start in STARTS:
        begun = first_weights(draft, start, target, previous)
        if begun.why is not None:
            say(f"train: the draft starts from random weights: {begun.why}")
        return begun
    draft.randomise()
    copied, left = from_draft(draft, start, tables)
    said = f"; not from there: {', '.join(left)}" if left else ""
    say(f"train: {len(copied)} of {len(copied) + len(left)} tensors start from {start}{said}")
    return Begun(start, None, copied)


def evaluation_of(cfg: DictConfig, folder: Path, overrides: Sequence[str]) -> DictConfig:
    """The configuration of an evaluation of the draft that `cfg` trained in `folder`."""
    child, own = composed("evaluate", overrides), OmegaConf.to_container(cfg, resolve=True)
    for key in ("root", "force", "target", "suite", "tracking", "max_new_tokens", "batch_size", "fast"):
        OmegaConf.update(child, key, own[key], merge=False)
    child.draft, child.seed = str(folder), cfg.evaluation_seed
    if cfg.method.draft._target_ not in installed():
        child.methods = [cfg.method.draft._target_]
    if cfg.limit is not None:
        child.suite.limit = cfg.limit
    return child
