"""Question files of others as evaluation prompts and as a source of training prompts."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specbench.data.prompts import preparation as prompts
from specbench.data.prompts.benchmarks import MT_BENCH, Benchmark, Benchmarks
from specbench.data.prompts.sources import Columns, Files
from specbench.data.prompts.turns import PLACEHOLDER

SPEC_BENCH = ("translation", "summarization", "qa", "math_reasoning", "rag")
QUESTIONS = Columns(prompt="turns", id="question_id", domain="category")


def spec_bench():
    """Rows with the columns, numbers and categories of Spec-Bench's question.jsonl."""
    rows = [
        {"question_id": 81 + i, "category": MT_BENCH[i // 10], "turns": [f"question {i}", "and then?"], "reference": []}
        for i in range(80)
    ]
    later = range(161, 161 + 10 * len(SPEC_BENCH))
    return rows + [{"question_id": n, "category": SPEC_BENCH[(n - 161) // 10], "turns": [f"task {n}"]} for n in later]


def speed_bench():
    """Rows with the columns of SPEED-Bench's parquet files."""
    kinds = ("coding", "humanities", "math", "multilingual", "rag")
    return [
        {
            "question_id": f"{i:032x}", "category": kinds[i % 5], "sub_category": None, "turns": [f"prompt {i}"],
            "source": "x", "src_id": str(i), "difficulty": None, "multiturn": False,
        }
        for i in range(20)
    ]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, *benchmarks, **options):
    return Benchmarks("mine", list(benchmarks), prompts=path, **options)


def test_spec_bench_as_evaluation_prompts(tmp_path):
    data = load(write(tmp_path / "question.jsonl", spec_bench()))
    loaded = data.load()
    counts = {name: sum(p.benchmark == name for p in loaded) for name in dict.fromkeys(p.benchmark for p in loaded)}
    assert counts == {"mt-bench": 80, **dict.fromkeys(SPEC_BENCH, 10)}
    assert [p.id for p in loaded] == [str(81 + i) for i in range(130)]
    assert loaded[0].turns == ("question 0", "and then?") and loaded[-1].turns == ("task 210",)
    assert {p.domain for p in loaded if p.benchmark == "mt-bench"} == {"chat"}
    assert data.facts()["benchmarks"]["rag"]["prompts"] == 10
    assert {len(p.turns) for p in load(tmp_path / "question.jsonl", turns="first").load()} == {1}


def test_speed_bench_as_evaluation_prompts_from_every_format(tmp_path):
    rows = speed_bench()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "qualitative.parquet")
    (tmp_path / "qualitative.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "qualitative.jsonl.gz").write_bytes(
        gzip.compress(b"".join(json.dumps(r).encode() + b"\n" for r in rows))
    )
    found = [
        load(tmp_path / name).load() for name in ("qualitative.parquet", "qualitative.json", "qualitative.jsonl.gz")
    ]
    assert found[0] == found[1] == found[2]
    assert {p.benchmark for p in found[0]} == {"coding", "humanities", "math", "multilingual", "rag"}
    assert {p.id: p.turns for p in found[0]} == {r["question_id"]: tuple(r["turns"]) for r in rows}


def test_a_file_of_the_suite_keeps_the_suites_benchmark(tmp_path):
    path = write(tmp_path / "mt-bench.jsonl", spec_bench()[:3] + spec_bench()[-1:])
    loaded = load(path, Benchmark("mt-bench", "chat")).load()
    assert {(p.benchmark, p.domain) for p in loaded} == {("mt-bench", "chat")} and loaded[0].id == "81"


@pytest.mark.parametrize("rows", [spec_bench(), speed_bench()])
def test_question_files_as_a_source(tmp_path, rows):
    source = Files("q", [str(write(tmp_path / "question.jsonl", rows))], QUESTIONS)
    report = prompts.build(source, tmp_path / "out", {}, validation=0.0, near_duplicate=None)
    kept = {row["id"]: row for row in prompts.read(tmp_path / "out")}
    assert report["kept"]["train"] == len(rows) and list(kept) == [str(row["question_id"]) for row in rows]
    for row in rows:
        found = kept[str(row["question_id"])]
        assert [m["content"] for m in found["messages"]] == row["turns"] and found["domain"] == row["category"]


OWN = [
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ("a",)),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ("a",)),
    ({"conversations": [{"from": who, "value": text} for who, text in [("human", "a"), ("gpt", "b"), ("human", "c")]]},
     ("a", "c")),
    ({"prompt": "a", "response": "b"}, ("a",)),
    ({"prompt": ["a", "c"]}, ("a", "c")),
    ({"instruction": "a", "input": "i", "output": "b"}, ("a\n\nInput:\ni",)),
    ({"turns": ["a"], "id": None}, ("a",)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "turns"), OWN, ids=[str(i) for i in range(len(OWN))])
def test_every_layout_is_a_prompt(tmp_path, row, turns):
    (prompt,) = load(write(tmp_path / "own.jsonl", [row])).load()
    assert prompt.turns == turns and (prompt.id, prompt.benchmark, prompt.domain) == ("own/0", "own", "own")


BROKEN = [
    ({"turns": ["b"], "id": 1}, "repeats the id '1' of line 1"),
    ({"turns": ["b"], "question_id": "1"}, "repeats the id '1' of line 1"),
    ({"turns": ["b"], "id": True}, "`id` is a bool"),
    ({"turns": ["b"], "id": ["a"]}, "`id` is a list"),
    ({"turns": ["\ud800"]}, "not Unicode"),
    ({"turns": [PLACEHOLDER]}, "placeholder of SPEED-Bench"),
    ({"turns": ["b", 3]}, "not a list of texts"),
    ({"turns": [True]}, "not a list of texts"),
    ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]}, "a system message"),
    ({"messages": [{"role": "assistant", "content": "b"}]}, "no question"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url' in a turn"),
    ({"prompt_ids": [1.0]}, "not a list of token ids"),
    ({"prompt_ids": [True]}, "not a list of token ids"),
    ({"prompt_ids": [None]}, "not a list of token ids"),
    ({"prompt_ids": [2**31]}, "not a list of token ids"),
    ({"prompt_ids": [10**40]}, "not a list of token ids"),
    ({"prompt_ids": "12"}, "not a list of token ids"),
    ({"turns": ["b"], "category": 3}, "`category` is not text"),
    (
        {"turns": ["b"], "category": "own", "domain": "maths"},
        "'own' into domain 'maths', and rows before it into 'own'",
    ),
]


