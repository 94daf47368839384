"""specbench compare: tables, figures and one HTML page of any runs, from local folders and W&B projects."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from analysis.compare import Comparison
from analysis.compare import compare as compare_runs
from specbench.cli.checks import check_before
from specbench.cli.stages import container
from specbench.cli.summary import report
from specbench.progress import Progress


def run(cfg: DictConfig) -> Path:
    """Write root/compare/NAME and print the table; returns the folder."""
    began = time.monotonic()
    check_before("compare", cfg)
    made = comparison(cfg)
    print(made.text)
    figure = next((path for path in made.files if path.suffix == ".png"), None)
    facts = {"figure": str(figure)} if figure else {}
    facts |= {"page": str(made.folder / "report.html"), "files": len(made.files)}
    report("compare", made.folder, time.monotonic() - began, facts, next="open the page in a browser")
    return made.folder


def comparison(cfg: DictConfig, title: str | None = None) -> Comparison:
    """The comparison with the settings of `cfg`, by `analysis.compare`."""
    settings = container(cfg)
    runs = list(cfg.runs) if isinstance(cfg.runs, ListConfig) else cfg.runs
    with Progress("compare", None, "steps") as bar:

        def shown(step: str, done: int, steps: int) -> None:
            bar.total = steps
            bar.advance(done - bar.count, note=step)

        return compare_runs(
            runs,
            Path(cfg.root) / "compare" / cfg.name,
            filters(settings),
            [settings["group_by"]] if isinstance(settings["group_by"], str) else settings["group_by"],
            resamples=cfg.resamples,
            seed=cfg.seed,
            minimum_shared=cfg.minimum_shared,
            holm=cfg.holm,
            cache=Path(cfg.root) / "wandb",
            title=title,
            command=shlex.join(["specbench", *sys.argv[1:]]),
            width=shutil.get_terminal_size((120, 40)).columns,
            draw=cfg.figures,
            calibrations=settings["calibrations"],
            published_curves=cfg.published,
            appendix=cfg.appendix,
            progress=shown,
        )


def filters(settings: dict) -> list[str]:
    """The settings that choose runs, as `key=value` texts."""
    chosen = {key: value for key, value in settings["filters"].items() if value is not None}
    texts = [f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in chosen.items()]
    where = settings["where"]
    return [*texts, *(where.split() if isinstance(where, str) else where)]
