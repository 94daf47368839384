"""Measured cost of decoding rounds: cost curves of target and draft, predicted speedup, measured speedup.

A time is the median of repeats after warm-up, with the first and third quartile; CUDA is synchronised before the clock
is read. All numbers depend on the machine.

Axes: B requests, S tokens per request in one forward pass, K slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from specbench.blocks import Context
from specbench.decoding.cost_profile import CostProfile
from specbench.decoding.loop import Decoded, Lanes, Limits, clock, decode, speculative_decode
from specbench.decoding.sampling import Sampler, Sampling
from specbench.decoding.scheduling import FixedLength, Scheduler
from specbench.decoding.tree_loop import descend, grow, tree_decode
from specbench.decoding.tree_shapes import TreeShape
from specbench.drafts.draft import Proposer
from specbench.models.target import Target


@dataclass(frozen=True)
class Timing:
    """Seconds of one action (median, unless stated otherwise) and quartiles of `repeats` calls."""

    seconds: float
    low: float
    high: float
    repeats: int


def timed(
    action: Callable[[Any], Any],
    device: torch.device,
    repeats: int = 20,
    warmup: int = 3,
    prepare: Callable[[], Any] = lambda: None,
) -> Timing:
    """Time `action(prepare())` without the preparation, after `warmup` untimed calls."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: time at least one call")
    taken = []
    for call in range(warmup + repeats):
        ready = prepare()
        started = clock(device)
        action(ready)
        if call >= warmup:
            taken.append(clock(device) - started)
    return _timing(taken)


def _timing(taken: Sequence[float]) -> Timing:
    low, median, high = np.quantile(taken, [0.25, 0.5, 0.75])
    return Timing(float(median), float(low), float(high), len(taken))


@torch.inference_mode()
def target_cost(
    target: Target,
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    context: int = 128,
    repeats: int = 20,
    warmup: int = 3,
) -> list[dict]:
    """T(B, S): seconds in which the target extends B requests of `context` tokens by S tokens and computes their
    logits.

    S = 1 is plain decoding, S = K + 1 verifies K slots. One row a (B, S): part, requests, length, tokens (B S),
    context, seconds, low, high, repeats.
    """
    rows = []
    for B in batch_sizes:
        state, _ = target.prefill(*_prompts(target, B, context))
        blocks = [_tokens(target, B, S) for S in lengths]
        taken: list[list[float]] = [[] for _ in lengths]
        for call in range(warmup + repeats):
            # Measured in turns, because ratios matter and the speed of a machine changes over time.
            for seconds, block in zip(taken, blocks, strict=True):
                started = clock(target.device)
                target.logits(target.extend(state, block).last)
                if call >= warmup:
                    seconds.append(clock(target.device) - started)
        rows += [_row("target", B, S, context, _timing(found)) for S, found in zip(lengths, taken, strict=True)]
    return rows


@torch.inference_mode()
def draft_cost(
    target: Target,
    draft: Proposer,
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    context: int = 128,
    repeats: int = 20,
    warmup: int = 3,
) -> list[dict]:
    """Seconds in which the draft proposes K greedy slots for B requests, and commits K + 1 tokens afterwards.

    Rows as target_cost's, `length` being K, with the parts `propose` and `commit`.
    """
    rows = []
    for B in batch_sizes:
        tokens, counts = _prompts(target, B, context)
        held, states = target.prefill(tokens, counts)
        begun, every = draft.begin(states, tokens), torch.arange(B, device=target.device)
        anchor, sampler = _tokens(target, B, 1)[:, 0], Sampler(Sampling(), range(B))
        for K in lengths:
            if not 1 <= K <= draft.block_size:
                raise ValueError(f"length {K}: this draft proposes 1 to {draft.block_size} slots")
            block = _tokens(target, B, K + 1)
            true = target.extend(held, block)
            committed = Context(true.taps, true.last, torch.full_like(counts, K + 1))
            propose = timed(
                lambda _, K=K, state=begun, anchor=anchor, draw=sampler: draft.propose(state, anchor, draw, K),
                target.device,
                repeats,
                warmup,
            )
            commit = timed(
                lambda state, seen=committed, block=block: draft.commit(state, seen, block),
                target.device,
                repeats,
                warmup,
                prepare=lambda state=begun, every=every: state.select(every),
            )
            rows += [_row("propose", B, K, context, propose), _row("commit", B, K, context, commit)]
    return rows


