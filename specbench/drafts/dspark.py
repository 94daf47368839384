"""DSpark (Cheng et al. 2026): a block-parallel draft with a low-rank Markov head between neighbouring slots.

    context features, block attention (eq. 2, 3)            -> parallel.ParallelDraft
    logits_k = U_k + B_k (eq. 4)                            -> ParallelDraft.project
    B_k = W1[x_{k-1}] W2 (eq. 5)                            -> MarkovHead, kind "vanilla"
    B_k = (sigmoid(G [h_k ; W1[x]] + b) * W1[x]) W2         -> MarkovHead, kind "gated"
    s_k = sigmoid(g) s_{k-1} + (1 - sigmoid(g)) tanh(c), B_k = W2 tanh(o) (eq. 6) -> MarkovHead, kind "rnn"
    c_k = sigmoid(w [h_k ; W1[x_{k-1}]] + b) (eq. 7)        -> ConfidenceHead

Deviations from the paper: none in the forward pass. The Markov bias is added after the family's logit soft-cap.
`W2 = 0` at initialisation, so training starts from the unbiased draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench import fast
from specbench.blocks import Batch, Blocks, slot_positions, take
from specbench.drafts.draft import Proposal, SampleFunction, State
from specbench.drafts.expansion import Expansion
from specbench.drafts.parallel import ParallelDraft
from specbench.models.backbone import Backbone
from specbench.models.embedding_head import Tables
from specbench.models.fast.packed_products import Kept
from specbench.models.fast.projection import SharedLookups, return_memory
from specbench.ranges import Among, Count, LayerId, Layers, Rank, Slots

MARKOV_HEADS = ("vanilla", "gated", "rnn")
# Bytes of an embedding's gradient above which freed memory is returned first, which takes a few milliseconds.
LARGE_GRADIENT = 64 * 2**20


class MarkovHead(nn.Module):
    """Previous tokens (and hidden states) -> latent (..., K, R); `markov_w2` turns a latent into a vocabulary bias."""

    def __init__(self, kind: str, rank: int, vocab_size: int, draft_vocab_size: int, hidden_size: int):
        super().__init__()
        if kind not in MARKOV_HEADS:
            raise ValueError(f"markov_head={kind!r}: choose one of {', '.join(MARKOV_HEADS)}")
        self.kind, self.rank = kind, rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)
        nn.init.zeros_(self.markov_w2.weight)
        self.product = Kept()
        self.gate_proj = nn.Linear(hidden_size + rank, rank) if kind == "gated" else None
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank) if kind == "rnn" else None

    def step(self, state: Tensor | None, hidden: Float[Tensor, "*b D"], previous: Int[Tensor, "*b"]):
        """One slot: (state, hidden, previous token) -> (state, latent)."""
        return self.mix(state, hidden, F.embedding(previous, self.markov_w1.weight))

    def mix(self, state: Tensor | None, hidden: Float[Tensor, "*b D"], embedded: Float[Tensor, "*b R"]):
        """`step` from the previous token's embedding."""
        if self.kind == "vanilla":
            return None, embedded
        if self.kind == "gated":
            return None, torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], -1))) * embedded
        state = torch.zeros_like(embedded) if state is None else state
        gate, candidate, out = self.joint_proj(torch.cat([state, embedded, hidden], -1)).chunk(3, -1)
        gate = torch.sigmoid(gate)
        return gate * state + (1 - gate) * torch.tanh(candidate), torch.tanh(out)

    def forward(self, hidden: Float[Tensor, "*b K D"], previous: Int[Tensor, "*b K"]) -> Float[Tensor, "*b K R"]:
        # One lookup for all slots, because each lookup makes a gradient as large as the whole embedding.
        embedded = self.markov_w1(previous)
        if self.kind != "rnn":
            return self.mix(None, hidden, embedded)[1]
        state, latents = None, []
        for k in range(hidden.shape[-2]):
            state, latent = self.mix(state, hidden[..., k, :], embedded[..., k, :])
            latents.append(latent)
        return torch.stack(latents, -2)


class ConfidenceHead(nn.Module):
    """Acceptance logit of a slot from its hidden state, with or without the Markov embedding of the token before."""

    def __init__(self, input_size: int):
        super().__init__()
        self.proj = nn.Linear(input_size, 1)

    def forward(self, x: Float[Tensor, "*b X"]) -> Float[Tensor, "*b"]:
        return self.proj(x).squeeze(-1)


