"""Keys and passwords in the command line and in screen output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from specbench.files.redaction import VARIABLE, is_placeholder, is_secret_name, keys_in, learn_key, redact, replaced


def withhold(words: Sequence[str]) -> list[str]:
    """The words of a command line with every key replaced by a reference to an environment variable.

    Hydra writes the words of a sweep into files and logs of its own, Lightning repeats them for its ranks, and W&B
    keeps them: a reference is safe with all of them, and the processes that they start inherit the environment.
    """
    moved = [_withheld(word) for word in words]
    # A key that one word names is one wherever else it was typed.
    return [_repeated(word) for word in moved]


def _withheld(word: str) -> str:
    name, sign, value = word.partition("=")
    if not sign or word.startswith("-"):
        return word
    if is_secret_name(name):
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        parts = [value[1:-1]] if quoted else value.split(",")  # several values are a sweep
        return f"{name}={','.join(map(_moved, parts))}"
    for key in sorted(set(keys_in(value)), key=len, reverse=True):
        value = value.replace(key, _moved(key))
    return f"{name}={value}"


def _repeated(word: str) -> str:
    """The word with keys that are known by now replaced in its value."""
    name, sign, value = word.partition("=")
    if not sign or word.startswith("-"):
        return word
    return f"{name}={replaced(value, _moved)}"


def _moved(key: str) -> str:
    """A reference to the environment variable that now holds `key`."""
    if "${" in key or is_placeholder(key):
        return key
    learn_key(key)
    number = 1
    while os.environ.get(f"{VARIABLE}{number}", key) != key:
        number += 1
    os.environ[f"{VARIABLE}{number}"] = key
    return f"${{oc.env:{VARIABLE}{number}}}"


class _Screen:
    """A text stream whose writes pass through `redact`; all other methods are those of the wrapped stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def screen() -> Iterator[None]:
    """Context in which all output of this process passes through `redact`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        stream if stream is None or isinstance(stream, _Screen) else _Screen(stream) for stream in before
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
