"""specbench speed: cost curves, engine steps per second, and measured speedup over plain decoding."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from analysis.statistics import speedup as speedups
from analysis.statistics.headline import PER_REQUEST
from experiments import trainspeed
from specbench.cli.assembly import load_pair
from specbench.cli.checks import check_before
from specbench.cli.following import command
from specbench.cli.recording import recorded
from specbench.cli.stages import Stage, say
from specbench.cli.tracked_stages import tracking_of
from specbench.data.answers.chat import prompt_ids
from specbench.data.prompts.benchmarks import first_prompt
from specbench.decoding.cost_profile import CostProfile
from specbench.decoding.loop import Limits
from specbench.decoding.sampling import Sampling
from specbench.decoding.scheduling import HardwareAware
from specbench.decoding.tree_shapes import TreeShape
from specbench.drafts.baselines import Baseline
from specbench.drafts.draft import Draft
from specbench.evaluation.draft_evaluation import Protocol
from specbench.files.atomic import read_json
from specbench.library.drafts import PLAIN, DraftRecord, draft_place, record_of, weights_of
from specbench.models.target import Target
from specbench.profiling.decoding_speed import (
    cost_profile,
    draft_cost,
    predicted_speedup,
    scheduler_cost,
    step_cost,
    target_cost,
    tree_cost,
    wall_clock,
)
from specbench.profiling.kept_parts import KeptParts
from specbench.progress import Progress
from specbench.runs.provenance import hardware, provenance
from specbench.runs.run_folder import RunFolder, folder_name, read_lines
from specbench.runs.tracked_run import tracked
from specbench.serving.simulation_check import check as simulated

# What is measured so far, for a run that is stopped.
PARTS = "parts.json"
# Parts of a round as they are told, and the metrics that hold them.
SPLIT = (("propose", "draft"), ("verify", "verify"), ("commit", "commit"), ("overhead", "overhead"))
RESULTS = ("costs.csv", "clock.csv", "profile.json", "simulation_check.csv", "summary.json", "config.yaml")


def run(cfg: DictConfig) -> Path:
    """Write costs.csv (one row a measured point), profile.json (SPS(B) for `specbench serve`) and the summary."""
    check_before("speed", cfg)
    if cfg.what == "train":
        return trainspeed.run(cfg)
    place = draft_place(cfg.draft)
    about = record_of(cfg.draft, place, cfg.target.name)
    config = recorded(cfg)
    with stage_of(cfg, about) as stage:
        if stage.done:
            return stage.folder
        folder = stage.work
        run = RunFolder(cfg.root, "speed", stage.folder.name, config, folder=folder)
        headline = {"method": about.method, "target": cfg.target.name, "suite": cfg.suite.name}
        with tracked(tracking_of(cfg), run, **headline) as (record, wandb):
            prompts = instantiate(cfg.suite, _convert_="all").load()
            target, draft = load_pair(cfg, place)
            record.write_provenance(*provenance(sys.argv, {"decoding": 0}, None, first_prompt(prompts)))
            tokens = [_tokens(target, p, cfg.thinking) for p in prompts]
            parts = KeptParts(folder / PARTS, stage.resumes)
            rows, clock, profile = measure(cfg, target, draft, tokens, parts, [p.benchmark for p in prompts])
            pd.DataFrame(rows).to_csv(folder / "costs.csv", index=False)
            profile.save(folder / "profile.json")
            held = parts.take("simulation check", lambda: _held(cfg, target, draft, tokens), _held_line)
            pd.DataFrame(held).to_csv(folder / "simulation_check.csv", index=False)
            timed = clock.pop("batches")
            pd.DataFrame(timed).to_csv(folder / "clock.csv", index=False)
            how = _protocol(cfg, target)
            nodes = None if how.tree is None else how.tree.nodes
            metrics = _predicted(rows, clock, cfg.slots or draft.block_size, cfg.batch_size, nodes) | clock
            metrics["simulation_ratio"] = {str(row["requests"]): row["ratio"] for row in held}
            metrics["scheduler_seconds"] = _schedule(profile, max(cfg.batch_sizes), cfg.slots or draft.block_size)
            wandb.rows("costs", rows)
            wandb.rows("simulation_check", held)
            wandb.rows("clock", timed)
            record.finish(
                method=about.method,
                target=cfg.target.name,
                suite=cfg.suite.name,
                metrics=metrics,
                # Comparisons show these beside evaluations of the very same draft.
                speedup_measured=clock["speedup"],
                speedup_predicted=metrics["predicted_speedup"],
                speedup_low=clock["speedup_low"],
                speedup_high=clock["speedup_high"],
                lineage={"draft": weights_of(draft), "parents": about.parents, "target": target.weights_hash},
                # What the speedup belongs to: a comparison shows it beside nothing else.
                protocol=how.facts(str(target.dtype), draft.block_size),
                training_seed=about.seed,
            )
        shown = ("speedup", "speedup_low", "speedup_high", "speedup_processor", "predicted_speedup", "accepted_length")
        shown = (*shown, "break_even_length", "tokens_per_second")
        shown = (*shown, PER_REQUEST)
        stage.finish(
            {key: metrics[key] for key in (*shown, "loop_plain", "loop_speculative") if key in metrics},
            next=_next(cfg, stage.folder, draft),
        )
    return stage.folder


def stage_of(cfg: DictConfig, about: DraftRecord | None = None) -> Stage:
    """The stage of this measurement, not entered; one without a name is named after its draft."""
    if cfg.what == "train":
        return trainspeed.stage_of(cfg)
    if cfg.name is None and about is None:
        about = record_of(cfg.draft, draft_place(cfg.draft), cfg.target.name)
    name = cfg.name
    if name is None and about is not None:
        tree = "" if cfg.get("tree") is None else f"-{instantiate(cfg.tree, _convert_='all').label}"
        name = f"{about.method}-{cfg.target.name}{tree}-s{about.seed}"
    folder = Path(cfg.root) / "runs" / "speed" / folder_name(name, "a run folder")
    return Stage("speed", folder, cfg, force=cfg.force, results=RESULTS)


def check(cfg: DictConfig) -> None:
    """Check settings that would otherwise cause an error only after the measurement."""
    if cfg.what not in ("decode", "train"):
        raise ValueError(f"what={cfg.what}: choose decode or train")
    if cfg.what == "train":
        return
    if cfg.draft is None:
        raise ValueError(
            "speed needs draft=... (a draft folder, a training run or a baseline), or `specbench speed train`"
        )
    if cfg.draft == PLAIN:
        raise ValueError(f"draft={PLAIN} is what every draft is timed against; name another one")
    if cfg.clock_library and (cfg.batch_size != 1 or cfg.temperature != 0):
        raise ValueError(
            f"clock_library=true with batch_size={cfg.batch_size} and temperature={cfg.temperature}: the library's "
            "generation is timed at batch_size=1 and temperature=0 only"
        )
    if cfg.get("tree_budgets") and (cfg.get("tree") is None or "budget" not in cfg.tree):
        raise ValueError(
            f"tree_budgets={list(cfg.tree_budgets)} times trees of other budgets, and this tree has none: use "
            "tree=best_first, dynamic or top_w"
        )
    Limits(cfg.max_new_tokens, (), cfg.batch_size)
    Sampling(cfg.temperature)
    instantiate(cfg.suite, _convert_="all")


def round_line(clock: Mapping[str, Any]) -> str:
    """Where the time of a round goes, and which accepted length pays for it."""
    split = ", ".join(f"{part} {1e3 * clock[f'{key}_seconds']:.1f}" for part, key in SPLIT)
    every = ", ".join(f"{name} {_interval(facts)}" for name, facts in clock["benchmarks"].items())
    return (
        f"speedup {_interval(clock)} ({every}; by processor time "
        f"{clock['speedup_processor']:.2f}) at accepted length {clock['accepted_length']:.2f}, which breaks even at "
        f"{clock['break_even_length']:.2f}; a round in ms: {split}; a plain token "
        f"{1e3 / clock['plain_tokens_per_second']:.1f}"
    )


def _interval(facts: Mapping[str, Any]) -> str:
    """A speedup with its 95% interval over prompts, as in 1.52 [1.40, 1.63]."""
    if facts["speedup_low"] is None:
        return f"{facts['speedup']:.2f}"
    return f"{facts['speedup']:.2f} [{facts['speedup_low']:.2f}, {facts['speedup_high']:.2f}]"


def costs_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of each measured point."""
    return ", ".join(f"{row['part']} {row['length']}: {1e3 * row['seconds']:.1f} ms" for row in rows)


