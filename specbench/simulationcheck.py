"""Is a simulated throughput the engine's? Both on one machine, in one run, on prompts that the profile did not see.

Axes: B requests, l verified slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specbench.costs import CostProfile
from specbench.decoding import Limits, clock, speculative_decode
from specbench.methods.draft import Proposer
from specbench.rounds import PromptRounds
from specbench.sampling import Sampling
from specbench.scheduling import FixedLength
from specbench.serving import workload
from specbench.simulator import Engine
from specbench.speed import step_cost
from specbench.targets import Target


def check(
    target: Target,
    draft: Proposer,
    prompts: Sequence[Sequence[int]],
    concurrency: Sequence[int],
    length: int,
    max_new_tokens: int = 64,
    repeats: int = 3,
) -> list[dict]:
    """Simulated against measured committed tokens a second at each concurrency, `length` slots verified a round.

    In every repeat the steps of 1 ... max(concurrency) requests are timed on every other prompt (the profile), and the
    rest is decoded at each concurrency, as requests join and leave; the simulation replays those very rounds against
    the profile. Prefill, which the simulator leaves out, is taken off the engine's time.

    One row a concurrency: requests, length, measured, simulated (medians of the repeats), ratio (median of the repeats'
    own ratios) with its smallest and largest.
    """
    known, asked = prompts[::2], prompts[1::2]
    sizes = range(1, max(concurrency) + 1)
    if len(known) < max(concurrency) or len(asked) < 2 * max(concurrency):
        raise ValueError(
            f"{len(prompts)} prompts are too few to check a concurrency of {max(concurrency)}: give at least "
            f"{4 * max(concurrency)}, or lower it"
        )
    step_cost(target, draft, known, list(sizes), [length], 8)  # first calls are slow, and belong to neither side
    found: dict[int, list[tuple[float, float]]] = {B: [] for B in concurrency}
    for _ in range(repeats):
        steps = step_cost(target, draft, known, list(sizes), [length], max_new_tokens)
        profile = CostProfile.from_pairs([(row["tokens"], 1 / row["seconds"]) for row in steps], "one run")
        for B in concurrency:
            found[B].append(_both(target, draft, asked, B, length, max_new_tokens, profile))
    rows = []
    for B, pairs in found.items():
        measured, simulated = np.array(pairs).T
        ratios = simulated / measured
        row = {"requests": B, "length": length, "measured": float(np.median(measured))}
        row |= {"simulated": float(np.median(simulated)), "ratio": float(np.median(ratios))}
        rows.append(row | {"low": float(ratios.min()), "high": float(ratios.max()), "repeats": repeats})
    return rows


def _both(
    target, draft, prompts, B: int, length: int, max_new_tokens: int, profile: CostProfile
) -> tuple[float, float]:
    """Tokens a second of the engine's rounds, and of their replay."""
    limits = Limits(max_new_tokens, batch_size=B)  # no stop tokens: every request runs to the end
    began = clock(target.device)
    done = list(speculative_decode(target, draft, prompts, Sampling(), limits, scheduler=FixedLength(length)))
    seconds = clock(target.device) - began - sum(request.prefill_seconds for request in done)
    done.sort(key=lambda request: request.index)
    rounds = [
        PromptRounds(
            str(request.index),
            np.array([r.proposed for r in request.rounds]),
            np.array([r.accepted for r in request.rounds]),
            np.array([r.seconds for r in request.rounds]),
            sum(r.committed for r in request.rounds),
        )
        for request in done
    ]
    engine = Engine(workload(rounds), profile, FixedLength(length), B, range(len(rounds)), limit=len(rounds))
    steps = list(engine.steps())
    return sum(r.tokens for r in rounds) / seconds, sum(step.committed for step in steps) / steps[-1].end
