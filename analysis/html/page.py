"""One self-contained HTML page: figures as inline SVG, sortable tables, light and dark; nothing is loaded from a
network."""

from __future__ import annotations

import html
import re
from io import StringIO

from matplotlib import style as mplstyle
from matplotlib.figure import Figure

from analysis.figures.style import STYLE, settle
from analysis.html.content import Commands, Content, Drawing, Paragraph
from analysis.tables import writers

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --band: #f6f8fa;
  --link: #0b5cad; --figure: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e6eaef; --soft: #9aa5b1; --line: #39424d;
  --band: #1d232a; --link: #7cb7f5; --figure: #f4f6f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p.note, figcaption { color: var(--soft); font-size: .88rem; max-width: 60rem; }
nav a { color: var(--link); margin-right: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.text, td.text { text-align: left; } thead tr:first-child th { text-align: center; }
thead tr.keys th { text-align: right; } thead tr.keys th.text { text-align: left; }
tbody tr:nth-child(even) { background: var(--band); }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort="ascending"] button::after { content: " \\2191"; }
th[aria-sort="descending"] button::after { content: " \\2193"; }
@media (max-width: 520px) { body { padding: .7rem; font-size: 15px; } h1 { font-size: 1.3rem; }
  nav a { display: inline-block; margin: 0 .7rem .3rem 0; } th, td { padding: .2rem .45rem; }
  figure { overflow-x: auto; } figure svg { min-width: min(34rem, var(--wide)); } }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; max-width: var(--wide); background: var(--figure);
  border-radius: 4px; padding: 4px; }
pre { background: var(--band); padding: .7rem; overflow-x: auto; border: 1px solid var(--line); border-radius: 4px; }
"""

SCRIPT = """
document.querySelectorAll("table.sortable").forEach(table => {
  const heads = [...table.querySelectorAll("tr.keys th")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => {
      const cell = row.children[column], number = parseFloat(cell.dataset.sort ?? cell.textContent);
      return isNaN(number) ? cell.textContent : number;
    };
    const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? 1 : -1;
    const body = table.tBodies[0];
    [...body.rows].sort((a, b) => (up ? 1 : -1) * order(key(a), key(b))).forEach(row => body.append(row));
  }));
});
"""


def render(content: Content) -> str:
    """The whole page as text."""
    parts = [f"<h1>{html.escape(content.title)}</h1>", f'<p class="note">{html.escape(content.subtitle)}</p>']
    links = "".join(f'<a href="#s{i}">{html.escape(section.title)}</a>' for i, section in enumerate(content.sections))
    parts.append(f"<nav>{links}</nav>")
    drawn = 0
    for index, section in enumerate(content.sections):
        parts.append(f'<section id="s{index}"><h2>{html.escape(section.title)}</h2>')
        for item in section.items:
            if isinstance(item, Paragraph):
                parts.append(f"<p>{html.escape(item.text)}</p>")
            elif isinstance(item, Commands):
                parts.append(f"<pre>{html.escape(chr(10).join(item.lines))}</pre>")
            elif isinstance(item, Drawing):
                parts.append(_figure(item, drawn))
                drawn += 1
            else:
                parts.append(f'<div class="wide">{writers.html(item)}</div>')
        parts.append("</section>")
    title, body = html.escape(content.title), "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style></head>\n<body>\n{body}\n<script>{SCRIPT}</script>\n"
        "</body></html>\n"
    )


def _figure(drawing: Drawing, number: int) -> str:
    width = drawing.figure.get_figwidth() * 150
    title = html.escape(drawing.caption)
    svg = inline_svg(drawing.figure, f"f{number}-").replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    return f'<figure style="--wide: {width:.0f}px">{svg}<figcaption>{title}</figcaption></figure>'


def inline_svg(figure: Figure, prefix: str) -> str:
    """The figure as an <svg> element whose ids start with `prefix`, so that several can stand in one page."""
    settle(figure)
    text = StringIO()
    with mplstyle.context(["default", STYLE]):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    return re.sub(r"url\(#", f"url(#{prefix}", svg)
