"""Suites: templates against texts written out here, exact split over ranks, sampling as in `datasets`, named errors."""

import hashlib
import json
from pathlib import Path

import datasets
import hydra
import lightning as L
import pytest
import torch
from hydra.utils import instantiate

from specbench.data.prompts.benchmarks import Benchmark, Benchmarks, Prompt, for_rank

STEP = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LCB = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests. You will NOT return anything except "
    "for the program\n\n### Question:\nQ\n\n"
)
RENDERED = {
    "gsm8k": ({"question": "How many?", "answer": "4"}, f"How many?{STEP}"),
    "math500": ({"problem": "Let $x$ {be}."}, "Let $x$ {be}." + STEP),
    "aime25": ({"problem": "P"}, f"P{STEP}"),
    "aime24": ({"problem": "P"}, f"P{STEP}"),
    "humaneval": (
        {"prompt": "def f():\n    pass\n"},
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        "```python\ndef f():\n    pass\n\n```",
    ),
    "mbpp": ({"prompt": "Write a function."}, "Write a function."),
    "livecodebench": (
        {"question_content": "Q", "starter_code": "class S:\n    def f(self):\n        "},
        LCB + "### Format: Use the following code structure:\n```python\nclass S:\n    def f(self):\n        \n```\n\n"
        "### Answer: (use the provided format with backticks)",
    ),
    "alpaca": ({"instruction": "Sum.", "input": "1 2", "output": "3"}, "Sum.\n\nInput:\n1 2"),
    "arena-hard-v2": ({"prompt": "Hi {{ x }}", "uid": "1"}, "Hi {{ x }}"),
    "lbpp": ({"instruction": "Do."}, "Do."),
    "swe-bench-lite": (
        {"problem_statement": "It breaks."},
        "Problem Statement:\nIt breaks.\nPlease fix the issue described above.",
    ),
    "m-arena-hard-v2": ({"prompt": "你好"}, "你好"),
}
COUNTS = {
    "gsm8k": 500, "math500": 500, "aime25": 30, "humaneval": 164, "mbpp": 256, "livecodebench": 500, "mt-bench": 80,
    "alpaca": 500, "arena-hard-v2": 500,
}  # fmt: skip


def suite(name, *overrides):
    with hydra.initialize_config_module("configs", version_base="1.3"):
        cfg = hydra.compose(overrides=[f"+suite={name}", *overrides])
        return instantiate(cfg.suite, _convert_="all")


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def known():
    return {b.name: b for s in ("paper", "extras") for b in suite(s).benchmarks}


def test_the_papers_suite_and_its_templates(known):
    assert {b.name: b.rows for b in suite("paper").benchmarks} == COUNTS
    for name, (row, text) in RENDERED.items():
        assert known[name].render(row) == (text,), name
    code = known["livecodebench"].render({"question_content": "Q", "starter_code": ""})[0]
    assert code == LCB + (
        "### Format: Write your code in the following format:\n```python\n# YOUR CODE HERE\n```\n\n"
        "### Answer: (use the provided format with backticks)"
    )
    assert known["alpaca"].render({"instruction": "Sum.", "input": ""}) == ("Sum.",)
    assert known["mt-bench"].render({"prompt": ["a", "b"]}) == ("a", "b")
    books = {f"pg19-{size}k" for size in (4, 8, 16, 32)}
    assert {b.domain for b in known.values()} == {"math", "code", "chat", "multilingual", *books}
    quick = suite("quick")
    assert (quick.name, quick.limit, [b.name for b in quick.benchmarks]) == ("quick", 20, list(COUNTS))


def test_a_template_that_does_not_fit_names_the_column(known):
    with pytest.raises(ValueError, match=r"'gsm8k'.*'question' is undefined.*columns are problem"):
        known["gsm8k"].render({"problem": "x"})
    with pytest.raises(ValueError, match="'mt-bench'"):
        known["mt-bench"].render({"turns": ["a"]})


def test_rows_are_drawn_as_datasets_shuffles_them():
    benchmark = Benchmark("b", "math", rows=40, row_seed=3)
    shuffled = datasets.Dataset.from_dict({"i": list(range(100))}).shuffle(seed=3).select(range(40))["i"]
    assert benchmark.sample(100) == list(shuffled)
    assert benchmark.sample(100, 10) == list(shuffled)[:10]
    assert sorted(benchmark.sample(7)) == list(range(7))


