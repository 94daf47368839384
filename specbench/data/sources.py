"""Where conversations come from: a hub dataset, local files, the embedded corpus; all in one shape.

A source yields (split | None, conversation). Rows of other people's data go through a small mapping: which column
holds the conversation, what its roles are called. A row that does not fit is dropped with a cause, and counted.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow.parquet

from specbench.data import hub, jsonl
from specbench.data.corpus import DOMAINS
from specbench.data.corpus import conversations as embedded_conversations
from specbench.data.overlap import text_hash
from specbench.ranges import Count, Natural, Seed

Conversation = dict[str, Any]
ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bard": "assistant", "bing": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip


@runtime_checkable
class Source(Protocol):
    """Anything that yields conversations; `dropped` counts causes once it has been read."""

    name: str
    dropped: Counter[str]

    def conversations(self) -> Iterator[tuple[str | None, Conversation]]: ...


class _Unfit(ValueError):
    """A row that cannot become a conversation; the message is the cause that is counted."""


@dataclass(frozen=True)
class Columns:
    """How a row of somebody's data becomes a conversation.

    messages: column with a list of turns, each with `role` and `content` keys; or
    prompt: column with the text of one user turn, or a list of user turns to be answered one after the other.
    system, id, source: optional columns.
    """

    messages: str | None = "messages"
    role: str = "role"
    content: str = "content"
    prompt: str | None = None
    system: str | None = None
    id: str | None = None
    source: str | None = None

    def conversation(self, row: Mapping[str, Any], name: str, counts: Counter[str]) -> Conversation:
        """The row in our shape. Answers before the first question are cut and counted in `counts`."""
        messages = list(self._turns(row))
        if self.system and row.get(self.system):
            messages.insert(0, {"role": "system", "content": str(row[self.system])})
        head = [m for m in messages[:1] if m["role"] == "system"]
        rest = messages[len(head) :]
        if rest and rest[0]["role"] == "assistant":
            counts["answers before the first question (cut)"] += 1
            rest = rest[1:]
        if not rest:
            raise _Unfit("no question")
        answered = any(m["role"] == "assistant" for m in rest)
        if any(m["role"] != ("assistant" if answered and i % 2 else "user") for i, m in enumerate(rest)):
            raise _Unfit("roles do not alternate")
        messages = [*head, *rest]
        key = self.id and row.get(self.id)
        source = str(row[self.source]) if self.source and row.get(self.source) else name
        return {"id": str(key) if key else f"{name}-{digest(messages)}", "messages": messages, "source": source}

    def _turns(self, row: Mapping[str, Any]) -> Iterator[dict[str, str]]:
        if self.prompt is not None:
            value = row.get(self.prompt)
            pairs: list[tuple[Any, Any]] = [("user", turn) for turn in (value if isinstance(value, list) else [value])]
        else:
            value = row.get(self.messages or "")
            if (
                not isinstance(value, Sequence)
                or isinstance(value, str)
                or not all(isinstance(m, Mapping) for m in value)
            ):
                raise _Unfit(f"column {self.messages!r} is not a list of turns")
            pairs = [(m.get(self.role), m.get(self.content)) for m in value]
        for role, content in pairs:
            known = ROLES.get(str(role).lower())
            if known is None:
                raise _Unfit(f"role {role!r}")
            if not isinstance(content, str) or not content.strip():
                raise _Unfit("a turn without text")
            if any("\ud800" <= letter <= "\udfff" for letter in content):
                raise _Unfit("text that is not Unicode (a lone surrogate)")
            yield {"role": known, "content": content}


def questions(messages: Sequence[Mapping[str, str]]) -> list[str]:
    """The texts that the target will be given: every turn but the answers."""
    return [m["content"] for m in messages if m["role"] != "assistant"]


def digest(messages: Sequence[Mapping[str, str]]) -> str:
    """16 hex digits of what is asked: the identity of a conversation whatever its answers."""
    return f"{text_hash(chr(30).join(questions(messages))):016x}"


@dataclass
class Hub:
    """A dataset of the Hugging Face hub, streamed."""

    name: str
    dataset: str
    columns: Columns
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    limit: Count | None = None
    dropped: Counter[str] = field(default_factory=Counter)

    def conversations(self) -> Iterator[tuple[str | None, Conversation]]:
        """Rows in the dataset's own order."""
        remedy = "connect to the hub, or download it and use data=jsonl data.source.paths=[FILE,...]"
        rows = hub.load(
            self.dataset, self.subset, split=self.split, revision=self.revision, streaming=True, remedy=remedy
        )
        yield from _through(self, rows, self.columns)


@dataclass
class Files:
    """Local JSONL or parquet files (paths or glob patterns), read a row at a time."""

    name: str
    paths: list[str]
    columns: Columns
    limit: Count | None = None
    dropped: Counter[str] = field(default_factory=Counter)

    def conversations(self) -> Iterator[tuple[str | None, Conversation]]:
        """Rows in the order of the files. A line that is not JSON is an error that names it."""
        yield from _through(self, self._rows(), self.columns)

    def files(self) -> list[Path]:
        """The files that the patterns match; a pattern that matches none is an error."""
        if not self.paths:
            raise ValueError("data.source.paths=[] names no file: give data.source.paths=[FILE,...]")
        found: list[Path] = []
        for pattern in self.paths:
            matches = sorted(glob.glob(str(Path(pattern).expanduser())))
            if not matches:
                raise ValueError(f"data.source.paths holds {pattern!r}, which matches no file: give the file's path")
            found.extend(Path(match) for match in matches)
        return found

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        for path in self.files():
            if path.suffix == ".parquet":
                for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
                    yield from batch.to_pylist()
            elif path.suffix in (".jsonl", ".json"):
                yield from (row for _, row in jsonl.read(path))
            else:
                raise ValueError(f"{path}: prompts are read from .jsonl and .parquet files; convert it to one of them")


@dataclass
class Embedded:
    """The corpus that every machine has; it brings its own split, by source file."""

    name: str = "embedded"
    domains: list[str] = field(default_factory=lambda: list(DOMAINS))
    counts: dict[str, Natural | None] = field(default_factory=lambda: {"train": None, "validation": None})
    seed: Seed = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def conversations(self) -> Iterator[tuple[str | None, Conversation]]:
        """`counts[split]` conversations of every domain (None: all of them), domains taking turns."""
        for split, count in self.counts.items():
            streams = [embedded_conversations(d, split, count, self.seed) for d in self.domains]
            while streams:
                alive = []
                for stream in streams:
                    row = next(stream, None)
                    if row is not None:
                        yield split, dict(row)
                        alive.append(stream)
                streams = alive


def _through(
    source: Hub | Files, rows: Iterator[Mapping[str, Any]], columns: Columns
) -> Iterator[tuple[str | None, Conversation]]:
    for number, row in enumerate(rows):
        if source.limit is not None and number >= source.limit:
            return
        try:
            yield None, columns.conversation(row, source.name, source.dropped)
        except _Unfit as cause:
            source.dropped[str(cause)] += 1
