"""OnPolicy: the tokens before a slot are drawn from the draft itself, as in decoding, and not taken from the text.

    token of slot k, which slot k+1 reads:  x_k ~ softmax(logits_k / T) with probability `share`, else the text's

Scheduled sampling (Bengio et al., arXiv 1506.03099) inside a block. Labels and the target's distributions stay those
of the text, because its states after other tokens are not known; EAGLE-3's training in speculators does the same with
T = 0 and share 1. Drafts whose slots do not read each other's tokens are not changed.

Axes: B batch, N blocks, K slots, D hidden, W draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specbench.blocks import PADDING, Batch, Blocks, generator, previous_tokens, take
from specbench.ranges import Share, Slots, Temperature

if TYPE_CHECKING:
    from specbench.drafts.draft import Draft

# Rows of vocabulary size at once.
ROWS = 512


@dataclass(frozen=True)
class OnPolicy:
    """Random numbers of one batch: `own` says which slots' tokens are drawn, `uniform` places the draw.

    Both depend on the seed of the anchors and on the conversation alone, not on packing, batch size or ranks.
    """

    own: Bool[Tensor, "B N K"]
    uniform: Float[Tensor, "B N K"]
    temperature: float

    @classmethod
    def of(cls, batch: Batch, slots: Slots, share: Share, temperature: Temperature) -> OnPolicy:
        """Draw the numbers for a batch with anchors."""
        real = batch.anchors != PADDING
        owner = torch.where(real, take(batch.document, batch.anchors.clamp_min(0)), PADDING).cpu().numpy()
        numbers = np.ones((*owner.shape, slots, 2))
        for b, documents in enumerate(owner):
            for document in np.unique(documents[documents != PADDING]):
                own = documents == document
                numbers[b, own] = generator(batch.seed, int(document), 2).random((own.sum(), slots, 2))
        coins, uniform = torch.from_numpy(numbers).to(batch.anchors.device, torch.float32).unbind(-1)
        return cls((coins < share) & real[..., None], uniform, temperature)

    @torch.no_grad()
    def token(
        self, draft: Draft, hidden: Float[Tensor, "B N k D"], previous: Int[Tensor, "B N k"], true: Int[Tensor, "B N"]
    ) -> Int[Tensor, "B N"]:
        """The token of slot k, from the hidden states and previous tokens of the slots up to it."""
        slot = hidden.shape[-2] - 1
        chosen = self.own[..., slot]
        if not chosen.any():
            return true
        features, at = draft.features(hidden, previous)[..., -1, :][chosen], self.uniform[..., slot][chosen]
        rows = [self._draw(draft.project(x), u) for x, u in zip(features.split(ROWS), at.split(ROWS), strict=True)]
        tokens = true.clone()
        tokens[chosen] = draft.to_target(torch.cat(rows))
        return tokens

    def _draw(self, logits: Float[Tensor, "R W"], uniform: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
        if self.temperature == 0:
            return logits.argmax(-1)
        below = torch.softmax(logits.float() / self.temperature, -1).cumsum(-1)
        # Rounding can leave the last sum a little below 1.
        return torch.searchsorted(below, (uniform * below[:, -1])[:, None], right=True)[:, 0].clamp_max(
            len(below[0]) - 1
        )

    def forward(self, draft: Draft, batch: Batch) -> Blocks:
        """The draft's training view with drawn tokens. A forward pass that reads the tokens and does not draw them is
        repeated for every slot, without gradient."""
        if draft.draws_previous:
            return draft(replace(batch, policy=self))
        previous = previous_tokens(batch, draft.block_size).clone()
        blocks = None if draft.reads_previous else draft(batch)
        for k in range(1, draft.block_size):
            with torch.no_grad():
                hidden = (draft(replace(batch, previous=previous)) if blocks is None else blocks).hidden.detach()
            previous[..., k] = self.token(draft, hidden[..., :k, :], previous[..., :k], previous[..., k])
        if blocks is None:
            return draft(replace(batch, previous=previous))
        # Lookups that were made before are those of the text's tokens.
        return replace(blocks, previous=previous, lookups=None)
