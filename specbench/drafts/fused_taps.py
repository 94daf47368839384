"""FusedTaps: recurrent drafts whose feature is one linear fusion of the target's taps (EAGLE-3, EAGLE-3.1, P-EAGLE).

    g_t = W_c [tap_1 ; ... ; tap_C]                              -> source
    g_t = W_c [RMSNorm_1(tap_1) ; ... ; RMSNorm_C(tap_C)]        -> fc_norm, tensors fc_norm.{i}.weight (D)
    g_t = W_c RMSNorm([tap_1 ; ... ; tap_C])                     -> norm_before_fc, tensor input_norm.weight (C D)

The layers read the feature beside the embedding of the next token. Axes: B batch, T tokens, C taps, D hidden.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.blocks import SUPERVISIONS
from specbench.drafts.initialisation import as_mean
from specbench.drafts.recurrent import RecurrentDraft
from specbench.models.backbone import Backbone
from specbench.models.embedding_head import Tables
from specbench.models.target import Target
from specbench.ranges import Among, Count, Layers, Slots


class FusedTaps(RecurrentDraft):
    """Base class of recurrent drafts on fused target features.

    Args:
        fc_norm: a norm of each tap before the fusion (EAGLE-3.1).
        norm_before_fc: one norm over all taps before the fusion (drafts of gpt-oss).
        layers: see `RecurrentDraft`, like all other arguments.

    Raises:
        ValueError: `fc_norm` and `norm_before_fc` are both set.
    """

    tap_modules = ("fc", "fc_norm", "input_norm")
    paired = True

    def __init__(
        self,
        backbone: Backbone,
        tables: Tables,
        target_layer_ids: tuple[int, ...] | list[int],
        mask_token_id: int | None = None,
        *,
        fc_norm: bool = False,
        norm_before_fc: bool = False,
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
        if fc_norm and norm_before_fc:
            raise ValueError("fc_norm=true and norm_before_fc=true: norm the taps one by one or all together, not both")
        D, eps, taps = self.backbone.hidden_size, self.backbone.norm_eps, len(self.target_layer_ids)
        self.fc = nn.Linear(taps * D, D, bias=False)
        self.fc_norm = nn.ModuleList(nn.RMSNorm(D, eps=eps) for _ in range(taps)) if fc_norm else None
        self.input_norm = nn.RMSNorm(taps * D, eps=eps) if norm_before_fc else None

    def start_from(self, target: Target) -> list[str]:
        return [*super().start_from(target), *as_mean({"fc.weight": self.fc})]

    def source(self, taps: Float[Tensor, "B T C D"], last: Float[Tensor, "B T D"] | None) -> Float[Tensor, "B T D"]:
        if self.fc_norm is not None:
            taps = torch.stack([norm(tap) for norm, tap in zip(self.fc_norm, taps.unbind(-2), strict=True)], -2)
        taps = taps.flatten(-2)
        return self.fc(taps if self.input_norm is None else self.input_norm(taps))

    def enter(self, feature: Float[Tensor, "*b D"], embedding: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        return feature
