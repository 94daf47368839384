"""A result from an evaluation to its check: submitted, decoded again, and refused where tokens or rounds differ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from experiments.cli import main
from specbench.cli.assembly import composed
from specbench.cli.overrides import named
from specbench.decoding.tree_shapes import BestFirst, DynamicTree, StaticTree, TopW, tree_of, tree_settings
from specbench.library.submission import protocol_of_result
from specbench.runs.result_schema import Result, dumped

SIGNED = "signed_off_by='Ada Lovelace <ada@example.org>'"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A root, its questions, and the evaluation of the n-gram baseline on them; one of them has two turns."""
    root = tmp_path_factory.mktemp("submissions")
    questions = root / "asked.jsonl"
    turns = [["What is 41 + 5?", "And what is 7 + 5?"], ["What is 52 + 5?"], ["What is 63 + 5?"]]
    questions.write_text("".join(json.dumps({"id": f"q{n}", "turns": own}) + "\n" for n, own in enumerate(turns)))
    words = [f"root={root}", f"prompts={questions}", "draft=ngram", "slots=3", "max_new_tokens=24", "name=e"]
    assert main(["evaluate", *words, "tracking=disabled"]) == 0
    return root, questions, root / "runs" / "evaluate" / "e"


def submitted(run: Path, results: Path) -> Path:
    assert main(["submit", str(run), f"results={results}", SIGNED]) == 0
    return next(file for file in results.glob("*.json") if not file.name.endswith(".verified.json"))


def again(file: Path, questions: Path, *more: str) -> int:
    words = [f"files={file}", "target=embedded", f"prompts={questions}", "decode=3", *more]
    return main(["check-submission", *words])


def test_a_result_states_what_the_run_recorded(measured: tuple[Path, Path, Path], tmp_path: Path) -> None:
    root, questions, run = measured
    file = submitted(run, tmp_path)
    text = file.read_text()
    content, summary = json.loads(text), json.loads((run / "summary.json").read_text())
    assert str(root) not in json.dumps({key: value for key, value in content.items() if key != "command"})
    assert (content["protocol"], content["draft"]["weights"]) == (summary["protocol"], "baseline:ngram")
    (benchmark,) = content["suite"]["benchmarks"].values()
    assert benchmark["revision"] == hashlib.sha256(questions.read_bytes()).hexdigest()
    own = summary["metrics"]["accepted_length"]
    assert {key: benchmark["accepted_length"][key] for key in ("value", "low", "high")} == pytest.approx(
        {key: own[key] for key in ("value", "low", "high")}
    )
    typed = json.loads((run / "provenance.json").read_text())["command"]
    assert content["command"] == [*(Path(word).name for word in typed[:1]), *typed[1:]]
    lines = [json.loads(line) for line in (tmp_path / content["records"]["place"]).read_text().splitlines()]
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [line["output_tokens"] for line in lines] == [len(line["output_ids"]) for line in rounds]
    assert len({line["prompt"] for line in lines}) == 3 and len(lines) == 4


