"""Throughput, speed per user and verification cost of a scheduling policy under load, by simulation (see simulator.py).

All numbers are computed from recorded rounds and a cost profile and are marked `simulation: True`: they describe an
engine with this profile and are not measured. They correspond to figures 7 and 8 of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specbench.decoding.calibration import Calibration, probabilities
from specbench.decoding.cost_profile import CostProfile
from specbench.decoding.scheduling import Scheduler, ratios
from specbench.evaluation.recorded_rounds import PromptRounds, flatten
from specbench.serving.simulator import EngineStep, SimulatedEngine, Workload

NOTICE = "simulation: recorded rounds replayed against a cost profile; nothing was served"


@dataclass(frozen=True)
class ServedPolicy:
    """A name for the legend, a scheduler, and the rounds that it replays (each draft replays its own)."""

    name: str
    scheduler: Scheduler
    workload: Workload


def workload(prompts: Sequence[PromptRounds], calibration: Calibration | None = None) -> Workload:
    """Recorded prompts, their confidence turned into probabilities (calibrated if a calibration is given).

    Rounds with token trees have the draft's own probabilities. ValueError if the calibration was fitted on one of these
    prompts: a schedule must not be evaluated on them; or if it is to be applied to trees.
    """
    if all(p.joint is not None for p in prompts):
        if calibration is not None:
            raise ValueError("a calibration is of the slots of chains, and these rounds verified trees: leave it out")
        return Workload.of(prompts, ratios(np.concatenate([p.joint for p in prompts])))
    if all(p.logits is None for p in prompts):
        return Workload.of(prompts)
    rounds = flatten(prompts)
    if calibration is None:
        return Workload.of(prompts, probabilities(rounds.logits))
    shared = calibration.prompts & set(rounds.prompts)
    if shared:
        raise ValueError(
            f"{len(shared)} prompts were used to fit the calibration; replay others, or calibrate on others"
        )
    return Workload.of(prompts, calibration.apply(rounds.logits))


def closed_loop(
    policy: ServedPolicy, profile: CostProfile, concurrency: int, steps: int, warmup: int, seed: int = 0
) -> dict:
    """`concurrency` users, each sending its next request as soon as the last one is answered.

    Counted over `steps` engine steps after `warmup` uncounted ones. Returns one row (see _row).
    """
    _positive(concurrency=concurrency, steps=steps)
    engine = SimulatedEngine(policy.workload, profile, policy.scheduler, concurrency, _order(policy, seed))
    taken: list[EngineStep] = []
    for index, step in enumerate(engine.steps()):
        if index >= warmup:
            taken.append(step)
        if len(taken) == steps:
            break
    return _row(policy, profile, engine, taken, {"load": "closed", "concurrency": concurrency})


def poisson(
    policy: ServedPolicy,
    profile: CostProfile,
    rate: float | int,
    requests: int,
    concurrency: int,
    warmup: float = 0.2,
    seed: int = 0,
) -> dict:
    """`requests` requests arriving at random, `rate` a second; at most `concurrency` run and the others wait.

    Counted from the arrival that ends the first share `warmup` of the requests to the last arrival, while the load
    lasts. `offered` is the tokens per second that arrived in that time; a throughput clearly below it, and
    `waiting_end`, tell of overload.
    """
    _positive(concurrency=concurrency, rate=rate, requests=requests)
    generator = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    arrivals = np.cumsum(generator.exponential(1.0 / rate, requests))
    order = _order(policy, seed)
    engine = SimulatedEngine(policy.workload, profile, policy.scheduler, concurrency, order, arrivals=arrivals)
    first, last = float(arrivals[int(warmup * requests)]), float(arrivals[-1])
    taken = [step for step in engine.steps() if first < step.end - step.seconds and step.end <= last]
    if not taken:
        raise ValueError(f"no engine step fell inside the {last - first:.3g} s of load; raise requests={requests}")
    dealt = policy.workload.tokens[order[np.arange(requests) % len(order)]]
    waits = np.array([s.started - s.arrived for s in engine.served])
    load = {
        "load": "poisson",
        "concurrency": float(np.average([s.requests for s in taken], weights=[s.seconds for s in taken])),
        "rate": rate,
        "offered": float(dealt[arrivals > first].sum()) / (last - first),
        "wait_mean": float(waits.mean()),
        "wait_p95": float(np.quantile(waits, 0.95)),
        "waiting_end": taken[-1].waiting,
    }
    return _row(policy, profile, engine, taken, load, window=last - first)


def _row(
    policy: ServedPolicy,
    profile: CostProfile,
    engine: SimulatedEngine,
    taken: Sequence[EngineStep],
    load: dict[str, Any],
    window: float | None = None,
) -> dict:
    """One operating point. Rates are per simulated second.

    throughput          committed tokens per second, all users (over the busy time, or the window of a Poisson load)
    interactivity       tokens per second that a running request sees: committed tokens / seconds spent by requests
    interactivity_p10   its tenth percentile over the requests served, None before any was
    verified_per_round  tokens in the forward pass for each request and round: verified draft tokens + 1
    accepted_length     committed tokens per round; acceptance_rate: accepted / verified draft tokens
    """
    committed = sum(s.committed for s in taken)
    rounds = sum(s.requests for s in taken)
    verified, accepted = sum(s.verified for s in taken), sum(s.accepted for s in taken)
    busy = sum(s.seconds for s in taken)
    speeds = [s.tokens / (s.finished - s.started) for s in engine.served]
    return {
        "simulation": True,
        "policy": policy.name,
        "scheduler": policy.scheduler.label,
        "lossless": policy.scheduler.lossless,
        "profile": profile.label,
        "profile_source": profile.source,
        **load,
        "throughput": committed / (busy if window is None else window),
        "interactivity": committed / sum(s.seconds * s.requests for s in taken),
        "interactivity_p10": float(np.quantile(speeds, 0.1)) if speeds else None,
        "verified_per_round": 1 + verified / rounds,
        "proposed_per_round": sum(s.proposed for s in taken) / rounds,
        "accepted_length": committed / rounds,
        "acceptance_rate": accepted / verified if verified else None,
        "steps": len(taken),
        "rounds": rounds,
        "tokens": committed,
        "requests": len(engine.served),
        "seconds": busy,
    }


def service_levels(rows: Sequence[dict], floors: Sequence[float | int], baseline: str | None = None) -> list[dict]:
    """Best throughput of each policy at a minimum speed per user: for every floor (tokens per second and user) the best
    throughput among its simulated points with interactivity >= floor, None where no point keeps it. No interpolation.

    `gain` is relative to the policy named `baseline`, None where either has no point.
    """
    names = list(dict.fromkeys(row["policy"] for row in rows))
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline={baseline!r} is not among the policies {', '.join(names)}")
    table = []
    for floor in floors:
        best = {}
        for name in names:
            kept = [r for r in rows if r["policy"] == name and r["interactivity"] >= floor]
            best[name] = max(kept, key=lambda r: r["throughput"], default=None)
        base = best.get(baseline)
        for name, row in best.items():
            table.append(
                {
                    "simulation": True,
                    "policy": name,
                    "floor": floor,
                    "throughput": row and row["throughput"],
                    "concurrency": row and row["concurrency"],
                    "gain": row["throughput"] / base["throughput"] - 1 if row and base else None,
                }
            )
    return table


def _order(policy: ServedPolicy, seed: int) -> np.ndarray:
    """The order in which prompts are used: the same for policies with the same number of prompts."""
    return np.random.default_rng(seed).permutation(len(policy.workload.tokens))


def _positive(**values: float | int) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name}={value} must be positive")
