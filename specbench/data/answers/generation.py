"""The target answers every prompt: multi-turn, resumable by id, each answer written once.

answers.jsonl   {"id", "messages", "source", "domain"?, "answer_tokens": [[..], ..] | null, "truncated": [..]}
failed.jsonl    {"id", "turn", "cause"} of prompts that could not be answered; tried again on the next run
header.json     the settings with which the answers were generated (AnswerPolicy); other settings are refused
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specbench.data.answers.chat import Encoded, encode
from specbench.data.answers.engines import AnswerPolicy, Engine
from specbench.data.answers.templates import ChatError
from specbench.data.prompts.turns import Conversation
from specbench.files import json_lines as jsonl
from specbench.files.atomic import changes, plain, read_json, write_json, write_text
from specbench.files.redaction import redact, redacted
from specbench.ranges import LARGEST_TOKEN

log = logging.getLogger("specbench")

SCHEMA = "specbench.answers/1"


def collect(
    prompts: Iterable[Conversation],
    engine: Engine,
    folder: Path | str,
    policy: AnswerPolicy,
    *,
    progress: Callable[[str], None] = lambda kind: None,
) -> dict[str, int]:
    """Answer every prompt that has no answer in `folder` yet; returns what was counted.

    progress: called with "kept" (answered before), "answer" or "failure" for every prompt.
    Errors: ValueError with the differences if the folder has answers with other settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_header(folder, policy)
    paths = {"answer": folder / "answers.jsonl", "failure": folder / "failed.jsonl"}
    counts = {"answered": 0, "kept": 0, "failed": 0}
    counts["repaired"] = sum(jsonl.repair(path) for path in paths.values())
    done = answered(folder)
    write_json(folder / "header.json", header(policy, engine.name))
    given: set[str] = set()

    def pending() -> Iterator[Conversation]:
        for conversation in prompts:
            id = conversation["id"]
            if id in given:
                raise ValueError(f"id {id!r} occurs twice among the prompts: make ids unique")
            given.add(id)
            if id in done:
                counts["kept"] += 1
                progress("kept")
            else:
                yield conversation

    with jsonl.Appender(paths["answer"]) as answers, jsonl.Appender(paths["failure"]) as failures:

        def emit(kind: str, row: dict[str, Any]) -> None:
            if kind == "failure":  # the message of a server can repeat the key that it received
                row = {**row, "cause": redact(row["cause"])}
            (answers if kind == "answer" else failures).append(row)
            counts["answered" if kind == "answer" else "failed"] += 1
            if kind == "answer":
                done.add(row["id"])
            progress(kind)

        engine.answer(pending(), policy, emit)
    _settle(paths["failure"], done)
    return counts | engine.counts


def header(policy: AnswerPolicy, engine: str) -> dict[str, Any]:
    """Content of header.json."""
    return {"schema": SCHEMA, "policy": redacted(plain(asdict(policy))), "engine": engine}


def check_header(folder: Path | str, policy: AnswerPolicy) -> None:
    """ValueError for a folder whose answers were generated with other settings."""
    path = Path(folder) / "header.json"
    there = read_json(path, None)
    if there is None:
        return
    if not isinstance(there, dict) or there.get("schema") != SCHEMA or not isinstance(there.get("policy"), dict):
        raise ValueError(f"{path} is not a header of answers ({SCHEMA}): start over with force=true")
    before, now = there["policy"], redacted(plain(asdict(policy)))
    if before.get("revision") == now["revision"] is not None:
        before = {**before, "model": now["model"]}  # the same weights from another place
    differing = changes(before, now)
    if differing:
        raise ValueError(
            f"{folder} holds answers with other settings ({'; '.join(differing)}): ask for the old settings, choose "
            "another root, or start over with force=true"
        )


def answered(folder: Path | str) -> set[str]:
    """Ids that have an answer; a broken or repeated line is an error that names it."""
    path = Path(folder) / "answers.jsonl"
    return {row["id"] for row in read(folder)} if path.is_file() else set()


