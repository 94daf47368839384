"""Speculative decoding of benchmark prompts: records for every prompt and turn, resumable, split exactly over ranks.

Every finished prompt is one line in this rank's part file, synced to disk, so a killed evaluation continues at the next
prompt with any number of ranks. Records and rounds are merged from the parts when all are done.

Axes: K slots.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from specbench.data.answers.chat import prompt_ids
from specbench.data.prompts.benchmarks import TURNS, Prompt
from specbench.decoding.loop import Decoded, Limits, decode, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.decoding.scheduling import FixedLength, Scheduler
from specbench.decoding.tree_loop import tree_decode
from specbench.decoding.tree_scheduling import check_pair
from specbench.decoding.tree_shapes import TreeShape
from specbench.drafts.draft import Proposer
from specbench.evaluation.audit import audit
from specbench.evaluation.recorded_rounds import digest
from specbench.evaluation.teacher_forced import slot_acceptance
from specbench.evaluation.token_classes import token_classes
from specbench.files import json_lines as jsonl
from specbench.files.atomic import json_line, replacing
from specbench.metrics.rounds import DecodingMetrics
from specbench.models.target import Target
from specbench.runs.run_folder import read_lines

THINKING = {None: "default", True: "on", False: "off"}


@dataclass(frozen=True)
class Protocol:
    """How prompts are decoded. It is part of the identity of every result.

    `teacher_forced` adds the teacher-forced acceptance of each text to its record; `audit` adds its largest deviation
    from the greedy text of the target. `tree`: proposals are token trees of this shape; None: chains.
    """

    sampling: Sampling = field(default_factory=Sampling)
    limits: Limits = field(default_factory=Limits)
    scheduler: Scheduler = field(default_factory=FixedLength)
    slots: int | None = None
    turns: str = "all"
    thinking: bool | None = None
    seed: int = 0
    teacher_forced: bool = False
    audit: bool = False
    tree: TreeShape | None = None

    def __post_init__(self) -> None:
        if self.turns not in TURNS:
            raise ValueError(f"turns={self.turns!r}: choose one of {', '.join(TURNS)}")
        if self.audit and not self.sampling.greedy:
            raise ValueError(
                f"audit=true compares greedy texts and temperature={self.sampling.temperature:g} draws them; set "
                "temperature=0"
            )
        if self.tree is not None:
            check_pair(self.scheduler, self.tree.draws)

    def facts(self, dtype: str, block_size: int | None) -> dict[str, Any]:
        """The facts for the record of a run that are needed to compare its numbers with others.

        `block_size`: the slots of the draft, None for plain decoding.
        """
        return {
            "temperature": self.sampling.temperature,
            "top_k": self.sampling.top_k,
            "top_p": self.sampling.top_p,
            "min_p": self.sampling.min_p,
            "max_new_tokens": self.limits.max_new_tokens,
            "stop_token_ids": list(self.limits.stop_token_ids),
            "scheduler": self.scheduler.label,
            "slots": self.slots or block_size,
            **({} if self.tree is None else {"tree": self.tree.label, "rule": self.tree.rule}),
            "accounting": self.limits.accounting,
            "thinking": THINKING[self.thinking],
            "turns": self.turns,
            "dtype": dtype.removeprefix("torch."),
            "batch_size": self.limits.batch_size,
        }


@dataclass(frozen=True)
class Answered:
    """One prompt and turn, decoded: its record (a row of records.parquet) and its rounds (a line of rounds.jsonl)."""

    record: dict[str, Any]
    rounds: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, int]:
        """Benchmark, prompt and turn."""
        return self.record["benchmark"], self.record["prompt_id"], self.record["turn"]


def turn_seed(run_seed: int, prompt_seed: int, turn: int) -> int:
    """The decoding seed of one prompt and turn: a function of these three arguments only."""
    return int(np.random.SeedSequence([run_seed, prompt_seed, turn]).generate_state(1, np.uint64)[0])


def histogram(done: Decoded) -> list[list[int]]:
    """Sorted [proposed, accepted, count] over a request's rounds."""
    counts = Counter((r.proposed, r.accepted) for r in done.rounds)
    return [[proposed, accepted, count] for (proposed, accepted), count in sorted(counts.items())]


def by_rank(done: Decoded) -> list[list[int]]:
    """Sorted [depth, rank, offered, accepted] over a request's rounds with trees: how many of the nodes that were
    reached had a child of this rank at this depth, and how often it was accepted."""
    offered: Counter[tuple[int, int]] = Counter()
    accepted: Counter[tuple[int, int]] = Counter()
    for one in done.rounds:
        offered.update((depth, rank) for depth, width in enumerate(one.widths, 1) for rank in range(width))
        accepted.update(enumerate(one.ranks, 1))
    return [[*place, count, accepted[place]] for place, count in sorted(offered.items())]


