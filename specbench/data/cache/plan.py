"""Plan of a cache before it is built: bytes by part and codec, hours from a timed sample, free disk space.

Axes: T tokens, C taps, D hidden size.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specbench.data.cache.shard_plan import lay_out
from specbench.data.cache.shards import BLOCK, EncodedConversation, members
from specbench.data.cache.storage import PRESETS, Storage, kept_rows, storage
from specbench.data.cache.target_states import states_of
from specbench.data.cache.writing import NoRoom

HEADERS = 2 * 4 * BLOCK  # of a sample: tar header and padding of four members, and their own headers
SAMPLE_TOKENS = 8192
# A plan ends its sample after this time, and takes batches so small that the first one is about as long.
SAMPLE_SECONDS, SAMPLE_BATCH = 3.0, 1024


def in_units(size: float | int) -> str:
    """Bytes with a unit, for example 1.23 GB (powers of 1000)."""
    unit = "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, bigger
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"


@dataclass(frozen=True)
class CachePlan:
    """Sizes in bytes. `parts`: of one token, by part; `totals`: of the cache, by codec; `hours`: of one rank."""

    folder: Path
    conversations: int
    tokens: int
    supervised: int
    parts: dict[str, float]
    totals: dict[str, int]
    chosen: str
    total: int
    present: int
    free: int
    hours: float | None
    timed_tokens: int

    @property
    def fits(self) -> bool:
        """Whether the missing part of the cache fits on the disk."""
        return self.total - self.present <= self.free

    def text(self) -> str:
        """The plan as the command line prints it."""
        per_token = ", ".join(f"{part} {size:,.0f}" for part, size in self.parts.items())
        lines = [
            f"cache      {self.folder}",
            f"input      {self.conversations:,} conversations, {self.tokens:,} tokens, {self.supervised:,} supervised",
            f"a token    {sum(self.parts.values()):,.0f} bytes ({per_token}) as {self.chosen}",
            "all codecs " + ", ".join(f"{name} {in_units(size)}" for name, size in self.totals.items()),
            f"this cache {in_units(self.total)}, {in_units(self.present)} of it there already",
            f"free disk  {in_units(self.free)}: " + ("it fits" if self.fits else "IT DOES NOT FIT"),
        ]
        if self.hours is not None:
            lines.insert(-1, f"time       {self.hours:,.2f} h a rank, from {self.timed_tokens:,} tokens timed here")
        return "\n".join(lines)

    def require_room(self) -> None:
        """Raise NoRoom if the cache does not fit; the message names the codecs that would fit."""
        if not self.fits:
            smaller = [name for name, size in self.totals.items() if size - self.present <= self.free]
            remedy = f"choose codec={' or '.join(smaller)}" if smaller else "no codec fits"
            raise NoRoom(
                f"the cache takes {in_units(self.total - self.present)} more as {self.chosen} and {self.folder} "
                f"has {in_units(self.free)} free: {remedy}, or make room"
            )


def plan(
    conversations: Sequence[EncodedConversation],
    folder: str | Path,
    wanted: Storage,
    hidden_size: int,
    taps: int,
    target: Any = None,
    world: int = 1,
    batch_tokens: int = 8192,
    sample_tokens: int = SAMPLE_TOKENS,
) -> CachePlan:
    """Size, time and disk space of a cache. With a `target`, sizes and seconds are measured on a sample.

    Without a target, sizes come from `bytes_per_value` (for bf16-lossless an assumed ratio) and `hours` is None.
    """
    lengths = np.array([len(one.tokens) for one in conversations], np.int64)
    if not len(lengths):
        raise ValueError("there is no conversation to plan a cache for: the answers stage has to run first")
    masks = [torch.as_tensor(one.loss_mask, dtype=torch.bool) for one in conversations]
    kept = float(sum(int(kept_rows(mask).sum()) for mask in masks) / lengths.sum())
    tokens, headers = int(lengths.sum()), HEADERS / lengths.mean()

    def by_part(one: Storage) -> dict[str, float]:
        return one.bytes_per_token(hidden_size, taps, kept) | {"headers": float(headers)}

    parts, hours, timed = by_part(wanted), None, 0
    if target is not None:
        parts, seconds, timed = _measure(target, conversations, lengths, wanted, batch_tokens, sample_tokens)
        hours = seconds / timed * tokens / world / 3600
    place = Path(folder).absolute()
    present = sum(path.stat().st_size for path in place.glob("shard-*.tar")) if place.exists() else 0
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    return CachePlan(
        folder=Path(folder),
        conversations=len(lengths),
        tokens=tokens,
        supervised=sum(int(mask.sum()) for mask in masks),
        parts=parts,
        totals={name: round(sum(by_part(storage(name)).values()) * tokens) for name in PRESETS},
        chosen=_name(wanted),
        total=round(sum(parts.values()) * tokens),
        present=present,
        free=shutil.disk_usage(existing).free,
        hours=hours,
        timed_tokens=timed,
    )


def _name(wanted: Storage) -> str:
    facts = wanted.facts()
    for name, pair in PRESETS.items():
        if pair == (facts["taps"], facts["last"]) and facts["last_rows"] == "all":
            return name
    return f"{facts['taps']} taps, {facts['last']} last ({facts['last_rows']} rows)"


def _measure(
    target: Any,
    conversations: Sequence[EncodedConversation],
    lengths: np.ndarray,
    wanted: Storage,
    batch_tokens: int,
    sample_tokens: int,
) -> tuple[dict[str, float], float, int]:
    """Bytes per token by part, seconds and tokens of a sample of batches, after one conversation to warm up.

    Batches hold conversations of similar length, so the sample begins with one in the middle of all and then takes
    others from everywhere.
    """
    batches = [batch for shard in lay_out(lengths, min(batch_tokens, SAMPLE_BATCH), 1).shards for batch in shard]
    order = np.random.default_rng(0).permutation(len(batches))
    batches = [batches[len(batches) // 2], *(batches[i] for i in order if i != len(batches) // 2)]
    sizes = dict.fromkeys(("tokens", "taps", "last", "headers"), 0)
    seconds, tokens = 0.0, 0
    first = states_of(target, [conversations[int(lengths.argmin())]])
    wanted = wanted.fitted(first.taps[0].cpu(), first.last[0].cpu())
    for batch in batches:
        chosen = [conversations[ordinal] for ordinal in batch]
        start = time.perf_counter()
        context = states_of(target, chosen)
        for at, one in enumerate(chosen):
            length = len(one.tokens)
            sample = members(at, one, context.taps[at, :length], context.last[at, :length], wanted)
            for part in ("tokens", "taps", "last"):
                sizes[part] += len(sample[f"{part}.safetensors"])
            sizes["headers"] += len(sample["json"]) + sum(BLOCK + -len(member) % BLOCK for member in sample.values())
            tokens += length
        seconds += time.perf_counter() - start
        if tokens >= sample_tokens or seconds >= SAMPLE_SECONDS:
            break
    return {part: size / tokens for part, size in sizes.items()}, seconds, tokens
