"""A draft that starts from another draft's weights."""

from __future__ import annotations

from pathlib import Path

import torch

from specbench.checkpoints.draft_folder import fetch, load_draft
from specbench.drafts.draft import Draft
from specbench.models.embedding_head import Tables


@torch.no_grad()
def from_draft(draft: Draft, folder: str | Path, tables: Tables | None) -> tuple[list[str], list[str]]:
    """Copy the weights of the draft in a folder, in any supported format; returns the names that were copied, and those
    that were not, because that draft has no such tensor, or one of another shape.

    `tables` are the target's, for formats without tables. Modules that read the taps (`Draft.tap_modules`; if unknown,
    all) are copied only from a draft with the same taps. Errors: ValueError if nothing fits; FormatError for a folder
    that cannot be read.
    """
    path = fetch(folder)
    path = path / "draft" if (path / "draft").is_dir() else path
    found = load_draft(path, tables, taps=list(draft.target_layer_ids), methods=[type(draft)])
    given, own = found.state_dict(), draft.state_dict()
    if found.target_layer_ids != draft.target_layer_ids:
        unknown = ("",) if draft.reads_taps else ()
        tapped = unknown if draft.tap_modules is None else tuple(f"{name}." for name in draft.tap_modules)
        given = {name: value for name, value in given.items() if not name.startswith(tapped)}
    if draft.tables.trainable and _same_rows(found.tables.ids, draft.tables.ids):
        given |= {"tables.embedding": found.tables.embedding, "tables.head": found.tables.head}
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise ValueError(f"start={folder}: no tensor there fits this draft; choose a draft of the same taps and widths")
    draft.load_state_dict(fitting, strict=False)
    return sorted(fitting), sorted(own.keys() - fitting)


def _same_rows(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.cpu(), other.cpu())
