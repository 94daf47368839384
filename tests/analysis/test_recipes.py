"""Recipes: how many keep the order of methods, and sums of squares against known effects and a linear model."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from analysis.compare import compare
from analysis.statistics import factorial
from tests.analysis.synthetic import record, write_run


def table(value, losses=("ce", "kl"), rates=("1e-3", "2e-3", "4e-3"), methods=("a", "b", "c")):
    rows = [
        {"loss": loss, "rate": rate, "method": method, "accepted_length": value(loss, rate, method)}
        for loss, rate, method in product(losses, rates, methods)
    ]
    return factorial.by_recipe(pd.DataFrame(rows), ["loss", "rate"])


def test_effects_without_an_interaction_keep_the_order_everywhere():
    level = {"a": 3.0, "b": 2.0, "c": 2.5, "ce": 0.0, "kl": 0.7, "1e-3": 0.0, "2e-3": 0.3, "4e-3": -0.2}
    found = table(lambda *where: sum(level[name] for name in where))
    stable = factorial.orders(found)
    assert stable == factorial.Orders(("a", "c", "b"), 6, 6, 6, 0)
    assert "holds in 6 of 6 recipes" in stable.text
    assert factorial.interactions(found)["with_method"].max() == pytest.approx(0, abs=1e-12)


def test_a_known_interaction_is_found_with_its_size():
    """Only under kl is b 0.8 tokens better, which puts it first there; nothing else depends on the method."""
    level = {"a": 3.0, "b": 2.5, "c": 2.0}
    found = table(
        lambda loss, rate, method: level[method] + 0.8 * (loss == "kl" and method == "b") + 0.1 * (rate == "2e-3")
    )
    assert factorial.orders(found) == factorial.Orders(("a", "b", "c"), 6, 3, 3, 0)
    own = factorial.interactions(found).set_index("factor")
    cells = np.array([[0, 0, 0], [0, 0.8, 0]])
    inner = cells - cells.mean(0) - cells.mean(1, keepdims=True) + cells.mean()
    total = found.stack().var(ddof=0) * found.size
    assert own.loc["loss", "with_method"] == pytest.approx(3 * (inner**2).sum() / total)
    assert own.loc["rate", "with_method"] == pytest.approx(0, abs=1e-12)
    assert own.loc["rate", "main"] > 0
    row = own.loc["loss"]
    assert {row["a"], row["b"]} >= {"b"} and row["at"] == "ce, kl"
    assert abs(row["to_difference"] - row["from_difference"]) == pytest.approx(0.8)
    assert own.index[0] == "loss"


def test_shares_are_those_of_nested_linear_models():
    """Sums of squares of a balanced design, as the drop of the residual when a term joins a least-squares model."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(2, 3, 3))
    names = {"ce": 0, "kl": 1, "1e-3": 0, "2e-3": 1, "4e-3": 2, "a": 0, "b": 1, "c": 2}
    found = table(lambda *where: values[tuple(names[name] for name in where)])
    places = np.array(list(product(range(2), range(3), range(3))))
    flat = values.reshape(-1)

    def residual(*terms):
        columns = [np.ones(18)]
        for term in terms:
            cells = [tuple(place[axis] for axis in term) for place in places]
            columns += [np.array([cell == other for cell in cells], float) for other in sorted(set(cells))]
        design = np.stack(columns, 1)
        return float(((flat - design @ np.linalg.lstsq(design, flat, rcond=None)[0]) ** 2).sum())

    own = factorial.interactions(found).set_index("factor")
    total = residual()
    assert own.loc["rate", "main"] == pytest.approx((total - residual((1,))) / total)
    assert own.loc["rate", "with_method"] == pytest.approx((residual((1,), (2,)) - residual((1, 2))) / total)
    three = (residual((0, 1), (0, 2), (1, 2)) - residual((0, 1, 2))) / total
    assert own.loc["loss x rate", "with_method"] == pytest.approx(three)


def test_recipes_without_every_method_are_left_out_and_counted():
    found = table(lambda loss, rate, method: {"a": 3.0, "b": 2.0, "c": 1.0}[method])
    found.iloc[0, 1] = np.nan
    stable = factorial.orders(found)
    assert (stable.recipes, stable.holds, stable.incomplete) == (5, 5, 1) and "left out" in stable.text
    assert factorial.interactions(found).empty
    assert factorial.orders(found[["a"]]) is None


def test_a_comparison_prints_in_how_many_recipes_the_order_holds(tmp_path):
    """mtp before eagle3 with the one loss, behind it with the other, and at both temperatures alike."""
    accepted = {("mtp", "ce"): 3, ("eagle3", "ce"): 2, ("mtp", "kl"): 2, ("eagle3", "kl"): 4}
    for (method, loss), count in accepted.items():
        for heat in (0.0, 1.0):
            facts = {"method": method, "temperature": heat}
            rows = [record([(5, count)] * 6, prompt_id=f"p{i}", **facts) for i in range(12)]
            write_run(tmp_path, f"{method}-{loss}-{heat}", rows, config={"recipe": {"loss": loss}})
    made = compare(tmp_path, tmp_path / "out", group_by=["recipe.loss"], draw=False, resamples=200)
    assert "The order of methods eagle3 > mtp (mean over recipes) holds in 2 of 4 recipes" in " ".join(
        made.text.split()
    )
    recipes = pd.read_csv(tmp_path / "out" / "recipes.csv")
    assert list(recipes["order"]) == ["mtp > eagle3", "eagle3 > mtp"] * 2
    own = pd.read_csv(tmp_path / "out" / "interactions.csv").set_index("factor")
    assert own.loc["recipe.loss", "with_method"] == pytest.approx(9 / 11)
    assert own.loc["temperature", ["main", "with_method"]].tolist() == pytest.approx([0, 0])
