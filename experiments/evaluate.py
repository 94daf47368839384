"""specbench evaluate: speculative decoding of a suite, one record a prompt and turn."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from analysis.statistics.headline import PER_REQUEST
from experiments.mirror import mirror
from specbench.checkpoints.draft_folder import FormatError, fetch, load_draft, read_config, taps_of
from specbench.cli.assembly import load_target, own_methods
from specbench.cli.checks import check_before
from specbench.cli.errors import naming
from specbench.cli.following import command
from specbench.cli.identity import identity
from specbench.cli.launching import rank_and_world
from specbench.cli.recording import recorded
from specbench.cli.stages import Stage, say
from specbench.data.prompts.benchmarks import Benchmarks
from specbench.decoding.loop import Limits
from specbench.decoding.sampling import Sampling
from specbench.decoding.scheduling import StaticThreshold
from specbench.drafts.baselines import SLOTS, SMALL, Baseline, Small, baseline, is_baseline, short_name
from specbench.drafts.draft import Draft
from specbench.evaluation.audit import verdict
from specbench.evaluation.decoding import decode_suite, facts_of
from specbench.evaluation.draft_evaluation import THINKING, Protocol
from specbench.library.evaluation import PLAIN, headline_of
from specbench.models.target import Target
from specbench.progress import Progress
from specbench.runs.provenance import provenance
from specbench.runs.run_folder import RunFolder, folder_name, read_settings, read_summary
from specbench.training.draft_training import digest

RESULTS = ("records.parquet", "rounds.jsonl", "summary.json", "config.yaml")


def run(cfg: DictConfig) -> Path:
    """Decode every prompt with the draft and write the run folder; returns it."""
    check_before("evaluate", cfg)
    source = source_of(cfg.draft)
    about = lineage_of(cfg.draft, source, cfg.target.name)
    with stage_of(cfg, about) as stage:
        if not stage.done:
            _evaluate(cfg, stage, stage.folder.name, source, about)
    return stage.folder


def stage_of(cfg: DictConfig, about: dict[str, Any] | None = None) -> Stage:
    """The stage of this evaluation, not entered; one without a name is named after its draft."""
    if cfg.name is None and about is None:
        about = lineage_of(cfg.draft, source_of(cfg.draft), cfg.target.name)
    name = cfg.name
    if name is None and about is not None:
        name = run_name(cfg, about)
    folder = Path(cfg.root) / "runs" / "evaluate" / folder_name(name, "a run folder")
    return Stage("evaluate", folder, cfg, force=cfg.force, results=RESULTS)


def check(cfg: DictConfig) -> None:
    """Refuse what an evaluation would refuse once target and draft are loaded: how to decode, and what."""
    protocol_of(cfg, ())
    instantiate(cfg.suite, _convert_="all")


def source_of(draft: str) -> Path | None:
    """The draft folder that `draft=` means: itself, or draft/ of a training run; None where there is no folder."""
    if draft == PLAIN or is_baseline(draft):
        return None
    path = fetch(draft)
    if (path / "draft" / "config.json").is_file():
        return path / "draft"
    if (path / "summary.json").is_file():
        raise FormatError(f"draft={draft}: this run has no draft yet ({read_summary(path)['status']}); train it first")
    return path


def lineage_of(draft: str, source: Path | None, target: str) -> dict[str, Any]:
    """Method, training seed and parent of a draft, from its training run where it has one."""
    if source is None:
        method = f"small-{short_name(draft.removeprefix(SMALL))}" if draft.startswith(SMALL) else draft
        return {"method": method, "seed": 0, "parents": []}
    if (Path(draft) / "summary.json").is_file():
        summary = read_summary(draft)
        seed = read_settings(draft).get("seed")
        if not isinstance(seed, dict) or not isinstance(seed.get("init"), int):
            raise ValueError(f"{Path(draft) / 'config.yaml'} has no seed.init: it is not the record of a training")
        if summary.get("target") not in (None, target):
            raise ValueError(
                f"draft={draft} was trained for target {summary['target']}; evaluate it with target={summary['target']}"
            )
        return {
            "method": summary["method"],
            "seed": seed["init"],
            "parents": [str(draft)],
            "costs": {
                "draft_parameters": summary.get("parameters"),
                "training_tokens": summary.get("trained_tokens"),
                "cache_bytes": summary.get("lineage", {}).get("cache", {}).get("bytes"),
            },
        }
    config = read_config(source)
    architecture = (config.get("architectures") or ["draft"])[0]
    return {"method": architecture, "seed": 0, "parents": []}


def run_name(cfg: DictConfig, about: dict[str, Any]) -> str:
    """Draft, suite, temperature and a digest of everything that decides the numbers."""
    code = identity("evaluate", cfg).code
    return f"{about['method']}-{cfg.target.name}-{cfg.suite.name}-t{cfg.temperature:g}-s{about['seed']}-{code}"


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
    return Protocol(sampling, limits, scheduler, cfg.slots, cfg.suite.turns, cfg.thinking, cfg.seed, forced, audit)


def load_pair(cfg: DictConfig, source: Path | None) -> tuple[Target, Draft | Baseline | None]:
    """The target with the taps that the draft reads, and the draft on its device."""
    about = cfg.target.copy()
    if cfg.get("stop_token_ids") is not None:
        about.stop_token_ids = list(cfg.stop_token_ids)
    if source is None:
        with open_dict(about):
            about.target_layer_ids = []
        target = load_target(about, cfg.device)
        return target, None if cfg.draft == PLAIN else baseline(cfg.draft, target, cfg.get("slots") or SLOTS)
    methods = own_methods(cfg.get("methods"))
    with naming("draft", cfg.draft):
        about.target_layer_ids = taps_of(source, methods)
    target = load_target(about, cfg.device)
    with naming("draft", cfg.draft):
        draft = load_draft(source, target.tables, target.dtype, methods=methods).to(target.device)
    if cfg.get("slots") is not None and cfg.slots > draft.block_size:
        raise ValueError(
            f"slots={cfg.slots}: the block of draft={cfg.draft} holds {draft.block_size}; ask for at most so many, or "
            "leave slots out"
        )
    if draft.backbone.hidden_size != target.tables.embedding.shape[-1]:
        raise ValueError(
            f"draft={cfg.draft} has width {draft.backbone.hidden_size} and target {target.name} has "
            f"{target.tables.embedding.shape[-1]}: they do not belong together"
        )
    return target, draft


def _evaluate(cfg: DictConfig, stage: Stage, name: str, source: Path | None, about: dict[str, Any]) -> None:
    rank, _ = rank_and_world()
    record = RunFolder(cfg.root, "evaluate", name, recorded(cfg), writes=rank == 0, folder=stage.work)
    with instantiate(cfg.tracking) as tracking, record as run:
        suite: Benchmarks = instantiate(cfg.suite, _convert_="all")
        prompts = suite.load()
        target, draft = load_pair(cfg, source)
        protocol = protocol_of(cfg, target.stop_token_ids)
        lineage = {
            "draft": weights_of(draft),
            "target": target.weights_hash,
            "parents": about["parents"],
        }
        facts, diff = provenance(sys.argv, {"decoding": cfg.seed, "init": about["seed"]}, None, first_prompt(prompts))
        run.write_provenance(facts, diff)
        tracking.start(run, {"method": about["method"], "target": cfg.target.name, "suite": suite.name})
        labels = {
            "run": name,
            "method": about["method"],
            "target": cfg.target.name,
            "suite": suite.name,
            "seed": about["seed"],
        }
        turns = sum(len(p.turns or (0,)) if suite.turns == "all" else 1 for p in prompts)
        with Progress(f"evaluate {about['method']} at T={cfg.temperature:g}", turns, "prompts") as bar:
            done = decode_suite(
                run,
                target,
                draft,
                suite,
                protocol,
                labels,
                loggers=tracking.loggers,
                devices=cfg.devices,
                progress=lambda answered: bar.advance(),
            )
        if rank:
            return
        numbers = headline_of(done, draft is None)
        summary = facts_of(target, draft, suite, protocol, labels)
        costs = {"draft_parameters": draft.parameters_count} if isinstance(draft, Small) else about.get("costs", {})
        summary |= {"metrics": numbers, "lineage": lineage, "training_seed": about["seed"], **costs}
        mirror(tracking, run, about["method"], numbers)
        tracking.uses(f"draft-{short_name(cfg.draft)}", "draft", **lineage)
        if protocol.audit:
            summary["audit"] = verdict([item.record["audit"] for item in done], cfg.audit_spacings)
        run.finish(**summary)
        tracking.finish()
        shown = {k: numbers[k]["value"] for k in ("accepted_length", PER_REQUEST) if k in numbers}
        if "expected_length" in numbers:
            shown["expected_length"] = numbers["expected_length"]["value"]
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


def weights_of(draft: Draft | Baseline | None) -> str | None:
    """What identifies a draft: the digest of its weights, or a baseline's own name for itself."""
    return draft.weights_hash if isinstance(draft, Baseline) else draft and digest(draft.state_dict().items())


def first_prompt(prompts: list[Any]) -> str:
    """The first prompt as text, or its ids."""
    return prompts[0].turns[0] if prompts[0].turns else str(list(prompts[0].prompt_ids or ()))
