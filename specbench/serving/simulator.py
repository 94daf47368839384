"""A simulation of a serving engine under load: recorded rounds are replayed with the times of a cost profile.

Nothing is decoded here. The engine is synchronous, with continuous batching: every running request takes part in every
step; a step with R requests and B = R + verified draft tokens takes profile.seconds(R, B - R); requests join and leave
between steps. Assumptions: prefill happens elsewhere and takes no time here; scheduling takes no time (it overlaps with
the computation of the device); a round that verifies l of the proposed slots accepts min(j, l) if the recorded round
accepted j. Of a token tree the l most probable nodes are verified, and the accepted ones among them are accepted.

A request replays the rounds of one recorded prompt in order until it has committed as many tokens as were recorded.
With shorter lengths it needs more rounds than were recorded and begins again with the first one; this assumes that
acceptance does not depend on the position of the block within a prompt.

Axes: R running requests, K slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from specbench.decoding.cost_profile import CostProfile
from specbench.decoding.scheduling import Scheduler
from specbench.evaluation.recorded_rounds import PromptRounds


@dataclass(frozen=True)
class Workload:
    """Recorded prompts as flat arrays. Prompt p has the rounds start[p] .. start[p] + count[p] - 1."""

    proposed: Int[np.ndarray, " N"]
    accepted: Int[np.ndarray, " N"]
    confidence: Float[np.ndarray, "N K"] | None
    start: Int[np.ndarray, " P"]
    count: Int[np.ndarray, " P"]
    tokens: Int[np.ndarray, " P"]
    places: Int[np.ndarray, "N D"] | None = None  # of the accepted nodes of trees, in the order of the confidences

    @classmethod
    def of(cls, prompts: Sequence[PromptRounds], confidence: Float[np.ndarray, "N K"] | None = None) -> Workload:
        """From recorded prompts; `confidence` are the probabilities of all their rounds end to end, if any."""
        prompts = list(prompts)
        if not prompts or any(p.tokens < 1 for p in prompts):
            raise ValueError("a workload needs recorded prompts that commit tokens; record with `specbench evaluate`")
        count = np.array([len(p.proposed) for p in prompts])
        return cls(
            proposed=np.concatenate([p.proposed for p in prompts]),
            accepted=np.concatenate([p.accepted for p in prompts]),
            confidence=confidence,
            start=np.cumsum(count) - count,
            count=count,
            tokens=np.array([p.tokens for p in prompts]),
            places=None if prompts[0].places is None else np.concatenate([p.places for p in prompts]),
        )

    def accepts(self, at: Int[np.ndarray, " R"], lengths: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
        """Tokens that the rounds `at` accept if only the first `lengths` slots or nodes of each are verified."""
        if self.places is None:
            return np.minimum(self.accepted[at], lengths)
        places = self.places[at]
        return ((places >= 0) & (places < lengths[:, None])).sum(1)

    def needs(self, at: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
        """Slots or nodes that the rounds `at` must verify at least, to accept all that the target accepts."""
        return self.accepted[at] if self.places is None else self.places[at].max(1, initial=-1) + 1


@dataclass(frozen=True)
class EngineStep:
    """One engine step: time of its end, its duration, and counts summed over its requests."""

    end: float
    seconds: float
    requests: int
    verified: int
    proposed: int
    accepted: int
    committed: int
    waiting: int


@dataclass(frozen=True)
class Served:
    """One finished request (seconds of the simulated clock)."""

    arrived: float
    started: float
    finished: float
    tokens: int


@dataclass
class SimulatedEngine:
    """The event loop. `arrivals` are ascending times, or None for a closed loop in which a new request follows at once.

    Prompts are taken from `order` (indices into the workload) cyclically. `steps()` yields every step; `served`
    collects finished requests. A closed loop ends only if `limit` requests are given.
    """

    workload: Workload
    profile: CostProfile
    scheduler: Scheduler
    concurrency: int
    order: Sequence[int] | np.ndarray
    arrivals: Sequence[float] | np.ndarray | None = None
    limit: int | None = None
    served: list[Served] = field(default_factory=list, init=False)

    def steps(self) -> Iterator[EngineStep]:
        """Run until every request is served."""
        w = self.workload
        self.scheduler.reset()
        total = len(self.arrivals) if self.arrivals is not None else self.limit
        now, admitted, arrived = 0.0, 0, 0
        waiting: deque[float] = deque()
        name, prompt, cursor, left = (np.zeros(0, dtype=np.int64) for _ in range(4))
        born, began = np.zeros(0), np.zeros(0)
        while True:
            if self.arrivals is None:
                room = self.concurrency - len(name)
                joining = [now] * (room if total is None else min(room, total - admitted))
            else:
                if not len(name) and not waiting and arrived < len(self.arrivals):
                    now = max(now, float(self.arrivals[arrived]))
                while arrived < len(self.arrivals) and self.arrivals[arrived] <= now:
                    waiting.append(float(self.arrivals[arrived]))
                    arrived += 1
                joining = [waiting.popleft() for _ in range(min(len(waiting), self.concurrency - len(name)))]
            if joining:
                fresh = np.arange(admitted, admitted + len(joining))
                chosen = np.asarray(self.order)[fresh % len(self.order)]
                name, prompt = np.concatenate([name, fresh]), np.concatenate([prompt, chosen])
                cursor = np.concatenate([cursor, np.zeros_like(fresh)])
                left = np.concatenate([left, w.tokens[chosen]])
                born = np.concatenate([born, joining])
                began = np.concatenate([began, np.full(len(joining), now)])
                admitted += len(joining)
            if not len(name):
                return
            at = w.start[prompt] + cursor % w.count[prompt]
            proposed = w.proposed[at]
            confidence = None if w.confidence is None else w.confidence[at]
            lengths = self.scheduler.lengths(confidence, proposed, name.tolist(), w.needs(at))
            verified = int(lengths.sum())
            seconds = self.profile.step(len(name), len(name) + verified)
            kept = w.accepts(at, lengths)
            committed = np.minimum(kept + 1, left)
            now += seconds
            left, cursor = left - committed, cursor + 1
            sums = (int(x.sum()) for x in (lengths, proposed, kept, committed))
            yield EngineStep(now, seconds, len(name), *sums, waiting=len(waiting))
            done = left == 0
            for i in np.flatnonzero(done):
                self.served.append(Served(float(born[i]), float(began[i]), now, int(w.tokens[prompt[i]])))
            if done.any():
                name, prompt, cursor, left, born, began = (x[~done] for x in (name, prompt, cursor, left, born, began))
