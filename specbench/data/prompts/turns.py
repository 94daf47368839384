"""Turns of a conversation in the layouts of common data sets.

A row has one of these layouts; if it has several, the first one is used:

    messages, conversations,   a list of turns, each with role or from, and content, value or text
    conversation, items
    turns                      a list of user turns (question files), or of turns with roles
    prompt, question           a user turn, a list of them or of turns with roles; and, where it is a text, its answer
                               under response, completion, answer or output
    instruction                Alpaca: with `input` below it, and `output` as its answer

A content can be a list of parts: text parts are joined by line ends (as in vLLM); any other part is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from specbench.files.atomic import is_unicode

ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bard": "assistant", "bing": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "model": "assistant", "ai": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
ROLE, CONTENT = ("role", "from"), ("content", "value", "text")
LISTS, TEXTS = ("messages", "conversations", "conversation", "items", "turns"), ("prompt", "question")
ANSWERS = ("response", "completion", "answer", "output")
SYSTEM = ("system", "system_prompt")
TEXT_PARTS = (None, "text", "input_text", "output_text")
# The placeholder in SPEED-Bench's public files for sources that cannot be redistributed.
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"

Conversation = dict[str, Any]  # id, messages ({role, content} each), source and whatever else its line holds
Turn = dict[str, str]


class Unfit(ValueError):
    """A row that cannot become a conversation; the message is the reason that is counted."""


def kind(value: Any) -> str:
    """A value for messages: a short text itself, for anything else its type."""
    if value is None:
        return "null"
    return ascii(value[:40]) if isinstance(value, str) else f"of type {type(value).__name__}"


def text_of(content: Any) -> str:
    """The text of a turn, from a text or a list of parts; Unfit where there is none or more than text."""
    if isinstance(content, list):
        content = "\n".join(map(_part, content))
    if not isinstance(content, str) or not content.strip():
        raise Unfit("a turn without text")
    if not is_unicode(content):
        raise Unfit("text that is not Unicode (a lone surrogate)")
    if content.strip() == PLACEHOLDER:
        raise Unfit("a placeholder of SPEED-Bench instead of its text: complete the file with its own prepare script")
    return content


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise Unfit(f"a part {kind(part)} in a turn")
    if part.get("type") not in TEXT_PARTS:
        raise Unfit(f"a part {kind(part['type'])} in a turn: targets read text alone")
    if not isinstance(part.get("text"), str):
        raise Unfit("a text part without text")
    return part["text"]


def turn(role: Any, content: Any) -> Turn:
    """One turn with its role as user, assistant or system."""
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise Unfit(f"role {kind(role)}")
    return {"role": known, "content": text_of(content)}


def turns(value: Sequence[Any], role: str | None = None, content: str | None = None) -> Iterator[Turn]:
    """A list of turns; `role` and `content` name their keys (None: any of the known ones)."""
    for one in value:
        keys = role or next((key for key in ROLE if key in one), ROLE[0])
        texts = content or next((key for key in CONTENT if key in one), CONTENT[0])
        yield turn(one.get(keys), one.get(texts))


def is_turns(value: Any) -> bool:
    """Whether a value is a list of objects."""
    return isinstance(value, list) and all(isinstance(one, Mapping) for one in value)


def asked(value: Any) -> Iterator[Turn]:
    """User turns from a text, or from a list of texts to be answered one after the other."""
    for one in value if isinstance(value, list) else [value]:
        yield turn("user", one)


def find(row: Mapping[str, Any]) -> list[Turn]:
    """The turns of a row, in whichever layout it has; Unfit if it has none."""
    key = next((key for key in (*LISTS, *TEXTS, "instruction") if row.get(key)), None)
    if key is None:
        if any(row.get(name) is not None for name in (*LISTS, *TEXTS, "instruction")):
            raise Unfit("no question")
        raise Unfit(f"no column with turns (looked for {', '.join((*LISTS, *TEXTS))} and instruction)")
    value = row[key]
    if is_turns(value):
        found = list(turns(value))
    elif key in LISTS[:-1] or (key == LISTS[-1] and not isinstance(value, list)):
        raise Unfit(f"column {key!r} is not a list of turns")
    elif key == "instruction":
        given = f"\n\nInput:\n{text_of(row['input'])}" if row.get("input") else ""
        found = [turn("user", text_of(value) + given), *_answer(row)]
    else:
        found = [*asked(value), *(_answer(row) if isinstance(value, str) else ())]
    system = next((row[name] for name in SYSTEM if row.get(name)), None)
    if system is not None and found and found[0]["role"] != "system":
        found.insert(0, turn("system", system))
    return found


def _answer(row: Mapping[str, Any]) -> Iterator[Turn]:
    given = next((row[key] for key in ANSWERS if isinstance(row.get(key), str) and row[key].strip()), None)
    if given is not None:
        yield turn("assistant", given)
