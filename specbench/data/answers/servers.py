"""A pool of OpenAI-compatible servers (vLLM, SGLang, llama.cpp). No request is lost, and no answer is requested twice.

429                      the server gets no request for as long as it says; the request goes to another server
5xx, connection closed,  the request is tried again on any free server, after a waiting time that grows and has a
timeout, refused         random part
refused, closed, timeout the server is removed from the pool (also after `TOLERATED` 5xx in succession) and returns
                         when a health check of /models succeeds
400, 413, 422            the request can never succeed: Refused, which the caller records as a failure
401, 403, 404            no request can succeed: ValueError, the run stops
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai

from specbench.data.answers import llama_server
from specbench.files.atomic import is_unicode
from specbench.files.redaction import learn, learn_key, redact
from specbench.ranges import Count, Seconds

TOLERATED = 3


class Refused(ValueError):
    """The servers will not answer this request; the message is the cause."""


class NoCompletions(Exception):
    """The servers take no completion of token ids."""


@dataclass(frozen=True)
class Reply:
    """One answer. `tokens`: its exact ids where the server returned them."""

    text: str
    tokens: list[int] | None
    truncated: bool


@dataclass
class _Server:
    url: str
    client: openai.AsyncOpenAI
    llama: bool = False  # llama.cpp's own server, which has other names of the settings
    in_flight: int = 0
    alive: bool = True
    failures: int = 0
    rests_until: float = 0.0
    probe: asyncio.Task | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Patience:
    """Waiting times of a pool in seconds, and the number of attempts.

    request: one request, from sending to the last byte. attempts: attempts of one request before it fails. backoff,
    longest: first and longest pause between attempts. probe: pause between health checks of a removed server. outage:
    time without any working server after which the run stops.
    """

    request: Seconds = 600.0
    attempts: Count = 8
    backoff: Seconds = 0.5
    longest: Seconds = 30.0
    probe: Seconds = 2.0
    outage: Seconds = 300.0


class ServerPool:
    """Use as `async with ServerPool(urls, model) as pool: reply = await pool.chat(messages, seed, ...)`."""

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        *,
        concurrency: int = 64,
        patience: Patience = Patience(),
        api_key: str = "none",
    ) -> None:
        if not urls:
            raise ValueError("servers=[] names no server: give base URLs such as servers=[http://localhost:8000/v1]")
        learn_key(api_key)
        learn(list(urls))
        self.urls, self.model, self.concurrency, self.patience = list(urls), model, concurrency, patience
        self.retries = 0
        self.outages = 0
        self.takes_ids = True  # until a server refuses a completion of token ids
        self._api_key = api_key
        self._jitter = random.Random()
        self._servers: list[_Server] = []

    async def __aenter__(self) -> ServerPool:
        """Connect; ValueError if no server answers or none of them serves the model."""
        self._changed = asyncio.Condition()
        self._alone_since: float | None = None
        self._servers = [
            _Server(url, openai.AsyncOpenAI(base_url=url, api_key=self._api_key, max_retries=0)) for url in self.urls
        ]
        try:
            seen = await asyncio.gather(*(self._probe(s) for s in self._servers))
            served = sorted({name for names in seen if names for name in names})
            if all(names is None for names in seen):
                raise ValueError(f"no server answers at {_shown(self.urls)}: start one, or correct servers=[...]")
            if served and self.model not in served:
                raise ValueError(f"model={self.model!r} is not served; the servers have {', '.join(served)}")
            for server, names in zip(self._servers, seen, strict=True):
                if names is None:
                    self._bury(server)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        probes = [s.probe for s in self._servers if s.probe is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        await asyncio.gather(*(s.client.close() for s in self._servers), return_exceptions=True)

    async def chat(self, messages: Sequence[Mapping[str, str]], **body: Any) -> Reply:
        """The answer to `messages`, after at most `patience.attempts` attempts."""
        given = [dict(m) for m in messages]
        return await self._asked(lambda client, **more: client.chat.completions.create(messages=given, **more), body)

    async def complete(self, prompt: Sequence[int], **body: Any) -> Reply:
        """The continuation of token ids. Errors: NoCompletions if a server has no such interface (404, 405, or a
        refusal of this request, which a chat of the same text may pass)."""
        ids = list(prompt)
        try:
            return await self._asked(lambda client, **more: client.completions.create(prompt=ids, **more), body)
        except (Refused, _Misconfigured) as error:
            status = getattr(error.__cause__, "status_code", None)
            if status not in (400, 404, 405, 422):
                raise
            self.takes_ids = status == 400
            raise NoCompletions from error

    async def _asked(self, request: Callable[..., Any], body: Mapping[str, Any]) -> Reply:
        """The reply to a request on one server after the other."""
        cause = ""
        for attempt in range(self.patience.attempts):
            if attempt:
                self.retries += 1
                pause = min(self.patience.backoff * 2 ** (attempt - 1), self.patience.longest)
                await asyncio.sleep(pause * self._jitter.uniform(0.5, 1.0))
            server = await self._acquire()
            try:
                sent = _translated(server, body)
                async with asyncio.timeout(self.patience.request):
                    completion = await request(server.client, model=self.model, timeout=self.patience.request, **sent)
                reply = _reply(completion)
                _require_applied(server, sent, completion)
                server.failures = 0
                return reply
            except openai.APIStatusError as error:
                cause = self._judge(server, error)
            except (openai.APIConnectionError, TimeoutError) as error:
                cause = f"{redact(server.url)}: {_cause(error)}"
                self._bury(server)
            except (openai.OpenAIError, _Unreadable, ValueError) as error:
                if isinstance(error, (Refused, _Misconfigured)):
                    raise
                cause = f"{redact(server.url)}: unreadable reply ({_cause(error)})"
            finally:
                await self._release(server)
        raise Refused(f"given up after {self.patience.attempts} tries; the last one: {cause}")

    def _judge(self, server: _Server, error: openai.APIStatusError) -> str:
        """Handle an error status: pause, remove the server, refuse the request or stop the run."""
        status = error.status_code
        cause = f"{redact(server.url)}: HTTP {status} {_cause(error)}"
        if status in (401, 403, 404):
            raise _Misconfigured(f"{cause}: correct servers=[...], the served model's name or the API key") from error
        if status == 429:
            after = error.response.headers.get("retry-after", "")
            rest = float(after) if after.replace(".", "", 1).isdigit() else self.patience.backoff
            server.rests_until = time.monotonic() + min(rest, self.patience.longest)
        elif status >= 500 or status in (408, 409):
            server.failures += 1
            if server.failures >= TOLERATED:
                self._bury(server)
        else:
            raise Refused(cause) from error
        return cause

    async def _acquire(self) -> _Server:
        """The available server with the fewest requests; waits until there is one."""
        while True:
            now = time.monotonic()
            alive = [s for s in self._servers if s.alive]
            free = [s for s in alive if s.in_flight < self.concurrency and s.rests_until <= now]
            if free:
                server = min(free, key=lambda s: s.in_flight)
                server.in_flight += 1
                return server
            if alive:
                self._alone_since = None
            else:
                self._alone_since = self._alone_since or now
                if now - self._alone_since > self.patience.outage:
                    raise _Misconfigured(
                        f"no server has answered for {self.patience.outage:g} s ({_shown(self.urls)}): restart one "
                        "and run the same command again; what was answered is kept"
                    )
            rests = [s.rests_until - now for s in alive if s.rests_until > now]
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), max(0.01, min([0.5, self.patience.probe, *rests])))
                except TimeoutError:
                    continue

    async def _release(self, server: _Server) -> None:
        server.in_flight -= 1
        async with self._changed:
            self._changed.notify()

    def _bury(self, server: _Server) -> None:
        """Remove a server from the pool and check its health until it answers again."""
        if server.alive:
            server.alive = False
            self.outages += 1
            server.probe = asyncio.create_task(self._until_alive(server))

    async def _until_alive(self, server: _Server) -> None:
        while await self._probe(server) is None:
            await asyncio.sleep(self.patience.probe * self._jitter.uniform(0.5, 1.0))
        server.failures, server.alive = 0, True
        async with self._changed:
            self._changed.notify_all()

    async def _probe(self, server: _Server) -> list[str] | None:
        """Names of the models that a server has; None if it does not answer, [] if it has no such list."""
        limit = min(self.patience.request, 10.0)
        try:
            async with asyncio.timeout(limit):
                models = [model async for model in server.client.models.list(timeout=limit)]
            server.llama = any(getattr(model, "owned_by", None) == llama_server.OWNER for model in models)
            return [model.id for model in models]
        except openai.APIStatusError as error:
            return [] if error.status_code in (404, 405) else None
        except (openai.OpenAIError, TimeoutError, ValueError, AttributeError, TypeError):
            return None


class _Unreadable(Exception):
    """A reply of status 200 that is not a chat completion."""


class _Misconfigured(ValueError):
    """A configuration error: no request can succeed."""


def _translated(server: _Server, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The request in the server's own names. Errors: _Misconfigured for settings that it does not have."""
    if not server.llama:
        return body
    try:
        return llama_server.translated(body)
    except ValueError as error:
        raise _Misconfigured(f"{redact(server.url)}: {error}") from error


