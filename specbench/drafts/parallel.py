"""ParallelDraft: anchor in, one forward of K slots out (DFlash, DSpark, JetSpec).

Shared equations: ctx = RMSNorm(W_c taps) (DSpark eq. 2); keys and values of context and block come from the same
projections (eq. 3); every slot sees the context strictly before the anchor and its whole own block, both ways, or
with a causal block (JetSpec; z-lab's sliding layers) its own block up to itself.

Axes: B batch, T tokens, N blocks, K slots, I inputs of a block, C taps, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench import fast
from specbench.blocks import PADDING, Batch, Blocks, Context, assemble, take
from specbench.drafts.draft import Draft, Proposal, SampleFunction, State
from specbench.drafts.expansion import Expansion, ExpansionByPath
from specbench.drafts.initialisation import as_mean, last_layers
from specbench.drafts.work import Work, keys_seen, of_context, of_layer
from specbench.models.attention import Span, Visibility, attend, attend_flex, attend_spans, block_mask, spans
from specbench.models.backbone import Backbone, Layer, RotaryEmbedding
from specbench.models.embedding_head import Tables
from specbench.models.fast.folded_layers import Stack
from specbench.models.fast.packed_products import Kept
from specbench.models.fast.projection import add_linear_
from specbench.models.kv_cache import KVCache
from specbench.models.target import Target
from specbench.ranges import Count, LayerId, Layers, Slots

# Cost of a block in a layer besides its context, counted in context keys. Many small pieces cost more than one large
# piece, so they must save half (8 conversations of 130 to 250 tokens: 0.19 s per step in one piece, 0.27 s in eight).
LAYER_KEYS = 256


def _work(span: Span) -> int:
    return (span.last_block - span.first_block) * (span.last - span.first + LAYER_KEYS)


class ParallelDraft(Draft):
    """Base class of block-parallel drafts: one forward pass for all K slots.

    Args:
        mask_token_id: input token of slots to be predicted.
        layers: number of decoder layers.
        block_size: slots K of a block.
        anchors: anchors that training draws from a conversation. None: every valid one.
        sample_from_anchor: the output at the anchor predicts slot 1 (K inputs). False: the input is the anchor and K
            masks, and only the masks predict (DFlash as first published).
        causal_block: slot j attends only to slots i <= j of its block.
        full_layers: layers, counted from 0, to which neither the window of the backbone nor `causal_block` applies.
        checkpointing: recompute the layers in the backward pass to save memory.
        train_tables: see `Draft`, like all other arguments.

    Without CUDA, `by_span` selects whether blocks are computed conversation by conversation or all at once with padding
    (None: whichever is less work). Both give the same result; tests compare them.

    Raises:
        ValueError: `mask_token_id` or `full_layers` is out of range.
    """

    by_span: bool | None = None
    # The class of the layers; one of a subclass is run by its modules in decoding, not folded.
    layer_kind: type[Layer] = Layer
    tap_modules = ("fc", "hidden_norm")

    def __init__(
        self,
        backbone: Backbone,
        tables: Tables,
        target_layer_ids: tuple[int, ...] | list[int],
        mask_token_id: int,
        *,
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
            block_size=block_size,
            anchors=anchors,
            train_tables=train_tables,
            draft_vocabulary=draft_vocabulary,
        )
        if not 0 <= mask_token_id < backbone.vocab_size:
            raise ValueError(f"mask_token_id={mask_token_id} is outside the vocabulary of {backbone.vocab_size}")
        if not set(full_layers) <= set(range(layers)):
            raise ValueError(f"full_layers={list(full_layers)}: this draft has layers 0 to {layers - 1}")
        D = backbone.hidden_size
        self.full_layers = frozenset(full_layers)
        self.sample_from_anchor, self.causal_block = sample_from_anchor, causal_block
        self.checkpointing = checkpointing
        self.fc = nn.Linear(len(self.target_layer_ids) * D, D, bias=False)
        self.hidden_norm, self.norm = backbone.norm(D), backbone.norm(D)
        self._fused = Kept()
        self.layers = nn.ModuleList(self.layer_kind(backbone) for _ in range(layers))
        self.rope = RotaryEmbedding(backbone)
        self.stack = Stack(self.layers, backbone, reads_context=True)

    @property
    def correction(self) -> nn.Parameter | None:
        """The weight (W, R) of the map from a slot's latent to a bias of its base logits, if the method has one:
        `features` are then [hidden ; latent]."""
        return None

    def project(self, features: Float[Tensor, "*r F"]) -> Float[Tensor, "*r W"]:
        base = self.tables.logits(features[..., : self.backbone.hidden_size])
        if self.correction is None:
            return base
        # In place, so that a chunk of the objective needs no second tensor of vocabulary size.
        return add_linear_(base, features[..., self.backbone.hidden_size :], self.correction)

    def project_base(self, features: Float[Tensor, "*r F"]) -> Float[Tensor, "*r W"] | None:
        return None if self.correction is None else self.tables.logits(features[..., : self.backbone.hidden_size])

    def projection_parameters(self) -> list[nn.Parameter]:
        correction = [] if self.correction is None else [self.correction]
        return [*super().projection_parameters(), *correction]

    def layers_in_order(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def start_from(self, target: Target) -> list[str]:
        return [*last_layers(self, target), *as_mean({"fc.weight": self.fc})]

    def work(self, length: int, anchors: int) -> Work:
        """Queries of the blocks in every layer; the context's keys and values in every layer, from one fusion."""
        facts, layers = self.backbone, len(self.layers)
        one = of_layer(self.layers[0], facts, keys_seen(facts, length, self.inputs))
        query = layers * one
        if self.checkpointing:
            query = Work(layers * facts.hidden_size + one.kept, query.flops)
        fused = Work(0, 2 * self.fc.weight.numel())
        return anchors * self.inputs * query + length * (of_context(self.layers, facts) + fused)

    @property
    def inputs(self) -> int:
        """Tokens that enter a block: K, or K + 1 when the anchor's output predicts nothing."""
        return self.block_size if self.sample_from_anchor else self.block_size + 1

    def context(self, taps: Float[Tensor, "B T C D"]) -> Float[Tensor, "B T D"]:
        """Context features, shared by all layers (DSpark eq. 2)."""
        return self.hidden_norm(self._fused(taps.flatten(-2), self.fc.weight))

    def masked(self, anchor: Int[Tensor, "*b"]) -> Int[Tensor, "*b I"]:
        """The anchor and the mask tokens behind it."""
        tokens = anchor.new_full((*anchor.shape, self.inputs), self.mask_token_id)
        tokens[..., 0] = anchor
        return tokens

    def input_tokens(self, batch: Batch) -> Int[Tensor, "B N I"]:
        """Tokens that enter the blocks of a batch."""
        return self.masked(take(batch.tokens, batch.anchors.clamp_min(0)))

    def forward(self, batch: Batch) -> Blocks:
        anchors, real = batch.anchors.clamp_min(0), batch.anchors != PADDING
        position = take(batch.position, anchors)[..., None] + torch.arange(self.inputs, device=anchors.device)
        tokens = self.input_tokens(batch)
        visible = Visibility(
            limit=torch.where(batch.anchors == PADDING, 0, batch.anchors),
            document=batch.document,
            owner=take(batch.document, anchors),
            query_position=position,
            key_position=batch.position,
            window=self.backbone.window,
            causal_own=self.causal_block,
        )
        (B, N), T, Q = anchors.shape, batch.tokens.shape[1], self.inputs
        # One row of the real blocks, conversation by conversation, where no kernel skips what is masked.
        dense = tokens.is_cuda or self.by_span is False or not fast.enabled()
        pieces = None if dense else spans(visible, *real.nonzero(as_tuple=True))
        flat = bool(pieces) and (self.by_span or 2 * sum(map(_work, pieces)) < B * N * (T + LAYER_KEYS))
        # By whether a layer is one of the full ones.
        views = {False: visible}
        if self.full_layers:
            views[True] = replace(visible, window=None, causal_own=False)
        if flat:
            attention, masks = (
                attend_spans,
                {full: spans(view, *real.nonzero(as_tuple=True)) for full, view in views.items()},
            )
            tokens, position = tokens[real][None], position[real][None]
        elif tokens.is_cuda:
            attention = attend_flex
            masks = {full: block_mask(view, (B, N, Q, T, Q)) for full, view in views.items()}
        else:
            attention, masks = attend, {full: view.context_mask(T, Q) for full, view in views.items()}
        # A block mask includes the mask of own keys.
        own_masks = {full: None if tokens.is_cuda else view.own_mask(Q, Q) for full, view in views.items()}
        x = self.tables.embed(tokens)
        context = self.context(batch.taps.to(x.dtype))
        block_rope, context_rope = self.rope(position, x.dtype), self.rope(batch.position, x.dtype)

        def run(layer: Layer, full: bool, x: Tensor) -> Tensor:
            y = layer.normed(x)
            query, own = layer.self_attn.queries(y, block_rope), layer.self_attn.keys_values(y, block_rope)
            keys = layer.self_attn.keys_values(context, context_rope)
            rules = masks[full], self.backbone.scale, own_masks[full], self.backbone.attention_soft_cap
            return layer.finish(x, attention(query, keys, own, *rules))

        for i, layer in enumerate(self.layers):
            if self.checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(run, layer, i in self.full_layers, x, use_reentrant=False)
            else:
                x = run(layer, i in self.full_layers, x)
        hidden = self.norm(x)
        if flat:
            hidden = hidden.new_zeros(B, N, Q, hidden.shape[-1]).masked_scatter(real[..., None, None], hidden)
        return assemble(batch, hidden if self.sample_from_anchor else hidden[:, :, 1:])

    def commit(self, state: State, context: Context, tokens: Int[Tensor, "B S"]) -> State:
        features = self.context(context.taps)
        rope = self.rope.behind(state.cache, features.shape[1], features.dtype)
        self.stack.store_context(features, rope, state.cache)
        state.cache.advance(context.lengths)
        return state

    def propose(
        self, state: State, anchor: Int[Tensor, " B"], sample: SampleFunction, slots: int | None = None
    ) -> Proposal:
        return self.draw(self.block(state, anchor)[:, :slots], anchor, sample)

    def expand(self, state: State, anchor: Int[Tensor, " B"], slots: int | None = None) -> Expansion:
        """One pass of the layers for the whole tree; only the drawing of slots is repeated for the paths.

        A subclass that proposes in another way is asked for proposals."""
        if type(self).propose is not ParallelDraft.propose:
            return super().expand(state, anchor, slots)
        hidden = self.block(state, anchor)[:, :slots]

        def propose(requests: Int[Tensor, " R"], sample: SampleFunction, count: int) -> Proposal:
            return self.draw(hidden[requests, :count], anchor[requests], sample)

        return ExpansionByPath(propose, len(anchor), hidden.shape[1], anchor.device)

    def block(self, state: State, anchor: Int[Tensor, " B"]) -> Float[Tensor, "B K D"]:
        """The normed outputs of all slots after `anchor`."""
        return self.run_block(self.masked(anchor), state.cache)[:, self.inputs - self.block_size :]

    def run_block(self, tokens: Int[Tensor, "B I"], cache: KVCache, behind: int = 0) -> Float[Tensor, "B I D"]:
        """Final states of inputs that stand `behind` others of their block, after the context of each row. Their keys
        are stored and not counted; the next commit overwrites them."""
        x, new = self.tables.embed(tokens), tokens.shape[1]
        rope = tuple(side[:, behind:] for side in self.rope.behind(cache, behind + new, x.dtype))
        masks = {False: cache.visible(new, behind, causal=self.causal_block, window=self.backbone.window)}
        if self.full_layers:
            masks[True] = cache.visible(new, behind, causal=False)
        for i in range(len(self.layers)):
            x = self.stack.extend(i, x, rope, cache, masks[i in self.full_layers], behind=behind)
        return self.norm(x)

    def draw(self, hidden: Float[Tensor, "B K D"], anchor: Int[Tensor, " B"], sample: SampleFunction) -> Proposal:
        """Sample the slots from left to right; a method with independent slots draws them at once."""

        def logits(k: int, previous: list[Tensor]) -> Tensor:
            seen = torch.stack(previous, 1)
            return self.project(self.features(hidden[:, : k + 1], seen)[:, k : k + 1])

        return self.scored(self.draw_each(hidden.shape[1], anchor, sample, logits), hidden, anchor)
