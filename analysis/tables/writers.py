"""Sheets as Markdown, LaTeX (booktabs), HTML and a terminal table; frames as CSV."""

from __future__ import annotations

import html as escaping
import unicodedata
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.tables.sheets import Cell, Sheet

LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "±": r"$\pm$",
        "†": r"$^{\dagger}$",
        "‡": r"$^{\ddagger}$",
        "×": r"$\times$",
        "≤": r"$\le$",
        "≥": r"$\ge$",
        "−": r"$-$",
        "–": r"\textendash{}",
        "—": r"\textemdash{}",
        "`": r"{}`",  # after ? and ! it would be another character
        "…": r"\ldots{}",
        "\n": " ",
        "\t": " ",
    }
)

# A table of more columns than these is wider than a page as it is.
WIDE = 8


def markdown(sheets: Sequence[Sheet]) -> str:
    """GitHub tables; the domain stands before the benchmark, as Markdown has one header line."""
    parts = []
    for sheet in sheets:
        columns = [_md(name) for name in _joined(sheet)]
        lines = [f"### {_md(sheet.title)}", "", f"| {' | '.join(columns)} |"]
        lines.append("|" + "|".join(["---", *["---:"] * (len(columns) - 1)]) + "|")
        for row in sheet.rows:
            lines.append("| " + " | ".join(f"**{_md(c.text)}**" if c.best else _md(c.text) for c in row) + " |")
        lines += [text for note in sheet.notes for text in ("", _md(note))]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")


def _joined(sheet: Sheet) -> list[str]:
    if not sheet.spans:
        return list(sheet.columns)
    above = [text for text, width in sheet.spans for _ in range(width)]
    return [
        column if not span else "macro, all" if span == "all" else f"{span}: {column}"
        for span, column in zip(above, sheet.columns, strict=True)
    ]


def latex(sheets: Sequence[Sheet]) -> str:
    """One table environment per sheet, with booktabs rules; a table of more than WIDE columns is scaled to the width of
    a page. Needs \\usepackage{booktabs}, and graphicx for wide ones."""
    parts = []
    for sheet in sheets:
        wide = len(sheet.columns) > WIDE
        kind = "table*" if wide else "table"
        lines = [
            rf"\begin{{{kind}}}",
            r"\centering",
            rf"\caption{{{tex(sheet.title)}. {tex(' '.join(sheet.notes))}}}",
        ]
        lines += [r"\resizebox{\textwidth}{!}{%"] if wide else []
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(sheet.columns) - 1)}}}", r"\toprule"]
        if sheet.spans:
            first, cells, rules = 1, [], []
            for text, width in sheet.spans:
                cells.append(rf"\multicolumn{{{width}}}{{c}}{{{tex(text)}}}")
                rules += [rf"\cmidrule(lr){{{first}-{first + width - 1}}}"] if text else []
                first += width
            lines += [" & ".join(cells) + r" \\", " ".join(rules)]
        lines += [" & ".join(tex(name) for name in sheet.columns) + r" \\", r"\midrule"]
        for row in sheet.rows:
            lines.append(tex_row(row))
        lines += [r"\bottomrule", r"\end{tabular}" + ("}" if wide else ""), rf"\end{{{kind}}}"]
        parts.append("\n".join(lines))
    packages = "booktabs,graphicx" if any(len(sheet.columns) > WIDE for sheet in sheets) else "booktabs"
    return f"% needs \\usepackage{{{packages}}}\n" + "\n\n".join(parts) + "\n"


def tex(text: str, code: bool = False) -> str:
    """A text with every character that TeX gives a meaning escaped. One outside of the accented Latin letters, which
    the usual fonts do not have, becomes its code point. code: hyphens and spaces stay as they are typed."""
    made = []
    for character in text:
        if ord(character) in LATEX:
            made.append(LATEX[ord(character)])
        elif " " <= character <= "~" or _accented(character):
            made.append(character)
        else:
            made.append(f"[U+{ord(character):04X}]")
    whole = "".join(made)
    # Two hyphens would be a dash.
    return whole.replace("-", "-{}").replace(" ", "~") if code else whole.replace("--", "-{}-")


def _accented(character: str) -> bool:
    """Whether the font encoding T1 has this letter: a Latin letter with its accent, or one of a few more."""
    parts = unicodedata.decomposition(character)
    return character in "ÆØÞßæøþŁłŒœ" or ("À" <= character <= "ž" and bool(parts) and not parts.startswith("<"))


