"""specbench leaderboard: a static site from a folder of results."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from analysis.html.leaderboard import DATA, write_site
from analysis.read.results import check as check_result
from analysis.read.results import result_files
from experiments.check_submission import suite_problems
from specbench.cli.checks import check_before
from specbench.cli.summary import report
from specbench.files.folder_swap import replacing_folder


def run(cfg: DictConfig) -> Path:
    """Check every result and write the site; returns its folder. Errors: ValueError for a result that does not hold."""
    began = time.monotonic()
    check_before("leaderboard", cfg)
    found = [check_result(file) for file in result_files(cfg.results)]
    for one in found:
        problems = [*one.problems, *suite_problems(one.result)]
        if problems:
            raise ValueError(
                f"{one.path} is not in order ({problems[0]}): `specbench check-submission {one.path}` lists everything"
            )
    names = [one.result.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"results={cfg.results} holds {twice[0]} twice: remove one of the files")
    with replacing_folder(Path(cfg.folder)) as made:
        files = write_site(found, made, cfg.title, shlex.join(["specbench", *sys.argv[1:]]))
    facts = {"results": len(found), "pages": len(files), "page": str(Path(cfg.folder) / "index.html")}
    report("leaderboard", cfg.folder, time.monotonic() - began, facts, next="open the page in a browser")
    return Path(cfg.folder)


def check(cfg: DictConfig) -> None:
    """A folder with anything but an earlier site is not replaced."""
    folder = Path(cfg.folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / DATA).is_file()):
        raise ValueError(f"folder={folder} holds something that is no leaderboard: name a new folder, or remove it")
