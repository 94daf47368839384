"""A draft from a folder, for a target in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specbench.checkpoints import draft_folder
from specbench.drafts.draft import Draft
from specbench.models.target import Target


def load_draft(source: str | Path, target: Target, *, methods: Sequence[type[Draft]] = ()) -> Draft:
    """The draft of a folder, a training run or a hub id, in any format that is known, on the target's device.

    `methods` are classes of methods outside of this package that the folder may ask for. Errors: FormatError, a
    ValueError, for a folder that does not hold a whole draft, or one for a target of other sizes.
    """
    folder = draft_folder.fetch(source)
    if (folder / "draft" / "config.json").is_file():
        folder = folder / "draft"
    draft = draft_folder.load_draft(folder, target.tables, target.dtype, methods=methods)
    width = target.tables.embedding.shape[-1]
    if draft.backbone.hidden_size != width:
        raise draft_folder.FormatError(
            f"draft={source} has width {draft.backbone.hidden_size} and target {target.name} has {width}: they do not "
            "belong together"
        )
    return draft.to(target.device)
