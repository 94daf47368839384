"""A static site from submitted results: one page a target and suite, one page a draft; it loads
nothing from a network.

    index.html             the boards, and what the states mean
    TARGET--SUITE.html     a sortable table of the results, with filters
    draft-NAME.html        a draft: its card, its results, conditional acceptance by slot, the commands to repeat it
    data/NAME.json         the results themselves, and leaderboard.json with one row a result

All text of a result is escaped: a result may be anybody's.
"""

from __future__ import annotations

import html
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.html import curve
from analysis.html.page import CSS, SCRIPT
from analysis.read.configurations import written
from analysis.read.results import RECOMPUTED, REPORTED, VERIFIED, Submitted
from analysis.statistics.ranks import RankRange, ranks
from analysis.statistics.result_numbers import counts_of_lines
from specbench.files.atomic import write_json, write_text
from specbench.runs.result_schema import ResultQuantity, dumped

DATA = "leaderboard.json"  # marks a folder as a site, which a new one may replace
# Settings of a protocol that do not decide which results are compared: they belong to the draft or to the speed.
OF_DRAFT = ("slots", "batch_size")
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "scheduler": "fixed", "accounting": "specbench", "thinking": "default"}
MEANING = {
    VERIFIED: "recomputed, and the keepers of these results decoded some of its prompts again with the same draft and "
    "target: tokens and rounds were the same",
    RECOMPUTED: "the per-prompt records lie beside the result, and every number and interval follows from them",
    REPORTED: "numbers of a publication, or records that do not lie beside the result: nothing could be recomputed",
}
STYLE = """
.filters { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; margin: .8rem 0; font-size: .9rem; }
.filters select { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--line);
  border-radius: 4px; padding: .15rem .3rem; max-width: 16rem; }
body.wide-page { max-width: 110rem; }
a { color: var(--link); } td.best { font-weight: 700; } .soft { color: var(--soft); font-weight: 400; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
tr[hidden] { display: none; } dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 32rem) { body { padding: .8rem; } dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; }
  .filters select { max-width: 11rem; } }
"""
FILTER = """
document.querySelectorAll(".filters").forEach(form => {
  const rows = [...document.querySelectorAll("table.board tbody tr")], choices = [...form.querySelectorAll("select")];
  const left = form.querySelector("output");
  const apply = () => {
    rows.forEach(row => row.hidden = choices.some(one => one.value && row.dataset[one.name] !== one.value));
    left.textContent = rows.filter(row => !row.hidden).length + " of " + rows.length + " results";
  };
  choices.forEach(one => one.addEventListener("change", apply));
  form.hidden = false;
  apply();
});
"""


@dataclass(frozen=True)
class BoardRow:
    """A result on its board: its protocol by letter, and its rank among the results of that protocol."""

    one: Submitted
    letter: str
    rank: RankRange | None
    alone: bool  # whether no other result has a rank under its protocol


def write_site(found: Sequence[Submitted], folder: Path, title: str, command: str) -> list[Path]:
    """Write the whole site; returns its pages. `command` is shown as what makes it again."""
    boards: dict[tuple[str, str], list[Submitted]] = {}
    drafts: dict[str, list[Submitted]] = {}
    for one in sorted(found, key=lambda one: one.result.name):
        boards.setdefault((one.result.target.name, one.result.suite.name), []).append(one)
        drafts.setdefault(draft_key(one), []).append(one)
    links = {one.result.name: f"draft-{own[0].result.name}.html" for own in drafts.values() for one in own}
    names = _board_files(boards)
    rows = {key: placed(own) for key, own in boards.items()}
    pages = {"index.html": _index(boards, names, title, command)}
    for key, own in rows.items():
        pages[names[key]] = _board(key, own, links, title)
    for own in drafts.values():
        pages[links[own[0].result.name]] = _draft(own, names, title)
    for name, text in pages.items():
        write_text(folder / name, text)
    for one in found:
        write_text(folder / "data" / f"{one.result.name}.json", one.path.read_text(encoding="utf-8"))
    write_json(folder / DATA, [_as_data(row) for own in rows.values() for row in own])
    return [folder / name for name in pages]


def draft_key(one: Submitted) -> str:
    """What makes two results those of one draft: its weights, or publication, method and target."""
    result = one.result
    return result.draft.weights or repr((result.source and result.source.title, result.draft.name, result.target.name))


