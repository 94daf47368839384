"""A real target behind the OpenAI dialect, with the ids of its tokens: what vLLM and SGLang are to the product."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiohttp import web

from specbench.data.answers.chat import prompt_ids
from specbench.decoding.loop import Limits, decode
from specbench.decoding.sampling import Sampling
from specbench.models.target import Target
from tests.data.chat_server import ChatServer


class TargetServer(ChatServer):
    """Answers each chat request with what the target says to it; one request at a time, seeded by the request."""

    def __init__(self, target: Target, model: str):
        super().__init__()
        self.target, self.model = target, model

    async def _act(self, request: web.Request, body: dict, fault: object) -> web.StreamResponse:
        thinking = body.get("chat_template_kwargs", {}).get("enable_thinking")
        ids = prompt_ids(self.target.tokenizer, body["messages"], thinking)
        answer = await asyncio.to_thread(self._generate, ids, body)
        stopped = answer[-1] in self.target.stop_token_ids
        text = self.target.tokenizer.decode(answer, skip_special_tokens=True)
        self.said[text] += 1
        choice = {"index": 0, "finish_reason": "stop" if stopped else "length", "token_ids": answer}
        choice["message"] = {"role": "assistant", "content": text}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": self.model, "choices": [choice]}
        return web.json_response(reply)

    def _generate(self, ids: Sequence[int], body: dict) -> list[int]:
        sampling = Sampling(body["temperature"], top_p=body.get("top_p", 1.0), top_k=max(body.get("top_k", 0), 0))
        limits = Limits(body["max_tokens"], self.target.stop_token_ids)
        (done,) = decode(self.target, [ids], sampling, limits, [body["seed"]])
        return done.output_ids
