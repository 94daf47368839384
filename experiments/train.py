"""specbench train: one draft from a target cache, chosen by real decoding; then its evaluation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from experiments.evaluate import run as evaluate
from experiments.planning import print_plan, require_memory, shapes
from experiments.trainingdata import answers_of, find_cache, frequent_tokens, open_data, probe_prompts
from specbench.checkpoints.draft_folder import save_draft
from specbench.cli.assembly import (
    build_draft,
    build_objective,
    composed,
    draft_settings,
    load_target,
)
from specbench.cli.checks import check_before
from specbench.cli.following import command
from specbench.cli.identity import content, fingerprint, identity
from specbench.cli.launching import rank_and_world, ranks, repeats_the_command, shards_of
from specbench.cli.recording import recorded
from specbench.cli.stages import Stage, say
from specbench.data.cache.remote_shards import is_remote
from specbench.data.loading.step_data import StepData
from specbench.decoding.sampling import Sampling
from specbench.drafts.draft import Draft
from specbench.drafts.initialisation import AUTO, STARTS, from_target, randomise, resolved
from specbench.drafts.installed import installed
from specbench.files.torch_checkpoints import read_checkpoint
from specbench.models.backbone import backbone_of, chosen
from specbench.models.embedding_head import Tables
from specbench.runs.provenance import provenance
from specbench.runs.run_folder import RunFolder, folder_name
from specbench.training.callbacks import DecodeProbe, GracefulStop, KeepLast, TrainingProgress
from specbench.training.draft_training import DraftTraining, digest, require_precision, trainable_parameters
from specbench.training.warm_start import from_draft

RESULTS = ("draft/config.json", "draft/*.safetensors", "summary.json", "config.yaml")


def run(cfg: DictConfig) -> Path:
    """Train, choose the checkpoint, write draft/, evaluate; returns the run folder."""
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
    """Method, target, seed, and a digest of everything else that decides the result."""
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
        found = find_cache(Path(cfg.root), cfg.target, cfg.data.name, cfg.cache_codec)
    except ValueError:  # said when it is needed: a finished training does not need it
        return {}
    seen = fingerprint(str(found))
    return {} if seen is None else {"cache": seen}


def check(cfg: DictConfig) -> None:
    """Refuse what a training would refuse after minutes: its precision, devices, recipe, method and loss."""
    shards_of(cfg.trainer.lightning)
    require_precision(cfg.trainer.lightning.precision)
    for key in ("max_steps", "epochs"):
        value = cfg.trainer[key]
        if value is not None and value < 1:
            raise ValueError(f"trainer.{key}={value}: train for at least one, or set it to null")
    if cfg.trainer.max_steps is None and cfg.trainer.epochs is None:
        raise ValueError("trainer.max_steps and trainer.epochs are both null: set one of them")
    objective = build_objective(cfg.method)
    try:
        config = shapes(cfg.target)
    except (OSError, ValueError):  # a target that an earlier stage has still to make, or that loading will refuse
        return
    facts = backbone_of(config, cfg.method.backbone, cfg.method.window)
    with torch.device("meta"):
        empty = torch.empty(facts.vocab_size, facts.hidden_size)
        tables = Tables(empty, empty, facts.embedding_scale, facts.soft_cap)
        draft = build_draft(cfg.method, cfg.target, config, tables)
        recipe = OmegaConf.to_container(cfg.trainer.recipe, resolve=True) | {"compile": False}
        DraftTraining(draft, objective, target_tables=tables, max_steps=cfg.trainer.max_steps or 1, **recipe)


def _train(cfg: DictConfig, stage: Stage, name: str) -> None:
    rank, _ = rank_and_world()
    record = RunFolder(cfg.root, "train", name, recorded(cfg), writes=rank == 0, folder=stage.work)
    with instantiate(cfg.tracking) as tracking, record as run:
        target = load_target(cfg.target) if needs_target(cfg) else None
        data = open_data(cfg, target)
        config = data.manifest.target_config if target is None else target.config
        require_memory(cfg, config, int(data.lengths.max()))
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed.init)
            stops = () if target is None else target.stop_token_ids
            vocabulary = frequent_tokens(cfg, data, stops)
            draft = build_draft(cfg.method, cfg.target, config, data.tables, vocabulary)
            start, why = resolved(cfg.start, target)
            if why is not None:
                say(f"train: the draft starts from random weights: {why}")
            copied = initialise(draft, start, target, data.tables)
        choice = chosen(config, cfg.method.backbone)
        say(f"train: {choice.reason}")
        steps = cfg.trainer.max_steps or cfg.trainer.epochs * data.steps_per_epoch
        module = DraftTraining(
            draft,
            build_objective(cfg.method),
            target_tables=data.tables,
            tables_from=tables_from(cfg, data),
            max_steps=steps,
            anchor_seed=cfg.seed.anchors,
            **OmegaConf.to_container(cfg.trainer.recipe, resolve=True),
        )
        layers = {"family": choice.family, "own": choice.own, "reason": choice.reason}
        lineage = {"cache": data.lineage, "start": start, "copied": len(copied)}
        prompts = probe_prompts(cfg, target) if cfg.trainer.probe.every else []
        rendered = target.tokenizer.decode(prompts[0]) if prompts and target.tokenizer is not None else None
        facts, diff = provenance(sys.argv, dict(cfg.seed), lineage["cache"], rendered)
        run.write_provenance(facts, diff)
        headline = {"method": cfg.method.name, "target": cfg.target.name, "seed": cfg.seed.init, **lineage["cache"]}
        tracking.start(run, headline)
        tracking.uses(f"cache-{data.lineage['fingerprint']}", "cache", **data.lineage)
        keep = run.path / "checkpoints"
        stop = GracefulStop(keep)
        callbacks: list[Callback] = [stop]
        probe, asked = None, cfg.trainer.probe
        if prompts:
            sampling = Sampling(asked.temperature)
            probe = DecodeProbe(target, prompts, asked.every, sampling, asked.max_new_tokens, folder=keep)
        callbacks.append(probe or KeepLast(keep, cfg.trainer.validate_every or 1000))
        if cfg.trainer.lightning.get("enable_progress_bar") is not False:
            callbacks.append(TrainingProgress(f"train {cfg.method.name}"))  # after the probe, whose number it shows
        trainer = L.Trainer(
            max_steps=steps,
            max_epochs=-1,
            logger=tracking.loggers,
            callbacks=callbacks,
            log_every_n_steps=cfg.trainer.recipe.log_every,
            val_check_interval=cfg.trainer.validate_every,
            check_val_every_n_epoch=None,
            limit_val_batches=1.0 if cfg.trainer.validate_every else 0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            # Inference tensors would outlive a validation: a sharded draft gathers its weights into the same memory.
            inference_mode=False,
            **instantiate(cfg.trainer.lightning, _convert_="all"),
        )
        last = keep / "last.ckpt"
        resumed = str(last) if stage.resumes and last.exists() else None
        if resumed is not None:
            read_checkpoint(resumed)  # what cannot be read is refused by name, before any work
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
        if stop.received:
            raise KeyboardInterrupt
        best = keep / ("best.ckpt" if probe is not None else "last.ckpt")
        # From the checkpoint, so that what is written is the same whether the weights are whole or sharded here.
        written = build_draft(cfg.method, cfg.target, config, data.tables, vocabulary)
        trainer.strategy.barrier()
        step = load_published(written, best)
        trainer.strategy.barrier()  # once every rank has read it, the folder may take another name
        if rank == 0:
            save_draft(written, run.path / "draft", config, draft_settings(cfg.method, cfg.target))
        summary = {
            "method": cfg.method.name,
            "target": cfg.target.name,
            "probe_accepted_length": None if probe is None else probe.best,
            "probes": [] if probe is None else probe.history,
            "best_step": step,
            "steps": trainer.global_step,
            "parameters": trainable_parameters(written),
            "trained_tokens": module.supervised,
            "backbone": layers,
            "lineage": lineage | {"checkpoint": digest(written.state_dict().items())},
            "damage": len(getattr(data, "damage", [])),
        }
        tracking.artifact(f"draft-{name}", "draft", run.path / "draft", **summary["lineage"])
        tracking.summary({k: v for k, v in summary.items() if isinstance(v, (int, float))})
        run.finish(**summary)
        tracking.finish()
        shown = {k: summary[k] for k in ("probe_accepted_length", "best_step", "steps", "parameters")}
        stage.finish(shown, next=command("evaluate", cfg, ("target", "suite"), draft=str(stage.folder)))


def needs_target(cfg: DictConfig) -> bool:
    """Whether the target itself must be in memory: to copy layers, to probe, or to compute states online."""
    return cfg.start in ("target", AUTO) or bool(cfg.trainer.probe.every) or cfg.online


def tables_from(cfg: DictConfig, data: StepData) -> dict[str, str | None] | None:
    """Where a checkpoint's reader finds the target's tables; None: nowhere, so that the checkpoint holds them."""
    if not cfg.online:
        return {"cache": str(data.folder) if is_remote(data.folder) else str(Path(data.folder).resolve())}
    id = cfg.target.get("id")
    return None if id is None else {"target": id, "revision": cfg.target.get("revision")}


def initialise(draft: Draft, start: str, target: Any, tables: Tables) -> list[str]:
    """Give the draft its first weights as `start` says; returns what was copied. `tables` are the target's."""
    randomise(draft)
    if start == "target":
        return from_target(draft, target)
    if start in STARTS:
        return []
    copied, left = from_draft(draft, start, tables)
    said = f"; not from there: {', '.join(left)}" if left else ""
    say(f"train: {len(copied)} of {len(copied) + len(left)} tensors start from {start}{said}")
    return copied


def load_published(draft: Draft, checkpoint: Path) -> int:
    """Take over a checkpoint's published weights, the moving average where there is one; returns its optimiser step."""
    found = read_checkpoint(checkpoint)
    held = found["state_dict"]
    prefix = "average." if any(name.startswith("average.") for name in held) else "draft."
    draft.load_state_dict({k.removeprefix(prefix): v for k, v in held.items() if k.startswith(prefix)})
    return found["global_step"]


def evaluation_of(cfg: DictConfig, folder: Path, overrides: Sequence[str]) -> DictConfig:
    """The configuration of an evaluation of the draft that `cfg` trained in `folder`."""
    child, own = composed("evaluate", overrides), OmegaConf.to_container(cfg, resolve=True)
    for key in ("root", "force", "target", "suite", "tracking", "max_new_tokens", "batch_size"):
        OmegaConf.update(child, key, own[key], merge=False)
    child.draft, child.seed = str(folder), cfg.evaluation_seed
    if cfg.method.draft._target_ not in installed():
        child.methods = [cfg.method.draft._target_]
    if cfg.limit is not None:
        child.suite.limit = cfg.limit
    return child
