"""python -m tests.analysis.coverage [SECONDS [PROMPTS-SEEDS-SPREAD ...]]: how often intervals and verdicts are right.

An experiment: four equal methods, each trained with S seeds, on the same P prompts. A prompt has its own ease; a method
suits a prompt by its own amount; a training moves the acceptance of all prompts, so that the accepted length of
trainings has the standard deviation `spread`. Every rate is about the method: the truth is the mean over prompts and
trainings. With heavy tails, a few prompts have most of the rounds, and eases are near 0 and 1.

Experiments are simulated. Each setting (all of SETTINGS, or those named, such as 72-3-0.05) runs for SECONDS of
processor time (default 12) with random numbers of its own; the number of experiments is printed with it.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from itertools import combinations

import numpy as np

from analysis.statistics import intervals as statistics
from analysis.statistics import training_seeds
from analysis.statistics.histograms import Counts, Sums, count
from analysis.statistics.training_seeds import FEWEST_SEEDS

SLOTS, METHODS = 4, 4
RESAMPLES = 400  # of each bootstrap here, to have more experiments
CURVES = {
    "length": lambda sums: sums.accepted_length,
    "conditional": lambda sums: sums.conditional,
    "survival": lambda sums: sums.survival,
    "decay": lambda sums: sums.suffix_decay,
}
SETTINGS = [(p, s, d, False) for p in (20, 72, 500) for s in (1, 3, 5) for d in (0.0, 0.02, 0.05)]
SETTINGS += [(p, 3, 0.05, True) for p in (20, 72, 500)]
COLUMNS = ("length", "difference", "macro", "conditional", "survival", "decay")


def prompts(generator: np.random.Generator, size: int, heavy: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ease and number of rounds of each prompt."""
    if not heavy:
        return generator.beta(5, 3, size), generator.integers(5, 26, size)
    rounds = np.clip(np.exp(generator.normal(2, 1.0, size)), 1, 200).astype(int)
    return generator.beta(1.2, 0.8, size), rounds


def chances(ease: np.ndarray, shift: np.ndarray | float) -> np.ndarray:
    """Chance of each slot, (..., K): it falls by 0.02 from slot to slot."""
    return np.clip((ease + shift)[..., None] - 0.02 * np.arange(SLOTS), 0.02, 0.98)


def sums_of(chance: np.ndarray, rounds: np.ndarray) -> Sums:
    """Expected sums over prompts, as `Counts.features` orders them."""
    survived = chance.cumprod(-1)
    passed = (rounds[:, None] * survived).sum(0)
    reached = np.concatenate([[rounds.sum()], passed[:-1]])
    scalars = [passed.sum() + rounds.sum(), rounds.sum(), SLOTS * rounds.sum(), passed.sum(), 0.0, 1.0]
    return Sums(np.concatenate([scalars, np.full(SLOTS, rounds.sum()), reached, passed]))


class Population:
    """The truth of a setting, and experiments drawn from it."""

    def __init__(self, spread: float, heavy: bool):
        self.heavy = heavy
        self.generator = np.random.default_rng([int(1000 * spread), heavy])
        ease, rounds = prompts(self.generator, 200_000, heavy)
        ease = ease + self.generator.normal(0, 0.03, len(ease))
        step = (sums_of(chances(ease, 0.01), rounds), sums_of(chances(ease, -0.01), rounds))
        slope = float(step[0].accepted_length - step[1].accepted_length) / 0.02
        self.sd = spread / slope
        shifted = chances(ease, self.generator.normal(0, self.sd, len(ease)))
        whole = sums_of(shifted, rounds)
        self.truth = {name: np.asarray(curve(whole)) for name, curve in CURVES.items()}

    def draw(self, size: int, seeds: int) -> list[list[Counts]]:
        """Counts of every training of every method on the same prompts."""
        ease, rounds = prompts(self.generator, size, self.heavy)
        prompt = np.repeat(np.arange(size), rounds)
        ones = np.ones_like(prompt)
        methods = []
        for _ in range(METHODS):
            suited = ease + self.generator.normal(0, 0.03, size)
            trained = []
            for shift in self.generator.normal(0, self.sd, seeds):
                chance = chances(suited, shift)[prompt]
                accepted = (self.generator.random(chance.shape) < chance).cumprod(1).sum(1)
                committed = np.bincount(prompt, accepted + 1, minlength=size)
                trained.append(count(np.arange(size), committed, prompt, SLOTS * ones, accepted, ones))
            methods.append(trained)
        return methods


