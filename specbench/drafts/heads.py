"""HeadsDraft: one small head for each slot on the target's last state, without layers and without attention.

    f = last at a-1, the state from which the target drew the anchor
    slot k: a stack of residual maps r(x) = x + SiLU(W x + b), then a vocabulary head

Medusa's heads read f alone, Hydra's also the tokens between the state and their slot. The vocabulary head is the
target's, or (`own_heads`) one for each slot that starts as a copy of it.

Axes: B batch, N blocks, K slots, D hidden, W draft vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.blocks import Batch, Blocks, Context, assemble, previous_tokens, take
from specbench.drafts.draft import Draft, State
from specbench.models.backbone import Backbone
from specbench.models.embedding_head import Tables
from specbench.ranges import Count, Slots


class Residual(nn.Module):
    """x + SiLU(W x + b)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        return x + F.silu(self.linear(x))


class HeadsDraft(Draft):
    """Base class of drafts that are one head for each slot.

    A subclass defines `outputs`, the hidden states of the slots.

    Args:
        depth: residual maps of a head.
        own_heads: each slot trains a vocabulary head of its own, which starts as a copy of the target's (as published);
            False: all slots share the target's frozen head.
        block_size: slots K, which is the number of heads.
        anchors: anchors that training draws from a conversation. None: every valid one.
        train_tables: see `Draft`, like all other arguments.

    Raises:
        ValueError: `own_heads` and `train_tables` are both set.
    """

    reads_taps = False
    reads_last = True
    tap_modules = ()

    def __init__(
        self,
        backbone: Backbone,
        tables: Tables,
        target_layer_ids: tuple[int, ...] | list[int],
        mask_token_id: int | None = None,
        *,
        depth: Count = 1,
        own_heads: bool = False,
        block_size: Slots = 5,
        anchors: Count | None = None,
        train_tables: bool = False,
        draft_vocabulary: Int[Tensor, " W"] | None = None,
    ):
        super().__init__(
            backbone,
            tables,
            target_layer_ids,
            mask_token_id,
            block_size=block_size,
            anchors=anchors,
            train_tables=train_tables,
            draft_vocabulary=draft_vocabulary,
        )
        if own_heads and train_tables:
            raise ValueError("own_heads=true and train_tables=true: train the heads of the slots or the shared head")
        self.depth = depth
        self.vocabulary_heads = nn.ParameterList(
            nn.Parameter(self.tables.head.detach().clone()) for _ in range(block_size if own_heads else 0)
        )

    def outputs(self, feature: Float[Tensor, "*b D"], previous: Int[Tensor, "*b K"]) -> Float[Tensor, "*b K D"]:
        """Hidden states of K slots from the target's state before the anchor and the token before each slot."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Blocks:
        before = (batch.anchors - 1).clamp_min(0)
        feature = take(batch.last, before).to(next(self.parameters()).dtype)
        return assemble(batch, self.outputs(feature, previous_tokens(batch, self.block_size)))

    def commit(self, state: State, context: Context, tokens: Int[Tensor, "B S"]) -> State:
        rows = torch.arange(len(tokens), device=tokens.device)
        state.feature = context.last[rows, context.lengths - 1]
        return state

    def features(self, hidden: Float[Tensor, "*b K D"], previous: Int[Tensor, "*b K"]) -> Float[Tensor, "*b K F"]:
        return self.numbered(hidden)

    def numbered(self, hidden: Float[Tensor, "*b K D"], first: int = 0) -> Float[Tensor, "*b K F"]:
        """With own heads, the number of the slot (from `first`) as a last feature: `project` sees rows, not slots."""
        if not self.vocabulary_heads:
            return hidden
        number = torch.arange(first, first + hidden.shape[-2], device=hidden.device, dtype=hidden.dtype)
        return torch.cat([hidden, number[:, None].expand(*hidden.shape[:-1], 1)], -1)

    def project(self, features: Float[Tensor, "*r F"]) -> Float[Tensor, "*r W"]:
        if not self.vocabulary_heads:
            return super().project(features)
        rows, slot = features[..., :-1].flatten(0, -2), features[..., -1].flatten()
        logits = rows.new_empty(len(rows), len(self.tables.head))
        for k, head in enumerate(self.vocabulary_heads):
            chosen = slot == k
            logits[chosen] = F.linear(rows[chosen], head, self.tables.bias)
        return self.tables.adjust(logits.unflatten(0, features.shape[:-1]))

    def projection_parameters(self) -> list[nn.Parameter]:
        return [*super().projection_parameters(), *self.vocabulary_heads]
