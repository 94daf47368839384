"""specbench completion: print the script with which a shell completes verbs, groups, settings and their values."""

from __future__ import annotations

from omegaconf import DictConfig

from specbench.cli.completion import SCRIPTS


def run(cfg: DictConfig) -> None:
    """Print the script of `shell`."""
    print(SCRIPTS[cfg.shell], end="")
