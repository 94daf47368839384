"""Evaluations with token trees in a comparison: their sections, and their tables against sums over the records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.compare import compare
from analysis.read import runs
from analysis.tables import costs, groups, tiers, tree_tables
from analysis.tables import frames as tables
from specbench.runs.run_schema import OPTIONAL
from tests.analysis.synthetic import evaluation, hashed, simulate, train, write_run

BUDGET = 9
TREES = {"_target_": "specbench.decoding.tree_shapes.BestFirst", "budget": BUDGET, "width": None, "depth": None}


def with_trees(rows: list[dict], seed: int) -> list[dict]:
    """The records with counts by depth and rank: of every three nodes that were reached one has two children."""
    rng, made = np.random.default_rng(seed), []
    for row in rows:
        accepted = np.zeros(8, int)
        offered = np.zeros(8, int)
        for proposed, taken, count in row["histogram"]:
            offered[: min(taken + 1, proposed)] += count
            accepted[:taken] += count
        second = rng.binomial(accepted, 0.3)
        by_rank = [[d + 1, 0, int(offered[d]), int(accepted[d] - second[d])] for d in range(8) if offered[d]]
        by_rank += [[d + 1, 1, int(max(offered[d] // 3, second[d])), int(second[d])] for d in range(8) if offered[d]]
        made.append(row | {"tree": "best-first-9", "nodes": BUDGET * row["rounds"], "by_rank": by_rank})
    return made


def write(root: Path, name: str, trained: Path, rows: list[dict], **settings) -> None:
    own = [{key: value for key, value in row.items() if key not in ("tree", "nodes", "by_rank")} for row in rows]
    file = evaluation(root, name, trained, rows=own, **settings) / "records.parquet"
    if "tree" in rows[0]:
        table = pq.read_table(file)
        for key in ("tree", "nodes", "by_rank"):
            table = table.append_column(
                OPTIONAL.field(key), pa.array([row[key] for row in rows], OPTIONAL.field(key).type)
            )
        pq.write_table(table.replace_schema_metadata({"schema": "specbench.records/3"}), file)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    chain = hashed(simulate("mtp", 8))
    return {"chain": chain, "tree": with_trees(hashed(simulate("eagle3", 8)), 0)}


@pytest.fixture(scope="module")
def read(rows, tmp_path_factory) -> runs.Runs:
    root = tmp_path_factory.mktemp("runs")
    trained = train(root, "d")
    write(root, "chain", trained, rows["chain"], tree=None)
    stated = {"tree": "best-first-9", "rule": "deterministic_tree"}
    write(root, "tree", trained, rows["tree"], protocol=stated, tree=TREES)
    return runs.load(root)


def test_a_tree_is_a_section_named_by_its_label_and_a_chain_is_one_without(read) -> None:
    found = groups.collect(read)
    assert [(section["tree"], groups.title(section)) for section, _ in groups.sections(found)] == [
        ("chain", "qwen3_4b, suite paper, temperature 0, accounting specbench"),
        ("best-first-9", "qwen3_4b, suite paper, temperature 0, tree best-first-9, accounting specbench"),
    ]
    assert {group.label for group in found} == {"eagle3"}


def test_grouping_by_a_budget_makes_trees_rows_of_one_table(read) -> None:
    found = groups.collect(read, ["tree.budget"])
    assert len(groups.sections(found)) == 1
    assert {group.label for group in found} == {"eagle3, budget none", "eagle3, budget 9"}


def test_acceptance_by_depth_and_rank_is_that_of_the_records(read, rows) -> None:
    frame = tree_tables.acceptance(groups.collect(read), 50)
    assert set(frame["tree"]) == {"best-first-9"}
    whole = frame[frame["domain"] == "all"].set_index(["depth", "rank"])
    sums: dict[tuple[int, int], np.ndarray] = {}
    for row in rows["tree"]:
        for depth, rank, offered, accepted in row["by_rank"]:
            sums[depth, rank] = sums.get((depth, rank), 0) + np.array([accepted, offered])
    for place, (accepted, offered) in sums.items():
        assert whole.loc[place, "conditional"] == pytest.approx(accepted / offered if offered else np.nan, nan_ok=True)
        assert whole.loc[place, "n"] == offered
    for depth in (1, 2, 3):
        any_child = (sums[depth, 0][0] + sums[depth, 1][0]) / sums[depth, 0][1]
        assert whole.loc[(depth, tree_tables.ANY), "conditional"] == pytest.approx(any_child)
        assert whole.loc[(depth, tree_tables.ANY), "low"] <= any_child <= whole.loc[(depth, tree_tables.ANY), "high"]


def test_a_tree_stands_beside_the_chains_of_its_draft(read, rows, tmp_path) -> None:
    made = compare([path for path in read.runs["path"]], tmp_path, resamples=100, draw=False)
    macro = {}
    for name, own in rows.items():
        by_benchmark: dict[str, np.ndarray] = {}
        for row in own:
            by_benchmark[row["benchmark"]] = by_benchmark.get(row["benchmark"], 0) + np.array(
                [row["committed"], row["rounds"]]
            )
        macro[name] = np.mean([committed / rounds for committed, rounds in by_benchmark.values()])
    frame = made.table("trees")
    whole = frame[(frame["scope"] == "macro") & (frame["domain"] == "all")].iloc[0]
    assert (whole["with_tree"], whole["chain"]) == pytest.approx((macro["tree"], macro["chain"]))
    assert whole["difference"] == pytest.approx(macro["tree"] - macro["chain"])
    assert whole["low"] < whole["difference"] < whole["high"]
    assert whole["tree_verified_per_round"] == BUDGET + 1 and whole["chain_verified_per_round"] == 8
    assert pd.read_csv(tmp_path / "trees.csv")["variant"].unique().tolist() == ["eagle3"]
    line = next(line for line in made.markdown().splitlines() if line.startswith("| eagle3"))  # of the first table
    assert f"{macro['tree']:.2f} [" in line and f"{macro['chain']:.2f} [" in line and "| 10.00 |" in line


def test_a_method_without_training_does_not_keep_a_table_from_speaking_of_methods(tmp_path) -> None:
    for seed in range(3):
        trained = train(tmp_path, f"d{seed}", seed)
        evaluation(tmp_path, f"e{seed}", trained, seed)
    rows = [{**row, "method": "ngram"} for row in hashed(simulate("mtp", 8))]
    write_run(tmp_path, "n", rows, config={"draft": "ngram"}, lineage={"draft": None, "target": "target-weights"})
    found = groups.collect(runs.load(tmp_path))
    assert tiers.of_methods(found) and "3 trainings each" in tiers.note(found, True)
    frame = tables.accepted_length(found, 200).set_index(["method", "benchmark"])
    alone = frame.loc["ngram"]
    # Nothing is trained, so the interval about the method is that over prompts.
    assert (alone["method_low"] == alone["low"]).all() and (alone["method_high"] == alone["high"]).all()
    pairs = tables.differences(found, 200)
    assert set(pairs["trainings"]) == {3} and pairs["method_low"].notna().all()
    assert not tiers.of_methods([group for group in found if group.method == "ngram"])


def test_chains_alone_have_no_tables_of_trees(read) -> None:
    found = groups.collect(read.where("tree=chain"))
    assert not len(tree_tables.acceptance(found, 20))
    assert not len(tree_tables.beside_chains(found, costs.costs(found, read), 20))
    assert "tree" in tables.accepted_length(found, 20)