def measure(
    cfg: DictConfig,
    target: Target,
    draft: Draft,
    prompts: list[list[int]],
    parts: KeptParts,
    benchmarks: Sequence[str],
) -> tuple[list[dict], dict[str, Any], CostProfile]:
    """Cost rows, the wall clock against plain decoding, and the profile of whole engine steps; each of `parts` is kept
    and printed as soon as it is measured."""
    sizes, K = list(cfg.batch_sizes), cfg.slots or draft.block_size
    lengths = sorted({k for k in cfg.lengths if k <= K} | {K})
    repeats = {"context": cfg.context, "repeats": cfg.repeats, "warmup": cfg.warmup}
    if len(prompts) < max(sizes):
        raise ValueError(f"the suite holds {len(prompts)} prompts and {max(sizes)} are needed; lower batch_sizes")
    if len(prompts) < cfg.clock_prompts:
        say(f"speed: the suite holds {len(prompts)} prompts: all are decoded against the clock")
    how, clocked = _protocol(cfg, target), min(len(prompts), cfg.clock_prompts)
    asked, named = _spread(prompts, clocked), _spread(benchmarks, clocked)
    trees = _trees(how.tree, cfg.get("tree_budgets") or ())
    rows: list[dict] = []
    with Progress("speed", (3 + bool(trees)) * len(sizes) + 1, "measurements") as bar:

        def part(name: str, measured: Callable[[], Any], line: Callable[[Any], str]) -> Any:
            found = parts.take(name, measured, line)
            bar.advance()
            return found

        # What the clock shows comes first: it is what is asked for, and a run may be stopped before its end.
        clock = part(
            f"{len(asked)} prompts against the clock",
            lambda: _with_intervals(
                wall_clock(
                    target,
                    draft,
                    asked,
                    how.sampling,
                    how.limits,
                    cfg.clock_repeats,
                    slots=cfg.slots,
                    library=cfg.clock_library,
                    tree=how.tree,
                ),
                named,
            ),
            round_line,
        )
        for size in sizes:
            one, steps = [size], [1, *(k + 1 for k in lengths)]
            of = f"{size} request{'s' if size > 1 else ''}"
            rows += part(f"target, {of}", lambda o=one, s=steps: target_cost(target, o, s, **repeats), costs_line)
            rows += part(f"draft, {of}", lambda o=one: draft_cost(target, draft, o, lengths, **repeats), costs_line)
            if trees:
                rows += part(f"trees, {of}", lambda o=one: tree_cost(target, draft, trees, o, **repeats), costs_line)
            rows += part(
                f"engine, {of}",
                lambda o=one: step_cost(target, draft, prompts, o, [0, *lengths], cfg.step_tokens),
                costs_line,
            )
    facts = hardware()
    machine = facts["gpus"][0] if target.device.type == "cuda" else f"{facts['processor']}, {facts['threads']} threads"
    label = f"{target.name} with {type(draft).__name__}, {K} slots, {machine}"
    return rows, clock, cost_profile(rows, label, part="step")


