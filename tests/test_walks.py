"""The walks of docs/design.md: the files that hand the data on, as they run."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import specbench as sb
from tests.test_library import EMBEDDED, answers

ROOT = Path(__file__).resolve().parents[1]
HEAD = re.compile(r"^\*\*(?P<what>A [^:*]+): (?P<count>\d+) files", re.M)


def walks() -> dict[str, tuple[int, list[str]]]:
    """What is followed -> the number that the page states, and the files that it lists."""
    text = (ROOT / "docs" / "design.md").read_text().partition("## Three walks")[2].partition("\n## ")[0]
    found = {}
    starts = [*HEAD.finditer(text)]
    for at, head in enumerate(starts):
        part = text[head.end() : starts[at + 1].start() if at + 1 < len(starts) else len(text)]
        found[head["what"]] = int(head["count"]), re.findall(r"^    (\S+/\S+)", part, re.M)
    return found


def test_the_page_counts_the_files_that_it_lists() -> None:
    assert len(walks()) == 3
    for what, (count, files) in walks().items():
        assert count == len(files) == len(set(files)), what
        assert [name for name in files if not (ROOT / name).is_file()] == [], what


@contextmanager
def running(into: set[str]) -> Iterator[None]:
    """Collect the files of the project whose functions are called meanwhile, in any thread."""

    def note(frame, event, argument) -> None:
        name = frame.f_code.co_filename
        if event == "call" and Path(name).is_relative_to(ROOT) and frame.f_code.co_name != "<module>":
            into.add(str(Path(name).relative_to(ROOT)))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.mark.long
def test_every_listed_file_takes_part(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    seen: set[str] = set()
    target = sb.Target.load(EMBEDDED, taps=[1, 3, 5])
    draft = sb.DSpark.for_target(target, layers=1, block_size=3, anchors=6, markov_rank=8)
    module = sb.DraftTraining(draft, sb.Objective(ce=0.1, tv=0.9, confidence=1.0))
    with running(seen):
        data = sb.TargetCache.build(target, answers(tmp_path), tmp_path / "cache", samples_per_micro=2)
        sb.train(module, data, tmp_path / "run", max_steps=1, accelerator="cpu", enable_progress_bar=False)
        sb.compare(sb.evaluate(target, draft, ["What is 3 + 4?", "Count."], temperature=1.0, max_new_tokens=6)).table()
    for what in ("A conversation, from answers.jsonl to a loss value", "A round, from the proposal to a table cell"):
        listed = {name for name in walks()[what][1] if not name.startswith("experiments/")}
        assert listed - seen == set(), what
