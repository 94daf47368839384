"""The straightforward implementation of the objective, by autograd on whole logits: the oracle of the chunked one.

Every block, supervised or not, goes through both heads at once, as in the usual training code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specbench.blocks import Blocks
from specbench.losses.objective import Loss, Objective, total
from specbench.losses.row_pass import SlotResults
from specbench.losses.terms import slot_terms
from specbench.models.fast.projection import leaves

if TYPE_CHECKING:
    from specbench.drafts.draft import Draft
    from specbench.models.embedding_head import Tables


def reference_objective(
    objective: Objective, draft: Draft, tables: Tables, blocks: Blocks, positions: int | None = None
) -> Loss:
    """The same value, weight, terms and statistics as `objective(draft, tables, blocks)`, with [rows x V] tensors."""
    kept, ids, blend = blocks.mask.flatten(), draft.draft_vocabulary, objective.blend
    features, confidence = draft.features(blocks.hidden, blocks.previous), objective.predict(draft, blocks)
    logits = draft.project(features.flatten(0, 2))
    with torch.no_grad():
        target = tables.logits(blocks.target.flatten(0, 2))
        top, target_top = logits.argmax(-1), target.argmax(-1)
        top = top if ids is None else ids[top]
    labels = blocks.labels.flatten()
    inside = torch.ones_like(kept) if ids is None else torch.isin(labels, ids)
    wanted = {*objective.coefficients, *(["kl"] if blend else [])}
    values = {name: value[kept] for name, value in slot_terms(logits, target, labels, ids, wanted).items()}
    active = {term: values[term] for term in objective.coefficients}
    if blend is not None:
        share = blend.weight(values["alpha"] if blend.over == "row" else values["alpha"].mean())
        active["blend"] = share * values["kl"] + (1 - share) * (1 - values["alpha"])
    rows = SlotResults(
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
    shared = [*draft.projection_parameters(), *leaves(features)]
    return total(objective, blocks, rows, confidence, shared, positions)


def unrolled_objective(objective: Objective, draft: Draft, tables: Tables, blocks: Blocks) -> Tensor:
    """Mean soft cross-entropy of a draft unrolled from every position, as its trainers usually compute it.

    The target's distribution of all positions is made once; each step's whole logits live until the backward pass.
    `blocks` must start one at every position of the batch. For objectives of soft_ce alone with static slot weights.
    """
    assert objective.coefficients.keys() == {"soft_ce"} and not objective.slot_weight.dynamic
    with torch.no_grad():
        judged = tables.logits(blocks.target[:, :, 0].flatten(0, 1)).float().softmax(-1)
        best = judged.argmax(-1)
    weights = objective.slot_weight.static(blocks.mask.shape[-1], blocks.mask.device).float()
    features = draft.features(blocks.hidden, blocks.previous)
    value, hits = judged.new_zeros(()), []
    for k, weight in enumerate(weights):
        logits = draft.project(features[:, :, k].flatten(0, 1))
        seen, kept = blocks.source[..., k].flatten(), blocks.mask[..., k].flatten()
        losses = -(judged[seen] * logits.float().log_softmax(-1)).sum(-1)
        hits.append((logits.detach().argmax(-1) == best[seen])[kept].sum())
        value = value + weight * (losses * kept).sum()
    return objective.coefficients["soft_ce"] * value / (weights * blocks.mask.flatten(0, 1).sum(0)).sum()
