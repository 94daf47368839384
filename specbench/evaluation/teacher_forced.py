"""Teacher-forced acceptance of a draft on decoded text, as training measures it.

    alpha_k(a) = sum_v min(p, q)    p: the draft's distribution at slot k of anchor a given the true tokens before it;
                                    q: the target's distribution there; both with the temperature and filters of
                                    decoding

Every token of an answer that has a token after it is an anchor. Real rounds reach fewer slots: only those whose earlier
slots were accepted, and only anchors at which a round begins.

Axes: N anchors, T tokens, K slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specbench.blocks import Batch, Context, slot_positions, take, with_anchors
from specbench.decoding.sampling import Sampling, warp
from specbench.drafts.draft import Draft, Proposer
from specbench.losses.fused import CHUNK_BYTES
from specbench.metrics.functional import teacher_forced_sums
from specbench.models.target import Target


@dataclass(frozen=True)
class SlotAcceptance:
    """alpha of every anchor and slot; `mask` is false where the text ends before the slot (alpha is 0 there)."""

    alpha: Float[Tensor, "N K"]
    mask: Bool[Tensor, "N K"]

    def sums(self) -> list[list[float]]:
        """For each slot k: anchors with that slot, sum of alpha_k, of prod_{i<=k} alpha_i, of prod_{i<k} alpha_i.

        Quotients of these sums, pooled over prompts, give acceptance, survival and conditional acceptance.

        >>> SlotAcceptance(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[True, True], [True, False]])).sums()
        [[2.0, 1.5, 1.5, 2.0], [1.0, 0.5, 0.25, 0.5]]
        """
        return teacher_forced_sums(self.alpha, self.mask).tolist()


@torch.inference_mode()
def slot_acceptance(
    target: Target, draft: Proposer, prompt: Sequence[int], output: Sequence[int], sampling: Sampling, slots: int
) -> SlotAcceptance:
    """alpha of the first `slots` slots at every anchor of `output`, which the target generated after `prompt`.

    A trained draft is computed in its training view (`Draft.forward`), any other in its decoding view with the true
    tokens as input; a deterministic baseline always proposes its own continuation. An answer of fewer than two tokens
    has no anchor.
    """
    slots = min(slots, draft.block_size)
    if len(output) < 2:
        return SlotAcceptance(torch.zeros(0, slots), torch.zeros(0, slots, dtype=torch.bool))
    tokens = torch.tensor([[*prompt, *output]], device=target.device)
    context = target.states(tokens, torch.tensor([tokens.shape[1]]))
    place = torch.arange(tokens.shape[1], device=target.device)[None]
    batch = Batch(tokens, place >= len(prompt), torch.zeros_like(tokens), place, context.taps, context.last)
    batch = with_anchors(batch, None)
    view = _training_view if isinstance(draft, Draft) else _decoding_view
    parts, masks = [], []
    # A part needs a few [anchors x slots x vocabulary] tensors, and the attention of its blocks over the text.
    wide = max(len(target.tables.head), 8 * tokens.shape[1])
    budget = CHUNK_BYTES.get(target.device.type, CHUNK_BYTES["cuda"])
    for anchors in batch.anchors.split(max(1, budget // (4 * draft.block_size * wide)), 1):
        part = replace(batch, anchors=anchors)
        before, mask = (x[0, :, :slots] for x in slot_positions(part, draft.block_size)[1:])
        q = warp(target.logits(batch.last[0, before]), sampling)
        p = view(draft, part, sampling, slots, q.shape[-1])
        parts.append(torch.minimum(p, q).sum(-1) * mask)
        masks.append(mask)
    return SlotAcceptance(torch.cat(parts).cpu(), torch.cat(masks).cpu())


def _training_view(
    draft: Draft, batch: Batch, sampling: Sampling, slots: int, vocabulary: int
) -> Float[Tensor, "N K V"]:
    blocks = draft(batch)
    probabilities = warp(draft.logits(blocks.hidden, blocks.previous)[0], sampling)
    return draft.widen(probabilities)[:, :slots]


def _decoding_view(
    draft: Proposer, batch: Batch, sampling: Sampling, slots: int, vocabulary: int
) -> Float[Tensor, "N K V"]:
    anchors = batch.anchors[0]
    count = len(anchors)
    rows, last = batch.tokens.expand(count, -1), batch.last.expand(count, -1, -1)
    context = Context(batch.taps.expand(count, -1, -1, -1), last, anchors)
    state = draft.begin(context, rows)
    true = take(batch.tokens, slot_positions(batch, draft.block_size)[0])[0]
    proposal = draft.propose(state, rows[0, anchors], TrueTokens(true, sampling), slots)
    if proposal.probabilities is not None:
        return proposal.probabilities
    return F.one_hot(proposal.tokens, vocabulary).float()


class TrueTokens:
    """A sampler that returns the true tokens, slot by slot, and the probabilities with which it would have drawn."""

    def __init__(self, tokens: Int[Tensor, "N K"], sampling: Sampling):
        self.tokens, self.sampling, self.slot = tokens, sampling, 0

    def __call__(self, logits: Float[Tensor, "N S V"]) -> tuple[Int[Tensor, "N S"], Float[Tensor, "N S V"]]:
        """The next S true tokens of each row and the probabilities of `logits`."""
        first, self.slot = self.slot, self.slot + logits.shape[1]
        return self.tokens[:, first : self.slot], warp(logits, self.sampling)
