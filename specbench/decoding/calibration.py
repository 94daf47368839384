"""Calibration of the confidence head: reliability by slot and sequential temperature scaling.

At slot k, the product a_k = c_1 ... c_k is compared with prefix acceptance, the event that the round accepted at least
k tokens (DSpark paper, section 5 and figure 6). A slot is observed only in the rounds that proposed it. If a scheduler
shortens a proposal by its confidences c_1..c_k, the observed slots remain unbiased given these confidences. An accepted
stop token ends a round at its slot, and later slots do not count.

Axes: R rounds, K slots, N observations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from specbench.decoding.calibration_error import calibration_noise
from specbench.decoding.scheduling import Scheduler
from specbench.files.atomic import read_object, write_json
from specbench.metrics.functional import (
    BINS,
    Reliability,
    auroc,
    brier_score,
    prefix_events,
    reliability_of,
    reliability_sums,
)

SCHEMA = "specbench.calibration/1"
# What a row says of the noise in its calibration error.
NOISE = ("ece_floor", "ece_band", "rms", "rms_low", "rms_high")
GRID = tuple(float(10 ** (step / 100)) for step in range(-100, 101))  # 0.1 to 10 in steps of 2.3%, 1 among them


def reliability(predicted: Float[np.ndarray, " N"], observed: Bool[np.ndarray, " N"], bins: int = BINS) -> Reliability:
    """The reliability diagram of one slot. Errors: ValueError without an observation.

    >>> round(float(reliability(np.array([0.81, 0.83, 0.32]), np.array([True, False, False])).ece), 4)
    0.32
    """
    if len(predicted) == 0:
        raise ValueError("no observation of this slot: record rounds that propose it (scheduler=fixed, length null)")
    return reliability_of(reliability_sums(predicted, observed, bins))


def probabilities(logits: Float[np.ndarray, "R K"], temperatures: Sequence[float] = ()) -> Float[np.ndarray, "R K"]:
    """c = sigmoid(logit / temperature of the slot) in fp64; without temperatures, sigmoid(logit). NaN stays NaN."""
    scaled = logits.astype(np.float64) / (np.asarray(temperatures) if len(temperatures) else 1.0)
    return 0.5 * (1.0 + np.tanh(0.5 * scaled))


def by_slot(
    confidence: Float[np.ndarray, "R K"],
    accepted: Int[np.ndarray, " R"],
    proposed: Int[np.ndarray, " R"],
    bins: int = BINS,
    prompts: Sequence[str] | None = None,
) -> list[dict]:
    """One row per slot: slot, n, survival, predicted, ece, auroc, brier and reliability (count, predicted, observed);
    with the prompt of each round also ece_floor and ece_band, what a head without error would show, and rms, rms_low
    and rms_high, the error without that noise (specbench/decoding/calibration_error.py).

    `confidence` are probabilities of conditional acceptance; their product up to each slot is evaluated. A slot that no
    round proposed has n = 0 and None for every number; auroc is None if all rounds have the same outcome.
    """
    events = prefix_events(confidence, accepted, proposed)
    rows = []
    for k in range(1, confidence.shape[1] + 1):
        seen = events.seen[:, k - 1]
        row = dict.fromkeys(("survival", "predicted", "ece", *NOISE, "auroc", "brier", "reliability"))
        if seen.any():
            p, y = events.predicted[seen, k - 1], events.passed[seen, k - 1]
            diagram = reliability(p, y, bins)
            row |= {
                "survival": float(y.mean()),
                "predicted": float(p.mean()),
                "ece": float(diagram.ece),
                "brier": float(brier_score(p, y)),
                "reliability": {
                    "count": diagram.count.astype(int).tolist(),
                    "predicted": diagram.predicted.tolist(),
                    "observed": diagram.observed.tolist(),
                },
            }
            if prompts is not None:
                noise = calibration_noise(p, y, [prompts[r] for r in np.flatnonzero(seen)], bins)
                values = (noise.floor, noise.band, noise.rms, noise.low, noise.high)
                row |= {name: None if np.isnan(v) else v for name, v in zip(NOISE, values, strict=True)}
            if 0 < y.sum() < len(y):
                row["auroc"] = float(auroc(p, y))
        rows.append({"slot": k, "n": int(seen.sum()), **row})
    return rows


@dataclass(frozen=True)
class Calibration:
    """Temperatures of the confidence logits, and the rounds on which they were fitted.

    `prompts` are the digests of the prompts of the fitted rounds, `fingerprint` the digest of the rounds themselves,
    `observations[k-1]` how many rounds proposed slot k, `at_edge` the slots whose best temperature is the grid's end.
    """

    temperatures: tuple[float, ...]
    prompts: frozenset[str]
    fingerprint: str
    observations: tuple[int, ...]
    at_edge: tuple[int, ...] = ()

    def apply(self, logits: Float[np.ndarray, "R K"]) -> Float[np.ndarray, "R K"]:
        """Calibrated probabilities of conditional acceptance; fewer slots than were fitted are a shortened block."""
        if logits.shape[1] > len(self.temperatures):
            raise ValueError(
                f"this calibration holds {len(self.temperatures)} slots and the draft's confidence has "
                f"{logits.shape[1]}; fit it on rounds of this draft"
            )
        return probabilities(logits, self.temperatures[: logits.shape[1]])

    def judge(
        self,
        logits: Float[np.ndarray, "R K"],
        accepted: Int[np.ndarray, " R"],
        proposed: Int[np.ndarray, " R"],
        prompts: Sequence[str],
        bins: int = BINS,
    ) -> list[dict]:
        """by_slot() before and after on held-out rounds: its rows with `calibrated` False, then True.

        ValueError if any of the prompts is one that the temperatures were fitted on.
        """
        shared = self.prompts & set(prompts)
        if shared:
            raise ValueError(
                f"{len(shared)} of {len(set(prompts))} prompts were used to fit this calibration; judge it on others"
            )
        sides = ((False, probabilities(logits)), (True, self.apply(logits)))
        return [
            {"calibrated": flag, **row}
            for flag, values in sides
            for row in by_slot(values, accepted, proposed, bins, prompts)
        ]

    def save(self, path: str | Path) -> None:
        """Write JSON by an atomic rename. Decoding looks for calibration.json beside the draft."""
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what save() wrote."""
        if not Path(path).is_file():
            raise ValueError(f"there is no calibration at {path}; make one with `specbench calibrate`")
        content = read_object(path)
        if content.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path} is not a calibration of schema {SCHEMA}; run `specbench calibrate` again")
        try:
            lists = {name: tuple(content[name]) for name in ("temperatures", "observations", "at_edge")}
            return cls(prompts=frozenset(content["prompts"]), fingerprint=content["fingerprint"], **lists)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a complete calibration ({error}); make it again") from error


