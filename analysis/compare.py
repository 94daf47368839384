"""`compare`: read runs, compute every table, draw every figure, write the report; one call for a whole comparison."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from analysis import appendix as latex_appendix
from analysis.figures import acceptance as figures
from analysis.figures import curves, style
from analysis.figures.overlay import overlaid, wanted
from analysis.html import page
from analysis.html.content import Content, Drawing, Section, provenance
from analysis.read import folders
from analysis.read.runs import ONCE, Runs, load, shown
from analysis.statistics.intervals import MINIMUM_SHARED, RESAMPLES, VERDICT_RESAMPLES
from analysis.tables import costs, gap, positions, protocols, published, recipes, tree_tables, writers
from analysis.tables import frames as tables
from analysis.tables import groups as grouping
from analysis.tables import sheets as layout
from analysis.tables.groups import Group
from analysis.tables.sheets import Sheet
from specbench.files.atomic import read_json

STEPS = 19  # that `progress` hears of: reading, fourteen tables, three of figures, writing
CURVES = ("train/loss", "probe/accepted_length", "val/accepted_length")


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison: its folder, the files in it, the frames, the content, and the text for a terminal."""

    folder: Path
    files: list[Path]
    frames: dict[str, pd.DataFrame] = field(repr=False)
    content: Content = field(repr=False)
    runs: Runs = field(repr=False)
    text: str = field(repr=False)

    def table(self, name: str = "accepted_length") -> pd.DataFrame:
        """One of the tables that were written, by its name: one row per method, benchmark and protocol.

        Raises:
            ValueError: there is no such table.
        """
        if name not in self.frames:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(self.frames)}")
        return self.frames[name]

    def markdown(self) -> str:
        """The main tables as written to accepted_length.md."""
        return (self.folder / "accepted_length.md").read_text(encoding="utf-8")


def compare(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str] = "outputs/compare/all",
    filters: str | Sequence[str] = (),
    group_by: Sequence[str] = (),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    minimum_shared: float = MINIMUM_SHARED,
    holm: bool = True,
    cache: str | os.PathLike[str] = "outputs/wandb",
    title: str | None = None,
    command: str | None = None,
    width: int = 120,
    draw: bool = True,
    calibrations: Sequence[str | os.PathLike[str]] = (),
    published_curves: bool | None = None,
    appendix: bool = False,
    progress: Callable[[str, int, int], None] = lambda step, done, steps: None,
) -> Comparison:
    """Compare every finished run below `sources` and write tables, figures and report.html into `output`.

    Args:
        sources: run folders, folders above some, glob patterns, `wandb:entity/project`, in any mix.
        filters: `key=value` texts that every run must pass; any record column, config key or summary key with dots.
        group_by: keys that distinguish rows in addition to `method`; a numeric one is also the axis of two figures.
        resamples, seed: of the bootstrap; differences use VERDICT_RESAMPLES at least.
        minimum_shared: smallest share of common prompts with which two variants are paired.
        holm: correct the verdicts of each table for multiple comparisons (Holm).
        cache: folder for the files of W&B runs.
        command: the command that the page shows; None shows the Python call.
        width: columns of the terminal that `text` is for.
        draw: false: tables only, which is much faster.
        calibrations: folders of `specbench calibrate`, each gives a reliability diagram.
        published_curves: draw the paper's numbers into figures with the same axes; None: only for the paper's target.
        appendix: write appendix.tex too, a LaTeX document with definitions, protocol, tables, figures and commands.
        progress: called with the name of each step that begins, how many are done, and how many there are; once more
            at the end.

    Raises:
        ValueError: nothing to compare, an unknown key, damaged records.
        MixedError: numbers of different accountings, thinking modes or suites would share a column.
    """
    output = Path(output)
    begun: list[str] = []

    def begin(step: str) -> None:
        progress(step, len(begun), STEPS if draw else STEPS - 3)
        begun.append(step)

    begin("read runs")
    read = load(sources, filters, cache).decoded()
    found = grouping.collect(read, group_by)
    frames: dict[str, pd.DataFrame] = {}
    for name, make in _makers(found, read, frames, resamples, seed, minimum_shared, holm).items():
        begin(name)
        made = make()
        frames |= made if isinstance(made, dict) else {name: made}
    main = (frames["accepted_length"], frames["macro_average"], frames["differences"], frames["costs"])
    sheets = layout.main(found, *main)
    more, methods = _more_sheets(found, frames), [group.method for group in found]
    drawings: list[Drawing] = []
    if draw:
        begin("figures by slot")
        drawings += [*_price_drawings(found, frames), *_slot_drawings(found, resamples, seed)]
        begin("figures by place")
        drawings += _place_drawings(found, frames)
        begin("figures of axes and runs")
        drawings += [*_axis_drawings(found, frames, group_by, resamples, seed), *_run_drawings(read, calibrations)]
        if wanted(read.records["target"].unique(), published_curves):
            drawings = overlaid(drawings)
    copies = int(read.faults["reason"].str.endswith(ONCE).sum())
    twice = f", {copies} of them repetitions or copies" if copies else ""
    used = f"{len(read.runs)} runs, {len(read.records)} records, left out: {len(read.faults)}{twice}"
    how = command or f"python -c {shlex.quote(f'from analysis.compare import compare; compare({sources!r})')}"
    content = Content(
        title or f"Comparison {output.name}",
        f"{used}. Intervals are 95%, cluster bootstrap over prompts ({resamples} resamples, of differences "
        f"{max(resamples, VERDICT_RESAMPLES)}; seed {seed}); those about methods add the variance between trainings.",
        [
            Section("Accepted length", sheets),
            *([Section("Figures", [drawing for drawing in drawings if drawing.on_page])] if drawings else []),
            *(Section(sheet[0].title.partition(":")[0], sheet) for sheet in more if sheet),
            provenance(read.runs, read.faults, how),
        ],
    )
    begin("write")
    files = _write(output, frames, sheets, drawings, content)
    if appendix:
        files += latex_appendix.write(output, content, frames)
    progress("", len(begun), len(begun))
    left = [f"left out: {path}: {reason}" for path, reason in read.faults.itertuples(index=False)]
    stable = [sheet.notes[0] for sheet in recipes.sheets(frames["recipes"], frames["interactions"], methods)][:1]
    text = "\n".join([writers.terminal(sheets, width).rstrip(), *stable, used, *left])
    return Comparison(output, files, frames, content, read, text)