def tex_row(row: Sequence[Cell]) -> str:
    """A row of a tabular. An empty group before a bracket or star, which would be an argument of the line before."""
    line = " & ".join(rf"\textbf{{{tex(cell.text)}}}" if cell.best else tex(cell.text) for cell in row)
    return ("{}" if line.startswith(("[", "*")) else "") + line + r" \\"


def html(sheet: Sheet) -> str:
    """A <table> whose columns can be sorted by the page's own script (data-sort holds the number)."""
    out = [f'<table class="sortable" id="{escaping.escape(sheet.name)}">']
    out.append(f"<caption>{escaping.escape(sheet.title)}</caption><thead>")
    if sheet.spans:
        cells = "".join(
            f'<th colspan="{width}" class="span">{escaping.escape(text)}</th>' for text, width in sheet.spans
        )
        out.append(f"<tr>{cells}</tr>")
    # Text columns read from the left, numbers from the right.
    text = [all(row[i].sort is None for row in sheet.rows) for i in range(len(sheet.columns))]
    kinds = [' class="text"' if is_text else "" for is_text in text]
    names = "".join(
        f'<th scope="col"{kind}><button type="button">{escaping.escape(name)}</button></th>'
        for name, kind in zip(sheet.columns, kinds, strict=True)
    )
    out.append(f'<tr class="keys">{names}</tr></thead><tbody>')
    for row in sheet.rows:
        cells = []
        for index, cell in enumerate(row):
            tag, scope = ("th", ' scope="row"') if index == 0 else ("td", "")
            sort = "" if cell.sort is None or pd.isna(cell.sort) else f' data-sort="{cell.sort:.6g}"'
            shown = f"<b>{escaping.escape(cell.text)}</b>" if cell.best else escaping.escape(cell.text)
            cells.append(f"<{tag}{scope}{kinds[index]}{sort}>{shown}</{tag}>")
        out.append(f"<tr>{''.join(cells)}</tr>")
    out.append("</tbody></table>")
    out += [f'<p class="note">{escaping.escape(note)}</p>' for note in sheet.notes]
    return "\n".join(out)


def terminal(sheets: Sequence[Sheet], width: int = 120) -> str:
    """The sheets as text for a terminal `width` columns wide (no colour codes: the caller may print it anywhere)."""
    console = Console(file=StringIO(), width=width, record=True, force_terminal=False, color_system=None)
    for sheet in sheets:
        table = rich_table(sheet)
        # An interval that has no room beside its value stands below it, in one piece.
        fits = console.measure(table, options=console.options.update(width=10 * width)).maximum <= width
        console.print(table if fits else rich_table(sheet, below=True))
    return console.export_text()


def rich_table(sheet: Sheet, below: bool = False) -> Table:
    """One sheet as a rich table; the resolved best in bold, marked with * so that a log shows it too. below: intervals
    stand below their values."""

    def text(cell: Cell) -> str:
        marked = f"{cell.text} *" if cell.best else cell.text
        if not below or cell.sort is None or " [" not in cell.text:
            return marked
        value, _, interval = cell.text.partition(" [")
        return f"{value} *\n[{interval}" if cell.best else f"{value}\n[{interval}"

    # As plain text, because brackets in the name of a row are not markup.
    title, caption = Text(sheet.title), Text(" ".join(sheet.notes))
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    above = [text for text, span in sheet.spans for _ in range(span)] or [""] * len(sheet.columns)
    for index, (span, name) in enumerate(zip(above, sheet.columns, strict=True)):
        head = f"{span}\n{name}" if span and span != name else name
        parts = [len(line) for row in sheet.rows for line in text(row[index]).split("\n")] if below else []
        needed = max(parts, default=0) if any("[" in row[index].text for row in sheet.rows) else None
        table.add_column(
            Text(head),
            justify="left" if index == 0 else "right",
            no_wrap=index == 0,
            min_width=needed if below else None,
        )
    for row in sheet.rows:
        table.add_row(*(Text(text(cell), style="bold" if cell.best else "") for cell in row))
    return table


def csv(frame: pd.DataFrame, path: Path, columns: Sequence[str] | None = None) -> Path:
    """Write a frame; `columns` come first and exactly so, what the user grouped by beside them follows."""
    if columns is not None:
        hidden = {"variant", "short"}
        if "configuration" in frame and not frame["configuration"].any():
            hidden.add("configuration")
        frame = frame[[*columns, *(name for name in frame.columns if name not in {*columns, *hidden})]]
    frame.to_csv(path, index=False, float_format="%.6g")
    return path
