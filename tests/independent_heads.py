"""A method that shares nothing with the block-parallel and the recurrent drafts: K independent heads on one state.

It is the example of a class of the contract itself, as Medusa (Cai et al. 2024, arXiv 2401.10774) is one:

    h_k = f + s_k W_k SiLU(V_k [f ; e(x_a)]),  f the target's final state at a-1, x_a the anchor
    logits_k = lm_head(h_k)

The class and its YAML are texts, so that a test can place them in a package and a folder of any name.
"""

from __future__ import annotations

from pathlib import Path

CLASS = '''"""K independent heads: h_k = f + s_k W_k SiLU(V_k [f ; e(anchor)]). Deviations: none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from specbench.blocks import assemble, take
from specbench.drafts.draft import Draft
from specbench.ranges import Count, Slots


class IndependentHeads(Draft):
    """One pair of maps a slot; `width` is what lies between them. `confident`: an acceptance logit a slot."""

    reads_taps = False
    reads_last = True

    def __init__(
        self,
        backbone,
        tables,
        target_layer_ids,
        mask_token_id=None,
        *,
        width: Count = 32,
        confident: bool = False,
        block_size: Slots = 4,
        anchors: Count | None = None,
        train_tables: bool = False,
        draft_vocabulary=None,
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
        D = backbone.hidden_size
        self.enter = nn.ModuleList(nn.Linear(2 * D, width) for _ in range(block_size))
        self.leave = nn.ModuleList(nn.Linear(width, D, bias=False) for _ in range(block_size))
        self.scale = nn.Parameter(torch.ones(block_size))
        self.register_buffer("slots", torch.arange(block_size))
        self.sure = nn.Linear(D, 1) if confident else None

    def heads(self, feature, anchor, slots):
        """Features (..., D) and anchors (...) -> (..., K, D)."""
        x = torch.cat([feature, self.tables.embed(anchor)], -1)
        parts = zip(self.enter[:slots], self.leave[:slots], self.scale[:slots], strict=True)
        return torch.stack([feature + scale * leave(F.silu(enter(x))) for enter, leave, scale in parts], -2)

    def forward(self, batch):
        anchors = batch.anchors.clamp_min(0)
        feature = take(batch.last, (anchors - 1).clamp_min(0)).to(self.scale.dtype)
        return assemble(batch, self.heads(feature, take(batch.tokens, anchors), self.block_size))

    def commit(self, state, context, tokens):
        rows = torch.arange(len(tokens), device=tokens.device)
        state.feature = context.last[rows, context.lengths - 1]
        return state

    def propose(self, state, anchor, sample, slots=None):
        return self.draw_at_once(self.heads(state.feature, anchor, slots or self.block_size), anchor, sample)

    def confidence(self, hidden, previous):
        return None if self.sure is None else self.sure(hidden).squeeze(-1)
'''

SETTINGS = """# K independent heads on the target's final state.
name: independent_heads
draft:
  _target_: {package}.independent_heads.IndependentHeads
  width: 64                      # between the two maps of a head
  confident: true                # an acceptance logit a slot
  block_size: 4                  # slots K of a block
  anchors: 512                   # anchors a conversation
  train_tables: false            # train the draft's own copy of embedding and head
backbone: null                   # a family of specbench.models.backbone; null: the target's own, else qwen3
vocabulary: null                 # tokens of a reduced draft vocabulary, the most frequent of the answers; null: all
window: null                     # not used: a head sees one state
objective:
  ce: 0.5
  tv: 0.5
  confidence: 1.0
  slot_weight: {{exp: 4.0}}
sizes:                           # of smaller drafts, by trainer; with any other trainer, the sizes above
  laptop: {{width: 32, anchors: 24}}
  smoke: {{width: 16, anchors: 8}}
"""


def write(package: Path, name: str, options: Path) -> Path:
    """The two files: the class in the folder `package`, imported as `name`, and its YAML in the folder `options`, which
    is returned."""
    (package / "independent_heads.py").write_text(CLASS, encoding="utf-8")
    settings = options / "independent_heads.yaml"
    settings.write_text(SETTINGS.format(package=name), encoding="utf-8")
    return settings
