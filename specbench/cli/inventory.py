"""Inventory of a root, from manifests and summaries only: stages and runs, their status, and the next command."""

from __future__ import annotations

import fcntl
import math
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specbench.files.atomic import read_json

MARKER = "stage.json"  # what a stage leaves in its folder (stages.py)
START = "specbench quickstart"
DEFAULT = Path("outputs")  # the root of every verb unless root= says otherwise
COMPLETE, IN_PROGRESS, UNFINISHED = "complete", "in progress", "left unfinished"
MOST = 12  # rows of one kind that a page shows
# Headline numbers of a row, by kind: the key in the stage's or run's summary, and its words.
HEADLINES: dict[str, dict[str, str]] = {
    "prompts": {"train": "train", "validation": "validation"},
    "answers": {"answers": "answers"},
    "cache": {"samples": "samples", "tokens": "tokens"},
    "train": {"method": "", "probe_accepted_length": "accepted length of the probe", "steps": "steps"},
    "evaluate": {"method": "", "temperature": "temperature", "accepted_length": "accepted length"},
    "speed": {"method": "", "speedup": "times plain decoding"},
    "serve": {"best_throughput": "tokens/s at best"},
    "compare": {"files": "files"},
}


@dataclass(frozen=True)
class Item:
    """One thing below a root. `status` is complete, in progress, left unfinished, interrupted, failed or unreadable.

    `bytes`: size of its folder. `when`: time of its last change in seconds since 1970. `command`: the command that made
    or completes it. `next`: a command that uses it. Both are None if unknown.
    """

    kind: str
    name: str
    path: Path
    status: str
    bytes: int
    when: float
    facts: dict[str, Any]
    command: str | None = None
    next: str | None = None


def items(root: Path) -> list[Item]:
    """Everything below `root` in the order of the data flow, the newest of a kind last.

    Errors: ValueError where `root` is a file.
    """
    if root.exists() and not root.is_dir():
        raise ValueError(f"root={root}: is a file and no folder; name the folder that stages write below")
    found = [item for kind, folder in _folders(root) if (item := _item(kind, folder)) is not None]
    kinds = list(dict.fromkeys(item.kind for item in found))
    return sorted(found, key=lambda item: (kinds.index(item.kind), item.when))


def other_roots(root: Path) -> list[Path]:
    """Folders right below `root` that are roots themselves, as outputs/quickstart is."""
    if not root.is_dir():
        return []
    inside = ("runs", "prompts", "answers", "cache", "compare")
    own = {root / name for name in (*inside, "wandb", "sweeps")}
    others = (path for path in root.iterdir() if path not in own)
    return sorted(path for path in others if any(os.path.isdir(path / name) for name in inside))


def _folders(root: Path) -> Iterator[tuple[str, Path]]:
    """Candidates with their kind; work beside a finished folder (`.NAME.new`) included."""
    for kind, depth in (("prompts", 1), ("answers", 2), ("cache", 1)):
        yield from _subfolders(kind, root / kind, "/".join("*" * depth))
    for kind in sorted((root / "runs").glob("*"), key=_order):
        yield from _subfolders(kind.name, kind)
    yield from _subfolders("compare", root / "compare")


def _subfolders(kind: str, folder: Path, pattern: str = "*") -> Iterator[tuple[str, Path]]:
    """(kind, path) of every folder of this pattern; os.path, unlike pathlib, knows no error where access is denied."""
    yield from ((kind, path) for path in sorted(folder.glob(pattern)) if os.path.isdir(path))


def _order(kind: Path) -> int:
    known = ["target", "train", "evaluate", "speed", "calibrate", "serve"]
    return known.index(kind.name) if kind.name in known else len(known)


def _item(kind: str, folder: Path) -> Item | None:
    """The item in a folder; None if it belongs to no stage and no run.

    Its files are those of anybody, and of processes that write them at this moment: what is not as a stage writes it
    has no effect.
    """
    if kind == "compare":
        report = folder / "report.html"
        if not os.path.isfile(report):
            return Item(kind, folder.name, folder, UNFINISHED, _bytes(folder), _changed(folder), {})
        facts = {"files": sum(len(names) for _, _, names in os.walk(folder)), "page": str(report)}
        return Item(kind, folder.name, folder, COMPLETE, _bytes(folder), _changed(report), facts)
    marker, summary = _object(folder / MARKER), _object(folder / "summary.json")
    if not marker and not summary:
        return None
    status = str((marker or summary).get("status"))
    if status == "finished":
        status = COMPLETE
    elif status == "running":
        status = IN_PROGRESS if _is_locked(folder) else UNFINISHED
    parts = folder.parts[-2:] if kind == "answers" else folder.parts[-1:]
    name = "/".join(part[1:-4] + " (new)" if part[:1] == "." else part for part in parts)
    newest = max(map(_changed, (folder / MARKER, folder / "summary.json"))) or _changed(folder)
    results = marker.get("summary")
    facts = _headline(kind, {**(results if isinstance(results, dict) else {}), **summary})
    made, following = _command(marker.get("command")), _command(marker.get("next"))
    return Item(kind, name, folder, status, _bytes(folder), newest, facts, made, following)


