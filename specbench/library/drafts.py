"""A draft from a folder, for a target in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specbench.checkpoints import draft_folder
from specbench.drafts.draft import Draft
from specbench.models.target import Target


def load_draft(source: str | Path, target: Target, *, methods: Sequence[type[Draft]] = ()) -> Draft:
    """Load a draft from a folder, a training run or the Hugging Face Hub, in any supported format.

    Args:
        source: folder of a draft (docs/formats.md), of a training run, or an id on the Hub.
        target: the target; the draft is put on its device.
        methods: classes of methods outside of this package that the folder can name.

    Returns:
        The draft, in evaluation mode.

    Raises:
        FormatError: a ValueError; the folder has no complete draft, or a draft for a target of other sizes.
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
