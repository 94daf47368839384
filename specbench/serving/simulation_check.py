"""Compare simulated with measured throughput of this engine: one machine, one run, prompts that are not in the profile.

Axes: B requests, l verified slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specbench.decoding.cost_profile import CostProfile
from specbench.decoding.loop import Decoded, Limits, clock, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.decoding.scheduling import FixedLength
from specbench.drafts.draft import Proposer
from specbench.evaluation.recorded_rounds import PromptRounds
from specbench.models.target import Target
from specbench.profiling.decoding_speed import step_cost
from specbench.serving.load import workload
from specbench.serving.simulator import SimulatedEngine

# Groups of prompts that a step of one size is timed on.
GROUPS = 4


def check(
    target: Target,
    draft: Proposer,
    prompts: Sequence[Sequence[int]],
    concurrency: Sequence[int],
    length: int,
    max_new_tokens: int = 64,
    repeats: int = 3,
) -> list[dict]:
    """Simulated against measured committed tokens per second at each concurrency, `length` slots verified per round.

    In every repeat and at each concurrency the steps of 1 ... B requests are timed on every other prompt, before and
    after the rest is decoded with requests joining and leaving. The simulation replays these rounds with the mean of
    both profiles, so that a change of the machine's speed affects both sides. The simulator has no prefill, so its time
    is subtracted from that of the engine.

    One row per concurrency: requests, length, measured, simulated (medians of the repeats), ratio (median of the
    repeats' own ratios) with its smallest and largest.
    """
    known, asked = prompts[::2], prompts[1::2]
    if len(known) < max(concurrency) or len(asked) < 2 * max(concurrency):
        raise ValueError(
            f"{len(prompts)} prompts are too few to check a concurrency of {max(concurrency)}: give at least "
            f"{4 * max(concurrency)}, or lower it"
        )

    def steps(most: int, tokens: int = max_new_tokens) -> dict[int, float]:
        """Mean seconds of a step by its tokens, over several groups of prompts, because contexts differ."""
        found: dict[int, list[float]] = {}
        for size in range(1, most + 1):
            groups = min(GROUPS, len(known) // size)
            for group in range(groups):
                (row,) = step_cost(target, draft, known[group::groups], [size], [length], tokens)
                found.setdefault(row["tokens"], []).append(row["seconds"])
        return {tokens: float(np.mean(seconds)) for tokens, seconds in found.items()}

    steps(max(concurrency), 8)  # first calls are slow and are not counted on either side
    found: dict[int, list[tuple[float, float]]] = {B: [] for B in concurrency}
    for _ in range(repeats):
        for B in concurrency:
            before = steps(B)
            done, seconds = _decode(target, draft, asked, B, length, max_new_tokens)
            after = steps(B)
            profile = CostProfile.from_pairs([(n, 2 / (before[n] + after[n])) for n in before], "one run")
            found[B].append(_throughputs(done, seconds, B, length, profile))
    rows = []
    for B, pairs in found.items():
        measured, simulated = np.array(pairs).T
        ratios = simulated / measured
        row = {"requests": B, "length": length, "measured": float(np.median(measured))}
        row |= {"simulated": float(np.median(simulated)), "ratio": float(np.median(ratios))}
        rows.append(row | {"low": float(ratios.min()), "high": float(ratios.max()), "repeats": repeats})
    return rows


def _decode(target, draft, prompts, B: int, length: int, max_new_tokens: int) -> tuple[list[Decoded], float]:
    """Finished requests, and the engine's seconds without prefill. No stop tokens: every request runs to the end."""
    limits = Limits(max_new_tokens, batch_size=B)
    began = clock(target.device)
    done = list(speculative_decode(target, draft, prompts, Sampling(), limits, scheduler=FixedLength(length)))
    return done, clock(target.device) - began - sum(request.prefill_seconds for request in done)


def _throughputs(done: list[Decoded], seconds: float, B: int, length: int, profile: CostProfile) -> tuple[float, float]:
    """Tokens per second of the engine's rounds, and of their replay."""
    rounds = [
        PromptRounds(
            str(request.index),
            np.array([r.proposed for r in request.rounds]),
            np.array([r.accepted for r in request.rounds]),
            np.array([r.seconds for r in request.rounds]),
            sum(r.committed for r in request.rounds),
        )
        for request in sorted(done, key=lambda request: request.index)
    ]
    engine = SimulatedEngine(workload(rounds), profile, FixedLength(length), B, range(len(rounds)), limit=len(rounds))
    steps = list(engine.steps())
    return sum(r.tokens for r in rounds) / seconds, sum(step.committed for step in steps) / steps[-1].end
