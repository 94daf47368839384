"""MTP (DeepSeek-V3's multi-token prediction module as a draft): one shared module unrolled K times; K = 1 is MTP-1.

    h_0 = last at a-1                                               -> source
    h_k = layer(P [norm_h(h_{k-1}) ; norm_e(e(x_{a+k-1}))])          -> enter, recurrent.RecurrentDraft
    logits = lm_head(norm(h_k))                                     -> Draft.project

Deviations: one module serves every step, where DeepSeek-V3 trains a module a depth. Taps are not read; the target's
final hidden state is.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.blocks import SUPERVISIONS
from specbench.drafts.initialisation import as_mean, weigh
from specbench.drafts.recurrent import RecurrentDraft
from specbench.drafts.work import Work, of_parameters
from specbench.models.backbone import Backbone
from specbench.models.embedding_head import Tables
from specbench.models.target import Target
from specbench.ranges import Among, Count, Layers, Slots


class MTP(RecurrentDraft):
    """Recurrent draft with a projection of [feature ; embedding] into a standard layer. Arguments: see
    `RecurrentDraft`.
    """

    tap_modules = ()
    reads_taps = False
    reads_last = True

    def __init__(
        self,
        backbone: Backbone,
        tables: Tables,
        target_layer_ids: tuple[int, ...] | list[int],
        mask_token_id: int | None = None,
        *,
        layers: Layers = 1,
        block_size: Slots = 7,
        anchors: Count | None = None,
        supervision: Annotated[str, Among(SUPERVISIONS)] = "predicted",
        train_tables: bool = False,
        draft_vocabulary: Int[Tensor, " W"] | None = None,
    ):
        super().__init__(
            backbone,
            tables,
            target_layer_ids,
            mask_token_id,
            layers=layers,
            block_size=block_size,
            anchors=anchors,
            supervision=supervision,
            train_tables=train_tables,
            draft_vocabulary=draft_vocabulary,
        )
        D = self.backbone.hidden_size
        self.feature_norm, self.embedding_norm = self.backbone.norm(D), self.backbone.norm(D)
        self.proj = nn.Linear(2 * D, D, bias=False)

    def start_from(self, target: Target) -> list[str]:
        return [*super().start_from(target), *as_mean({"proj.weight": self.proj})]

    def start_previous(self, wired: bool) -> None:
        weigh(self.proj.weight, torch.eye(self.proj.out_features), False, wired)

    def work(self, length: int, anchors: int) -> Work:
        """The projection serves every step, too."""
        return super().work(length, anchors) + anchors * self.block_size * of_parameters(self.proj)

    def source(self, taps: Float[Tensor, "B T C D"], last: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return last

    def enter(self, feature: Float[Tensor, "*b D"], embedding: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        return self.proj(torch.cat([self.feature_norm(feature), self.embedding_norm(embedding)], -1))
