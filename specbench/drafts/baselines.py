"""Baselines: drafts that need no training, with the same decoding loop, records and time measurement as trained ones.

    NGram        prompt lookup: what followed the longest recent suffix when it last occurred (Saxena 2023)
    Suffix       suffix decoding: what most often followed the longest known suffix (Oliaro et al. 2024)
    OracleDraft  the target's own greedy continuation: every slot is accepted at temperature 0, the upper bound
    Small        a complete language model with the same tokenizer (Leviathan et al. 2023; Chen et al. 2023)

    The first three propose without probabilities, that is with a one-hot distribution, so decoding is lossless at every
    temperature. Their time is that of this implementation; that of the oracle includes running the target.

Axes: B requests, S tokens, K slots, R tokens not yet run, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.blocks import Context
from specbench.drafts.draft import Proposal, SampleFunction
from specbench.drafts.suffix_automaton import ROOT, SuffixAutomaton
from specbench.models.target import Target, TargetState

BASELINES = ("ngram", "suffix", "suffix_all", "oracle")
SMALL = "small:"
SLOTS = 7
# Confidences of `Suffix` stay this far from 0 and 1: their logits are finite.
LEAST_SHARE = 1e-4


class Baseline(nn.Module):
    """Attributes of a draft that the decoding loop needs, in addition to begin, propose and commit."""

    halts_on_stop = False
    # Whether proposals for a request depend on the texts of others.
    reads_other_requests = False
    # Digest of the proposing weights, if they are not the target's.
    weights_hash: str | None = None

    def __init__(self, block_size: int):
        super().__init__()
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: a block holds at least one slot")
        self.block_size = block_size


@dataclass
class Texts:
    """The tokens of every request so far, without its anchor."""

    rows: list[list[int]]

    def select(self, rows: Int[Tensor, " R"]) -> Texts:
        """The texts of the chosen rows."""
        return Texts([self.rows[r] for r in rows.tolist()])

    def merge(self, other: Texts) -> Texts:
        """Both states' texts."""
        return Texts(self.rows + other.rows)


def lookup(text: Sequence[int], count: int, longest: int) -> list[int]:
    """The `count` tokens that followed the latest earlier occurrence of the longest suffix (at most `longest` tokens).

    A continuation that reaches the end of the text continues with its own proposed tokens; without any earlier
    occurrence the last token is repeated.

    >>> lookup([1, 2, 3, 9, 1, 2], 3, longest=3)
    [3, 9, 1]
    >>> lookup([7, 8, 7, 8], 3, longest=2)
    [7, 8, 7]
    """
    text = list(text)
    for size in range(min(longest, len(text) - 1), 0, -1):
        suffix = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == suffix:
                for k in range(count):
                    text.append(text[start + size + k])
                return text[-count:]
    return [text[-1]] * count


class NGram(Baseline):
    """Prompt lookup over the request's own prompt and answer."""

    def __init__(self, block_size: int = SLOTS, longest: int = 3):
        super().__init__(block_size)
        if longest < 1:
            raise ValueError(f"longest={longest}: match at least one token")
        self.longest = longest

    def begin(self, context: Context, tokens: Int[Tensor, "B T"]) -> Texts:
        return self.commit(Texts([[] for _ in tokens]), context, tokens)

    def commit(self, state: Texts, context: Context, tokens: Int[Tensor, "B S"]) -> Texts:
        new = zip(state.rows, tokens.tolist(), context.lengths.tolist(), strict=True)
        return Texts([row + ids[:count] for row, ids, count in new])

    def propose(
        self, state: Texts, anchor: Int[Tensor, " B"], sample: SampleFunction, slots: int | None = None
    ) -> Proposal:
        count = self.block_size if slots is None else min(slots, self.block_size)
        pairs = zip(state.rows, anchor.tolist(), strict=True)
        found = [lookup([*row, first], count, self.longest) for row, first in pairs]
        return Proposal(torch.tensor(found, device=anchor.device), None, None)


@dataclass
class SuffixTexts:
    """Every request's automaton (one for all of them if shared) and the state of its last token, without its anchor."""

    automata: list[SuffixAutomaton]
    last: list[int]

    def select(self, rows: Int[Tensor, " R"]) -> SuffixTexts:
        """The texts of the chosen rows."""
        chosen = rows.tolist()
        return SuffixTexts([self.automata[r] for r in chosen], [self.last[r] for r in chosen])

    def merge(self, other: SuffixTexts) -> SuffixTexts:
        """Both states' texts."""
        return SuffixTexts(self.automata + other.automata, self.last + other.last)


