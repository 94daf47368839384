"""Redaction of keys and passwords in everything that is written or shown.

All records, reasons of failures and screen output pass through `redact` (text) or `redacted` (trees of settings). A key
is recognised by its place (`api_key=...`, `https://USER:PASSWORD@host`, an Authorization header), by its form
(`hf_...`, `sk-...`), or because it was registered with `learn`: then it is found wherever it occurs again, for example
in the error text of a server. The values of environment variables with the name of a key are always known. The
replacement of a key does not depend on it, so the identity of a run does not depend on a key.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

WITHHELD = "***"
# Shorter values are often ordinary words, so they are not searched for; they are redacted where their place shows them.
SHORTEST = 6
# Where the command line's keys wait while a command runs (specbench/cli/withholding.py).
VARIABLE = "SPECBENCH_WITHHELD_"
# What people write where a key is not needed.
PLACEHOLDERS = ("none", "null", "empty", "dummy", "~", "???", "true", "false", "")

_VALUE = r"(?P<key>\$\\?\{[^{}]*\}|[^\s\"'&;,\]})]+)"
_OWNER = (
    r"(?:api|auth|access|refresh|session|security|bearer|id|hf|hub|wandb|github|gitlab|private|service|client|csrf)"
)
# Names of keys whatever stands before the last part; `token` alone and other tokens (mask_token_id) are not among them.
_NAMES = (
    r"(?:[\w-]*(?:api[_-]?key|apikey|access[_-]?key(?:[_-]?id)?|secret(?:[_-]?(?:access[_-]?)?key)?|private[_-]?key"
    r"|password|passwd|passphrase|credentials?)"
    rf"|(?:[\w-]*[_-])?{_OWNER}[_-]?token)"
)
_SECRET_NAME = re.compile(rf"^(?:{_NAMES}|token|pwd|jwt|bearer|cookie|(?:proxy-)?authorization)$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)$", re.IGNORECASE)
# A reference to the environment, also as Hydra's grammar escapes it.
_REFERENCE = re.compile(r"\$\\?\{oc\.env\\?:(\w+)(?:,[^{}]*)?\}")

_PLACES = (
    # scheme://user:password@host
    re.compile(r"\b[a-zA-Z][a-zA-Z0-9+.-]*://(?P<key>[^\s/?#\"'<>]+)@"),
    # scheme://host/path?sig=...
    re.compile(
        r"[?&;](?:[\w.-]*(?:token|key|secret|passw(?:or)?d|pwd|sig|signature|credential|auth|session|jwt)[\w.-]*)"
        r"=(?P<key>\$\\?\{[^{}]*\}|[^\s&;#\"'<>\])}]+)",
        re.IGNORECASE,
    ),
    # Authorization: Bearer ...
    re.compile(
        r"\b(?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|token|digest)\s+)?(?P<key>[^\s\"',}]+)",
        re.IGNORECASE,
    ),
    re.compile(r"\bbearer\s+(?P<key>[\w.~+/=-]{6,})", re.IGNORECASE),
    re.compile(r"\bbasic\s+(?P<key>(?=[A-Za-z0-9+/]*[0-9=])[A-Za-z0-9+/]{8,}={0,2})", re.IGNORECASE),
    # api_key=..., "api_key": "...", and a server's `API key provided: ...`
    re.compile(rf"(?<![\w-]){_NAMES}[\"']?\s*[=:]\s*[\"']?{_VALUE}", re.IGNORECASE),
    re.compile(rf"(?<![\w-])(?:token|pwd|jwt)=[\"']?{_VALUE}", re.IGNORECASE),
    re.compile(r"[\"'](?:token|pwd|jwt|cookie)[\"']\s*:\s*[\"'](?P<key>[^\s\"']+)", re.IGNORECASE),
    re.compile(r"\bapi[ -]key\b[^\n:=]{0,20}[:=]\s*[\"']?(?P<key>[^\s\"',;\]})]+)", re.IGNORECASE),
)
_FORMS = re.compile(
    r"(?P<key>\b(?:(?:hf|api_org)_(?=[A-Za-z]*[A-Z0-9])[A-Za-z0-9]{8,}|sk-(?=[\w-]*[A-Z0-9])[\w-]{8,}"
    r"|gh[pousr]_[A-Za-z0-9]{10,}|github_pat_\w{10,}|glpat-[\w-]{10,}|xox[abeprs]-[\w-]{8,}|nvapi-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{20,}|wandb_v\d_\w{8,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$))"
)
_learned: set[str] = set()


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name holds a key or a password; of a dotted name, the last part decides."""
    return _SECRET_NAME.match(str(name).lstrip("+~").rpartition(".")[2]) is not None


