"""Schedulers: the number of draft tokens of each request that the target verifies in a round.

Every scheduler maps confidences to lengths with one signature: `lengths(confidence (R, K), proposed (R,)) -> (R,)`.
Confidences are probabilities: c[r, k] is the predicted probability that slot k is accepted if slots 1..k-1 were, so
the product a[r, k] = c[r, 1] ... c[r, k] predicts prefix acceptance (DSpark paper, section 5).

LOSSLESS means: the decision to verify slot k uses nothing that depends on x_k or a later token. c_k depends on x_{k-1}
(the Markov embedding of the previous token), so the decision for slot k may use c_1..c_k and no later confidence. A
rule that uses c_{k+1} depends on x_k and changes the distribution of the output (paper, appendix A).

Axes: R requests, K slots. `proposed[r] <= K` slots were drafted; confidences beyond are not read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from specbench.decoding.cost_profile import CostProfile
from specbench.ranges import Count, Natural, Share

Confidence = Float[np.ndarray, "R K"]
Lengths = Int[np.ndarray, " R"]


def fixed(proposed: Lengths, length: int | None) -> Lengths:
    """The first `length` proposed slots of every request; all of them when it is None."""
    return proposed.copy() if length is None else np.minimum(proposed, length)


def thresholded(confidence: Confidence, proposed: Lengths, threshold: float | int, cumulative: bool = False) -> Lengths:
    """Slots before the first one whose confidence is below `threshold`.

    The confidence of the slot is compared (the rule of the released evaluator), or with `cumulative` the product a.
    """
    values = confidence.cumprod(1) if cumulative else confidence
    return np.minimum((values >= threshold).cumprod(1).sum(1), proposed)


def survival(confidence: Confidence, proposed: Lengths) -> Confidence:
    """a[r, k] = c[r, 1] ... c[r, k] in fp64, and -1 for slots that were not proposed."""
    by_slot = np.cumprod(np.ascontiguousarray(confidence.T), axis=0, dtype=np.float64)  # (K, R): R is the wide axis
    return np.where(np.arange(len(by_slot))[:, None] < proposed, by_slot, -1.0).T


def ratios(joint: Confidence) -> Confidence:
    """The confidences whose products along a row are `joint`, which must not increase: the inverse of `survival`."""
    before = np.concatenate([np.ones_like(joint[:, :1]), joint[:, :-1]], 1)
    return np.divide(joint, before, out=np.zeros_like(joint), where=before > 0)


def prefix_schedule(
    confidence: Confidence, proposed: Lengths, profile: CostProfile, early_stop: bool = True
) -> Lengths:
    """The hardware-aware prefix scheduler (paper, algorithm 1): lengths that raise expected tokens per second.

    Slots of all requests are added in the order of decreasing survival a. With m added, B = R + m tokens are in the
    forward pass and tau = R + sum of their a is the expected number of committed tokens, so tau * SPS(B) is the
    throughput. `early_stop` ends at the first slot that does not raise it, which keeps the rule lossless; without it
    the best m is taken. Equal survivals are ordered by slot, then by request. Equal to prefix_schedule_reference, with
    one sort.
    """
    requests = len(proposed)
    a = survival(confidence, proposed).T  # (K, R)
    ranked = np.sort(a, axis=None, kind="stable")[::-1][: int(proposed.sum())]
    tau = np.empty(len(ranked) + 1)
    tau[0] = requests
    np.cumsum(ranked, out=tau[1:])
    tau[1:] += requests
    value = tau / profile.seconds(requests, len(ranked))
    if early_stop:
        worse = value[1:] <= value[:-1]  # before the first stop every value is the best so far
        admitted = int(worse.argmax()) if worse.any() else len(ranked)
    else:
        admitted = int(value.argmax())
    if admitted == 0:
        return np.zeros_like(proposed)
    last = ranked[admitted - 1]
    lengths = (a > last).sum(0)
    ties = admitted - int(lengths.sum())
    _, rows = np.nonzero(a == last)  # by slot, then by request
    return lengths + np.bincount(rows[:ties], minlength=requests)


def prefix_schedule_reference(
    confidence: Confidence, proposed: Lengths, profile: CostProfile, early_stop: bool = True
) -> Lengths:
    """Algorithm 1 of the paper, literally, one slot at a time: the reference implementation of prefix_schedule."""
    requests = len(proposed)
    a = survival(confidence, proposed)
    slots = [(-a[r, k], k, r) for r in range(requests) for k in range(int(proposed[r]))]
    lengths, tau = np.zeros_like(proposed), float(requests)
    chosen, best = lengths.copy(), tau * float(profile.rates(requests)[0])
    for admitted, (negative, _, r) in enumerate(sorted(slots), start=1):
        lengths[r] += 1
        tau -= negative
        value = tau * float(profile.rates(requests, admitted)[-1])
        if value > best:
            best, chosen = value, lengths.copy()
        elif early_stop:
            break
    return chosen


class Scheduler(ABC):
    """A rule for how many proposed slots to verify, configurable from YAML.

    `lossless` is False for a rule that can change the distribution of the output; decoding refuses it.
    """

    lossless: ClassVar[bool] = True
    needs_confidence: ClassVar[bool] = True

    @property
    def orders_nodes(self) -> bool:
        """Whether the rule has a meaning for the nodes of a token tree (tree_scheduling.py): it depends on predicted
        survivals alone, not on which slot has them."""
        return False

    @property
    @abstractmethod
    def label(self) -> str:
        """Value of the `scheduler` column of a record."""

    @abstractmethod
    def choose(
        self,
        confidence: Confidence | None,
        proposed: Lengths,
        requests: Sequence[Hashable] | None,
        accepted: Lengths | None,
    ) -> Lengths:
        """lengths() without its checks."""

    def lengths(
        self,
        confidence: Confidence | None,
        proposed: Lengths,
        requests: Sequence[Hashable] | None = None,
        accepted: Lengths | None = None,
    ) -> Lengths:
        """Slots to verify, 0 <= lengths <= proposed.

        `requests`: identities of the rows, for a scheduler that remembers earlier rounds. `accepted`: the number of
        tokens that the target will accept of the full proposal; known only when recorded rounds are replayed.
        """
        if self.needs_confidence and confidence is None:
            raise ValueError(
                f"scheduler {self.label} needs a draft with a confidence head and this one has none; "
                "use scheduler=fixed, or train with a confidence term"
            )
        return self.choose(confidence, proposed, requests, accepted)

    def reset(self) -> None:  # noqa: B027 (a rule without memory has nothing to do)
        """Forget earlier rounds."""


@dataclass(frozen=True)
class FixedLength(Scheduler):
    """The first `length` slots of every proposal; `length: null` verifies everything proposed."""

    length: Natural | None = None
    needs_confidence: ClassVar[bool] = False

    @property
    def orders_nodes(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 0:
            raise ValueError(f"length={self.length} is negative; say how many slots to verify, or null for all")

    @property
    def label(self) -> str:
        return "fixed" if self.length is None else f"fixed-{self.length}"

    def choose(self, confidence, proposed, requests, accepted):
        return fixed(proposed, self.length)


@dataclass(frozen=True)
class StaticThreshold(Scheduler):
    """Cuts at the first slot whose confidence, or with `cumulative` the product a, is below `threshold`."""

    threshold: Share
    cumulative: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} is not a probability; choose it between 0 and 1")

    @property
    def label(self) -> str:
        return f"{'cumulative-' if self.cumulative else ''}threshold-{self.threshold:g}"

    @property
    def orders_nodes(self) -> bool:
        return self.cumulative

    def choose(self, confidence, proposed, requests, accepted):
        return thresholded(confidence, proposed, self.threshold, self.cumulative)


@dataclass(frozen=True)
class HardwareAware(Scheduler):
    """The hardware-aware prefix scheduler with early stop (paper, algorithm 1)."""

    profile: CostProfile

    @property
    def label(self) -> str:
        return "hardware-aware"

    @property
    def orders_nodes(self) -> bool:
        return True

    def choose(self, confidence, proposed, requests, accepted):
        return prefix_schedule(confidence, proposed, self.profile)


@dataclass
class DelayedGlobal(Scheduler):
    """The best prefix lengths over all sizes, computed from confidences of `delay` rounds ago (paper, section 5.2).

    A global search is lossless only with confidences that do not depend on a token of the current round; the engine of
    the paper plans two rounds ahead. A request with fewer than `delay` rounds has no such confidence and is planned as
    if every proposed slot were certain.
    """

    profile: CostProfile
    delay: Count = 2
    _history: dict[Hashable, deque] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.delay < 1:
            raise ValueError(
                f"delay={self.delay} lets the global search use this round's tokens, which changes the distribution of "
                "the output; use 2 as the paper does, at least 1, or scheduler=hardware_aware"
            )

    @property
    def label(self) -> str:
        return f"delayed-global-{self.delay}"

    @property
    def orders_nodes(self) -> bool:
        return True

    def reset(self) -> None:
        self._history.clear()

    def choose(self, confidence, proposed, requests, accepted):
        if requests is None or len(set(requests)) != len(proposed):
            raise ValueError(f"scheduler {self.label} remembers earlier rounds; name each row's request, once each")
        self._history = {name: self._history.get(name) or deque(maxlen=self.delay) for name in requests}
        rows, known = np.ones_like(confidence), proposed.copy()
        for i, name in enumerate(requests):
            if len(self._history[name]) == self.delay:
                rows[i], limit = self._history[name][0]
                known[i] = min(limit, known[i])
            self._history[name].append((confidence[i].copy(), int(proposed[i])))
        return prefix_schedule(rows, known, self.profile, early_stop=False)


@dataclass(frozen=True)
class OracleScheduler(Scheduler):
    """Verifies exactly the tokens that the target will accept: an upper bound, possible only on recorded rounds."""

    lossless: ClassVar[bool] = False
    needs_confidence: ClassVar[bool] = False

    @property
    def label(self) -> str:
        return "oracle"

    def choose(self, confidence, proposed, requests, accepted):
        if accepted is None:
            raise ValueError("scheduler oracle works on recorded rounds only; decode with another scheduler")
        return np.minimum(accepted, proposed)
