"""A draft in a running engine beside the same draft here: the same prompts, the engine's counters before and after.

vLLM counts, since it started, the verifications of proposals, the proposed tokens, the accepted tokens, and the
accepted tokens at each position of a proposal (vllm:spec_decode_num_{drafts,draft_tokens,accepted_tokens,
accepted_tokens_per_pos}_total, Prometheus text at /metrics; vLLM 0.32.0 v1/spec_decode/metrics.py). Accepted length is
1 + accepted / verifications, the bonus token included.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from specbench.data.answers.engines import AnswerPolicy
from specbench.data.answers.servers import NoCompletions, Patience, Refused, ServerPool
from specbench.files.redaction import redact

NAMES = {
    "vllm:spec_decode_num_drafts_total": "verifications",
    "vllm:spec_decode_num_draft_tokens_total": "proposed",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted",
}
POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
LINE = re.compile(r"([\w:]+)(?:\{(.*)\})?\s+(\S+)(?:\s+\S+)?")


@dataclass(frozen=True)
class EngineCounters:
    """Sums over rounds. by_position[k]: how often at least k + 1 tokens of a proposal were accepted."""

    verifications: int
    proposed: int
    accepted: int
    by_position: tuple[int, ...]

    @property
    def accepted_length(self) -> float:
        """Tokens a verification, the bonus token included; NaN without any."""
        return 1 + self.accepted / self.verifications if self.verifications else float("nan")

    def since(self, before: EngineCounters) -> EngineCounters:
        """The counts between two readings."""
        width = max(len(self.by_position), len(before.by_position))
        now, then = (one.by_position + (0,) * (width - len(one.by_position)) for one in (self, before))
        return EngineCounters(
            self.verifications - before.verifications,
            self.proposed - before.proposed,
            self.accepted - before.accepted,
            tuple(a - b for a, b in zip(now, then, strict=True)),
        )


def parsed(text: str) -> EngineCounters:
    """The counters in a page of metrics, summed over engines. Errors: ValueError for a page without them."""
    sums, positions = dict.fromkeys(NAMES.values(), 0), {}
    found = set()
    for line in text.splitlines():
        match = LINE.fullmatch(line.strip())
        if match is None or line.startswith("#"):
            continue
        name, labels, value = match.groups()
        if name in NAMES:
            found.add(name)
            sums[NAMES[name]] += int(float(value))
        elif name == POSITION and (place := re.search(r'position="(\d+)"', labels or "")):
            k = int(place.group(1))
            positions[k] = positions.get(k, 0) + int(float(value))
    if missing := sorted(set(NAMES) - found):
        raise ValueError(
            f"its metrics have no {', '.join(missing)}: start vLLM with --speculative-config and without "
            "--disable-log-stats (other engines do not count accepted tokens by position)"
        )
    return EngineCounters(**sums, by_position=tuple(positions.get(k, 0) for k in range(max(positions, default=-1) + 1)))


def of_rounds(lines: Iterable[Mapping[str, Any]]) -> EngineCounters:
    """The same counts from the lines of rounds.jsonl."""
    proposed = [count for line in lines for count in zip(line["proposed"], line["accepted"], strict=True)]
    longest = max((p for p, _ in proposed), default=0)
    return EngineCounters(
        len(proposed),
        sum(p for p, _ in proposed),
        sum(a for _, a in proposed),
        tuple(sum(a > k for _, a in proposed) for k in range(longest)),
    )


def root_of(engine: str) -> str:
    """The address of a server without its /v1."""
    return engine.rstrip("/").removesuffix("/v1")


def read_counters(engine: str) -> EngineCounters:
    """The counters of a running engine. Errors: ValueError naming the address."""
    address = f"{root_of(engine)}/metrics"
    try:
        with urlopen(address, timeout=30) as page:
            return parsed(page.read().decode())
    except (URLError, OSError, ValueError) as error:
        raise ValueError(f"engine={redact(engine)}: {redact(address)}: {error}") from error


@dataclass(frozen=True)
class EngineComparison:
    """Counts here and in the engine over the same prompts. `equal` of `texts` answers have the same token ids."""

    here: EngineCounters
    there: EngineCounters
    texts: int
    equal: int

    def record(self) -> dict[str, Any]:
        """The content of engine.json."""
        sides = {"here": self.here, "engine": self.there}
        rows = {
            name: {**vars(one), "by_position": list(one.by_position), "accepted_length": one.accepted_length}
            for name, one in sides.items()
        }
        return {"schema": "specbench.engine/1", "texts": self.texts, "equal_texts": self.equal, **rows}

    def table(self, greedy: bool = True) -> list[str]:
        """Both side by side, and what differs."""
        here, there = self.here, self.there
        rows = [("", "here", "engine")]
        rows += [(name, str(getattr(here, name)), str(getattr(there, name))) for name in NAMES.values()]
        rows.append(("accepted length", f"{here.accepted_length:.4f}", f"{there.accepted_length:.4f}"))
        for k in range(max(len(here.by_position), len(there.by_position))):
            counts = [one.by_position[k] if k < len(one.by_position) else 0 for one in (here, there)]
            rows.append((f"accepted at position {k + 1}", *map(str, counts)))
        lines = [f"{name:<24}{left:>10}{right:>10}" for name, left, right in rows]
        if greedy:
            lines.append(f"equal texts: {self.equal} of {self.texts}")
        return lines + self.differences(greedy)

    def differences(self, greedy: bool) -> list[str]:
        """What differs, each with its likely cause."""
        found = []
        if greedy and self.equal < self.texts:
            found.append(
                f"{self.texts - self.equal} texts differ: another dtype, kernel or prompt in the engine; their rounds "
                "cannot be compared one by one"
            )
        if self.here.verifications != self.there.verifications and (self.equal == self.texts or not greedy):
            found.append(
                "the numbers of verifications differ: other requests ran on the engine, or it proposes otherwise"
            )
        if self.here.accepted != self.there.accepted and not found:
            if greedy and 0 < self.there.accepted - self.here.accepted <= self.there.proposed - self.here.proposed:
                # Equal texts in as many verifications hold equal numbers of accepted tokens.
                found.append("the engine also counts accepted tokens behind the limit of new tokens, which no text has")
            else:
                found.append("other tokens were accepted in as many verifications: the draft computes something else")
        if self.here.proposed != self.there.proposed:
            found.append(
                "proposed tokens differ where the last round of a text is cut here to the tokens still allowed"
            )
        return found


def compare(
    engine: str, lines: Sequence[Mapping[str, Any]], policy: AnswerPolicy, stops: Sequence[int], concurrency: int = 8
) -> EngineComparison:
    """Send the prompts of rounds.jsonl to a running engine and set its counters beside ours.

    `policy` has the sampling and the limit with which `lines` were decoded (its `model` is the name under which the
    engine serves the target), `stops` the tokens that end a text. Errors: ValueError for an engine that does not
    answer, has no counters, or takes no token ids.
    """
    before = read_counters(engine)
    replies = asyncio.run(_asked(engine, lines, policy, stops, concurrency))
    equal = sum(reply == list(line["output_ids"]) for reply, line in zip(replies, lines, strict=True))
    return EngineComparison(of_rounds(lines), read_counters(engine).since(before), len(lines), equal)


async def _asked(
    engine: str, lines: Sequence[Mapping[str, Any]], policy: AnswerPolicy, stops: Sequence[int], concurrency: int
) -> list[list[int] | None]:
    pool = ServerPool([f"{root_of(engine)}/v1"], policy.model, concurrency=concurrency, patience=Patience(outage=30.0))

    async def one(line: Mapping[str, Any]) -> list[int] | None:
        body = policy.sampling(policy.seed_of(str(line["prompt_id"]), line["turn"]))
        body["extra_body"] |= {"stop_token_ids": list(stops), "skip_special_tokens": False}
        return (await pool.complete(line["prompt_ids"], **body)).tokens

    async with pool:
        try:
            return list(await asyncio.gather(*map(one, lines)))
        except (NoCompletions, Refused) as error:
            cause = error.__cause__ if isinstance(error, NoCompletions) else error
            raise ValueError(f"engine={redact(engine)} does not complete token ids: {cause}") from error
