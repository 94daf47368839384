"""The corpus: splits that do not touch, the same conversations every time, arithmetic that is right."""

import re
from collections import Counter
from functools import cache
from itertools import islice

import pytest

from specbench.data.prompts import embedded_corpus as corpus
from specbench.data.prompts import embedded_stdlib as stdlib
from specbench.data.prompts.embedded_arithmetic import STORIES, problems
from specbench.data.prompts.embedded_corpus import DOMAINS, SHARES, SPLITS, census, conversations, split_of

# The answer of each story from the numbers of its question alone, written without the generator's steps.
ANSWERS = {
    "shopping": lambda a, p, b, q: a * p + b * q,
    "sharing": lambda a, b, n: (a + b) / n,
    "journey": lambda t, v, u, w: t * v + u * w,
    "change": lambda n, q, paid: paid - n * q,
    "boxes": lambda a, b, c, e: a * b - c + e,
    "savings": lambda a, n, b: a * n - b,
    "ages": lambda a, k, b, c: k * a - b + c,
    "discount": lambda p, r: p * (1 - r / 100),
    "fence": lambda a, b, c: 2 * (a + b) * c,
    "reading": lambda pages, a, days, b: (pages - a * days) / b,
    "comparing": lambda a, b, k: a + (a + b) + k * (a + b),
    "wages": lambda h, n, w, e: h * n * w - e,
}


# Enough of the generated pool; the library's pools are taken whole.
SOME = {"math": 3000}


@cache
def pool(domain: str, split: str, seed: int = 0) -> list[dict]:
    count = SOME.get(domain) if split == "train" else None
    return list(conversations(domain, split, count, seed))


def texts(conversation: dict) -> list[str]:
    return [m["content"] for m in conversation["messages"]]


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_source_file_problem_or_prompt_is_in_two_splits(domain):
    pools = {split: pool(domain, split) for split in SPLITS}
    for one, other in (("train", "validation"), ("train", "benchmark"), ("validation", "benchmark")):
        assert not {texts(c)[0] for c in pools[one]} & {texts(c)[0] for c in pools[other]}
        assert not {c["id"] for c in pools[one]} & {c["id"] for c in pools[other]}
        if domain != "math":
            assert not {c["source"] for c in pools[one]} & {c["source"] for c in pools[other]}
    # A problem under another seed stays on its side: the key decides, not the draw.
    if domain == "math":
        again = {c["id"] for c in pool(domain, "train", 4)}
        assert not again & {c["id"] for c in pools["benchmark"]}


