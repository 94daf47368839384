"""The README shows what the quickstart produced, and its commands name what exists."""

import re
from pathlib import Path

from specbench.cli.verbs import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readme_holds_the_quickstarts_own_table():
    table = (ROOT / "docs" / "quickstart" / "accepted_length.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) >= 6
    assert [row for row in rows if row not in README] == []


def test_every_path_and_verb_of_the_readme_exists():
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
    verbs = set(re.findall(r"^ *(?:\S*/)?specbench ([a-z-]+)", README, re.M))
    assert len(verbs) >= 6
    assert verbs <= set(VERBS)
