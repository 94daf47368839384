"""Cost of each codec: bytes, time, and the change of the target's distribution if `last` is encoded and decoded.

Axes: T tokens, C taps, D hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from specbench.data.cache.codecs.codecs import NAMES, codec


@dataclass(frozen=True)
class CodecQuality:
    """`ratio` of the bf16 bytes; GB/s of bf16 bytes on this machine; error of the taps, relative, channels normalised;
    `divergence` KL(exact || decoded) in nats, total `variation` and `first` choice agreement of the next token."""

    codec: str
    ratio: float
    encode: float
    decode: float
    error: float
    divergence: float
    variation: float
    first: float


def measure(
    taps: Float[Tensor, "T C D"],
    last: Float[Tensor, "T D"],
    logits: Callable[[Tensor], Tensor],
    names: Sequence[str] = NAMES,
    sample: int = 2048,
) -> list[CodecQuality]:
    """Every codec on states of a target. Scales are fitted on the first `sample` tokens, as a cache's are."""
    exact = logits(last).float().log_softmax(-1)
    scale = taps[:sample].float().abs().median(0).values.clamp_min(1e-6)
    rows = []
    for name in names:
        for_taps, for_last = codec(name).fitted(taps[:sample]), codec(name).fitted(last[:sample])
        started = time.perf_counter()
        stored = for_taps.encode(taps)
        encoded = time.perf_counter()
        for_taps.decode(stored).contiguous()
        decoded = time.perf_counter()
        states = for_taps.decode(stored, torch.float32)
        gigabytes = taps.numel() * 2 / 1e9
        ours = logits(for_last.decode(for_last.encode(last), torch.float32)).float().log_softmax(-1)
        rows.append(
            CodecQuality(
                codec=name,
                ratio=sum(value.numel() * value.itemsize for value in stored.values()) / taps.numel() / 2,
                encode=gigabytes / (encoded - started),
                decode=gigabytes / (decoded - encoded),
                error=float(((states - taps) / scale).norm() / (taps / scale).norm()),
                divergence=float((exact.exp() * (exact - ours)).sum(-1).mean()),
                variation=float((exact.exp() - ours.exp()).abs().sum(-1).mean() / 2),
                first=float((exact.argmax(-1) == ours.argmax(-1)).float().mean()),
            )
        )
    return rows
