"""Conversation -> token ids and loss mask, from the tokenizer's own chat template and nothing else.

Supervised are the tokens that the target generates: an answer and the stop token that ends it. The position of an
answer is found in one of two ways, in this order:

    generation spans    the template marks answers itself ({% generation %}): its marks are used
    prefix tokenisation the prompt of a turn, rendered and tokenised alone, must be a prefix of the whole conversation

Some templates change earlier turns (Qwen3 drops the thinking of earlier turns), so the prompt of an earlier turn is not
a prefix. Such a turn is found by rendering the conversation with a marker in its place; it is supervised if the
template kept its words, and counted in `unsupervised` if not. The last answer must have the prefix property: decoding
then continues from the text that was trained on.

Exact tokens of the last answer do not need this property: they follow exactly the prompt from which they were decoded,
even if the template would change their text (that of DeepSeek-R1 drops the thinking of every answer, also the last).

Axis: T tokens of the conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.text import Text

from specbench.data.answers.templates import (
    ChatError,
    Message,
    options,
    render_text,
    special_tokens,
    stop_length,
    template_of,
    tokenise,
)

MARKER = "\u2983answer\u2984"  # rare brackets that no template changes


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens. `truncated`: cut at max_length. `unsupervised`: answers the template rewrote."""

    id: str
    tokens: list[int]  # (T)
    loss_mask: list[bool]  # (T)
    source: str = ""
    truncated: bool = False
    unsupervised: int = 0


@dataclass(frozen=True)
class _Turn:
    """Characters [start, end) of one answer in the rendered conversation."""

    start: int
    end: int
    verbatim: bool


