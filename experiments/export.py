"""specbench export: write a draft in a published format, with a model card from its records; upload it with push=."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.import_draft import target_tables, vacant
from specbench.checkpoints.draft_folder import export_draft, fetch, read_config
from specbench.checkpoints.model_card import model_card, serving_command
from specbench.checkpoints.publishing import push, require_vacant
from specbench.cli.assembly import own_methods
from specbench.cli.errors import naming
from specbench.cli.summary import report
from specbench.files.atomic import read_object, write_text
from specbench.files.folder_swap import replacing_folder
from specbench.models.target_files import location
from specbench.runs.run_folder import read_settings, read_summary


def run(cfg: DictConfig) -> Path:
    """Write the folder and its README.md; returns the folder."""
    began = time.monotonic()
    if cfg.push:
        require_vacant(cfg.push, cfg.force)  # before any work
    path = fetch(cfg.draft)
    source = path / "draft" if (path / "draft" / "config.json").is_file() else path
    training = record(path) if (path / "summary.json").is_file() else None
    folder = vacant(Path(cfg.folder or Path(cfg.root) / "export" / f"{path.name}-{cfg.format}"), cfg.force)
    target = cfg.target_id or (training or {}).get("config", {}).get("target", {}).get("id")
    target = None if target is None else str(location(target))  # an engine knows no package:PATH
    methods = own_methods(cfg.methods)
    found = evaluations(cfg, path)
    with replacing_folder(folder) as made:
        with naming("draft", cfg.draft):
            export_draft(source, made, cfg.format, target, target_tables(cfg.target_id, source), methods)
        about = read_config(made)
        dtype = about.get("dtype") or about.get("torch_dtype")
        card = model_card(cfg.push or folder.name, cfg.format, target, cfg.licence, training, found, dtype, about)
        write_text(made / "README.md", card)
    facts: dict[str, Any] = {"format": cfg.format, "evaluations in the card": len(found)}
    if command := serving_command(str(folder), cfg.format, target or "TARGET", about):
        facts["serve"] = command
    if cfg.push:
        try:
            facts["address"] = push(folder, cfg.push, cfg.private, cfg.force)
        except ValueError as error:
            raise ValueError(f"{error}; the export lies in {folder}, force=true repeats it and the upload") from error
    report("export", folder, time.monotonic() - began, facts)
    return folder


def record(run: Path) -> dict[str, Any]:
    """Summary, configuration and provenance of a run folder."""
    config = read_settings(run)
    provenance = read_object(run / "provenance.json")
    return {"summary": read_summary(run), "config": config, "provenance": provenance}


def evaluations(cfg: DictConfig, draft: Path) -> list[dict[str, Any]]:
    """Summaries of the finished evaluations named, or of all below root/runs/evaluate whose parent is this draft."""
    if cfg.evaluations is not None:
        return [read_summary(folder) for folder in cfg.evaluations]
    found = []
    for file in sorted((Path(cfg.root) / "runs" / "evaluate").glob("[!.]*/summary.json")):
        summary = read_summary(file.parent)
        parents = summary.get("lineage", {}).get("parents", [])
        if summary.get("status") == "finished" and any(Path(p).resolve() == draft.resolve() for p in parents):
            found.append(summary)
    return found