@pytest.mark.parametrize(("row", "why"), BROKEN, ids=[str(i) for i in range(len(BROKEN))])
def test_what_is_no_prompt_is_named_by_line(tmp_path, row, why):
    path = write(tmp_path / "own.jsonl", [{"turns": ["a"], "id": 1}, row])
    with pytest.raises(ValueError, match=rf"own\.jsonl, line 2: .*{why}"):
        load(path).load()


def test_empty_files_and_folders_in_the_place_of_files(tmp_path):
    (tmp_path / "own.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"own\.jsonl holds no prompt"):
        load(tmp_path / "own.jsonl").load()
    (tmp_path / "one.jsonl").mkdir()
    with pytest.raises(ValueError, match="holds no prompt of suite"):
        load(tmp_path, Benchmark("one", "math")).load()


def test_a_share_gpt_array_goes_through_and_misfits_are_told_with_their_place(tmp_path):
    talk = [{"from": "human", "value": "one \u2028 two\u0085"}, {"from": "gpt", "value": "fine"}]
    picture = [{"from": "human", "value": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"id": "a", "conversations": talk}, {"conversations": picture}], ensure_ascii=False))
    report = prompts.build(Files("mine", [str(path)], Columns()), tmp_path / "out", {}, validation=0.0)
    assert [row["messages"][0]["content"] for row in prompts.read(tmp_path / "out")] == ["one \u2028 two\u0085"]
    assert report["unfit"] == {"a part 'image_url' in a turn: targets read text alone": 1}
    assert report["unfit_examples"] == [f"{path}, element 2: a part 'image_url' in a turn: targets read text alone"]


def test_a_repeated_id_names_both_places(tmp_path):
    write(tmp_path / "a.jsonl", [{"q": "one", "k": 1}, {"q": "two", "k": 2}])
    (tmp_path / "b.json").write_text(json.dumps([{"q": "three", "k": "2"}]))
    source = Files("x", [str(tmp_path / name) for name in ("a.jsonl", "b.json")], Columns(prompt="q", id="k"))
    with pytest.raises(ValueError, match=r"id '2' occurs twice, in .*a\.jsonl, line 2 and in .*b\.json, element 1"):
        prompts.build(source, tmp_path / "out", {}, validation=0.0)


def test_lone_surrogates_never_stop_the_writing(tmp_path):
    rows = [
        {"q": "fine \u2028", "k": "\ud800", "s": "x"},
        {"q": "bad \udfff", "k": 2, "s": "y"},
        {"q": "good", "k": 3, "s": "\ud800"},
    ]
    source = Files(
        "x", [str(write(tmp_path / "a.jsonl", [*rows, {"q": "kept", "k": 4}]))], Columns(prompt="q", id="k", source="s")
    )
    report = prompts.build(source, tmp_path / "out", {}, validation=0.0)
    assert [row["id"] for row in prompts.read(tmp_path / "out")] == ["4"] and sum(report["unfit"].values()) == 3
    assert prompts.finished(tmp_path / "out") == report


def test_a_name_that_looks_like_a_pattern_is_a_file(tmp_path):
    path = write(tmp_path / "chats[1].jsonl", [{"prompt": "a"}])
    assert len(list(Files("x", [str(path)], Columns()).conversations())) == 1
