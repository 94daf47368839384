"""The published numbers (analysis/paper/*.csv) and the differences of ours from them.

Source: Cheng et al. 2026, "DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation":
table 1 and figures 2, 4, 5 and 6; rows with numbers that were read from a figure say so.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis.read.records import CHAIN

PAPER = Path(__file__).parents[1] / "paper"
SOURCE = "DSpark paper (Cheng et al. 2026), table 1"


def spelling(name: object) -> str:
    """One spelling of a target or benchmark: Qwen/Qwen3-4B and qwen3_4b, mt-bench and mt_bench."""
    return str(name).rstrip("/").rpartition("/")[2].lower().replace("-", "_").replace(".", "_")


def table(name: str) -> pd.DataFrame:
    """One of the committed files: table1_accepted_length, fig2_conditional_acceptance, claims, ..."""
    path = PAPER / f"{name}.csv"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in PAPER.glob("*.csv")))
        raise ValueError(f"no published numbers named {name!r}; there are {known}")
    return pd.read_csv(path)


def gap(accepted_length: pd.DataFrame) -> pd.DataFrame:
    """Our accepted lengths beside the published ones, for the target, method and benchmark that both have.

    `gap` = ours - published, `relative` = gap / published, `inside` = the published value is inside our interval (which
    is over our prompts only: the published table gives no error). Empty if there is nothing in common.
    """
    chains = accepted_length[accepted_length["tree"] == CHAIN]  # as those of the paper are
    ours, theirs = (
        frame.assign(**{f"_{key}": frame[key].map(spelling) for key in ("target", "method", "benchmark")})
        for frame in (chains, table("table1_accepted_length"))
    )
    on = ["_target", "_method", "_benchmark"]
    theirs = theirs[[*on, "accepted_length"]].rename(columns={"accepted_length": "published"})
    both = ours.merge(theirs, on=on, how="inner").drop(columns=on)
    both["gap"] = both["accepted_length"] - both["published"]
    both["relative"] = both["gap"] / both["published"]
    both["inside"] = both["published"].between(both["low"], both["high"])
    return both.assign(source=SOURCE)