def test_prompts_are_decoded_again_and_the_state_is_kept(
    measured: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, questions, run = measured
    file = submitted(run, tmp_path)
    assert main(["check-submission", str(file)]) == 0
    assert capsys.readouterr().out.endswith(f"{file}: recomputed\n")
    assert again(file, questions, "draft=ngram", "seed=1", "verified_by='Ada <ada@example.org>'") == 0
    assert f"{file}: verified here" in capsys.readouterr().out
    every = [str(one) for one in sorted(tmp_path.glob("*.json"))]
    assert len(every) == 2 and main(["check-submission", *every]) == 0  # as `results/*.json` names them
    assert capsys.readouterr().out == f"{file}: verified here\n"
    assert main(["leaderboard", str(tmp_path), f"root={tmp_path / 'out'}"]) == 0
    assert "verified here" in (tmp_path / "out" / "leaderboard" / "embedded--embedded.html").read_text()
    # Submitting again replaces the result only if asked to, and what verified it no longer stands.
    assert main(["submit", str(run), f"results={tmp_path}", SIGNED]) == 2
    assert main(["submit", str(run), f"results={tmp_path}", SIGNED, "force=true"]) == 0
    assert not list(tmp_path.glob("*.verified.json"))


def test_other_drafts_tokens_and_rounds_are_told(
    measured: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, questions, run = measured
    file = submitted(run, tmp_path)
    assert again(file, questions, "draft=oracle") == 2
    assert (
        "was measured with the draft weights baseline:ngram, and draft= holds baseline:oracle"
        in capsys.readouterr().err
    )
    # Records that add up and are not what the draft does: one round more that accepts nothing, and another text.
    records = next(tmp_path.glob("*.records.jsonl"))
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    lines[0]["output"] = "0" * 16
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = json.loads(file.read_text())
    content["records"]["sha256"] = hashlib.sha256(records.read_bytes()).hexdigest()
    file.write_text(json.dumps(content))
    assert main(["check-submission", str(file)]) == 0  # nothing in the records tells
    capsys.readouterr()
    assert again(file, questions, "draft=ngram", "verified_by='Ada <ada@example.org>'") == 2
    said = capsys.readouterr()
    assert "turn 0: other output tokens" in said.out and "1 of 1 results are not in order" in said.err
    assert not list(tmp_path.glob("*.verified.json"))


def test_the_trees_of_a_result_are_made_again_from_its_settings(
    measured: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """From the settings that an evaluation writes, and refused where they are not there or not those of the label."""
    _, _, run = measured
    content = json.loads(submitted(run, tmp_path).read_text())
    assert "tree" not in content  # decoded with chains

    def stated(label: str, settings: dict | None) -> Result:
        one = Result.model_validate(content | {"protocol": content["protocol"] | {"tree": label}, "tree": settings})
        return Result.model_validate(json.loads(json.dumps(dumped(one))))

    shapes = [
        StaticTree([[0], [1], [0, 0]], rule="drawn_children"),
        DynamicTree(16, 3, 5),
        BestFirst(9, None, 4),
        TopW(12, 5),
    ]
    for shape in shapes:
        written = json.loads(json.dumps(tree_settings(shape)))
        assert protocol_of_result(stated(shape.label, written)).tree == tree_of(written)
        assert tree_of(written).label == shape.label and tree_of(written).rule == shape.rule
    written = tree_settings(shapes[2])
    with pytest.raises(ValueError, match="does not hold the settings of its trees"):
        protocol_of_result(stated("best-first-9-d4", None))
    with pytest.raises(ValueError, match="names the trees best-first-8, and its settings give best-first-9-d4"):
        protocol_of_result(stated("best-first-8", written))
    with pytest.raises(ValueError, match="kind"):
        stated("x", written | {"kind": "os.system"})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["check-submission", "files=[a.json,b.json]", "draft=ngram", "target=embedded"], "belongs to one result"),
        (["check-submission", "files=a.json", "draft=ngram"], "decoding again needs both"),
        (["check-submission", "files=a.json", "verified_by='A <a@b.c>'"], "verified by decoding again"),
        (["submit", "a", "b", SIGNED, "place=https://example.org/x"], "address of one file"),
        (["submit", "a", "signed_off_by=Ada"], "who signs, as NAME <ADDRESS>"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_one_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_a_site_replaces_nothing_but_a_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["leaderboard", "results", f"folder={tmp_path}"]) == 2
    assert "holds something that is no leaderboard" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_several_words_are_one_list_whatever_is_in_them() -> None:
    words = named(["a/b c.json", "d'e.json", "force=true"], "files", several=True)
    assert list(composed("check_submission", words[:1]).files) == ["a/b c.json", "d'e.json"]
    assert words[1:] == ["force=true"]
    assert named(["one", "seed=1"], "files", several=True) == ["files=one", "seed=1"]
