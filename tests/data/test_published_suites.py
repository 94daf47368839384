"""Suites of others in their published layouts: Spec-Bench and SPEED-Bench, whole, in part, and broken; long books."""

import json
import re
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specbench.data.prompts.benchmarks import MT_BENCH
from specbench.data.prompts.suites import suite_of
from specbench.data.prompts.turns import PLACEHOLDER
from tests.data.test_question_files import SPEC_BENCH, write


def published(name):
    """Rows of a whole suite in its published layout: as many of each category as the suite has, one text each."""
    benchmarks = suite_of(name).benchmarks
    first = 81 if name == "spec_bench" else 0
    rows = [(b.name, i) for b in benchmarks for i in range(b.rows)]
    return [
        {"question_id": first + n, "category": category, "turns": [f"{category} {i}", "and then?"], "reference": []}
        for n, (category, i) in enumerate(rows)
    ]


def test_suite_spec_bench_has_the_published_questions(tmp_path, caplog):
    path = write(tmp_path / "question.jsonl", published("spec_bench"))
    suite = suite_of("spec_bench", path)
    counts = Counter(p.benchmark for p in suite.load())
    assert counts == {**dict.fromkeys(MT_BENCH, 10), **dict.fromkeys(SPEC_BENCH, 80)} and counts.total() == 480
    domains = Counter(p.domain for p in suite.load())
    assert domains == dict.fromkeys(("chat", "translation", "summarization", "qa", "math", "rag"), 80)
    assert {p.id for p in suite.load()} == {str(n) for n in range(81, 561)}
    facts = suite.facts()
    assert (facts["suite"], facts["title"], facts["version"]) == ("spec_bench", "Spec-Bench (Xia et al. 2024)", 1)
    assert facts["missing"] == [] and not caplog.records
    assert {len(p.turns) for p in suite_of("spec_bench", path, turns="first", limit=1).load()} == {1}
    # The folder that holds the file and the file itself are the same prompts, also when fewer are drawn.
    few = [sorted(p.id for p in suite_of("spec_bench", place, limit=3).load()) for place in (path, tmp_path)]
    assert few[0] == few[1] and len(few[0]) == 39


def test_a_downloaded_suite_has_the_prompts_of_the_file(tmp_path, monkeypatch):
    """The address is a local file: everything behind the download is the real path."""
    path = write(tmp_path / "question.jsonl", published("spec_bench"))
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    online = suite_of("spec_bench", limit=4)
    online.benchmarks = [replace(b, address=str(path)) for b in online.benchmarks]
    assert online.load() == suite_of("spec_bench", path, limit=4).load()
    facts = online.facts()["benchmarks"]["rag"]
    assert facts["dataset"] == "hemingkx/Spec-Bench" and len(facts["revision"]) == 40


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "json"])
def test_suite_speed_bench_reads_the_users_folder(tmp_path, ending):
    rows = [
        row | {"question_id": f"{row['question_id']:032x}", "sub_category": None} for row in published("speed_bench")
    ]
    file = tmp_path / f"qualitative.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows) if ending == "json" else "".join(json.dumps(r) + "\n" for r in rows))
    suite = suite_of("speed_bench", tmp_path)
    assert Counter(p.benchmark for p in suite.load()) == dict.fromkeys((b.name for b in suite.benchmarks), 80)
    assert len(suite.load()) == 880 and suite.facts()["benchmarks"]["stem"]["file"] == str(file)


def test_speed_benchs_long_prompts_are_benchmarks_by_length(tmp_path, caplog):
    for size in ("8k", "32k"):
        rows = [{"question_id": f"{size}{i}", "category": "mixed", "turns": [f"{size} {i}"]} for i in range(3)]
        write(tmp_path / f"throughput_{size}.jsonl", rows)
    suite = suite_of("speed_bench_throughput", tmp_path)
    assert Counter(p.benchmark for p in suite.load()) == {"throughput_8k": 3, "throughput_32k": 3}
    assert suite.facts()["missing"] == ["throughput_1k", "throughput_2k", "throughput_16k"]
    assert "has 3 prompts of throughput_8k" in caplog.text and "has 1536" in caplog.text
    # A single file is the one that its name says, and with a name of its own it could be any of them.
    alone = suite_of("speed_bench_throughput", tmp_path / "throughput_8k.jsonl")
    assert {(p.benchmark, p.id) for p in alone.load()} == {("throughput_8k", f"8k{i}") for i in range(3)}
    assert alone.missing == ["throughput_1k", "throughput_2k", "throughput_16k", "throughput_32k"]
    (tmp_path / "throughput_8k.jsonl").rename(tmp_path / "mine.jsonl")
    with pytest.raises(ValueError, match="this name is none of throughput_1k, throughput_2k"):
        suite_of("speed_bench_throughput", tmp_path / "mine.jsonl").load()


FOREIGN = [
    ({"category": "poetry"}, "category 'poetry' is in no benchmark of suite spec_bench"),
    ({"category": None}, "category null is in no benchmark"),
    ({"category": ["rag"]}, "category of type list is in no benchmark"),
    ({"category": "{{ 1/0 }}"}, "is in no benchmark"),
    ({"turns": []}, "not a list of texts"),
    ({"turns": [PLACEHOLDER]}, "placeholder of SPEED-Bench"),
    ({"question_id": 81}, "repeats the id '81' of line 1"),
]


@pytest.mark.parametrize(("change", "why"), FOREIGN, ids=[str(i) for i in range(len(FOREIGN))])
def test_a_row_that_is_not_of_the_suite_is_named(tmp_path, change, why):
    good = published("spec_bench")[0]
    path = write(tmp_path / "question.jsonl", [good, good | {"question_id": 82} | change])
    with pytest.raises(ValueError, match=rf"question\.jsonl, line 2: .*{re.escape(why)}"):
        suite_of("spec_bench", path).load()


def test_a_part_of_a_suite_is_reported(tmp_path, caplog):
    path = write(tmp_path / "question.jsonl", [row for row in published("spec_bench") if row["category"] != "qa"][:-1])
    suite = suite_of("spec_bench", path)
    assert len(suite.load()) == 399
    assert "has 79 prompts of rag, and suite spec_bench (version 1) has 80" in caplog.text
    assert "has 0 prompts of qa" in caplog.text and suite.facts()["missing"] == ["qa"]


def test_books_of_four_lengths_are_the_same_books(tmp_path, monkeypatch):
    """Local rows in the place of the hub's: short books are left out, and each length begins the same books."""
    texts = [f"book {i} " + "word " * (5_000 * i) for i in range(12)]
    books = [b for b in suite_of("extras").benchmarks if b.name.startswith("pg19")]
    monkeypatch.setattr("specbench.files.hub_datasets.load", lambda *args, **kwargs: [{"text": t} for t in texts])
    loaded = [[turns[0] for _, turns in b.download()] for b in books]
    lengths = [16_000, 32_000, 64_000, 128_000]
    assert [b.where for b in books] == ["text|length >= 128000"] * 4
    for prompts_of_length, length in zip(loaded, lengths, strict=True):
        assert [p[:length] for p in prompts_of_length] == [t[:length] for t in texts if len(t) >= 128_000]
        assert all(len(p) - length < 80 for p in prompts_of_length)
