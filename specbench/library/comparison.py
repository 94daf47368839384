"""Compare evaluations of this process with runs on disk."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.compare import Comparison
from analysis.compare import compare as compare_runs
from specbench.library.evaluation import Evaluation

ComparedRun = Evaluation | str | Path


def compare(
    sources: ComparedRun | Sequence[ComparedRun], folder: str | Path | None = None, **settings: Any
) -> Comparison:
    """Compute the tables of several evaluations, paired by prompt, as `specbench compare` does.

    Args:
        sources: evaluations, run folders, folders above run folders, `wandb:ENTITY/PROJECT`, in any combination.
        folder: where tables, figures and report.html are written. None: only tables, in a temporary folder that is
            removed with the result.
        **settings: arguments of `analysis.compare.compare`: filters, group_by, resamples, seed, holm, draw, ...

    Returns:
        The comparison: `.table(name="accepted_length")` is a data frame (also macro_average, differences, suffix_decay,
        ...), `.markdown()` the main tables as text, `.frames` all tables by name.

    Raises:
        ValueError: nothing can be compared, or numbers of different protocols would be in one column.
    """
    several = [sources] if isinstance(sources, (Evaluation, str, Path)) else sources
    named = [one.folder if isinstance(one, Evaluation) else one for one in several]
    place = Path(tempfile.mkdtemp(prefix="specbench-")) if folder is None else Path(folder)
    try:
        found = compare_runs(named, place, **({"draw": folder is not None} | settings))
    except BaseException:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)
        raise
    if folder is None:
        weakref.finalize(found, shutil.rmtree, place, True)
    return found
