"""A real HTTP server that speaks the OpenAI dialect and misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable

from aiohttp import web

STOP = 7


def answer_to(messages: list[dict]) -> str:
    """What the server says: a function of the whole dialogue, so that a lost or swapped turn shows."""
    return "echo " + " / ".join(m["content"] for m in messages if m["role"] == "user") + f" ({len(messages)})"


class ChatServer:
    """Runs in a thread. `fault(body, number)` returns None, a bad status, "hang", "cut" or "garbage"."""

    def __init__(
        self, port: int = 0, fault: Callable[[dict, int], object] = lambda body, number: None, ids: bool = True
    ):
        self.fault, self.ids, self.port, self.model = fault, ids, port, "tiny"
        self.bodies: list[dict] = []
        # A function of the ids of a prompt; None: the server has no completions.
        self.completes: Callable[[list[int]], str] | None = None
        self.completions: list[dict] = []
        self.said: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.probes = 0
        self.delay = 0.0
        self.finish = "stop"
        self.busy = self.busiest = 0

    def start(self) -> ChatServer:
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    __enter__ = start

    def stop(self) -> None:
        """Like a kill: open connections break, the port is free afterwards."""
        self._loop.call_soon_threadsafe(self._halt.set)
        self._thread.join(10)

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main(ready))
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _main(self, ready: threading.Event) -> None:
        self._halt = asyncio.Event()
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        ready.set()
        await self._halt.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        self.probes += 1
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body)
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        try:
            return await self._act(request, body, self.fault(body, number))
        finally:
            self.busy -= 1

    def page(self) -> str:
        """What /metrics says."""
        return ""

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.page())

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.completes is None:
            raise web.HTTPNotFound
        self.completions.append(body)
        text = self.completes(body["prompt"])
        choice = {"index": 0, "finish_reason": self.finish, "text": text, "token_ids": [*text.encode(), STOP]}
        reply = {"id": "x", "object": "text_completion", "created": 0, "model": self.model, "choices": [choice]}
        return web.json_response(reply)

    async def _act(self, request: web.Request, body: dict, fault: object) -> web.StreamResponse:
        if fault is not None:
            self.faults[str(fault)] += 1
        if fault == "hang":
            await asyncio.sleep(3600)
        await asyncio.sleep(self.delay)
        if isinstance(fault, int):
            headers = {"Retry-After": "0.05"} if fault == 429 else {}
            return web.json_response({"error": {"message": f"injected {fault}"}}, status=fault, headers=headers)
        text = answer_to(body["messages"])
        choice = {
            "index": 0, "finish_reason": self.finish, "message": {"role": "assistant", "content": text},
        }  # fmt: skip
        if self.ids and body.get("return_token_ids"):
            choice["token_ids"] = [*text.encode(), STOP]
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": self.model, "choices": [choice]}
        data = json.dumps(reply).encode()
        if fault == "garbage":
            return web.Response(body=data[: len(data) // 2], content_type="application/json")
        if fault == "cut":
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            response.content_length = len(data)
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            request.transport.abort()
            return response
        self.said[text] += 1
        return web.Response(body=data, content_type="application/json")
