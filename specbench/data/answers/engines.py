"""Generation of answers: its settings (AnswerPolicy) and two engines.

ServerEngine sends requests to OpenAI-compatible servers; InProcessEngine calls a function that decodes batches of
prompts. An engine emits every conversation as soon as it is finished, in any order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from specbench.data.answers.chat import prompt_ids
from specbench.data.answers.servers import NoCompletions, Patience, Refused, Reply, ServerPool
from specbench.data.answers.templates import ChatError
from specbench.data.prompts.deduplication import text_hash
from specbench.data.prompts.turns import Conversation
from specbench.decoding.sampling import Sampling

Emit = Callable[[str, dict[str, Any]], None]
States = tuple[Tensor, Tensor]  # taps (T, C, D) and final states (T, D) of the tokens of a text
Generate = Callable[..., Iterator[tuple[int, Sequence[int], bool] | tuple[int, Sequence[int], bool, States]]]
Keep = Callable[[str, Sequence[int], States], None]


@dataclass(frozen=True)
class AnswerPolicy:
    """All settings on which the distribution of an answer depends.

    model, revision, template: target and hash of the chat template. thinking: passed to the template; None does not
    pass it. date: the date with which a template that reads the clock is rendered; None for other templates. top_k 0,
    top_p 1, min_p 0, repetition_penalty 1 and presence_penalty 0 are off. The two penalties differ: the first divides
    the logits of tokens that occurred before, the second subtracts from them.
    """

    model: str
    revision: str | None = None
    template: str | None = None
    thinking: bool | None = None
    temperature: float | int = 0.7
    top_p: float | int = 0.8
    top_k: int = 20
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    presence_penalty: float | int = 0.0
    max_new_tokens: int = 2048
    seed: int = 0
    date: str | None = None

    def seed_of(self, id: str, turn: int) -> int:
        """The seed of a turn (63 bits): it does not depend on order, concurrency or other conversations."""
        return text_hash(f"{self.seed}/{id}/{turn}") >> 1

    def request(self, turn_seed: int, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The settings as fields of a chat completion request. `options` go to the chat template.

        Settings that are off are sent too, because a server fills what is missing from the model's own
        generation_config.json, and the answers would follow another law than their header says.
        """
        given = ({} if self.thinking is None else {"enable_thinking": self.thinking}) | dict(options or {})
        extra = {"chat_template_kwargs": given} if given else {}
        body = self.sampling(turn_seed)
        return body | {"extra_body": body["extra_body"] | extra}

    def sampling(self, turn_seed: int) -> dict[str, Any]:
        """The same without the chat template: fields of a completion request, whose prompt is token ids."""
        extra = {
            "return_token_ids": True,
            "top_k": self.top_k or -1,  # vLLM, SGLang and llama.cpp: off
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": 0.0,
            "max_tokens": self.max_new_tokens,
            "seed": turn_seed & 0x7FFFFFFF,  # servers keep seeds in 32 bits
            "extra_body": extra,
        }


@runtime_checkable
class Engine(Protocol):
    """Answers conversations. Calls emit("answer", row) or emit("failure", row) once for each of them."""

    name: str

    def answer(self, conversations: Iterator[Conversation], policy: AnswerPolicy, emit: Emit) -> None: ...