def protocol_of(one: Submitted) -> tuple[Any, ...]:
    """What two results must have in common to be compared: decoding settings, prompts and target, or a publication."""
    result = one.result
    facts = {key: written(tuple(v) if isinstance(v, list) else v) for key, v in result.protocol.items()}
    kept = sorted((key, value) for key, value in facts.items() if key not in OF_DRAFT)
    sets = tuple((name, part.prompt_set) for name, part in sorted(result.suite.benchmarks.items()))
    return (result.source and result.source.title, tuple(kept), sets, result.target.weights)


def placed(own: Sequence[Submitted]) -> list[BoardRow]:
    """The rows of a board: by measured speedup, then by accepted length; ranked within their protocol."""
    protocols: dict[tuple[Any, ...], list[Submitted]] = {}
    for one in own:
        protocols.setdefault(protocol_of(one), []).append(one)
    rows = []
    for number, part in enumerate(protocols.values()):
        strata = [_strata(one) for one in part]
        found = ranks([one.result.macro for one in part], strata)
        alone = sum(rank is not None for rank in found) < 2
        rows += [BoardRow(one, _letter(number), rank, alone) for one, rank in zip(part, found, strict=True)]

    def order(row: BoardRow) -> tuple[bool, float, float, str]:
        speedup = row.one.result.speedup
        fast = 0.0 if speedup is None else speedup.measured
        return (speedup is None, -fast, -row.one.result.macro.value, row.one.result.name)

    return sorted(rows, key=order)


def _strata(one: Submitted) -> list[Any] | None:
    if not one.lines:
        return None
    names = sorted(one.result.suite.benchmarks)
    return [counts_of_lines([line for line in one.lines if line.benchmark == name]) for name in names]


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"P{number + 1}"


