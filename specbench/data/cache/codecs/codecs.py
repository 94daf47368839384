"""Codecs of hidden states: each converts states to a few tensors that can be stored, and back.

Axes: T tokens, C taps, D hidden size. States are (T, C, D) or (T, D). Stored tensors lead with the tap, (C, T, ...), so
that reading some taps of many touches only theirs.

    fp32             unchanged; for tests of exactness on tiny targets
    bf16             exact for bf16 states
    bf16-lossless    bf16 as two byte planes: the exponents compressed with zstd, sign and mantissa as they are
    int8             channel-normalised, symmetric groups of 64
    int6             the same with 6 bits
    fp8              e4m3, one scale per token
    int4             channel-normalised, asymmetric groups of 64
    int4-wide        the same in groups of 128

Channel-normalised: every channel is divided by its median magnitude over a first sample of states before it is
grouped, so an outlier channel does not determine the step size of its neighbours. `fitted` computes these scales once
for a cache; without it `encode` computes them from the given states and stores them with the states.
docs/data.md gives sizes, errors and the command that measures them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import zstandard
from jaxtyping import Float
from torch import Tensor

from specbench.data.cache.codecs.grouped import Grouped
from specbench.data.cache.codecs.interface import (
    Codec,
    Room,
    chosen_taps,
    finite,
    known_scales,
    magnitudes,
    taps_first,
    taps_last,
)


@dataclass(frozen=True)
class Raw(Codec):
    """The values themselves in `dtype`."""

    name: str
    dtype: torch.dtype

    def encode(self, states: Float[Tensor, "T *C D"]) -> dict[str, Tensor]:
        return {"values": finite(taps_first(states).to(self.dtype)).contiguous()}

    def decode(
        self,
        stored: dict[str, Tensor],
        dtype: torch.dtype | None = None,
        taps: Sequence[int] | None = None,
        room: Room = torch.empty,
    ) -> Float[Tensor, "T *C D"]:
        return taps_last(chosen_taps(stored["values"], taps)).to(dtype or self.dtype)

    def bytes_per_value(self, hidden_size: int) -> float:
        return float(self.dtype.itemsize)


@dataclass(frozen=True)
class Lossless(Codec):
    """bf16 without loss. The exponents of a channel are similar and can be compressed; mantissas cannot.

    Exponents are stored relative to that of their channel's scale. zstd searches for almost no repeated sequences, so
    only its entropy coder works: for such bytes this is both smaller and faster. `bytes_per_value` assumes `ratio` of
    the bf16 bytes; the plan of a cache measures the ratio on states of the run.
    """

    name: str = "bf16-lossless"
    ratio: float = 0.67
    channels: Float[Tensor, "*C D"] | None = None
    learns: bool = True

    @property
    def scales(self) -> Tensor | None:
        return self.channels

    def with_scales(self, scales: Tensor | None) -> Codec:
        return replace(self, channels=scales)

    def fitted(self, sample: Float[Tensor, "T *C D"]) -> Codec:
        return replace(self, channels=magnitudes(finite(sample.float())).cpu())

    def encode(self, states: Float[Tensor, "T *C D"]) -> dict[str, Tensor]:
        channels = magnitudes(finite(states.float())).cpu() if self.channels is None else self.channels
        values = finite(taps_first(states).to(torch.bfloat16)).contiguous().cpu()
        planes = _turned(values).view(np.uint8).reshape(*values.shape, 2)
        residuals = planes[..., 1] - _exponents(channels)
        rows = residuals.reshape(1 if values.dim() == 2 else len(values), -1)
        settings = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)
        press = zstandard.ZstdCompressor(compression_params=settings)
        frames = [np.frombuffer(press.compress(np.ascontiguousarray(row)), np.uint8) for row in rows]
        stored = {
            "mantissas": torch.from_numpy(np.ascontiguousarray(planes[..., 0])),
            "exponents": torch.from_numpy(np.concatenate(frames)),
            "frames": torch.tensor([len(frame) for frame in frames], dtype=torch.int64),
        }
        return stored if self.channels is not None else stored | {"channels": channels}

    def decode(
        self,
        stored: dict[str, Tensor],
        dtype: torch.dtype | None = None,
        taps: Sequence[int] | None = None,
        room: Room = torch.empty,
    ) -> Float[Tensor, "T *C D"]:
        base = _exponents(chosen_taps(known_scales(self, stored), taps, dims=2))
        ends = stored["frames"].cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        mantissas = chosen_taps(stored["mantissas"], taps).numpy()
        chosen = range(len(ends)) if taps is None or mantissas.ndim == 2 else taps
        planes = np.empty((*mantissas.shape, 2), np.uint8)
        planes[..., 0] = mantissas
        packed = stored["exponents"].numpy()
        expand = zstandard.ZstdDecompressor()
        for row, tap in zip(planes[None] if mantissas.ndim == 2 else planes, chosen, strict=True):
            frame = expand.decompress(packed[starts[tap] : ends[tap]], max_output_size=row[..., 1].size)
            row[..., 1] = np.frombuffer(frame, np.uint8).reshape(row.shape[:-1])
        planes[..., 1] += base
        turned = planes.view(np.uint16)[..., 0]
        values = torch.from_numpy(((turned >> 1) | (turned << 15)).view(np.int16)).view(torch.bfloat16)
        return taps_last(values).to(dtype or self.dtype)

    def bytes_per_value(self, hidden_size: int) -> float:
        return 2 * self.ratio


@dataclass(frozen=True)
class Float8(Codec):
    """e4m3 with one fp32 scale per token (and tap): the largest magnitude maps to 448, the format's own."""

    name: str = "fp8"
    tolerance: float = 0.2

    def encode(self, states: Float[Tensor, "T *C D"]) -> dict[str, Tensor]:
        values = finite(taps_first(states).float())
        scales = values.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        codes = (values / scales.clamp_min(torch.finfo(torch.float32).tiny)).to(torch.float8_e4m3fn)
        return {"codes": codes.contiguous(), "scales": scales.squeeze(-1).contiguous()}

    def decode(
        self,
        stored: dict[str, Tensor],
        dtype: torch.dtype | None = None,
        taps: Sequence[int] | None = None,
        room: Room = torch.empty,
    ) -> Float[Tensor, "T *C D"]:
        codes = chosen_taps(stored["codes"], taps, dims=3).float()
        scales = chosen_taps(stored["scales"], taps, dims=2)
        return taps_last(codes.mul_(scales.unsqueeze(-1))).to(dtype or self.dtype)

    def bytes_per_value(self, hidden_size: int) -> float:
        return 1 + 4 / hidden_size