def answer(
    target: Target,
    draft: Proposer | None,
    prompts: Sequence[Prompt],
    protocol: Protocol,
    labels: Mapping[str, Any],
    known: Mapping[tuple[str, str, int], Answered] | None = None,
) -> Iterator[Answered]:
    """Decode every turn of `prompts` that is not in `known`; the turns of one prompt follow each other.

    Turn t of all prompts is decoded before turn t+1, so the batch stays full. Errors: ValueError for a prompt with
    turns when the target has no tokenizer.
    """
    known = dict(known or {})
    turn = 0
    active = list(prompts)
    while active:
        pending = [p for p in active if (p.benchmark, p.id, turn) not in known]
        inputs = [_tokens(target, p, turn, known, protocol) for p in pending]
        target.require(inputs, protocol.limits.max_new_tokens, [f"prompt {p.id!r} of {p.benchmark}" for p in pending])
        seeds = [turn_seed(protocol.seed, p.seed, turn) for p in pending]
        if draft is None:
            finished = decode(target, inputs, protocol.sampling, protocol.limits, seeds)
        elif protocol.tree is not None:
            how = protocol.sampling, protocol.limits, protocol.tree, seeds, protocol.slots, protocol.scheduler
            finished = tree_decode(target, draft, inputs, *how)
        else:
            finished = speculative_decode(
                target, draft, inputs, protocol.sampling, protocol.limits, seeds, protocol.scheduler, protocol.slots
            )
        for done in finished:
            answered = _record(pending[done.index], turn, done, protocol, labels, target, inputs[done.index])
            known[answered.key] = answered
            yield answered
        turn += 1
        active = [p for p in active if p.turns is not None and len(p.turns) > turn and protocol.turns == "all"]


def _tokens(target: Target, prompt: Prompt, turn: int, known: Mapping, protocol: Protocol) -> list[int]:
    if prompt.prompt_ids is not None:
        return list(prompt.prompt_ids)
    if target.tokenizer is None:
        raise ValueError(
            f"target {target.name} has no tokenizer and prompt {prompt.id} of {prompt.benchmark} is text; give prompts "
            "with prompt_ids"
        )
    messages, answers = [], []
    for t in range(turn):
        before = known[(prompt.benchmark, prompt.id, t)].rounds["output_ids"]
        text = target.tokenizer.decode(before, skip_special_tokens=True)
        messages += [{"role": "user", "content": prompt.turns[t]}, {"role": "assistant", "content": text}]
        answers.append(before)
    messages.append({"role": "user", "content": prompt.turns[turn]})
    return prompt_ids(target.tokenizer, messages, protocol.thinking, answers or None)


def _record(prompt: Prompt, turn: int, done: Decoded, protocol: Protocol, labels, target: Target, ids) -> Answered:
    where = {"benchmark": prompt.benchmark, "domain": prompt.domain, "prompt_id": prompt.id, "turn": turn}
    record = {
        **labels,
        **where,
        "temperature": protocol.sampling.temperature,
        "scheduler": protocol.scheduler.label,
        "accounting": protocol.limits.accounting,
        "thinking": THINKING[protocol.thinking],
        "prompt_tokens": len(ids),
        "prompt_hash": digest(ids),
        "output_tokens": len(done.output_ids),
        "truncated": done.truncated,
        "rounds": len(done.rounds),
        "committed": sum(r.committed for r in done.rounds),
        "proposed": sum(r.proposed for r in done.rounds),
        "accepted": sum(r.accepted for r in done.rounds),
        "seconds": done.seconds,
        "histogram": histogram(done),
        "by_round": [[r.proposed, r.accepted, r.committed] for r in done.rounds],
    }
    if target.tokenizer is not None:
        record["token_classes"] = token_classes(target.tokenizer, done.output_ids)
    rounds: dict[str, Any] = {
        **where,
        "prompt_ids": done.prompt_ids,
        "output_ids": done.output_ids,
        "proposed": [r.proposed for r in done.rounds],
        "accepted": [r.accepted for r in done.rounds],
        "committed": [r.committed for r in done.rounds],
        "seconds": [r.seconds for r in done.rounds],
        "draft_seconds": [r.draft_seconds for r in done.rounds],
        "verify_seconds": [r.verify_seconds for r in done.rounds],
    }
    if protocol.tree is not None:
        nodes = [r.nodes for r in done.rounds]
        record |= {"tree": protocol.tree.label, "nodes": sum(nodes), "by_rank": by_rank(done)}
        rounds |= {
            "nodes": nodes,
            "ranks": [list(r.ranks) for r in done.rounds],
            "widths": [list(r.widths) for r in done.rounds],
            "joint": [[float(f"{chance:.6g}") for chance in r.joint] for r in done.rounds],
            "places": [list(r.places) for r in done.rounds],
        }
    if done.rounds and done.rounds[0].confidence is not None:
        rounds["confidence"] = [list(r.confidence) for r in done.rounds]
    return Answered(record, rounds)


