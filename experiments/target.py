"""specbench target: make a target folder that later stages can load, by training or from a GGUF file."""

from __future__ import annotations

import hashlib
import itertools
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from specbench.cli.assembly import composed, load_target
from specbench.cli.checks import check_before
from specbench.cli.config_groups import known_options
from specbench.cli.identity import without
from specbench.cli.recording import recorded
from specbench.cli.stages import Stage, container, say
from specbench.cli.target_argument import expand
from specbench.cli.tracked_stages import tracking_of
from specbench.data.answers.embedded_tokenizer import rendered, train_tokenizer
from specbench.data.prompts.embedded_corpus import DOMAINS, census, conversations
from specbench.files.atomic import read_object
from specbench.files.folder_swap import remove
from specbench.files.torch_checkpoints import read_checkpoint
from specbench.models import target as targets
from specbench.models.gguf_conversion import convert
from specbench.models.gguf_file import Found, at, in_package, require_reader
from specbench.models.selfcheck import settle
from specbench.models.suggestion import suggest
from specbench.models.target_files import location, raw_config, read_model, read_tokenizer
from specbench.runs.provenance import provenance
from specbench.runs.run_folder import RunFolder
from specbench.runs.settings_without_effect import without_effect
from specbench.runs.tracked_run import tracked
from specbench.training.callbacks import TrainingProgress
from specbench.training.growth import grow
from specbench.training.pretraining import CorpusBatches, LanguageModeling, initialise

WEIGHTS = "model.safetensors"
# What a target tells of the one that it started from.
HISTORY = ("command", "time", "code", "recipe", "steps", "tokens_seen", "seconds", "loss", "start")
RESULTS = ("config.json", "*.safetensors", "tokenizer.json", "provenance.json")


def run(cfg: DictConfig) -> None:
    """Make the target that `cfg` describes and write it, with its provenance, to `cfg.folder`; or `check` one."""
    if cfg.check is not None:
        print_check(cfg.check, cfg.check_dtype)
        return
    if cfg.suggest is not None:
        print(suggest(cfg.suggest).yaml(), end="")
        return
    check_before("target", cfg)
    if cfg.path is not None or cfg.package is not None:
        from_gguf(cfg)
        return
    with stage_of(cfg) as stage:
        if stage.done:
            return
        folder = stage.work
        record = RunFolder(cfg.root, "target", stage.folder.name, recorded(cfg), folder=folder)
        with tracked(tracking_of(cfg), record, target=stage.folder.name, seed=cfg.seed) as (run, wandb):
            lightning.seed_everything(cfg.seed, verbose=False)
            tokenizer = _tokenizer(cfg)
            data: CorpusBatches = instantiate(cfg.data, _convert_="all", tokenizer=tokenizer)
            model = initialise(targets.new_causal_lm(container(cfg.model))).train()
            if cfg.start is not None:
                grow(model, read_model(_start(cfg), None, torch.float32, raw_config(_start(cfg))))
            module: LanguageModeling = instantiate(cfg.training, _convert_="all", model=model)
            if cfg.compile:
                module.model.compile(dynamic=True)
            last = folder / "checkpoints" / "last.ckpt"
            trainer = _trainer(cfg, folder, module, wandb.loggers)
            resumed = last if stage.resumes and last.exists() else None
            if resumed is not None:
                read_checkpoint(resumed)  # what cannot be read is refused by name, before any work
            trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
            facts = publish(cfg, module, data, trainer.global_step, run)
            run.finish(
                target=stage.folder.name,
                metrics={"loss": facts["loss"]},
                **{key: facts[key] for key in ("steps", "tokens_seen", "left_out_for_length")},
                lineage={"weights": facts["sha256"]},
            )
        stage.finish(facts["loss"] | {"tokens_seen": facts["tokens_seen"], "seconds": facts["seconds"]})


def from_gguf(cfg: DictConfig) -> Path:
    """Make the folder target of a GGUF file, skipped where it is there; returns the folder.

    A file that cannot be read leaves no new folder behind, which another file would find taken.
    """
    stage = stage_of(cfg)
    try:
        return _converted(cfg, stage)
    except ValueError:
        if stage.state == "new":
            remove(stage.folder)
        raise


def _converted(cfg: DictConfig, stage: Stage) -> Path:
    with stage:
        if stage.done:
            return stage.folder
        record = RunFolder(cfg.root, "target", stage.folder.name, recorded(cfg), folder=stage.work)
        with tracked(tracking_of(cfg), record, target=stage.folder.name) as (run, _):
            began, found = time.monotonic(), located(cfg)
            with tempfile.TemporaryDirectory(dir=stage.work, prefix=".parts-") as parts:
                file = found.whole(Path(parts))
                facts = convert(file, stage.work, cfg.dtype, cfg.tokenizer, lambda line: say(f"target: {line}"))
            run_facts, diff = provenance([Path(sys.argv[0]).name, *sys.argv[1:]], {})
            facts["licence"] = facts["licence"] or found.origin.get("licence")
            own = {"source": "gguf", **found.origin, **facts, "gguf_sha256": found.sha256()}
            own["seconds"] = round(time.monotonic() - began, 1)
            run.write_provenance(run_facts | own, diff)
            run.finish(target=stage.folder.name, parameters=facts["parameters"], lineage={"gguf": own["gguf_sha256"]})
        told = {"parameters": facts["parameters"], "licence": str(facts["licence"]), "seconds": own["seconds"]}
        told["tokenizer"] = "; ".join(facts["compared"])
        stage.finish(told, next=f"specbench target check={stage.folder}")
    return stage.folder


