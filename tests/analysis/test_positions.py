"""Position, context, token classes and the gap to training: by hand, and against loops over every round."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.compare import compare
from analysis.read import details, runs
from analysis.statistics.acceptance_gap import TeacherForcedSums, paired
from analysis.statistics.headline import headline
from analysis.statistics.histograms import count
from analysis.tables import gap, groups, positions
from specbench.runs.run_schema import OPTIONAL, TOKEN_CLASSES
from tests.analysis.synthetic import record, write_run

SLOTS = 3


def answer(rng: np.random.Generator, prompt: str, forced: bool = True, **facts) -> dict:
    """A record with its rounds in order, its tokens' classes and teacher-forced sums."""
    made = [(SLOTS, int(a)) for a in rng.integers(0, SLOTS + 1, rng.integers(1, 40))]
    row = record(made, prompt_id=prompt, prompt_tokens=int(rng.integers(3, 90)), **facts)
    row["by_round"] = [[p, a, a + 1] for p, a in made]
    row["output_tokens"] = min(row["output_tokens"], 60)
    row["truncated"] = row["output_tokens"] == 60
    row["token_classes"] = "".join(rng.choice(list("dscwx"), row["output_tokens"]))
    alpha = rng.random((30, SLOTS))
    chance = alpha.cumprod(1)
    sums = [np.full(SLOTS, 30.0), alpha.sum(0), chance.sum(0), np.r_[30.0, chance.sum(0)[:-1]]]
    row["teacher_forced"] = np.stack(sums, 1).tolist() if forced else None
    return row


def write(root, name: str, rows: list[dict], optional: bool = True) -> None:
    plain = [{key: value for key, value in row.items() if key not in OPTIONAL.names} for row in rows]
    file = write_run(root, name, plain) / "records.parquet"
    if optional:
        table = pq.read_table(file)
        for field in OPTIONAL:
            table = table.append_column(field, pa.array([row.get(field.name) for row in rows], field.type))
        pq.write_table(table, file)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    rng = np.random.default_rng(3)
    places = [("gsm8k", "math"), ("mbpp", "code")]
    return [answer(rng, f"{b}-{i}", benchmark=b, domain=d) for b, d in places for i in range(9)]


@pytest.fixture(scope="module")
def found(rows, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write(root, "one", rows)
    return groups.collect(runs.load(root)), root


def test_a_round_stands_behind_what_was_committed_before_it(found, rows):
    group = next(g for g in found[0] if g.benchmark == "mbpp")
    frame = details.rounds(group.runs)
    wanted = []
    for row in (r for r in rows if r["benchmark"] == "mbpp"):
        position = 1
        for proposed, accepted, committed in row["by_round"]:
            wanted.append((position, row["prompt_tokens"] + position, proposed, accepted, committed))
            position += committed
    columns = ["position", "context", "proposed", "accepted", "committed"]
    assert [tuple(line) for line in frame[columns].to_numpy().tolist()] == wanted


def test_bins_histogram_and_truncation_against_loops(found, rows):
    frames = positions.frames(found[0], 50)
    by_bin, accepted = defaultdict(list), defaultdict(int)
    for row in rows:
        position = 1
        for _, a, committed in row["by_round"]:
            by_bin[max(edge for edge in positions.POSITIONS if edge <= position)].append(committed)
            accepted[a] += 1
            position += committed
    own = frames["by_position"].query("domain == 'all'").set_index("position_from")
    assert {edge: (len(c), pytest.approx(np.mean(c))) for edge, c in by_bin.items()} == {
        edge: (line["rounds"], line["accepted_length"]) for edge, line in own.iterrows()
    }
    assert own["position_to"].iloc[0] == 16 and (own["low"] <= own["accepted_length"]).all()
    whole = frames["by_context"].query("domain == 'all'")
    assert (whole["rounds"] * whole["accepted_length"]).sum() == pytest.approx(sum(r["committed"] for r in rows))
    shares = frames["accepted_histogram"].query("domain == 'all'").set_index("accepted")["share"]
    total = sum(accepted.values())
    assert shares.to_dict() == pytest.approx({a: accepted[a] / total for a in range(SLOTS + 1)})
    cut = frames["truncation"].query("domain == 'math'").iloc[0]
    assert cut["truncated"] == pytest.approx(np.mean([r["truncated"] for r in rows if r["domain"] == "math"]))
    assert cut["answers"] == 9


def test_token_classes_against_loops(found, rows):
    own = positions.frames(found[0], 50)["token_classes"].query("domain == 'code'").set_index("token_class")
    seen: dict[str, list[bool]] = defaultdict(list)
    for row in (r for r in rows if r["domain"] == "code"):
        position = 1
        for proposed, accepted, committed in row["by_round"]:
            for slot in range(1, min(accepted + 1, proposed) + 1):
                if position - 1 + slot < len(row["token_classes"]):
                    seen[TOKEN_CLASSES[row["token_classes"][position - 1 + slot]]].append(slot <= accepted)
            position += committed
    assert {name: (len(hits), pytest.approx(np.mean(hits))) for name, hits in seen.items()} == {
        name: (line["n"], line["conditional"]) for name, line in own.iterrows()
    }


def test_the_gap_of_a_case_by_hand():
    """Two prompts, two slots: conditional 1.2/2 and 0.6/1.2 forced, 3/4 and 1/3 in rounds."""
    prompts, sums = ["a", "b"], [[[1, 0.5, 0.5, 1], [1, 0.4, 0.2, 0.5]], [[1, 0.7, 0.7, 1], [1, 0.6, 0.4, 0.7]]]
    cells = np.array([[0, 2, 2, 1], [0, 2, 1, 1], [1, 2, 1, 1], [1, 2, 0, 1]])
    counts = count(np.array(prompts), np.array([5, 3]), *cells.T)
    found = paired(counts, TeacherForcedSums.of(prompts, sums), 200)
    assert found.slots["conditional"][0].tolist() == pytest.approx([0.6, 0.5])
    assert found.slots["acceptance"][0].tolist() == pytest.approx([0.6, 0.5])
    assert found.slots["on_policy"][0].tolist() == pytest.approx([3 / 4, 1 / 3])
    assert found.slots["gap"][0].tolist() == pytest.approx([0.6 - 3 / 4, 0.5 - 1 / 3])
    assert found.length["expected_length"][0] == pytest.approx(1 + 0.6 + 0.3)
    assert found.length["length_gap"][0] == pytest.approx(1.9 - 2.0)


def test_where_both_estimates_agree_prompt_by_prompt_the_gap_has_no_width():
    """Pairing: each alone varies between prompts, their difference does not."""
    prompts = [f"p{i}" for i in range(12)]
    cells = np.array([[i, 1, a, n] for i in range(12) for a, n in ((1, i + 1), (0, 12 - i))])
    counts = count(np.array(prompts), np.array([13 + i + 1 for i in range(12)]), *cells.T)
    sums = [[[13.0, i + 1.0, i + 1.0, 13.0]] for i in range(12)]
    found = paired(counts, TeacherForcedSums.of(prompts, sums), 200)
    _, low, high = found.slots["conditional"]
    assert high[0] - low[0] > 0.1
    assert found.slots["gap"][1][0] == pytest.approx(0, abs=1e-12) == found.slots["gap"][2][0]
    assert found.length["length_gap"][1:] == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))


