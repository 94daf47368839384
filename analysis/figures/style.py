"""Style of each method in every figure, and saving of figures.

Colours are from the Okabe-Ito palette (M. Okabe, K. Ito, "Color Universal Design", 2008), which people with the common
colour deficiencies can tell apart; marker and line differ too, so that a grey print still reads.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

from matplotlib import style as mplstyle
from matplotlib.figure import Figure
from matplotlib.legend import Legend

STYLE = Path(__file__).parents[1] / "specbench.mplstyle"
COLUMN = 3.3
PAGE = 6.9
GREY = "0.45"
LINE = 0.13


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of one variant."""

    color: str
    marker: str
    linestyle: str | tuple

    def line(self) -> dict[str, object]:
        """Keyword arguments for `Axes.plot`."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.linestyle, "markeredgecolor": "white"}


KNOWN = {
    "dspark": Look("#0072B2", "o", "-"),
    "dflash": Look("#D55E00", "s", "--"),
    "eagle3": Look("#009E73", "^", "-."),
    "mtp": Look("#CC79A7", "D", ":"),
}
COLORS = ("#E69F00", "#56B4E9", "#000000", "#8C6D31", "#6A51A3", "#F0E442", *(look.color for look in KNOWN.values()))
MARKERS = ("v", "P", "X", "<", ">", "p", "h", "*", "d", "8")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A style for every variant: fixed for the known methods; for a new name it follows from a checksum of the name, so
    it is the same in every comparison with the same new names (the next free style if another name has it)."""
    found: dict[str, Look] = {}
    names = list(dict.fromkeys(names))
    taken: set[Look] = set()
    for name in sorted(names, key=lambda n: (n not in KNOWN, n)):
        look = KNOWN.get(name)
        start = zlib.crc32(name.encode())
        step = 0
        while look is None or look in taken:
            place = start + step
            look = Look(COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)], LINES[place % len(LINES)])
            fresh = step >= len(COLORS) or all(look.color != other.color for other in taken)
            look = look if fresh and (step < len(COLORS) or look not in taken) else None
            step += 1
            if step > 200:
                raise ValueError(f"{len(names)} variants are too many for one figure; filter or group by fewer keys")
        taken.add(look)
        found[name] = look
    return {name: found[name] for name in names}


def legend(figure: Figure, names: Iterable[str], title: str | None = None) -> Legend:
    """The one legend of a figure, above its panels, in as many columns as fit the width."""
    names = list(names)
    fit = int(figure.get_figwidth() / (0.062 * max(map(len, names)) + 0.45))
    handles: dict[str, object] = {}
    for ax in figure.axes:
        handles |= {text: handle for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    handles = {name: handles[name] for name in names if name in handles}
    columns = max(1, min(len(handles), fit))
    rows = -(-len(handles) // columns)
    columns = -(-len(handles) // rows)  # rows of equal length
    # Two rows fit above the panels; more would squeeze them, so the figure grows by a line of text each.
    figure.set_figheight(figure.get_figheight() + LINE * max(0, rows - 2))
    return figure.legend(handles.values(), handles, loc="outside upper center", ncols=columns, title=title)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with the style file of this project, independent of the caller's settings."""

    @wraps(draw)
    def inside(*args: object, **settings: object) -> Figure:
        with mplstyle.context(["default", STYLE]):
            return draw(*args, **settings)

    return inside


def settle(figure: Figure) -> None:
    """Compute the layout of the figure once, because it is saved several times and the layout is slower than
    drawing."""
    if figure.get_layout_engine() is not None:
        with mplstyle.context(["default", STYLE]):
            figure.draw_without_rendering()
        figure.set_layout_engine("none")


def save(figure: Figure, folder: Path, name: str, kinds: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Write folder/name.png and .pdf without a date, so that the same numbers give the same file."""
    settle(figure)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in kinds]
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with mplstyle.context(["default", STYLE]):
        for path, kind in zip(paths, kinds, strict=True):
            figure.savefig(path, metadata=undated.get(kind))
    return paths