def _with_intervals(clock: dict[str, Any], benchmarks: Sequence[str]) -> dict[str, Any]:
    """The measured speedup with its interval over prompts, and each benchmark's."""
    whole = speedups.speedup(clock["batches"])
    low, high = (None if np.isnan(bound) else bound for bound in (whole.low, whole.high))
    own = speedups.by_benchmark(clock["batches"], benchmarks)
    return clock | {"speedup_low": low, "speedup_high": high, "benchmarks": own}


def _protocol(cfg: DictConfig, target: Target) -> Protocol:
    """How prompts are decoded for time measurements: whole proposals, the first turn."""
    limits = Limits(cfg.max_new_tokens, target.stop_token_ids, cfg.batch_size)
    tree = None if cfg.get("tree") is None else instantiate(cfg.tree, _convert_="all")
    return Protocol(Sampling(cfg.temperature), limits, slots=cfg.slots, turns="first", thinking=cfg.thinking, tree=tree)


def _trees(tree: TreeShape | None, budgets: Sequence[int]) -> list[TreeShape]:
    """The tree and its like of other budgets, by number of nodes."""
    if tree is None:
        return []
    like = [replace(tree, budget=budget) for budget in budgets]
    return sorted({each.nodes: each for each in (*like, tree)}.values(), key=lambda each: each.nodes)


