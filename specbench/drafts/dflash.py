"""DFlash (Chen et al. 2026, arXiv 2602.06036): a block-parallel draft with independent slots.

    context features, block attention   -> parallel.ParallelDraft
    U_k = lm_head(h_k)                   -> Draft.project
    slots are drawn independently        -> draw

Deviations: the published table's DFlash predicts slot 1 from the anchor's own output (`sample_from_anchor: true`, the
default here); the original predicts at the mask tokens only (`sample_from_anchor: false`). Both exist in released
checkpoints.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from specbench.drafts.draft import Proposal, SampleFunction
from specbench.drafts.parallel import ParallelDraft


class DFlash(ParallelDraft):
    """Block-parallel draft with independent slots, without Markov and confidence head. Arguments: see
    `ParallelDraft`.
    """

    published_format = "dflash"

    def draw(self, hidden: Float[Tensor, "B K D"], anchor: Int[Tensor, " B"], sample: SampleFunction) -> Proposal:
        return self.draw_at_once(hidden, anchor, sample)
