"""Recipes: the order of methods under every combination of settings of a comparison, and what changes it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.read.runs import shown
from analysis.statistics import factorial
from analysis.tables.frames import ALL
from analysis.tables.groups import SECTION, Group
from analysis.tables.sheets import Cell, Sheet

NAMES = ("recipes", "interactions")


def frames(found: Sequence[Group], macros: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """`recipes`: a row per recipe with its order of methods and a column per method; `interactions`: see
    `factorial.interactions`. Both are empty with one recipe, with one method, and where rows of one method differ in
    settings that `group_by` does not name."""
    nothing = dict.fromkeys(NAMES, pd.DataFrame())
    own = macros[macros["domain"] == ALL] if len(macros) else macros
    keys = [key for key in dict.fromkeys([*SECTION, *(key for group in found for key in group.variant)])]
    keys = [key for key in keys if key != factorial.METHOD and key in own and own[key].map(shown).nunique() > 1]
    if not keys or not own["complete"].all():
        return nothing
    named = own[[*keys, factorial.METHOD, factorial.VALUE]].assign(**{key: own[key].map(shown) for key in keys})
    if named.duplicated([*keys, factorial.METHOD]).any():
        return nothing
    table = factorial.by_recipe(named, keys)
    if factorial.orders(table) is None:
        return nothing
    orders = [" > ".join(row.dropna().sort_values(ascending=False, kind="stable").index) for _, row in table.iterrows()]
    return {"recipes": table.reset_index().assign(order=orders), "interactions": factorial.interactions(table)}


def sheets(recipes: pd.DataFrame, interactions: pd.DataFrame, methods: Sequence[str]) -> list[Sheet]:
    """The recipes with their orders, and the interactions; none without recipes."""
    if not len(recipes):
        return []
    keys = [key for key in recipes if key not in (*methods, "order")]
    table = recipes.set_index(keys)[[name for name in recipes if name in methods]]
    stable = factorial.orders(table)
    columns = [*(key.rpartition(".")[2] for key in keys), *table.columns, "order"]
    rows = [
        [
            *(Cell(str(row[key])) for key in keys),
            *(Cell("-" if pd.isna(row[name]) else f"{row[name]:.2f}", sort=row[name]) for name in table.columns),
            Cell(row["order"]),
        ]
        for _, row in recipes.iterrows()
    ]
    note = "Accepted length, macro average. Orders are those of the values; differences.csv says which are resolved."
    found = [
        Sheet("recipes", "Order of methods by recipe", columns, rows, notes=[stable.text, note] if stable else [note])
    ]
    if len(interactions):
        found.append(_interactions(interactions))
    return found


def _interactions(frame: pd.DataFrame) -> Sheet:
    rows = []
    for _, row in frame.iterrows():
        shares = [Cell(f"{row[name]:.1%}", sort=row[name]) for name in ("main", "with_method")]
        single = isinstance(row.get("a"), str)
        change = [Cell("-")] * 2
        if single:
            ends = f"{row['from_difference']:+.2f} to {row['to_difference']:+.2f} ({row['at']})"
            change = [Cell(f"{row['a']} - {row['b']}"), Cell(ends)]
        rows.append([Cell(row["factor"]), Cell(f"{row['levels']:g}", sort=row["levels"]), *shares, *change])
    columns = ["factor", "levels", "alone", "with the method", "largest change of", "its difference"]
    note = (
        "Shares of the sum of squares over all recipes and methods. With the method: the part that a factor, or two of "
        "them together, changes differently for different methods, seed noise included."
    )
    return Sheet("interactions", "What the order of methods depends on", columns, rows, notes=[note])