@torch.inference_mode()
def tree_cost(
    target: Target,
    draft: Proposer,
    shapes: Sequence[TreeShape],
    batch_sizes: Sequence[int],
    context: int = 128,
    repeats: int = 20,
    warmup: int = 3,
) -> list[dict]:
    """Seconds of the parts of a greedy round with a token tree of each shape, for B requests: `tree_draft` makes the
    tree, `tree_verify` reads it and finds the accepted path, `tree_commit` keeps a path of all levels.

    Rows as target_cost's, `length` being the most nodes of the shape.
    """
    rows = []
    for B in batch_sizes:
        tokens, counts = _prompts(target, B, context)
        held, states = target.prefill(tokens, counts)
        begun, every = draft.begin(states, tokens), torch.arange(B, device=target.device)
        lanes = Lanes([], _tokens(target, B, 1)[:, 0], held, begun, Sampler(Sampling(), range(B)))
        for shape in shapes:
            tree = grow(draft, lanes, shape)
            block = torch.cat([lanes.anchor[:, None], tree.tokens], 1)
            path = torch.arange(min(tree.levels + 1, block.shape[1]), device=target.device).expand(B, -1)

            def verify(_, tree=tree, block=block, held=held, lanes=lanes):
                read = target.extend(held, block, tree.branches())
                return read, descend(tree, target.logits(read.last), lanes)

            read = verify(None)[0]
            size = torch.full_like(counts, path.shape[1])
            kept = Context(read.taps[:, : path.shape[1]], read.last[:, : path.shape[1]], size)

            def commit(state, kept=kept, path=path, block=block, held=held):
                held.keep(path)
                draft.commit(state, kept, block[:, : path.shape[1]])

            parts = {
                "tree_draft": timed(
                    lambda _, shape=shape, lanes=lanes: grow(draft, lanes, shape), target.device, repeats, warmup
                ),
                "tree_verify": timed(verify, target.device, repeats, warmup),
                "tree_commit": timed(
                    commit,
                    target.device,
                    repeats,
                    warmup,
                    prepare=lambda state=begun, every=every: state.select(every),
                ),
            }
            rows += [_row(part, B, shape.nodes, context, timing) for part, timing in parts.items()]
    return rows


def step_cost(
    target: Target,
    draft: Proposer,
    prompts: Sequence[Sequence[int]],
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
) -> list[dict]:
    """Seconds of a whole engine step (proposal, forward pass, verification, bookkeeping, and the time between two
    steps), from real decoding.

    For every B the first B prompts are decoded at once, K slots proposed and l of them verified for l in `lengths`;
    only rounds in which all B requests run count, and stop tokens are ignored. Rows as target_cost's with the part
    `step`, tokens = B (l + 1), `repeats` the rounds. Here `seconds` is the MEAN: the distribution of step times
    is skewed, and a throughput simulated from the median is too high.
    """
    if len(prompts) < max(batch_sizes):
        raise ValueError(f"{len(prompts)} prompts cannot fill a batch of {max(batch_sizes)}; give at least as many")
    rows = []
    for B in batch_sizes:
        context = sum(map(len, prompts[:B])) // B
        for length in lengths:
            limits = Limits(max_new_tokens, batch_size=B)
            started = clock(target.device)
            done = list(
                speculative_decode(
                    target, draft, prompts[:B], sampling or Sampling(), limits, scheduler=FixedLength(length)
                )
            )
            total = clock(target.device) - started
            # Who needs the most rounds sees every step; what its prefill and rounds do not hold is spent between them.
            last = max(done, key=lambda request: len(request.rounds))
            between = (total - last.seconds) / len(last.rounds)
            full = min(len(request.rounds) for request in done)
            seconds = [r.seconds + between for r in last.rounds[:full]]
            low, high = np.quantile(seconds, [0.25, 0.75])
            timing = Timing(float(np.mean(seconds)), float(low), float(high), full)
            rows.append(_row("step", B, length + 1, context, timing))
    return rows