def _next(cfg: DictConfig, folder: Path, draft: Draft | Baseline) -> str:
    """A simulation of serving with the profile just measured, on rounds of this draft where some were recorded."""
    for file in sorted((Path(cfg.root) / "runs" / "evaluate").glob("[!.]*/summary.json")):
        about, rounds = read_json(file, {}), file.with_name("rounds.jsonl")
        same = about.get("lineage", {}).get("draft") == weights_of(draft) and about.get("status") == "finished"
        how = about.get("protocol", {})
        if not same or how.get("scheduler") != "fixed" or how.get("tree") is not None or not rounds.is_file():
            continue
        settings = {"name": folder.name, "rounds": str(file.parent), "profile": "file"}
        settings |= {"profile__path": str(folder / "profile.json"), "concurrency": list(cfg.batch_sizes)}
        if any("confidence" not in line for line in read_lines(rounds) if line["proposed"]):
            needy = ("threshold", "cumulative_threshold", "hardware_aware", "delayed_global")
            settings |= {f"policies__{name}": None for name in needy}
        return command("serve", cfg, **settings)
    return command("evaluate", cfg, ("target", "suite"), draft=str(cfg.draft))


def _held(cfg: DictConfig, target: Target, draft: Draft, prompts: list[list[int]]) -> list[dict]:
    """Simulated and measured throughput with the whole block verified; half of the prompts make the profile."""
    if not cfg.check:
        return []
    prompts = _spread(prompts, min(len(prompts), max(2 * cfg.clock_prompts, 4 * max(cfg.check))))
    with Progress("simulation check", 1, "comparisons") as bar:
        rows = simulated(target, draft, prompts, list(cfg.check), draft.block_size, cfg.step_tokens, cfg.clock_repeats)
        bar.advance()
    return rows


def _held_line(rows: Sequence[Mapping[str, Any]]) -> str:
    found = ", ".join(f"{row['requests']} requests {row['ratio']:.2f}" for row in rows)
    return f"simulated / measured tokens per second: {found}" if found else "left out (check=[])"


def _spread(prompts: Sequence[Any], count: int) -> list[Any]:
    """`count` of them at even distances, so that every benchmark of the suite is among them."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _predicted(rows: list[dict], clock: dict[str, Any], K: int, batch: int, nodes: int | None = None) -> dict[str, Any]:
    """The speedup that the cost curves predict at the largest measured batch not above the decoded one, for chains of K
    slots or for trees of `nodes`."""
    size = max((r["requests"] for r in rows if r["requests"] <= batch), default=min(r["requests"] for r in rows))

    def seconds(part: str, length: int) -> float:
        return next(r["seconds"] for r in rows if (r["part"], r["requests"], r["length"]) == (part, size, length))

    if nodes is None:
        drafting, verifying = seconds("propose", K) + seconds("commit", K), seconds("target", K + 1)
    else:
        drafting, verifying = (
            seconds("tree_draft", nodes) + seconds("tree_commit", nodes),
            seconds("tree_verify", nodes),
        )
    predicted = predicted_speedup(clock["accepted_length"], drafting, verifying, seconds("target", 1))
    return {"predicted_speedup": predicted, "predicted_at_batch": size}


def _schedule(profile: CostProfile, requests: int, K: int) -> float:
    return scheduler_cost(HardwareAware(profile), requests, K).seconds


def _tokens(target: Target, prompt: Any, thinking: bool | None) -> list[int]:
    if prompt.prompt_ids is not None:
        return list(prompt.prompt_ids)
    if target.tokenizer is None:
        raise ValueError(f"target {target.name} has no tokenizer; give prompts with prompt_ids")
    return prompt_ids(target.tokenizer, [{"role": "user", "content": prompt.turns[0]}], thinking)
