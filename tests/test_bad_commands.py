"""Bad commands, made from the schema and from a table of bad files: each ends in one sentence that names what is wrong.

The values are drawn from the types that the schema states and judged by what reaches the user: the exit code, the
words, and that nothing lies below `root`. The command line's own function is called in this process; a few dozen
commands really are processes.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel

from experiments.cli import main
from specbench.cli.assembly import composed
from specbench.cli.overrides import leaves
from specbench.cli.schema import SECRET, _alternatives, _flat, annotation_at, describe
from specbench.cli.settings import SCHEMAS, check_settings
from specbench.cli.verbs import VERBS
from specbench.models.target_files import PACKAGED, location
from tests.pipeline import prepare

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
    "submit": ["runs=/no/run", "signed_off_by='Ada <ada@example.org>'"],
    "check-submission": ["files=/no/result.json"],
    "leaderboard": ["results=/no/results"],
    "reproduce": ["name=fig2_position"],
    "sync": ["run=/no/run"],
    "completion": ["shell=bash"],
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
            if path[-1] in SECRET:  # a key that is typed is withheld first and then is a text, whatever it looks like
                bad = [(why, text) for why, text in bad if not why.startswith(("a list", "a mapping"))]
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
        ("submit", "runs", "summary.json", ("signed_off_by='Ada <ada@example.org>'",)),
        ("check-submission", "files", None, ()),
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


# A value that was once taken in silence, or refused in words that name no setting, each with what the sentence holds.
TRAIN = """
trainer.recipe.gradient_clip=-1 | a number above 0
trainer.recipe.layer_decay=-1 | a number above 0, at most 1
trainer.recipe.warmup=7 | from 0 to 1
trainer.recipe.lr=0 | a number above 0
trainer.recipe.lr=nan | lr=nan: takes a number above 0
trainer.recipe.betas=[0.9] | a list
trainer.recipe.ema=1 | below 1
method.window=0 | window=0: takes a whole number from 1
method.draft.block_size=100000 | from 1 to 512
method.draft.anchors=10000000000 | anchors=10000000000: takes
method.draft.markov_head=vanila | one of vanilla, gated, rnn
method.draft.markov_rank=0 | confidence_with_markov=true
method.objective.slot_weight={exp:0} | slot_weight
method.objective.ce=-1 | ce=-1: takes a number from 0
method.objective.ce=0 method.objective.tv=0 method.objective.confidence=0 | no term
logger=[[1]] | logger=[[1]]: takes one of, or a list of, csv
callbacks=[default,7] | a list of, default
method=[dspark] | method=[dspark]: takes one of
logger=7 | logger=7: takes
logger=null | logger=null: takes one of, or a list of, csv
method.backbone=qwen9 | takes one of
+method.head=rnn | labelled by a head
choice=eagle3_default method=dspark | a choice of method=eagle3
size=laptop_eagle3 method=dflash | the sizes of another method than method=dflash
method=eagle3 head=rnn | method=eagle3 has no markov_head
trainer.max_steps=null | trainer.max_steps=null trainer.epochs=null
trainer.lightning.precision=16-mixt | one of 32-true
trainer.lightning.devices=-1 | a number of devices
trainer.data.samples_per_micro=0 | from 1
trainer.data.validation_fraction=1 | below 1
+trainer.recipe.lrr=1 | did you mean 'lr'
+trainer.lightning.acelerator=cpu | did you mean 'accelerator'
cache_dtype=float31 | one of float32
on_damage=ignore | one of raise, skip
online=true stream=true | choose one
stream=true trainer.lightning.devices=auto | every rank reads its own shards
shuffle_buffer=0 | from 1
seed.init=-1 | from 0 to 4294967295
temperatures=[] | temperatures=[]
temperatures=[0,0] | without repetitions
tracking.mode=banana | one of auto, online, offline, disabled
target.dtype=flaot32 | one of float32
target.device=gpu | a device: auto, cpu
target.target_layer_ids=[3,1] | ascending
target=tiny_qwen3 target.config.hidden_size=-1 | hidden_size=-1: takes
name=../x | a name for a folder
root= | root='': takes a path
suite.benchmarks.code.name=math | benchmarks name math twice
-m seed.init=0,-1 | seed.init=-1
-m method.draft.layers=1,0 trainer.recipe.lr=0.1 | layers=0
"""
OTHERS = """
answers api_key= | api_key=
evaluate slots=-1 draft=ngram | slots=-1: takes a whole number from 1
evaluate token_budget=-4 draft=plain | token_budget=-4: takes
evaluate temperature=-1 draft=plain | temperature=-1: takes
evaluate temperature=inf draft=plain | temperature=inf: takes a number from 0
evaluate top_p=0 draft=plain | top_p=0: takes a number above 0
evaluate max_new_tokens=1000000000 draft=plain | max_new_tokens=1000000000: takes
evaluate stop_token_ids=[a] draft=plain | stop_token_ids=[a]: takes
evaluate audit=true temperature=1 draft=ngram | the target's own greedy text
evaluate device=cuda:x draft=plain | a device: auto, cpu
evaluate scheduler=threshold scheduler.threshold=2 draft=plain | threshold=2: takes a number from 0 to 1
evaluate scheduler._target_=os.getcwd draft=plain | takes a Scheduler
speed draft=plain | draft=plain
speed draft=ngram batch_sizes=[] | batch_sizes=[]: takes
speed train train.parts=[dsparc] | train.parts=[dsparc]: takes
speed train train.sizes={hiden:3} | did you mean 'hidden'
answers chunk=0 | chunk=0: takes
answers count=0 | count=0: takes
answers servers=[localhost] | servers=[localhost]: takes base URLs
answers sampling.top_p=2 | top_p=2: takes
cache codec=bogus | codec=bogus: choose one of
cache shard_bytes=0 | shard_bytes=0: takes
quickstart steps=0 | steps=0: takes
quickstart slots=0 | slots=0: takes
quickstart methods=[] | methods=[]: takes
quickstart methods=[dsparc] | there is no method dsparc
quickstart codec=bogus | codec=bogus
calibrate rounds=x share=1 | share=1: takes a number above 0, below 1
serve rounds=x baseline=fixd | takes one of the policies
serve rounds=x concurrency=[] | there is no load
compare where=a | takes conditions such as key=value
export draft=x format=vlm | one of deepspec, vllm, sglang
export draft=x format=vllm push=me | OWNER/NAME
target vocabulary=10 | vocabulary=10: takes
target training.warmup=-1 | warmup=-1: takes
prompts validation=1 | validation=1: takes
prompts ngram=0 | ngram=0: takes
prompts data=held_out data.source.limits={gsm8k:0} | limits.gsm8k=0: takes
"""


def table() -> list[tuple[str, list[str], str]]:
    """Verb, words and what the sentence holds, of both tables."""
    lines = [f"train {line}" for line in TRAIN.strip().splitlines()] + OTHERS.strip().splitlines()
    split = [(line.split(" | ")[0].split(), line.split(" | ")[1]) for line in lines]
    return [(words[0], words[1:], said) for words, said in split]


ROWS = [pytest.param(*row, marks=[pytest.mark.long] if at % 2 else []) for at, row in enumerate(table())]


@pytest.mark.parametrize(("verb", "words", "said"), ROWS, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_nonsense_is_refused_with_its_range(
    verb: str, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = [] if "root=" in words else [f"root={tmp_path / 'never'}"]
    assert main([verb, *words, *root]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("specbench: ") and errors.count("\n") == 1 and said in errors, errors
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_committed_is_in_range(verb: str) -> None:
    check_settings(verb, composed(VERBS[verb].config, NEEDS.get(verb, [])))


@pytest.mark.parametrize("name", ["20260101", "1e5", "nan", "true", "7.50"])
def test_names_that_look_like_numbers_are_texts(name: str) -> None:
    assert composed("train", [f"name={name}"]).name == name
    assert composed("train", [f"data.name={name}"]).data.name == name


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": ""}, "RANK=''"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK='first'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        ({"SLURM_PROCID": "1.5"}, "SLURM_PROCID='1.5'"),
    ],
)
def test_ranks_that_are_no_numbers_are_named(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["sync", "run=/no/run"]) == 2
    assert said in capsys.readouterr().err


def process(words: list[str], **streams: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.cli", *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True, check=False, **streams
    )


def test_a_full_or_closed_stdout_is_a_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = process(["sync", "--help"], stdout=full)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "stdout cannot be written" in done.stderr
    done = process(["sync", "--help"], preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "stdout is closed" in done.stderr


def test_a_reader_that_leaves_is_no_fault() -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from experiments.cli import main; sys.exit(main(['train', '--help']))",
    ]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as opened:
        assert opened.stdout is not None and opened.stderr is not None
        opened.stdout.close()
        assert opened.stderr.read() == "" and opened.wait(120) == 0


def test_help_states_types_and_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    for said in (
        "share of the steps [a number from 0 to 1]",
        "slots K of a block [a whole number from 1 to 512]",
        "vanilla, gated or rnn [one of vanilla, gated, rnn]",
        "folder or URL of a target cache",
    ):
        assert said in page


def test_more_slots_than_a_block_holds_and_more_memory_than_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = prepare(tmp_path)
    assert main(["train", *words, "name=one", "evaluate=false"]) == 0
    draft = [f"root={tmp_path}", f"draft={tmp_path / 'runs/train/one'}", "tracking=disabled"]
    capsys.readouterr()
    assert main(["evaluate", *draft, f"suite.prompts={tmp_path / 'asked.jsonl'}", "slots=50"]) == 2
    assert "slots=50: the block of draft=" in capsys.readouterr().err
    large = ["method.draft.layers=256", "method.draft.block_size=512", "trainer.data.samples_per_micro=100000"]
    assert main(["train", *words, *large, "name=two"]) == 2
    assert "GiB are free" in capsys.readouterr().err


@functools.cache
def writes_below_root(verb: str) -> bool:
    return "root" in composed(VERBS[verb].config, NEEDS.get(verb, []))


def below(verb: str, root: Path) -> list[str]:
    """The setting that says where a verb writes, for the verbs that have it."""
    return [f"root={root}"] if writes_below_root(verb) else []


def said_by(bad: Bad, root: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is wrong with how the command line took a bad command: nothing, where it ended as it should."""
    capsys.readouterr()
    code = main([bad.verb, *below(bad.verb, root), *bad.words])
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


@pytest.mark.long
@pytest.mark.timeout(900)
def test_bad_commands_as_processes(tmp_path: Path) -> None:
    commands = table()[::3]
    assert len(commands) >= 24
    for verb, words, said in commands:
        done = process([verb, f"root={tmp_path / 'never'}", *words], stdout=subprocess.PIPE)
        assert done.returncode == 2 and done.stdout == "", (verb, words, done.stderr)
        assert done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert not (tmp_path / "never").exists()
