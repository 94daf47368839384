"""Medusa (Cai et al. 2024, arXiv 2401.10774): independent heads on the target's last state.

    f = last at a-1                                              -> heads.HeadsDraft
    h_k = f + SiLU(W_k f + b_k), `depth` of them in a row        -> Medusa.outputs
    logits_k = H_k h_k; H_k the target's head, or one a slot     -> HeadsDraft.project
    start: W_k = 0, H_k = the target's head                      -> Medusa.start_from

Head k of the release (from 0, on the state at t) predicts t+2+k; with t = a-1 it is slot k+1. The loss of the release
is cross-entropy, weighted by 0.8^k.

Deviations: the target stays frozen (Medusa-1); Medusa-2, which trains the target along, would change what is measured.
Slots share the target's head unless `own_heads=true`, the published form, which adds V x D parameters a slot. The
release repeats one residual map where it has several; here each is its own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.drafts.draft import Proposal, SampleFunction, State
from specbench.drafts.heads import HeadsDraft, Residual
from specbench.models.backbone import Backbone
from specbench.models.embedding_head import Tables
from specbench.models.target import Target
from specbench.ranges import Count, Slots


class Medusa(HeadsDraft):
    """Independent heads: no slot sees the tokens of the others. Arguments: see `HeadsDraft`."""

    published_format = "medusa"

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
            depth=depth,
            own_heads=own_heads,
            block_size=block_size,
            anchors=anchors,
            train_tables=train_tables,
            draft_vocabulary=draft_vocabulary,
        )
        D = self.backbone.hidden_size
        self.medusa_head = nn.ModuleList(nn.Sequential(*(Residual(D) for _ in range(depth))) for _ in range(block_size))

    @torch.no_grad()
    def start_from(self, target: Target) -> list[str]:
        """Every head starts as the target's own head on its state: no map adds anything yet."""
        names = [name for name, _ in self.named_parameters() if name.startswith("medusa_head.")]
        for name in names:
            self.get_parameter(name).zero_()
        return names

    def outputs(self, feature: Float[Tensor, "*b D"], previous: Int[Tensor, "*b K"]) -> Float[Tensor, "*b K D"]:
        return torch.stack([head(feature) for head in self.medusa_head[: previous.shape[-1]]], -2)

    def propose(
        self, state: State, anchor: Int[Tensor, " B"], sample: SampleFunction, slots: int | None = None
    ) -> Proposal:
        count = self.block_size if slots is None else min(slots, self.block_size)
        # Of the tokens before the slots only the number counts.
        hidden = self.outputs(state.feature, anchor[:, None].expand(-1, count))
        return self.draw_at_once(self.numbered(hidden), anchor, sample)
