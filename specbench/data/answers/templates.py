"""The chat template of a tokenizer: rendered text, its hash, its special tokens, the stop token after an answer.

Some templates write today's date (Llama 3 and gpt-oss call `strftime_now`). The same conversation would then have
other tokens tomorrow, so every template gets the fixed date `DATE`, and every file with tokens records this date.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError

Message = Mapping[str, str]
DATE = "2024-07-26"  # the default of Llama 3.1's template
# What the code in a template may raise: it is data of others, run in jinja2's sandbox.
FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class ChatError(ValueError):
    """A conversation or a template without a correct loss mask; the builder of a cache counts these."""


def template_of(tokenizer: Any) -> str:
    """The text of the chat template; ValueError with a remedy if the tokenizer has none."""
    try:
        return tokenizer.get_chat_template()
    except (ValueError, AttributeError) as error:
        name = getattr(tokenizer, "name_or_path", tokenizer)
        raise ChatError(f"tokenizer {name!r} has no chat template: choose an instruction-tuned target") from error


def template_hash(tokenizer: Any) -> str:
    """First 16 hex digits of the template's SHA-256: part of the provenance of answers and caches."""
    return hashlib.sha256(template_of(tokenizer).encode()).hexdigest()[:16]


def date_of(tokenizer: Any) -> str | None:
    """The date with which a template that reads the clock is rendered (ISO 8601); None for other templates."""
    template = getattr(tokenizer, "chat_template", None)
    return DATE if template is not None and "strftime_now" in str(template) else None


def template_facts(tokenizer: Any) -> dict[str, str]:
    """Record of the template with which prompts were rendered: its hash, and its date if it reads the clock."""
    if getattr(tokenizer, "chat_template", None) is None:
        return {}
    date = date_of(tokenizer)
    return {"template": template_hash(tokenizer)} | ({} if date is None else {"template_date": date})


def server_options(template: str, thinking: bool | None) -> dict[str, Any]:
    """Variables for the template on a server, so that it renders the same text as here; empty for most.

    ValueError for a template that reads the clock and takes no `date_string`: the server would write another date.
    """
    options: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    if "strftime_now" not in template:
        return options
    if not re.search(r"\bdate_string\b", template):
        raise ValueError(
            f"the target's chat template writes today's date and takes no date_string, so a server's prompts would "
            f"change overnight: decode in this process (servers=[]), where it is {DATE}, or write a date into the "
            "template of a copy of the target (target.id=FOLDER) and serve that"
        )
    return options | {"date_string": datetime.fromisoformat(DATE).strftime(_date_form(template))}


def _date_form(template: str) -> str:
    """The format in which a template expects `date_string`."""
    form = re.search(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", template)
    return form.group(2) if form else "%d %b %Y"


def options(tokenizer: Any, thinking: bool | None) -> dict[str, Any]:
    """Variables of every template: thinking if it is set, and a fixed date."""
    given: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    # The library hands no functions to templates, so a macro ahead of the template hides the real clock.
    return given if date_of(tokenizer) is None else given | {"chat_template": _clock(DATE) + template_of(tokenizer)}


@lru_cache(maxsize=8)
def _clock(date: str) -> str:
    """A macro that is `strftime_now` at midnight of `date`. The line end behind it is the macro's own (trim_blocks)."""
    day = datetime.fromisoformat(date)
    forms = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcCdDeFgGhHIjmMnprRStTuUVwWxXyYzZf"]
    filled = "".join(f"|replace({form!r}, {day.strftime(form)!r})" for form in forms)
    body = f"{{{{- format|string|replace('%%', '\\0'){filled}|replace('\\0', '%') -}}}}"
    return f"{{%- macro strftime_now(format) -%}}{body}{{%- endmacro %}}\n"


def render_text(tokenizer: Any, messages: Sequence[Message], thinking: bool | None = None, prompt: bool = False) -> str:
    """The conversation rendered by the template; `prompt` adds the header of the next answer."""
    template_of(tokenizer)
    try:
        return tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            tokenize=False,
            add_generation_prompt=prompt,
            **options(tokenizer, thinking),
        )
    except FAULTS as error:
        roles = ", ".join(str(m.get("role")) for m in messages)
        said = " ".join(str(error).split())[:200]
        raise ChatError(f"the chat template refuses a conversation of roles {roles[:200]}: {said}") from error


def tokenise(tokenizer: Any, text: str) -> list[int]:
    """Token ids of rendered text; the template has already written every special token."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of the special tokens, which ordinary text cannot produce."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def stop_length(tokenizer: Any, tokens: Sequence[int]) -> int:
    """Number of tokens after an answer that belong to its stop: up to the first special token."""
    for length, token in enumerate(tokens, start=1):
        if token in special_tokens(tokenizer):
            return length
    raise ChatError("the chat template ends an answer with no special token, so a draft could never learn to stop")
