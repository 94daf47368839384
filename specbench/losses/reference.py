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
from specbench.losses.terms import Combination, SlotResults, draft_columns, slot_terms, softened_kl

if TYPE_CHECKING:
    from specbench.drafts.draft import Draft
    from specbench.models.embedding_head import Tables


def slot_losses(
    draft: Draft,
    tables: Tables,
    blocks: Blocks,
    features: Float[Tensor, "B N K F"],
    combination: Combination,
    factors: tuple[float, float] = (1.0, 0.0),
) -> tuple[SlotResults, SlotResults | None, Callable[[Tensor], Tensor]]:
    """Results of the supervised slots with [slots x vocabulary] tensors; their terms carry gradients by themselves."""
    rows = features.flatten(0, 2)
    with torch.no_grad():
        target = tables.logits(blocks.target.flatten(0, 2))
    final = results_of(draft.project(rows), target, draft, blocks, combination)
    base = None
    if factors[1]:
        mean_alpha = final.alpha.detach().mean()
        base = results_of(draft.project_base(rows), target, draft, blocks, combination, mean_alpha)
    return final, base, lambda value: value


def results_of(
    logits: Float[Tensor, "S W"],
    target: Float[Tensor, "S V"],
    draft: Draft,
    blocks: Blocks,
    combination: Combination,
    mean_alpha: Float[Tensor, ""] | None = None,
) -> SlotResults:
    """Results of the supervised slots by the logits of all S slots. `mean_alpha` is what a blend over the batch reads
    (None: that of these logits)."""
    kept, ids, blend = blocks.mask.flatten(), draft.draft_vocabulary, combination.blend
    with torch.no_grad():
        top, target_top = logits.argmax(-1), target.argmax(-1)
        top = top if ids is None else ids[top]
    labels = blocks.labels.flatten()
    columns, inside = draft_columns(labels, ids, target.shape[-1])
    inside = inside & (logits.detach().gather(1, columns.clamp_min(0)[:, None])[:, 0] > -torch.inf)
    wanted = {*combination.coefficients, *(["kl"] if blend else [])}
    values = {name: value[kept] for name, value in slot_terms(logits, target, labels, ids, wanted).items()}
    active = {term: values[term] for term in combination.coefficients}
    if combination.softened is not None:
        active["kl"] = softened_kl(logits[kept], target[kept], combination.softened, ids)
    if blend is not None:
        mean_alpha = values["alpha"].mean() if mean_alpha is None else mean_alpha
        share = blend.weight(values["alpha"] if blend.over == "row" else mean_alpha)
        active["blend"] = share * values["kl"] + (1 - share) * (1 - values["alpha"])
    return SlotResults(
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
