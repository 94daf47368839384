"""Answers from a server that speaks as llama.cpp's does: other names, ids in another place, settings echoed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from specbench.data.answers import generation as answers
from specbench.data.answers.engines import AnswerPolicy, ServerEngine
from tests.data.chat_server import ChatServer
from tests.data.dialogues import POLICY, QUICK, prompts, rows
from tests.data.tokenizers_small import THINKING, tokenizer

WAIT = replace(QUICK, request=30.0)  # no request is repeated on a busy machine
# The command line's settings, which hold wherever a request is silent.
DEFAULTS = {
    "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "dynatemp_range": 0.0, "mirostat": 2, "logit_bias": [], "grammar": "", "stop": [],
    "ignore_eos": False, "samplers": ["penalties", "dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
}  # fmt: skip


class LlamaServer(ChatServer):
    """Applies the fields of a request that it knows; `forced` are applied whatever is asked for."""

    def __init__(self, forced: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.forced = forced or {}

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model, "owned_by": "llamacpp"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return self._as_llama(await request.json(), await super()._chat(request))

    async def _complete(self, request: web.Request) -> web.Response:
        return self._as_llama(await request.json(), await super()._complete(request))

    def _as_llama(self, body: dict, reply: web.Response) -> web.Response:
        content = json.loads(reply.body)
        ids = content["choices"][0].pop("token_ids", None)
        ids = ids or [*content["choices"][0]["message"]["content"].encode(), 7]
        if body.get("verbose"):
            applied = DEFAULTS | {key: body[key] for key in DEFAULTS if key in body} | self.forced
            # Numbers are kept in 32 bits there.
            applied["top_p"] = float(f"{applied['top_p']:.7f}") + 1e-8
            content["__verbose"] = {"generation_settings": applied} | (
                {"tokens": ids} if body.get("return_tokens") else {}
            )
        return web.json_response(content)


def test_settings_go_under_its_names_and_ids_come_back(tmp_path: Path) -> None:
    policy = AnswerPolicy("tiny", thinking=False, temperature=0.6, top_p=0.9, top_k=0, max_new_tokens=32)
    with LlamaServer() as server:
        server.completes = lambda ids: f"{len(ids)} ids"
        asker = ServerEngine([server.url], "tiny", concurrency=2, patience=WAIT, tokenizer=tokenizer(THINKING))
        counts = answers.collect(prompts(3, turns=2), asker, tmp_path, policy)
    assert (counts["answered"], counts["retokenised"]) == (3, 0)
    assert (len(server.bodies), len(server.completions)) == (3, 3)
    assert all(ids[-1] == 7 for row in rows(tmp_path) for ids in row["answer_tokens"])
    for body in server.bodies + server.completions:
        # It ignores repetition_penalty in silence, and refuses a top_k below 0.
        assert "repetition_penalty" not in body and body["top_k"] == 0
        # Temperature first, as in decoding.sampling.warp; samplers that are not listed do not run.
        assert body["samplers"] == ["temperature", "top_k", "top_p", "min_p"]
        assert (body["mirostat"], body["dynatemp_range"], body["temperature"]) == (0, 0.0, 0.6)


@pytest.mark.parametrize(
    ("forced", "said"),
    [
        ({"mirostat": 2}, "mirostat=2"),
        ({"logit_bias": [{"token": 5, "bias": -1.0}]}, "logit_bias="),
        ({"min_p": 0.05}, "min_p=0.05"),
    ],
)
def test_a_server_that_decodes_otherwise_stops_the_run(forced: dict, said: str, tmp_path: Path) -> None:
    with LlamaServer(forced) as server, pytest.raises(ValueError, match=f"decodes with {said}.* not asked for"):
        answers.collect(prompts(1), ServerEngine([server.url], "tiny", patience=WAIT), tmp_path, POLICY)


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.1}, {"presence_penalty": 0.5}])
def test_penalties_have_another_law_there(penalty: dict, tmp_path: Path) -> None:
    (name,) = penalty
    with LlamaServer() as server, pytest.raises(ValueError, match=f"{name}={penalty[name]}: llama.cpp counts"):
        answers.collect(
            prompts(1), ServerEngine([server.url], "tiny", patience=WAIT), tmp_path, replace(POLICY, **penalty)
        )
    assert not server.bodies