def read(folder: Path | str, vocabulary: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of answers.jsonl (the file, or its folder) in file order.

    vocabulary: number of token ids of the target; None only checks that they are token ids. Errors: BrokenLine for an
    incomplete row, or one with token ids of another target.
    """
    path = answers_file(folder)
    for number, row in jsonl.conversations(path):
        try:
            _require_answers(row, vocabulary)
        except ValueError as error:
            raise jsonl.BrokenLine(path, number, str(error)) from None
        yield row


def _require_answers(row: dict[str, Any], vocabulary: int | None) -> None:
    """Add optional fields that are missing; ValueError if tokens or `truncated` do not match the answers of the row."""
    answers = sum(message["role"] == "assistant" for message in row["messages"])
    if row.get("truncated") is None:
        row["truncated"] = [False] * answers
    for key, given in (("answer_tokens", row.setdefault("answer_tokens", None)), ("truncated", row["truncated"])):
        if given is not None and (not isinstance(given, list) or len(given) != answers):
            found = f"{len(given)} entries" if isinstance(given, list) else f"a {type(given).__name__}"
            raise ValueError(f"`{key}` holds {found} for {answers} answers")
    if not set(map(type, row["truncated"])) <= {bool}:
        raise ValueError("`truncated` holds something else than true and false")
    for count, tokens in enumerate(row["answer_tokens"] or (), start=1):
        if not isinstance(tokens, list) or not tokens:
            raise ValueError(f"`answer_tokens` of answer {count} is not a list with at least one token id")
        kinds = set(map(type, tokens))
        if kinds != {int}:
            other = ", ".join(sorted("null" if kind is type(None) else kind.__name__ for kind in kinds - {int}))
            raise ValueError(f"`answer_tokens` of answer {count} holds {other}, and token ids are whole numbers")
        if min(tokens) < 0:
            raise ValueError(f"`answer_tokens` of answer {count} holds {min(tokens)}, and token ids count from 0")
        if max(tokens) >= (vocabulary or LARGEST_TOKEN + 1):
            size = f"the target's {vocabulary}" if vocabulary else "any vocabulary's"
            raise ValueError(f"`answer_tokens` of answer {count} holds {_short(max(tokens))}, beyond {size} token ids")


def _short(number: int) -> str:
    return str(number) if number < 10**18 else "a number of more than 18 digits"


def encoded(row: Mapping[str, Any], tokenizer: Any, thinking: bool | None, max_length: int | None = None) -> Encoded:
    """A line of answers.jsonl as tokens and loss mask; ChatError if it cannot be encoded."""
    return encode(
        tokenizer,
        row["messages"],
        max_length,
        thinking,
        row["answer_tokens"],
        cut=row["truncated"],
        id=row["id"],
        source=row.get("source", ""),
    )


def answers_file(path: Path | str) -> Path:
    """The file of answers of a path: the path itself, or answers.jsonl in a folder."""
    path = Path(path)
    return path / "answers.jsonl" if path.is_dir() or path.suffix != ".jsonl" else path


def all_encoded(
    path: Path | str,
    tokenizer: Any,
    max_length: int | None,
    thinking: bool | None = None,
    vocabulary: int | None = None,
    left_out: Callable[[str], None] = log.warning,
) -> tuple[list[Encoded], dict[str, int]]:
    """Answers as tokens and loss masks, and how many of them were truncated and left out.

    `left_out` is called for every conversation that cannot be encoded, with the reason. vocabulary: rows of the
    target's embedding; a token id beyond it is an error that names the line. Errors: ValueError for a target without a
    tokenizer, and if no answer is left.
    """
    if tokenizer is None:
        raise ValueError("the target has no tokenizer, so its answers cannot be turned into tokens; set target.id")
    kept, dropped = [], 0
    for row in read(path, vocabulary):
        try:
            kept.append(encoded(row, tokenizer, thinking, max_length))
        except ChatError as error:
            dropped += 1
            left_out(f"conversation {row['id']} is left out: {error}")
    if not kept:
        raise ValueError(f"{path} holds no usable answer: run `specbench answers` first")
    return kept, {"truncated": sum(one.truncated for one in kept), "left_out": dropped}


def _settle(path: Path, done: set[str]) -> None:
    """Keep the last failure of every prompt that still has no answer."""
    last = {str(row["id"]): row for _, row in jsonl.read(path, "id") if str(row["id"]) not in done}
    write_text(path, "".join(jsonl.line(row) for row in last.values()))
