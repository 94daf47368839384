"""specbench import: convert a draft of any published format to the format of SpecBench."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from omegaconf import DictConfig

from specbench.checkpoints.draft_folder import assemble_draft, fetch, read_folder, save_draft, ships_embedding
from specbench.checkpoints.formats import read
from specbench.cli.assembly import own_methods
from specbench.cli.errors import naming
from specbench.cli.stages import say
from specbench.cli.summary import report
from specbench.files.folder_swap import replacing_folder
from specbench.models.embedding_head import Tables
from specbench.models.target import Target


def run(cfg: DictConfig) -> Path:
    """Fetch, understand, build (which checks every tensor) and write; returns the folder."""
    began = time.monotonic()
    folder = vacant(Path(cfg.folder or Path(cfg.root) / "import" / Path(cfg.draft).name), cfg.force)
    source = fetch(cfg.draft, cfg.revision)
    taps, methods = cfg.target_layer_ids, own_methods(cfg.methods)
    with naming("draft", cfg.draft):
        config, tensors = read_folder(source)
        reading = read(config, tensors, None if taps is None else list(taps), methods)
        draft = assemble_draft(reading, target_tables(cfg.target_id, source))
    with replacing_folder(folder) as made:
        save_draft(draft, made, reading.text, reading.settings)
    size = len(draft.tables.head)
    facts = {
        "method": type(draft).__name__,
        "backbone": draft.backbone.family,
        "slots": draft.block_size,
        "taps": str(list(draft.target_layer_ids)),
        "vocabulary": f"{size:,} of {draft.backbone.vocab_size:,} tokens",
        "parameters": sum(p.numel() for p in draft.parameters()),
    }
    then = f"evaluate it with draft={folder} and the target that it was made for"
    if cfg.target_id:
        then = shlex.join(["specbench", "evaluate", f"draft={folder}", f"target={cfg.target_id}", f"root={cfg.root}"])
    report("import", folder, time.monotonic() - began, facts, then)
    return folder


def vacant(folder: Path, force: bool) -> Path:
    """The folder, if it can be written. Errors: ValueError if it has a draft and `force` is false."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds files that are no draft: choose another folder=")
    if (folder / "config.json").exists() and not force:
        raise ValueError(f"{folder} holds a draft already: choose another folder=, or force=true to write over it")
    return folder


def target_tables(target: str | None, draft: Path) -> Tables | None:
    """Embedding and head of a target by folder or Hub id, for a draft without them; None if not needed."""
    if target is None or ships_embedding(draft):
        return None
    say(f"reading the tables of {target}")
    return Target.load(target, []).tables
