"""A comparison as a LaTeX appendix: definitions, protocol, tables with intervals, figures and commands.

    appendix.tex         a document of its own, for latexmk
    appendix_body.tex    its content, for \\input into a paper; its first lines name the packages that it needs

Texts come from runs and from their users, so every character that TeX gives a meaning is escaped, and one that the
fonts do not have is written as its code point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from analysis.html.content import Commands, Content, Drawing, Paragraph
from analysis.tables import writers
from analysis.tables.sheets import Cell, Sheet

PACKAGES = ("booktabs", "graphicx", "longtable", "amsmath")
TEXT_WIDTH = 6.5  # inches of a line of appendix.tex
LINE = 88  # characters of a line of a command
LISTED = 6  # values of a setting that are listed; of more the number is given
PREAMBLE = r"""\documentclass[10pt]{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\IfFileExists{lmodern.sty}{\usepackage{lmodern}}{}
\usepackage[letterpaper,margin=1in]{geometry}
\usepackage{%s}
\begin{document}
\appendix
\input{appendix_body}
\end{document}
"""
# The definitions of docs/evaluation.md: names, and formulas in TeX.
DEFINITIONS = (
    (
        "Round",
        r"The draft proposes $m$ tokens and the target accepts the first $j \le m$ of them. The round commits $j+1$ "
        r"tokens, or $j$ where an accepted stop token ends the text.",
    ),
    (
        "Accepted length",
        r"$\sum_r c_r / R$, with $c_r$ the tokens that round $r$ commits (bonus token included) and $R$ the rounds of "
        r"all prompts. Macro averages are unweighted means over benchmarks.",
    ),
    (
        "Conditional acceptance",
        r"$\alpha_k = \#\{r: j_r \ge k\} / \#\{r: m_r \ge k,\, j_r \ge k-1\}$ for slot $k$.",
    ),
    ("Survival", r"$S_k = \#\{r: j_r \ge k\} / \#\{r: m_r \ge k\}$."),
    (
        "Suffix decay",
        r"The slope $b$ of $\log \alpha_k = a + b k$, fitted by likelihood to the accepted counts of every slot with a "
        r"round.",
    ),
    (
        "Speedup",
        r"Tokens per second relative to plain decoding of the same prompts by the same target, interleaved in one "
        r"process.",
    ),
    (
        "Intervals",
        r"95\%. About these checkpoints: cluster bootstrap over prompts, with half-width $h$. About the method: "
        r"$\sqrt{h^2 + t^2 v (1/S_a + 1/S_b)}$ for a difference, with $v$ the variance between trainings, pooled over "
        r"the methods, and $S$ the trainings of each.",
    ),
)


def write(output: Path, content: Content, frames: Mapping[str, pd.DataFrame]) -> list[Path]:
    """Write appendix.tex and appendix_body.tex into `output`; figures are those of output/figures."""
    files = {"appendix.tex": PREAMBLE % ",".join(PACKAGES), "appendix_body.tex": body(content, frames)}
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8")
    return [output / name for name in files]


def body(content: Content, frames: Mapping[str, pd.DataFrame]) -> str:
    """The sections of the appendix as LaTeX."""
    parts = [f"% needs \\usepackage{{{','.join(PACKAGES)}}}, and \\usepackage[T1]{{fontenc}}"]
    parts += [rf"\section{{{writers.tex(content.title)}}}", writers.tex(content.subtitle)]
    defined = [rf"\item[{name}] {text}" for name, text in DEFINITIONS]
    parts += [r"\subsection{Definitions}", r"\begin{description}", *defined, r"\end{description}"]
    parts += [r"\subsection{Protocol}", _table(protocol(frames["protocols"]))]
    for section in content.sections:
        parts.append(rf"\subsection{{{writers.tex(section.title)}}}")
        for item in section.items:
            if isinstance(item, Paragraph):
                parts.append(writers.tex(item.text))
            elif isinstance(item, Commands):
                parts.append(_commands(item.lines))
            elif isinstance(item, Drawing):
                parts.append(_figure(item))
            elif isinstance(item, Sheet):
                parts.append(_table(item))
        parts.append(r"\clearpage")
    return "\n\n".join(parts) + "\n"


def protocol(frame: pd.DataFrame) -> Sheet:
    """Every setting of the protocol with its value, or its values where rows or benchmarks differ."""
    rows = []
    for key in frame.columns:
        values = list(dict.fromkeys(str(value) for value in frame[key] if not pd.isna(value)))
        some = ", ".join(values) if len(values) <= LISTED else f"{len(values)} values (protocols.csv)"
        rows.append([Cell(str(key)), Cell(some or "-")])
    return Sheet("protocol", "Settings with which numbers were measured", ["setting", "values"], rows)


def _table(sheet: Sheet) -> str:
    """A table that can break over pages; the rows of a wide one are set small, and its long texts are wrapped."""
    longest = [
        max(_length(name), *(_length(row[i].text) for row in sheet.rows), 1) for i, name in enumerate(sheet.columns)
    ]
    size = r"\scriptsize" if sum(longest) + 2 * len(longest) > 95 else r"\footnotesize"
    if sum(longest) + 2 * len(longest) > 150 and all(width <= 30 for width in longest):
        return writers.latex([replace(sheet, notes=[])]) + _notes(sheet)  # many short columns: scaled as a whole
    room = [_width(width, longest, TEXT_WIDTH) for width in longest]
    kinds = "".join(f"p{{{inches:.2f}in}}" if inches else "l" if i == 0 else "r" for i, inches in enumerate(room))
    heads = " & ".join(writers.tex(name) for name in sheet.columns) + r" \\"
    lines = [rf"{{{size}\setlength{{\tabcolsep}}{{3pt}}", rf"\begin{{longtable}}{{@{{}}{kinds}@{{}}}}"]
    lines += [rf"\caption{{{writers.tex(sheet.title)}}} \\", r"\toprule"]
    if sheet.spans:
        over = " & ".join(rf"\multicolumn{{{width}}}{{c}}{{{writers.tex(text)}}}" for text, width in sheet.spans)
        lines.append(over + r" \\")
    lines += [heads, r"\midrule", r"\endfirsthead", r"\toprule", heads, r"\midrule", r"\endhead"]
    lines += [writers.tex_row(row) for row in sheet.rows]
    lines += [r"\bottomrule", r"\end{longtable}}"]
    return "\n".join(lines) + _notes(sheet)


def _length(text: str) -> int:
    """Characters of a text as it is set: one that the fonts do not have takes the eight of its code point."""
    return sum(1 if character <= "ž" else 8 for character in text)


def _width(own: int, all_of_them: Sequence[int], inches: float) -> float:
    """Inches of a column whose longest text is `own` characters: 0 if every column has room for its text."""
    character = 0.058 if sum(all_of_them) + 2 * len(all_of_them) > 95 else 0.068
    gaps = 0.085 * len(all_of_them)
    if sum(all_of_them) * character + gaps <= inches or own <= 24:
        return 0.0
    short = sum(width for width in all_of_them if width <= 24) * character
    long = sum(min(width, 120) for width in all_of_them if width > 24)
    return max(0.6, (inches - gaps - short) * min(own, 120) / long)


def _notes(sheet: Sheet) -> str:
    return "".join(f"\n\n{{\\footnotesize {writers.tex(note)}\\par}}" for note in sheet.notes)


def _figure(drawing: Drawing) -> str:
    inches = min(float(drawing.figure.get_figwidth()), TEXT_WIDTH)
    width = r"\linewidth" if inches == TEXT_WIDTH else f"{inches:.2f}in"
    return "\n".join(
        [
            r"\begin{figure}[!htbp]",
            r"\centering",
            rf"\includegraphics[width={width}]{{figures/{drawing.name}.pdf}}",
            rf"\caption{{{writers.tex(drawing.caption)}}}",
            r"\end{figure}",
            r"\clearpage" if drawing.figure.get_figheight() > 4.5 else "",
        ]
    ).rstrip()


def _commands(lines: Sequence[str]) -> str:
    """Commands in a typewriter font; what is longer than a line goes on in the next one, further to the right."""
    shown = []
    for line in lines:
        first, rest = line[:LINE], line[LINE:]
        pieces = [first, *(rest[at : at + LINE - 4] for at in range(0, len(rest), LINE - 4))]
        shown += [rf"\texttt{{{writers.tex(pieces[0], code=True)}}}\\"]
        shown += [rf"\hspace*{{2em}}\texttt{{{writers.tex(piece, code=True)}}}\\" for piece in pieces[1:]]
    return "\n".join([r"\begin{flushleft}\scriptsize", *shown, r"\end{flushleft}"])