def _makers(
    found: Sequence[Group],
    read: Runs,
    frames: Mapping[str, pd.DataFrame],
    resamples: int,
    seed: int,
    minimum: float,
    holm: bool,
) -> dict[str, Callable[[], pd.DataFrame | dict[str, pd.DataFrame]]]:
    """What makes each table, in order; `frames` holds those before it; "positions" and "recipes" are several."""
    return {
        "accepted_length": lambda: tables.accepted_length(found, resamples, seed),
        "conditional_acceptance": lambda: tables.conditional_acceptance(found, resamples, seed),
        "differences": lambda: tables.differences(found, max(resamples, VERDICT_RESAMPLES), seed, minimum, holm),
        "macro_average": lambda: tables.macro_average(found, resamples, seed),
        "suffix_decay": lambda: tables.suffix_decay(found, resamples, seed),
        "seeds": lambda: tables.seeds(found),
        "costs": lambda: costs.costs(found, read),
        "protocols": lambda: protocols.table(found),
        "published": lambda: published.gap(frames["accepted_length"]),
        "teacher_forced": lambda: gap.table(found, resamples, seed),
        "positions": lambda: positions.frames(found, resamples, seed),
        "trees": lambda: tree_tables.beside_chains(
            found, frames["costs"], max(resamples, VERDICT_RESAMPLES), seed, minimum, holm
        ),
        "tree_acceptance": lambda: tree_tables.acceptance(found, resamples, seed),
        "recipes": lambda: recipes.frames(found, frames["macro_average"]),
    }


def _more_sheets(found: Sequence[Group], frames: dict[str, pd.DataFrame]) -> list[list[Sheet]]:
    reproduced = frames["published"]
    return [
        gap.sheets(found, frames["teacher_forced"]),
        layout.differences(found, frames["differences"]),
        [layout.spread(frames["seeds"])] if (frames["seeds"]["n"] > 1).any() else [],  # one training has no spread
        tree_tables.sheets(found, frames["tree_acceptance"], frames["trees"]),
        layout.costs(found, frames["costs"]),
        recipes.sheets(frames["recipes"], frames["interactions"], [group.method for group in found]),
        [layout.published(reproduced)] if len(reproduced) else [],
    ]


