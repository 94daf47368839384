"""The embedded corpus: conversations of three domains that need no download, split so that no benchmark text is trained
on.

    code   source of the running Python's standard library       split by the hash of the source file's name
    prose  its docstrings                                        split by the hash of the source file's name
    math   generated word problems with worked answers           split by the hash of a problem's story and numbers

Only the name is hashed, so a file keeps its split when the Python version changes. A prompt that
occurs in several splits (files contain copies of each other) stays in the training split only.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path

from specbench.data.prompts import embedded_arithmetic as arithmetic
from specbench.data.prompts import embedded_stdlib as stdlib
from specbench.data.prompts.turns import Conversation
from specbench.files.atomic import write_text

DOMAINS = ("code", "prose", "math")
SPLITS = ("train", "validation", "benchmark")
SHARES = {"train": 0.80, "validation": 0.08, "benchmark": 0.12}
MATH_POOL = {"train": 20_000, "validation": 1_000, "benchmark": 1_000}


def split_of(name: str) -> str:
    """The split of `name` (relative name of a file, or key of a problem), by its SHA-256."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        if draw < share:
            return split
        draw -= share
    return SPLITS[-1]


def conversations(domain: str, split: str, count: int | None = None, seed: int = 0) -> Iterator[Conversation]:
    """Conversations {"id", "messages", "source", "domain"} of one domain and split, in an order drawn from `seed`.

    `count` None gives all conversations. The same arguments give the same conversations on machines with the same
    Python version; mathematics is the same on all. ValueError for a domain, split or count that does not exist.
    """
    for word, value, known in (("domain", domain, DOMAINS), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"{word}={value!r} does not exist: choose one of {', '.join(known)}")
    size = MATH_POOL[split] if domain == "math" else len(_library_pool(domain)[split])
    if count is not None and not 0 <= count <= size:
        raise ValueError(f"count={count}: {split} of {domain} holds {size} conversations, ask for at most that")
    pool = _arithmetic_pool(split, seed) if domain == "math" else _shuffled(_library_pool(domain)[split], seed)
    yield from islice(pool, size if count is None else count)


def census() -> dict[str, dict[str, int]]:
    """Number of conversations by split and domain, and what was left out of the standard library, for reports."""
    counts = {d: {s: len(_library_pool(d)[s]) for s in SPLITS} for d in ("code", "prose")}
    repeated = {d: _library_pool(d)["repeated"] for d in ("code", "prose")}
    left_out = stdlib.parsed_modules()[1] | {f"{d} prompts repeated elsewhere": n for d, n in repeated.items()}
    return {**counts, "math": dict(MATH_POOL), "left out": left_out}


def _messages(turns: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]


def _shuffled(pool: Sequence[Conversation], seed: int) -> Iterator[Conversation]:
    order = list(range(len(pool)))
    random.Random(seed).shuffle(order)
    return (pool[i] for i in order)


@lru_cache(maxsize=2)
def _library_pool(domain: str) -> dict:
    """{split: conversations, "repeated": count}, kept in the user's cache folder: parsing a library takes seconds."""
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specbench"
    file = cache / f"{domain}-{stdlib.fingerprint()}-{own}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pool = _made_pool(domain)
    # If the home folder cannot be written to, the library is parsed again next time.
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(pool))
    return pool


def _made_pool(domain: str) -> dict:
    """Training prompts are collected first; the other splits do not repeat them."""
    tasks = list({"code": stdlib.code_tasks, "prose": stdlib.prose_tasks}[domain]())
    seen: set[str] = set()
    names: Counter[str] = Counter()
    pool: dict = {"repeated": 0}
    for split in SPLITS:
        kept = []
        for task in tasks:
            if split_of(task.source) != split:
                continue
            if task.turns[0] in seen:
                pool["repeated"] += 1
                continue
            seen.add(task.turns[0])
            name = f"{domain}/{task.kind}/{task.source}:{task.name}"
            names[name] += 1
            kept.append({
                "id": name if names[name] == 1 else f"{name}#{names[name]}",
                "messages": _messages(task.turns),
                "source": task.source,
                "domain": domain,
            })  # fmt: skip
        pool[split] = kept
    return pool


def _arithmetic_pool(split: str, seed: int) -> Iterator[Conversation]:
    seen: set[str] = set()
    for problem in arithmetic.problems(f"{split}/{seed}"):
        if problem.key in seen or split_of(f"math/{problem.key}") != split:
            continue
        seen.add(problem.key)
        turns: tuple[str, ...] = (problem.question, problem.solution)
        if problem.answer % 11 == 0:
            twice = (
                f"Twice as much is {problem.answer} * 2 = {problem.answer * 2}.\nThe answer is {problem.answer * 2}."
            )
            turns += ("And what is twice as much?", twice)
        yield {
            "id": f"math/{problem.key}",
            "messages": _messages(turns),
            "source": f"arithmetic/{problem.story}",
            "domain": "math",
        }