def _board_files(boards: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """A file name a board; names that are equal after unusual characters are replaced get a number."""
    names: dict[tuple[str, str], str] = {}
    for target, suite in boards:
        stem = "--".join(re.sub(r"[^\w.-]+", "-", word) for word in (target, suite))
        same = sum(name.startswith((f"{stem}.html", f"{stem}~")) for name in names.values())
        names[target, suite] = f"{stem}~{same + 1}.html" if same else f"{stem}.html"
    return names


def _index(
    boards: Mapping[tuple[str, str], Sequence[Submitted]],
    names: Mapping[tuple[str, str], str],
    title: str,
    command: str,
) -> str:
    head = "".join(f'<th scope="col" class="text">{word}</th>' for word in ("target", "suite", "benchmarks"))
    head += "".join(f'<th scope="col">{word}</th>' for word in ("results", *MEANING))
    body = []
    for (target, suite), own in sorted(boards.items()):
        states = Counter(one.state for one in own)
        benchmarks = ", ".join(dict.fromkeys(name for one in own for name in one.result.suite.benchmarks))
        link = f'<a href="{_e(names[target, suite])}">{_e(target)}</a>'
        body.append(
            f'<tr><td class="text">{link}</td><td class="text">{_e(suite)}</td><td class="text">{_e(benchmarks)}</td>'
            f"<td>{len(own)}</td>{''.join(f'<td>{states[state]}</td>' for state in MEANING)}</tr>"
        )
    terms = "".join(f"<dt>{state}</dt><dd>{meaning}</dd>" for state, meaning in MEANING.items())
    return _page(
        title,
        "Draft models for speculative decoding. Every page compares drafts of one target on one suite of prompts.",
        [
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>',
            f"<h2>States</h2><dl>{terms}</dl>",
            "<h2>Add a result</h2><p><code>specbench submit RUN signed_off_by='NAME &lt;ADDRESS&gt;'</code> writes the "
            "files of a result; <code>specbench docs leaderboard</code> describes them.</p>",
            f"<h2>This site</h2><pre>{_e(command)}</pre>",
        ],
    )


def _board(key: tuple[str, str], rows: Sequence[BoardRow], links: Mapping[str, str], title: str) -> str:
    benchmarks = list(dict.fromkeys(name for row in rows for name in row.one.result.suite.benchmarks))
    columns = [("draft", True), ("rank", False), ("accepted length", False), *((name, False) for name in benchmarks)]
    cells = [_further_cells(row.one) for row in rows]
    further = [name for name in cells[0] if any(own[name] is not None for own in cells)]
    columns += [(name, False) for name in further]
    columns += [("protocol", True), ("hardware", True), ("state", True), ("date", True)]
    head = "".join(
        f'<th scope="col"{" class=text" if text else ""}><button type="button">{_e(name)}</button></th>'
        for name, text in columns
    )
    body = "".join(
        _board_row(row, benchmarks, [own[name] or "<td>–</td>" for name in further], links)
        for row, own in zip(rows, cells, strict=True)
    )
    protocols = {row.letter: _protocol(row.one) for row in rows}
    hardware = list(dict.fromkeys(_hardware(row.one) for row in rows))
    choices = {
        "protocol": {letter: f"{letter}: {said}" for letter, said in sorted(protocols.items())},
        "hardware": {name: name for name in hardware},
        "state": {name: name for name in MEANING if any(row.one.state == name for row in rows)},
    }
    notes = "".join(f"<dt>protocol {letter}</dt><dd>{_e(said)}</dd>" for letter, said in sorted(protocols.items()))
    target, suite = key
    return _page(
        f"{target}, suite {suite}",
        f"{title}: accepted length (tokens committed / rounds, bonus token included; macro: unweighted mean over "
        "benchmarks).",
        [
            '<p><a href="index.html">All boards</a></p>',
            _filters(choices),
            f'<div class="wide"><table class="sortable board"><thead><tr class="keys">{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>",
            '<p class="note">± is one standard error over prompts, brackets are 95% intervals over prompts (cluster '
            "bootstrap). Rank: by accepted length among the results of the same protocol; 1–3 means that the data do "
            "not separate it from ranks 1 to 3 (pairs on common prompts where both have records, Holm's correction "
            "over all pairs at 5%). Every row is one draft with one training: ranks are of drafts, not of methods. A "
            "dash: the result states no standard error, so it has no rank. Rows stand by measured speedup, then by "
            "accepted length; accepted length alone does not tell whether a draft pays. A speedup is stated by who "
            "submitted the result: it depends on their machine, and no check recomputes it.</p>",
            f"<h2>Protocols</h2><dl>{notes}</dl>",
        ],
        FILTER,
        wide=True,
    )


def _further_cells(one: Submitted) -> dict[str, str | None]:
    """Cells of columns that a board has only if one of its results states them."""
    result = one.result
    decay, speedup, size = result.suffix_decay, result.speedup, result.draft.parameters
    fast = None if speedup is None else ResultQuantity(value=speedup.measured, low=speedup.low, high=speedup.high)
    prompts = [part.prompts for part in result.suite.benchmarks.values()]
    count = None if None in prompts else sum(prompts)
    return {
        "suffix decay": decay and f'<td data-sort="{decay.value}">{_bracketed(decay)}</td>',
        "speedup": fast and f'<td data-sort="{fast.value}">{_bracketed(fast)}</td>',
        "parameters": f'<td data-sort="{size}">{_million(size)}</td>' if size else None,
        "prompts": f"<td>{count}</td>" if count else None,
    }


def _board_row(row: BoardRow, benchmarks: Sequence[str], further: Sequence[str], links: Mapping[str, str]) -> str:
    result = row.one.result
    own = result.suite.benchmarks
    best = " class=best" if row.rank is not None and row.rank.worst == 1 and not row.alone else ""
    cells = [
        f'<td class="text"><a href="{_e(links[result.name])}">{_e(result.draft.name)}</a></td>',
        f'<td data-sort="{row.rank.best if row.rank else 10**6}">{row.rank or "–"}</td>',
        f'<td{best} data-sort="{result.macro.value}">{_measured(result.macro)}</td>',
    ]
    for name in benchmarks:
        value = own[name].accepted_length if name in own else None
        sort = value.value if value else ""
        cells.append(f'<td data-sort="{sort}">{_short(value)}</td>')
    cells += further
    cells += [
        f'<td class="text">{_e(word)}</td>' for word in (row.letter, _hardware(row.one), row.one.state, result.date)
    ]
    data = {"protocol": row.letter, "hardware": _hardware(row.one), "state": row.one.state}
    marks = "".join(f' data-{key}="{_e(value)}"' for key, value in data.items())
    return f"<tr{marks}>{''.join(cells)}</tr>"


def _filters(choices: Mapping[str, Mapping[str, str]]) -> str:
    made = []
    for name, options in choices.items():
        listed = "".join(f'<option value="{_e(value)}">{_e(text)}</option>' for value, text in options.items())
        made.append(f'<label>{name} <select name="{name}"><option value="">all</option>{listed}</select></label>')
    return f'<form class="filters" hidden>{"".join(made)}<output></output></form>'


def _draft(own: Sequence[Submitted], names: Mapping[tuple[str, str], str], title: str) -> str:
    first = own[0].result
    draft, target = first.draft, first.target
    card = {
        "method": draft.name,
        "target": _model(target),
        "draft": _model(draft),
        "parameters": f"{draft.parameters:,}" if draft.parameters else None,
        "slots": draft.slots,
        **{f"training: {key.replace('_', ' ')}": _fact(v) for key, v in draft.training.items() if key != "command"},
        "publication": f"{first.source.title}, {first.source.where}" if first.source else None,
        "note": first.source.note if first.source else None,
    }
    parts = [
        f'<p><a href="index.html">All boards</a> · <a href="{_e(names[target.name, first.suite.name])}">'
        f"{_e(target.name)}, suite {_e(first.suite.name)}</a></p>",
        f"<h2>Card</h2>{_terms(card)}",
    ]
    for one in own:
        parts.append(_result(one))
    if "command" in draft.training:
        parts.append(f"<h2>How it was trained</h2><pre>{_e(_command(draft.training['command']))}</pre>")
    return _page(f"{draft.name} for {target.name}", f"{title}: one draft.", parts)


def _result(one: Submitted) -> str:
    result = one.result
    head = "".join(f"<th scope=col>{word}</th>" for word in ("accepted length", "prompts", "rounds", "version"))
    rows = [
        f'<tr><td class="text">{_e(name)}</td><td>{_measured(part.accepted_length)}</td><td>{_n(part.prompts)}</td>'
        f"<td>{_n(part.rounds)}</td><td>{_n(part.version)}</td></tr>"
        for name, part in result.suite.benchmarks.items()
    ]
    rows.append(
        f'<tr><td class="text"><b>macro</b></td><td>{_measured(result.macro)}</td><td></td><td></td><td></td></tr>'
    )
    facts = {
        "suite": result.suite.name,
        "state": f"{one.state}: {MEANING[one.state]}",
        "not compared": "; ".join(one.notes) or None,
        "verified": one.verification
        and f"{one.verification.prompts} prompts by {one.verification.verified_by}, {one.verification.date}",
        "suffix decay": _bracketed(result.suffix_decay, "per slot") if result.suffix_decay else None,
        "speedup": _speedup(one),
        "protocol": _protocol(one, every=True),
        "hardware": _hardware(one),
        "seeds": ", ".join(f"{key} {value}" for key, value in result.seeds.items()) or None,
        "code": ", ".join(f"{key} {written(v)}" for key, v in result.code.items() if v is not None) or None,
        "versions": ", ".join(
            f"{name} {result.versions[name]}"
            for name in ("specbench", "torch", "transformers")
            if result.versions.get(name)
        )
        or None,
        "signed off by": result.signed_off_by,
        "date": result.date,
    }
    parts = [
        f"<h2>Suite {_e(result.suite.name)}{_e(_heat(result.protocol))}</h2>",
        f'<div class="wide"><table><thead><tr><th scope=col class=text>benchmark</th>{head}</tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table></div>",
    ]
    if result.curves:
        parts.append(
            "<h3>Conditional acceptance by slot</h3>" + curve.curves(result.curves) + '<p class="note">Share of draft '
            f"tokens accepted at slot k, if all before it were accepted. Bands: 95% intervals over prompts; slots that "
            f"fewer than {curve.FEW} rounds reached are left out.</p>"
        )
    parts.append(_terms(facts))
    parts.append(f'<p><a href="data/{_e(result.name)}.json">the result as JSON</a></p>')
    commands = [] if result.source else [_repeat(one)]
    if result.command:
        commands += ["# as it was measured:", _command(result.command)]
    if commands:
        parts.append(f"<h3>To repeat it</h3><pre>{_e(chr(10).join(commands))}</pre>")
    return "".join(parts)


def _repeat(one: Submitted) -> str:
    """The evaluation as one command; a draft or target that lies nowhere public is left to the reader."""
    result, facts = one.result, one.result.protocol
    draft = result.draft.place or "FOLDER"
    target = result.target.name if (result.target.place or "").startswith("package:") else result.target.place
    words = ["specbench", "evaluate", f"draft={draft}", f"target={target or 'FOLDER'}", f"suite={result.suite.name}"]
    keys = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "accounting", "slots")
    words += [f"{key}={written(facts[key])}" for key in keys if key in facts and facts[key] != OFF.get(key)]
    if result.suite.limit is not None:
        words.append(f"suite.limit={result.suite.limit}")
    words.append(f"seed={result.seeds.get('decoding', 0)}")
    return shlex.join(words)


