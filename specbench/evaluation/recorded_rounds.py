"""Recorded rounds of real decoding, read back from rounds.jsonl for calibration and for the load simulator.

One line per prompt: prompt_ids, output_ids (generated tokens, the prefill's first one included), and one entry per
round in proposed, accepted, seconds and, from a draft with a confidence head, confidence (acceptance LOGITS of its
slots). Rounds with token trees have joint (the draft's probability of the path to every node, the largest first) and
places (of the accepted nodes in this order, from 0) instead.

Axes: R rounds, K slots, N nodes, D levels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from specbench.runs.run_folder import read_lines


@dataclass(frozen=True)
class PromptRounds:
    """The rounds of one prompt. `logits` is NaN where no confidence was recorded; `tokens`: the tokens they committed.

    `prompt` identifies the conversation: the digest of its first turn's prompt, so that all its turns are in the same
    part of a split. Rounds with trees propose nodes: `proposed` counts them, `joint` has their probabilities (0 beyond)
    and `places` where the accepted ones stand (beyond them: -1).
    """

    prompt: str
    proposed: Int[np.ndarray, " R"]
    accepted: Int[np.ndarray, " R"]
    seconds: Float[np.ndarray, " R"]
    tokens: int
    logits: Float[np.ndarray, "R K"] | None = None
    joint: Float[np.ndarray, "R N"] | None = None
    places: Int[np.ndarray, "R D"] | None = None


@dataclass(frozen=True)
class Rounds:
    """Rounds of many prompts, concatenated; `prompts[r]` is the digest of the prompt of round r."""

    proposed: Int[np.ndarray, " R"]
    accepted: Int[np.ndarray, " R"]
    logits: Float[np.ndarray, "R K"]
    prompts: tuple[str, ...]


def digest(prompt_ids: Sequence[int]) -> str:
    """Identity of a prompt: 16 hexadecimal digits of the SHA-256 of its token ids, the same on every machine."""
    return hashlib.sha256(np.asarray(prompt_ids, dtype="<i8").tobytes()).hexdigest()[:16]


def rounds_file(path: str | Path) -> Path:
    """The file of rounds of a path: the path itself, or rounds.jsonl in a run folder."""
    return Path(path) / "rounds.jsonl" if Path(path).is_dir() else Path(path)


def read_rounds(path: str | Path) -> list[PromptRounds]:
    """Read rounds.jsonl (or the run folder with it). Errors: ValueError for an inconsistent line."""
    path = rounds_file(path)
    if not path.is_file():
        raise ValueError(
            f"there are no recorded rounds at {path}; decode with `specbench evaluate` and name its folder"
        )
    return from_lines(read_lines(path), str(path))


def recorded_rounds(path: str | Path) -> list[PromptRounds]:
    """The same for callers that need rounds. Errors: ValueError for a file without rounds."""
    found = read_rounds(path)
    if not found:
        raise ValueError(
            f"{rounds_file(path)} holds no whole line with rounds; decode with `specbench evaluate` and name its folder"
        )
    return found


def from_lines(lines: Iterable[Mapping[str, Any]], name: str = "rounds") -> list[PromptRounds]:
    """Check and pad the lines of rounds.jsonl; `name` is used in error messages. Only prompts without a round (the
    prefill gave a stop token) are left out."""
    lines = list(lines)
    for number, line in enumerate(lines, start=1):
        _require(line, name, number)
    width = max((len(row) for line in lines for row in line.get("confidence") or ()), default=0)
    prompts = []
    for index, (line, prompt) in enumerate(zip(lines, conversations(lines), strict=True)):
        if "nodes" in line and "joint" not in line:
            raise ValueError(
                f"{name} line {index + 1}: these rounds verified token trees and do not say how probable their nodes "
                "were; evaluate again, or with tree=chain"
            )
        proposed, accepted = (np.asarray(line[key], dtype=np.int64) for key in ("proposed", "accepted"))
        seconds = np.asarray(line["seconds"], dtype=np.float64)
        if not len(proposed) == len(accepted) == len(seconds):
            raise ValueError(f"{name} line {index + 1}: {len(proposed)} proposals, {len(accepted)} acceptances")
        if len(proposed) == 0:
            continue
        if (accepted > proposed).any() or (accepted < 0).any():
            raise ValueError(f"{name} line {index + 1}: a round accepts more than it proposed; the record is damaged")
        tokens, most = len(line["output_ids"]) - 1, int(accepted.sum()) + len(accepted)
        if not most - int(proposed.max()) - 1 <= tokens <= most:
            raise ValueError(
                f"{name} line {index + 1}: output_ids hold {tokens} tokens after the first and the rounds commit "
                f"{most}; output_ids must be the generated tokens without the prompt"
            )
        if "joint" in line:
            prompts.append(_trees(line, index, name, PromptRounds(prompt, proposed, accepted, seconds, tokens), lines))
            continue
        prompts.append(PromptRounds(prompt, proposed, accepted, seconds, tokens, _logits(line, index, name, width)))
    return prompts


def _trees(
    line: Mapping[str, Any], index: int, name: str, own: PromptRounds, lines: Sequence[Mapping[str, Any]]
) -> PromptRounds:
    """The rounds of a line with trees, padded to the largest tree of all `lines`."""
    joint, places = line["joint"], line.get("places")
    whole = isinstance(places, list) and len(joint) == len(places) == len(own.proposed)
    if not whole or any(
        len(at) != accepted or sorted(set(at)) != at or any(not 0 <= place < len(row) for place in at)
        for row, at, accepted in zip(joint, places, own.accepted, strict=True)
    ):
        raise ValueError(
            f"{name} line {index + 1}: `joint` and `places` are not those of {len(own.proposed)} rounds with trees; "
            "record the rounds again"
        )
    widest, deepest = (max((len(row) for one in lines for row in one[key]), default=0) for key in ("joint", "places"))
    chances, standing = np.zeros((len(joint), widest)), np.full((len(joint), deepest), -1)
    for at, (row, found) in enumerate(zip(joint, places, strict=True)):
        chances[at, : len(row)], standing[at, : len(found)] = row, found
    return replace(own, proposed=np.array([len(row) for row in joint]), joint=chances, places=standing)


def conversations(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The identity of each line's conversation: the digest of its first turn's prompt, or of its own if there is
    none."""
    opening = {_conversation(line): digest(line["prompt_ids"]) for line in lines if line.get("turn") == 0}
    return [opening.get(_conversation(line)) or digest(line["prompt_ids"]) for line in lines]


