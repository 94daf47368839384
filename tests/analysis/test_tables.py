"""Tables from records: values, macros, pairs, refusal to mix, costs, published numbers, layout and writers."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.read import runs
from analysis.statistics.headline import headline
from analysis.tables import costs, groups, published, writers
from analysis.tables import frames as tables
from analysis.tables import sheets as layout
from analysis.tables.groups import MixedError
from analysis.tables.sheets import Cell, Sheet
from tests.analysis.synthetic import DOMAINS, hashed, record, simulate, write_run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for method in ("dspark", "dflash", "eagle3"):
        for seed in (0, 1):
            facts = {"draft_parameters": 1000 * (1 + seed), "lineage": {"parents": [f"train-{method}"]}}
            write_run(root, f"{method}-{seed}", simulate(method, 40, seed), **facts)
        write_run(root, f"train-{method}", [], kind="train", trained_tokens=5_000)
    parents = {"parents": ["x/train/train-dspark"]}
    write_run(root, "clock", [], kind="speed", lineage=parents, speed={"speedup_measured": 1.5})
    return root


@pytest.fixture(scope="module")
def found(root):
    return groups.collect(runs.load(root))


def test_accepted_length_rows(found, root):
    frame = tables.accepted_length(found, 100)
    assert tuple(frame.columns[:17]) == (*tables.KEYS, *tables.MEASURES)
    assert frame["method"].drop_duplicates().tolist() == ["eagle3", "dflash", "dspark"]
    records = runs.load(root).where("method=dspark benchmark=mbpp").records
    row = frame[(frame["method"] == "dspark") & (frame["benchmark"] == "mbpp")].iloc[0]
    assert row["accepted_length"] == records["committed"].sum() / records["rounds"].sum()
    own = records.groupby("prompt_id", observed=True)[["committed", "rounds"]].sum()
    assert row["per_prompt"] == pytest.approx((own["committed"] / own["rounds"]).mean())
    assert (row["prompts"], row["rounds"], row["seeds"]) == (40, records["rounds"].sum(), 2)
    assert row["low"] < row["accepted_length"] < row["high"]


def test_macro_is_the_mean_of_the_benchmarks(found):
    lengths, macros = tables.accepted_length(found, 50), tables.macro_average(found, 50)
    for method in ("dspark", "dflash"):
        overall = macros[(macros["method"] == method) & (macros["domain"] == "all")].iloc[0]
        own = lengths[lengths["method"] == method]["accepted_length"]
        assert overall["accepted_length"] == pytest.approx(own.mean()) and overall["benchmarks"] == 3
    assert macros["complete"].all()


def test_conditional_acceptance_rows(found):
    frame = tables.conditional_acceptance(found, 50)
    assert tuple(frame.columns[: len(tables.KEYS) + 15]) == (*tables.KEYS, *tables.SLOT_MEASURES)
    part = frame[(frame["method"] == "dflash") & (frame["benchmark"] == "gsm8k")]
    assert part["slot"].tolist() == list(range(1, 8))
    np.testing.assert_allclose(part["conditional"].cumprod(), part["survival"])  # every round proposed all seven
    np.testing.assert_allclose(part["n"].to_numpy()[1:], (part["n"] * part["conditional"]).to_numpy()[:-1])


def test_a_summary_and_a_table_give_one_interval_to_a_number(tmp_path):
    """Whatever was read beside the run, and in whichever order its prompts stand."""
    rows = hashed(simulate("dspark", 20))
    alone = headline(rows[::-1])
    write_run(tmp_path, "a", hashed(simulate("dflash", 20)))
    write_run(tmp_path, "b", rows)
    found = groups.collect(runs.load(tmp_path))
    lengths, slots = tables.accepted_length(found), tables.conditional_acceptance(found)
    decays = tables.suffix_decay(found)
    for name in DOMAINS:
        here = {"method": "dspark", "benchmark": name}
        own = alone["benchmarks"][name]
        for frame, key in ((lengths, "accepted_length"), (decays, "suffix_decay")):
            row = frame[(frame[list(here)] == pd.Series(here)).all(axis=1)].iloc[0]
            assert [row[key], row["low"], row["high"]] == [own[key][end] for end in ("value", "low", "high")]
        curve = slots[(slots[list(here)] == pd.Series(here)).all(axis=1)]
        for column in ("conditional", "low", "high", "n", "survival", "survival_product"):
            assert curve[column].tolist() == [slot[column] for slot in own["slots"]]


def test_domain_curve_pools_the_rounds_of_its_benchmarks(tmp_path):
    rows = [record([(2, 2)], prompt_id="a"), record([(2, 0), (2, 0)], benchmark="math500", prompt_id="b")]
    write_run(tmp_path, "two", rows)
    frame = tables.conditional_by_domain(groups.collect(runs.load(tmp_path)), 20)
    assert frame["conditional"].tolist() == [1 / 3, 1.0] and frame["n"].tolist() == [3, 1]


def test_differences_pair_and_resolve(found):
    frame = tables.differences(found, 400)
    benchmarks = frame[frame["scope"] == "benchmark"]
    assert len(benchmarks) == 3 * 3 and (benchmarks["paired"] == 40).all()
    clear = benchmarks[(benchmarks["a"] == "dflash") & (benchmarks["b"] == "dspark")]
    assert clear["resolved_checkpoints"].all() and (clear["high"] < 0).all()
    # Two trainings of each are too few for a verdict about the methods, which stands in every word.
    assert not frame["resolved"].any() and (frame["trainings"] == 2).all() and frame["method_low"].notna().all()
    assert frame["note"].str.endswith("for these checkpoints; 2 trainings each are too few").all()
    overall = frame[(frame["scope"] == "macro") & (frame["domain"] == "all")]
    assert (overall["paired"] == 120).all()
    macros = tables.macro_average(found, 20).query("domain == 'all'").set_index("method")["accepted_length"]
    for row in overall.to_dict("records"):
        assert row["difference"] == pytest.approx(macros[row["a"]] - macros[row["b"]])


def test_holm_never_resolves_more(found):
    plain, corrected = tables.differences(found, 400, holm=False), tables.differences(found, 400)
    assert (corrected["p_holm"] >= corrected["p"]).all() and plain["p_holm"].isna().all()
    assert not (corrected["resolved_checkpoints"] & ~plain["resolved_checkpoints"]).any()


def test_pairs_on_other_prompts_are_refused_with_a_reason(tmp_path):
    write_run(tmp_path, "a", simulate("dspark", 40))
    write_run(tmp_path, "b", [row for row in simulate("dflash", 40) if int(row["prompt_id"].split("-")[1]) < 20])
    frame = tables.differences(groups.collect(runs.load(tmp_path)), 50)
    assert not frame["resolved"].any() and frame["low"].isna().all()
    assert frame["note"].str.contains("20 of 40 prompts were seen by both").all()


def test_a_missing_benchmark_is_marked_and_never_compared(tmp_path):
    write_run(tmp_path, "a", simulate("dspark", 20))
    write_run(tmp_path, "b", [row for row in simulate("mtp", 20) if row["benchmark"] != "alpaca"])
    found = groups.collect(runs.load(tmp_path))
    lengths, macros = tables.accepted_length(found, 50), tables.macro_average(found, 50)
    pairs = tables.differences(found, 50)
    assert pairs[pairs["domain"] == "all"]["note"].tolist() == ["1 of 3 benchmarks not measured by both"]
    sheet = layout.main(found, lengths, macros, pairs)[0]
    overall = {row[0].text: row[-3] for row in sheet.rows}
    assert overall["mtp"].text.endswith("†") and not overall["dspark"].best
    assert {row[0].text: row[3].text for row in sheet.rows}["mtp"] == "-"
    assert any("not comparable" in note for note in sheet.notes)
    assert {row[0].text: row[-2].text for row in sheet.rows} == {"mtp": "40", "dspark": "60"}  # prompts of its own


@pytest.mark.parametrize(("key", "other"), [("accounting", "deepspec"), ("thinking", True), ("suite", "quick")])
def test_refuses_to_mix(tmp_path, key, other):
    write_run(tmp_path, "a", simulate("dspark", 3))
    write_run(tmp_path, "b", simulate("dflash", 3, **{key: other}))
    read = runs.load(tmp_path)
    with pytest.raises(MixedError, match=f"2 values of {key} .* with the filter {key}="):
        groups.collect(read)
    found = groups.collect(read, [key])
    assert len(groups.sections(found)) == 2
    assert tables.accepted_length(found, 20)[key].nunique() == 2
    assert len(groups.collect(read.where(f"{key}={str(other).lower()}"))) == 3


def test_grouping_by_a_config_key_names_the_rows(tmp_path):
    for layers in (10, 2):
        write_run(tmp_path, f"l{layers}", simulate("dspark", 3, seed=layers), config={"draft": {"layers": layers}})
    frame = tables.accepted_length(groups.collect(runs.load(tmp_path), ["draft.layers"]), 20)
    assert frame["draft.layers"].drop_duplicates().tolist() == [2, 10]
    assert frame["variant"].drop_duplicates().tolist() == ["dspark, layers 2", "dspark, layers 10"]


def test_grouping_by_a_threshold_makes_schedulers_rows_of_one_table(tmp_path):
    for cut in (0.0, 0.5):
        rows = simulate("dspark", 5, slots=7 if cut == 0 else 3, scheduler=f"threshold-{cut:g}")
        write_run(tmp_path, f"cut{cut}", rows, config={"scheduler": {"threshold": cut}})
    read = runs.load(tmp_path)
    assert len(groups.sections(groups.collect(read))) == 2
    found = groups.collect(read, ["scheduler.threshold"])
    assert len(groups.sections(found)) == 1
    rates = tables.acceptance_rate(found, 50)
    assert rates["scheduler"].drop_duplicates().tolist() == ["threshold-0", "threshold-0.5"]
    for row in rates.to_dict("records"):
        own = read.where(f"domain={row['domain']} scheduler.threshold={row['scheduler.threshold']}").records
        assert row["acceptance_rate"] == own["accepted"].sum() / own["proposed"].sum()
        assert row["rate_low"] <= row["acceptance_rate"] <= row["rate_high"]


def test_seeds_are_a_spread_of_their_own(found):
    frame = tables.seeds(found)
    group = next(g for g in found if g.method == "dspark" and g.benchmark == "gsm8k")
    values = [counts.committed.sum() / counts.rounds.sum() for counts in group.seeds.values()]
    row = frame[(frame["method"] == "dspark") & (frame["benchmark"] == "gsm8k")].iloc[0]
    assert row["n"] == 2 and row["mean"] == pytest.approx(np.mean(values))
    assert row["sd"] == pytest.approx(np.std(values, ddof=1))


def test_costs_from_records_summaries_and_parents(found, root):
    frame = costs.costs(found, runs.load(root)).set_index("method")
    records = runs.load(root).where("method=dspark").records
    assert frame.loc["dspark", "seconds_per_round"] == pytest.approx(0.01)
    assert frame.loc["dspark", "verified_per_round"] == 8
    assert frame.loc["dspark", "acceptance_rate"] == records["accepted"].sum() / records["proposed"].sum()
    # No draft has the mean of two: both are named.
    assert np.isnan(frame.loc["dspark", "draft_parameters"])
    assert frame.loc["dspark", "varies"] == "draft_parameters=1000|2000"
    sheet = layout.costs(found, frame.reset_index())[0]
    assert {row[0].text: row[1].text for row in sheet.rows}["dspark"] == "1k, 2k"
    assert frame.loc["dspark", "speedup_measured"] == 1.5 and np.isnan(frame.loc["dflash", "speedup_measured"])
    assert frame.loc["dspark", "training_tokens"] == 5000 and np.isnan(frame.loc["dspark", "cache_bytes"])


def test_published_gap(found):
    frame = published.gap(tables.accepted_length(found, 50))
    assert len(frame) == 9 and set(frame["source"]) == {published.SOURCE}
    row = frame[(frame["method"] == "dspark") & (frame["benchmark"] == "gsm8k")].iloc[0]
    assert row["published"] == 6.11
    assert row["gap"] == pytest.approx(row["accepted_length"] - 6.11)
    assert row["relative"] == pytest.approx(row["gap"] / 6.11)
    ours = tables.accepted_length(found, 50).assign(target="Qwen/Qwen3-4B")
    assert len(published.gap(ours)) == 9 and published.gap(ours.assign(target="tiny")).empty


def test_the_published_table_reproduces_the_published_claims():
    """Macro gains of table 1 against the abstract's claims: the files are copied without a slip."""
    table = published.table("table1_accepted_length").groupby(["target", "method"])["accepted_length"].mean()
    for target, eagle3, dflash in (("qwen3_4b", 30.9, 16.3), ("qwen3_8b", 26.7, 18.4), ("qwen3_14b", 30.0, 18.3)):
        for method, gain in (("eagle3", eagle3), ("dflash", dflash)):
            assert 100 * (table[target, "dspark"] / table[target, method] - 1) == pytest.approx(gain, abs=0.06)
    with pytest.raises(ValueError, match="there are claims"):
        published.table("table2")


