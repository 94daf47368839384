"""Untrusted YAML as plain data: no tags that build objects, and no aliases that expand without limit."""

from __future__ import annotations

from typing import Any

import yaml

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST = 100_000  # values of a document, aliases written out; a record has some hundreds


def read(text: str) -> Any:
    """The value of one YAML document.

    Errors: yaml.YAMLError for what is no YAML, for tags of objects, for documents nested too deeply, and for aliases
    that unfold into more than MOST values or into themselves: what reads such a value never ends.
    """
    try:
        loader = LOADER(text)
        try:
            found = loader.get_single_data()
        finally:
            loader.dispose()
    except (RecursionError, ValueError, OverflowError) as error:
        raise yaml.YAMLError(f"a value that cannot be read: {error}") from error
    waiting, seen = [found], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > MOST:
            raise yaml.YAMLError(f"its aliases unfold into more than {MOST} values")
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
    return found
