"""DFlash2 (z-lab/dflash; inco.ai/blog/dflash2): a block-parallel draft with convolutions along the block and a selector
of candidates.

    y_t = (b_0 + d_0(n_t)) z_t + (b_1 + d_1(n_t)) z_{t-1}            -> TwoTaps
        n: input of the sublayer; z = n before the sublayer, its output after it; z_{-1} = 0 at the block's start;
        b (D) per tap, d = W n with one number for each group of channels
    around attention and feed-forward of every layer                 -> ConvolvedLayer
    u_k = lm_head(h_k); C_k: the top-k tokens of u_k                 -> DFlash2.project_base, DFlash2.restricted
    S_k(a, b) = u_k(b) + <P[a] * (H h_k), Q[b]>, a the token before  -> DFlash2.features, DFlash2.restricted
    p_k = softmax(S_k) on C_k, 0 elsewhere                           -> DFlash2.project (-inf outside of C_k)
    L = CE_w(u) + c CE_w(p)                                          -> objective: ce, base

The law p_k is what proposals are drawn from and what verification reads, so answers keep the target's distribution.
At initialisation b_0 = 1, b_1 = 0, W = 0 and Q = 0: the draft is DFlash, restricted to its candidates.

Deviations: a label outside of C_k adds nothing to CE_w(p), but its slot keeps its weight in the divisor (released code
divides that term by the weights of the other slots, or adds the label to C_k). Top-k and top-p of sampling apply to the
draft too, as for every method here. In families with norms after a sublayer the convolution comes before that norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.drafts.draft import Proposal, SampleFunction
from specbench.drafts.parallel import ParallelDraft
from specbench.drafts.work import Work
from specbench.models.backbone import Backbone, Layer
from specbench.models.embedding_head import Tables
from specbench.ranges import Count, Layers, Slots

TAPS = 2  # positions that a convolution reads: its own and the one before
BEFORE, AFTER = 0, 1  # the sublayer


class TwoTaps(nn.Module):
    """The two convolutions around a sublayer. Both take their changing part from the sublayer's input, by one map whose
    rows are ordered by side, tap and group."""

    def __init__(self, hidden_size: int, group: int):
        super().__init__()
        self.group, groups = group, hidden_size // group
        self.base_kernel = nn.Parameter(torch.zeros(2, TAPS, hidden_size))
        self.base_kernel.data[:, 0] = 1.0
        self.kernel_projection = nn.Linear(hidden_size, 2 * TAPS * groups, bias=False)
        nn.init.zeros_(self.kernel_projection.weight)

    def forward(
        self, side: int, read: Float[Tensor, "*b I D"], values: Float[Tensor, "*b I D"]
    ) -> Float[Tensor, "*b I D"]:
        """Convolve `values` along the block; `read` is the sublayer's input."""
        rows = self.kernel_projection.weight.chunk(2)[side]
        changing = F.linear(read, rows).unflatten(-1, (TAPS, -1)).repeat_interleave(self.group, -1)
        own, before = (self.base_kernel[side].to(values.dtype) + changing).unbind(-2)
        return own * values + before * F.pad(values[..., :-1, :], (0, 0, 1, 0))


class ConvolvedLayer(Layer):
    """A decoder layer with convolutions along the block around both sublayers, which `convolve` adds."""

    def convolve(self, group: int) -> None:
        D = self.input_layernorm.weight.shape[0]
        self.attention_conv, self.mlp_conv = TwoTaps(D, group), TwoTaps(D, group)

    def normed(self, x: Float[Tensor, "*b D"], embedding: Float[Tensor, "*b D"] | None = None) -> Tensor:
        read = super().normed(x, embedding)
        return self.attention_conv(BEFORE, read, read)

    def attended(self, x: Float[Tensor, "*b D"], seen: Float[Tensor, "*b H d"]) -> Float[Tensor, "*b D"]:
        return self.attention_conv(AFTER, super().normed(x), super().attended(x, seen))

    def fed_forward(self, x: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        return self.mlp_conv(AFTER, x, super().fed_forward(self.mlp_conv(BEFORE, x, x)))


class CandidateSelector(nn.Module):
    """Codebooks P and Q and the map H of the pair scores; Q has a row for each token of the draft's vocabulary."""

    def __init__(self, vocab_size: int, draft_vocab_size: int, hidden_size: int, rank: int):
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(vocab_size, rank).normal_(std=0.02))
        self.successor_codebook = nn.Parameter(torch.zeros(draft_vocab_size, rank))
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)

    def forward(self, hidden: Float[Tensor, "*b D"], previous: Int[Tensor, "*b"]) -> Float[Tensor, "*b R"]:
        """P[a] * (H h): what a candidate's row of Q is multiplied with."""
        return F.embedding(previous, self.predecessor_codebook) * self.hidden_projection(hidden)