class Suffix(Baseline):
    """Suffix decoding (arXiv 2411.04975). Its confidence is the share of a token among what has followed the suffix so
    far, so that a threshold scheduler shortens uncertain proposals, as the paper does.

    Args:
        block_size: proposed tokens.
        shared: read the prompts and answers of all requests so far, not those of the request alone. Proposals then
            depend on which requests came before, and a prompt that is answered again finds its earlier answer.

    Deviations from the paper: the longest known suffix is followed, where the paper compares suffixes by a score; a
    chain is proposed, not a tree; and shared texts include prompts and running answers, where the paper's global tree
    holds finished answers alone.
    """

    def __init__(self, block_size: int = SLOTS, shared: bool = False):
        super().__init__(block_size)
        self.reads_other_requests = shared
        self._shared = SuffixAutomaton() if shared else None

    def begin(self, context: Context, tokens: Int[Tensor, "B T"]) -> SuffixTexts:
        automata = [self._shared or SuffixAutomaton() for _ in tokens]
        return self.commit(SuffixTexts(automata, [ROOT] * len(automata)), context, tokens)

    def commit(self, state: SuffixTexts, context: Context, tokens: Int[Tensor, "B S"]) -> SuffixTexts:
        new = zip(state.automata, state.last, tokens.tolist(), context.lengths.tolist(), strict=True)
        return SuffixTexts(state.automata, [automaton.extend(last, ids[:n]) for automaton, last, ids, n in new])

    def propose(
        self, state: SuffixTexts, anchor: Int[Tensor, " B"], sample: SampleFunction, slots: int | None = None
    ) -> Proposal:
        count = self.block_size if slots is None else min(slots, self.block_size)
        rows = zip(state.automata, state.last, anchor.tolist(), strict=True)
        found = [automaton.follow(last, first, count) for automaton, last, first in rows]
        tokens, shares = (torch.tensor(part, device=anchor.device) for part in zip(*found, strict=True))
        return Proposal(tokens, None, torch.logit(shares, eps=LEAST_SHARE))


class OracleDraft(Baseline):
    """The target as its own draft: all slots are accepted at temperature 0; above, it is the best deterministic
    draft."""

    def __init__(self, target: Target, block_size: int = SLOTS):
        super().__init__(block_size)
        self._target = (target,)  # not a submodule: its parameters belong to no draft

    def begin(self, context: Context, tokens: Int[Tensor, "B T"]) -> TargetState:
        return self._target[0].prefill(tokens, context.lengths)[0]

    def commit(self, state: TargetState, context: Context, tokens: Int[Tensor, "B S"]) -> TargetState:
        self._target[0].extend(state, tokens)
        state.advance(context.lengths)
        return state

    def propose(
        self, state: TargetState, anchor: Int[Tensor, " B"], sample: SampleFunction, slots: int | None = None
    ) -> Proposal:
        target, count = self._target[0], self.block_size if slots is None else min(slots, self.block_size)
        every = torch.arange(len(anchor), device=anchor.device)
        ahead, tokens = state.select(every), [anchor]
        for _ in range(count):
            states = target.extend(ahead, tokens[-1][:, None])
            ahead.advance(1)
            tokens.append(target.logits(states.last)[:, 0].argmax(-1))
        return Proposal(torch.stack(tokens[1:], 1), None, None)


@dataclass
class SmallState:
    """A small model's requests: its keys and values, and the committed tokens that it has not run yet.

    `waiting` (B, R): `counts` tokens per row, right-padded. `ahead`: number of tokens of the last proposal that are in
    the cache after the rows' lengths; those that verification accepts are not run again.
    """

    model: TargetState
    waiting: Int[Tensor, "B R"]
    counts: Int[Tensor, " B"]
    ahead: int = 0

    def select(self, rows: Int[Tensor, " R"]) -> SmallState:
        """The state of the chosen rows."""
        return SmallState(self.model.select(rows), self.waiting[rows], self.counts[rows], self.ahead)

    def merge(self, other: SmallState) -> SmallState:
        """Both states' rows."""
        width = max(self.waiting.shape[1], other.waiting.shape[1])
        waiting = torch.cat([F.pad(s.waiting, (0, width - s.waiting.shape[1])) for s in (self, other)])
        ahead = min(self.ahead, other.ahead)
        return SmallState(self.model.merge(other.model), waiting, torch.cat([self.counts, other.counts]), ahead)


