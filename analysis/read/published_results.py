"""The published numbers of analysis/paper as results, each marked with its publication.

python -c "from analysis.read.published_results import write; write('results/reported')"
"""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from analysis.tables.published import table
from specbench.files.atomic import write_json
from specbench.runs.result_schema import RESULT, Result, dumped

TITLE = "Cheng et al. 2026, DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation"
NOTE = "The table gives no error, no seeds and no hardware; the macro average is computed from its nine columns."
CURVE = " Conditional acceptance: figure 2, read off the figure to 0.01."
ENTERED = "2026-11-27"  # the day on which the numbers were copied from the publication


def published_results() -> list[Result]:
    """One result for every target and method of table 1, with the curves of figure 2 where it has them."""
    accepted, figure = table("table1_accepted_length"), table("fig2_conditional_acceptance")
    found = []
    for (target, method), own in accepted.groupby(["target", "method"], sort=True):
        curves = _curves(figure[(figure["target"] == target) & (figure["method"] == method)])
        benchmarks = {
            row.benchmark: {"domain": row.domain, "accepted_length": {"value": float(row.accepted_length)}}
            for row in own.itertuples()
        }
        content = {
            "schema": RESULT,
            "name": f"dspark-paper-{method}-{target}",
            "signed_off_by": "copied from the publication",
            "date": ENTERED,
            "source": {"title": TITLE, "where": "table 1", "note": NOTE + (CURVE if curves else "")},
            "draft": {"name": str(method), "slots": 7},
            "target": {"name": str(target)},
            "suite": {"name": "paper", "benchmarks": benchmarks},
            "protocol": {"slots": 7},
            "seeds": {},
            "hardware": {},
            "definitions": {},
            "macro": {"value": float(own["accepted_length"].mean())},
            "curves": curves,
        }
        found.append(Result.model_validate(content))
    return found


def _curves(figure: pd.DataFrame) -> dict[str, list[dict[str, object]]]:
    return {
        str(domain): [
            {"slot": int(row.slot), "conditional": {"value": float(row.conditional_acceptance)}}
            for row in own.sort_values("slot").itertuples()
        ]
        for domain, own in figure.groupby("domain", sort=False)
    }


def write(folder: str | os.PathLike[str]) -> list[Path]:
    """Write one file a result; returns them."""
    files = []
    for result in published_results():
        files.append(Path(folder) / f"{result.name}.json")
        write_json(files[-1], dumped(result))
    return files
