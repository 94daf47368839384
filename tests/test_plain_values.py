"""Words of a command line and YAML of others: texts stay the texts they are, and a small file stays small."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.read.folders import find
from experiments.cli import main
from specbench.cli.overrides import parse, readable
from specbench.files import plain_yaml
from specbench.runs.run_folder import read_settings

PATHS = [
    "/a(1)/x.jsonl",
    "/größe/ü",
    "it's",
    "a=b",
    "#1",
    "!x",
    "$(id)",
    "~",
    "x y(z)",
    "end(\\",
    "\\'(",
]


@pytest.mark.parametrize("text", PATHS)
def test_paths_of_any_sign_are_taken_as_they_are_written(text: str) -> None:
    (word,) = readable([f"name={text}"])
    (override,) = parse([word])
    assert str(override.value()) == text


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=12))
def test_every_text_can_be_read_and_what_hydra_reads_itself_is_left_alone(text: str) -> None:
    word = f"key={text}"
    (found,) = readable([word])
    (override,) = parse([found])
    assert found == word or override.value() == text


def test_words_that_are_no_setting_and_unquoted_sweeps_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'ü' is no setting: settings are key=value"):
        readable(["ü"])
    with pytest.raises(ValueError, match=r"name=a\(1\),b: cannot be read as the values of a sweep"):
        readable(["name=a(1),b"], sweep=True)


def test_a_prompts_file_with_brackets_and_accents_in_its_path_is_decoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "größe (1)" / "it's.jsonl"
    prompts.parent.mkdir()
    prompts.write_text('{"prompt_ids": [5, 6, 7]}\n')
    words = ["draft=plain", f"prompts={prompts}", f"root={tmp_path / 'out (2)'}", "tracking=disabled"]
    assert main(["evaluate", *words, "max_new_tokens=4"]) == 0, capsys.readouterr().err
    assert len(find(str(tmp_path / "out (2)"))) == 1


def bomb(depth: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text", [bomb(9), "a: &a [*a]\n", "a: " + "[" * 20_000 + "\n"], ids=["unfolds", "itself", "deep"]
)
def test_a_record_that_unfolds_without_end_is_refused_at_once(tmp_path: Path, text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        plain_yaml.read(text)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml is no YAML of plain values"):
        read_settings(tmp_path / "run")


def test_aliases_that_dumpers_write_are_read() -> None:
    shared = [1, 2]
    assert plain_yaml.read(yaml.safe_dump({"a": shared, "b": shared})) == {"a": shared, "b": shared}
