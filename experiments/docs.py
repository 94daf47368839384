"""specbench docs: the pages of the documentation, which are installed with the package."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from omegaconf import DictConfig

import specbench
from specbench.cli.errors import nearest

CHECKOUT = Path(specbench.__file__).resolve().parents[1]
SITE = CHECKOUT / "outputs" / "site"  # where mkdocs.yml builds it
INSTALLED = "share/doc/specbench"  # as pyproject.toml says


def run(cfg: DictConfig) -> None:
    """Open the built site if there is one and a browser; otherwise list the pages, or print the named one."""
    there = pages()
    if cfg.page is not None and cfg.page not in there:
        raise ValueError(
            f"page={cfg.page}: there is no such page{nearest(cfg.page, there)} (there are {', '.join(there)})"
        )
    built = SITE / f"{cfg.page or 'index'}.html"
    if cfg.browser and sys.stdout.isatty() and built.is_file() and webbrowser.open(built.as_uri()):
        print(f"opened {built}")
    elif cfg.page is not None:
        _print(there[cfg.page])
    else:
        width = max(map(len, there))
        print(f"{there['index'].parent}\n")
        print("\n".join(f"  {name:<{width}}  {_title(path)}" for name, path in there.items()))
        print("\n`specbench docs NAME` prints a page. In a clone with the packages of `pip install -e '.[docs]'`,")
        print("`mkdocs build` makes a web site, which `specbench docs` then opens in a browser.")


def pages() -> dict[str, Path]:
    """Name -> Markdown file, the first page first. Errors: ValueError if the installation has no pages."""
    found = {path.stem: path for path in sorted(_sources())}
    if "index" not in found:
        raise ValueError("this installation has no pages: install specbench again")
    return {"index": found.pop("index"), **found}


def _sources() -> Iterator[Path]:
    if (CHECKOUT / "mkdocs.yml").is_file():
        yield from (CHECKOUT / "docs").glob("*.md")
        return
    try:
        listed = files("specbench") or []
    except PackageNotFoundError:
        return
    yield from (Path(str(one.locate())).resolve() for one in listed if one.match(f"{INSTALLED}/*.md"))


def _title(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").strip()


def _print(path: Path) -> None:
    """A page as a terminal shows it; its text as it is elsewhere."""
    text = path.read_text(encoding="utf-8")
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=min(Console().width, 110))
    with console.pager(styles=True):
        console.print(Markdown(text))
