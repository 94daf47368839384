"""What stands in one row is one thing: configurations, repetitions and copies, protocols, prompts, speedups, curves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.compare import compare
from analysis.figures import acceptance as figures
from analysis.read import runs
from analysis.statistics import intervals as statistics
from analysis.statistics.histograms import count
from analysis.tables import costs, groups, protocols
from analysis.tables import frames as tables
from analysis.tables import sheets as layout
from tests.analysis.synthetic import clock, evaluation, hashed, simulate, train, write_run

# Every setting that decides the result, with another value than `synthetic.train` or `synthetic.evaluation` gives it.
DRAFT = {
    "method.draft.layers": 2,
    "method.draft.block_size": 5,
    "method.objective.kl": 0.5,
    "method.window": 128,
    "target.target_layer_ids": [1, 9],
    "trainer.max_steps": 600,
    "trainer.recipe.lr": 0.001,
    "limit_samples": 50,
    "start": "random",
    "cache_dtype": "float16",
}
DECODING = {
    "max_new_tokens": 48,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.1,
    "stop_token_ids": [],
    "slots": 3,
    "turns": "first",
    "dtype": "bfloat16",
}
# And what leaves every number as it is.
WITHOUT_EFFECT = {
    "trainer.recipe.log_every": 99,
    "trainer.lightning.devices": 4,
    "tracking.mode": "offline",
    "cache": "/elsewhere/cache/feed",
    "target.id": "/elsewhere/target",
    "force": True,
    "evaluate": False,
}


def labels(*sources: Path, by: list[str] | None = None) -> list[str]:
    return list(dict.fromkeys(group.label for group in groups.collect(runs.load(list(sources)), by or [])))


def pair(root: Path, **changed) -> list[str]:
    for number, own in enumerate(({}, changed)):
        made = train(root, f"t{number}", number, **own)
        evaluation(root, f"e{number}", made, number)
    return labels(root)


@pytest.mark.parametrize("key", DRAFT)
def test_drafts_that_differ_are_rows_of_their_own(tmp_path, key):
    found = pair(tmp_path, **{key: DRAFT[key]})
    short = key.rpartition(".")[2]
    assert len(found) == 2 and all(label.startswith(f"eagle3 [{short}=") for label in found), found
    frame = tables.accepted_length(groups.collect(runs.load(tmp_path)), 20)
    assert (frame["seeds"] == 1).all() and (frame["prompts"] == 8).all()


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_what_has_no_effect_keeps_the_seeds_of_a_configuration_together(tmp_path, key):
    assert pair(tmp_path, **{key: WITHOUT_EFFECT[key]}) == ["eagle3"]
    frame = tables.accepted_length(groups.collect(runs.load(tmp_path)), 20)
    assert (frame["seeds"] == 2).all()


@pytest.mark.parametrize(("value", "rows"), [(None, 1), (False, 1), ([], 1), (0.5, 2), ("some", 2), ([1], 2)])
def test_a_setting_that_a_configuration_did_not_have_yet_is_off(tmp_path, value, rows):
    made = [train(tmp_path, "old", 0), train(tmp_path, "new", 1, **{"trainer.recipe.brand_new": value})]
    for seed, trained in enumerate(made):
        evaluation(tmp_path, f"e{seed}", trained, seed)
    assert len(labels(tmp_path)) == rows


@pytest.mark.parametrize("key", DECODING)
def test_decoding_that_differs_gives_rows_of_their_own_and_marks_the_smaller_part(tmp_path, key):
    made = [train(tmp_path, f"t{number}", number) for number in (0, 1)]
    for number, trained in enumerate(made):
        evaluation(tmp_path, f"e{number}", trained, number)
    evaluation(tmp_path, "odd", made[0], protocol={key: DECODING[key]})
    found = groups.collect(runs.load(tmp_path))
    rows = list(dict.fromkeys(group.label for group in found))
    assert len(rows) == 2 and all(f"{key}=" in label for label in rows)
    pairs = tables.differences(found, 50)
    sheet = layout.main(found, tables.accepted_length(found, 50), tables.macro_average(found, 50), pairs)[0]
    if key == "slots":  # what a draft proposes is a matter of the draft
        assert not any(protocols.MARK in cell.text for row in sheet.rows for cell in row)
        return
    odd = next(row for row in sheet.rows if row[1].text.endswith(protocols.MARK))
    assert all(cell.text.endswith(protocols.MARK) for cell in odd[1:-2])
    assert pairs["note"].str.startswith(f"another protocol: {key} ").all() and not pairs["resolved"].any()
    (said,) = [note for note in sheet.notes if note.startswith(protocols.MARK)]
    assert f"{odd[0].text}: {key} " in said


def test_equal_protocols_are_not_marked(tmp_path):
    pair(tmp_path, **{"method.draft.layers": 2})
    found = groups.collect(runs.load(tmp_path))
    pairs = tables.differences(found, 50)
    sheet = layout.main(found, tables.accepted_length(found, 50), tables.macro_average(found, 50), pairs)[0]
    assert not any(protocols.MARK in cell.text for row in sheet.rows for cell in row)
    assert set(pairs["note"]) == {"not resolved for these checkpoints; one training each"}
    (stated,) = [note for note in sheet.notes if note.startswith("Protocol")]
    for fact in ("max_new_tokens 128", "dtype float32", "batch 16", "top_k 0", "gsm8k ", "(8)"):
        assert fact in stated


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(sorted(DRAFT)), min_size=1, max_size=4, unique=True), st.integers(2, 4))
def test_any_sweep_is_told_apart_by_short_labels(tmp_path_factory, keys, values):
    """Several settings that move together need one of them in the label; the note under the table names them all."""
    root = tmp_path_factory.mktemp("sweep")
    for number in range(values):
        changed = {key: f"{number}" if number else None for key in keys}
        evaluation(root, f"e{number}", train(root, f"t{number}", **changed), prompts=2)
    found = groups.collect(runs.load(root))
    rows = {group.label: group for group in found}
    assert len(rows) == values and all(len(group.short) == 1 for group in rows.values())
    assert all(set(group.differing) == set(keys) for group in rows.values())
    if len(keys) > 1:
        said = " ".join(protocols.notes(found))
        assert all(key in said for key in keys)


def test_grouping_names_rows_and_what_is_left_stands_in_brackets(tmp_path):
    for layers in (1, 2):
        for lr in (0.1, 0.2):
            name = f"{layers}-{lr}"
            made = train(tmp_path, f"t{name}", **{"method.draft.layers": layers, "trainer.recipe.lr": lr})
            evaluation(tmp_path, f"e{name}", made)
    rows = ["eagle3, layers 1 [lr=0.1]", "eagle3, layers 1 [lr=0.2]", "eagle3, layers 2 [lr=0.1]"]
    assert labels(tmp_path, by=["method.draft.layers"]) == [*rows, "eagle3, layers 2 [lr=0.2]"]
    assert labels(tmp_path, by=["method.draft.layers", "trainer.recipe.lr"])[0] == "eagle3, layers 1, lr 0.1"
    made = compare(tmp_path, tmp_path / "out", group_by=["method.draft.layers"], resamples=20, draw=False)
    figure = figures.along(made.frames["macro_average"], "method.draft.layers")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["eagle3 [lr=0.1]", "eagle3 [lr=0.2]"]
    header = (made.folder / "accepted_length.csv").read_text().splitlines()[0]
    assert header.endswith("method.draft.layers,configuration")


def test_drafts_that_were_brought_along_are_known_by_their_weights(tmp_path):
    evaluation(tmp_path, "one", weights="aaaaaaaa11")
    evaluation(tmp_path, "two", weights="bbbbbbbb22", seed=0)
    assert labels(tmp_path) == ["eagle3 [draft=mine@aaaaaaaa]", "eagle3 [draft=mine@bbbbbbbb]"]


def test_targets_of_one_name_and_other_weights_are_not_pooled(tmp_path):
    made = train(tmp_path, "t")
    evaluation(tmp_path, "one", made)
    folder = evaluation(tmp_path, "two", made, seed=1)
    summary = json.loads((folder / "summary.json").read_text())
    summary["lineage"]["target"] = "other-weights"
    (folder / "summary.json").write_text(json.dumps(summary))
    assert len(labels(tmp_path)) == 2


def test_runs_that_record_less_join_the_row_and_are_named(tmp_path):
    """Evaluations of earlier versions state no protocol; where all others agree they are taken as those."""
    made = train(tmp_path, "t")
    evaluation(tmp_path, "one", made)
    folder = evaluation(tmp_path, "two", made, seed=1, rows=simulate("eagle3", 8, 1))
    summary = json.loads((folder / "summary.json").read_text())
    del summary["protocol"]
    (folder / "summary.json").write_text(json.dumps(summary))
    found = groups.collect(runs.load(tmp_path))
    assert {group.label for group in found} == {"eagle3"}
    said = " ".join(protocols.notes(found))
    assert "do not record it: " in said and "dtype" in said
    evaluation(tmp_path, "three", made, seed=2, protocol={"dtype": "bfloat16"})
    assert labels(tmp_path) == ["eagle3 [dtype=bfloat16]", "eagle3 [dtype=float32]", "eagle3 [dtype=not recorded]"]


# Repetitions and copies


def again(tmp_path: Path) -> Path:
    made = train(tmp_path / "one", "t")
    return evaluation(tmp_path / "one", "e", made)


def copied(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, source.parent / "another name")


def moved(source: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "one", tmp_path / "two")


def without_training(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "alone" / "runs" / "evaluate" / "e")


def rerun(source: Path, tmp_path: Path) -> None:
    evaluation(tmp_path / "one", "e-rerun", tmp_path / "one" / "runs" / "train" / "t")


def rerun_elsewhere(source: Path, tmp_path: Path) -> None:
    evaluation(tmp_path / "three", "e", tmp_path / "one" / "runs" / "train" / "t", batch_size=2, device="cuda")


def rerun_with_other_numbers(source: Path, tmp_path: Path) -> None:
    rows = [{**row, "seed": 0} for row in hashed(simulate("eagle3", 8, 7))]
    evaluation(tmp_path / "one", "e-gpu", tmp_path / "one" / "runs" / "train" / "t", rows=rows)


def another_decoding_seed_of_greedy_text(source: Path, tmp_path: Path) -> None:
    evaluation(tmp_path / "one", "e-seed", tmp_path / "one" / "runs" / "train" / "t")
    folder = tmp_path / "one" / "runs" / "evaluate" / "e-seed"
    facts = json.loads((folder / "provenance.json").read_text()) | {"seeds": {"decoding": 5, "init": 0}}
    (folder / "provenance.json").write_text(json.dumps(facts))


REPETITIONS = (
    *(copied, moved, without_training, rerun, rerun_elsewhere, rerun_with_other_numbers),
    another_decoding_seed_of_greedy_text,
)


@pytest.mark.parametrize("repeat", REPETITIONS, ids=lambda repeat: repeat.__name__)
def test_a_repetition_counts_once_and_is_named(tmp_path, repeat):
    source = again(tmp_path)
    alone = tables.accepted_length(groups.collect(runs.load(tmp_path)), 100)
    repeat(source, tmp_path)
    read = runs.load(tmp_path)
    both = tables.accepted_length(groups.collect(read), 100)
    assert (both["rounds"] == alone["rounds"]).all() and (both["low"] == alone["low"]).all()
    (reason,) = [text for text in read.faults["reason"] if text.endswith(runs.ONCE) and "evaluate" in text]
    word = "a repetition, with other numbers, of" if repeat is rerun_with_other_numbers else "the same run as"
    assert reason.startswith(word) and str(tmp_path) in reason
    text = compare(tmp_path, tmp_path / "out", resamples=20, draw=False).text
    assert "repetitions or copies" in text


@pytest.mark.parametrize("drawn", [0.0, 1.0])
def test_another_seed_is_no_repetition(tmp_path, drawn):
    """Other weights at any temperature, other draws above 0."""
    made = [train(tmp_path, f"t{seed}", seed) for seed in (0, 1)]
    for seed, trained in enumerate(made):
        evaluation(tmp_path, f"e{seed}", trained, seed, protocol={"temperature": drawn})
    if drawn:
        folder = evaluation(tmp_path, "draws", made[0], 0, protocol={"temperature": drawn})
        facts = json.loads((folder / "provenance.json").read_text()) | {"seeds": {"decoding": 9, "init": 0}}
        (folder / "provenance.json").write_text(json.dumps(facts))
    assert runs.load(tmp_path).faults.empty


def test_two_roots_with_a_training_of_one_name_are_told_apart(tmp_path):
    for root, layers in (("a", 1), ("b", 2)):
        made = train(tmp_path / root, "mine", **{"method.draft.layers": layers})
        evaluation(tmp_path / root, "mine", made, weights=f"{root * 8}")
    assert labels(tmp_path / "a", tmp_path / "b") == ["eagle3 [layers=1]", "eagle3 [layers=2]"]


# Prompts


def test_prompts_are_paired_by_their_tokens_and_not_by_their_ids(tmp_path):
    a, b = hashed(simulate("dspark", 12)), hashed(simulate("dflash", 12))
    write_run(tmp_path / "same", "a", a)
    write_run(tmp_path / "same", "b", [{**row, "prompt_id": f"renamed {row['prompt_id']}"} for row in b])
    frame = tables.differences(groups.collect(runs.load(tmp_path / "same")), 50)
    assert (frame["shared"] == 1).all()
    write_run(tmp_path / "other", "a", a)
    write_run(tmp_path / "other", "b", hashed(simulate("dflash", 12), "another template"))
    found = groups.collect(runs.load(tmp_path / "other"))
    frame = tables.differences(found, 50)
    assert frame["note"].str.contains("0 of 24 prompts were seen by both").all()
    assert len(protocols.marked(found)) == 3  # the second row, on every benchmark


def test_runs_without_hashes_are_paired_by_ids_with_a_note(tmp_path):
    write_run(tmp_path, "old", simulate("dspark", 12))
    write_run(tmp_path, "new", hashed(simulate("dflash", 12)))
    found = groups.collect(runs.load(tmp_path))
    assert (tables.differences(found, 50)["shared"] == 1).all() and not protocols.marked(found)
    write_run(tmp_path / "older", "one", simulate("dspark", 12))
    said = protocols.notes(groups.collect(runs.load(tmp_path / "older")))
    assert sum("paired by their ids" in note for note in said) == 1
    shutil.rmtree(tmp_path / "older")
    # Which of two sets of tokens an old record belongs to cannot be known: it is paired with neither.
    write_run(tmp_path, "newer", hashed(simulate("eagle3", 12), "another template"))
    frame = tables.differences(groups.collect(runs.load(tmp_path)), 50)
    assert (frame["paired"] == 0).all()


def test_the_later_turns_of_a_conversation_go_by_its_first(tmp_path):
    """What a second turn asks holds the answer to the first, which every seed draws anew."""
    for seed in (0, 1):
        rows = simulate("dspark", 4, seed)
        rows += [{**row, "turn": 1} for row in rows]
        rows = [
            {**row, "prompt_hash": f"{row['prompt_hash']}-{seed}" if row["turn"] else row["prompt_hash"]}
            for row in hashed(rows)
        ]
        write_run(tmp_path, f"s{seed}", rows)
    (row,) = [group for group in groups.collect(runs.load(tmp_path)) if group.benchmark == "gsm8k"]
    assert len(row.counts.prompts) == 4 and len(row.seeds) == 2


def test_other_prompts_of_one_benchmark_are_never_one_row(tmp_path):
    made = [train(tmp_path, f"t{seed}", seed) for seed in (0, 1)]
    for prompts, trained in zip((4, 12), made, strict=True):
        evaluation(tmp_path, f"e{prompts}", trained, made.index(trained), prompts=prompts)
    assert labels(tmp_path) == ["eagle3 [limit=4]", "eagle3 [limit=12]"]
    found = groups.collect(runs.load(tmp_path))
    pairs = tables.differences(found, 20)
    sheet = layout.main(found, tables.accepted_length(found, 20), tables.macro_average(found, 20), pairs)[0]
    assert [(row[-2].text, row[-1].text) for row in sheet.rows] == [("12", "1"), ("36", "1")]
    frame = protocols.table(found)
    assert frame.groupby("variant", sort=False)["prompts"].first().tolist() == [4, 12]
    assert frame["prompt_set"].nunique() == 6


def test_records_of_an_unknown_version_are_refused_by_name(tmp_path):
    file = write_run(tmp_path, "new", hashed(simulate("dspark", 2))) / "records.parquet"
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({"schema": "specbench.records/9"}), file)
    assert "specbench.records/9" in runs.load(tmp_path).faults["reason"].iloc[0]


# Speedups


@pytest.mark.parametrize(
    ("row", "speed", "shown"),
    [
        ({}, {}, True),
        ({"scheduler": "threshold-0.5"}, {}, False),
        ({}, {"scheduler": "threshold-0.5"}, False),
        ({"temperature": 1.0}, {}, False),
        ({"temperature": 1.0}, {"temperature": 1.0}, True),
        ({"slots": 3}, {}, False),
        ({"dtype": "bfloat16"}, {}, False),
        ({"accounting": "deepspec"}, {}, False),
        ({"max_new_tokens": 48}, {}, True),  # how long the timed texts were does not change whose speed it is
        ({}, {"weights": "trained again"}, False),
    ],
)
def test_a_speedup_stands_beside_the_very_run_that_it_was_timed_with(tmp_path, row, speed, shown):
    made = train(tmp_path, "t")
    evaluation(tmp_path, "e", made, protocol=row)
    clock(tmp_path, "c", made, 1.4, **speed)
    read = runs.load(tmp_path)
    found = groups.collect(read)
    frame = costs.costs(found, read)
    assert frame["speedup_measured"].notna().tolist() == [shown]
    sheet = layout.main(
        found, tables.accepted_length(found, 20), tables.macro_average(found, 20), tables.differences(found, 20), frame
    )[0]
    assert (("speedup at batch 1", 2) in sheet.spans) == shown
    if shown:
        assert sheet.rows[0][-2].text == "1.40 [1.30, 1.50]" and frame["speedup_accepted_length"].tolist() == [2.5]


def test_every_batch_that_was_timed_has_its_own_columns(tmp_path):
    for layers, speedups in ((1, (1.4, 1.1)), (2, (1.2,))):
        made = train(tmp_path, f"t{layers}", **{"method.draft.layers": layers}, summary={"parameters": 1000 * layers})
        evaluation(tmp_path, f"e{layers}", made)
        for batch, speedup in zip((1, 8), speedups, strict=False):
            clock(tmp_path, f"c{layers}-{batch}", made, speedup, batch_size=batch)
    read = runs.load(tmp_path)
    found = groups.collect(read)
    frame = costs.costs(found, read)
    sheet = layout.main(
        found, tables.accepted_length(found, 20), tables.macro_average(found, 20), tables.differences(found, 20), frame
    )[0]
    assert sheet.spans[-2:] == [("speedup at batch 1", 2), ("speedup at batch 8", 2)]
    assert [[cell.text[:4] for cell in row[-4::2]] for row in sheet.rows] == [["1.40", "1.10"], ["1.20", "-"]]
    # Every count of parameters is that of a draft there is.
    assert set(frame["draft_parameters"]) == {1000.0, 2000.0} and (frame["varies"] == "").all()


# Curves


@st.composite
def decoded(draw):
    """Rounds of up to 12 prompts that propose what they please and accept what they please of it."""
    slots = draw(st.integers(1, 6))
    rounds = st.integers(0, slots).flatmap(lambda p: st.tuples(st.just(p), st.integers(0, p)))
    prompts = draw(st.lists(st.lists(rounds, max_size=6), min_size=1, max_size=12))
    cells = [(i, p, a, 1) for i, own in enumerate(prompts) for p, a in own]
    committed = np.array([sum(a + 1 for _, a in own) for own in prompts], float)
    return count(np.arange(len(prompts)), committed, *np.array(cells, int).reshape(-1, 4).T)


@settings(max_examples=100, deadline=None)
@given(decoded())
def test_curves_are_possible_curves(counts):
    total = counts.total()
    for conditional in (True, False):
        value, low, high = statistics.by_slot(counts, conditional, 60)
        known = ~np.isnan(value)
        assert (known == (total.reached > 0)).all()  # what nothing reached is empty, and nothing else is
        assert not (~known & (~np.isnan(low) | ~np.isnan(high))).any()
        bounded = ~np.isnan(low)
        assert (bounded == ~np.isnan(high)).all()
        for curve in (value[known], low[bounded], high[bounded]):
            assert ((curve >= 0) & (curve <= 1)).all()
            if not conditional:
                assert (np.diff(curve) <= 1e-12).all(), (value, low, high)
        if not conditional:
            assert (low[bounded] <= value[bounded] + 1e-12).all() and (value[bounded] <= high[bounded] + 1e-12).all()


@settings(max_examples=100, deadline=None)
@given(decoded())
def test_survival_that_never_rises_is_the_plain_ratio(counts):
    total = counts.total()
    fitted, plain = statistics.nonincreasing(total.passed, total.offered), total.survival
    known = ~np.isnan(plain)
    assert (known == ~np.isnan(fitted)).all()
    if (np.diff(plain[known]) <= 0).all():
        np.testing.assert_array_equal(fitted[known], plain[known])
    # Pooling neighbours moves no mass: the weighted mean stays.
    weight = total.offered[known]
    assert (weight * fitted[known]).sum() == pytest.approx((weight * plain[known]).sum())


def test_the_monotone_fit_of_a_case_by_hand():
    passed, offered = np.array([50.0, 30.0, 9.0, 1.0]), np.array([100.0, 40.0, 10.0, 2.0])
    # 0.5, 0.75, 0.9, 0.5: the first three are pooled to 89 / 150.
    found = statistics.nonincreasing(np.stack([passed, offered]), np.stack([offered, offered]))
    np.testing.assert_allclose(found, [[89 / 150, 89 / 150, 89 / 150, 0.5], [1, 1, 1, 1]])


def test_nothing_grey_stands_where_nothing_was_reached():
    """Four prompts that accept one slot in a fifth of their rounds: the exact bound of slot 2 alone would be 0.6."""
    accepted = np.tile([1, 0, 0, 0, 0], 4)
    made = count(np.arange(4), np.full(4, 6.0), np.repeat(np.arange(4), 5), np.full(20, 5), accepted, np.ones(20, int))
    value, low, high = statistics.by_slot(made, False, 200)
    assert value[:2].tolist() == [0.2, 0.0] and high[:2] == pytest.approx([0.2, 0.2])
    for curve in (value, low, high):
        assert np.isnan(curve[2:]).all()