@pytest.mark.parametrize("domain", DOMAINS)
def test_conversations_are_well_formed_and_unique(domain):
    chosen = pool(domain, "train")
    assert len({c["id"] for c in chosen}) == len(chosen) >= 3000
    turns = Counter()
    for c in chosen:
        assert set(c) == {"id", "messages", "source", "domain"} and c["domain"] == domain
        roles = [m["role"] for m in c["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and all(texts(c))
        turns[len(roles) // 2] += 1
    assert turns[1] > 5 * turns[2] > 0 and set(turns) == {1, 2}


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_same_seed_gives_the_same_conversations_and_another_seed_another_order(domain):
    first, again = (list(conversations(domain, "benchmark", 40, seed=5)) for _ in range(2))
    assert first == again
    assert first[:10] == list(conversations(domain, "benchmark", 10, seed=5))
    assert first != list(conversations(domain, "benchmark", 40, seed=6))


def test_a_file_keeps_its_split_on_every_machine_and_python_version():
    # Fixed values: the hash of the name decides, so these may never change.
    fixed = {"train": "json/decoder.py textwrap.py pprint.py heapq.py", "validation": "mailbox.py os.py struct.py"}
    fixed["benchmark"] = "email/header.py shutil.py functools.py gzip.py"
    assert {split: {split_of(name) for name in names.split()} for split, names in fixed.items()} == {
        split: {split} for split in SPLITS
    }
    # 4,000 names: the share of a split lies within four standard deviations (false alarm below 2e-4 for all three).
    counts = Counter(split_of(f"name-{i}") for i in range(4000))
    for split, share in SHARES.items():
        assert abs(counts[split] - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5


def test_worked_answers_are_right_by_two_independent_computations():
    seen = Counter()
    for problem in islice(problems(11), 1500):
        asked = [int(n) for n in re.findall(r"\d+", problem.question)]
        assert tuple(asked) == problem.numbers
        assert ANSWERS[problem.story](*asked) == pytest.approx(problem.answer) and problem.answer >= 0
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.solution)
        for left, sign, right, result in equations:
            exact = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}.get(sign)
            assert exact is None or exact(int(left), int(right)) == int(result)
            assert sign != "/" or int(result) * int(right) == int(left)
        assert len(equations) >= 2 and int(equations[-1][3]) == problem.answer
        assert problem.solution.endswith(f"he answer is {problem.answer}.")
        seen[problem.story] += 1
    assert set(seen) == set(STORIES) == set(ANSWERS)


def test_one_key_has_one_answer():
    answers = {}
    for problem in islice(problems("keys"), 5000):
        assert answers.setdefault(problem.key, problem.answer) == problem.answer


def test_second_questions_are_right():
    two_turns = [c for c in pool("math", "train") if len(c["messages"]) == 4]
    assert len(two_turns) > 50
    for c in two_turns:
        answer = int(re.search(r"answer is (\d+)\.$", texts(c)[1]).group(1))
        assert texts(c)[3].endswith(f"The answer is {2 * answer}.")


def test_code_answers_are_python_and_repeat_the_source():
    for task in islice((t for t in stdlib.code_tasks() if t.kind in ("complete", "class", "test")), 0, 4000, 9):
        code = task.turns[1].removeprefix("```python\n").removesuffix("\n```")
        compile(code, task.source, "exec", dont_inherit=True)
        if task.kind == "complete":
            shown = task.turns[0].split("```python\n")[1].removesuffix("\n```")
            assert code.startswith(shown) and len(code) > len(shown)


def test_renaming_changes_the_name_and_nothing_else():
    renamed = list(islice((t for t in stdlib.code_tasks() if t.kind == "rename"), 300))
    for task in renamed:
        old, new = re.match(r"Rename `(\w+)` to `(\w+)`", task.turns[0]).groups()
        before = task.turns[0].split("\n\n", 1)[1]
        assert re.sub(rf"\b{new}\b", old, task.turns[1]) == before and not re.search(rf"\b{old}\b", task.turns[1])
    assert len(renamed) == 300


def test_what_is_left_out_is_counted():
    counts = census()
    for domain in DOMAINS:
        assert counts[domain] == {
            s: len(pool(domain, s)) if domain != "math" or s != "train" else 20_000 for s in SPLITS
        }
    assert counts["left out"]["folders left out"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("poems", "train"), "domain='poems' does not exist: choose one of code, prose, math"),
        (("code", "test"), "split='test' does not exist: choose one of train, validation, benchmark"),
        (("math", "benchmark", 10**6), "count=1000000: benchmark of math holds 1000 conversations"),
    ],
)
def test_what_does_not_exist_is_refused(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        next(conversations(*arguments))


def test_the_kept_corpus_is_the_parsed_one_and_outlives_no_change(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    corpus._library_pool.cache_clear()
    made = corpus._library_pool("prose")
    (file,) = tmp_path.glob("specbench/prose-*.json")
    corpus._library_pool.cache_clear()
    assert corpus._library_pool("prose") == made and made == corpus._made_pool("prose")
    file.write_text('{"train": ')  # cut by a kill
    corpus._library_pool.cache_clear()
    assert corpus._library_pool("prose") == made
    monkeypatch.setattr(stdlib, "fingerprint", lambda: "another library")
    monkeypatch.setattr(stdlib, "prose_tasks", lambda: iter([stdlib.Task("a.py", "a", "module", ("What?", "This."))]))
    corpus._library_pool.cache_clear()
    assert sum(len(corpus._library_pool("prose")[split]) for split in corpus.SPLITS) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # nothing can be kept there
    corpus._library_pool.cache_clear()
    assert sum(len(corpus._library_pool("prose")[split]) for split in corpus.SPLITS) == 1
    monkeypatch.undo()
    corpus._library_pool.cache_clear()