def _slot_drawings(found: Sequence[Group], resamples: int, seed: int) -> list[Drawing]:
    drawings = []
    for section, part, tail in _tails(found):
        where, unlike = grouping.title(section), _unlike(part)
        frame = tables.conditional_by_domain(part, resamples, seed)
        for quantity, name in (("conditional", "conditional_acceptance"), ("survival", "survival")):
            words = "Conditional acceptance by slot" if quantity == "conditional" else "Survival by slot"
            bands = "Bands: 95% intervals about these checkpoints (over prompts)."
            caption = f"{words}, a panel per domain ({where}). {bands}{_left_out(frame)}{unlike}"
            drawings.append(Drawing(name + tail, figures.by_slot(frame, quantity), caption))
        for domain in dict.fromkeys(frame["domain"]) if frame["domain"].nunique() > 1 else ():
            one = figures.by_slot(frame[frame["domain"] == domain])
            drawings.append(Drawing(f"conditional_acceptance{tail}_{domain}", one, f"{domain} alone", on_page=False))
        decay = tables.suffix_decay(part, resamples, seed)
        caption = (
            f"Suffix decay: slope of log conditional acceptance a slot ({where}). Of survivors: a slot counts the "
            "rounds that accepted every slot before it; teacher_forced.csv has the decay over every anchor beside it."
            f"{unlike}"
        )
        drawings.append(Drawing(f"suffix_decay{tail}", figures.bars(decay, "suffix_decay"), caption))
    return drawings


def _left_out(frame: pd.DataFrame) -> str:
    """The part of a caption about the points of too few rounds, which are not drawn."""
    few = int(((frame["n"] > 0) & (frame["n"] < figures.FEWEST_ROUNDS)).sum())
    return f" Not drawn: {few} points of fewer than {figures.FEWEST_ROUNDS} rounds." if few else ""


def _price_drawings(found: Sequence[Group], frames: Mapping[str, pd.DataFrame]) -> list[Drawing]:
    """Accepted length beside its price, where drafts were timed: at the smallest batch of each section."""
    drawings = []
    for section, _, tail in _tails(found):
        timed = layout.only(frames["costs"], section).dropna(subset=["proposal_seconds"])
        if not len(timed):
            continue
        batch = timed["speedup_batch"].min()
        timed = timed if pd.isna(batch) else timed[timed["speedup_batch"] == batch]
        about = "" if pd.isna(batch) else f", batch {batch:g}"
        caption = (
            f"Accepted length and speed against the price of a proposal, on the machine that timed them "
            f"({grouping.title(section)}{about}). Line: what no other row beats in both."
        )
        drawings.append(Drawing(f"price{tail}", figures.price(timed), caption))
    return drawings


def _tails(found: Sequence[Group]) -> list[tuple[dict[str, object], list[Group], str]]:
    """Every section with the ending of its file names: the keys in which sections differ."""
    parts = grouping.sections(found)
    telling = [key for key in parts[0][0] if len({section[key] for section, _ in parts}) > 1]
    return [
        (section, part, "".join(f"_{'t' if key == 'temperature' else ''}{_word(section[key])}" for key in telling))
        for section, part in parts
    ]


def _place_drawings(found: Sequence[Group], frames: dict[str, pd.DataFrame]) -> list[Drawing]:
    """Accepted length against position and context, its histogram and token classes; where records hold rounds."""
    drawings = []
    for section, part, tail in _tails(found):
        domains = list(grouping.domains(part))
        chosen = {"domain": tables.ALL if len(domains) > 1 else domains[0]} | section
        names = ("by_position", "by_context", "accepted_histogram", "token_classes")
        position, context, accepted, classes = (layout.only(frames[name], chosen) for name in names)
        where = f"{grouping.title(section)}; bands and bars: 95% intervals about these checkpoints (over prompts)"
        unlike = _unlike(part)
        if len(position):
            caption = f"Accepted length against generated tokens and against context ({where}).{unlike}"
            drawings.append(Drawing(f"accepted_length_by_place{tail}", figures.by_place(position, context), caption))
            caption = f"Share of rounds by accepted draft tokens ({where}).{unlike}"
            drawings.append(Drawing(f"accepted_histogram{tail}", figures.histogram(accepted), caption))
        if len(classes):
            caption = f"Conditional acceptance by class of the text's token ({where}).{unlike}"
            drawn = figures.bars(classes, "conditional", "token_class")
            drawings.append(Drawing(f"token_classes{tail}", drawn, caption))
    return drawings


def _unlike(part: Sequence[Group]) -> str:
    """The part of a caption about rows that were measured differently from the others."""
    said = [note for note in protocols.notes(part) if note.startswith(protocols.MARK)]
    return "".join(f" {note}" for note in [*said, *protocols.budgets(part)])


def _word(value: object) -> str:
    """A value as a part of a file name."""
    return re.sub(r"[^\w.-]+", "-", shown(value))