class _Open:
    """A conversation that is being answered: its questions, and the turns so far."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.questions = [m for m in conversation["messages"] if m["role"] != "assistant"]
        self.messages: list[dict[str, str]] = []
        self.tokens: list[list[int] | None] = []
        self.truncated: list[bool] = []

    def ask(self) -> bool:
        """Append the next question; False if all are answered."""
        while self.questions:
            question = self.questions.pop(0)
            self.messages.append({"role": question["role"], "content": question["content"]})
            if question["role"] == "user":
                return True
        return False

    def hear(self, text: str, tokens: Sequence[int] | None, truncated: bool) -> None:
        """Append the answer to the last question."""
        self.messages.append({"role": "assistant", "content": text})
        self.tokens.append(None if tokens is None else list(tokens))
        self.truncated.append(truncated)

    def close(self, emit: Emit) -> None:
        """Emit the conversation; one without any question is a failure."""
        if self.truncated:
            emit("answer", self.row())
        else:
            emit("failure", self.failure("no question"))

    def row(self) -> dict[str, Any]:
        """The line of answers.jsonl."""
        exact = self.tokens if all(t is not None for t in self.tokens) else None
        kept = {k: self.conversation[k] for k in ("source", "domain") if k in self.conversation}
        own = {"id": self.conversation["id"], "messages": self.messages}
        return own | kept | {"answer_tokens": exact, "truncated": self.truncated}

    def failure(self, cause: BaseException | str) -> dict[str, Any]:
        """The line of failed.jsonl."""
        return {"id": self.conversation["id"], "turn": len(self.truncated), "cause": str(cause)}


class ServerEngine:
    """Sends requests to a pool of OpenAI-compatible servers, `concurrency` conversations at once on each.

    The first turn of a conversation is a chat completion. A later one is a completion of exact token ids, the same that
    training sees, if `tokenizer` is given and the servers return and take ids; as text, a server would tokenise its own
    earlier answers again, to other ids now and then. `counts["retokenised"]` is the number of later turns sent as text.

    options: further variables of the chat template (templates.server_options).
    """

    name = "servers"

    def __init__(
        self,
        servers: Sequence[str],
        model: str,
        concurrency: int = 64,
        patience: Patience | None = None,
        api_key: str = "none",
        options: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._options, self._tokenizer, self._retokenised = options, tokenizer, 0
        self._pool = ServerPool(
            servers, model, concurrency=concurrency, patience=patience or Patience(), api_key=api_key
        )
        self._workers = concurrency * len(servers)

    @property
    def counts(self) -> dict[str, int]:
        """Number of repeated attempts, of removals of a server from the pool, and of later turns sent as text."""
        return {
            "retries": self._pool.retries,
            "outages": self._pool.outages,
            "retokenised": self._retokenised,
        }

    def answer(self, conversations: Iterator[Conversation], policy: AnswerPolicy, emit: Emit) -> None:
        """See Engine."""
        try:
            asyncio.run(self._answer(conversations, policy, emit))
        except BaseExceptionGroup as group:
            raise _first(group) from None

    async def _answer(self, conversations: Iterator[Conversation], policy: AnswerPolicy, emit: Emit) -> None:
        async with self._pool, asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._work(conversations, policy, emit))

    async def _work(self, conversations: Iterator[Conversation], policy: AnswerPolicy, emit: Emit) -> None:
        for conversation in conversations:  # shared: every worker takes the next one when it is free
            state = _Open(conversation)
            try:
                while state.ask():
                    seed = policy.seed_of(conversation["id"], len(state.truncated))
                    reply = await self._ask(state, policy, seed)
                    state.hear(reply.text, reply.tokens, reply.truncated)
            except (Refused, ChatError) as cause:
                emit("failure", state.failure(cause))
            else:
                state.close(emit)

    async def _ask(self, state: _Open, policy: AnswerPolicy, seed: int) -> Reply:
        """The answer to the last question: by exact ids after earlier answers, else by the messages."""
        later = bool(state.tokens)
        if later and self._tokenizer is not None and None not in state.tokens and self._pool.takes_ids:
            prompt = prompt_ids(self._tokenizer, state.messages, policy.thinking, state.tokens)
            try:
                return await self._pool.complete(prompt, **policy.sampling(seed))
            except NoCompletions:
                pass  # said once by the pool, which asks for none from here on
        self._retokenised += later
        return await self._pool.chat(state.messages, **policy.request(seed, self._options))


class InProcessEngine:
    """Calls a function in this process, with one turn of `chunk` conversations at a time.

    generate(prompts, sampling, max_new_tokens, stop_token_ids, seeds) -> iterator of (index, output_ids, truncated),
    in any order; output_ids include the stop token if there was one. require(prompt) raises ValueError for a prompt
    that the target cannot read; only this conversation fails then.

    keep(id, tokens, states) is called for the last answer of every conversation, before the conversation is emitted:
    `generate` then yields as fourth value the states of the prompt, the answer and what may follow it (`closing`, after
    a stop token), and `tokens` are those tokens.
    """

    name = "in process"

    def __init__(
        self,
        generate: Generate,
        tokenizer: Any,
        stop_token_ids: Sequence[int],
        chunk: int = 512,
        require: Callable[[Sequence[int]], None] = lambda prompt: None,
        keep: Keep | None = None,
        closing: Sequence[int] = (),
    ) -> None:
        self._keep, self._closing = keep, list(closing)
        self._generate, self._tokenizer, self._chunk, self._require = generate, tokenizer, chunk, require
        self._stops = list(stop_token_ids)
        self.counts: dict[str, int] = {}

    def answer(self, conversations: Iterator[Conversation], policy: AnswerPolicy, emit: Emit) -> None:
        """See Engine."""
        if policy.repetition_penalty != 1 or policy.presence_penalty != 0:
            raise ValueError(
                f"repetition_penalty={policy.repetition_penalty}, presence_penalty={policy.presence_penalty}: decoding "
                "in process has no penalties; set them to 1 and 0, or use servers=[...]"
            )
        while chunk := [_Open(c) for c in islice(conversations, self._chunk)]:
            while chunk:
                chunk = self._turn([s for s in chunk if self._asked(s, emit)], policy, emit)

    def _asked(self, state: _Open, emit: Emit) -> bool:
        """Append the next question of a conversation, or emit the conversation if it is finished."""
        if state.ask():
            return True
        state.close(emit)
        return False

    def _turn(self, states: list[_Open], policy: AnswerPolicy, emit: Emit) -> list[_Open]:
        """One turn of every conversation; returns those that continue."""
        prompts, asked = [], []
        for state in states:
            try:
                exact = [t for t in state.tokens if t is not None]
                prompt = prompt_ids(self._tokenizer, state.messages, policy.thinking, exact)
                self._require(prompt)
                prompts.append(prompt)
                asked.append(state)
            except ValueError as cause:
                emit("failure", state.failure(cause))
        if not asked:
            return []
        seeds = [policy.seed_of(s.conversation["id"], len(s.truncated)) for s in asked]
        sampling = Sampling(policy.temperature, policy.top_k, policy.top_p, policy.min_p)
        going = []
        for index, output, truncated, *states in self._generate(
            prompts, sampling, policy.max_new_tokens, self._stops, seeds
        ):
            state, output = asked[index], [int(t) for t in output]
            spoken = output[:-1] if output and output[-1] in self._stops else output
            if not spoken:
                emit("failure", state.failure("an empty answer"))
                continue
            state.hear(self._tokenizer.decode(spoken, skip_special_tokens=False), output, bool(truncated))
            if state.questions:
                going.append(state)
                continue
            if self._keep is not None:
                ending = self._closing if output[-1] in self._stops else []
                self._keep(state.conversation["id"], [*prompts[index], *output, *ending], *states)
            state.close(emit)
        return going


def _first(group: BaseExceptionGroup) -> BaseException:
    """The first exception that is not an exception group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