def some(count=37):
    return [Prompt(f"b{i % 3}/{i}", f"b{i % 3}", "math", ("x" * (i * 7 % 13 + 1),), None, i) for i in range(count)]


@pytest.mark.parametrize("world", [1, 2, 3, 8, 50])
def test_the_split_over_ranks_is_exact(world):
    parts = [for_rank(some(), rank, world) for rank in range(world)]
    assert sorted(p.id for part in parts for p in part) == sorted(p.id for p in some())
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:
        assert [p.length for p in part] == sorted((p.length for p in part), reverse=True)
    assert parts[0] == for_rank(some()[::-1], 0, world)


def test_a_rank_outside_the_world():
    with pytest.raises(ValueError, match="rank=2 of world=2"):
        for_rank(some(), 2, 2)


def folder(tmp_path):
    write(tmp_path / "one.jsonl", [{"turns": [f"question {i}" + "!" * i, "more"]} for i in range(30)])
    write(tmp_path / "two.jsonl", [{"prompt_ids": [1, 2, i], "id": f"t{i}"} for i in range(5)])
    return [Benchmark("one", "math", rows=20), Benchmark("two", "code"), Benchmark("three", "chat")]


def test_a_folder_follows_the_suite(tmp_path, caplog):
    data = Benchmarks("mine", folder(tmp_path), prompts=tmp_path, limit=10)
    loaded = data.load()
    assert "three" in caplog.text and data.missing == ["three"]
    assert [p.benchmark for p in loaded] == ["one"] * 10 + ["two"] * 5
    rows = Benchmark("one", "math", rows=20).sample(30, 10)
    assert [p.id for p in loaded[:10]] == [f"one/{row}" for row in rows]
    assert loaded[0].turns == (f"question {rows[0]}" + "!" * rows[0], "more") and loaded[0].prompt_ids is None
    assert {p.prompt_ids for p in loaded[10:]} == {(1, 2, i) for i in range(5)}
    facts = data.facts()
    assert facts["missing"] == ["three"] and facts["benchmarks"]["one"]["prompts"] == 10
    # Nothing was read of the hub's data set, so its name and revision are not said.
    for name, said in facts["benchmarks"].items():
        assert said.keys() == {"domain", "prompts", "file", "sha256"}
        assert said["sha256"] == hashlib.sha256((tmp_path / f"{name}.jsonl").read_bytes()).hexdigest()
    first = Benchmarks("mine", folder(tmp_path), prompts=tmp_path, turns="first").load()
    assert {len(p.turns) for p in first if p.turns} == {1}
    texts = data.texts()["one"]  # of every row, drawn or not, without the follow-up of one word
    assert len(texts) == 30 and all(t.startswith("question") for t in texts)
    write(tmp_path / "one.jsonl", [{"turns": ["short", "more", "a follow up of eight words stands by itself"]}])
    assert data.texts()["one"] == ["short", "a follow up of eight words stands by itself"]


def test_seeds_belong_to_prompts(tmp_path):
    benchmarks = folder(tmp_path)
    small = {p.id: p.seed for p in Benchmarks("a", benchmarks, prompts=tmp_path, limit=4).load()}
    large = {p.id: p.seed for p in Benchmarks("b", benchmarks[::-1], prompts=tmp_path).load()}
    assert small.items() <= large.items() and len(set(large.values())) == len(large)
    other = {p.id: p.seed for p in Benchmarks("a", benchmarks, prompts=tmp_path, seed=1).load()}
    assert all(other[id] != seed for id, seed in small.items())


