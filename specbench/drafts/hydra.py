"""Hydra (Ankner et al. 2024, arXiv 2402.05109): heads on the target's last state that read the tokens before them.

    f = last at a-1                                                 -> heads.HeadsDraft
    y_k = [f ; e(x_a) ; ... ; e(x_{a+k-1})]                         -> Hydra.outputs
    h_k = C_k y_k + c_k + SiLU(W_k y_k + b_k)                       -> Chained
    then depth - 1 maps r(h) = h + SiLU(W h + b)                    -> heads.Residual
    logits_k = H_k h_k; H_k the target's head, or one a slot        -> HeadsDraft.project

Training reads the true tokens, decoding those that the heads before have proposed. The release adds up the heads'
cross-entropies without weights; its distillation is `soft_ce`.

Deviations: slots share the target's head unless `own_heads=true`, the published form, whose heads have a bias here only
if the target's has. `start=target` sets W_k = 0 as published and C_k = [I, small], where the release leaves C_k random.
Hydra++'s decoder layer before the heads (its "prefix attention") and its noise on embeddings are not here; its four
maps a head are `depth=4`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.drafts.draft import Proposal, SampleFunction, State
from specbench.drafts.heads import HeadsDraft, Residual
from specbench.models.backbone import Backbone
from specbench.models.embedding_head import Tables
from specbench.models.target import Target
from specbench.ranges import Count, Slots


class Chained(nn.Module):
    """C y + c + SiLU(W y + b) of a state and `tokens` embeddings side by side."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.linear = nn.Linear((1 + tokens) * width, width)
        self.shortcut = nn.Linear((1 + tokens) * width, width)

    def forward(self, y: Float[Tensor, "*b Y"]) -> Float[Tensor, "*b D"]:
        return self.shortcut(y) + F.silu(self.linear(y))


class Hydra(HeadsDraft):
    """Chained heads: a slot sees the tokens before it, by their embeddings. Arguments: see `HeadsDraft`."""

    reads_previous = True

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
        self.hydra_head = nn.ModuleList(
            nn.Sequential(Chained(D, k), *(Residual(D) for _ in range(depth - 1))) for k in range(1, block_size + 1)
        )

    @torch.no_grad()
    def start_from(self, target: Target) -> list[str]:
        """Every head starts as the target's own head on its state, and what the embeddings add starts small."""
        names = [name for name, _ in self.named_parameters() if name.startswith("hydra_head.")]
        for name in names:
            parameter = self.get_parameter(name)
            if name.endswith("shortcut.weight"):
                D = len(parameter)
                parameter[:, :D] = torch.eye(D)
                parameter[:, D:].normal_(std=0.02)
            else:
                parameter.zero_()
        return names

    def outputs(self, feature: Float[Tensor, "*b D"], previous: Int[Tensor, "*b K"]) -> Float[Tensor, "*b K D"]:
        K = previous.shape[-1]
        joined = torch.cat([feature[..., None, :], self.tables.embed(previous)], -2).flatten(-2)
        D = feature.shape[-1]
        return torch.stack([self.hydra_head[k](joined[..., : (2 + k) * D]) for k in range(K)], -2)

    def propose(
        self, state: State, anchor: Int[Tensor, " B"], sample: SampleFunction, slots: int | None = None
    ) -> Proposal:
        parts, count = [state.feature], self.block_size if slots is None else min(slots, self.block_size)

        def logits(k: int, previous: list[Tensor]) -> Tensor:
            parts.append(self.tables.embed(previous[-1]))
            return self.project(self.numbered(self.hydra_head[k](torch.cat(parts, -1))[:, None], k))

        return self.draw_each(count, anchor, sample, logits)
