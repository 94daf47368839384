"""The prompts and trainings that resolve a gap, from pilot runs: frames and sheets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd

from analysis.statistics import training_seeds
from analysis.statistics.pilot import Pilot, pilot
from analysis.statistics.training_seeds import FEWEST_SEEDS, SeedVariance
from analysis.tables import groups as grouping
from analysis.tables.groups import Group
from analysis.tables.sheets import Cell, Sheet, only


def pilots(found: Sequence[Group], spread: float | None = None) -> list[tuple[dict, int, dict[tuple[str, str], Pilot]]]:
    """For every section the tests of its table (pairs x columns) and the variances of each pair of rows.

    Args:
        spread: standard deviation of accepted length between trainings; None: that of the runs.

    Raises:
        ValueError: one training of each row and no `spread`; fewer than two rows.
    """
    made = []
    for section, part in grouping.sections(found):
        every = grouping.variants(part)
        places = grouping.domains(part)
        names = [name for own in places.values() for name in own]
        rows = {label: {group.benchmark: group for group in own} for label, own in every.items()}
        rows = {label: [own[name] for name in names] for label, own in rows.items() if all(n in own for n in names)}
        if len(rows) < 2:
            raise ValueError(f"{grouping.title(section)}: power compares rows, and {len(rows)} has every benchmark")
        trained = {label: [list(group.seeds.values()) for group in own] for label, own in rows.items()}
        shared = training_seeds.pooled([training_seeds.of_macro(own) for own in trained.values()])
        if spread is not None:
            shared = SeedVariance(np.float64(spread**2), np.float64(1))
        if not shared.known:
            raise ValueError(
                f"{grouping.title(section)}: one training of each row tells nothing about other trainings; add runs of "
                "further seeds (two each suffice for a pilot), or state their standard deviation, e.g. spread=0.03"
            )
        several = sum(len(own) > 1 for own in places.values())
        tests = comb(len(rows), 2) * (len(names) + several + (len(names) > 1 and len(places) > 1))
        pairs = {(a, b): pilot(trained[a], trained[b], shared, len(rows)) for a, b in combinations(rows, 2)}
        made.append((section, tests, pairs))
    return made


def frame(
    found: Sequence[Group],
    gap: float,
    *,
    power: float = 0.8,
    prompts: Sequence[int] = (20, 72, 200, 500, 2000),
    seeds: Sequence[int] = (3, 5, 10),
    spread: float | None = None,
) -> pd.DataFrame:
    """One row per pair and number of seeds: the fewest prompts that resolve `gap` (missing if no number does), and the
    gap that each number of prompts resolves.

    Raises:
        ValueError: see `pilots`; fewer seeds than a verdict about methods needs.
    """
    if min(seeds) < FEWEST_SEEDS:
        raise ValueError(f"seeds={list(seeds)}: a verdict about methods needs {FEWEST_SEEDS} trainings of each or more")
    rows = []
    for section, tests, pairs in pilots(found, spread):
        for (a, b), known in pairs.items():
            for count in seeds:
                fewest = known.prompts_for(gap, count, power, tests)
                facts = {"a": a, "b": b, "tests": tests, "power": power, "gap": gap, "seeds": count}
                facts |= {"prompts": np.nan if fewest is None else fewest}
                facts |= {f"gap_at_{n}": known.gap(n, count, power, tests) for n in prompts}
                sds = {"sd_prompt": known.prompt, "sd_decoding": known.decoding, "sd_training": known.training}
                rows.append({**section, **facts, **{name: float(np.sqrt(value)) for name, value in sds.items()}})
    return pd.DataFrame(rows)


def sheets(found: Sequence[Group], table: pd.DataFrame) -> list[Sheet]:
    """One sheet per section."""
    made = []
    grid = [name for name in table if name.startswith("gap_at_")]
    for section, _ in grouping.sections(found):
        own = only(table, section)
        first = own.iloc[0]
        rows = []
        for _, row in own.iterrows():
            needed = "none" if pd.isna(row["prompts"]) else f"{row['prompts']:.0f}"
            cells = [Cell(f"{row['a']} - {row['b']}"), Cell(str(row["seeds"]), sort=row["seeds"])]
            cells.append(Cell(needed, sort=row["prompts"]))
            cells += [Cell(f"{row[name]:.3f}", sort=row[name]) for name in grid]
            rows.append([*cells, Cell(f"{row['sd_training']:.3f}", sort=row["sd_training"])])
        columns = ["pair", "seeds", f"prompts for {first['gap']:g}"]
        columns += [f"at {name.removeprefix('gap_at_')}" for name in grid]
        notes = [
            f"Prompts that resolve a difference of {first['gap']:g} in the macro average of accepted length with "
            f"{first['power']:.0%} power at 5%, corrected for the {first['tests']} tests of the table. None: no number "
            "of prompts does, because trainings alone vary too much. At N: the difference that N prompts resolve. sd: "
            "standard deviation of accepted length between trainings of one method."
        ]
        made.append(Sheet("power", f"Power: {grouping.title(section)}", [*columns, "sd training"], rows, notes=notes))
    return made