class DFlash2(ParallelDraft):
    """Block-parallel draft with convolutions along the block and a selector of candidates.

    Args:
        conv_group: channels that share one changing coefficient of a convolution.
        selector_rank: rank r of the pair scores.
        candidates: tokens that a slot can propose (at most all of the draft's vocabulary).
        detach_base: the loss of the selected law does not change the base logits (a proposal in SpecForge).
        layers: see `ParallelDraft`, like all other arguments.

    Raises:
        ValueError: the hidden size is not a multiple of `conv_group`.
    """

    published_format = "dflash2"
    layer_kind = ConvolvedLayer

    def __init__(
        self,
        backbone: Backbone,
        tables: Tables,
        target_layer_ids: tuple[int, ...] | list[int],
        mask_token_id: int,
        *,
        conv_group: Count = 16,
        selector_rank: Count = 256,
        candidates: Count = 16,
        detach_base: bool = False,
        layers: Layers = 5,
        block_size: Slots = 15,
        anchors: Count | None = 256,
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
        D, V = self.backbone.hidden_size, self.backbone.vocab_size
        if D % conv_group:
            raise ValueError(f"conv_group={conv_group} does not divide the hidden size {D}: give a divisor")
        for layer in self.layers:
            layer.convolve(conv_group)
        self.conv_group, self.selector_rank, self.detach_base = conv_group, selector_rank, detach_base
        self.candidates = candidates
        self.candidate_selector = CandidateSelector(V, len(self.tables.head), D, selector_rank)

    @property
    def keeps_first_weights(self) -> tuple[str, ...]:
        """The convolutions begin as the identity."""
        return tuple(name for name, _ in self.named_modules() if name.endswith(".kernel_projection"))

    @property
    def correction(self) -> nn.Parameter:
        return self.candidate_selector.successor_codebook

    def features(self, hidden: Float[Tensor, "*b K D"], previous: Int[Tensor, "*b K"]) -> Float[Tensor, "*b K F"]:
        return torch.cat([hidden, self.candidate_selector(hidden, previous)], -1)

    def project(self, features: Float[Tensor, "*r F"]) -> Float[Tensor, "*r W"]:
        return self.restricted(self.project_base(features), features[..., self.backbone.hidden_size :])

    def restricted(self, base: Float[Tensor, "*r W"], latent: Float[Tensor, "*r R"]) -> Float[Tensor, "*r W"]:
        """Scores S of the candidates, -inf for every other token."""
        unary, chosen = base.topk(min(self.candidates, base.shape[-1]), -1)
        unary = unary.detach() if self.detach_base else unary
        pair = (F.embedding(chosen, self.correction) @ latent[..., None]).squeeze(-1)
        return torch.full_like(base, -torch.inf).scatter(-1, chosen, (unary + pair).to(base.dtype))

    def draw(self, hidden: Float[Tensor, "B K D"], anchor: Int[Tensor, " B"], sample: SampleFunction) -> Proposal:
        """Base logits of all slots at once, then the selector from left to right."""
        base = self.tables.logits(hidden)

        def logits(k: int, previous: list[Tensor]) -> Tensor:
            own = slice(k, k + 1)
            return self.restricted(base[:, own], self.candidate_selector(hidden[:, own], previous[-1][:, None]))

        return self.draw_each(hidden.shape[1], anchor, sample, logits)

    def work(self, length: int, anchors: int) -> Work:
        """The convolutions keep their inputs and coefficients: about five numbers a channel in each of four."""
        kept = len(self.layers) * 20 * self.backbone.hidden_size
        return super().work(length, anchors) + anchors * self.inputs * Work(0 if self.checkpointing else kept, 0)
