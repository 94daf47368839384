"""The target answers prompts in this process: the conversations that a draft learns from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specbench.data.answers import generation
from specbench.data.answers.chat import closing_tokens
from specbench.data.answers.engines import AnswerPolicy, InProcessEngine
from specbench.data.answers.kept_states import KeptStates
from specbench.data.answers.templates import date_of, template_hash
from specbench.decoding.loop import Limits, decode
from specbench.decoding.sampling import Sampling
from specbench.files import json_lines
from specbench.models.target import Target
from specbench.ranges import Number


def engine_of(
    target: Target,
    max_new_tokens: int,
    batch_size: int = 16,
    token_budget: int | None = None,
    chunk: int = 512,
    kept: KeptStates | None = None,
    thinking: bool | None = None,
) -> InProcessEngine:
    """The target as an engine of answers.

    Args:
        target: the target.
        max_new_tokens: of one answer; a prompt that leaves no room for them fails alone.
        batch_size: requests that are decoded at once.
        token_budget: at most so many prompt and new tokens among them; None: no limit.
        chunk: conversations that are held at once.
        kept: where the states of every conversation are written, for a cache; None: they are not kept.
        thinking: passed to the chat template, which decides what follows an answer; only used with `kept`.
    """

    def generate(
        asked: Sequence[list[int]],
        sampling: Sampling,
        most: int,
        stop_token_ids: Sequence[int],
        seeds: Sequence[int],
    ) -> Iterator[tuple]:
        limits = Limits(most, tuple(stop_token_ids), batch_size, token_budget)
        # Prompts of similar length run together: every request holds as many entries as the longest beside it.
        order = sorted(range(len(asked)), key=lambda place: -len(asked[place]))
        ordered = [asked[i] for i in order], sampling, limits, [seeds[i] for i in order]
        for done in decode(target, *ordered, None if kept is None else closing):
            states = () if kept is None else (done.kept(),)
            yield order[done.index], done.output_ids, done.truncated, *states

    def require(prompt: Sequence[int]) -> None:
        target.require([prompt], max_new_tokens + len(closing), ["the prompt"])

    closing: list[int] = []
    if kept is not None:
        kept.begin()
        if target.stop_token_ids:
            closing = closing_tokens(target.tokenizer, thinking, target.stop_token_ids[0])
    keep = None if kept is None else kept.keep
    return InProcessEngine(generate, target.tokenizer, target.stop_token_ids, chunk, require, keep, closing)


def answer(
    target: Target,
    prompts: str | Path | Sequence[str | Sequence[str]],
    folder: str | Path,
    *,
    temperature: Number = 0.7,
    top_p: Number = 0.8,
    top_k: int = 20,
    min_p: Number = 0.0,
    max_new_tokens: int = 2048,
    seed: int = 0,
    thinking: bool | None = None,
    batch_size: int = 16,
    token_budget: int | None = None,
    keep_states: bool = False,
) -> Path:
    """Let the target answer prompts, as `specbench answers` does: the same settings give the same answers.

    What `folder` has already is not answered again. `TargetCache.build` and `OnlineTarget` take the file.

    Args:
        target: the target; it needs a tokenizer.
        prompts: a file of JSON lines with `id` and `messages`, such as the train.jsonl of `specbench prompts`; or a
            list of texts or of lists of user turns, which are numbered.
        folder: where answers.jsonl, failed.jsonl and header.json are written.
        temperature: of sampling; 0: greedy.
        top_p: of sampling; 1: off.
        top_k: of sampling; 0: off.
        min_p: of sampling; 0: off.
        max_new_tokens: of one answer.
        seed: every prompt and turn has its own seed, derived from it.
        thinking: passed to the chat template; None leaves it to the template.
        batch_size: requests that are decoded at once.
        token_budget: at most so many prompt and new tokens among them; None: no limit.
        keep_states: write the target's states beside the answers, for a cache.

    Returns:
        The path of answers.jsonl.

    Raises:
        ValueError: for a folder with answers of other settings, a target without a tokenizer, and where no prompt
            could be answered.
    """
    if target.tokenizer is None:
        raise ValueError(f"target {target.name} has no tokenizer: answers need one with a chat template")
    id, revision = target.source or (target.name, None)
    policy = AnswerPolicy(
        id,
        revision or target.weights_hash,
        template_hash(target.tokenizer),
        thinking,
        temperature,
        top_p,
        top_k,
        min_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        date=date_of(target.tokenizer),
    )
    kept = KeptStates(folder, target) if keep_states else None
    engine = engine_of(target, max_new_tokens, batch_size, token_budget, kept=kept, thinking=thinking)
    counts = generation.collect(_conversations(prompts), engine, folder, policy)
    file = generation.answers_file(folder)
    if not counts["answered"] + counts["kept"]:
        raise ValueError(f"no prompt was answered; {Path(folder) / 'failed.jsonl'} has the causes")
    return file


def _conversations(prompts: str | Path | Sequence[str | Sequence[str]]) -> Iterator[dict[str, Any]]:
    if isinstance(prompts, (str, Path)):
        yield from (row for _, row in json_lines.conversations(prompts))
        return
    if not len(prompts):
        raise ValueError("prompts=[] holds no prompt: give texts, lists of user turns, or a file of JSON lines")
    for number, one in enumerate(prompts):
        turns = [one] if isinstance(one, str) else list(one)
        messages = [{"role": "user", "content": turn} for turn in turns]
        yield {"id": f"prompt-{number}", "messages": messages, "source": "own"}
