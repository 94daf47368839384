"""Cost profile of an engine: SPS(B), the engine steps per second with B tokens in the forward pass.

It is measured once per machine and target (DSpark paper, section 5) and is all that the hardware-aware scheduler
knows about the hardware. A profile has a label and states whether it was measured; every number computed from it
repeats both.

Axes: P profiled sizes, B tokens in one forward pass (every request's anchor included), R requests.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import Float

from specbench.files.atomic import read_object
from specbench.ranges import Among

SCHEMA = "specbench.profile/1"
SOURCES = ("measured", "illustrative")
INTERPOLATIONS = ("linear", "padded")


@dataclass(frozen=True)
class CostProfile:
    """SPS(B) as a table.

    `tokens` are strictly ascending; `steps_per_second` are the rates at these sizes. Between two sizes, `linear`
    interpolates the seconds of a step; `padded` uses the next larger size, as an engine that replays CUDA graphs
    captured at a few sizes. Outside the table there is no extrapolation, but a ValueError.

    `draft_requests` and `draft_seconds` (optional) are the draft's time for one proposal of R requests, interpolated
    linearly and added to the step; leave them empty if `steps_per_second` includes this time.
    """

    tokens: Sequence[int] | np.ndarray
    steps_per_second: Sequence[float | int] | np.ndarray
    label: str
    source: str
    interpolation: Annotated[str, Among(INTERPOLATIONS)] = "linear"
    draft_requests: Sequence[int] | np.ndarray = ()
    draft_seconds: Sequence[float | int] | np.ndarray = ()

    def __post_init__(self) -> None:
        for name, kind in (("tokens", int), ("steps_per_second", float)):
            object.__setattr__(self, name, tuple(kind(v) for v in getattr(self, name)))
        for name, kind in (("draft_requests", int), ("draft_seconds", float)):
            object.__setattr__(self, name, tuple(kind(v) for v in getattr(self, name)))
        if self.source not in SOURCES:
            raise ValueError(f"profile '{self.label}' has source={self.source!r}; say one of {', '.join(SOURCES)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation={self.interpolation!r} is not one of {', '.join(INTERPOLATIONS)}")
        self._check("tokens", self.tokens, self.steps_per_second)
        if self.draft_requests or self.draft_seconds:
            self._check("draft_requests", self.draft_requests, self.draft_seconds)

    def _check(self, name: str, sizes: Sequence[int], values: Sequence[float]) -> None:
        if not sizes or len(sizes) != len(values):
            raise ValueError(f"profile '{self.label}': {len(sizes)} {name} against {len(values)} values; give pairs")
        if sizes[0] < 1 or any(b <= a for a, b in pairwise(sizes)):
            raise ValueError(f"profile '{self.label}': {name}={list(sizes)} must be positive and strictly ascending")
        if not all(np.isfinite(v) and v > 0 for v in values):
            raise ValueError(f"profile '{self.label}': the values at {name} must be positive and finite")

    @cached_property
    def _verify_seconds(self) -> Float[np.ndarray, " B"]:
        """Seconds of a step at tokens[0], tokens[0]+1, ..., tokens[-1]."""
        sizes = np.arange(self.tokens[0], self.tokens[-1] + 1)
        seconds = 1.0 / np.asarray(self.steps_per_second)
        if self.interpolation == "padded":
            return seconds[np.searchsorted(self.tokens, sizes)]
        return np.interp(sizes, self.tokens, seconds)

    def draft_time(self, requests: int) -> float:
        """Seconds of one proposal for `requests` requests; 0 if the profile has no draft table."""
        if not self.draft_requests:
            return 0.0
        if not self.draft_requests[0] <= requests <= self.draft_requests[-1]:
            raise ValueError(
                f"profile '{self.label}' knows the draft from {self.draft_requests[0]} to {self.draft_requests[-1]} "
                f"requests and was asked for {requests}; measure that size or lower the concurrency"
            )
        return float(np.interp(requests, self.draft_requests, self.draft_seconds))

    def seconds(self, requests: int, extra: int = 0) -> Float[np.ndarray, " B"]:
        """Seconds of one engine step for B = requests, ..., requests + extra tokens in the forward pass."""
        verify = self._verify(requests, requests + extra)
        return verify + self.draft_time(requests) if self.draft_requests else verify

    def step(self, requests: int, tokens: int) -> float:
        """Seconds of one engine step of `requests` requests with `tokens` tokens in the forward pass."""
        return float(self._verify(tokens, tokens)[0]) + self.draft_time(requests)

    def _verify(self, fewest: int, most: int) -> Float[np.ndarray, " B"]:
        first, last = self.tokens[0], self.tokens[-1]
        if fewest < first or most > last:
            raise ValueError(
                f"profile '{self.label}' covers {first} to {last} tokens in the forward pass and was asked for "
                f"{fewest} to {most}; profile more sizes, or change the concurrency or proposal length"
            )
        return self._verify_seconds[fewest - first : most - first + 1]

    def rates(self, requests: int, extra: int = 0) -> Float[np.ndarray, " B"]:
        """SPS(B) for B = requests, ..., requests + extra: engine steps per second."""
        return 1.0 / self.seconds(requests, extra)

    def with_draft(self, requests: Sequence[int], seconds: Sequence[float]) -> CostProfile:
        """The same target with a draft that takes `seconds[i]` for one proposal of `requests[i]` requests."""
        return replace(self, draft_requests=tuple(requests), draft_seconds=tuple(seconds))

    def monotone(self) -> CostProfile:
        """The profile with seconds raised to their running maximum: no size is faster than a smaller one.

        This removes decreases that are measurement noise and never lowers a cost. The label says so.
        """
        slowest = np.minimum.accumulate(self.steps_per_second)
        return replace(self, steps_per_second=tuple(slowest.tolist()), label=f"{self.label}, made monotone")

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        Path(path).write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CostProfile:
        """Read a file of save(), or a CSV table (see from_csv), whose label is then the file name."""
        if not Path(path).is_file():
            raise ValueError(f"there is no cost profile at {path}; measure one with `specbench speed` or name another")
        if Path(path).suffix == ".csv":
            return cls.from_csv(path, Path(path).name)
        content = read_object(path)
        if content.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path} is not a cost profile of schema {SCHEMA}; write it with CostProfile.save")
        try:
            return cls(**content)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a complete cost profile ({error}); use CostProfile.save") from error

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, float]], label: str, source: str = "measured") -> CostProfile:
        """From (tokens, steps per second) in any order; the median rate is used for a size that was measured several
        times."""
        found: dict[int, list[float]] = {}
        for tokens, rate in pairs:
            found.setdefault(int(tokens), []).append(float(rate))
        sizes = sorted(found)
        return cls(sizes, [float(np.median(found[size])) for size in sizes], label, source)

    @classmethod
    def from_csv(cls, path: str | Path, label: str, source: str = "measured") -> CostProfile:
        """From a CSV with the columns `tokens` and `steps_per_second`, or `tokens` and `seconds` (of one step)."""
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            columns = set(reader.fieldnames or ())
            if "tokens" not in columns or not columns & {"steps_per_second", "seconds"}:
                raise ValueError(
                    f"{path} has columns {sorted(columns)}; it needs tokens, and steps_per_second or seconds"
                )
            rates = "steps_per_second" in columns
            pairs = [
                (int(row["tokens"]), float(row["steps_per_second"]) if rates else 1.0 / float(row["seconds"]))
                for row in reader
            ]
        return cls.from_pairs(pairs, label, source)
