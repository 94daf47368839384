"""specbench evaluate: speculative decoding of a suite, one record per prompt and turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from analysis.statistics.headline import PER_REQUEST
from specbench.cli.assembly import load_pair
from specbench.cli.checks import check_before
from specbench.cli.following import command
from specbench.cli.identity import identity
from specbench.cli.launching import rank_and_world
from specbench.cli.recording import recorded
from specbench.cli.stages import Stage, say
from specbench.cli.tracked_stages import tracking_of
from specbench.data.answers.engines import AnswerPolicy
from specbench.data.prompts.benchmarks import Benchmarks
from specbench.decoding.loop import Limits
from specbench.decoding.sampling import Sampling
from specbench.decoding.scheduling import StaticThreshold
from specbench.drafts.baselines import short_name
from specbench.evaluation.draft_evaluation import THINKING, Protocol
from specbench.evaluation.engine_counters import compare
from specbench.files.atomic import write_json
from specbench.files.redaction import redact
from specbench.library.drafts import PLAIN, DraftRecord, draft_place, record_of
from specbench.library.evaluation import evaluate_into
from specbench.library.tracked_evaluation import log_evaluation
from specbench.progress import Progress
from specbench.runs.run_folder import RunFolder, folder_name
from specbench.runs.tracked_run import tracked

RESULTS = ("records.parquet", "rounds.jsonl", "summary.json", "config.yaml")


def run(cfg: DictConfig) -> Path:
    """Decode every prompt with the draft and write the run folder; returns it."""
    check_before("evaluate", cfg)
    folder = draft_place(cfg.draft)
    about = record_of(cfg.draft, folder, cfg.target.name)
    with stage_of(cfg, about) as stage:
        if not stage.done:
            _evaluate(cfg, stage, folder, about)
    if cfg.get("engine") is not None:  # records of earlier versions lack it
        beside_engine(cfg, stage.folder)
    return stage.folder


def beside_engine(cfg: DictConfig, folder: Path) -> None:
    """Send the prompts of a finished evaluation to a running engine; print its counters beside ours, and write them
    to engine.json."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    model = cfg.get("engine_model") or cfg.target.id
    policy = AnswerPolicy(
        model=model,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=cfg.top_k,
        min_p=cfg.min_p,
        max_new_tokens=cfg.max_new_tokens,
        seed=cfg.seed,
    )
    stops = cfg.stop_token_ids if cfg.stop_token_ids is not None else cfg.target.stop_token_ids
    with Progress(f"evaluate on {redact(cfg.engine)}", 1, "pass"):
        found = compare(cfg.engine, lines, policy, list(stops or ()), cfg.batch_size)
    for line in found.table(greedy=cfg.temperature == 0):
        say(line)
    write_json(folder / "engine.json", {"engine": redact(cfg.engine), "model": model, **found.record()})


def stage_of(cfg: DictConfig, about: DraftRecord | None = None) -> Stage:
    """The stage of this evaluation, not entered; one without a name is named after its draft."""
    if cfg.name is None and about is None:
        about = record_of(cfg.draft, draft_place(cfg.draft), cfg.target.name)
    name = cfg.name
    if name is None and about is not None:
        name = run_name(cfg, about)
    folder = Path(cfg.root) / "runs" / "evaluate" / folder_name(name, "a run folder")
    return Stage("evaluate", folder, cfg, force=cfg.force, results=RESULTS)


def check(cfg: DictConfig) -> None:
    """Check the decoding settings and the prompts before target and draft are loaded."""
    protocol_of(cfg, ())
    instantiate(cfg.suite, _convert_="all")


def run_name(cfg: DictConfig, about: DraftRecord) -> str:
    """Draft, suite, temperature and a digest of everything that affects the numbers."""
    code = identity("evaluate", cfg).code
    return f"{about.method}-{cfg.target.name}-{cfg.suite.name}-t{cfg.temperature:g}-s{about.seed}-{code}"


def protocol_of(cfg: DictConfig, stop_token_ids: Sequence[int]) -> Protocol:
    """How to decode, from the configuration and the target's stop tokens."""
    scheduler = instantiate(cfg.scheduler)
    if cfg.confidence_threshold is not None:
        if not scheduler.label.startswith("fixed"):
            raise ValueError(
                f"confidence_threshold={cfg.confidence_threshold} and scheduler={scheduler.label} both cut proposals; "
                "give one of them"
            )
        scheduler = StaticThreshold(cfg.confidence_threshold)
    limits = Limits(cfg.max_new_tokens, tuple(stop_token_ids), cfg.batch_size, cfg.token_budget, cfg.accounting)
    sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p)
    forced, audit = cfg.get("teacher_forced", False), cfg.get("audit", False)
    for name, asked in (("teacher_forced", forced), ("audit", audit)):
        if asked and cfg.draft == PLAIN:
            raise ValueError(f"{name}=true examines what a draft proposes and draft={PLAIN} proposes nothing")
    tree = None if cfg.get("tree") is None else instantiate(cfg.tree, _convert_="all")
    return Protocol(
        sampling, limits, scheduler, cfg.slots, cfg.suite.turns, cfg.thinking, cfg.seed, forced, audit, tree
    )


def _evaluate(cfg: DictConfig, stage: Stage, folder: Path | None, about: DraftRecord) -> None:
    rank, _ = rank_and_world()
    record = RunFolder(cfg.root, "evaluate", stage.folder.name, recorded(cfg), writes=rank == 0, folder=stage.work)
    headline = {"method": about.method, "target": cfg.target.name, "suite": cfg.suite.name}
    with tracked(tracking_of(cfg), record, **headline) as (run, tracking):
        suite: Benchmarks = instantiate(cfg.suite, _convert_="all")
        prompts = suite.load()
        target, draft = load_pair(cfg, folder)
        protocol = protocol_of(cfg, target.stop_token_ids)
        turns = sum(len(p.turns or (0,)) if suite.turns == "all" else 1 for p in prompts)
        with Progress(f"evaluate {about.method} at T={cfg.temperature:g}", turns, "prompts") as bar:
            summary = evaluate_into(
                run,
                target,
                draft,
                suite,
                protocol,
                about,
                loggers=tracking.loggers,
                devices=cfg.devices,
                progress=lambda answered: bar.advance(),
                audit_spacings=cfg.audit_spacings,
            )
        if summary is None:
            return
        numbers = summary["metrics"]
        log_evaluation(tracking, run, about.method, numbers)
        tracking.uses(f"draft-{short_name(cfg.draft)}", "draft", **summary["lineage"])
        tracking.finish()
        shown = {k: numbers[k]["value"] for k in ("accepted_length", PER_REQUEST, "expected_length") if k in numbers}
        if protocol.audit:
            found = summary["audit"]
            shown |= {f"audit {key}": found[key] for key in ("texts", "identical", "ties", "violations")}
            if found["violations"]:
                say(
                    f"AUDIT: {found['violations']} of {found['texts']} texts leave the target's greedy text by more "
                    f"than {cfg.audit_spacings:g} spacings of {target.dtype}: verification is not lossless here "
                    "(records.parquet, column audit)"
                )
        # Plain decoding has no round to compare; every other run is shown with those that share its columns.
        same = {"target": cfg.target.name, "suite": suite.name, "accounting": cfg.accounting}
        same["thinking"] = THINKING[protocol.thinking]
        stage.finish(shown, next=None if draft is None else command("compare", cfg, **same))