class Small(Baseline):
    """A complete causal language model as draft, token by token, with its own key-value cache.

    `vocabulary` is that of the target: logits of a table with another padding are cut or filled to this size.
    """

    def __init__(self, model: Target, vocabulary: int, block_size: int = SLOTS):
        super().__init__(block_size)
        self._model = (model,)  # not a submodule: it is never trained, saved or wrapped
        self.vocabulary, self.weights_hash = vocabulary, model.weights_hash

    @property
    def parameters_count(self) -> int:
        """Parameters of the small model, its tables included."""
        return sum(parameter.numel() for parameter in self._model[0].model.parameters())

    def begin(self, context: Context, tokens: Int[Tensor, "B T"]) -> SmallState:
        state = self._model[0].prefill(self._known(tokens), context.lengths)[0]
        return SmallState(state, tokens[:, :0], torch.zeros_like(context.lengths))

    def commit(self, state: SmallState, context: Context, tokens: Int[Tensor, "B S"]) -> SmallState:
        assert not int(state.counts.max()), "commit follows begin or propose"
        run = context.lengths.clamp_max(state.ahead)
        state.model.advance(run)
        rest, counts = tokens[:, state.ahead :], context.lengths - run
        return SmallState(state.model, rest, counts)

    def propose(
        self, state: SmallState, anchor: Int[Tensor, " B"], sample: SampleFunction, slots: int | None = None
    ) -> Proposal:
        count = self.block_size if slots is None else min(slots, self.block_size)
        rows = torch.arange(len(anchor), device=anchor.device)
        block = F.pad(state.waiting, (0, 1))
        block[rows, state.counts] = anchor
        logits = self._logits(state.model, block)[rows, state.counts]
        state.model.advance(state.counts)
        state.waiting, state.counts = state.waiting[:, :0], torch.zeros_like(state.counts)
        tokens, probabilities = [], []
        for k in range(count):
            token, drawn = sample(logits[:, None])
            tokens.append(token)
            probabilities.append(drawn)
            if k + 1 < count:
                state.model.advance(1)
                logits = self._logits(state.model, token)[:, 0]
        state.model.advance(1 - count)
        state.ahead = count
        return Proposal(torch.cat(tokens, 1), None if drawn is None else torch.cat(probabilities, 1), None)

    def _logits(self, state: TargetState, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        model = self._model[0]
        logits = model.logits(model.extend(state, self._known(tokens)).last)[..., : self.vocabulary]
        return F.pad(logits, (0, self.vocabulary - logits.shape[-1]), value=-torch.inf)

    def _known(self, tokens: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
        """Tokens beyond the small model's table, which are only padding, are replaced by its last one."""
        return tokens.clamp_max(len(self._model[0].tables.embedding) - 1)


def small(folder: str | Path, target: Target, block_size: int = SLOTS) -> Small:
    """The language model of a folder or hub id (ID@REVISION pins it) as draft of `target`, on its device and in its
    dtype. Errors: ValueError for a model of another vocabulary.
    """
    id, revision = pinned(str(folder))
    model = Target.load(id, [], revision, target.dtype, target.device)
    own, theirs = (len(t.tables.head) for t in (target, model))
    if target.tokenizer is None or model.tokenizer is None:
        if own != theirs:
            raise ValueError(
                f"draft={SMALL}{folder} has {theirs} tokens and target {target.name} has {own}, and no tokenizer says "
                "that they share a vocabulary; give a model of the target's own tokenizer"
            )
    else:
        words, others = ({i: word for word, i in t.tokenizer.get_vocab().items()} for t in (target, model))
        differing = sorted(i for i in words if words[i] != others.get(i))
        if differing:
            first = differing[0]
            raise ValueError(
                f"draft={SMALL}{folder} has another vocabulary than target {target.name}: {len(differing)} of its "
                f"{len(words)} tokens differ (token {first} is {words[first]!r} and there {others.get(first)!r}); give "
                "a model of the target's own tokenizer"
            )
    return Small(model, own, block_size)


def pinned(name: str) -> tuple[str, str | None]:
    """ID@REVISION as its two parts; a folder is itself, whatever its name.

    >>> pinned("Qwen/Qwen3-0.6B@c1899de")
    ('Qwen/Qwen3-0.6B', 'c1899de')
    """
    id, at, revision = name.rpartition("@")
    return (id, revision) if at and revision and not Path(name).exists() else (name, None)


def short_name(name: str) -> str:
    """The last part of a folder or Hub id, with its revision: the name of a draft in runs and tables."""
    id, revision = pinned(name)
    return Path(id).name + ("" if revision is None else f"-{revision.replace('/', '-')}")


def is_baseline(name: str) -> bool:
    """Whether `draft=` names a baseline and not a draft folder."""
    return name in BASELINES or str(name).startswith(SMALL)


def baseline(name: str, target: Target, block_size: int = SLOTS) -> Baseline:
    """The baseline of a name in BASELINES, or small:FOLDER_OR_ID[@REVISION]."""
    if name.startswith(SMALL):
        return small(name.removeprefix(SMALL), target, block_size)
    if name not in BASELINES:
        raise ValueError(f"draft={name}: the baselines are {', '.join(BASELINES)} and {SMALL}FOLDER")
    if name.startswith("suffix"):
        return Suffix(block_size, shared=name == "suffix_all")
    return NGram(block_size) if name == "ngram" else OracleDraft(target, block_size)