class Parts:
    """The part files of an evaluation: appended when prompts finish; read back for what any rank finished before."""

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self.file = folder / "parts", folder / "parts" / f"rank-{rank:05d}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        jsonl.repair(self.file)

    def read(self) -> dict[tuple[str, str, int], Answered]:
        """Everything that is finished; an incomplete last line is decoded again."""
        found = {}
        for file in sorted(self.folder.glob("rank-*.jsonl")):
            for line in read_lines(file):
                answered = Answered(line["record"], line["rounds"])
                found[answered.key] = answered
        return found

    def append(self, answered: Answered) -> None:
        """Write one line and sync it."""
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json_line({"record": answered.record, "rounds": answered.rounds}))
            stream.flush()
            os.fsync(stream.fileno())


class DraftEvaluation(L.LightningModule):
    """test_step decodes this rank's share of one benchmark; metrics are summed over ranks.

    `draft=None` decodes plainly: the baseline. `labels` are the record columns run, method, target, suite and seed.
    """

    def __init__(
        self,
        target: Target,
        draft: Proposer | None,
        protocol: Protocol,
        folder: Path,
        labels: Mapping[str, Any],
        progress: Callable[[Answered], None] | None = None,
    ):
        super().__init__()
        # Neither model belongs to this module's parameters: nothing here is trained, saved or wrapped.
        self._models = (target, draft)
        self.protocol, self.folder, self.labels, self.progress = protocol, folder, dict(labels), progress
        self.decoding = DecodingMetrics(draft.block_size if draft is not None else 1)
        self.known: dict[tuple[str, str, int], Answered] = {}

    def on_test_start(self) -> None:
        self.parts = Parts(self.folder, self.global_rank)
        self.known = self.parts.read()

    def test_step(self, prompts: list[Prompt], index: int) -> None:
        target, draft = self._models
        wanted = {(p.benchmark, p.id) for p in prompts}
        before = {k: v for k, v in self.known.items() if k[:2] in wanted}
        for answered in before.values():
            self._count(answered)
        group: list[Answered] = []
        for answered in answer(target, draft, prompts, self.protocol, self.labels, before):
            group.append(answered)
            # The audit decodes as many requests at once as the evaluation does.
            if not self.protocol.audit or len(group) == self.protocol.limits.batch_size:
                self._settle(group)
                group = []
        self._settle(group)

    def _settle(self, group: list[Answered]) -> None:
        """Do the additional computations of the protocol for finished texts, then write and count them."""
        (target, draft), protocol = self._models, self.protocol
        if draft is not None and protocol.teacher_forced:
            for answered in group:
                ids = [answered.rounds[key] for key in ("prompt_ids", "output_ids")]
                slots = protocol.slots or draft.block_size
                found = slot_acceptance(target, draft, *ids, protocol.sampling, slots)
                answered.record["teacher_forced"] = found.sums()
        if draft is not None and protocol.audit and group:
            texts = [[answered.rounds[key] for answered in group] for key in ("prompt_ids", "output_ids")]
            for answered, found in zip(group, audit(target, *texts, protocol.limits), strict=True):
                answered.record["audit"] = [] if found is None else found.row()
        for answered in group:
            self.parts.append(answered)
            self._count(answered)

    def _count(self, answered: Answered) -> None:
        record = answered.record
        self.decoding.update(record["histogram"], record["committed"], record.get("nodes"))
        if self.progress is not None:
            self.progress(answered)

    def on_test_epoch_end(self) -> None:
        if self._models[1] is not None:
            values = self.decoding.compute()
            self.log_dict({f"test/{k}": v for k, v in values.items()})
        # The first rank merges all parts next, so every rank must have written its own.
        self.trainer.strategy.barrier()


def merged(folder: Path) -> list[Answered]:
    """All parts of an evaluation in a fixed order: benchmark, prompt, turn."""
    answered = [item for _, item in sorted(Parts(folder).read().items())]
    for item in answered:  # what an earlier version decoded before it was interrupted has no hash yet
        item.record.setdefault("prompt_hash", digest(item.rounds["prompt_ids"]))
    return answered


def write_rounds(path: Path, answered: Sequence[Answered]) -> None:
    """Write rounds.jsonl, one line per prompt and turn, by an atomic rename."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        stream.writelines(json_line(item.rounds) for item in answered)
