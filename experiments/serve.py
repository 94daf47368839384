"""specbench serve: simulated throughput and speed per user under load, from recorded rounds and a cost profile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.calibrate import rounds_digest
from specbench.cli.checks import check_before
from specbench.cli.errors import naming
from specbench.cli.recording import recorded
from specbench.cli.stages import Stage, say
from specbench.cli.tracked_stages import tracking_of
from specbench.decoding.calibration import Calibration
from specbench.evaluation.recorded_rounds import recorded_rounds
from specbench.files.atomic import write_json
from specbench.progress import Progress
from specbench.runs.provenance import provenance
from specbench.runs.run_folder import RunFolder, folder_name
from specbench.runs.tracked_run import tracked
from specbench.serving.load import NOTICE, ServedPolicy, closed_loop, poisson, service_levels, workload

RESULTS = ("points.csv", "points.json", "service_levels.csv", "profile.json", "summary.json", "config.yaml")
SHOWN = ("policy", "load", "concurrency", "throughput", "interactivity", "verified_per_round", "accepted_length")


def run(cfg: DictConfig) -> Path:
    """Write points.{csv,json} (one row per policy and load), service_levels.csv and profile.json; returns the
    folder."""
    check_before("serve", cfg)
    profile = instantiate(cfg.profile)
    policies = [_policy(name, chosen, cfg) for name, chosen in cfg.policies.items() if chosen is not None]
    if not policies:
        raise ValueError("policies names none; keep at least one")
    with stage_of(cfg) as stage:
        if stage.done:
            return stage.folder
        record = RunFolder(cfg.root, "serve", stage.folder.name, described(cfg), folder=stage.work)
        say(NOTICE)
        with tracked(tracking_of(cfg), record, profile=profile.label, seed=cfg.seed) as (folder, wandb):
            folder.write_provenance(*provenance(sys.argv, {"load": cfg.seed}))
            rows = _sweep(policies, profile, cfg)
            levels = service_levels(rows, list(cfg.floors), cfg.baseline)
            profile.save(folder.path / "profile.json")
            write_json(folder.path / "points.json", {"notice": NOTICE, "points": rows, "service_levels": levels})
            pd.DataFrame(rows).to_csv(folder.path / "points.csv", index=False)
            pd.DataFrame(levels).to_csv(folder.path / "service_levels.csv", index=False)
            most = max(rows, key=lambda row: row["throughput"])
            facts = {"notice": NOTICE, "profile": f"{profile.label} ({profile.source})", "points": len(rows)}
            best = {"best_throughput": most["throughput"], "best_throughput_policy": most["policy"]}
            wandb.rows("points", rows)
            wandb.rows("service_levels", levels)
            folder.finish(simulation=True, profile_source=profile.source, **facts, **best)
        _print(rows, levels)
        stage.finish(
            {**facts, **best},
            next="read points.csv in this folder: throughput and speed per user of every scheduler and load",
        )
    return stage.folder


def stage_of(cfg: DictConfig) -> Stage:
    """The stage of this simulation, not entered."""
    folder = Path(cfg.root) / "runs" / "serve" / folder_name(cfg.name, "a run folder")
    return Stage("serve", folder, described(cfg), force=cfg.force, results=RESULTS)


def described(cfg: DictConfig) -> dict[str, Any]:
    """The configuration with digests of the rounds that are replayed."""
    sources = [cfg.rounds, *(p.rounds for p in cfg.policies.values() if p is not None and "rounds" in p)]
    return {**recorded(cfg), "contents": [rounds_digest(path) for path in sources]}


def _policy(name: str, chosen: DictConfig, cfg: DictConfig) -> ServedPolicy:
    """A policy replays its own rounds if it names some (of another draft), otherwise the common ones."""
    rounds = chosen.rounds if "rounds" in chosen else cfg.rounds
    calibration = chosen.calibration if "calibration" in chosen else cfg.calibration
    loaded = None if calibration is None else Calibration.load(calibration)
    with naming("rounds", rounds):
        replayed = workload(recorded_rounds(rounds), loaded)
    return ServedPolicy(name, instantiate(chosen.scheduler), replayed)


def _sweep(policies: list[ServedPolicy], profile, cfg: DictConfig) -> list[dict]:
    rows = []
    with Progress("serve", len(policies) * (len(cfg.concurrency) + len(cfg.rate)), "points") as bar:
        for policy in policies:
            for users in cfg.concurrency:
                rows.append(closed_loop(policy, profile, users, cfg.steps, cfg.warmup, cfg.seed))
                bar.advance()
            for rate in cfg.rate:
                rows.append(poisson(policy, profile, rate, cfg.requests, cfg.max_concurrency, seed=cfg.seed))
                bar.advance()
    return rows


def _print(rows: list[dict], levels: list[dict]) -> None:
    print(NOTICE)
    print(pd.DataFrame(rows)[list(SHOWN)].to_string(index=False, float_format="%.2f"))
    if levels:
        print("throughput at a floor of tokens per second and user (simulation)")
        print(pd.DataFrame(levels).drop(columns="simulation").to_string(index=False, float_format="%.3f", na_rep="-"))
