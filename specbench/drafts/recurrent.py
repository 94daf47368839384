"""RecurrentDraft: one module unrolled K steps from every anchor (EAGLE-1 and 3, HASS, MTP).

A chain starts at position t = a-1 with the target's feature there and the anchor's embedding. Step k reads the output
of step k-1 and the embedding of token a+k-1, at rope position a-1 + (k-1), and predicts a+k. It attends to the step-1
keys of its conversation at every position <= t and to its own keys of steps 2..k, never to those of another chain.
Step-1 keys are true context: each combines a target feature with the token after it.

Axes: B batch, T tokens, N chains, K steps, C taps, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from specbench.blocks import PADDING, SUPERVISIONS, Batch, Blocks, Context, assemble, previous_tokens, take
from specbench.drafts.draft import Draft, Proposal, SampleFunction, State
from specbench.drafts.expansion import Expansion
from specbench.drafts.initialisation import last_layers, weigh
from specbench.drafts.work import Work, keys_seen, of_context, of_keys_values, of_layer, of_parameters
from specbench.models.attention import Visibility, attend, attend_flex, block_mask
from specbench.models.backbone import Backbone, Layer, Rope, RotaryEmbedding
from specbench.models.branches import Branches
from specbench.models.embedding_head import Tables
from specbench.models.fast.folded_layers import Stack
from specbench.models.kv_cache import KVCache
from specbench.models.target import Target
from specbench.ranges import Among, Count, Layers, Slots

Pairs = list[tuple[Tensor, Tensor]]


class RecurrentDraft(Draft):
    """Base class of recurrent drafts: one module is run K times from every anchor.

    A subclass defines which target state is the feature (`source`) and the input of the layers (`enter`).

    Args:
        layers: number of decoder layers.
        block_size: steps K.
        anchors: anchors that training draws from a conversation. None: every valid one.
        supervision: "predicted" uses the loss mask of the predicted token; "unshifted" that of the released EAGLE-3
            code.
        train_tables: see `Draft`, like all other arguments.

    Raises:
        ValueError: `supervision` has another value.
    """

    reads_previous = True
    draws_previous = True
    # Whether the layers read [embedding ; feature], and whether the first one alone does.
    paired = False
    first_layer_paired_alone = False
    # Whether attention of the first layer reads a norm of its input, and the head a norm of the output.
    norms_first_input = True
    norms_output = True
    # Whether a step reads the normed output of the step before it, or its output before the norm.
    feeds_normed_output = False
    # Steps of a chain in training; later slots are then unsupervised. None: all of them.
    trained_steps: int | None = None
    # Whether a step's gradient stops at the output of the step before it.
    stops_gradient = False

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
            block_size=block_size,
            anchors=anchors,
            train_tables=train_tables,
            draft_vocabulary=draft_vocabulary,
        )
        if supervision not in SUPERVISIONS:
            raise ValueError(f"supervision={supervision!r}: choose one of {', '.join(SUPERVISIONS)}")
        self.supervision = supervision
        self.layers = nn.ModuleList(
            Layer(
                backbone,
                paired=self.paired and not (i and self.first_layer_paired_alone),
                norms_input=i > 0 or self.norms_first_input,
            )
            for i in range(layers)
        )
        self.norm = backbone.norm(backbone.hidden_size) if self.norms_output else nn.Identity()
        self.rope = RotaryEmbedding(backbone)
        self.stack = Stack(self.layers, backbone)

    def layers_in_order(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def start_from(self, target: Target) -> list[str]:
        return last_layers(self, target)

    def start_previous(self, wired: bool) -> None:
        for layer in self.layers:
            if layer.hidden_norm is None:
                continue
            own = layer.self_attn
            for linear in (own.q_proj, own.k_proj, own.v_proj):
                if linear is not None:  # some families have no projection for values
                    weigh(linear.weight, linear.weight.detach().chunk(2, 1)[1].clone(), True, wired)

    def work(self, length: int, anchors: int) -> Work:
        """Every step of a chain in every layer; the context's pass, of whose last layer keys and values are enough.

        Maps outside of the layers (the fusion of taps) serve every context position once.
        """
        facts, layers = self.backbone, len(self.layers)
        step = layers * of_layer(self.layers[0], facts, keys_seen(facts, length, self.block_size))
        apart = [*self.tables.parameters(), *self.projection_parameters(), *self.layers.parameters()]
        before = (layers - 1) * of_layer(self.layers[0], facts, keys_seen(facts, length, 0)).flops
        flops = of_parameters(self, apart).flops + before + of_keys_values(self.layers[-1])
        context = Work(of_context(self.layers, facts).kept, flops)
        return anchors * (self.trained_steps or self.block_size) * step + length * context

    def source(self, taps: Float[Tensor, "B T C D"], last: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The feature that a chain starts from, at every position."""
        raise NotImplementedError

    def enter(self, feature: Float[Tensor, "*b D"], embedding: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        """Input of the first layer."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Blocks:
        anchors, T = batch.anchors.clamp_min(0), batch.tokens.shape[1]
        limit = torch.where(batch.anchors == PADDING, 0, batch.anchors)
        owner, start = take(batch.document, anchors), (take(batch.position, anchors) - 1).clamp_min(0)
        dtype = next(self.layers.parameters()).dtype
        source = self.source(batch.taps.to(dtype), batch.last.to(dtype))
        # Combine the feature at t with the token at t+1. The last position of a conversation has no such token, and no
        # chain attends to it, because the anchor of a chain is inside its conversation.
        after = torch.cat([batch.tokens[:, 1:], batch.tokens[:, :1]], 1)
        context = self.context(source, after, batch)
        before = (anchors - 1).clamp_min(0)
        feature = take(source, before)
        tokens = previous_tokens(batch, self.block_size)
        own: list[Pairs] = [[] for _ in self.layers]
        outputs, masks, window = [], {}, self.backbone.window
        steps = self.block_size if self.trained_steps is None or not self.training else self.trained_steps
        previous = [tokens[..., 0]]
        for k in range(steps):
            if k:
                token = tokens[..., k]
                if batch.policy is not None:
                    with torch.no_grad():
                        seen = outputs if self.feeds_normed_output else [self.norm(one) for one in outputs]
                        token = batch.policy.token(self, torch.stack(seen, 2), torch.stack(previous, 2), token)
                previous.append(token)
            position = start + k
            # Own key 0 is step 2's, one position after the chain's start.
            visible = Visibility(limit, batch.document, owner, position[..., None], batch.position, window, ahead=k - 1)
            # Without a window the context mask is the same at every step.
            key = k if window is not None or source.is_cuda else 0
            if key not in masks:
                shape = (*anchors.shape, 1, T, k)
                masks = {key: block_mask(visible, shape) if source.is_cuda else visible.context_mask(T, 1)}
            own_mask = None if source.is_cuda else visible.own_mask(1, k)
            feature = self.step(feature, previous[k], position, context, own, masks[key], own_mask, first=k == 0)
            if self.feeds_normed_output:
                feature = self.norm(feature)
            outputs.append(feature)
            if self.stops_gradient:
                feature = feature.detach()
        hidden = torch.stack(outputs, 2)
        hidden = hidden if self.feeds_normed_output else self.norm(hidden)
        blocks = assemble(batch, F.pad(hidden, (0, 0, 0, self.block_size - steps)), self.supervision)
        blocks = replace(blocks, previous=torch.cat([torch.stack(previous, 2), tokens[..., steps:]], 2))
        ran = torch.arange(self.block_size, device=hidden.device) < steps
        return blocks if steps == self.block_size else replace(blocks, mask=blocks.mask & ran)

    def context(self, source: Tensor, after: Int[Tensor, "B T"], batch: Batch) -> Pairs:
        """Step-1 keys and values of every position and layer: a causal pass (the last layer needs no queries)."""
        embedding = self.tables.embed(after)
        x, rope = self.enter(source, embedding), self.rope(batch.position, source.dtype)
        pairs, mask = [], None
        for i, layer in enumerate(self.layers):
            y = layer.normed(x, embedding)
            pairs.append(layer.self_attn.keys_values(y, rope))
            if i + 1 == len(self.layers):
                break
            if mask is None:
                rows = torch.arange(y.shape[1], device=y.device).expand(batch.tokens.shape)
                position, window = batch.position, self.backbone.window
                seen = Visibility(rows + 1, batch.document, batch.document, position[..., None], position, window)
                mask = seen.context_mask(y.shape[1], 1)
            query = layer.self_attn.queries(y, rope)[:, :, None]
            seen = attend(query, pairs[-1], None, mask, self.backbone.scale, None, self.backbone.attention_soft_cap)
            x = layer.finish(x, seen[:, :, 0])
        return pairs

    def step(
        self,
        feature: Float[Tensor, "B N D"],
        tokens: Int[Tensor, "B N"],
        position: Int[Tensor, "B N"],
        context: Pairs,
        own: list[Pairs],
        mask,
        own_mask: Bool[Tensor, "1 S"] | None,
        first: bool,
    ) -> Float[Tensor, "B N D"]:
        """One step of every chain; appends its keys to `own` unless they are already among the context's."""
        embedding, rope = self.tables.embed(tokens), self.rope(position, feature.dtype)
        x = self.enter(feature, embedding)
        for i, layer in enumerate(self.layers):
            y = layer.normed(x, embedding)
            query = layer.self_attn.queries(y, rope)[:, :, None]
            if not first:
                own[i].append(layer.self_attn.keys_values(y, rope))
            mine = tuple(torch.stack(side, 2) for side in zip(*own[i], strict=True)) or None
            run = attend if isinstance(mask, Tensor) else attend_flex
            seen = run(query, context[i], mine, mask, self.backbone.scale, own_mask, self.backbone.attention_soft_cap)
            x = layer.finish(x, seen[:, :, 0])
        return x

    def commit(self, state: State, context: Context, tokens: Int[Tensor, "B S"]) -> State:
        source = self.source(context.taps, context.last)
        counts = context.lengths
        last = source[torch.arange(len(tokens), device=tokens.device), counts - 1]
        if state.feature is None:
            feature, after, counts = source[:, :-1], tokens[:, 1:], counts - 1
        else:
            feature, after = torch.cat([state.feature[:, None], source[:, :-1]], 1), tokens
        state.feature = last
        cache, new = state.cache, feature.shape[1]
        embedding = self.tables.embed(after)
        x, rope = self.enter(feature, embedding), self.rope.behind(cache, new, feature.dtype)
        *inner, last_layer = range(len(self.layers))
        mask = cache.visible(new, window=self.backbone.window) if inner else None
        for i in inner:
            x = self.stack.extend(i, x, rope, cache, mask, embedding)
        self.stack.store(last_layer, x, rope, cache, embedding)
        cache.advance(counts)
        return state

    def propose(
        self, state: State, anchor: Int[Tensor, " B"], sample: SampleFunction, slots: int | None = None
    ) -> Proposal:
        steps = self.block_size if slots is None else min(slots, self.block_size)
        feature, token, cache = state.feature[:, None], anchor[:, None], state.cache
        ropes = zip(*(side.split(1, 1) for side in self.rope.behind(cache, steps, feature.dtype)), strict=True)
        hidden, previous, probabilities = [], [token], []
        for k, rope in enumerate(ropes):
            feature = self.step_stored(feature, token, rope, cache, k)
            hidden.append(self.norm(feature))
            if self.feeds_normed_output:
                feature = hidden[-1]
            tokens, drawn = sample(self.project(self.features(hidden[-1], token)))
            token = self.to_target(tokens)
            previous.append(token)
            probabilities.append(drawn)
        tokens = torch.cat(previous, 1)
        drawn = None if probabilities[0] is None else self.widen(torch.cat(probabilities, 1))
        return Proposal(tokens[:, 1:], drawn, self.confidence(torch.cat(hidden, 1), tokens[:, :-1]))

    def expand(self, state: State, anchor: Int[Tensor, " B"], slots: int | None = None) -> Expansion:
        """One step of all nodes of a level; each reads its parent's output and attends to its own branch.

        A subclass that proposes in another way is asked for proposals."""
        if type(self).propose is not RecurrentDraft.propose:
            return super().expand(state, anchor, slots)
        return Unrolled(self, state, anchor, min(slots or self.block_size, self.block_size))

    def step_stored(
        self, feature: Float[Tensor, "B 1 D"], token: Int[Tensor, "B 1"], rope: Rope, cache: KVCache, k: int
    ) -> Float[Tensor, "B 1 D"]:
        """`step` in decoding: the keys of step k are stored after the context and not counted."""
        embedding, mask = self.tables.embed(token), cache.visible(1, behind=k, window=self.backbone.window)
        x = self.enter(feature, embedding)
        for i in range(len(self.layers)):
            x = self.stack.extend(i, x, rope, cache, mask, embedding, behind=k)
        return x


class Unrolled:
    """The expansion of a recurrent draft. The keys of all nodes so far lie behind the context's, uncounted."""

    marginals = None

    def __init__(self, draft: RecurrentDraft, state: State, anchor: Int[Tensor, " B"], depth: int):
        self.draft, self.cache, self.depth = draft, state.cache, depth
        self.anchor, self.outputs = anchor[:, None], state.feature[:, None]
        self.levels = anchor.new_zeros(len(anchor), 0)
        self.seen = torch.zeros(len(anchor), 1, 0, dtype=torch.bool, device=anchor.device)

    def root(self) -> Float[Tensor, "B 1 W"]:
        return self._step(self.anchor, torch.zeros_like(self.anchor), 0)

    def below(self, rows: Int[Tensor, "B M"], parents: Int[Tensor, "B M"]) -> Float[Tensor, "B M W"]:
        return self._step(self.draft.to_target(rows), parents, self.level + 1)

    def _step(self, tokens: Int[Tensor, "B M"], parents: Int[Tensor, "B M"], level: int) -> Float[Tensor, "B M W"]:
        (B, M), behind, draft, self.level = tokens.shape, self.levels.shape[1], self.draft, level
        self.levels = torch.cat([self.levels, self.levels.new_full((B, M), level)], 1)
        inherited = self.seen.gather(1, parents[..., None].expand(-1, -1, behind))
        own = torch.eye(M, dtype=torch.bool, device=tokens.device).expand(B, -1, -1)
        self.seen = torch.cat([inherited, own], 2)
        feature = self.outputs.gather(1, parents[..., None].expand(-1, -1, self.outputs.shape[2]))
        embedding = draft.tables.embed(tokens)
        mask = self.cache.branching(Branches(self.levels, self.seen), draft.backbone.window)
        rope = draft.rope.behind(self.cache, level + 1, feature.dtype, self.levels[:, behind:])
        x = draft.enter(feature, embedding)
        for i in range(len(draft.layers)):
            x = draft.stack.extend(i, x, rope, self.cache, mask, embedding, behind=behind)
        hidden = draft.norm(x)
        self.outputs = hidden if draft.feeds_normed_output else x
        # Every node is a block of one slot.
        return draft.project(draft.features(hidden[:, :, None], tokens[:, :, None])[:, :, 0])