def cost_profile(rows: Sequence[dict], label: str, slots: int | None = None, part: str = "target") -> CostProfile:
    """SPS(B) from rows of target_cost, or with part="step" from those of step_cost, which include the draft's time.

    With `slots` the draft's time for K = slots is added from the rows of draft_cost. For forward passes with equal
    numbers of tokens but different shapes, the median is used.
    """
    pairs = [(row["tokens"], 1.0 / row["seconds"]) for row in rows if row["part"] == part]
    if not pairs:
        raise ValueError(f"there is no row of part {part}; measure it with {part}_cost")
    profile = CostProfile.from_pairs(pairs, label)
    if slots is None:
        return profile
    each: dict[int, float] = {}
    for row in rows:
        if row["part"] in ("propose", "commit") and row["length"] == slots:
            each[row["requests"]] = each.get(row["requests"], 0.0) + row["seconds"]
    if not each:
        raise ValueError(f"slots={slots}: there is no draft row of that length; measure it with draft_cost")
    sizes = sorted(each)
    return profile.with_draft(sizes, [each[size] for size in sizes])


def predicted_speedup(accepted_length: float, t_draft: float, t_verify: float, t_plain: float) -> float:
    """Accepted length x T(1) / (T_draft + T(K + 1)): tokens per second against plain decoding, from the cost curve.

    >>> predicted_speedup(3.0, t_draft=0.5, t_verify=1.5, t_plain=1.0)
    1.5
    """
    return accepted_length * t_plain / (t_draft + t_verify)