def test_the_table_and_the_headline_say_the_same(found, rows):
    frame = gap.table(found[0], 100)
    whole = frame.query("domain == 'all'").set_index("slot")
    numbers = headline([{**row, "histogram": row["histogram"]} for row in rows], 100)
    assert whole.loc[gap.LENGTH, "forced"] == pytest.approx(numbers["expected_length"]["value"])
    assert whole.loc[gap.LENGTH, "on_policy"] == pytest.approx(numbers["accepted_length"]["value"])
    for slot in numbers["teacher_forced"]:
        line = whole.loc[slot["slot"]]
        assert (line["anchors"], line["rounds"]) == (slot["anchors"], slot["n"]) == (18 * 30, slot["n"])
        assert [line["forced"], line["gap"]] == pytest.approx([slot["conditional"], slot["gap"]])
    assert math.isnan(whole.loc[gap.LENGTH, "anchors"])


def test_older_records_have_no_such_tables_and_mixed_ones_count_what_is_there(rows, tmp_path):
    write(tmp_path, "old", rows, optional=False)
    old = compare(tmp_path, tmp_path / "out", resamples=20, draw=False)
    assert not (tmp_path / "out" / "teacher_forced.csv").exists() and not len(old.frames["by_position"])
    assert len(old.frames["truncation"]) == 3
    write(tmp_path, "new", [{**row, "seed": 1, "teacher_forced": None} for row in rows])
    new = groups.collect(runs.load(tmp_path / "runs"))
    assert len(gap.table(new, 20)) == 0
    whole = positions.frames(new, 20)["by_position"].query("domain == 'all'")
    assert whole["rounds"].sum() == sum(len(row["by_round"]) for row in rows)


def test_a_comparison_has_the_tables_and_the_figures(found, tmp_path):
    told: list[tuple[str, int, int]] = []
    made = compare(found[1], tmp_path / "out", "domain=math", resamples=20, progress=lambda *step: told.append(step))
    assert [done for _, done, _ in told] == list(range(len(told))) and {steps for *_, steps in told} == {len(told) - 1}
    names = {path.name for path in made.files}
    tables = ("by_position", "by_context", "accepted_histogram", "truncation", "token_classes", "teacher_forced")
    assert {f"{name}.csv" for name in tables} <= names
    assert {"accepted_length_by_place.png", "accepted_histogram.pdf", "token_classes.png"} <= names
    assert "Teacher-forced against on-policy acceptance" in (tmp_path / "out" / "report.html").read_text()
    assert list(pd.read_csv(tmp_path / "out" / "teacher_forced.csv")["slot"].unique()) == [0, -1, 1, 2, 3]
