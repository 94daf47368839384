"""A suffix automaton over token texts, built token by token, that says what has followed the longest known suffix.

A state is a class of strings that end at the same places; `link` leads to the longest of their suffixes that ends at
more places, and `counts` is the number of places (Blumer et al. 1985). Building takes amortised constant time a token
beside the counts, whose update visits the suffixes of the text that occurred before.
"""

from __future__ import annotations

from collections.abc import Iterable

ROOT = 0


class SuffixAutomaton:
    """One automaton over several texts; a text is known by the state of its last token (`ROOT` when it is empty)."""

    def __init__(self) -> None:
        self.edges: list[dict[int, int]] = [{}]
        self.links, self.lengths, self.counts = [-1], [0], [0]

    def extend(self, last: int, tokens: Iterable[int]) -> int:
        """Append tokens to the text whose last state is `last`; returns its new last state."""
        for token in tokens:
            last = self._append(last, token)
            state = last
            while state > ROOT:
                self.counts[state] += 1
                state = self.links[state]
        return last

    def _append(self, last: int, token: int) -> int:
        if token in self.edges[last]:  # another text went on alike
            return self._of_length(self.lengths[last] + 1, last, token)
        new = self._state({}, ROOT, self.lengths[last] + 1, 0)
        state = last
        while state >= ROOT and token not in self.edges[state]:
            self.edges[state][token] = new
            state = self.links[state]
        if state >= ROOT:
            self.links[new] = self._of_length(self.lengths[state] + 1, state, token)
        return new

    def _of_length(self, length: int, state: int, token: int) -> int:
        """The state behind `token` whose longest string has this length; splits the one that is there if need be."""
        found = self.edges[state][token]
        if self.lengths[found] == length:
            return found
        split = self._state(dict(self.edges[found]), self.links[found], length, self.counts[found])
        while state >= ROOT and self.edges[state].get(token) == found:
            self.edges[state][token] = split
            state = self.links[state]
        self.links[found] = split
        return split

    def _state(self, edges: dict[int, int], link: int, length: int, count: int) -> int:
        for values, value in (
            (self.edges, edges),
            (self.links, link),
            (self.lengths, length),
            (self.counts, count),
        ):
            values.append(value)
        return len(self.edges) - 1

    def follow(self, last: int, token: int, count: int) -> tuple[list[int], list[float]]:
        """The `count` tokens that most often followed the longest known suffix of a text and `token`, and their shares.

        The text is not changed. Each token is the most frequent one (of equals the smallest) behind the longest suffix
        of text, token and the tokens before it that has a continuation; its share is of all continuations of that
        suffix. Where nothing is known the last token is repeated, with share 0.
        """
        state = self._step(last, token)
        tokens, shares = [], []
        for _ in range(count):
            while state > ROOT and not self.edges[state]:
                state = self.links[state]
            if state == ROOT:
                tokens.append(tokens[-1] if tokens else token)
                shares.append(0.0)
                continue
            following = {token: self.counts[next_] for token, next_ in self.edges[state].items()}
            best = min(following, key=lambda token: (-following[token], token))
            tokens.append(best)
            shares.append(following[best] / sum(following.values()))
            state = self.edges[state][best]
        return tokens, shares

    def _step(self, state: int, token: int) -> int:
        while state > ROOT and token not in self.edges[state]:
            state = self.links[state]
        return self.edges[state].get(token, ROOT)