def _require_applied(server: _Server, sent: Mapping[str, Any], completion: Any) -> None:
    """Errors: _Misconfigured if the server says that it decoded with other settings than those that were sent."""
    if server.llama and (found := llama_server.differences(sent, completion.model_extra or {})):
        raise _Misconfigured(
            f"{redact(server.url)} decodes with {', '.join(found)}, which was not asked for: start it without these "
            "settings, so that the answers have the law that is recorded"
        )


def _reply(completion: Any) -> Reply:
    choices = getattr(completion, "choices", None)
    if not choices:
        raise _Unreadable("no choices")
    choice = choices[0]
    if choice.finish_reason not in ("stop", "length", "eos_token"):
        raise _Unreadable(f"finish_reason {choice.finish_reason!r}")
    message = getattr(choice, "message", None)
    extra = (None if message is None else message.model_extra) or {}
    if extra.get("reasoning_content") or extra.get("reasoning"):
        raise Refused("the server splits the thinking off the answer: start it without a reasoning parser")
    text = choice.text if message is None else message.content
    if not text:
        raise Refused("an empty answer")
    if not is_unicode(text):
        raise Refused("an answer with a lone surrogate, which is no Unicode text")
    tokens = (choice.model_extra or {}).get("token_ids") or llama_server.tokens_of(completion.model_extra or {}) or None
    if tokens is not None and not (isinstance(tokens, list) and set(map(type, tokens)) == {int} and min(tokens) >= 0):
        raise Refused("token_ids that are not whole numbers from 0: configure the server to return none, or repair it")
    return Reply(text, tokens, choice.finish_reason == "length")


def _shown(urls: Sequence[str]) -> str:
    return ", ".join(map(redact, urls))


def _cause(error: BaseException) -> str:
    # Redact before truncating, because half a key would not be recognised.
    return redact(" ".join((str(error) or type(error).__name__).split()))[:200]