def _headline(kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in HEADLINES.get(kind, {}) if _is_headline(facts.get(key))}


def _is_headline(value: Any) -> bool:
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, (str, int))


def _command(value: Any) -> str | None:
    """A recorded command, if it is one of specbench: it is shown to be copied into a shell."""
    return value if isinstance(value, str) and value.startswith("specbench ") else None


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no file. One that cannot be read has the status `unreadable`."""
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would wait for a writer
            return {"status": "unreadable"}
        found = read_json(path, {})
    except (ValueError, OSError):
        return {"status": "unreadable"}
    return found if isinstance(found, dict) else {"status": "unreadable"}


def _bytes(folder: Path) -> int:
    total = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(inside, name)).st_size
            except OSError:  # removed since it was listed, or a link to nothing
                continue
    return total


def _changed(path: Path) -> float:
    """Time of the last change of a file or folder; 0 if there is none, or none that can be read."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _is_locked(folder: Path) -> bool:
    """Whether a running process has the lock of the stage."""
    try:
        with open(os.open(folder / ".lock", os.O_RDONLY | os.O_NONBLOCK)) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def next_command(found: Sequence[Item], root: Path = DEFAULT, others: Sequence[Path] = ()) -> tuple[str, str]:
    """A reason and a command to copy: to complete unfinished work, otherwise to use the newest result below `root`.

    Without a result: the status of the newest of `others`, the roots inside `root`, or the first command.
    """
    broken = [item for item in found if item.status not in (COMPLETE, IN_PROGRESS) and item.command]
    if broken:
        last = max(broken, key=lambda item: item.when)
        return f"{last.kind} {last.name} is {last.status}; the same command continues it", str(last.command)
    complete = [item for item in found if item.status == COMPLETE]
    if not complete and found:
        return "work is in progress; the same page later", _with_root("specbench status", root)
    if not complete and others:
        newest = max(others, key=lambda path: path.stat().st_mtime)
        return f"what exists below {newest}", _with_root("specbench status", newest)
    if not complete:
        return "nothing is there yet: the whole flow on the small embedded target, in minutes", _with_root(START, root)
    last = max(complete, key=lambda item: item.when)
    if last.kind == "compare":
        return "open the newest comparison in a browser", last.facts["page"]
    follows = [item for item in complete if item.next]
    if not follows:
        return "what each verb does", "specbench --help"
    last = max(follows, key=lambda item: item.when)
    return f"what follows from {last.kind} {last.name}", str(last.next)


def _with_root(command: str, root: Path) -> str:
    return command if root == DEFAULT else f"{command} {shlex.quote(f'root={root}')}"


def page(root: Path, found: Sequence[Item], others: Sequence[Path]) -> str:
    """The page of `specbench status`."""
    lines = [f"below {root}/" if found else f"nothing below {root}/"]
    width = max((len(item.name) for item in found), default=0)
    for kind in dict.fromkeys(item.kind for item in found):
        own = [item for item in found if item.kind == kind]
        shown = own[-MOST:]
        hidden = f" (the newest {MOST} of {len(own)})" if len(own) > MOST else ""
        lines += ["", f"{kind}{hidden}"]
        lines += [f"  {item.name:<{width}}  {_row(item)}" for item in shown]
    if others:
        lines += ["", *(f"more below {path}: specbench status root={path}" for path in others)]
    why, command = next_command(found, root, others)
    return "\n".join(map(_printable, [*lines, "", f"next ({why}):", f"  {command}"]))


def _printable(line: str) -> str:
    """A line with control characters written out: names and facts of foreign folders may hold any."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)


def _row(item: Item) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.when))
    said = [_said(value, HEADLINES.get(item.kind, {}).get(key)) for key, value in item.facts.items()]
    told = ", ".join(text for text in said if text)
    return f"{item.status:<15} {when}  {_size(item.bytes):>8}  {told}".rstrip()


def _said(value: Any, words: str | None) -> str:
    if words is None:
        return ""
    number = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return f"{words} {number}" if words.startswith(("accepted", "temperature")) else f"{number} {words}".strip()


def _size(count: float | int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def as_data(found: Sequence[Item]) -> list[dict[str, Any]]:
    """The same as plain data, for scripts."""
    return [asdict(item) | {"path": str(item.path)} for item in found]