def pooled(seeds: list[Counts]) -> Counts:
    """All trainings of a method, with a prompt's rounds in one row."""
    fields = ("committed", "rounds", "proposed", "accepted", "offered", "reached", "passed")
    return Counts(seeds[0].prompts, *(sum(getattr(counts, field) for counts in seeds) for field in fields))


def experiment(population: Population, size: int, seeds: int, seed: int, found: dict[str, list[float]]) -> None:
    """One experiment; adds 1 or 0 for every interval that covers, and for every family with a false verdict."""
    methods = population.draw(size, seeds)
    counts, truth = [pooled(own) for own in methods], population.truth
    parts = [training_seeds.of_quantities(own, CURVES, seed) for own in methods]
    shared = {name: training_seeds.pooled([part[name] for part in parts]) for name in CURVES}
    half = size // 2
    benchmarks = [[[c.take(np.arange(*ends)) for c in own] for ends in ((0, half), (half, size))] for own in methods]
    macro = training_seeds.pooled([training_seeds.of_macro(own, seed) for own in benchmarks])

    def covers(name: str, true: np.ndarray, value, low, high, variance, falls: bool = False) -> None:
        known = ~np.isnan(np.atleast_1d(low))
        inside = np.atleast_1d((low <= true) & (true <= high))[known]
        found[f"checkpoints {name}"] += inside.tolist()
        if variance.known.any():
            if np.ndim(value):
                wide = training_seeds.widened_curve(value, low, high, variance, 1 / seeds, falls)
            else:
                wide = training_seeds.widened(value, low, high, variance, 1 / seeds)
            found[name] += np.atleast_1d((wide[0] <= true) & (true <= wide[1]))[known].tolist()

    for own, strata in zip(counts, benchmarks, strict=True):
        for name in ("length", "decay"):
            covers(name, truth[name], *statistics.interval(own, CURVES[name], RESAMPLES, seed), shared[name])
        for name in ("conditional", "survival"):
            curve = statistics.by_slot(own, name == "conditional", RESAMPLES, seed)
            covers(name, truth[name], *curve, shared[name], name == "survival")
        mean = statistics.macro([pooled(c) for c in strata], RESAMPLES, seed)
        covers("macro", truth["length"], mean.value, mean.low, mean.high, macro)
    ps: dict[str, list[float]] = {"checkpoints": [], "methods": []}
    memo: dict = {}
    for a, b in combinations(counts, 2):
        pair = statistics.difference([a], [b], RESAMPLES, seed, memo=memo)
        covers("difference", np.float64(0), pair.value, pair.low, pair.high, training_seeds.UNKNOWN)
        ps["checkpoints"].append(pair.p)
        if seeds >= FEWEST_SEEDS:
            verdict = training_seeds.of_methods(pair, shared["length"], 2 / seeds)
            found["difference"].append(verdict.low <= 0 <= verdict.high)
            ps["methods"].append(verdict.p)
    found["any of checkpoints"].append(min(ps["checkpoints"]) < 0.05)
    for name, values in ps.items():
        if values:
            found[f"any of {name}, Holm"].append(bool(statistics.holm(values).min() <= 0.05))


def main(seconds: float, chosen: list[str]) -> None:
    """Print one row a setting."""
    training_seeds.RESAMPLES = 200
    alarms = ("any of checkpoints", "any of checkpoints, Holm", "any of methods, Holm")
    head = ["prompts", "seeds", "spread", "experiments", *COLUMNS, "checkpoints length", "checkpoints difference"]
    print("| " + " | ".join([*head, *alarms]) + " |")
    print("|" + "---:|" * (len(head) + 3))
    for size, seeds, spread, heavy in SETTINGS:
        name = f"{size}{'heavy' if heavy else ''}-{seeds}-{spread:g}"
        if chosen and name not in chosen:
            continue
        population, found, number = Population(spread, heavy), defaultdict(list), 0
        began = time.process_time()
        while time.process_time() - began < seconds:
            experiment(population, size, seeds, number, found)
            number += 1
        row = [f"{size}{' heavy' if heavy else ''}", str(seeds), f"{spread:.2f}", str(number)]
        row += [f"{np.mean(found[name]):.3f}" if found[name] else "-" for name in (*head[4:], *alarms)]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 12.0, sys.argv[2:])
