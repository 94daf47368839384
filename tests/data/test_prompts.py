"""Prompts: mapping, split, near-duplicates and decontamination against plain-Python counting."""

import json
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specbench.data.prompts import preparation as prompts
from specbench.data.prompts.benchmarks import Benchmark, Benchmarks
from specbench.data.prompts.deduplication import Contamination, Signatures, words
from specbench.data.prompts.sources import Columns, Embedded, Files, HeldOut
from specbench.files import json_lines as jsonl

SHAREGPT = Columns(messages="conversations", role="from", content="value")


def text(seed: int, length: int = 40) -> str:
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("abcdefghij", k=6)) for _ in range(length))


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def human(content, answer="fine"):
    return {"conversations": [{"from": "human", "value": content}, {"from": "gpt", "value": answer}]}


def jaccard(a, b, n=5):
    sets = [{tuple(words(t)[i : i + n]) for i in range(len(words(t)) - n + 1)} for t in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_rows_become_conversations_and_misfits_are_counted(tmp_path):
    rows = [
        {"conversations": [
            {"from": "system", "value": "S"}, {"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"},
            {"from": "user", "value": "more"}, {"from": "model", "value": "ok"},
        ]},
        {"conversations": [{"from": "gpt", "value": "welcome"}, {"from": "human", "value": "thanks"}]},
        {"conversations": [
            {"from": "human", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"},
        ]},
        {"conversations": [{"from": "tool", "value": "x"}]},
        {"conversations": [{"from": "human", "value": "  "}]},
        {"conversations": None},
        {"conversations": [{"from": "system", "value": "only"}]},
    ]  # fmt: skip
    source = Files("mine", [write(tmp_path / "a.jsonl", rows)], SHAREGPT)
    got = [c for _, c in source.conversations()]
    assert [m["role"] for m in got[0]["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert got[1]["messages"] == [{"role": "user", "content": "thanks"}]
    assert len(got) == 2 and all(c["source"] == "mine" for c in got)
    assert dict(source.dropped) == {
        "answers before the first question (cut)": 1,
        "roles do not alternate": 1,
        "role 'tool'": 1,
        "a turn without text": 1,
        "column 'conversations' is not a list of turns": 1,
        "no question": 1,
    }


def test_user_turns_without_answers_and_parquet_give_the_same(tmp_path):
    rows = [{"turns": ["one", "two"], "key": 7, "from": "mt"}]
    columns = Columns(prompt="turns", id="key", source="from")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (write(tmp_path / "a.jsonl", rows), str(tmp_path / "a.parquet")):
        ((split, conversation),) = Files("x", [path], columns).conversations()
        assert split is None
        assert conversation == {
            "id": "7",
            "messages": [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}],
            "source": "mt",
        }


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(human("x")) + '\n{"conversations": [\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2: not JSON"):
        list(Files("x", [str(path)], SHAREGPT).conversations())
    with pytest.raises(ValueError, match="matches no file"):
        list(Files("x", [str(tmp_path / "no*.jsonl")], SHAREGPT).conversations())
    path.write_text('{"id": "a", "messages": [{"role": "user", "content": "x"}]}\n{"id": "b", "messages": []}\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2: `messages`"):
        list(jsonl.conversations(path))


def test_signatures_estimate_jaccard():
    """Every estimate within 4.5 standard errors of the exact value: false alarm below 1e-4 over the 8 pairs."""
    signatures = Signatures(bands=64, rows=8)
    truths = []
    for changed in range(8):
        original = text(changed, 60).split()
        other = ["changed" if i % 7 == 0 and i < 7 * changed else w for i, w in enumerate(original)]
        signatures.add(" ".join(original))
        signatures.add(" ".join(other))
        truths.append(jaccard(" ".join(original), " ".join(other)))
    even = np.arange(0, 16, 2)
    estimates = signatures.similarity(even, even + 1)
    assert truths[0] == 1 and truths[-1] < 0.3
    for truth, estimate in zip(truths, estimates, strict=True):
        assert abs(estimate - truth) <= 4.5 * (truth * (1 - truth) / 512) ** 0.5


def test_near_duplicates_equal_all_pairs_comparison():
    """Banding finds the pairs that comparing all pairs finds (similarity 1 or far from the threshold)."""
    generator = random.Random(0)
    originals = [text(i) for i in range(40)]
    texts = originals + [originals[i] + " tail" for i in range(10)] + [originals[i] for i in range(20, 25)]
    generator.shuffle(texts)
    signatures = Signatures()
    for t in texts:
        signatures.add(t)
    expected = [any(jaccard(texts[i], texts[j]) >= 0.8 for j in range(i)) for i in range(len(texts))]
    assert sum(expected) == 15
    assert (signatures.duplicates(0.8) >= 0).tolist() == expected
    exact = signatures.duplicates(None)
    assert (exact >= 0).sum() == 5
    assert all(texts[i] == texts[j] for i, j in enumerate(exact) if j >= 0)


def test_texts_shorter_than_a_shingle_and_without_spaces():
    signatures = Signatures()
    for t in ("hi", "hi", "ho", "", "!!", "天地玄黄宇宙洪荒", "天地玄黄宇宙洪荒日月盈昃"):
        signatures.add(t)
    assert signatures.duplicates(0.8).tolist() == [-1, 0, -1, -1, -1, -1, -1]
    assert len(words("天地玄黄 abc")) == 5


SUFFIX = "Please reason step by step, and put your final answer within \\boxed{}."
EVALUATION = {
    "maths": [f"{text(100 + i, 20)}?\n{SUFFIX}" for i in range(12)],
    "short": ["what is two plus two", "name the capital city of the country france please now", "x y"],
}


def test_contamination_exact_ngram_and_boilerplate():
    found = Contamination(EVALUATION)
    question = text(100, 20)
    assert found.match([EVALUATION["maths"][0]]) == ("maths", "exact")
    assert found.match([question.upper() + " !"]) == ("maths", "exact")  # without the benchmark's own wrapping
    middle = " ".join(question.split()[3:17])
    assert found.match(["hello", f"Solve this: {middle} and more"]) == ("maths", "ngram")
    assert found.match([" ".join(question.split()[3:15])]) is None  # 12 words in common
    assert found.match([f"Add 2 and 3.\n{SUFFIX}"]) is None  # the wrapping alone is no evidence
    assert found.match(["What is two plus TWO?"]) == ("short", "exact")
    assert found.match(["so what is two plus two then"]) is None  # too short for anything but equality
    assert found.match(["tell: name the capital city of the country france please now, quickly"]) == ("short", "ngram")
    sums = Contamination({"sums": ["What is 2 + 2?", "What is 3 - 1?"]})
    assert sums.match(["what is 2 + 2"]) == ("sums", "exact") and sums.match(["What is 2 * 2?"]) is None
    assert Contamination({}).match(["anything"]) is None
    equal = Contamination(EVALUATION, ngram=None)
    assert equal.match([question]) == ("maths", "exact") and equal.match([f"Solve: {middle} and more"]) is None


def test_build_counts_everything_once(tmp_path):
    clean = [text(i) for i in range(40)]
    rows = [human(t) for t in clean]
    rows += [human(clean[3]), human(clean[4], "other answer")]  # equal questions
    rows += [human(clean[5] + " more")]  # near-duplicate
    rows += [human(EVALUATION["maths"][1]), human("intro " + " ".join(EVALUATION["maths"][2].split()[:16]))]
    rows += [{"conversations": []}]
    source = Files("mine", [write(tmp_path / "a.jsonl", rows)], SHAREGPT)
    report = prompts.build(source, tmp_path / "out", EVALUATION, validation=0.25)
    assert (report["read"], report["equal_questions"], report["near_duplicates"]) == (46, 2, 1)
    assert report["contaminated"] == 2
    assert report["decontamination"]["removed"]["maths"] == {"exact": 1, "ngram": 1}
    assert report["unfit"] == {"no question": 1}
    kept = {s: list(prompts.read(tmp_path / "out", s)) for s in prompts.SPLITS}
    assert {s: len(k) for s, k in kept.items()} == report["kept"]
    assert sorted(c["messages"][0]["content"] for k in kept.values() for c in k) == sorted(clean)
    assert 2 <= report["kept"]["validation"] <= 19  # binomial(40, 1/4): outside with probability below 0.002
    for split, rows in kept.items():
        assert all(prompts.split_of(c["messages"], 0.25) == split for c in rows)
    assert prompts.finished(tmp_path / "out") == json.loads((tmp_path / "out" / "report.json").read_text())
    assert not list((tmp_path / "out").glob("*.tmp"))
    again = prompts.build(
        source.__class__("mine", source.paths, SHAREGPT), tmp_path / "two", EVALUATION, validation=0.25
    )
    assert again == report
    for split in prompts.SPLITS:
        assert (tmp_path / "two" / f"{split}.jsonl").read_bytes() == (tmp_path / "out" / f"{split}.jsonl").read_bytes()


def test_the_split_does_not_depend_on_order_or_company(tmp_path):
    rows = [human(text(i)) for i in range(30)]
    sides = []
    for order in (rows, rows[::-1], rows[::2]):
        source = Files("x", [write(tmp_path / "a.jsonl", order)], SHAREGPT)
        prompts.build(source, tmp_path / "o", {}, validation=0.3)
        sides.append({c["id"]: s for s in prompts.SPLITS for c in prompts.read(tmp_path / "o", s)})
    assert sides[0] == sides[1] and sides[2].items() <= sides[0].items()


def test_embedded_corpus_keeps_its_own_split(tmp_path):
    source = Embedded(domains=["math"], counts={"train": 6, "validation": 3})
    report = prompts.build(source, tmp_path, {}, near_duplicate=None)
    assert report["kept"] == {"train": 6, "validation": 3}
    rows = list(prompts.read(tmp_path, "train"))
    assert {r["domain"] for r in rows} == {"math"} and all(r["source"] for r in rows)
    assert len(list(prompts.read(tmp_path, "train", limit=5))) == 5


def test_settings_and_ids_that_cannot_work(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "one", "k": 1}, {"q": "two", "k": 1}])
    source = Files("x", [path], Columns(prompt="q", id="k"))
    with pytest.raises(ValueError, match="'1' occurs twice"):
        prompts.build(source, tmp_path / "o", {}, validation=0.0)
    with pytest.raises(ValueError, match="validation=1"):
        prompts.build(source, tmp_path / "o", {}, validation=1)
    with pytest.raises(ValueError, match="near_duplicate=2"):
        prompts.build(source, tmp_path / "o", {}, near_duplicate=2)
    with pytest.raises(ValueError, match="no conversation of 'x' is left"):
        prompts.build(Files("x", [path], Columns(prompt="absent")), tmp_path / "o", {})
    assert prompts.finished(tmp_path / "o") is None


def test_benchmarks_are_divided_once_and_the_held_out_part_is_a_suite_of_its_own(tmp_path):
    for name, count in (("gsm8k", 30), ("chat", 12)):
        write(
            tmp_path / f"{name}.jsonl", [{"turns": [text(100 * count + i), f"Now shorter, {i}."]} for i in range(count)]
        )
    benchmarks = {"gsm8k": Benchmark("gsm8k", "math", rows=5), "chat": Benchmark("chat", "chat")}
    source = HeldOut("mine", benchmarks, str(tmp_path), held_out=4, limit=20)
    report = prompts.build(source, tmp_path / "out", {}, near_duplicate=None)
    assert report["kept"] == {"train": 20 + 8, "validation": 8}
    train, held = (list(prompts.read(tmp_path / "out", split)) for split in ("train", "validation"))
    assert not {row["id"] for row in train} & {row["id"] for row in held}
    assert [row["source"] for row in train[:4]] == ["gsm8k", "chat", "gsm8k", "chat"]
    again = HeldOut("mine", benchmarks, str(tmp_path), held_out=4, limit=3)
    assert [c["id"] for split, c in again.conversations() if split == "validation"] == [row["id"] for row in held]
    fewer = HeldOut("mine", benchmarks, str(tmp_path), held_out=4, limit=20, limits={"chat": 2}).conversations()
    assert Counter(c["source"] for split, c in fewer if split == "train") == {"gsm8k": 20, "chat": 2}
    suite = Benchmarks("paper", [Benchmark("gsm8k", "math")], prompts=tmp_path / "out" / "validation.jsonl").load()
    assert {(p.benchmark, p.domain) for p in suite} == {("gsm8k", "math"), ("chat", "chat")}
    assert [p.turns for p in suite if p.benchmark == "chat"] == [
        tuple(m["content"] for m in row["messages"]) for row in held if row["source"] == "chat"
    ]
    with pytest.raises(ValueError, match=r"data.source.held_out=12: benchmark chat has 12 prompts"):
        list(HeldOut("mine", benchmarks, str(tmp_path), held_out=12).conversations())
    with pytest.raises(ValueError, match=r"data.source.limits has aime25, and the benchmarks here are gsm8k, chat"):
        HeldOut("mine", benchmarks, str(tmp_path), limits={"aime25": 5})
