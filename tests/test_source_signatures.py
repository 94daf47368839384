"""Parameters read from source text are those of the imported class, for every class that a setting can name."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from specbench.cli import schema, settings
from specbench.cli.source_signatures import Undecided, lineage, parameters

REPOSITORY = Path(__file__).resolve().parents[1]
WRITTEN = "\n".join(file.read_text(encoding="utf-8") for file in (REPOSITORY / "configs").rglob("*.yaml"))
NAMED = set(re.findall(r"_target_: *((?:specbench|lightning)[\w.]+)", WRITTEN))
NAMED |= set(re.findall(r"Built\(of=\"([\w.]+)\"", Path(settings.__file__).read_text(encoding="utf-8")))


def described(kind: object) -> str:
    return repr(schema._plain(kind))


@pytest.mark.parametrize("name", sorted(NAMED))
def test_the_text_says_what_the_import_says(name: str) -> None:
    read = [
        (p.name, p.default is inspect.Parameter.empty, p.default is None, described(p.annotation))
        for p in parameters(name)
    ]
    found: dict[str, tuple] = {}
    for p, scope in schema._parameters(schema.located(name, "_target_")):
        kind = described(schema._evaluated(p.annotation, scope))
        found.setdefault(p.name, (p.name, p.default is inspect.Parameter.empty, p.default is None, kind))
    assert read == list(found.values())


@pytest.mark.parametrize("name", sorted(name for name in NAMED if name.startswith("specbench.")))
def test_a_lineage_is_that_of_the_class(name: str) -> None:
    found = schema.located(name, "_target_")
    found = getattr(found, "__self__", found)
    own = [
        f"{part.__module__}.{part.__qualname__}" for part in found.__mro__ if part.__module__.startswith("specbench")
    ]
    assert [part for part in lineage(name) if part.startswith("specbench")] == own


@pytest.mark.parametrize("name", ["torch.nn.Linear", "specbench.drafts.nothing.X", "specbench.drafts.dspark.Nothing"])
def test_what_the_text_does_not_say_is_left_to_the_import(name: str) -> None:
    with pytest.raises(Undecided):
        parameters(name)


@pytest.mark.parametrize(
    "words",
    ["train --help", "train trainer.max_steps=abc", "train trainer.recipe.lr=-1", "train method.draft.layers=x"],
)
def test_help_and_mistakes_need_no_torch(words: str) -> None:
    code = (
        "import sys; from experiments.cli import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'lightning', 'transformers', 'wandb') if name in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert ("takes" in done.stderr) is ("--help" not in words)
