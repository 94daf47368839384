"""The tokenizer of a GGUF file: correction of its pre-tokenizer, and a check of its ids with the tables of the file.

A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`) and does not describe it, and transformers gives every
byte-level vocabulary the one of GPT-2. Two line breaks before a digit are then two tokens where SmolLM2 was trained on
one. The expressions here are those of llama.cpp (src/llama-vocab.cpp, llm_tokenizer_bpe), which defines the names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import regex
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre -> the expressions by which a text is split, one after the other.
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), (GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", GPT2)
    ),
    **dict.fromkeys(
        ("qwen2", "stablelm2", "hunyuan"), (rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{TAIL}",)
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "chatglm-bpe", "glm4"),
        (rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}",),
    ),
}
CONTROL, OWN = 3, 4  # token types that are matched in a text before anything else
SPACE = "\u2581"
# Texts in which pre-tokenizers differ: runs of digits, spaces and line breaks before digits, code, accents, emoji.
TEXTS = (
    "Natalia sold 48 clips in April, and half as many in May.",
    "Steps:\n\n1. First\n\n2. Second\n   3  and  45, 1,234.56",
    "def f(x):\n\n    return x**2  # it's 2x\n\tpass\r\n",
    "Ünïcode naïve \u6771\u4eac \U0001f642 ½²",
    "  leading, trailing  ",
    "We'LL see: I'm, they've; O'Neill's 3rd!!!???\n\n\n",
)


def corrected(tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """`tokenizer` with the pre-tokenizer that the file names. Errors: ValueError for an unknown one."""
    if facts.get("tokenizer.ggml.model") == "gpt2":
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits(facts)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    return tokenizer


def splits(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The expressions of the pre-tokenizer that the file names."""
    name = facts.get("tokenizer.ggml.pre")
    if name not in SPLITS:
        raise ValueError(
            f"the file's pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known here, so texts could get other ids "
            "than the model was trained on: give tokenizer=FOLDER_OR_ID, the original model's"
        )
    return SPLITS[name]


def check(tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any], rebuilt: bool = True) -> list[str]:
    """Compare vocabulary, ids of texts, chat template and stop token with the file; returns what was compared, in
    words.

    rebuilt: whether the tokenizer was made from this file; its ids for TEXTS must then equal those of the plain
    algorithm with the tables of the file. Errors: ValueError naming the difference.
    """
    words = facts["tokenizer.ggml.tokens"]
    own = tokenizer.get_vocab()
    wrong = [(i, word, own.get(word)) for i, word in enumerate(words) if own.get(word) != i]
    # A given tokenizer can write byte tokens and unused ones differently.
    if wrong and (rebuilt or len(wrong) > len(words) // 100):
        i, word, found = wrong[0]
        raise ValueError(
            f"token {i} of the file is {word!r} and the tokenizer has {found} for it ({len(wrong)} differ of "
            f"{len(words)}): give tokenizer=FOLDER_OR_ID, the original model's"
        )
    said = [f"{len(words) - len(wrong)} of {len(words)} tokens have the file's ids"]
    template = facts.get("tokenizer.chat_template")
    if rebuilt:
        texts = [*TEXTS, *_conversation(tokenizer)]
        for text in texts:
            expected, found = reference_ids(text, facts), tokenizer.encode(text, add_special_tokens=False)
            if expected != found:
                raise ValueError(
                    f"the rebuilt tokenizer gives {found} for {text!r} and the file's own tables {expected}: give "
                    "tokenizer=FOLDER_OR_ID, the original model's"
                )
        said.append(f"{len(texts)} texts have the ids of the file's own tables")
        if tokenizer.chat_template != template:
            raise ValueError("the rebuilt tokenizer's chat template is not the file's: give tokenizer=FOLDER_OR_ID")
    if template is None:
        said.append("the file has no chat template")
    elif tokenizer.chat_template == template:
        said.append("its chat template is the file's")
    else:
        said.append("its chat template is its own and not the file's")
    stop = facts.get("tokenizer.ggml.eos_token_id")
    if stop is not None and tokenizer.eos_token_id != stop:
        raise ValueError(f"the file's stop token is {stop} and the tokenizer's {tokenizer.eos_token_id}")
    return said


def stop_ids(facts: Mapping[str, Any]) -> list[int]:
    """All stop tokens of the file."""
    keys = ("eos", "eot", "eom")
    found = (facts.get(f"tokenizer.ggml.{key}_token_id") for key in keys)
    return list(dict.fromkeys(int(stop) for stop in found if stop is not None))


def reference_ids(text: str, facts: Mapping[str, Any]) -> list[int]:
    """The ids of `text` by the plain algorithm of its kind of vocabulary, from the tables of the file: the
    reference."""
    kind, words = facts.get("tokenizer.ggml.model"), facts["tokenizer.ggml.tokens"]
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"a vocabulary of the kind {kind!r} (tokenizer.ggml.model) is not rebuilt here: give "
            "tokenizer=FOLDER_OR_ID, the original model's"
        )
    ids = {word: i for i, word in enumerate(words)}
    types = facts["tokenizer.ggml.token_type"]
    special = sorted((w for w, t in zip(words, types, strict=True) if t in (CONTROL, OWN) and w), key=len, reverse=True)
    pieces = regex.split(f"({'|'.join(map(regex.escape, special))})", text) if special else [text]
    found: list[int] = []
    for number, piece in enumerate(pieces):
        if number % 2:
            found.append(ids[piece])
        elif piece:
            found += _byte_level(piece, facts, ids) if kind == "gpt2" else _by_score(piece, facts, ids)
    return found


def _byte_level(text: str, facts: Mapping[str, Any], ids: Mapping[str, int]) -> list[int]:
    """Byte-level BPE: merges in the order of the file's list, inside each piece of the pre-tokenizer."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(facts["tokenizer.ggml.merges"])}
    pieces = [text]
    for pattern in splits(facts):
        pieces = [part for piece in pieces for part in _isolated(pattern, piece)]
    found: list[int] = []
    for piece in pieces:
        symbols = [_letters()[byte] for byte in piece.encode()]
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            symbols = _joined(symbols, best)
        found += [ids[symbol] for symbol in symbols]
    return found


def _by_score(text: str, facts: Mapping[str, Any], ids: Mapping[str, int]) -> list[int]:
    """SentencePiece BPE: the pair whose union is the token with the highest score is joined first, the left one of
    equals; text without a token is written in bytes."""
    scores = facts["tokenizer.ggml.scores"]
    symbols = list(text.replace(" ", SPACE))
    if facts.get("tokenizer.ggml.add_space_prefix", True):
        symbols.insert(0, SPACE)
    while len(symbols) > 1:
        unions = [a + b for a, b in pairwise(symbols)]
        known = [(scores[ids[union]], -place) for place, union in enumerate(unions) if union in ids]
        if not known:
            break
        place = -max(known)[1]
        symbols[place : place + 2] = [unions[place]]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def _conversation(tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    if tokenizer.chat_template is None:
        return []
    turns = [{"role": "user", "content": "What is 12 + 30?\n\n1. 42"}, {"role": "assistant", "content": "42"}]
    return [
        tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template(turns, tokenize=False),
    ]


def _isolated(pattern: str, text: str) -> list[str]:
    return [part for part in regex.split(f"({pattern})", text) if part]


def _joined(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    found, at = [], 0
    while at < len(symbols):
        both = tuple(symbols[at : at + 2]) == pair
        found.append("".join(pair) if both else symbols[at])
        at += 2 if both else 1
    return found


@cache
def _letters() -> dict[int, str]:
    """GPT-2's letter for each byte: a printable byte is itself, the others are letters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
