"""Load a draft for a target in memory, and the record of its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specbench.checkpoints import draft_folder
from specbench.checkpoints.draft_folder import FormatError
from specbench.drafts.baselines import SMALL, Baseline, is_baseline, short_name
from specbench.drafts.draft import Draft
from specbench.models.target import Target
from specbench.runs.run_folder import read_settings, read_summary
from specbench.training.draft_training import digest

PLAIN = "plain"  # decoding without a draft


@dataclass(frozen=True)
class DraftRecord:
    """What the records of an evaluation say of its draft: method, training seed, the runs that it comes from, and what
    its training cost."""

    method: str
    seed: int = 0
    parents: list[str] = field(default_factory=list)
    costs: dict[str, Any] = field(default_factory=dict)


def draft_place(source: str | Path) -> Path | None:
    """The draft folder that a text means: itself, draft/ of a training run, or one of the hub; None for plain decoding
    and the baselines, which have none. Errors: FormatError where there is no draft."""
    if source == PLAIN or is_baseline(str(source)):
        return None
    path = draft_folder.fetch(source)
    if (path / "draft" / "config.json").is_file():
        return path / "draft"
    if (path / "summary.json").is_file():
        raise FormatError(f"draft={source}: this run has no draft yet ({read_summary(path)['status']}); train it first")
    return path


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
    folder = draft_place(source)
    if folder is None:
        raise FormatError(f"draft={source} is decoded without a draft folder: there is nothing to load")
    draft = draft_folder.load_draft(folder, target.tables, target.dtype, methods=methods)
    width = target.tables.embedding.shape[-1]
    if draft.backbone.hidden_size != width:
        raise FormatError(
            f"draft={source} has width {draft.backbone.hidden_size} and target {target.name} has {width}: they do not "
            "belong together"
        )
    return draft.to(target.device)


def record_of(source: str, folder: Path | None, target: str) -> DraftRecord:
    """Method, training seed and parents of the draft `source`, whose draft folder is `folder`: from its training run
    where it has one. Errors: ValueError for a draft of another target."""
    if folder is None:
        small = source.startswith(SMALL)
        return DraftRecord(f"small-{short_name(source.removeprefix(SMALL))}" if small else source)
    if not (Path(source) / "summary.json").is_file():
        return DraftRecord((draft_folder.read_config(folder).get("architectures") or ["draft"])[0])
    summary = read_summary(source)
    seed = read_settings(source).get("seed")
    if not isinstance(seed, dict) or not isinstance(seed.get("init"), int):
        raise ValueError(f"{Path(source) / 'config.yaml'} has no seed.init: it is not the record of a training")
    if summary.get("target") not in (None, target):
        raise ValueError(
            f"draft={source} was trained for target {summary['target']}; evaluate it with target={summary['target']}"
        )
    costs = {
        "draft_parameters": summary.get("parameters"),
        "training_tokens": summary.get("trained_tokens"),
        "training_flops": summary.get("training_flops"),
        "training_seconds": summary.get("training_seconds"),
        "peak_memory": summary.get("peak_memory"),
        "convergence": summary.get("convergence"),
        "cache_bytes": summary.get("lineage", {}).get("cache", {}).get("bytes"),
    }
    return DraftRecord(summary["method"], seed["init"], [source], costs)


def weights_of(draft: Draft | Baseline | None) -> str | None:
    """What identifies a draft: the digest of its weights, or a baseline's own name for itself."""
    return draft.weights_hash if isinstance(draft, Baseline) else draft and digest(draft.state_dict().items())