def test_layout_of_the_paper(found):
    lengths, macros = tables.accepted_length(found, 400), tables.macro_average(found, 400)
    sheet = layout.main(found, lengths, macros, tables.differences(found, 400))[0]
    assert sheet.columns == ["method", "gsm8k", "mbpp", "alpaca", "macro", "prompts", "seeds"]
    assert sheet.spans == [("", 1), ("math", 1), ("code", 1), ("chat", 1), ("all", 1), ("", 2)]
    assert [row[0].text for row in sheet.rows] == ["eagle3", "dflash", "dspark"]
    # Two trainings are too few to mark a method as best.
    assert not any(cell.best for row in sheet.rows for cell in row)
    assert "about these checkpoints (2 trainings each)" in " ".join(sheet.notes)


def test_bold_needs_every_other_to_be_resolved():
    pairs = pd.DataFrame(
        [
            {"a": "x", "b": "y", "difference": 0.2, "resolved": True},
            {"a": "z", "b": "x", "difference": -0.05, "resolved": False},
        ]
    )
    values = {"x": 3.0, "y": 2.8, "z": 2.95}
    assert layout.resolved_best(values, pairs) is None
    pairs.loc[1, "resolved"] = True
    assert layout.resolved_best(values, pairs) == "x"
    assert layout.resolved_best({"x": 3.0}, pairs) is None


