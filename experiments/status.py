"""specbench status: list what exists below a root, its status, and the next command."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig

from specbench.cli import inventory


def run(cfg: DictConfig) -> None:
    """Print the page, or with `json` the same as JSON."""
    show(Path(cfg.root), cfg.json)


def show(root: Path, as_json: bool = False) -> None:
    """The same for a root without a configuration. Errors: ValueError if it is a file."""
    found, others = inventory.items(root), inventory.other_roots(root)
    if as_json:
        why, command = inventory.next_command(found, root, others)
        data = {"root": str(root), "items": inventory.as_data(found), "next": {"why": why, "command": command}}
        print(json.dumps(data, indent=1))
    else:
        print(inventory.page(root, found, others))
