"""Sources of conversations: a data set of the Hugging Face Hub, local files, the embedded corpus, benchmarks with a
held-out part; all in one format.

A source yields (split | None, conversation). Rows of other data sets are mapped: which column has the conversation,
and what its roles are called; what is not named is recognised from the layout (turns.py). A row that cannot be used
is dropped and counted by its reason; the first of them are recorded with file and line.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from specbench.data.prompts import foreign_layouts as foreign
from specbench.data.prompts import turns
from specbench.data.prompts.benchmarks import Benchmark, Benchmarks, Prompt
from specbench.data.prompts.deduplication import text_hash
from specbench.data.prompts.embedded_corpus import DOMAINS
from specbench.data.prompts.embedded_corpus import conversations as embedded_conversations
from specbench.data.prompts.turns import Conversation, Unfit
from specbench.files import hub_datasets as hub
from specbench.files.atomic import is_unicode
from specbench.files.json_lines import text_id
from specbench.ranges import Count, Natural, Seed

EXAMPLES = 20  # rows that did not fit, kept with their place


@runtime_checkable
class Source(Protocol):
    """Anything that yields conversations.

    dropped: counts by reason, after reading. unfit: place of the first dropped rows, with the reason. place: where the
        last yielded conversation comes from, for error messages.
    """

    name: str
    dropped: Counter[str]
    unfit: list[str]
    place: str

    def conversations(self) -> Iterator[tuple[str | None, Conversation]]: ...


@dataclass(frozen=True)
class Columns:
    """How a row of a data set becomes a conversation: names of its columns.

    messages: column with a list of turns, each with `role` and `content` keys (None: any of the known ones); or
    prompt: column with the text of one user turn, or a list of user turns to be answered one after the other.
        Neither: the row's layout is recognised.
    system, id, source, domain: optional columns. Without `id`, the id is a hash of the questions.
    """

    messages: str | None = None
    role: str | None = None
    content: str | None = None
    prompt: str | None = None
    system: str | None = None
    id: str | None = None
    source: str | None = None
    domain: str | None = None

    def conversation(self, row: Mapping[str, Any], name: str, counts: Counter[str]) -> Conversation:
        """The row as a conversation. Answers before the first question are removed and counted in `counts`."""
        messages = self._turns(row)
        if self.system and row.get(self.system):
            messages.insert(0, turns.turn("system", row[self.system]))
        head = [m for m in messages[:1] if m["role"] == "system"]
        rest = messages[len(head) :]
        if rest and rest[0]["role"] == "assistant":
            counts["answers before the first question (cut)"] += 1
            rest = rest[1:]
        if not rest:
            raise Unfit("no question")
        answered = any(m["role"] == "assistant" for m in rest)
        if any(m["role"] != ("assistant" if answered and i % 2 else "user") for i, m in enumerate(rest)):
            raise Unfit("roles do not alternate")
        messages = [*head, *rest]
        found = {"id": self._id(row) or f"{name}-{digest(messages)}", "messages": messages}
        found["source"] = self._label(row, self.source) or name
        domain = self._label(row, self.domain)
        return found | ({"domain": domain} if domain else {})

    def _turns(self, row: Mapping[str, Any]) -> list[turns.Turn]:
        if self.prompt is not None:
            return list(turns.asked(row.get(self.prompt)))
        if self.messages is None:
            return turns.find(row)
        value = row.get(self.messages)
        if not turns.is_turns(value):
            raise Unfit(f"column {self.messages!r} is not a list of turns")
        return list(turns.turns(value, self.role, self.content))

    def _id(self, row: Mapping[str, Any]) -> str | None:
        value = row.get(self.id) if self.id else None
        if value is None or value == "":
            return None
        try:
            return text_id(value)
        except ValueError as error:
            raise Unfit(f"column {self.id!r}: {error}") from None

    def _label(self, row: Mapping[str, Any], column: str | None) -> str | None:
        value = row.get(column) if column else None
        if value is None or value == "":
            return None
        if isinstance(value, (str, int, float)) and is_unicode(str(value)):
            return str(value)
        raise Unfit(f"column {column!r} is not text")


def questions(messages: Sequence[Mapping[str, str]]) -> list[str]:
    """The texts that the target receives: every turn except the answers."""
    return [m["content"] for m in messages if m["role"] != "assistant"]


def digest(messages: Sequence[Mapping[str, str]]) -> str:
    """Hash (16 hex digits) of the questions: identifies a conversation independently of its answers."""
    return f"{text_hash(chr(30).join(questions(messages))):016x}"


@dataclass
class _Read:
    """Counts and places that a source records while it is read."""

    dropped: Counter[str] = field(default_factory=Counter, kw_only=True)
    unfit: list[str] = field(default_factory=list, kw_only=True)
    place: str = field(default="", kw_only=True)

    def drop(self, cause: str) -> None:
        """Count a row that does not fit."""
        self.dropped[cause] += 1
        if len(self.unfit) < EXAMPLES:
            self.unfit.append(f"{self.place}: {cause}")


@dataclass
class Hub(_Read):
    """A data set of the Hugging Face Hub, streamed."""

    name: str
    dataset: str
    columns: Columns
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    limit: Count | None = None

    def conversations(self) -> Iterator[tuple[str | None, Conversation]]:
        """Rows in the dataset's own order."""
        remedy = "connect to the hub, or download it and use data=jsonl data.source.paths=[FILE,...]"
        rows = hub.load(
            self.dataset, self.subset, split=self.split, revision=self.revision, streaming=True, remedy=remedy
        )
        placed = ((f"{self.dataset}, row {number}", row) for number, row in enumerate(rows, start=1))
        yield from _through(self, placed, self.columns)