SHEET = Sheet(
    "t",
    "A & B_1",
    ["method", "m|1"],
    [[Cell("x_y"), Cell("4.00 ± 0.10", True, 4.0)], [Cell("<b>"), Cell("-")]],
    [("", 1), ("math", 1)],
    ["100% of <it>"],
)


def test_markdown():
    lines = writers.markdown([SHEET]).splitlines()
    assert lines[2] == "| method | math: m\\|1 |" and lines[4] == "| x_y | **4.00 ± 0.10** |"


def test_latex_is_balanced_and_escaped():
    text = writers.latex([SHEET])
    assert r"A \& B\_1. 100\% of" in text and r"\textbf{4.00 $\pm$ 0.10} \\" in text
    assert r"\cmidrule(lr){2-2}" in text and text.count("{") == text.count("}")
    for environment in ("table", "tabular"):
        assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}") == 1
    assert all(line.count("&") - line.count(r"\&") == 1 for line in text.splitlines() if line.endswith(r"\\"))


def test_a_wide_latex_table_is_fitted_to_the_page():
    columns = ["method", *(f"b{i}" for i in range(writers.WIDE))]
    wide = replace(SHEET, columns=columns, rows=[[SHEET.rows[0][0], *[SHEET.rows[0][1]] * writers.WIDE]], spans=[])
    text = writers.latex([wide])
    assert text.startswith("% needs \\usepackage{booktabs,graphicx}") and text.count("{") == text.count("}")
    body = text[text.index("\\resizebox") :]
    assert body.index("\\begin{tabular}") < body.index("\\end{tabular}}") < body.index("\\end{table*}")


