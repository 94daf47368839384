"""The contract that every draft method keeps.

Two views of one object. Training: `forward(batch)` gives all blocks at once, teacher-forced. Decoding: `begin` after
the target's prefill, then rounds of `propose` and `commit`. The contract tests hold the views equal for every method.

A method knows no Lightning, no temperature, no library cache and no verification rule.

Axes: B batch, T tokens, N blocks, K slots, C taps, D hidden, F features, V vocabulary (of the draft).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.blocks import Batch, Blocks, Context
from specbench.models.backbone import Backbone
from specbench.models.embedding_head import Tables
from specbench.models.fast.folded_layers import Stack
from specbench.models.kv_cache import KVCache

# logits (B, S, V) of S consecutive slots -> tokens (B, S) and, when drawn, the probabilities (B, S, V) they came from
Sample = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Proposal:
    """K proposed tokens a row, the probabilities they were drawn from (None: greedy) and confidence logits if any."""

    tokens: Int[Tensor, "B K"]
    probabilities: Float[Tensor, "B K V"] | None
    confidence: Float[Tensor, "B K"] | None


@dataclass
class State:
    """What a draft remembers between rounds: its keys and values, and the target state not yet paired with a token."""

    cache: KVCache
    feature: Float[Tensor, "B D"] | None = None

    def select(self, rows: Int[Tensor, " R"]) -> State:
        """The state of the chosen rows, as requests leave."""
        return State(self.cache.select(rows), None if self.feature is None else self.feature[rows])

    def merge(self, other: State) -> State:
        """Both states' rows, as requests join."""
        feature = None if self.feature is None else torch.cat([self.feature, other.feature])
        return State(self.cache.merge(other.cache), feature)


@runtime_checkable
class Proposer(Protocol):
    """What decoding asks of a draft; its state may be any object with `select(rows)` and `merge(other)`."""

    block_size: int
    halts_on_stop: bool

    def begin(self, context: Context, tokens: Tensor) -> Any: ...

    def propose(self, state: Any, anchor: Tensor, sample: Sample, slots: int | None = None) -> Proposal: ...

    def commit(self, state: Any, context: Context, tokens: Tensor) -> Any: ...


class Draft(nn.Module):
    """Base of all drafts: sizes, tables, and the shared readout `hidden -> features -> logits`.

    `anchors_per_sample` is the number of anchors that training draws from a conversation (None: every valid one).
    """

    # Which target states feed the draft: a cache reads no taps for a method that does not, and must hold every final
    # state for one that reads them at all positions.
    reads_taps = True
    reads_last = False
    # The released evaluator ends an Eagle3 proposal at its first proposed stop token (accounting "deepspec" only).
    halts_on_stop = False
    # Which slots training supervises: one of blocks.SUPERVISIONS.
    supervision = "predicted"
    # The layers as decoding runs them, if the draft has layers; renewed as requests begin.
    stack: Stack | None = None

    def __init__(
        self,
        backbone: Backbone,
        tables: Tables,
        target_layer_ids: tuple[int, ...] | list[int],
        block_size: int,
        anchors_per_sample: int | None = None,
        train_tables: bool = False,
        draft_vocabulary: Int[Tensor, " W"] | None = None,
    ):
        super().__init__()
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: a block holds at least one slot")
        ids = list(target_layer_ids)
        if not ids or ids != sorted(set(ids)):
            raise ValueError(f"target_layer_ids={ids}: give at least one target layer, in ascending order")
        # What stands around the tables is theirs; the facts say the same, so that a draft is written as it decodes.
        scales = {name: getattr(tables, name) for name in ("embedding_scale", "soft_cap", "logit_scale")}
        self.backbone = replace(backbone, **scales)
        self.block_size, self.anchors_per_sample = block_size, anchors_per_sample
        self.target_layer_ids = tuple(target_layer_ids)
        self.tables = tables.derive(train_tables, draft_vocabulary)

    @property
    def draft_vocabulary(self) -> Int[Tensor, " W"] | None:
        """Token ids of a reduced draft vocabulary (None: the target's whole vocabulary)."""
        return self.tables.ids

    def forward(self, batch: Batch) -> Blocks:
        """Training view: every block of the batch at once, from true tokens and true target states."""
        raise NotImplementedError

    def begin(self, context: Context, tokens: Int[Tensor, "B T"]) -> State:
        """Decoding view after the target's prefill of `tokens`: commit them to an empty state."""
        if self.stack is not None:
            self.stack.renew()
        return self.commit(State(KVCache(len(tokens), tokens.device)), context, tokens)

    def propose(self, state: State, anchor: Int[Tensor, " B"], sample: Sample, slots: int | None = None) -> Proposal:
        """Propose `slots` (default: block_size) tokens after `anchor`; the state stays as it is."""
        raise NotImplementedError

    def commit(self, state: State, context: Context, tokens: Int[Tensor, "B S"]) -> State:
        """Take in the target's true states of the tokens that verification committed (the old anchor first)."""
        raise NotImplementedError

    def features(self, hidden: Float[Tensor, "*b K D"], previous: Int[Tensor, "*b K"]) -> Float[Tensor, "*b K F"]:
        """What the vocabulary projection reads, from whole blocks; small next to the vocabulary."""
        return hidden

    def project(self, features: Float[Tensor, "*r F"]) -> Float[Tensor, "*r W"]:
        """Logits of each row of features; the only place where a draft touches its vocabulary."""
        return self.tables.logits(features)

    def logits(self, hidden: Float[Tensor, "*b K D"], previous: Int[Tensor, "*b K"]) -> Float[Tensor, "*b K W"]:
        """Draft logits of whole blocks."""
        return self.project(self.features(hidden, previous))

    def projection_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that `project` reads (the chunked objective differentiates them)."""
        return [p for p in (self.tables.head,) if isinstance(p, nn.Parameter)]

    def confidence(self, hidden: Float[Tensor, "*b K D"], previous: Int[Tensor, "*b K"]) -> Tensor | None:
        """Logit of the acceptance of each slot given that all before it are accepted; None without such a head."""
        return None

    def to_target(self, tokens: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
        """Rows of the draft's vocabulary -> token ids of the target."""
        return tokens if self.draft_vocabulary is None else self.draft_vocabulary[tokens]

    def widen(self, probabilities: Float[Tensor, "*b W"] | None) -> Float[Tensor, "*b V"] | None:
        """Draft probabilities over the target's vocabulary: zero where the draft has no token."""
        if probabilities is None or self.draft_vocabulary is None:
            return probabilities
        wide = probabilities.new_zeros(*probabilities.shape[:-1], self.backbone.vocab_size)
        return wide.index_copy_(-1, self.draft_vocabulary, probabilities)
