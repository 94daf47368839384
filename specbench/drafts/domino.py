"""Domino (arXiv 2605.29707): a block-parallel draft whose logits a recurrent net over the block's tokens corrects.

    context features, block attention, base logits u_k               -> parallel.ParallelDraft
    g_k = GRU(E(x_0), ..., E(x_{k-1})), one layer, no bias, width G  -> PrefixGRU
    r_k = SiLU(W_1 [h_k ; g_k]), W_1 (R, D + G)                      -> Domino.latent
    logits_k = u_k + W_2 r_k for k > prefix, else u_k, W_2 (V, R)    -> Domino.features, ParallelDraft.project
    L = (1 - lam) CE_w(logits) + lam CE_w(u), lam from 1 to 0        -> objective: base

x_0 is the anchor, x_1, x_2, ... the tokens behind it. Slots are counted from 1: the first corrected one is prefix + 1
whether the anchor's output predicts or not (`shift_label` of the published format). Published code counts the outputs
of a block from 0: there it is `prefix` with shift_label and `prefix + 1` without.

Deviations: none in the forward pass. The correction is added after the family's logit soft-cap, and E has the scale of
the target's embedding. Released code proposes one token less than a block with shift_label predicts; here all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.drafts.draft import Proposal, SampleFunction
from specbench.drafts.parallel import ParallelDraft
from specbench.models.backbone import Backbone
from specbench.models.embedding_head import Tables
from specbench.ranges import Count, Layers, Natural, Slots


class PrefixGRU(nn.Module):
    """A GRU of one layer without biases, with the parameters' names and order of gates (reset, update, new) of
    torch.nn.GRU; written out, so that it runs in every precision and under autocast on every device."""

    def __init__(self, input_size: int, size: int):
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * size, input_size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * size, size))
        for weight in (self.weight_ih_l0, self.weight_hh_l0):
            nn.init.uniform_(weight, -(size**-0.5), size**-0.5)

    def enter(self, embedded: Float[Tensor, "*b D"]) -> Float[Tensor, "*b H"]:
        """What the three gates read of an input."""
        return F.linear(embedded, self.weight_ih_l0)

    def step(self, state: Float[Tensor, "*b G"] | None, entered: Float[Tensor, "*b H"]) -> Float[Tensor, "*b G"]:
        """The next state; None is the state of zeros before the first input."""
        if state is None:
            state = entered.new_zeros(*entered.shape[:-1], entered.shape[-1] // 3)
        reset, update, new = entered.chunk(3, -1)
        own_reset, own_update, own_new = F.linear(state, self.weight_hh_l0).chunk(3, -1)
        update = torch.sigmoid(update + own_update)
        new = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
        return (1 - update) * new + update * state

    def forward(self, embedded: Float[Tensor, "*b K D"]) -> Float[Tensor, "*b K G"]:
        """The state after each input."""
        state, states = None, []
        for entered in self.enter(embedded).unbind(-2):
            state = self.step(state, entered)
            states.append(state)
        return torch.stack(states, -2)


class Domino(ParallelDraft):
    """Block-parallel draft with a recurrent correction of its logits.

    Args:
        correction_rank: R of the correction (`emb_dim` of the published format).
        gru_size: width G of the recurrent net.
        prefix: slots at the start of a block whose logits are not corrected.
        layers: see `ParallelDraft`, like all other arguments.

    Raises:
        ValueError: `prefix` leaves no slot to correct.
    """

    published_format = "domino"

    def __init__(
        self,
        backbone: Backbone,
        tables: Tables,
        target_layer_ids: tuple[int, ...] | list[int],
        mask_token_id: int,
        *,
        correction_rank: Count = 256,
        gru_size: Count = 1024,
        prefix: Natural = 1,
        layers: Layers = 5,
        block_size: Slots = 16,
        anchors: Count | None = 512,
        sample_from_anchor: bool = True,
        checkpointing: bool = False,
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
            sample_from_anchor=sample_from_anchor,
            checkpointing=checkpointing,
            train_tables=train_tables,
            draft_vocabulary=draft_vocabulary,
        )
        if not 0 <= prefix < block_size:
            raise ValueError(f"prefix={prefix} leaves no slot of {block_size} to correct: give less than block_size")
        D = self.backbone.hidden_size
        self.prefix, self.gru_size, self.rank = prefix, gru_size, correction_rank
        self.prefix_gru = PrefixGRU(D, gru_size)
        self.embed_proj = nn.Sequential(
            nn.Linear(D + gru_size, correction_rank, bias=False),
            nn.SiLU(),
            nn.Linear(correction_rank, len(self.tables.head), bias=False),
        )

    @property
    def correction(self) -> nn.Parameter:
        return self.embed_proj[2].weight

    def latent(self, hidden: Float[Tensor, "*b D"], state: Float[Tensor, "*b G"]) -> Float[Tensor, "*b R"]:
        return self.embed_proj[:2](torch.cat([hidden, state], -1))

    def features(self, hidden: Float[Tensor, "*b K D"], previous: Int[Tensor, "*b K"]) -> Float[Tensor, "*b K F"]:
        """[hidden ; latent]; the latent of slots that are not corrected is zero."""
        latent = self.latent(hidden, self.prefix_gru(self.tables.embed(previous).to(hidden.dtype)))
        corrected = torch.arange(hidden.shape[-2], device=hidden.device) >= self.prefix
        return torch.cat([hidden, latent * corrected[:, None]], -1)

    def draw(self, hidden: Float[Tensor, "B K D"], anchor: Int[Tensor, " B"], sample: SampleFunction) -> Proposal:
        """Base logits of all slots at once, then one low-rank bias per slot, from left to right."""
        base, state = self.tables.logits(hidden), None

        def logits(k: int, previous: list[Tensor]) -> Tensor:
            nonlocal state
            entered = self.prefix_gru.enter(self.tables.embed(previous[-1]).to(hidden.dtype))
            state = self.prefix_gru.step(state, entered)
            own = base[:, k : k + 1]
            return (
                own if k < self.prefix else own + self.embed_proj[2](self.latent(hidden[:, k : k + 1], state[:, None]))
            )

        return self.draw_each(hidden.shape[1], anchor, sample, logits)