def test_a_single_file_is_taken_whole(tmp_path):
    benchmarks = folder(tmp_path)
    known = Benchmarks("mine", benchmarks, prompts=tmp_path / "one.jsonl").load()
    first = Benchmarks("mine", benchmarks, prompts=tmp_path / "one.jsonl", limit=3).load()
    assert first == known[:3]
    assert len(known) == 30 and {p.domain for p in known} == {"math"}
    assert [p.id for p in known] == [f"one/{i}" for i in range(30)]
    write(tmp_path / "own.jsonl", [{"prompt_ids": [5, 6]}])
    data = Benchmarks("mine", benchmarks, prompts=str(tmp_path / "own.jsonl"))
    (own,) = data.load()
    file = tmp_path / "own.jsonl"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert data.facts()["benchmarks"] == {"own": {"domain": "own", "prompts": 1, "file": str(file), "sha256": digest}}
    assert (own.id, own.benchmark, own.domain, own.prompt_ids) == ("own/0", "own", "own", (5, 6))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"turns": ["a"', "not JSON"),
        ('{"turns": []}', "list of texts"),
        ('{"turns": [" "]}', "a turn without text"),
        ('{"turns": "a"}', "list of texts"),
        ('{"prompt_ids": [1, "2"]}', "list of token ids"),
        ('{"prompt_ids": [1, -2]}', "list of token ids"),
        ('{"words": "a"}', "needs `turns` or `prompt_ids`"),
        ('{"turns": ["a"], "prompt_ids": [1]}', "not both"),
        ("[1]", "holds a list"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, why):
    path = tmp_path / "one.jsonl"
    path.write_text('{"turns": ["fine"]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"one\.jsonl, line 2: .*" + why):
        Benchmarks("mine", [Benchmark("one", "math")], prompts=tmp_path).load()


def test_settings_that_cannot_work(tmp_path):
    benchmarks = [Benchmark("one", "math")]
    with pytest.raises(ValueError, match="does not exist"):
        Benchmarks("mine", benchmarks, prompts=tmp_path / "absent").load()
    with pytest.raises(ValueError, match=r"holds no prompt of suite 'mine': it looks for one\.jsonl"):
        Benchmarks("mine", benchmarks, prompts=tmp_path).load()
    with pytest.raises(ValueError, match="turns='second'"):
        Benchmarks("mine", benchmarks, turns="second")
    with pytest.raises(ValueError, match="limit=0"):
        Benchmarks("mine", benchmarks, limit=0)
    write(tmp_path / "one.jsonl", [{"turns": ["a"], "id": 1}, {"turns": ["b"], "id": 1}])
    with pytest.raises(ValueError, match=r"one\.jsonl, line 2: repeats the id '1' of line 1"):
        Benchmarks("mine", benchmarks, prompts=tmp_path).load()


def test_without_a_network_one_sentence_says_what_to_set(known, monkeypatch):
    monkeypatch.setattr("specbench.files.hub_datasets._resolves", lambda host: False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("/nonexistent"))
    for name in ("gsm8k", "arena-hard-v2"):
        dataset = known[name].dataset
        with pytest.raises(ValueError, match=rf"{dataset}.*set prompts=FOLDER with FOLDER/{name}\.jsonl"):
            known[name].download()


def test_rows_of_a_local_dataset_become_prompts(tmp_path, monkeypatch):
    """The hub's loader is handed local parquet: everything behind the download is the real path."""
    table = datasets.Dataset.from_list([{"question": f"q{i}"} for i in range(30)])
    table.to_parquet(tmp_path / "t.parquet")
    benchmark = Benchmark("g", "math", rows=4, dataset=str(tmp_path), split="train", template="{{ question }}?")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = Benchmarks("s", [benchmark]).load()
    assert [p.turns[0] for p in loaded] == [f"q{i}?" for i in benchmark.sample(30)]
    assert [p.id for p in loaded] == [f"g/{i}" for i in benchmark.sample(30)]


def test_the_embedded_suite_takes_held_out_arithmetic():
    (benchmark,) = [b for b in suite("embedded").benchmarks if b.name == "math"]
    loaded = Benchmarks("embedded", [benchmark], limit=5).load()
    assert len({p.id for p in loaded}) == 5 and all(p.domain == "math" and p.turns for p in loaded)


class Collect(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.seen = []
        self.dummy = torch.nn.Parameter(torch.zeros(1))

    def test_step(self, batch, index):
        self.seen.append(batch)


def test_lightning_hands_over_whole_benchmarks(tmp_path):
    data = Benchmarks("mine", folder(tmp_path), prompts=tmp_path)
    module = Collect()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.test(module, data, verbose=False)
    assert [[p.benchmark for p in batch] for batch in module.seen] == [["one"] * 20, ["two"] * 5]
    assert all(isinstance(p, Prompt) for batch in module.seen for p in batch)
    lengths = [p.length for p in module.seen[0]]
    assert lengths == sorted(lengths, reverse=True)
