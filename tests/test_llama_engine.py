"""Answers from llama.cpp's own server. Needs it: docs/serving.md says how to get it.

SPECBENCH_LLAMA_PYTHON names the interpreter of an environment with xllamacpp, SPECBENCH_GGUF a GGUF file of a chat
model, and SPECBENCH_GGUF_TARGET the folder that `specbench target path=` made of it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.quickstart import stage
from specbench.cli.assembly import composed
from specbench.data.answers import generation as answers
from specbench.data.answers.chat import encode
from specbench.models.target_files import location

NAMES = ("SPECBENCH_LLAMA_PYTHON", "SPECBENCH_GGUF", "SPECBENCH_GGUF_TARGET")
PYTHON, MODEL, TARGET = (os.environ.get(name) for name in NAMES)
pytestmark = [
    pytest.mark.engine,
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(None in (PYTHON, MODEL, TARGET), reason=f"{', '.join(NAMES)} do not name llama.cpp and a model"),
]
SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), 4096, 2
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
# Another law than is asked for, wherever a request leaves something out.
params.sampling.temp, params.sampling.dry_multiplier, params.sampling.mirostat = 1.9, 5.0, 2
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
ASKED = [
    ["What is 7 times 8?", "And times 10?"],
    ["Name three colours.\n\n1 of them must be red.", "Which is the brightest?"],
    ["Say hello in French."],
]


@pytest.fixture
def address() -> Iterator[str]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [PYTHON, "-c", SERVER, MODEL, str(port)]
    with subprocess.Popen(words, env=clean, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield f"{server.stdout.readline().strip()}/v1"
        server.stdin.close()


def test_answers_come_as_token_ids_and_follow_what_was_asked(address: str, tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in ASKED))
    data = [f"root={tmp_path}", "data=jsonl", "data.name=mine", "data.source.columns.prompt=turns"]
    off = ["decontaminate=null", "near_duplicate=null", "ngram=null", "validation=0"]
    stage("prompts", [*data, f"data.source.paths=[{tmp_path / 'asked.jsonl'}]", *off])
    target = ["target=folder", f"target.id={TARGET}", "target.name=served"]
    asked = [f"servers=[{address}]", f"model={MODEL}", "concurrency=2", "sampling.temperature=0", "max_new_tokens=16"]
    stage("answers", [*data, *target, *asked])
    folder = tmp_path / "answers" / "mine" / "served"
    rows = list(answers.read(folder))
    assert sorted(len(row["truncated"]) for row in rows) == [1, 2, 2]
    assert json.loads((folder / "stage.json").read_text())["summary"]["retokenised"] == 0
    tokenizer = tokenizer_of(composed("answers", target).target)
    for row in rows:
        told = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        for text, ids, cut in zip(told, row["answer_tokens"], row["truncated"], strict=True):
            assert tokenizer.decode(ids if cut else ids[:-1]) == text
        coded = encode(tokenizer, row["messages"], answer_tokens=row["answer_tokens"], cut=row["truncated"])
        supervised = [t for t, on in zip(coded.tokens, coded.loss_mask, strict=True) if on]
        assert supervised == [token for ids in row["answer_tokens"] for token in ids]


def tokenizer_of(target):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(location(target.id))