def wall_clock(
    target: Target,
    draft: Proposer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    limits: Limits,
    repeats: int = 3,
    warmup: int = 1,
    scheduler: Scheduler | None = None,
    slots: int | None = None,
    library: bool = False,
    tree: TreeShape | None = None,
) -> dict:
    """The measured speedup: plain and speculative decoding of the same prompts, interleaved in this process.

    Before, `warmup` batches are decoded every way untimed. Then every batch of `limits.batch_size` prompts is decoded
    `repeats` times every way, in turns the one and the other first, so that both ways meet the same state of the
    machine. The time of a batch is the median of its repeats; a speed is all tokens / the sum of these times.

    Returns plain_tokens_per_second, tokens_per_second (speculative), speedup (their ratio),
    tokens_per_second_per_request (tokens / seconds that their requests spent in flight), accepted_length,
    break_even_length (the accepted length at which the speedup would be 1 at this cost of a round), and the mean draft,
    verify, commit and overhead seconds of a round. speedup_processor and the tokens per processor second are the same
    by the processor time of this process, which other work on the machine does not lengthen. speedup_repeats: the
    speedup of each repeat alone. batches: one row a batch with first (index of its first prompt), prompts, tokens,
    rounds, committed and seconds of each way, from which intervals over prompts follow. With `library` (batch 1 and
    temperature 0 only) the library's own generation of the same prompts takes its turn: library_tokens_per_second, and
    what either loop reaches of it as loop_plain and loop_speculative. `tree`: proposals are token trees of this shape.

    Raises:
        ValueError: `library` with other settings, or no prompt was answered with more than one token.
    """
    if library and (limits.batch_size != 1 or not sampling.greedy):
        raise ValueError("the library's generation is timed at batch_size=1 and temperature=0 only")
    ways = ["plain", "speculative", *(["library"] if library else [])]
    starts = range(0, len(prompts), limits.batch_size)

    def once(way: str, asked: Sequence[Sequence[int]]) -> list[Decoded]:
        if way == "plain":
            return list(decode(target, asked, sampling, limits))
        if way == "library":
            generated = (target.generate(p, limits.max_new_tokens, limits.stop_token_ids) for p in asked)
            return [Decoded(i, list(p), ids) for i, (p, ids) in enumerate(zip(asked, generated, strict=True))]
        if tree is not None:
            return list(tree_decode(target, draft, asked, sampling, limits, tree, None, slots))
        return list(speculative_decode(target, draft, asked, sampling, limits, None, scheduler, slots))

    for _ in range(warmup):
        for way in ways:
            once(way, prompts[: limits.batch_size])
    # Axes: ways, batches, repeats.
    tokens, seconds, work = np.zeros((3, len(ways), len(starts), repeats))
    in_flight, rounds, batches = 0.0, [], []
    for number, start in enumerate(starts):
        asked, own = prompts[start : start + limits.batch_size], []
        for repeat in range(repeats):
            order = range(len(ways)) if repeat % 2 else reversed(range(len(ways)))
            for way in order:
                started, worked = clock(target.device), time.process_time()
                done = once(ways[way], asked)
                seconds[way, number, repeat] = clock(target.device) - started
                work[way, number, repeat] = max(time.process_time() - worked, 1e-9)
                tokens[way, number, repeat] = sum(len(d.output_ids) for d in done)
                if ways[way] == "speculative":
                    in_flight += sum(d.seconds for d in done)
                    own += [r for d in done for r in d.rounds]
        rounds += own
        row = {"first": start, "prompts": len(asked), "rounds": len(own), "committed": sum(r.committed for r in own)}
        for way, name in enumerate(ways):
            row[f"{name}_tokens"] = float(tokens[way, number].mean())
            row[f"{name}_seconds"] = float(np.median(seconds[way, number]))
        batches.append(row)
    if not rounds:
        raise ValueError("no round was decoded; give prompts whose answers hold more than one token")
    total = tokens.mean(2).sum(1)
    speeds, by_processor = (total / np.median(taken, 2).sum(1) for taken in (seconds, work))
    each = tokens.sum(1) / seconds.sum(1)
    split = np.array([(r.draft_seconds, r.verify_seconds, r.commit_seconds, r.seconds) for r in rounds]).mean(0)
    accepted_length, speedup = sum(r.committed for r in rounds) / len(rounds), float(speeds[1] / speeds[0])
    against: dict[str, Any] = {}
    if library:
        against = {f"loop_{way}": float(speed / speeds[2]) for way, speed in zip(ways[:2], speeds[:2], strict=True)}
        against["library_tokens_per_second"] = float(speeds[2])
    return against | {
        "plain_tokens_per_second": float(speeds[0]),
        "tokens_per_second": float(speeds[1]),
        "tokens_per_second_per_request": float(tokens[1].sum() / in_flight),
        "speedup": speedup,
        "speedup_repeats": (each[1] / each[0]).tolist(),
        "accepted_length": accepted_length,
        "break_even_length": accepted_length / speedup,
        "plain_tokens_per_processor_second": float(by_processor[0]),
        "tokens_per_processor_second": float(by_processor[1]),
        "speedup_processor": float(by_processor[1] / by_processor[0]),
        "draft_seconds": float(split[0]),
        "verify_seconds": float(split[1]),
        "commit_seconds": float(split[2]),
        "overhead_seconds": float(split[3] - split[:3].sum()),
        "repeats": repeats,
        "batches": batches,
    }


def scheduler_cost(scheduler: Scheduler, requests: int = 256, slots: int = 7, repeats: int = 1000) -> Timing:
    """Seconds of one schedule on the host, for confidences drawn once from a fixed seed."""
    confidence = np.random.default_rng(0).random((requests, slots)) ** 0.2
    proposed, names = np.full(requests, slots), list(range(requests))
    accepted = (confidence > 0.5).cumprod(1).sum(1)
    return timed(lambda _: scheduler.lengths(confidence, proposed, names, accepted), torch.device("cpu"), repeats)


def _prompts(target: Target, requests: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _tokens(target, requests, context), torch.full((requests,), context, device=target.device)


def _tokens(target: Target, requests: int, count: int) -> torch.Tensor:
    """Random token ids: a forward pass costs the same whatever they are."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(target.tables.embedding)
    return torch.randint(vocabulary, (requests, count), generator=generator).to(target.device)


def _row(part: str, requests: int, length: int, context: int, timing: Timing) -> dict:
    tokens = requests * length
    sizes = {"part": part, "requests": requests, "length": length, "tokens": tokens, "context": context}
    spread = {"seconds": timing.seconds, "low": timing.low, "high": timing.high, "repeats": timing.repeats}
    return sizes | spread
