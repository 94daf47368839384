"""Bad commands, made from the schema and from a table of bad files: each ends in one sentence that names what is wrong.

The values are drawn from the types that the schema states and judged by what reaches the user: the exit code, the
words, and that nothing lies below `root`. The command line's own function is called in this process; a few dozen
commands really are processes.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel

from experiments.cli import main
from specbench.cli.assembly import PACKAGED, composed, location
from specbench.cli.overrides import leaves
from specbench.cli.schema import _alternatives, _flat, annotation_at, describe
from specbench.cli.settings import SCHEMAS
from specbench.cli.verbs import VERBS

REPOSITORY = Path(__file__).resolve().parents[1]
# What a verb must be given; nothing of it exists, so that a value which is let through cannot begin a long work.
NEEDS = {
    "evaluate": ["draft=/no/draft"],
    "speed": ["draft=/no/draft"],
    "calibrate": ["rounds=/no/rounds"],
    "serve": ["rounds=/no/rounds"],
    "export": ["draft=/no/draft", "format=vllm"],
    "import": ["draft=/no/draft"],
    "rerun": ["run=/no/run"],
    "reproduce": ["name=fig2_position"],
    "sync": ["run=/no/run"],
}
# What these hold is for the model library to judge, or for those who filter by any value.
FREE = ("config", "shapes", "model", "filters", "where", "policies", "study")


@dataclass(frozen=True)
class Bad:
    """A command, the words that its sentence must hold (one of them), and why it is bad."""

    verb: str
    words: tuple[str, ...]
    names: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return " ".join((self.verb, *(word if len(word) < 60 else f"{word[:57]}..." for word in self.words)))


def kinds(annotation: Any, metadata: Any = ()) -> dict[str, str]:
    """Values that a setting of this type must refuse, as they are typed, by why."""
    metadata = _flat(metadata)
    if get_origin(annotation) is Annotated:
        return kinds(get_args(annotation)[0], [*metadata, *get_args(annotation)[1:]])
    parts = _alternatives(annotation)
    bad = {"a mapping": "{a:1}", "a list of lists": "[[1]]"}
    if type(None) not in parts:
        bad["null"] = "null"
    bound = {name: getattr(m, name) for m in numbers(annotation, metadata) for name in BOUNDS if hasattr(m, name)}
    if int in parts or float in parts:
        bad |= {"nan": "nan", "infinite": "inf", "minus infinite": "-inf", "empty": "", "text": "many"}
        bad |= {"a truth value": "true", "a number in quotes": "'5'", "a list": "[1]"}
        if float not in parts:
            bad["a fraction"] = "1.5"
        bad |= (
            {"below": str(bound["ge"] - 1)} if "ge" in bound else {"below": str(bound["gt"])} if "gt" in bound else {}
        )
        bad |= {"above": f"{bound['le'] * 10:d}"} if isinstance(bound.get("le"), int) and bound["le"] else {}
    if bool in parts:
        bad |= {"a number": "1", "a word": "yes", "empty": "", "a list": "[true]"}
    if any(get_origin(part) is Literal for part in parts) or described_names(annotation, metadata):
        bad |= {"misspelt": "bannana", "a list": "[auto]", "a fraction": "1.5", "nan": "nan"}
    elif str in parts:
        bad |= {"empty": "", "a list of numbers": "[1,2]"}
    if any(get_origin(part) is list or part is list for part in parts):
        bad.pop("a list", None)
        bad.pop("a list of numbers", None)
        if not any(part in (str, int, float) for part in parts):
            bad |= {"one value": "7", "text": "many"}
        bad["with null in it"] = "[null]"
    if any(get_origin(part) is dict or part is dict for part in parts):
        bad.pop("a mapping")
    return bad


BOUNDS = ("gt", "ge", "lt", "le")


def numbers(annotation: Any, metadata: Any) -> list[Any]:
    """Constraints at any depth of a union."""
    found = list(_flat(metadata))
    for part in get_args(annotation):
        if get_origin(part) is Annotated:
            found += _flat(get_args(part)[1:])
    return found


def described_names(annotation: Any, metadata: Any) -> bool:
    return describe(annotation, metadata).startswith("one of ")


def bad_values(every: bool) -> Iterator[Bad]:
    """Of every setting of every verb one bad value, the kinds taking turns; `every`: all kinds where a key is new."""
    turn, seen = itertools.count(), set()
    for verb, found in VERBS.items():
        cfg = composed(found.config, NEEDS.get(verb, []))
        tree = OmegaConf.to_container(cfg, resolve=False)
        for key, value in leaves(cfg).items():
            path = key.split(".")
            if path[-1] == "_target_" or FREE_KEYS & set(path) or (isinstance(value, dict) and value):
                continue
            annotation, metadata = annotation_at(SCHEMAS[found.config], path, tree)
            if annotation is Any or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
                continue
            bad = list(kinds(annotation, metadata).items())
            chosen = bad if every and key not in seen else [bad[next(turn) % len(bad)]]
            seen.add(key)
            for why, text in chosen:
                given = [word for word in NEEDS.get(verb, []) if not word.startswith(f"{key}=")]
                typed = f"{'++' if key.startswith('yes') else ''}{key}={text}"
                yield Bad(verb, (*given, typed), (key, path[-1]), why)


FREE_KEYS = set(FREE)


def misspelt() -> Iterator[Bad]:
    """One letter too many in the first, a middle and the last setting of every verb."""
    for verb, found in VERBS.items():
        keys = [key for key in leaves(composed(found.config, NEEDS.get(verb, []))) if "_target_" not in key]
        for key in (keys[0], keys[len(keys) // 2], keys[-1]):
            wrong = key[:-1] + key[-1] * 2
            yield Bad(verb, (*NEEDS.get(verb, []), f"{wrong}=1"), (wrong,), "misspelt")
            yield Bad(verb, (*NEEDS.get(verb, []), f"+{key}.surplus=1"), (key, "surplus"), "surplus")


# What a file may be instead of what it should be; a cut JSON breaks off in the middle.
CONTENTS: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "binary": bytes(range(256)) * 8,
    "cut": b'{"schema": "specbench.run/1", "status": "fin',
    "a list": b"[1, 2, 3]",
    "a number": b"7",
    "foreign": b'{"colour": "red", "numbers": [1, 2]}',
}
EMBEDDED = Path(location(f"{PACKAGED}data/embedded"))


def folder_with(place: Path, name: str, content: bytes | None, copied: Path | None = None) -> Path:
    """A folder whose file `name` has this content (None: is not there), `copied` from a sound one."""
    place.mkdir(parents=True)
    for file in copied.iterdir() if copied is not None else ():
        if file.is_file():
            shutil.copyfile(file, place / file.name)
    (place / name).unlink(missing_ok=True)
    if content is not None:
        (place / name).write_bytes(content)
    return place


def bad_files(at: Path) -> Iterator[Bad]:
    """Every input of every verb as a file or folder that is not what it should be."""
    shutil.rmtree(at, ignore_errors=True)
    # Verb, the setting that names the file or folder, the file inside it (None: the file itself), what is given beside.
    places = [
        ("evaluate", "draft", "config.json", ()),
        ("evaluate", "draft", "summary.json", ()),
        ("speed", "draft", "config.json", ()),
        ("export", "draft", "config.json", ("format=vllm",)),
        ("import", "draft", "config.json", ()),
        ("evaluate", "prompts", None, ("draft=plain",)),
        ("evaluate", "prompts", "code.jsonl", ("draft=plain",)),
        ("speed", "prompts", None, ("draft=ngram",)),
        ("prompts", "data.source.paths", None, ("data=jsonl", "decontaminate=null")),
        ("calibrate", "rounds", None, ()),
        ("calibrate", "rounds", "rounds.jsonl", ()),
        ("serve", "rounds", None, ()),
        ("serve", "profile.path", None, ("profile=file", "rounds=/no/rounds")),
        ("train", "cache", "manifest.json", ("tracking=disabled", "start=random", "trainer.probe.every=null")),
        ("cache", "answers", "answers.jsonl", ()),
        ("rerun", "run", "summary.json", ()),
        ("compare", "runs", "summary.json", ()),
        ("compare", "runs", None, ()),
        ("evaluate", "target.id", "config.json", ("target=folder", "draft=plain")),
        ("evaluate", "target.id", "model.safetensors", ("target=folder", "draft=plain")),
        ("evaluate", "target.id", "tokenizer.json", ("target=folder", "draft=plain")),
    ]
    for number, (verb, key, name, given) in enumerate(places):
        for why, content in CONTENTS.items():
            place = at / str(number) / why.replace(" ", "-")
            if name is None:
                place = place.with_suffix(".json" if "profile" in key else ".jsonl")
                place.parent.mkdir(parents=True, exist_ok=True)
                if content is not None:
                    place.write_bytes(content)
            else:
                folder_with(place, name, content, EMBEDDED if key == "target.id" else None)
            value = f"[{place}]" if key in ("data.source.paths", "evaluations") else str(place)
            if (name, why, key) in SOUND:
                continue
            yield Bad(
                verb, (*given, f"{key}={value}"), (str(place), place.name, f"{key}="), f"{name or 'the file'} is {why}"
            )
        if name is None and key != "runs":  # a folder where a file is meant, with nothing in it
            place = at / str(number) / "a-folder.jsonl"
            place.mkdir(parents=True)
            value = f"[{place}]" if key == "data.source.paths" else str(place)
            yield Bad(verb, (*given, f"{key}={value}"), (str(place),), "a folder")


# Not bad: what a target without these files is for.
SOUND = {("tokenizer.json", "missing", "target.id"), ("summary.json", "missing", "draft")}


def said_by(bad: Bad, root: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is wrong with how the command line took a bad command: nothing, where it ended as it should."""
    capsys.readouterr()
    code = main([bad.verb, f"root={root}", *bad.words])
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1] if captured.err.strip() else ""
    faults = [] if code == 2 else [f"exit code {code}"]
    if "Traceback" in captured.err or "defect" in captured.err:
        faults.append("a traceback")
    if not last.startswith("specbench: ") or not any(name in last for name in bad.names):
        faults.append("no setting and no file in the sentence")
    return [f"{bad} ({bad.why}): {', '.join(faults)}: {captured.err[-400:]}"] if faults else []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_bad_value_passes_and_each_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands, root, faults = [*bad_values(every=False), *misspelt()], tmp_path / "never", []
    assert len(commands) >= 600
    for bad in commands:
        faults += said_by(bad, root, capsys)
        if root.exists():
            faults.append(f"{bad}: wrote into root")
            shutil.rmtree(root)
    assert not faults, "\n".join([f"{len(faults)} of {len(commands)}", *faults])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_bad_file_passes_and_each_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands, faults = list(bad_files(tmp_path / "files")), []
    assert len(commands) >= 140
    for number, bad in enumerate(commands):
        faults += said_by(bad, tmp_path / f"out{number}", capsys)
    assert not faults, "\n".join([f"{len(faults)} of {len(commands)}", *faults])