def _protocol(one: Submitted, every: bool = False) -> str:
    """A protocol in words; settings that are off are mentioned only with `every`."""
    facts = {
        key: written(tuple(value) if isinstance(value, list) else value)
        for key, value in one.result.protocol.items()
        if every or (key not in OF_DRAFT and value != OFF.get(key, ...))
    }
    said = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items())
    limit = one.result.suite.limit
    said += f", at most {limit} prompts a benchmark" if limit is not None else ""
    if one.result.source is not None:
        return f"as published ({one.result.source.title}{'; ' + said if said else ''})"
    return said


def _heat(protocol: Mapping[str, Any]) -> str:
    return f", temperature {written(protocol['temperature'])}" if "temperature" in protocol else ""


def _hardware(one: Submitted) -> str:
    facts = one.result.hardware
    if not facts:
        return "not stated"
    gpus = facts.get("gpus") or []
    if gpus:
        return ", ".join(f"{count} x {name}" for name, count in Counter(gpus).items())
    return f"{facts.get('processor', 'CPU')}, {facts.get('cores', '?')} cores"


def _speedup(one: Submitted) -> str | None:
    found = one.result.speedup
    if found is None:
        return None
    said = _bracketed(ResultQuantity(value=found.measured, low=found.low, high=found.high))
    said += f" at batch {found.batch_size}" if found.batch_size else ""
    return said + (f", predicted {found.predicted:.2f}" if found.predicted is not None else "")


