"""What a tokenizer's chat template says: rendered text, its hash, its special tokens, the stop behind an answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError

Message = Mapping[str, str]


class ChatError(ValueError):
    """A conversation or a template that cannot give an honest loss mask; the builder of a cache counts these."""


def template_of(tokenizer: Any) -> str:
    """The chat template's text; a ValueError says what to do when the tokenizer has none."""
    try:
        return tokenizer.get_chat_template()
    except (ValueError, AttributeError) as error:
        name = getattr(tokenizer, "name_or_path", tokenizer)
        raise ChatError(f"tokenizer {name!r} has no chat template: choose an instruction-tuned target") from error


def template_hash(tokenizer: Any) -> str:
    """First 16 hex digits of the template's SHA-256: part of the provenance of answers and caches."""
    return hashlib.sha256(template_of(tokenizer).encode()).hexdigest()[:16]


def render_text(tokenizer: Any, messages: Sequence[Message], thinking: bool | None = None, prompt: bool = False) -> str:
    """The conversation as the template writes it; `prompt` adds the header of the next answer."""
    template_of(tokenizer)
    options = {} if thinking is None else {"enable_thinking": thinking}
    try:
        return tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=prompt, **options
        )
    except (TemplateError, TypeError, KeyError) as error:
        roles = ", ".join(str(m.get("role")) for m in messages)
        raise ChatError(f"the chat template refuses a conversation of roles {roles}: {error}") from error


def tokenise(tokenizer: Any, text: str) -> list[int]:
    """Token ids of rendered text; the template has already written every special token."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of every token that text can never spell."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def stop_length(tokenizer: Any, tokens: Sequence[int]) -> int:
    """How many of the tokens behind an answer belong to its stop: up to the first special token."""
    for length, token in enumerate(tokens, start=1):
        if token in special_tokens(tokenizer):
            return length
    raise ChatError("the chat template ends an answer with no special token, so a draft could never learn to stop")