def _require(line: Mapping[str, Any], name: str, number: int) -> None:
    """ValueError for a line with fields of wrong types."""
    kinds = {"prompt_ids": {int}, "output_ids": {int}, "proposed": {int}, "accepted": {int}, "seconds": {int, float}}
    for key, kind in kinds.items():
        value = line.get(key)
        if not isinstance(value, list) or set(map(type, value)) - kind or (value and min(value) < 0):
            raise ValueError(f"{name} line {number}: `{key}` is not a list of numbers from 0; record the rounds again")
        if kind == {int} and value and max(value) >= 2**31:
            raise ValueError(f"{name} line {number}: `{key}` holds a number of 2**31 or more; record the rounds again")
    rows = line.get("confidence") or []
    numbers = isinstance(rows, list) and all(
        isinstance(row, list) and not set(map(type, row)) - {int, float} for row in rows
    )
    if not numbers or (rows and line["proposed"] and len(rows) != len(line["proposed"])):
        raise ValueError(
            f"{name} line {number}: `confidence` is not one list of numbers per round; record the rounds again"
        )


def _conversation(line: Mapping[str, Any]) -> tuple[Any, Any]:
    return line.get("benchmark"), line.get("prompt_id")


def _logits(line: Mapping[str, Any], index: int, name: str, width: int) -> Float[np.ndarray, "R K"] | None:
    rows = line.get("confidence")
    if not rows:
        return None
    logits = np.full((len(rows), width), np.nan)
    for row, values, proposed in zip(logits, rows, line["proposed"], strict=True):
        if len(values) < proposed:
            raise ValueError(f"{name} line {index + 1}: {proposed} slots proposed and {len(values)} confidences")
        row[: len(values)] = values
    return logits


def flatten(prompts: Sequence[PromptRounds]) -> Rounds:
    """All rounds of all prompts as flat arrays. Errors: ValueError for a prompt without confidence, or with trees."""
    if any(p.joint is not None for p in prompts):
        raise ValueError("these rounds verified token trees; a confidence is of the slots of chains: use tree=chain")
    if not prompts or any(p.logits is None for p in prompts):
        raise ValueError("these rounds carry no confidence; decode with a draft that has a confidence head")
    return Rounds(
        proposed=np.concatenate([p.proposed for p in prompts]),
        accepted=np.concatenate([p.accepted for p in prompts]),
        logits=np.concatenate([p.logits for p in prompts]),
        prompts=tuple(p.prompt for p in prompts for _ in p.proposed),
    )


def split(
    prompts: Sequence[PromptRounds], share: float, seed: int = 0
) -> tuple[list[PromptRounds], list[PromptRounds]]:
    """Two disjoint sets of prompts, the first with `share` of the distinct ones; a repeated prompt goes to one side."""
    names = sorted({p.prompt for p in prompts})
    count = round(share * len(names))
    if not 0 < count < len(names):
        raise ValueError(f"share={share} of {len(names)} prompts leaves one side empty; record more prompts")
    first = set(np.random.default_rng(seed).permutation(names)[:count].tolist())
    return [p for p in prompts if p.prompt in first], [p for p in prompts if p.prompt not in first]