def learn(value: Any) -> None:
    """Register the secrets in `value` (a text, or a tree of settings): from now on they are redacted wherever they
    occur."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if is_secret_name(key) and isinstance(item, (str, int)):
                learn_key(str(item))
            else:
                learn(item)
    elif isinstance(value, str):
        for found in keys_in(value):
            learn_key(found)
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        for item in value:
            learn(item)


def learn_key(value: str) -> None:
    """Register this key or password, in the forms in which messages and headers repeat it."""
    _learned.update(_forms(value))


def _forms(value: str) -> set[str]:
    """The forms in which a key can occur again. In USER:PASSWORD, the user name alone is not a secret."""
    if is_placeholder(value) or _REFERENCE.search(value):
        return set()
    forms = {value, unquote(value), quote(value, safe="")}
    if ":" in value:
        forms |= _forms(value.split(":", 1)[1]) | {base64.b64encode(unquote(value).encode()).decode()}
    return {form for form in forms if len(form) >= SHORTEST and not is_placeholder(form)}


def is_placeholder(value: str) -> bool:
    """Whether `value` is a placeholder and not a key."""
    return value.strip().strip("\"'").lower() in PLACEHOLDERS or value == WITHHELD


def keys_in(text: str) -> Iterator[str]:
    """The keys and passwords in a text that are recognised by their place or form."""
    for pattern in (*_PLACES, _FORMS):
        for match in pattern.finditer(text):
            if not is_placeholder(match["key"]):
                yield match["key"]


def redact(text: str) -> str:
    """`text` with every key and password replaced by `***`; a reference to the environment stays a reference."""
    if not text:
        return text
    if known := _known_now():
        text = _any_of(known).sub(WITHHELD, text)
    for pattern in _PLACES:
        text = pattern.sub(_withheld, text)
    text = _FORMS.sub(WITHHELD, text)
    return _REFERENCE.sub(lambda m: WITHHELD if m[1].startswith(VARIABLE) else f"${{oc.env:{m[1]}}}", text)


def replaced(text: str, by: Callable[[str], str]) -> str:
    """`text` with every registered key replaced by what `by` gives for it."""
    known = tuple(sorted(_learned, key=lambda value: (-len(value), value)))
    return _any_of(known).sub(lambda found: by(found[0]), text) if known else text


def redacted(value: Any, name: str = "") -> Any:
    """A tree of settings or facts without keys: values of secret names are withheld, all other texts redacted."""
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(redacted(item, name) for item in value) if type(value) in (list, tuple) else value
    if name and is_secret_name(name) and value is not None and not isinstance(value, bool):
        text = str(value)
        reference = _REFERENCE.fullmatch(text)
        return redact(text) if reference or is_placeholder(text) else WITHHELD
    return redact(value) if isinstance(value, str) else value


def _withheld(match: re.Match[str]) -> str:
    whole, start = match[0], match.start()
    key = match["key"]
    if is_placeholder(key) or (_REFERENCE.fullmatch(key) and VARIABLE not in key):
        return whole
    return whole[: match.start("key") - start] + WITHHELD + whole[match.end("key") - start :]


def redact_argument(word: str) -> str:
    """One word of a command line: the whole value of a setting that holds a key, blanks and quotes included."""
    name, sign, _ = word.partition("=")
    return f"{name}={redacted(word[len(name) + 1 :], name)}" if sign and is_secret_name(name) else redact(word)


def _known_now() -> tuple[str, ...]:
    """The values to search for, longest first: registered ones, and keys in environment variables."""
    known = set(_learned)
    for name, value in os.environ.items():
        if name.startswith(VARIABLE) or _SECRET_VARIABLE.search(name):
            known |= _forms(value)
        elif "://" in value and "@" in value:  # a proxy's address, for example
            for found in _PLACES[0].finditer(value):
                known |= _forms(found["key"])
    return tuple(sorted(known, key=lambda value: (-len(value), value)))


@lru_cache(maxsize=16)
def _any_of(values: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the values; a short one only where it is not a part of a longer word."""
    return re.compile("|".join(_search(value) for value in values))


def _search(value: str) -> str:
    exact = re.escape(value)
    return exact if len(value) >= 12 else rf"(?<![A-Za-z0-9]){exact}(?![A-Za-z0-9])"