def fit(
    logits: Float[np.ndarray, "R K"],
    accepted: Int[np.ndarray, " R"],
    proposed: Int[np.ndarray, " R"],
    prompts: Sequence[str],
    grid: Sequence[float] = GRID,
    bins: int = BINS,
) -> Calibration:
    """Sequential temperature scaling (paper, section 5): for k = 1..K the temperature of slot k that minimises the
    expected calibration error of the running product up to k, with slots before k held at their calibrated values.

    `prompts[r]` names the prompt of round r. Among equal errors the temperature nearest to 1 is taken. Errors:
    ValueError if a slot was never proposed.
    """
    slots = logits.shape[1]
    observations = tuple(int((proposed >= k).sum()) for k in range(1, slots + 1))
    if 0 in observations:
        raise ValueError(
            f"slot {observations.index(0) + 1} was never proposed in the {len(proposed)} rounds; fit on rounds that "
            "verify whole proposals (scheduler=fixed, length null)"
        )
    nearest_first = sorted(grid, key=lambda t: abs(np.log(t)))
    earlier, temperatures = np.ones(len(logits)), []
    for k in range(1, slots + 1):
        seen, own = proposed >= k, logits[:, k - 1 : k]
        y = accepted[seen] >= k
        errors = [reliability(earlier[seen] * probabilities(own[seen], (t,))[:, 0], y, bins).ece for t in nearest_first]
        temperatures.append(float(nearest_first[int(np.argmin(errors))]))
        earlier = earlier * probabilities(own, temperatures[-1:])[:, 0]
    mark = hashlib.sha256("".join(prompts).encode())
    for values in (np.nan_to_num(logits), accepted, proposed):
        mark.update(np.ascontiguousarray(values, dtype="<f8").tobytes())
    edges = tuple(k for k, t in enumerate(temperatures, start=1) if t in (min(grid), max(grid)))
    return Calibration(tuple(temperatures), frozenset(prompts), mark.hexdigest()[:16], observations, edges)


@dataclass(frozen=True)
class Calibrated(Scheduler):
    """Another scheduler on calibrated confidences. Scaling slot k uses only c_k, so a lossless scheduler stays
    lossless."""

    scheduler: Scheduler
    calibration: Calibration

    @property
    def lossless(self) -> bool:
        return self.scheduler.lossless

    @property
    def label(self) -> str:
        return f"{self.scheduler.label}, calibrated"

    def reset(self) -> None:
        self.scheduler.reset()

    def choose(self, confidence, proposed, requests, accepted):
        with np.errstate(divide="ignore"):  # a probability of exactly 0 or 1 has an infinite logit and does not change
            logits = np.log(confidence) - np.log1p(-confidence)
        return self.scheduler.lengths(self.calibration.apply(logits), proposed, requests, accepted)
