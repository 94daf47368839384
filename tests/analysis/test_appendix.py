"""The LaTeX appendix: every text of a user comes out as text, and the document compiles where TeX is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import appendix
from analysis.figures import style
from analysis.html.content import Commands, Content, Drawing, Paragraph, Section
from analysis.tables import writers
from analysis.tables.sheets import Cell, Sheet

HOSTILE = [
    r"\input{/etc/passwd} \write18{x}",
    "100% of $x_1^2$ & #1 ~ {} \\",
    "[0.1, 0.2] *starred*",
    "draft <|im_start|> \"quoted\" 'single' `back`",
    "éŠßŁ ħŉ÷ naïve 你好 \U0001f600 ± † ‡ ≤ −1 – … µ",
    "line\nbreak\ttab \x07bell",
    "--dashes ,, << >> ?` !`",
    "",
]


def content(drawings=()) -> Content:
    rows = [[Cell(text), Cell(text[::-1], best=True), Cell("4.18 [3.93, 4.43]")] for text in HOSTILE]
    wide = Sheet(
        "wide",
        "A wide one",
        ["method", *(f"b_{i}" for i in range(12))],
        [[Cell("[a] x")] + [Cell("4.18 [3.93, 4.43]")] * 12] * 3,
        [("", 1), ("math & code", 12)],
        ["note 100%"],
    )
    long = Sheet("long", "A long one", ["run", "reason"], [[Cell(f"run_{i}"), Cell("why " * 40)] for i in range(90)])
    hostile = Sheet("hostile", HOSTILE[1], ["method", "a & b", "value"], rows, notes=HOSTILE)
    sections = [
        Section(r"A & B_1 \x", [hostile, wide, long]),
        *([Section("Figures", drawings)] if drawings else []),
        Section("Provenance", [Paragraph(HOSTILE[0]), Commands(["specbench compare runs=[a,b] " + "x=1 " * 60, ""])]),
    ]
    return Content("Comparison of A_1 & B", "7 runs, 100%", sections)


FRAMES = {"protocols": pd.DataFrame({"max_new_tokens": [64, 64], "top_p": [1.0, 0.9], "stop_#": [None, None]})}


def test_every_text_of_a_user_is_escaped_and_the_structure_is_balanced():
    text = appendix.body(content(), FRAMES)
    commands = set(re.findall(r"\\([a-zA-Z]+)", text))
    assert not commands & {"input", "write", "include", "im", "x"}
    assert re.sub(r"\\[{}]", "", text).count("{") == re.sub(r"\\[{}]", "", text).count("}")
    begun = re.findall(r"\\(begin|end)\{(\w+\*?)\}", text)
    open_ones: list[str] = []
    for what, name in begun:
        if what == "begin":
            open_ones.append(name)
        else:
            assert open_ones.pop() == name
    assert not open_ones and "[U+4F60][U+597D]" in text and "[U+1F600]" in text and "[U+0007]" in text
    assert not re.search(r"\\\\\s*\n\s*[\[*]", text)  # a bracket or star would be an argument of the line's end
    assert "max\\_new\\_tokens & 64 " in text and "top\\_p & 1.0, 0.9 " in text and "stop\\_\\# & - " in text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_parser_of_latex_reads_the_text_back(text):
    latexwalker = pytest.importorskip("pylatexenc.latexwalker", reason="needs pylatexenc")
    from pylatexenc.latex2text import LatexNodes2Text

    nodes, _, _ = latexwalker.LatexWalker(writers.tex(text), tolerant_parsing=False).get_latex_nodes()
    read = LatexNodes2Text(keep_comments=True, math_mode="text").nodelist_to_text(nodes)
    kept = "".join(c for c in text if c.isascii() and c.isalnum())
    assert "".join(c for c in re.sub(r"\[U\+\w+\]", "", read) if c.isascii() and c.isalnum()) == kept


def test_the_appendix_compiles(tmp_path: Path):
    if shutil.which("latexmk") is None or shutil.which("pdflatex") is None:
        pytest.skip("needs latexmk and pdflatex (Debian: latexmk, texlive-latex-recommended)")
    figure = Figure(figsize=(3.3, 2.1))
    figure.subplots().plot([1, 2], [3, 1])
    style.save(figure, tmp_path / "figures", "by_slot_t0.5")
    files = appendix.write(tmp_path, content([Drawing("by_slot_t0.5", figure, "95% & more_")]), FRAMES)
    run = ["latexmk", "-pdf", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", files[0].name]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, timeout=240)
    log = (tmp_path / "appendix.log").read_text(errors="replace")
    assert done.returncode == 0, log[-2000:]
    assert "Missing character" not in log and "undefined" not in log.lower()
    # Nothing sticks out of the page by more than two millimetres.
    assert not [w for w in re.findall(r"Overfull \\hbox \(([\d.]+)pt too wide\)", log) if float(w) > 6]
    assert (tmp_path / "appendix.pdf").stat().st_size > 10_000
