"""Batched decoding: speculative rounds of a draft and a target, and plain decoding as their baseline.

Requests of any length share one batch. Each has its own length, roll-back and random generator, so its output does not
depend on the others. New requests join when others are finished.

    round: draft.propose -> scheduler -> target.extend(anchor + proposal) -> verify -> advance target, commit draft

Axes: B requests, K slots, S tokens of a verified block, C taps, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from specbench.blocks import Context
from specbench.decoding.sampling import Sampler, Sampling, draw, warp
from specbench.decoding.scheduling import FixedLength, Scheduler
from specbench.decoding.verification import verify, verify_greedy
from specbench.drafts.draft import Proposal, Proposer
from specbench.models.target import Target, TargetState

SHORT = 64  # tokens of padding that cost less than another forward pass
ACCOUNTINGS = ("specbench", "deepspec")


@dataclass(frozen=True)
class Round:
    """One round of one request. `tokens` are what it commits; times are those of its whole batch, in seconds.

    A round of a token tree proposes as many tokens as the tree is deep; `nodes` are all that were verified, `ranks`
    those of the accepted ones among their siblings, and `widths` the children of each node that was reached, the
    anchor's first. `joint`: the draft's probability of the path to every verified node, the largest first; `places`:
    where the accepted nodes stand in it, from 0. None: a chain.
    """

    proposed: int
    accepted: int
    tokens: tuple[int, ...]
    confidence: tuple[float, ...] | None
    draft_seconds: float
    verify_seconds: float
    seconds: float
    stop: bool
    commit_seconds: float = 0.0
    nodes: int | None = None
    ranks: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None
    joint: tuple[float, ...] | None = None
    places: tuple[int, ...] | None = None

    @property
    def committed(self) -> int:
        """Committed tokens: the accepted ones and the next one, or only the accepted ones if a stop token ended the
        text."""
        return len(self.tokens)


@dataclass
class Decoded:
    """One finished request. `output_ids`: the generated tokens, ended at the stop token or at max_new_tokens.
    `seconds`: time of all steps in which it took part. `prefill_seconds`: its share of joining, prefill and the copy
    into the batch. `states`: where they are kept, taps and final states of consecutive tokens on the CPU, in pieces."""

    index: int
    prompt_ids: list[int]
    output_ids: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    truncated: bool = False
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    states: list[tuple[Tensor, Tensor]] | None = None

    def kept(self) -> tuple[Float[Tensor, "T C D"], Float[Tensor, "T D"]]:
        """The kept states of prompt, text and closing tokens as one piece."""
        taps, last = zip(*self.states, strict=True)
        return torch.cat(taps), torch.cat(last)


@dataclass(frozen=True)
class Limits:
    """When a request ends and how many run at once. `token_budget`: maximum sum of prompt and new tokens of running
    requests."""

    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    batch_size: int = 1
    token_budget: int | None = None
    accounting: str = "specbench"

    def __post_init__(self) -> None:
        if self.accounting not in ACCOUNTINGS:
            raise ValueError(f"accounting={self.accounting!r}: choose one of {', '.join(ACCOUNTINGS)}")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")

    @property
    def last_round_at(self) -> int:
        """Rounds run while the text has fewer tokens than this; the released evaluator may run one more than needed."""
        return self.max_new_tokens + (self.accounting == "deepspec")


@dataclass
class Lanes:
    """The running requests, one per row of the batch."""

    requests: list[Decoded]
    anchor: Tensor
    target: TargetState
    draft: Any
    sampler: Sampler

    def without(self, done: list[int]) -> Lanes:
        """The requests but those of the rows `done`, into whose places the last ones move. The target's state of these
        lanes is used up."""
        left = len(self.requests) - len(done)
        rows, moving = list(range(left)), [r for r in range(left, len(self.requests)) if r not in done]
        for hole, row in zip([r for r in done if r < left], moving, strict=True):
            rows[hole] = row
        index = torch.tensor(rows, device=self.anchor.device)
        draft = None if self.draft is None else self.draft.select(index)
        self.target.shrink(index)
        kept = [self.requests[r] for r in rows]
        return Lanes(kept, self.anchor[index], self.target, draft, self.sampler.select(rows))

    def merge(self, other: Lanes) -> Lanes:
        draft = None if self.draft is None else self.draft.merge(other.draft)
        anchor = torch.cat([self.anchor, other.anchor])
        sampler = self.sampler.merge(other.sampler)
        return Lanes(self.requests + other.requests, anchor, self.target.merge(other.target), draft, sampler)


def speculative_decode(
    target: Target,
    draft: Proposer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    limits: Limits,
    seeds: Sequence[int] | None = None,
    scheduler: Scheduler | None = None,
    slots: int | None = None,
) -> Iterator[Decoded]:
    """Decode every prompt with `draft`; requests are yielded when they finish, `Decoded.index` is the index of the
    prompt.

    Decoding is lossless: the output has the target's distribution under `sampling`; at temperature 0 it is the greedy
    text of the target (in exact arithmetic). `slots` shortens the proposals. Errors: ValueError for an empty prompt or
    a scheduler that is not lossless.
    """
    scheduler = scheduler or FixedLength()
    if not scheduler.lossless:
        raise ValueError(f"scheduler {scheduler.label} is not lossless and can be used in simulations only")
    scheduler.reset()
    yield from run(
        target,
        draft,
        prompts,
        sampling,
        limits,
        seeds,
        lambda lanes: _round(target, draft, lanes, limits, scheduler, slots),
    )


def decode(
    target: Target,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    limits: Limits,
    seeds: Sequence[int] | None = None,
    closing: Sequence[int] | None = None,
) -> Iterator[Decoded]:
    """Plain decoding: one forward pass of the target per token. It is the baseline, and generates answers in this
    process.

    closing: keep the target's states of every token in `Decoded.states`, and add those of these tokens after a text
    that ended at a stop token (what a chat template writes there). None: keep none.
    """
    yield from run(
        target,
        None,
        prompts,
        sampling,
        limits,
        seeds,
        lambda lanes: _round(target, None, lanes, limits, FixedLength(), None),
        closing,
    )


def run(
    target: Target,
    draft: Proposer | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    limits: Limits,
    seeds: Sequence[int] | None,
    step: Callable[[Lanes], None],
    closing: Sequence[int] | None = None,
) -> Iterator[Decoded]:
    """Decode every prompt, `step` after `step` of all running requests; they join and leave between two steps.

    closing: as in `decode`.
    """
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(f"prompt {empty[0]} has no token; every prompt needs at least one")
    target.require(prompts, limits.max_new_tokens + len(closing or ()))
    seeds = list(range(len(prompts))) if seeds is None else seeds
    waiting = deque(
        Decoded(i, list(map(int, prompt)), states=None if closing is None else []) for i, prompt in enumerate(prompts)
    )
    lanes: Lanes | None = None
    while waiting or lanes is not None:
        joining = _admit(waiting, lanes, limits)
        if joining:
            started = clock(target.device)
            for alike in _alike(joining):
                fresh = _begin(target, draft, alike, sampling, [seeds[r.index] for r in alike])
                lanes = fresh if lanes is None else lanes.merge(fresh)
            joined = (clock(target.device) - started) / len(joining)
            for request in joining:
                request.prefill_seconds = joined
        done = _done(lanes, limits)
        if not done:
            step(lanes)
            done = _done(lanes, limits)
        if done and closing is not None:
            _close(target, lanes, done, limits, closing)
        for r in done:
            yield _finish(lanes.requests[r], limits)
        if done:
            lanes = lanes.without(done) if len(done) < len(lanes.requests) else None


def _done(lanes: Lanes, limits: Limits) -> list[int]:
    """Rows whose text ended at a stop token or reached its maximum length."""
    texts = [request.output_ids for request in lanes.requests]
    return [r for r, ids in enumerate(texts) if ids[-1] in limits.stop_token_ids or len(ids) >= limits.last_round_at]


def _admit(waiting: deque[Decoded], lanes: Lanes | None, limits: Limits) -> list[Decoded]:
    """Requests that can join now: free rows, and room in the token budget (a single request always fits).

    They join in groups of at least an eighth of the batch, because every join costs a prefill and a copy of the caches.
    """
    running = [] if lanes is None else lanes.requests
    if running and limits.batch_size - len(running) < min(len(waiting), limits.batch_size // 8):
        return []
    used = sum(len(r.prompt_ids) + limits.max_new_tokens for r in running)
    joining: list[Decoded] = []
    while waiting and len(running) + len(joining) < limits.batch_size:
        size = len(waiting[0].prompt_ids) + limits.max_new_tokens
        if limits.token_budget is not None and used and used + size > limits.token_budget:
            break
        used += size
        joining.append(waiting.popleft())
    return joining


def _alike(requests: list[Decoded]) -> list[list[Decoded]]:
    """The requests in groups whose prompts differ by less than half of the longest, or by at most SHORT tokens, so that
    one long prompt does not pad all others to its length. The order of requests stays where one group is enough."""
    ordered = sorted(requests, key=lambda request: -len(request.prompt_ids))
    groups: list[list[Decoded]] = []
    for request in ordered:
        longest = len(groups[-1][0].prompt_ids) if groups else 0
        if groups and len(request.prompt_ids) >= min(longest - SHORT, longest // 2):
            groups[-1].append(request)
        else:
            groups.append([request])
    return [requests] if len(groups) == 1 else groups


@torch.inference_mode()
def _begin(target: Target, draft: Proposer | None, requests: list[Decoded], sampling: Sampling, seeds) -> Lanes:
    """Prefill: every request gets its first token, which belongs to no round."""
    started = time.perf_counter()
    lengths = torch.tensor([len(r.prompt_ids) for r in requests], device=target.device)
    tokens = torch.zeros(len(requests), int(lengths.max()), dtype=torch.long, device=target.device)
    for b, request in enumerate(requests):
        tokens[b, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids)
    state, context = target.prefill(tokens, lengths)
    _keep(requests, context, [len(r.prompt_ids) for r in requests])
    sampler = Sampler(sampling, seeds)
    rows = torch.arange(len(requests), device=target.device)
    anchor = sampler(target.logits(context.last[rows, lengths - 1])[:, None])[0][:, 0]
    drafted = None if draft is None else draft.begin(context, tokens)
    for request, token in zip(requests, anchor.tolist(), strict=True):
        request.output_ids.append(token)
        request.seconds += clock(target.device) - started
    return Lanes(requests, anchor, state, drafted, sampler)


@torch.inference_mode()
def _round(target: Target, draft: Proposer | None, lanes: Lanes, limits: Limits, scheduler: Scheduler, slots) -> None:
    """One forward of the target for the whole batch."""
    started = time.perf_counter()
    device, B = lanes.anchor.device, len(lanes.requests)
    if draft is None:
        proposal = Proposal(lanes.anchor.new_empty(B, 0), None, None)
        lengths = np.zeros(B, dtype=np.int64)
    else:
        proposal = draft.propose(lanes.draft, lanes.anchor, lanes.sampler, slots)
        lengths = _lengths(proposal, draft, lanes, limits, scheduler)
    longest = int(lengths.max(initial=0))
    proposed = proposal.tokens[:, :longest]
    counts = torch.from_numpy(lengths).to(device)
    drafted = clock(device)
    block = torch.cat([lanes.anchor[:, None], proposed], 1)
    context = target.extend(lanes.target, block)
    if draft is None:
        _keep(lanes.requests, context, [1] * B)
    logits = target.logits(context.last)
    if lanes.sampler.sampling.greedy:
        accepted, following = verify_greedy(proposed, logits.argmax(-1), counts)
    elif draft is None:
        accepted = counts
        following = draw(warp(logits[:, 0], lanes.sampler.sampling), lanes.sampler.uniforms(1, device)[:, 0])
    else:
        probabilities = None if proposal.probabilities is None else proposal.probabilities[:, :longest]
        uniforms = lanes.sampler.uniforms(proposal.tokens.shape[1] + 1, device)
        # Every request uses the same number of draws per round, whatever the length of other proposals.
        uniforms = torch.cat([uniforms[:, :longest], uniforms[:, -1:]], 1)
        warped = warp(logits, lanes.sampler.sampling)
        accepted, following = verify(proposed, probabilities, warped, counts, uniforms)
    host = torch.cat([accepted[:, None], following[:, None], proposed], 1).tolist()
    verified = committed_at = time.perf_counter()
    lanes.target.advance(accepted + 1)
    if draft is not None:
        keep = int(max(row[0] for row in host)) + 1
        committed = Context(context.taps[:, :keep], context.last[:, :keep], accepted + 1)
        verified = time.perf_counter()
        lanes.draft = draft.commit(lanes.draft, committed, block[:, :keep])
        committed_at = clock(device)
    lanes.anchor = following
    ended = clock(device)
    times = (drafted - started, verified - drafted, ended - started, committed_at - verified)
    confidence = None if proposal.confidence is None else proposal.confidence.tolist()
    for b, (request, row) in enumerate(zip(lanes.requests, host, strict=True)):
        request.seconds += times[2]
        scores = None if confidence is None else tuple(confidence[b])
        _book(request, row, int(lengths[b]), scores, times, limits, draft is not None)


def _keep(requests: list[Decoded], context: Context, counts: Sequence[int]) -> None:
    """Copy the states of the next tokens of each request to it, if states are kept."""
    if requests[0].states is None:
        return
    taps, last = context.taps.to("cpu", copy=True), context.last.to("cpu", copy=True)
    for b, (request, count) in enumerate(zip(requests, counts, strict=True)):
        request.states.append((taps[b, :count], last[b, :count]))


@torch.inference_mode()
def _close(target: Target, lanes: Lanes, rows: list[int], limits: Limits, closing: Sequence[int]) -> None:
    """Keep the states that decoding itself never computes: those of the last token of a finished text, and of what
    follows a stop token."""
    ended = [lanes.requests[r] for r in rows]
    texts = []
    for request in ended:
        token = request.output_ids[-1]
        texts.append([token, *(closing if token in limits.stop_token_ids else ())])
    block = torch.zeros(len(rows), max(map(len, texts)), dtype=torch.long)
    for row, text in zip(block, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    state = lanes.target.select(torch.tensor(rows, device=lanes.anchor.device))
    context = target.extend(state, block.to(lanes.anchor.device))
    _keep(ended, context, list(map(len, texts)))


def _lengths(proposal: Proposal, draft: Proposer, lanes: Lanes, limits: Limits, scheduler: Scheduler) -> np.ndarray:
    confidence = None
    if proposal.confidence is not None:
        confidence = torch.sigmoid(proposal.confidence.float()).cpu().numpy()
    proposed = np.full(len(lanes.requests), proposal.tokens.shape[1], dtype=np.int64)
    if limits.accounting == "deepspec" and draft.halts_on_stop and limits.stop_token_ids:
        stops = np.isin(proposal.tokens.cpu().numpy(), limits.stop_token_ids)
        first = np.where(stops.any(1), stops.argmax(1) + 1, proposed)
        proposed = np.minimum(proposed, first)
    return scheduler.lengths(confidence, proposed, [request.index for request in lanes.requests])


def _book(request: Decoded, row: list[int], length: int, confidence, times, limits: Limits, speculative: bool) -> None:
    """Record the round of one request: an accepted stop token ends the text there, and only slots up to it count."""
    accepted, following, tokens = row[0], row[1], row[2:]
    kept = [*tokens[:accepted], following]
    stop_at = next((i for i, token in enumerate(tokens[:accepted]) if token in limits.stop_token_ids), None)
    if stop_at is not None:
        kept, accepted, length = kept[: stop_at + 1], stop_at + 1, stop_at + 1
    if speculative:
        stop = kept[-1] in limits.stop_token_ids
        *whole, commit = times
        request.rounds.append(Round(length, accepted, tuple(kept), confidence, *whole, stop, commit))
    request.output_ids.extend(kept)


def _finish(request: Decoded, limits: Limits) -> Decoded:
    stopped = request.output_ids[-1] in limits.stop_token_ids and len(request.output_ids) <= limits.max_new_tokens
    request.truncated = not stopped
    request.output_ids = request.output_ids[: limits.max_new_tokens]
    return request


def clock(device: torch.device) -> float:
    """Time in seconds, after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