def test_html_is_escaped_and_sortable():
    text = writers.html(SHEET)
    assert "&lt;b&gt;" in text and "<b>4.00" in text and 'data-sort="4"' in text and "100% of &lt;it&gt;" in text
    assert len(re.findall("<button", text)) == 2


def test_terminal_marks_the_best_without_colour_codes():
    text = writers.terminal([SHEET], 60)
    assert "4.00 ± 0.10 *" in text and "\x1b" not in text


def test_csv_has_exactly_the_documented_columns(found, tmp_path):
    file = writers.csv(tables.accepted_length(found, 20), tmp_path / "a.csv", (*tables.KEYS, *tables.MEASURES))
    assert file.read_text().splitlines()[0] == (
        "target,method,suite,benchmark,domain,temperature,scheduler,tree,accepted_length,low,high,per_prompt,prompts,"
        "rounds,seeds,method_low,method_high"
    )
    assert len(pd.read_csv(file)) == 3 * len(DOMAINS)


def test_speedups_whose_intervals_overlap_share_their_ranks():
    rows = [("a", 1.5, 1.4, 1.6), ("b", 1.3, 1.2, 1.45), ("c", 1.0, 0.9, 1.1), ("d", 2.0, np.nan, np.nan)]
    costs = pd.DataFrame(rows, columns=["variant", "speedup_measured", "speedup_low", "speedup_high"])
    costs = costs.assign(speedup_batch=1.0)
    ranks = layout._speed_ranks(["a", "b", "c", "d", "e"], costs.iloc[:3])
    assert {name: cell.text for name, cell in ranks.items()} == {"a": "1–2", "b": "1–2", "c": "3", "d": "-", "e": "-"}
    assert layout._speed_ranks(["a", "b"], costs.iloc[:1]) == {}