def _axis_drawings(
    found: Sequence[Group], frames: dict[str, pd.DataFrame], group_by: Sequence[str], resamples: int, seed: int
) -> list[Drawing]:
    drawings: list[Drawing] = []
    if len(grouping.sections(found)) > 1:
        return drawings
    for key in group_by:
        macro, decay = frames["macro_average"], frames["suffix_decay"]
        if key not in macro or pd.to_numeric(macro[key], errors="coerce").nunique() < 2:
            continue
        name = key.replace(".", "_")
        if key.endswith("threshold"):
            rates = tables.acceptance_rate(found, resamples, seed).dropna(subset=[key])
            for method, own in rates.groupby("method", sort=False):
                caption = (
                    f"Threshold sweep of {method}: acceptance rate and accepted length, 95% intervals over prompts."
                )
                drawings.append(Drawing(f"threshold_{method}", curves.threshold(own, key), caption))
        numbers = pd.to_numeric(macro[key], errors="coerce")
        log = bool(numbers.min() > 0 and numbers.max() / numbers.min() >= 16)
        words = f"against {key}, with 95% intervals over prompts."
        length = figures.along(macro, key, log=log)
        drawings.append(Drawing(f"accepted_length_by_{name}", length, f"Accepted length (macro average) {words}"))
        if decay["suffix_decay"].notna().any():  # a draft that is never accepted has no curve
            slope = figures.along(decay, key, "suffix_decay", panel="benchmark", log=log)
            drawings.append(Drawing(f"suffix_decay_by_{name}", slope, f"Suffix decay {words}"))
        timed = _speedups(frames["costs"], group_by)
        if timed[key].nunique() > 1:
            drawn = figures.along(timed, key, "speedup", panel=None, log=log)
            said = f"Speedup measured and predicted from the cost of a round, {words}"
            drawings.append(Drawing(f"speedup_by_{name}", drawn, said))
    return drawings


def _speedups(costs: pd.DataFrame, group_by: Sequence[str]) -> pd.DataFrame:
    """The speedups of the rows that were timed, measured and predicted, in the columns that `figures.along` reads."""
    parts = []
    for kind in ("measured", "predicted"):
        value = costs[f"speedup_{kind}"]
        bounds = [costs[f"speedup_{bound}"] if kind == "measured" else value for bound in ("low", "high")]
        names = costs["method"].astype(str) + ("" if kind == "measured" else " (predicted)")
        keys = {key: costs[key] for key in group_by if key in costs}
        columns = {"method": names, "speedup": value, "low": bounds[0], "high": bounds[1], "n": 1}
        parts.append(pd.DataFrame(columns | keys).assign(short=""))
    return pd.concat(parts).dropna(subset=["speedup"])


def _run_drawings(read: Runs, calibrations: Sequence[str | os.PathLike[str]]) -> list[Drawing]:
    drawings = []
    for folder in map(Path, calibrations):
        file = folder / "reliability.json"
        if not file.exists():
            raise ValueError(f"calibrations={folder} holds no reliability.json; name a folder of specbench calibrate")
        caption = f"Reliability of the confidence head before and after calibration, {folder.name}; held-out rounds."
        figure = curves.reliability(read_json(file, []))
        drawings.append(Drawing(f"reliability_{folder.name}", figure, caption))
    trained = read.runs[read.runs["kind"] == "train"]
    history = folders.metrics(trained)
    names = [name for name in CURVES if (history["name"] == name).any()]
    if names:
        labels = {source: str(method) for source, method in trained["method"].items()}
        figure = curves.training(history, names, labels, smooth=0.8)
        drawings.append(Drawing("training", figure, "Training curves; faint: not smoothed."))
    for _, row in read.runs[read.runs["kind"] == "serve"].iterrows():
        points = Path(row["path"]) / "points.csv"
        if points.exists():
            caption = f"Throughput against interactivity, {row['run']} (a simulation over a cost profile)."
            drawings.append(Drawing(f"frontier_{row['run']}", curves.frontier(pd.read_csv(points)), caption))
    return drawings


def _write(
    output: Path, frames: dict[str, pd.DataFrame], sheets: list[Sheet], drawings: list[Drawing], content: Content
) -> list[Path]:
    output.mkdir(parents=True, exist_ok=True)
    exact = {
        "accepted_length": (*tables.KEYS, *tables.MEASURES),
        "conditional_acceptance": (*tables.KEYS, *tables.SLOT_MEASURES),
    }
    # What no record holds has no columns and no file.
    kept = {name: frame for name, frame in frames.items() if len(frame.columns)}
    files = [writers.csv(frame, output / f"{name}.csv", exact.get(name)) for name, frame in kept.items()]
    texts = {"accepted_length.md": writers.markdown(sheets), "accepted_length.tex": writers.latex(sheets)}
    texts["report.html"] = page.render(content)
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
        files.append(output / name)
    for drawing in drawings:
        files += style.save(drawing.figure, output / "figures", drawing.name)
    return files