class DSpark(ParallelDraft):
    """Block-parallel draft with a Markov head and a confidence head.

    Args:
        markov_head: "vanilla" (eq. 5), "gated" (released code) or "rnn" (eq. 6).
        markov_rank: rank R of the Markov head; 0: no Markov head (DFlash with a confidence head).
        confidence_head: predict the acceptance of each slot (eq. 7).
        confidence_with_markov: the confidence head also reads the Markov embedding of the previous token.
        layers: see `ParallelDraft`, like all other arguments.

    Raises:
        ValueError: an unknown `markov_head`, a negative `markov_rank`, or `confidence_with_markov` without a Markov
            head.
    """

    published_format = "dspark"
    # Zero, so that training starts from the unbiased draft.
    keeps_first_weights = ("markov_head.markov_w2",)

    def __init__(
        self,
        backbone: Backbone,
        tables: Tables,
        target_layer_ids: tuple[int, ...] | list[int],
        mask_token_id: int,
        *,
        markov_head: Annotated[str, Among(MARKOV_HEADS)] = "vanilla",
        markov_rank: Rank = 256,
        confidence_head: bool = True,
        confidence_with_markov: bool = True,
        layers: Layers = 5,
        block_size: Slots = 7,
        anchors: Count | None = 512,
        sample_from_anchor: bool = True,
        causal_block: bool = False,
        full_layers: Sequence[LayerId] = (),
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
            causal_block=causal_block,
            full_layers=full_layers,
            checkpointing=checkpointing,
            train_tables=train_tables,
            draft_vocabulary=draft_vocabulary,
        )
        D, V, W = self.backbone.hidden_size, self.backbone.vocab_size, len(self.tables.head)
        if markov_rank < 0:
            raise ValueError(f"markov_rank={markov_rank}: give a rank of at least 0 (0: no Markov head)")
        if markov_rank == 0 and confidence_head and confidence_with_markov:
            raise ValueError("confidence_with_markov=true needs a Markov head; set markov_rank or turn it off")
        self.markov_head = MarkovHead(markov_head, markov_rank, V, W, D) if markov_rank else None
        self.confidence_with_markov = confidence_with_markov
        size = D + (markov_rank if confidence_with_markov else 0)
        self.confidence_head = ConfidenceHead(size) if confidence_head else None

    def forward(self, batch: Batch) -> Blocks:
        """The Markov embeddings are looked up first, so that their gradient, which is as large as the vocabulary, is
        computed last, when the activations of the layers are freed."""
        if (
            not fast.enabled()
            or self.markov_head is None
            or torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
        ):
            return super().forward(batch)
        previous = take(batch.tokens, slot_positions(batch, self.block_size)[1])
        with SharedLookups() as lookups:
            embedded, table = self.markov_head.markov_w1(previous), self.markov_head.markov_w1.weight
        if embedded.requires_grad and table.nbytes >= LARGE_GRADIENT:
            embedded.register_hook(return_memory)
        return replace(super().forward(batch), previous=previous, lookups=lookups)

    def features(self, hidden: Float[Tensor, "*b K D"], previous: Int[Tensor, "*b K"]) -> Float[Tensor, "*b K F"]:
        """[hidden ; Markov latent]: the vocabulary-sized work is left to `project`."""
        return hidden if self.markov_head is None else torch.cat([hidden, self.markov_head(hidden, previous)], -1)

    @property
    def correction(self) -> nn.Parameter | None:
        return None if self.markov_head is None else self.markov_head.markov_w2.weight

    def confidence(self, hidden: Float[Tensor, "*b K D"], previous: Int[Tensor, "*b K"]) -> Tensor | None:
        if self.confidence_head is None:
            return None
        if not self.confidence_with_markov:
            return self.confidence_head(hidden)
        return self.confidence_head(torch.cat([hidden, self.markov_head.markov_w1(previous)], -1))

    def draw(self, hidden: Float[Tensor, "B K D"], anchor: Int[Tensor, " B"], sample: SampleFunction) -> Proposal:
        """Base logits of all slots at once, then one low-rank bias per slot, from left to right."""
        if self.markov_head is None:
            return self.draw_at_once(hidden, anchor, sample)
        base, slots = self.tables.logits(hidden).unbind(1), hidden.unbind(1)
        head, state = self.markov_head, None

        def logits(k: int, previous: list[Tensor]) -> Tensor:
            nonlocal state
            state, latent = head.step(state, slots[k], previous[-1])
            return head.product.added(base[k], latent, head.markov_w2.weight)[:, None]

        return self.scored(self.draw_each(hidden.shape[1], anchor, sample, logits), hidden, anchor)

    def expand(self, state: State, anchor: Int[Tensor, " B"], slots: int | None = None) -> Expansion:
        """Base logits of all slots once, and the bias of the token before for each node."""
        if self.markov_head is None or type(self).draw is not DSpark.draw:
            return super().expand(state, anchor, slots)
        return Biased(self.markov_head, self.block(state, anchor)[:, :slots], anchor, self)


class Biased:
    """The expansion of a draft with a Markov head."""

    marginals = None

    def __init__(self, head: MarkovHead, hidden: Float[Tensor, "B K D"], anchor: Int[Tensor, " B"], draft: DSpark):
        self.head, self.hidden, self.anchor, self.draft = head, hidden, anchor[:, None], draft
        self.base, self.depth, self.level = draft.tables.logits(hidden), hidden.shape[1], 0
        self.memory: Tensor | None = None

    def root(self) -> Float[Tensor, "B 1 W"]:
        return self._slot(self.anchor)

    def below(self, rows: Int[Tensor, "B M"], parents: Int[Tensor, "B M"]) -> Float[Tensor, "B M W"]:
        if self.memory is not None:
            self.memory = self.memory.gather(1, parents[..., None].expand(-1, -1, self.memory.shape[2]))
        self.level += 1
        return self._slot(self.draft.to_target(rows))

    def _slot(self, previous: Int[Tensor, "B M"]) -> Float[Tensor, "B M W"]:
        hidden = self.hidden[:, self.level, None].expand(-1, previous.shape[1], -1)
        self.memory, latent = self.head.step(self.memory, hidden, previous)
        return self.base[:, self.level, None] + latent @ self.head.markov_w2.weight.t()
