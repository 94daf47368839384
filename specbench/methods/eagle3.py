"""EAGLE-3 (Li et al., arXiv 2503.01840): a recurrent draft on fused target features, trained by unrolling.

    g_t = W_c taps_t, no norm                                        -> source
    y = [input_norm(e) ; feature_norm(f)] -> q, k, v; residual on f  -> backbone.Layer(paired=True)
    training-time test: K unrolled steps                             -> recurrent.RecurrentDraft
    logits = lm_head(norm(f'))                                       -> Draft.project

Deviations: drafts of more than one layer pair every layer with the embedding; released checkpoints have one layer.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from specbench.methods.recurrent import RecurrentDraft


class Eagle3(RecurrentDraft):
    """Feature fusion over C taps, then one paired layer."""

    paired = True
    halts_on_stop = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        D = self.backbone.hidden_size
        self.fc = nn.Linear(len(self.target_layer_ids) * D, D, bias=False)

    def source(self, taps: Float[Tensor, "B T C D"], last: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.fc(taps.flatten(-2))

    def enter(self, feature: Float[Tensor, "*b D"], embedding: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        return feature