def prompt_ids(
    tokenizer: Any,
    messages: Sequence[Message],
    thinking: bool | None = None,
    answer_tokens: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """Token ids from which the next answer is generated.

    `answer_tokens` are the exact ids of the answers in `messages`; they replace the re-tokenised text if the template
    keeps the words of an answer.
    """
    if not messages or messages[-1]["role"] == "assistant":
        raise ChatError("a prompt must end in a user turn; this conversation is empty or ends in an answer")
    text = render_text(tokenizer, messages, thinking, prompt=True)
    if not answer_tokens:
        return tokenise(tokenizer, text)
    return _splice(tokenizer, text, _turns(tokenizer, messages, thinking, text, prompt=True), answer_tokens, {})[0]


def encode(
    tokenizer: Any,
    messages: Sequence[Message],
    max_length: int | None = None,
    thinking: bool | None = None,
    answer_tokens: Sequence[Sequence[int]] | None = None,
    *,
    cut: Sequence[bool] | None = None,
    id: str = "",
    source: str = "",
) -> Encoded:
    """Tokens and loss mask of one conversation.

    thinking: passed to the template as `enable_thinking`; None leaves it out.
    answer_tokens: the exact ids of every answer as the target returned them, with or without the stop token; they are
        used instead of a re-tokenisation of the text.
    cut: for every answer, whether it reached the limit of new tokens: then its stop token is not supervised, and a
        conversation that ends in such an answer ends there.
    Errors: ChatError if the template does not have the prefix property, or if nothing or everything is supervised.
    """
    answers = sum(m["role"] == "assistant" for m in messages)
    for name, given in (("answer_tokens", answer_tokens), ("cut", cut)):
        if given is not None and len(given) != answers:
            raise ChatError(f"{name} has {len(given)} entries for the {answers} answers of conversation {id!r}")
    if not answers:
        raise ChatError(f"conversation {id!r} holds no answer: nothing of it can be supervised")
    limits = dict(enumerate(cut or []))
    dropped = 0
    if answer_tokens is None and "endgeneration" in template_of(tokenizer):
        tokens, mask = _generation_spans(tokenizer, messages, thinking, limits)
    elif answer_tokens is not None and [m["role"] == "assistant" for m in messages[-2:]] == [False, True]:
        tokens, mask, dropped = _continued(tokenizer, messages, thinking, answer_tokens, limits)
    else:
        text = render_text(tokenizer, messages, thinking)
        turns = _turns(tokenizer, messages, thinking, text)
        dropped = sum(not turn.verbatim for turn in turns)
        if answer_tokens is None:
            tokens, mask = _by_offsets(tokenizer, text, turns, limits)
        else:
            tokens, mask = _splice(tokenizer, text, turns, answer_tokens, limits)
    if limits.get(answers - 1) and messages[-1]["role"] == "assistant":
        end = max((i for i, supervised in enumerate(mask) if supervised), default=-1) + 1
        tokens, mask = tokens[:end], mask[:end]
    truncated = max_length is not None and len(tokens) > max_length
    if truncated:
        tokens, mask = tokens[:max_length], mask[:max_length]
    if not any(mask):
        why = f"its first answer begins after max_length={max_length}" if truncated else "the template kept no answer"
        raise ChatError(f"nothing is supervised in conversation {id!r}: {why}")
    if all(mask):
        raise ChatError(f"everything is supervised in conversation {id!r}: the template leaves no prompt before it")
    return Encoded(id, tokens, mask, source, truncated, dropped)


def closing_tokens(tokenizer: Any, thinking: bool | None, stop: int) -> list[int]:
    """What the template writes after an answer that ended with the stop token `stop`; nothing if it cannot tell."""
    asked, answer = [{"role": "user", "content": "a"}], [*tokenise(tokenizer, "b"), stop]
    try:
        prompt = prompt_ids(tokenizer, asked, thinking)
        whole = encode(tokenizer, [*asked, {"role": "assistant", "content": "b"}], None, thinking, [answer]).tokens
    except ChatError:
        return []
    return whole[len(prompt) + len(answer) :]


def render(tokenizer: Any, encoded: Encoded) -> Text:
    """The conversation as text for a terminal: supervised tokens in colour, the rest dimmed."""
    text = Text()
    start = 0
    for supervised, run in groupby(encoded.loss_mask):
        end = start + len(list(run))
        piece = tokenizer.decode(encoded.tokens[start:end], skip_special_tokens=False)
        text.append(piece, style="bold green" if supervised else "dim")
        start = end
    return text


def _turns(
    tokenizer: Any, messages: Sequence[Message], thinking: bool | None, text: str, prompt: bool = False
) -> list[_Turn]:
    """Position of every answer in the rendered `text`; each start is checked with the prompt of its turn."""
    turns = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        marked = [*messages[:i], {**message, "content": MARKER}, *messages[i + 1 :]]
        before, found, after = render_text(tokenizer, marked, thinking, prompt).partition(MARKER)
        asked = render_text(tokenizer, messages[:i], thinking, prompt=True) if i else ""
        last = i == len(messages) - 1
        if last and not text.startswith(asked):
            raise ChatError(
                "the chat template breaks the prefix property: the prompt of the last answer is not a prefix of the "
                f"whole conversation (thinking={thinking}); set thinking the other way or use another template"
            )
        start = len(asked) if text.startswith(asked) else len(before)
        end = len(text) - len(after)
        whole = text.startswith((asked, before))
        if not found or MARKER in after or not whole or not text.endswith(after) or start > end:
            raise ChatError(f"the chat template does not write answer {len(turns) + 1} once and as a whole")
        if last and not _holds(text[start:end], message["content"]):
            raise ChatError(
                "the chat template drops a part of the last answer (its thinking, most likely), so its text is not "
                "what the target wrote: collect answers with exact answer_tokens (in this process, or from a server "
                "that returns token ids)"
            )
        turns.append(_Turn(start, end, last or text[start:end].strip() == message["content"].strip()))
    return turns


def _holds(text: str, words: str) -> bool:
    """Whether `text` contains `words`, with any white space around and between them."""
    return "".join(words.split()) in "".join(text.split())


def _continued(
    tokenizer: Any,
    messages: Sequence[Message],
    thinking: bool | None,
    answer_tokens: Sequence[Sequence[int]],
    cut: Mapping[int, bool],
) -> tuple[list[int], list[bool], int]:
    """The prompt of the last answer as it was decoded from, that answer's exact tokens, and what ends it.

    The third result counts the earlier answers that the template rewrote.
    """
    *history, _ = messages
    text = render_text(tokenizer, history, thinking, prompt=True) if history else ""
    turns = _turns(tokenizer, history, thinking, text, prompt=True)
    marked = render_text(tokenizer, [*history, {**messages[-1], "content": MARKER}], thinking)
    _, found, after = marked.partition(MARKER)
    if not found or MARKER in after:
        raise ChatError(f"the chat template does not write answer {len(answer_tokens)} once and as a whole")
    turns.append(_Turn(len(text), len(text), True))
    tokens, mask = _splice(tokenizer, text + after, turns, answer_tokens, cut)
    return tokens, mask, sum(not turn.verbatim for turn in turns)


def _by_offsets(
    tokenizer: Any, text: str, turns: Sequence[_Turn], cut: Mapping[int, bool]
) -> tuple[list[int], list[bool]]:
    """Tokenise the whole conversation and mark the tokens of every answer and its stop token."""
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = list(coded["input_ids"]), coded["offset_mapping"]
    mask = [False] * len(tokens)
    for number, turn in enumerate(turns):
        if not turn.verbatim:
            continue
        first = next((i for i, (low, _) in enumerate(offsets) if low >= turn.start), len(tokens))
        behind = next((i for i, (low, _) in enumerate(offsets) if low >= turn.end), len(tokens))
        merged = any(low < turn.end < high for low, high in offsets)
        if merged or tokens[:first] != tokenise(tokenizer, text[: turn.start]):
            raise ChatError(
                f"the tokens of answer {number + 1} merge with the template's around it, so no prompt is a prefix of "
                f"them ({text[max(turn.start - 8, 0) : turn.start + 8]!r}): pass the exact answer_tokens"
            )
        if not cut.get(number):
            behind += stop_length(tokenizer, tokens[behind:])
        mask[first:behind] = [True] * (behind - first)
    return tokens, mask


def _splice(
    tokenizer: Any,
    text: str,
    turns: Sequence[_Turn],
    answer_tokens: Sequence[Sequence[int]],
    cut: Mapping[int, bool],
) -> tuple[list[int], list[bool]]:
    """The template's text tokenised between the answers, the exact tokens in them."""
    tokens: list[int] = []
    mask: list[bool] = []
    cursor, previous = 0, None

    def gap(end: int) -> None:
        piece = tokenise(tokenizer, text[cursor:end])
        supervised = [False] * len(piece)
        if previous is not None and not cut.get(previous):
            length = stop_length(tokenizer, piece)
            if answer_tokens[previous] and tokens[-1] in special_tokens(tokenizer):  # the target gave its stop token
                piece, supervised = piece[length:], supervised[length:]
            else:
                supervised[:length] = [True] * length
        tokens.extend(piece)
        mask.extend(supervised)

    for number, (turn, answer) in enumerate(zip(turns, answer_tokens, strict=True)):
        if turn.verbatim:
            gap(turn.start)
            tokens.extend(answer)
            mask.extend([True] * len(answer))
            cursor, previous = turn.end, number
    gap(len(text))
    return tokens, mask


def _generation_spans(
    tokenizer: Any, messages: Sequence[Message], thinking: bool | None, cut: Mapping[int, bool]
) -> tuple[list[int], list[bool]]:
    """The marks of the template, with the stop token added if it is written after the mark."""
    coded = tokenizer.apply_chat_template(
        [dict(m) for m in messages],
        return_dict=True,
        return_assistant_tokens_mask=True,
        **options(tokenizer, thinking),
    )
    tokens, marks = list(coded["input_ids"]), [bool(m) for m in coded["assistant_masks"]]
    mask, start, number = list(marks), 0, 0
    for supervised, run in groupby(marks):
        end = start + len(list(run))
        if supervised:
            closed = tokens[end - 1] in special_tokens(tokenizer)
            if cut.get(number) and closed:
                mask[end - 1] = False
            elif not cut.get(number) and not closed:
                length = stop_length(tokenizer, tokens[end:])
                mask[end : end + length] = [True] * length
            number += 1
        start = end
    return tokens, mask
