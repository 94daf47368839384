"""P-EAGLE (arXiv 2602.01469; speculators pull request 480, vLLM pull request 32887): EAGLE-3, all slots in one pass.

A rollout starts at t = a-1, where a is the anchor. Depth d = 0..K-1 stands at position t+d and predicts a+1+d (slot
d+1):

    depth 0:  e = E(x_{t+1}), f = W_c taps_t, as EAGLE-3's first step       -> fused_taps.FusedTaps
    depth d:  e = E(mask),    f = W_c mask_hidden, a learnt vector (C D)    -> masked
    layer 1 reads [norm(e) ; norm(f)], the others are standard              -> backbone.Layer(paired=True | False)
    depth d of t sees depth 0 of every position <= t, and depths <= d of t  -> forward, propose
    logits = lm_head(norm(f'))                                              -> Draft.project

In training, depth d is computed for a nested random subset of about max(r^d, r_min) of the rollouts
(-> nested_depths); a rollout that is left out at depth d is left out at every later one. One normaliser for all depths
is the objective's own with slot_weight=uniform.

Deviations: embedding and head are frozen by default (speculators trains the embedding: train_tables). Depth 0 is
computed at every position, as published, but later depths only at the anchors that were chosen, like every other draft
here (anchors=null: all).

Axes: B batch, T tokens, N rollouts, K depths, R rows (the depths of all rollouts), C taps, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import add

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from specbench.blocks import PADDING, Batch, Blocks, assemble, generator, slot_positions, take
from specbench.drafts.draft import Proposal, SampleFunction, State
from specbench.drafts.fused_taps import FusedTaps
from specbench.drafts.work import Work, keys_seen, of_context, of_keys_values, of_layer
from specbench.models.attention import Visibility, attend, attend_flex, block_mask
from specbench.models.backbone import Backbone
from specbench.models.embedding_head import Tables
from specbench.ranges import Count, Layers, Share, ShareAboveZero, Slots


class PEagle(FusedTaps):
    """EAGLE-3 whose later slots read a mask token and a learnt feature, so that one pass gives all slots.

    Args:
        mask_token_id: input token of the depths above 0.
        fc_norm: a norm of each tap before the fusion (EAGLE-3.1).
        norm_before_fc: one norm over all taps before the fusion (drafts of gpt-oss).
        down_sample_ratio: r; training keeps about max(r^d, r_min) of the rollouts at depth d. 1: all.
        down_sample_ratio_min: r_min.
        layers: number of layers, the first of which reads the token embedding.
        block_size: depths K.
        anchors: see `RecurrentDraft`, like all other arguments.

    Raises:
        ValueError: `mask_token_id` is outside the vocabulary, a ratio is not a share, or `fc_norm` and `norm_before_fc`
            are both set.
    """

    published_format = "p_eagle"
    first_layer_paired_alone = True
    reads_previous = False
    draws_previous = False
    tap_modules = ("fc", "fc_norm", "input_norm", "mask_hidden")

    def __init__(
        self,
        backbone: Backbone,
        tables: Tables,
        target_layer_ids: tuple[int, ...] | list[int],
        mask_token_id: int,
        *,
        fc_norm: bool = False,
        norm_before_fc: bool = False,
        down_sample_ratio: ShareAboveZero = 0.7,
        down_sample_ratio_min: Share = 0.2,
        layers: Layers = 4,
        block_size: Slots = 8,
        anchors: Count | None = None,
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
            train_tables=train_tables,
            draft_vocabulary=draft_vocabulary,
        )
        if not 0 <= mask_token_id < backbone.vocab_size:
            raise ValueError(f"mask_token_id={mask_token_id} is outside the vocabulary of {backbone.vocab_size}")
        if not (0 < down_sample_ratio <= 1 and 0 <= down_sample_ratio_min <= 1):
            raise ValueError(
                f"down_sample_ratio={down_sample_ratio}, down_sample_ratio_min={down_sample_ratio_min}: give shares of "
                "the anchors, the first above 0"
            )
        self.down_sample_ratio, self.down_sample_ratio_min = down_sample_ratio, down_sample_ratio_min
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, len(self.target_layer_ids) * self.backbone.hidden_size))

    def work(self, length: int, anchors: int) -> Work:
        """The expected rows of every rollout in every layer, and depth 0 of every position in all layers but the last,
        of which keys and values are enough."""
        facts, layers = self.backbone, list(self.layers)
        rows = sum(max(self.down_sample_ratio**d, self.down_sample_ratio_min) for d in range(self.block_size))
        row = reduce(add, (of_layer(one, facts, keys_seen(facts, length, self.block_size // 2)) for one in layers))
        context = [of_layer(one, facts, keys_seen(facts, length, 0)) for one in layers[:-1]]
        fused = Work(of_context(self.layers, facts).kept, 2 * self.fc.weight.numel() + of_keys_values(layers[-1]))
        return anchors * rows * row + length * reduce(add, context, fused)

    def masked(self) -> tuple[Tensor, Tensor]:
        """Feature and embedding (D) of every depth above 0."""
        taps = self.mask_hidden.view(1, 1, len(self.target_layer_ids), self.backbone.hidden_size)
        token = torch.tensor(self.mask_token_id, device=taps.device)
        return self.source(taps, None)[0, 0], self.tables.embed(token)

    def depths(self, batch: Batch) -> Int[Tensor, "B N"]:
        """How many depths of each rollout are computed: all of them, except in training."""
        if not self.training:
            return torch.full_like(batch.anchors, self.block_size)
        reach = slot_positions(batch, self.block_size)[2].sum(-1).cpu().numpy()
        owner = take(batch.document, batch.anchors.clamp_min(0)).cpu().numpy()
        owner[batch.anchors.cpu().numpy() == PADDING] = PADDING
        kept = np.zeros_like(reach)
        for b, n in enumerate(owner):
            for document in np.unique(n[n != PADDING]):
                own = n == document
                kept[b, own] = nested_depths(
                    reach[b, own],
                    self.block_size,
                    self.down_sample_ratio,
                    self.down_sample_ratio_min,
                    generator(batch.seed, int(document), 1),
                )
        return torch.from_numpy(kept).to(batch.anchors.device)

    def forward(self, batch: Batch) -> Blocks:
        """Rollouts are sorted by their number of depths, so that the rows of a depth are the first ones."""
        depths = self.depths(batch)
        order = depths.argsort(dim=1, descending=True, stable=True)
        at = batch.anchors.gather(1, order)
        anchors, limit = at.clamp_min(0), torch.where(at == PADDING, 0, at)
        counts = [anchors.shape[1]] + [int((depths > d).sum(1).max()) for d in range(1, self.block_size)]
        counts = [count for count in counts if count]

        dtype = self.norm.weight.dtype
        source = self.source(batch.taps.to(dtype), batch.last.to(dtype))
        context = self.context(source, torch.cat([batch.tokens[:, 1:], batch.tokens[:, :1]], 1), batch)
        feature, embedding = take(source, (anchors - 1).clamp_min(0)), self.tables.embed(take(batch.tokens, anchors))
        later = len(anchors), sum(counts[1:]), -1
        mask_feature, mask_embedding = self.masked()
        x = torch.cat([feature, mask_feature.expand(later)], 1)
        embedding = torch.cat([embedding, mask_embedding.expand(later)], 1)
        start, owner = (take(batch.position, anchors) - 1).clamp_min(0), take(batch.document, anchors)
        position = torch.cat([start[:, :count] + d for d, count in enumerate(counts)], 1)
        rope, masks = self.rope(position, x.dtype), []
        for d, count in enumerate(counts):
            # Own key 0 is depth 1's.
            seen = Visibility(
                limit[:, :count],
                batch.document,
                owner[:, :count],
                (start[:, :count] + d)[..., None],
                batch.position,
                self.backbone.window,
                ahead=d - 1,
            )
            shape = (len(anchors), count, 1, batch.tokens.shape[1], d)
            outer = block_mask(seen, shape) if x.is_cuda else seen.context_mask(shape[3], 1)
            masks.append((outer, None if x.is_cuda else seen.own_mask(1, d)))
        run = attend_flex if x.is_cuda else attend
        for layer, pairs in zip(self.layers, context, strict=True):
            y = layer.normed(x, embedding)
            queries = layer.self_attn.queries(y, rope).split(counts, 1)
            own = [side.split(counts, 1)[1:] for side in layer.self_attn.keys_values(y, rope)]
            rows = []
            for d, (query, (mask, own_mask)) in enumerate(zip(queries, masks, strict=True)):
                mine = tuple(torch.stack([one[:, : counts[d]] for one in side[:d]], 2) for side in own) if d else None
                rules = mask, self.backbone.scale, own_mask, self.backbone.attention_soft_cap
                rows.append(run(query[:, :, None], pairs, mine, *rules)[:, :, 0])
            x = layer.finish(x, torch.cat(rows, 1))

        first = torch.tensor([sum(counts[:d]) for d in range(self.block_size)], device=x.device)
        computed = torch.arange(self.block_size, device=x.device) < depths[..., None]
        place = torch.where(computed, first + order.argsort(dim=1)[..., None], 0)
        blocks = assemble(batch, take(self.norm(x), place).masked_fill(~computed[..., None], 0))
        return replace(blocks, mask=blocks.mask & computed)

    def propose(
        self, state: State, anchor: Int[Tensor, " B"], sample: SampleFunction, slots: int | None = None
    ) -> Proposal:
        steps, cache = self.block_size if slots is None else min(slots, self.block_size), state.cache
        later = len(anchor), steps - 1, -1
        mask_feature, mask_embedding = self.masked()
        x = torch.cat([state.feature[:, None], mask_feature.expand(later)], 1)
        embedding = torch.cat([self.tables.embed(anchor[:, None]), mask_embedding.expand(later)], 1)
        rope = self.rope.behind(cache, steps, x.dtype)
        mask = cache.visible(steps, window=self.backbone.window)
        for i in range(len(self.layers)):
            # The keys of a rollout are stored after the context and not counted; the next commit overwrites them.
            x = self.stack.extend(i, x, rope, cache, mask, embedding)
        return self.draw_at_once(self.norm(x), anchor, sample)


def nested_depths(
    reach: Int[np.ndarray, " N"], slots: int, ratio: float, least: float, draw: np.random.Generator
) -> Int[np.ndarray, " N"]:
    """Depths that training keeps of each rollout of one conversation: 1 at least where `reach` allows one.

    reach: supervised slots of every rollout. At depth d, (N - d) max(ratio^d, least) rollouts, rounded down, are drawn
    without replacement from those that were kept at depth d-1 and have a supervised slot there, or all if there are
    fewer.
    """
    depths, kept = np.minimum(reach, 1), np.flatnonzero(reach)
    for d in range(1, slots):
        pool = kept[reach[kept] > d]
        size = min(len(pool), int(max(0, len(reach) - d) * max(ratio**d, least)))
        kept = draw.choice(pool, size, replace=False)
        depths[kept] = d + 1
    return depths
