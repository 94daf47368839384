"""A comparison over recipes: in how many the order of methods holds, and which part of a recipe changes it.

A recipe is one combination of settings (loss, temperature, start, rate, ...) under which all methods were trained and
decoded alike. Over a complete grid, sums of squares split the variation of the values into main effects and
interactions (analysis of variance of a balanced design with one value a cell). The interaction of a factor with the
method is the part that can turn an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import pandas as pd

METHOD, VALUE = "method", "accepted_length"


@dataclass(frozen=True)
class Orders:
    """How stable the order of methods is over recipes.

    Args:
        order: methods by their mean over all recipes, best first.
        recipes: number of recipes with a value of every method.
        holds: recipes in which the whole order is this one.
        same_first: recipes with the same best method.
        incomplete: recipes in which a method has no value, which are left out.
    """

    order: tuple[str, ...]
    recipes: int
    holds: int
    same_first: int
    incomplete: int

    @property
    def text(self) -> str:
        """The one line that a paper needs."""
        left = f" ({self.incomplete} recipes without a value of every method are left out)" if self.incomplete else ""
        return (
            f"The order of methods {' > '.join(self.order)} (mean over recipes) holds in {self.holds} of "
            f"{self.recipes} recipes; {self.order[0]} is first in {self.same_first} of {self.recipes}{left}."
        )


def by_recipe(frame: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """Values with a row for each recipe and a column for each method; missing ones are NaN.

    Errors: ValueError where a recipe has several values of one method.
    """
    twice = frame[frame.duplicated([*factors, METHOD], keep=False)]
    if len(twice):
        raise ValueError(
            f"method {twice[METHOD].iloc[0]} has several values under one recipe: name in group_by what tells them "
            "apart"
        )
    return frame.pivot(index=list(factors), columns=METHOD, values=VALUE)


def orders(table: pd.DataFrame) -> Orders | None:
    """Of `by_recipe`; None with fewer than two methods or two complete recipes. Equal values keep the order."""
    whole = table.dropna()
    if len(whole) < 2 or table.shape[1] < 2:
        return None
    order = tuple(whole.mean().sort_values(ascending=False, kind="stable").index)
    values = whole[list(order)].to_numpy()
    holds = (np.diff(values, axis=1) <= 0).all(1)
    first = values[:, 0] == values.max(1)
    return Orders(order, len(whole), int(holds.sum()), int(first.sum()), len(table) - len(whole))


def interactions(table: pd.DataFrame) -> pd.DataFrame:
    """One row per factor, and per pair of factors: its share of the variation, alone and with the method.

    Columns: factor, levels, main (share of the sum of squares of the factor itself), with_method (share of its
    interaction with the method), and of a single factor the two methods whose difference changes most between two
    levels, averaged over the other factors: a, b, at (the two levels), from_difference, to_difference. Empty where the
    grid is not complete.
    """
    levels = [list(dict.fromkeys(table.index.get_level_values(name))) for name in table.index.names]
    methods = list(table.columns)
    grid = table.reindex(pd.MultiIndex.from_product(levels, names=table.index.names))
    cells = grid.to_numpy().reshape(*map(len, levels), len(methods))
    if np.isnan(cells).any() or len(methods) < 2:
        return pd.DataFrame()
    total, last, rows = float(((cells - cells.mean()) ** 2).sum()), cells.ndim - 1, []
    axes = [(axis,) for axis in range(last) if len(levels[axis]) > 1]
    for chosen in [*axes, *combinations([axis for (axis,) in axes], 2)]:
        squares = [_squares(cells, kept) / total if total else 0.0 for kept in (chosen, (*chosen, last))]
        row = {
            "factor": " x ".join(str(table.index.names[axis]) for axis in chosen),
            "levels": int(np.prod([len(levels[axis]) for axis in chosen])),
            "main": squares[0],
            "with_method": squares[1],
        }
        rows.append(row | (_largest(cells, chosen[0], levels[chosen[0]], methods) if len(chosen) == 1 else {}))
    return pd.DataFrame(rows).sort_values("with_method", ascending=False, kind="stable", ignore_index=True)


def _squares(cells: np.ndarray, kept: tuple[int, ...]) -> float:
    """Sum of squares of the effect of the axes `kept` together, without those of fewer of them."""
    effect = np.zeros_like(cells)
    for size in range(len(kept) + 1):
        for part in combinations(kept, size):
            away = tuple(axis for axis in range(cells.ndim) if axis not in part)
            effect = effect + (-1) ** (len(kept) - size) * cells.mean(away, keepdims=True)
    return float((effect**2).sum())


def _largest(cells: np.ndarray, axis: int, levels: Sequence[object], methods: Sequence[str]) -> dict[str, object]:
    """The two methods whose difference changes most between two levels of one factor."""
    means = cells.mean(tuple(i for i in range(cells.ndim - 1) if i != axis))  # (levels, methods)
    best: dict[str, object] = {}
    most = -1.0
    for (a, b), (x, y) in product(combinations(range(len(methods)), 2), combinations(range(len(levels)), 2)):
        before, after = (float(means[level, a] - means[level, b]) for level in (x, y))
        if abs(after - before) > most:
            most = abs(after - before)
            best = {"a": methods[a], "b": methods[b], "at": f"{levels[x]}, {levels[y]}"}
            best |= {"from_difference": before, "to_difference": after}
    return best
