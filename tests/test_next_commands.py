"""Every command that a stage prints as the next one, run as it is printed, from prompts to a simulated load."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.cli import main
from specbench.cli.config_groups import configs
from specbench.cli.following import command
from specbench.cli.overrides import compose, without_hydra

# What keeps the stages short; none of it is needed for a command to work.
SHORT = {
    "answers": ["max_new_tokens=24"],
    "train": ["trainer=smoke", "tracking=disabled", "trainer.max_steps=2", "evaluate=false", "suite.limit=2"],
    "evaluate": ["tracking=disabled", "max_new_tokens=16"],
    "compare": ["resamples=50", "figures=false"],
    "serve": ["steps=20", "warmup=2"],
}


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str] | None:
    """Run a command and give the next one that it names."""
    more = SHORT.get(words[0], [])
    if words[0] == "train":
        more = [*more, "trainer.data.validation_fraction=0.3"]
    assert main([*words, *more]) == 0, (words, capsys.readouterr().err)
    said = re.search(r"next: specbench (.*)", capsys.readouterr().out)
    return shlex.split(said[1]) if said else None


@pytest.mark.long
def test_every_next_command_works_as_it_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, chats = tmp_path / "a root", tmp_path / "chats.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"What is {n} + 3?"}, {"role": "assistant", "content": "A number."}]}
        for n in range(11, 23)
    ]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = [f"data.source.paths=[{chats}]", "decontaminate=null", "near_duplicate=null", "validation=0.3"]
    words, verbs = run(["prompts", f"root='{root}'", "data=jsonl", *source], capsys), []
    while words:
        verbs.append(words[0])
        words = run(words, capsys)
    assert verbs == ["answers", "cache", "train", "evaluate", "compare"]
    (draft,) = (root / "runs" / "train").iterdir()
    (rounds,) = (root / "runs" / "evaluate").iterdir()
    quick = ["batch_sizes=[1,2]", "lengths=[]", "step_tokens=8", "repeats=2", "warmup=1", "check=[]", "suite.limit=2"]
    clock = [*quick, "clock_prompts=2", "clock_repeats=1", "max_new_tokens=8", f"draft='{draft}'"]
    for first in (["speed", f"root='{root}'", *clock], ["calibrate", f"root='{root}'", f"rounds='{rounds}'"]):
        then = run(first, capsys)
        assert then is not None and then[0] == "serve"
        assert run(then, capsys) is None
    # Before an evaluation there are no rounds to replay: the next command makes some.
    fresh = run(["speed", f"root='{tmp_path}/empty'", *clock], capsys)
    assert fresh is not None and fresh[0] == "evaluate"


CHANGES = [
    (),
    ("target.dtype=bfloat16", "target.stop_token_ids=[3,4]"),
    ("target.id='/some where/it''s'",),
    ("suite=paper", "suite.limit=3", "suite.turns=first"),
    ("target=qwen3_4b", "target.thinking=true", "suite=quick"),
    ("target=folder", "target.id=OWNER/NAME", "target.threads=2"),
]


@pytest.mark.parametrize("words", CHANGES, ids=lambda words: " ".join(words) or "defaults")
def test_a_command_gives_back_the_groups_that_it_was_written_from(words: tuple[str, ...]) -> None:
    with configs("configs"):
        cfg = without_hydra(compose("evaluate", ["draft=plain", *(word.replace("''", "\\'") for word in words)]))
        printed = shlex.split(command("evaluate", cfg, ("target", "suite"), draft="plain"))[2:]
        again = without_hydra(compose("evaluate", printed))
    for group in ("target", "suite"):
        assert OmegaConf.to_container(again[group], resolve=True) == OmegaConf.to_container(cfg[group], resolve=True)


def test_an_option_that_is_built_on_another_needs_only_its_name() -> None:
    with configs("configs"):
        cfg = without_hydra(compose("evaluate", ["draft=plain", "target=qwen3_1_7b"]))
    printed = shlex.split(command("evaluate", cfg, ("target",), draft="plain"))
    assert [word for word in printed if "target" in word] == ["target=qwen3_1_7b"]


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ((), ["method=dspark", "size=laptop_dspark"]),
        (("method=mtp", "method.draft.layers=2"), ["method=mtp", "size=laptop_mtp", "method.draft.layers=2"]),
        (("trainer=node", "trainer.max_steps=40"), ["method=dspark"]),
    ],
)
def test_a_tuned_training_is_written_by_its_options(words: tuple[str, ...], method: list[str]) -> None:
    """Sizes are an option of the trainer, not settings to be repeated one by one."""
    groups = ("method", "trainer")
    with configs("configs"):
        cfg = without_hydra(compose("train", list(words)))
        printed = shlex.split(command("train", cfg, groups))[2:]
        again = without_hydra(compose("train", printed))
    assert not any("sizes" in word for word in printed)
    assert [word for word in printed if word.startswith(("method", "size"))] == method
    for group in groups:
        assert OmegaConf.to_container(again[group], resolve=True) == OmegaConf.to_container(cfg[group], resolve=True)
