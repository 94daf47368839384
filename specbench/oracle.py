"""The straightforward implementation of the objective, by autograd on whole logits: the oracle of the chunked one.

Every block, supervised or not, goes through both heads at once, as in the usual training code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from specbench.blocks import Blocks
from specbench.losses import slot_terms
from specbench.objective import Loss, Objective, total
from specbench.projection import leaves
from specbench.rowpass import Rows

if TYPE_CHECKING:
    from specbench.methods.draft import Draft
    from specbench.tables import Tables


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
    rows = Rows(
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
