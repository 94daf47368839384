"""The content of a report, for both of its forms: HTML (`analysis.html.page`) and W&B blocks (here)."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.tables import writers
from analysis.tables.sheets import Cell, Sheet
from specbench.runs.run_schema import STEP

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report

# The table of conditional acceptance by slot that every evaluation logs.
SLOTS = "slots"


@dataclass(frozen=True)
class Paragraph:
    """A sentence or two."""

    text: str


@dataclass(frozen=True)
class Commands:
    """Lines to type."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Drawing:
    """A figure, its file name without ending, and its description; not `on_page`: only as a file."""

    name: str
    figure: Figure = field(repr=False)
    caption: str
    on_page: bool = True


@dataclass(frozen=True)
class Section:
    """A heading and the content below it."""

    title: str
    items: Sequence[Paragraph | Commands | Drawing | Sheet]


@dataclass(frozen=True)
class Content:
    """A whole report."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def provenance(runs: pd.DataFrame, faults: pd.DataFrame, command: str) -> Section:
    """The sources of the numbers and the commands that repeat them; every run that was left out is named."""
    columns = {
        "run": "run",
        "kind": "kind",
        "method": "method",
        "target": "target",
        "commit": "provenance.code.commit",
        "dirty": "provenance.code.dirty",
        "cache": "provenance.cache.fingerprint",
        "torch": "provenance.versions.torch",
        "processor": "provenance.hardware.processor",
        "gpus": "provenance.hardware.gpus",
        "time": "provenance.time",
    }
    present = {name: key for name, key in columns.items() if key in runs and runs[key].notna().any()}
    rows = [[_cell(row[key]) for key in present.values()] for _, row in runs.iterrows()]
    items: list[Any] = [Sheet("runs", f"{len(runs)} runs were read", list(present), rows)]
    if len(faults):
        left = [[_cell(row["path"]), _cell(row["reason"])] for _, row in faults.iterrows()]
        items.append(Sheet("left_out", f"{len(faults)} run folders were left out", ["folder", "reason"], left))
    else:
        items.append(Paragraph("No run folder was left out."))
    lines = [command]
    if "provenance.command" in runs:
        lines += ["", *dict.fromkeys(_shell(words) for words in runs["provenance.command"].dropna())]
    return Section(
        "Provenance", [*items, Paragraph("To make this page again, and the runs below it:"), Commands(lines)]
    )


def _cell(value: Any) -> Cell:
    text = "-" if value is None or (isinstance(value, float) and pd.isna(value)) else str(value)
    return Cell(text[:60] + ("…" if len(text) > 60 else ""))


def _shell(words: Any) -> str:
    return words if isinstance(words, str) else shlex.join(str(word) for word in words)


def blocks(
    content: Content, entity: str, project: str, methods: Sequence[str], targets: Sequence[str], curves: Sequence[str]
) -> Report:
    """The same content as a W&B report: tables as Markdown, a run set per target and one line plot per curve and
    target, grouped by method, the per-slot tables as charts, and the commands. Builds and serialises without a login.

    Figures are drawn by W&B from the runs themselves: a report cannot hold a local file.
    """
    try:
        from wandb_workspaces.reports import v2
    except ImportError as error:
        raise ValueError("a W&B report needs the extra: pip install 'specbench[report]'") from error
    made: list[Any] = [v2.P(content.subtitle), v2.TableOfContents()]
    for section in content.sections:
        made.append(v2.H1(section.title))
        for item in section.items:
            if isinstance(item, Paragraph):
                made.append(v2.P(item.text))
            elif isinstance(item, Commands):
                made.append(v2.MarkdownBlock(text="\n".join(["```bash", *item.lines, "```"])))
            elif isinstance(item, Sheet):
                made.append(v2.MarkdownBlock(text=writers.markdown([item])))
    made.append(v2.H1("Runs"))
    for target in targets:
        chosen = " or ".join(f"Config('method') == '{method}'" for method in methods)
        filters = f"Config('target') == '{target}' and ({chosen})" if methods else f"Config('target') == '{target}'"
        runs = v2.Runset(name=target, filters=filters, groupby=["config.method"])
        lines = [v2.LinePlot(title=name, x=STEP, y=[name], groupby=v2.Config("method")) for name in curves]
        query = {"summaryTable": {"tableKey": SLOTS}}
        fields = {"x": "slot", "y": "conditional", "stroke": "method"}
        slots = v2.CustomChart(query=query, chart_name="wandb/line/v0", chart_fields=fields)
        made += [v2.H2(target), v2.PanelGrid(runsets=[runs], panels=[*lines, slots])]
    return v2.Report(project=project, entity=entity, title=content.title, description=content.subtitle, blocks=made)


def serialise(report: Report) -> str:
    """What `Report.save` would send, as JSON."""
    return report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)


def publish(report: Report) -> str | None:
    """Save online when there is a key (WANDB_API_KEY); returns the address, or None without a key."""
    if not os.environ.get("WANDB_API_KEY"):
        return None
    return report.save().url