def _model(model: Any) -> str:
    place = f"{model.place}{'@' + model.revision if model.revision else ''}" if model.place else None
    weights = f"weights {model.weights}" if model.weights else None
    return ", ".join(filter(None, (model.name, place, weights)))


def _measured(found: ResultQuantity | None) -> str:
    """2.05 ± 0.03 [1.99, 2.11]."""
    if found is None:
        return "–"
    return f"{_short(found)}{_interval(found)}"


def _short(found: ResultQuantity | None) -> str:
    """2.05 ± 0.03."""
    if found is None:
        return "–"
    error = "" if found.standard_error is None else f' <span class="soft">± {found.standard_error:.2f}</span>'
    return f"{found.value:.2f}{error}"


def _bracketed(found: ResultQuantity | None, unit: str = "") -> str:
    """-0.03 [-0.06, -0.01]."""
    return "–" if found is None else f"{found.value:.2f}{_interval(found)}{' ' + unit if unit else ''}"


def _interval(found: ResultQuantity) -> str:
    return "" if found.low is None else f' <span class="soft">[{found.low:.2f}, {found.high:.2f}]</span>'


def _million(size: int) -> str:
    return f"{size / 1e9:.2f} B" if size >= 1e9 else f"{size / 1e6:.2f} M"


def _fact(value: Any) -> str:
    return f"{value:,}" if type(value) is int else written(tuple(value) if isinstance(value, list) else value)


def _n(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _terms(facts: Mapping[str, Any]) -> str:
    """A list of terms; those without a value are left out. Text with marks made here is kept, other text is escaped."""
    made = []
    for key, value in facts.items():
        if value is None:
            continue
        text = str(value)
        shown = text if key in ("suffix decay", "speedup") else _e(text)
        made.append(f"<dt>{_e(key)}</dt><dd>{shown}</dd>")
    return f"<dl>{''.join(made)}</dl>"


def _command(words: Sequence[str]) -> str:
    return shlex.join(words)


def _as_data(row: BoardRow) -> dict[str, Any]:
    """The row of leaderboard.json."""
    result = row.one.result
    return {
        "name": result.name,
        "target": result.target.name,
        "suite": result.suite.name,
        "method": result.draft.name,
        "protocol": row.letter,
        "state": row.one.state,
        "rank": None if row.rank is None else [row.rank.best, row.rank.worst],
        "accepted_length": dumped(result.macro),
        "speedup": result.speedup and dumped(result.speedup),
    }


def _page(title: str, subtitle: str, parts: Sequence[str], script: str = "", wide: bool = False) -> str:
    body = "\n".join([f"<h1>{_e(title)}</h1>", f'<p class="note">{_e(subtitle)}</p>', *parts])
    tag = "<body class=wide-page>" if wide else "<body>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_e(title)}</title>\n<style>{CSS}{STYLE}{curve.STYLE}</style></head>\n{tag}\n{body}\n"
        f"<script>{SCRIPT}{script}</script>\n</body></html>\n"
    )


def _e(text: object) -> str:
    return html.escape(str(text))
