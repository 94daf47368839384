"""The stages `prompts` and `answers` on a tiny target: their files, their skips, and what a user reads."""

import json

import pytest
from omegaconf import OmegaConf

import specbench as sb
from experiments import answers as answers_stage
from experiments import prompts as prompts_stage
from specbench.data.answers import generation as answers
from specbench.models import target as targets
from tests.data.chat_server import ChatServer
from tests.data.tokenizers_small import tokenizer

QUESTIONS = [f"please tell me about topic number {i} and what follows from it in case {i * i}" for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target of random weights with a tokenizer, as a folder."""
    tok = tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "qwen3", "vocab_size": len(tok), "num_key_value_heads": 1, "head_dim": 8, **sizes}
    model = targets.new_causal_lm(config)
    stop = tok.convert_tokens_to_ids("<|im_end|>")
    model.config.eos_token_id = model.generation_config.eos_token_id = stop
    path = tmp_path_factory.mktemp("target")
    targets.save(model, tok, path)
    return path


def config(verb, root, **changes):
    cfg = OmegaConf.load(f"configs/{verb}.yaml")
    del cfg["defaults"]
    cfg.data = OmegaConf.load("configs/data/jsonl.yaml")
    cfg.data.name = "mine"
    cfg.root = str(root)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


def prompts(root, **changes):
    source = root / "questions.jsonl"
    if not source.exists():
        source.write_text("".join(json.dumps({"turns": [q]}) + "\n" for q in QUESTIONS))
    settings = {"data__source__paths": [str(source)], "data__source__columns__prompt": "turns", "decontaminate": None}
    prompts_stage.run(config("prompts", root, **{**settings, "validation": 0.0, **changes}))
    return root / "prompts" / "mine"


def asked(root, folder, **changes):
    facts = {"id": str(folder), "name": "tiny", "revision": None, "dtype": "float32", "device": "cpu"}
    target = OmegaConf.create({**facts, "target_layer_ids": [0], "stop_token_ids": None})
    settings = {"max_new_tokens": 4, "device": "cpu", "batch_size": 4}
    cfg = config("answers", root, **{**settings, **changes})
    cfg.target = target
    answers_stage.run(cfg)
    return root / "answers" / "mine" / "tiny"


def test_prompts_to_answers_in_process_and_again(tmp_path, folder, capsys):
    made = prompts(tmp_path)
    report = json.loads((made / "report.json").read_text())
    assert report["kept"] == {"train": 8, "validation": 0}
    prompts(tmp_path)
    assert "finished before, skipped" in capsys.readouterr().err
    out = asked(tmp_path, folder, count=5)
    first = list(answers.read(out))
    assert len(first) == 5 and all(1 <= len(r["answer_tokens"][0]) <= 4 for r in first)
    again = asked(tmp_path, folder)
    assert list(answers.read(again))[:5] == first
    assert sorted(r["messages"][0]["content"] for r in answers.read(again)) == sorted(QUESTIONS)
    asked(tmp_path, folder)
    assert "finished before, skipped" in capsys.readouterr().err


def test_batch_size_does_not_change_the_answers(tmp_path, folder):
    prompts(tmp_path)
    key = lambda r: r["id"]  # noqa: E731
    rows = sorted(answers.read(asked(tmp_path, folder)), key=key)
    alone = sorted(answers.read(asked(tmp_path, folder, force=True, batch_size=1, chunk=3)), key=key)
    assert rows == alone


def test_a_script_gets_the_same_answers(tmp_path, folder):
    made = prompts(tmp_path)
    theirs = {row["id"]: row for row in answers.read(asked(tmp_path, folder))}
    target = targets.Target.load(str(folder), [0])
    settings = {"max_new_tokens": 4, "batch_size": 3}
    file = sb.answer(target, made / "train.jsonl", tmp_path / "own", **settings)
    assert {row["id"]: row for row in answers.read(file)} == theirs and len(theirs) == 8
    written = file.read_text()
    assert sb.answer(target, made / "train.jsonl", tmp_path / "own", **settings).read_text() == written
    with pytest.raises(ValueError, match=r"temperature: 0\.7 -> 0\.0"):
        sb.answer(target, made / "train.jsonl", tmp_path / "own", temperature=0.0, **settings)
    chats = sb.answer(target, ["one thing", ["two things", "and then?"]], tmp_path / "texts", **settings)
    rows = list(answers.read(chats))
    assert sorted(len(row["messages"]) for row in rows) == [2, 4]
    assert len(sb.OnlineTarget(target, chats).ids) == 2


def test_another_policy_is_refused_until_forced(tmp_path, folder):
    prompts(tmp_path)
    asked(tmp_path, folder, count=2)
    with pytest.raises(ValueError, match=r"sampl|temperature: 0\.7 -> 1\.0"):
        asked(tmp_path, folder, sampling__temperature=1.0)
    assert len(list(answers.read(asked(tmp_path, folder, sampling__temperature=1.0, force=True)))) == 8


def test_preview_shows_the_mask_and_does_not_finish_the_stage(tmp_path, folder, capsys):
    prompts(tmp_path)
    out = asked(tmp_path, folder, preview=2)
    shown = capsys.readouterr().out
    assert shown.count("supervised") == 2 and "please tell me about topic" in shown
    assert len(list(answers.read(out))) == 2
    assert len(list(answers.read(asked(tmp_path, folder)))) == 8


def test_answers_through_a_server(tmp_path, folder):
    prompts(tmp_path)
    with ChatServer() as server:
        out = asked(tmp_path, folder, servers=[server.url], model="tiny")
    rows = list(answers.read(out))
    assert len(rows) == 8 and all(r["messages"][1]["content"].startswith("echo ") for r in rows)
    assert json.loads((out / "header.json").read_text())["engine"] == "servers"


def test_failures_leave_the_stage_open(tmp_path, folder, capsys):
    prompts(tmp_path)
    with ChatServer(
        fault=lambda body, number: 400 if "number 5 " in body["messages"][0]["content"] else None
    ) as server:
        out = asked(tmp_path, folder, servers=[server.url], model="tiny")
        assert "'failed': 1" in capsys.readouterr().err and (out / "failed.jsonl").read_text().count("\n") == 1
        server.fault = lambda body, number: None
        asked(tmp_path, folder, servers=[server.url], model="tiny")
    assert len(list(answers.read(out))) == 8 and (out / "failed.jsonl").read_text() == ""


def test_decontamination_reads_a_folder_of_evaluation_prompts(tmp_path):
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "gsm8k.jsonl").write_text(json.dumps({"turns": [QUESTIONS[3]]}) + "\n")
    made = prompts(tmp_path, decontaminate="paper", prompts=str(evaluation))
    report = json.loads((made / "report.json").read_text())
    assert report["contaminated"] == 1 and report["decontamination"]["removed"]["gsm8k"] == {"exact": 1}


def test_missing_prompts_name_the_command(tmp_path, folder):
    with pytest.raises(ValueError, match="run `specbench prompts data=mine` first"):
        asked(tmp_path, folder)
    with pytest.raises(ValueError, match="split=test"):
        asked(tmp_path, folder, split="test")
