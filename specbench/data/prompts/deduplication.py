"""Near-duplicates by MinHash, and overlap with evaluation prompts by word n-grams.

Near-duplicates: MinHash signatures over word shingles (Broder 1997), candidates by banding, each candidate judged by
the estimated Jaccard similarity. The first text in reading order is kept. Signatures are on disk, so the memory needed
is 8 bytes a text and band, whatever the texts' size.

Contamination: a text is contaminated if one of its turns equals an evaluation prompt (letters, digits, operators) or
shares `ngram` consecutive words with one. The template of a benchmark (the words with which all its prompts begin or
end, and word sequences that at least `BOILERPLATE` of its prompts share) is ignored. `ngram` None: only equality
counts.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import xxhash
from jaxtyping import Float64, Int, UInt64

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts written without spaces: one character is a word
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_TERM = re.compile(rf"{_WORD.pattern}|[-+*/=<>^%]")  # equality tells 2 + 2 from 2 * 2
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
BOILERPLATE = 10
SHORTEST = 8


def text_hash(text: str) -> int:
    """64-bit hash of a text, the same on every machine."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def words(text: str) -> list[str]:
    """Case-folded words without punctuation."""
    return _WORD.findall(text.casefold())


def _hashes(terms: Sequence[str]) -> UInt64[np.ndarray, " W"]:
    return np.fromiter((text_hash(t) for t in terms), dtype=np.uint64, count=len(terms))


def runs(hashes: UInt64[np.ndarray, " W"], length: int) -> UInt64[np.ndarray, " R"]:
    """One hash for every sequence of `length` consecutive words, R = W - length + 1 (empty if there are fewer
    words)."""
    count = len(hashes) - length + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for j in range(length):
        total = total * _FACTOR + hashes[j : j + count]
    return total


class Signatures:
    """MinHash signatures of texts, in the order in which they were added."""

    def __init__(self, shingle: int = 5, bands: int = 32, rows: int = 4, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        size = bands * rows
        self._multiply = generator.integers(1, 2**63, size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._add = generator.integers(0, 2**63, size, dtype=np.uint64)
        self._shingle, self._bands, self._rows = shingle, bands, rows
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the object
        self._exact: list[int] = []

    def add(self, text: str) -> None:
        """Append the signature of `text`."""
        hashes = _hashes(words(text) or [text])
        shingles = np.unique(runs(hashes, min(self._shingle, len(hashes))))
        values = shingles[:, None] * self._multiply + self._add
        self._file.write((values.min(0) >> np.uint64(32)).astype("<u4").tobytes())
        self._exact.append(text_hash(text))

    def _stored(self) -> np.ndarray:
        self._file.flush()
        return np.memmap(self._file, dtype="<u4", mode="r").reshape(len(self._exact), self._bands * self._rows)

    def similarity(self, rows: Int[np.ndarray, " P"], others: Int[np.ndarray, " P"]) -> Float64[np.ndarray, " P"]:
        """Estimated Jaccard similarity of P pairs; its standard error is sqrt(J (1 - J) / (bands * rows))."""
        signatures = self._stored()
        estimate = np.empty(len(rows))
        for at in range(0, len(rows), 8192):
            part = slice(at, at + 8192)
            estimate[part] = (signatures[rows[part]] == signatures[others[part]]).mean(1)
        return estimate

    def duplicates(self, threshold: float | int | None) -> Int[np.ndarray, " M"]:
        """For each of the M texts, the index of the earlier text that it duplicates, or -1.

        `threshold`: lowest estimated Jaccard similarity of word shingles that counts; None: only equal texts count.
        """
        exact = np.array(self._exact, dtype=np.uint64)
        first = np.full(len(exact), -1, dtype=np.int64)
        _link(exact, first, lambda rows, leaders: np.ones(len(rows), dtype=bool))
        if threshold is None or not len(exact):
            return first
        signatures = self._stored()

        def alike(rows: np.ndarray, leaders: np.ndarray) -> np.ndarray:
            return self.similarity(rows, leaders) >= threshold

        for band in range(self._bands):
            columns = np.ascontiguousarray(signatures[:, band * self._rows : (band + 1) * self._rows])
            _link(runs(columns.astype(np.uint64).ravel(), self._rows)[:: self._rows], first, alike)
        return first


def _link(keys: UInt64[np.ndarray, " M"], first: Int[np.ndarray, " M"], alike) -> None:
    """Set first[i] to the earliest row with the same key, where `alike` agrees and nothing is set yet."""
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]]) if len(keys) else np.empty(0, np.int64)
    leaders = np.empty(len(keys), dtype=np.int64)
    leaders[order] = order[np.repeat(begins, np.diff(np.r_[begins, len(keys)]))]
    rows = np.flatnonzero((leaders != np.arange(len(keys))) & (first < 0))
    if len(rows):
        same = alike(rows, leaders[rows])
        first[rows[same]] = leaders[rows[same]]


class Contamination:
    """The evaluation prompts, in a form with which a stream of training texts can be compared."""

    def __init__(self, prompts: Mapping[str, Iterable[str]], ngram: int | None = 13) -> None:
        self.ngram = ngram
        self.boilerplate = 0
        self.sizes: dict[str, int] = {}
        self._exact: dict[int, str] = {}
        tables: dict[int, dict[int, str]] = {}
        for benchmark, given in prompts.items():
            texts = list(given)
            split = [words(text) for text in texts]
            self.sizes[benchmark] = len(split)
            bare = _unwrapped(split)
            terms = [_TERM.findall(text.casefold()) for text in texts]
            self._exact.update((self._key(t), benchmark) for t in terms if t)
            self._exact.update((self._key(t), benchmark) for t in _unwrapped(terms) if len(t) > 1)
            counts: Counter[tuple[int, int]] = Counter()
            for w in bare if ngram is not None else []:
                length = min(ngram, len(w))
                if length >= min(SHORTEST, ngram):
                    counts.update((length, h) for h in set(runs(_hashes(w), length).tolist()))
            for (length, value), count in counts.items():
                if count >= BOILERPLATE:
                    self.boilerplate += 1
                else:
                    tables.setdefault(length, {})[value] = benchmark
        self._tables = {n: (np.sort(np.fromiter(t, dtype=np.uint64, count=len(t))), t) for n, t in tables.items()}

    @staticmethod
    def _key(terms: Sequence[str]) -> int:
        return text_hash(" ".join(terms))

    def match(self, turns: Iterable[str]) -> tuple[str, str] | None:
        """(benchmark, "exact" | "ngram") of the first overlap found in the turns, or None."""
        for turn in turns:
            found = self._exact.get(self._key(_TERM.findall(turn.casefold())))
            if found is not None:
                return found, "exact"
            hashes = _hashes(words(turn))
            for length, (table, owner) in self._tables.items():
                own = runs(hashes, length)
                if not len(own):
                    continue
                at = np.searchsorted(table, own)
                hits = own[table[np.minimum(at, len(table) - 1)] == own]
                if len(hits):
                    return owner[int(hits[0])], "ngram"
        return None


def _unwrapped(split: Sequence[list[str]]) -> list[list[str]]:
    """The prompts without the words with which all of them begin or end."""
    if len(split) < 3:
        return list(split)
    shortest = min(map(len, split))
    head = next((i for i in range(shortest) if len({w[i] for w in split}) > 1), shortest)
    tail = next((i for i in range(shortest - head) if len({w[-1 - i] for w in split}) > 1), shortest - head)
    return [w[head : len(w) - tail] for w in split]
