"""EAGLE-3 (Li et al., arXiv 2503.01840): a recurrent draft on fused target features, trained by unrolling.

    g_t = W_c taps_t, no norm                                        -> fused_taps.FusedTaps
    y = [input_norm(e) ; feature_norm(f)] -> q, k, v; residual on f  -> backbone.Layer(paired=True)
    training-time test: K unrolled steps                             -> recurrent.RecurrentDraft
    logits = lm_head(norm(f'))                                       -> Draft.project

EAGLE-3.1 (arXiv 2605.09992; speculators pull request 610, vLLM pull requests 42764 and 46488) and the drafts of
gpt-oss:

    norms of the taps before the fusion                              -> fused_taps.FusedTaps: fc_norm, norm_before_fc
    o_k = norm(f'_k); step k+1 reads o_k instead of f'_k             -> norm_output

Deviations: drafts of more than one layer pair every layer with the embedding; released checkpoints have one layer.
"""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Int
from torch import Tensor

from specbench.blocks import SUPERVISIONS
from specbench.drafts.fused_taps import FusedTaps
from specbench.models.backbone import Backbone
from specbench.models.embedding_head import Tables
from specbench.ranges import Among, Count, Layers, Slots


class Eagle3(FusedTaps):
    """Recurrent draft on fused target features.

    Args:
        fc_norm: a norm of each tap before the fusion (EAGLE-3.1).
        norm_before_fc: one norm over all taps before the fusion (drafts of gpt-oss).
        norm_output: a step passes its normed output to the next step (EAGLE-3.1); False: its output before the norm.
        layers: number of layers, each of which reads the token embedding; published drafts have one.
        supervision: see `RecurrentDraft`, like all other arguments.

    Raises:
        ValueError: `fc_norm` and `norm_before_fc` are both set.
    """

    published_format = "eagle3"
    halts_on_stop = True

    def __init__(
        self,
        backbone: Backbone,
        tables: Tables,
        target_layer_ids: tuple[int, ...] | list[int],
        mask_token_id: int | None = None,
        *,
        fc_norm: bool = False,
        norm_before_fc: bool = False,
        norm_output: bool = False,
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
            fc_norm=fc_norm,
            norm_before_fc=norm_before_fc,
            layers=layers,
            block_size=block_size,
            anchors=anchors,
            supervision=supervision,
            train_tables=train_tables,
            draft_vocabulary=draft_vocabulary,
        )
        self.feeds_normed_output = norm_output