def located(cfg: DictConfig) -> Found:
    """The GGUF file that the settings name."""
    return in_package(cfg.package) if cfg.package is not None else at(cfg.path)


def check(cfg: DictConfig) -> None:
    """Refuse a GGUF file that is not there, missing packages that read it, and a model to start from of other sizes."""
    if cfg.path is not None or cfg.package is not None:
        require_reader()
        located(cfg)
    if cfg.start is not None:
        _check_start(cfg)


def print_check(name: str, dtype: str) -> None:
    """Print the result of the check of a target by layer. Errors: ValueError if the target cannot be used."""
    words = expand([f"target={name}"], known_options("target"))
    target = composed("cache", [*words, f"target.dtype={dtype}"]).target
    try:
        print(settle(load_target(target)).text())
    except ValueError as error:
        report = getattr(error, "report", None) or getattr(error.__cause__, "report", None)
        if report is not None:
            print(report.text())
        raise


def stage_of(cfg: DictConfig) -> Stage:
    """The stage of this target, not entered."""
    instead = "another name= or folder="
    inputs = None
    if cfg.start is not None:
        inputs = {"start": _digest(_start(cfg))}
    if cfg.package is not None:
        inputs = {"package": " ".join(f"{k}=={v}" for k, v in sorted(located(cfg).origin["packages"].items()))}
    return Stage("target", Path(cfg.folder), cfg, force=cfg.force, results=RESULTS, inputs=inputs, instead=instead)


def publish(cfg: DictConfig, module: LanguageModeling, data: CorpusBatches, steps: int, run: RunFolder) -> dict:
    """Write the target in `cfg.dtype` with tokenizer and provenance; the losses are those of the written weights."""
    folder = run.path
    shipped = targets.new_causal_lm(container(cfg.model))
    shipped.load_state_dict(module.model.state_dict())
    shipped.to(getattr(torch, cfg.dtype))
    stop, pad = data.tokenizer.eos_token_id, data.tokenizer.pad_token_id
    for settings in (shipped.config, shipped.generation_config):
        settings.eos_token_id, settings.pad_token_id, settings.bos_token_id = stop, pad, None
    targets.save(shipped, data.tokenizer, folder)
    rounded = LanguageModeling(shipped.float(), steps=1)
    quiet = lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
                              enable_model_summary=False)  # fmt: skip
    losses = quiet.validate(rounded, data, verbose=False)[0]
    first = next(conversations(DOMAINS[0], "train", 1, cfg.data.seed))["messages"]
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    facts, diff = provenance(command, {"weights": cfg.seed, "data": cfg.data.seed}, first_prompt=rendered(first))
    facts |= {
        "recipe": without(recorded(cfg), without_effect("target")),
        "corpus": census(),
        "left_out_for_length": data.left_out,
        "steps": steps,
        "tokens_seen": module.tokens_seen,
        "seconds": round(module.elapsed(), 1),
        "loss": {name.removeprefix("val/loss/"): round(value, 4) for name, value in losses.items()},
        "dtype": cfg.dtype,
        "sha256": _digest(folder),
    }
    if cfg.start is not None:
        facts["start"] = _history(_start(cfg))
    run.write_provenance(facts, diff)
    return facts


def _start(cfg: DictConfig) -> Path:
    return Path(location(cfg.start))


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def _history(folder: Path) -> dict:
    """What is known of the training of the model that this one started from."""
    told = folder / "provenance.json"
    known = read_object(told) if told.is_file() else {}
    return {key: known[key] for key in HISTORY if key in known} | {"sha256": _digest(folder)}


def _check_start(cfg: DictConfig) -> None:
    """Refuse a folder whose model cannot be the start of this one."""
    if not (_start(cfg) / WEIGHTS).is_file():
        raise ValueError(f"start={cfg.start}: no {WEIGHTS} in this folder; give one that `specbench target` trained")
    theirs, ours = raw_config(_start(cfg)), container(cfg.model)
    for key, value in ours.items():
        if key != "num_hidden_layers" and theirs.get(key) != value:
            raise ValueError(
                f"start={cfg.start}: its {key} is {theirs.get(key)} and model.{key} is {value}; set the same, only the "
                "number of layers can differ"
            )
    if theirs["num_hidden_layers"] > ours["num_hidden_layers"]:
        raise ValueError(
            f"start={cfg.start}: it has {theirs['num_hidden_layers']} layers, more than "
            f"model.num_hidden_layers={ours['num_hidden_layers']}; raise that"
        )


def _tokenizer(cfg: DictConfig):
    if cfg.start is not None:
        return read_tokenizer(_start(cfg), None, cfg.vocabulary)
    texts = itertools.chain.from_iterable(
        (rendered(c["messages"]) for c in conversations(d, "train", cfg.data.limit, cfg.data.seed)) for d in DOMAINS
    )
    return train_tokenizer(texts, cfg.vocabulary, cfg.data.length)


def _trainer(cfg: DictConfig, folder: Path, module: LanguageModeling, loggers: list[Logger]) -> lightning.Trainer:
    # The weights after a step are the ones wanted here; the warning asks whether those before it were meant.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    keeper = ModelCheckpoint(folder / "checkpoints", filename="last", every_n_train_steps=cfg.every, save_top_k=1,
                             enable_version_counter=False)  # fmt: skip
    bars = [TrainingProgress("target", module.progress)] if cfg.trainer.enable_progress_bar else []
    return lightning.Trainer(
        **container(cfg.trainer),
        logger=loggers,
        callbacks=[keeper, *bars],
        val_check_interval=cfg.every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