def _turned(values: Tensor) -> np.ndarray:
    """bf16 bits rotated by one: the eight exponent bits in the high byte, mantissa and sign in the low byte."""
    bits = values.view(torch.int16).numpy().view(np.uint16)
    return (bits << 1) | (bits >> 15)


def _exponents(channels: Tensor) -> np.ndarray:
    """The exponent byte of each channel's scale, in a shape that broadcasts to (.., T, D)."""
    return (_turned(channels.to(torch.bfloat16).contiguous().cpu()) >> 8).astype(np.uint8)[..., None, :]


_CODECS = {
    codec.name: codec
    for codec in (
        Raw("fp32", torch.float32),
        Raw("bf16", torch.bfloat16),
        Lossless(),
        Float8(),
        Grouped("int8", 8, 64),
        Grouped("int6", 6, 64, tolerance=0.2),
        Grouped("int4", 4, 64, asymmetric=True, tolerance=0.5),
        Grouped("int4-wide", 4, 128, asymmetric=True, tolerance=0.5),
    )
}
NAMES = tuple(_CODECS)


def codec(name: str) -> Codec:
    """The codec of that name, not yet fitted."""
    if name not in _CODECS:
        raise ValueError(f"codec {name!r} does not exist: choose one of {', '.join(NAMES)}")
    return _CODECS[name]
