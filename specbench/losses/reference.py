"""The plain form of the fused computation: both heads at once on every slot, autograd on whole logits.

Every block, supervised or not, goes through both heads, as in the usual training code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from specbench.blocks import Blocks
from specbench.losses.terms import Combination, SlotResults, slot_terms, softened_kl

if TYPE_CHECKING:
    from specbench.drafts.draft import Draft
    from specbench.models.embedding_head import Tables


def slot_losses(
    draft: Draft, tables: Tables, blocks: Blocks, features: Float[Tensor, "B N K F"], combination: Combination
) -> tuple[SlotResults, Callable[[Tensor], Tensor]]:
    """Results of the supervised slots with [slots x vocabulary] tensors; their terms carry gradients by themselves."""
    kept, ids, blend = blocks.mask.flatten(), draft.draft_vocabulary, combination.blend
    logits = draft.project(features.flatten(0, 2))
    with torch.no_grad():
        target = tables.logits(blocks.target.flatten(0, 2))
        top, target_top = logits.argmax(-1), target.argmax(-1)
        top = top if ids is None else ids[top]
    labels = blocks.labels.flatten()
    inside = torch.ones_like(kept) if ids is None else torch.isin(labels, ids)
    wanted = {*combination.coefficients, *(["kl"] if blend else [])}
    values = {name: value[kept] for name, value in slot_terms(logits, target, labels, ids, wanted).items()}
    active = {term: values[term] for term in combination.coefficients}
    if combination.softened is not None:
        active["kl"] = softened_kl(logits[kept], target[kept], combination.softened, ids)
    if blend is not None:
        share = blend.weight(values["alpha"] if blend.over == "row" else values["alpha"].mean())
        active["blend"] = share * values["kl"] + (1 - share) * (1 - values["alpha"])
    results = SlotResults(
        ce=values["ce"],
        probability=torch.where(inside[kept], torch.exp(-values["ce"]), 0.0),
        tv=values["tv"],
        alpha=values["alpha"],
        agreement=(top == target_top)[kept],
        hit=(top == labels)[kept],
        label_outside=~inside[kept],
        outside=values["outside"],
        terms=active,
    )
    return results, lambda value: value
