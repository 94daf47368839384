"""Classes of tokens by their text: digits, whitespace, code symbols or words, one letter of TOKEN_CLASSES per token.

d  a digit and no letter      w  a letter (words and pieces of them, identifiers)
s  only whitespace            c  neither: punctuation, brackets, operators
x  no text of its own: special tokens, and bytes that are part of a character
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

PARTIAL = "\N{REPLACEMENT CHARACTER}"


def token_class(text: str) -> str:
    """The class of a token's text.

    >>> "".join(token_class(text) for text in (" 42", "x1", "\\n\\n", "):", " the", "", "3.5"))
    'dwscwxd'
    """
    if not text or PARTIAL in text:
        return "x"
    if text.isspace():
        return "s"
    if any(character.isalpha() for character in text):
        return "w"
    return "d" if any(character.isdigit() for character in text) else "c"


def token_classes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The classes of `ids`, each token decoded separately."""
    known: dict[int, str] = {}
    special = set(tokenizer.all_special_ids)
    for token in ids:
        if token not in known:
            known[token] = "x" if token in special else token_class(tokenizer.decode([token]))
    return "".join(known[token] for token in ids)
