"""What the intervals and verdicts of a table are about: these checkpoints, or the methods; and what was corrected.

A table speaks of methods if every row of it has FEWEST_SEEDS trainings or more; rows that are not trained (prompt
lookup) have no variance between trainings and do not count. Otherwise it speaks of the checkpoints
that were decoded, and marks nothing as best.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.statistics.intervals import FEWEST
from analysis.statistics.training_seeds import FEWEST_SEEDS
from analysis.tables.groups import Group

CHECKPOINTS, METHOD = "these checkpoints", "this method"


def of_methods(part: Sequence[Group]) -> bool:
    """Whether the table of these groups can speak of methods."""
    trained = [group.trainings for group in part if np.isfinite(group.trainings)]
    return bool(trained) and min(trained) >= FEWEST_SEEDS


def trainings(part: Sequence[Group]) -> str:
    """`one training each`, `3 trainings each`, `1 to 3 trainings`."""
    counted = [len(group.seeds) for group in part if np.isfinite(group.trainings)] or [1]
    least, most = min(counted), max(counted)
    if least != most:
        return f"{least} to {most} trainings"
    return "one training each" if most == 1 else f"{most} trainings each"


def note(part: Sequence[Group], method: bool) -> str:
    """The tier of a table, in words."""
    if method:
        return (
            f"Intervals are about {METHOD}: prompts and training seeds ({trainings(part)}; the variance between "
            "trainings is pooled over the rows)."
        )
    return (
        f"Intervals are about {CHECKPOINTS} ({trainings(part)}): the cluster bootstrap resamples prompts only, so they "
        f"say nothing about another training, and nothing is marked best (that needs {FEWEST_SEEDS} trainings of every "
        "row)."
    )


def best(pairs: pd.DataFrame) -> str:
    """What a mark means in a table about methods."""
    return (
        f"Bold (or *): best, and its difference to every other {METHOD[5:]} of the column is resolved at 5% "
        f"{correction(pairs, '_method')}."
    )


def correction(pairs: pd.DataFrame, tier: str = "") -> str:
    """`after Holm's correction over the 24 tests of this table`, or that there was none."""
    tested = pairs.drop_duplicates(["benchmark", "a", "b"])[f"p{tier}"].notna().sum()
    if tested and not pairs[f"p{tier}_holm"].notna().any():
        return f"without a correction for the {tested} tests of this table"
    return f"after Holm's correction over the {tested} tests of this table (pairs x columns)"


def of_differences(part: Sequence[Group], pairs: pd.DataFrame) -> list[str]:
    """Notes under a table of differences: both tiers, the correction, and what was not decided."""
    said = [
        f"{CHECKPOINTS.capitalize()}: paired cluster bootstrap over the prompts that both decoded. "
        f"{METHOD.capitalize()}: prompts and training seeds; half-width sqrt(prompts^2 + t^2 v (1/S_a + 1/S_b)), v the "
        f"variance between trainings, pooled over the rows ({trainings(part)}). Resolved: p at most 0.05 "
        f"{correction(pairs)}; intervals are those of each pair alone."
    ]
    if not of_methods(part):
        said.append(f"A verdict about methods needs {FEWEST_SEEDS} trainings of both.")
    if np.asarray(pairs["borderline"], dtype=bool).any():
        said.append("Borderline: another seed of the bootstrap could turn the verdict; raise resamples.")
    if (pairs["note"].str.contains("too few") & pairs["note"].str.contains("prompts")).any():
        said.append(f"With fewer than {FEWEST} prompts nothing is resolved.")
    return said
