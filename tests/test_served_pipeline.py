"""Questions in the published format, through two OpenAI-compatible servers, to a trained draft that decodes."""

import json
import shutil

import pandas as pd
import pytest

from experiments.quickstart import stage
from specbench.cli.assembly import composed, load_target
from specbench.data.answers import generation as answers
from tests.data.target_server import TargetServer

BENCHMARKS = ("gsm8k", "math500", "aime25", "humaneval", "mbpp", "livecodebench", "mt-bench", "alpaca", "arena-hard-v2")
TRAINED = 40


def question(name, n):
    if name == "mt-bench":
        return [f"What is {n} + {n + 4}?", "Now double it."]
    return [f"{name}: what is {n} + {n + 4}? Please reason step by step."]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run of every stage, and what the servers said."""
    root = tmp_path_factory.mktemp("served")
    (root / "suite").mkdir()
    for name in BENCHMARKS:
        lines = [json.dumps({"turns": question(name, n)}) + "\n" for n in range(100, 103)]
        (root / "suite" / f"{name}.jsonl").write_text("".join(lines))
    asked = [{"turns": question("mt-bench" if n % 4 == 0 else "arithmetic", n)} for n in range(11, 11 + TRAINED)]
    asked.append({"turns": question("gsm8k", 101)})  # an evaluation prompt: it must not be trained on
    (root / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    common = [f"root={root}", "data=jsonl", "data.name=mine", "data.source.columns.prompt=turns"]
    source = [f"data.source.paths=[{root / 'asked.jsonl'}]", f"prompts={root / 'suite'}", "decontaminate=quick"]
    stage("prompts", [*common, *source, "near_duplicate=null", "ngram=null", "validation=0.2"])
    target = load_target(composed("answers", []).target, "cpu")
    with TargetServer(target, "embedded") as one, TargetServer(target, "embedded") as two:
        servers = ["model=embedded", f"servers=[{one.url},{two.url}]", "concurrency=2", "sampling.temperature=0.0"]
        for split in ("train", "validation"):
            stage("answers", [*common, *servers, f"split={split}", "max_new_tokens=24"])
        said = one.said, two.said
    return root, common, said


def test_the_servers_share_the_work_and_say_what_the_target_says_in_process(made, tmp_path):
    root, common, said = made
    assert all(said)
    report = json.loads((root / "prompts" / "mine" / "report.json").read_text())
    assert sum(report["kept"].values()) == TRAINED and 0 < report["kept"]["validation"] < TRAINED / 2
    there = list(answers.read(root / "answers" / "mine" / "embedded"))
    assert len(there) == report["kept"]["train"] and all(r["answer_tokens"] for r in there)
    shutil.copytree(root / "prompts", tmp_path / "prompts")
    own = [f"root={tmp_path}", *common[1:]]
    stage("answers", [*own, "sampling.temperature=0.0", "max_new_tokens=24"])
    here = {r["id"]: r for r in answers.read(tmp_path / "answers" / "mine" / "embedded")}
    assert sorted(here) == sorted(r["id"] for r in there)
    for row in there:  # a second turn is another text for the server, which reads its own answer back
        assert row["answer_tokens"][0] == here[row["id"]]["answer_tokens"][0]


def test_their_answers_become_a_cache_a_draft_and_a_table_of_nine_benchmarks(made):
    root, common, _ = made
    stage("cache", common)
    train = ["trainer=smoke", "tracking=disabled", "trainer.max_steps=3", "trainer.data.validation_fraction=0.2"]
    draft = stage("train", [*common, *train, "method=dflash", "evaluate=false"])
    decode = ["suite=quick", "suite.limit=2", f"prompts={root / 'suite'}", "tracking=disabled", "max_new_tokens=12"]
    rounds = stage("evaluate", [f"root={root}", f"draft={draft}", *decode])
    plain = stage("evaluate", [f"root={root}", "draft=plain", *decode])
    records = pd.read_parquet(rounds / "records.parquet")
    assert sorted(set(records["benchmark"])) == sorted(BENCHMARKS)
    assert len(records) == 2 * (len(BENCHMARKS) + 1)  # two prompts each, those of MT-Bench with two turns
    texts = [
        {(r["benchmark"], r["prompt_id"], r["turn"]): r["output_ids"] for r in map(json.loads, file.open())}
        for file in (rounds / "rounds.jsonl", plain / "rounds.jsonl")
    ]
    assert texts[0] == texts[1]