@dataclass
class Files(_Read):
    """Local files (paths or glob patterns) in the formats of foreign_layouts.py, read row by row."""

    name: str
    paths: list[str]
    columns: Columns
    limit: Count | None = None

    def conversations(self) -> Iterator[tuple[str | None, Conversation]]:
        """Rows in the order of the files. A line that cannot be read at all is an error that names it."""
        yield from _through(self, self._rows(), self.columns)

    def files(self) -> list[Path]:
        """The files that the patterns match; a pattern that matches none is an error."""
        if not self.paths:
            raise ValueError("data.source.paths=[] names no file: give data.source.paths=[FILE,...]")
        found: list[Path] = []
        for pattern in self.paths:
            path = Path(pattern).expanduser()
            matches = [path] if path.exists() else sorted(glob.glob(str(path)))
            if not matches:
                raise ValueError(f"data.source.paths holds {pattern!r}, which matches no file: give the file's path")
            found.extend(Path(match) for match in matches)
        return found

    def _rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for path in self.files():
            rows = foreign.rows(path)
            yield from ((rows.place(number), row) for number, row in rows)


@dataclass
class Embedded(_Read):
    """The embedded corpus, which needs no download; its split is by source file."""

    name: str = "embedded"
    domains: list[str] = field(default_factory=lambda: list(DOMAINS))
    counts: dict[str, Natural | None] = field(default_factory=lambda: {"train": None, "validation": None})
    seed: Seed = 0

    def conversations(self) -> Iterator[tuple[str | None, Conversation]]:
        """`counts[split]` conversations of every domain (None: all of them), domains taking turns."""
        for split, count in self.counts.items():
            streams = [embedded_conversations(d, split, count, self.seed) for d in self.domains]
            while streams:
                alive = []
                for stream in streams:
                    row = next(stream, None)
                    if row is not None:
                        self.place = f"the embedded corpus, {row['id']}"
                        yield split, dict(row)
                        alive.append(stream)
                streams = alive


@dataclass
class HeldOut(_Read):
    """Every prompt of some benchmarks: `held_out` of each, drawn once by `seed`, are for validation and the others for
    training. Prompts are read from `folder` (NAME.jsonl), or from the hub where it is None.

    limit: at most so many training prompts of each benchmark. limits: the same for single benchmarks by name, instead
    of `limit`. Benchmarks take turns, so the beginning of the training file holds all of them. Held-out prompts come
    first: a training prompt that nearly repeats one is dropped.
    """

    name: str
    benchmarks: Mapping[str, Benchmark]
    folder: str | None = None
    held_out: Count = 24
    limit: Count | None = None
    limits: dict[str, Count] | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.limits or {}) - set(self.benchmarks)):
            raise ValueError(
                f"data.source.limits has {', '.join(unknown)}, and the benchmarks here are {', '.join(self.benchmarks)}"
            )

    def conversations(self) -> Iterator[tuple[str | None, Conversation]]:
        """Questions without answers. A benchmark that would leave nothing to train on is an error that names it."""
        whole = {key: replace(benchmark, rows=None) for key, benchmark in self.benchmarks.items()}
        pools: dict[str, list[Prompt]] = {}
        for prompt in Benchmarks(self.name, whole, prompts=self.folder).load():
            pools.setdefault(prompt.benchmark, []).append(prompt)
        parts: dict[str, list[list[Prompt]]] = {"validation": [], "train": []}
        for name, pool in pools.items():
            if len(pool) <= self.held_out:
                raise ValueError(
                    f"data.source.held_out={self.held_out}: benchmark {name} has {len(pool)} prompts, so none would be "
                    "left to train on; lower it, or leave this benchmark out"
                )
            order = np.random.default_rng(self.seed).permutation(len(pool))
            chosen = [pool[place] for place in order]
            parts["validation"].append(chosen[: self.held_out])
            limit = (self.limits or {}).get(name, self.limit)
            parts["train"].append(chosen[self.held_out :][:limit])
        for split, each in parts.items():
            for turn in zip_longest(*each):
                for prompt in turn:
                    if prompt is not None:
                        self.place = f"benchmark {prompt.benchmark}, {prompt.id}"
                        yield split, self._conversation(prompt)

    def _conversation(self, prompt: Prompt) -> Conversation:
        if prompt.turns is None:
            raise ValueError(f"{self.place} is given as token ids, and answers need its text: give `turns`")
        messages = [{"role": "user", "content": text} for text in prompt.turns]
        about = {"source": prompt.benchmark, "benchmark": prompt.benchmark, "domain": prompt.domain}
        return {"id": prompt.id, "messages": messages, **about}


def _through(
    source: Hub | Files, rows: Iterator[tuple[str, Mapping[str, Any]]], columns: Columns
) -> Iterator[tuple[str | None, Conversation]]:
    for number, (place, row) in enumerate(rows):
        if source.limit is not None and number >= source.limit:
            return
        source.place = place
        try:
            yield None, columns.conversation(row, source.name, source.dropped)
        except Unfit as cause:
            source.drop(str(cause))
