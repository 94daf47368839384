"""specbench answers: the target answers every prompt, on servers or in this process; preview=N shows the loss mask."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from specbench.cli.assembly import load_target
from specbench.cli.checks import check_before
from specbench.cli.following import command
from specbench.cli.stages import Stage, say
from specbench.cli.tracked_stages import tracked_output
from specbench.data.answers import generation as answers
from specbench.data.answers.chat import render
from specbench.data.answers.engines import AnswerPolicy, Engine, ServerEngine
from specbench.data.answers.kept_states import KeptStates
from specbench.data.answers.servers import ServerPool
from specbench.data.answers.templates import ChatError, date_of, server_options, template_hash, template_of
from specbench.data.prompts import preparation as prompts
from specbench.decoding.sampling import Sampling
from specbench.files.atomic import plain
from specbench.library.answers import engine_of
from specbench.models.target import Target
from specbench.models.target_files import location
from specbench.progress import Progress

RESULTS = ("answers.jsonl", "header.json")
DEFINITE = ("chunk", "batch_size", "concurrency", "max_new_tokens")  # settings that null does not turn off


def run(cfg: DictConfig) -> None:
    """Write `root/answers/NAME/TARGET` (validation answers into a folder below it)."""
    check_before("answers", cfg)
    source = Path(cfg.root) / "prompts" / cfg.data.name
    if prompts.finished(source) is None:
        raise ValueError(f"{source} holds no finished prompts: run `specbench prompts data={cfg.data.name}` first")
    folder = Path(cfg.root) / "answers" / cfg.data.name / cfg.target.name
    folder = folder if cfg.split == "train" else folder / cfg.split
    limit = min((n for n in (cfg.count, cfg.preview) if n is not None), default=None)
    target = None if cfg.servers else load_target(cfg.target, cfg.device)
    tokenizer = target.tokenizer if target else _tokenizer(cfg.target)
    if tokenizer is None:
        raise ValueError(f"target {cfg.target.name} has no tokenizer: answers need one with a chat template")
    # Without a revision, the hash of the weights identifies the target.
    revision = cfg.target.revision or (target.weights_hash if target else None)
    policy = policy_of(cfg, revision, template_hash(tokenizer), date_of(tokenizer))
    options = server_options(template_of(tokenizer), cfg.thinking) if cfg.servers else {}
    with open(source / f"{cfg.split}.jsonl", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    total = sum(1 for _ in prompts.read(source, cfg.split, limit))
    if not total:
        raise ValueError(f"{source / f'{cfg.split}.jsonl'} holds no prompt: there is nothing to answer")
    if not cfg.force:
        answers.check_header(folder, policy)
    identity = {"policy": plain(vars(policy)), "prompts": digest, "split": cfg.split}
    instead = "another root= or data.name="
    with Stage("answers", folder, identity, force=cfg.force, results=RESULTS, mends=RESULTS, instead=instead) as stage:
        if stage.done and cfg.preview is None and not _covers(stage, total):
            stage.reopen()  # more prompts are asked for than were
        if not stage.done:
            name = "-".join(["answers", cfg.data.name, cfg.target.name, *([] if cfg.split == "train" else [cfg.split])])
            about = {"target": cfg.target.name, "data": cfg.data.name}
            with tracked_output("answers", name, stage, cfg, {"decoding": cfg.seed}, **about) as (run, _):
                engine = _engine(cfg, target, tokenizer, options, stage.work)
                with Progress("answers", total, "prompts") as bar:
                    counts = answers.collect(
                        prompts.read(source, cfg.split, limit),
                        engine,
                        stage.work,
                        policy,
                        progress=lambda kind: bar.advance(),
                    )
                missing = total - counts["answered"] - counts["kept"]
                run.finish(**counts, missing=missing)
            if missing:  # not finished: the next run tries them again
                say(
                    f"answers: {missing} of {total} prompts have no answer ({counts}) in {stage.work}; failed.jsonl "
                    "has the causes, run again to retry them"
                )
            elif cfg.preview is None:
                done = counts | {"answers": len(answers.answered(stage.work))}
                stage.finish(done, next=command("cache", cfg, ("target", "data")))
        if cfg.preview is not None:
            show(islice(answers.read(stage.work), cfg.preview), tokenizer, cfg.thinking)


def check(cfg: DictConfig) -> None:
    """Check split, counts and generation settings, and that a server answers."""
    if cfg.split not in prompts.SPLITS:
        raise ValueError(f"split={cfg.split}: choose one of {', '.join(prompts.SPLITS)}")
    for key in ("count", "preview", "chunk", "batch_size", "concurrency", "max_new_tokens"):
        if cfg[key] is not None and cfg[key] < 1:
            raise ValueError(f"{key}={cfg[key]}: give 1 or more{'' if key in DEFINITE else ', or null'}")
    policy = policy_of(cfg)
    Sampling(policy.temperature, policy.top_k, policy.top_p, policy.min_p)
    if cfg.servers:
        patience = instantiate(cfg.patience)
        asyncio.run(_reached(ServerPool(list(cfg.servers), cfg.model, patience=patience, api_key=cfg.api_key)))


async def _reached(pool: ServerPool) -> None:
    """Connect as the stage will; ValueError for servers that do not answer or serve another model."""
    async with pool:
        pass


def policy_of(
    cfg: DictConfig, revision: str | None = None, template: str | None = None, date: str | None = None
) -> AnswerPolicy:
    """The generation settings of the answers."""
    return AnswerPolicy(
        model=cfg.target.id,
        revision=revision,
        template=template,
        thinking=cfg.thinking,
        **cfg.sampling,
        max_new_tokens=cfg.max_new_tokens,
        seed=cfg.seed,
        date=date,
    )


def _covers(stage: Stage, total: int) -> bool:
    """Whether a finished stage answered as many prompts as requested. Errors: ValueError if it answered more."""
    there = len(answers.answered(stage.folder))
    if there > total:
        raise ValueError(
            f"answers: {stage.folder} holds {there} answers and {total} are asked for: leave out count=, choose "
            f"{stage.instead}, or force=true to replace them once the new ones are complete"
        )
    return there == total


def show(rows: Iterator[dict[str, Any]], tokenizer: Any, thinking: bool | None) -> None:
    """Print conversations with their supervised tokens in colour, and those that cannot be encoded with the reason."""
    console = Console()
    for row in rows:
        try:
            coded = answers.encoded(row, tokenizer, thinking)
        except ChatError as error:
            console.print(f"{row['id']}: {error}", style="red", markup=False)
            continue
        console.rule(f"{row['id']}: {len(coded.tokens)} tokens, {sum(coded.loss_mask)} supervised")
        console.print(render(tokenizer, coded))


def _engine(cfg: DictConfig, target: Target | None, tokenizer: Any, options: dict[str, Any], folder: Path) -> Engine:
    """What answers: servers, or the target in this process, which can keep its states below `folder`."""
    if target is None:
        patience = instantiate(cfg.patience)
        return ServerEngine(list(cfg.servers), cfg.model, cfg.concurrency, patience, cfg.api_key, options, tokenizer)
    kept = KeptStates(folder, target) if cfg.get("keep_states") else None  # records of earlier versions lack it
    own = (cfg.max_new_tokens, cfg.batch_size, cfg.token_budget, cfg.chunk)
    return engine_of(target, *own, kept, cfg.thinking)


def _tokenizer(target: DictConfig) -> Any:
    from transformers import AutoTokenizer  # slow to import

    try:
        return AutoTokenizer.from_pretrained(location(target.id), revision=target.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"the tokenizer of {target.id!r} cannot be loaded ({said}): set target.id=FOLDER") from error
