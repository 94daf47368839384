"""Codecs that store hidden states as integers of few bits, in groups of channels.

Axes: T tokens, C taps, D hidden size, G groups of a token.

Every channel is first divided by its own scale, its median magnitude over a sample, so an outlier channel does not
determine the step size of its neighbours (real models have such channels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from specbench.data.cache.codecs.interface import (
    Codec,
    chosen_taps,
    finite,
    known_scales,
    magnitudes,
    taps_first,
    taps_last,
)

OCTAVE = 16  # steps of a group are stored as 1/16 octaves below the largest step of their token, in one byte
ZERO = 17  # zero points are stored in 1/17 of a step, so that 0..15 fill a byte


@dataclass(frozen=True)
class Grouped(Codec):
    """Integers of `bits` bits in groups of `group` channels, after dividing each channel by its own scale.

    A group has one byte for its step size, logarithmic below the token's largest step (rounded up, so nothing is
    clipped), and one byte for its zero point if it is asymmetric. If the group does not divide the hidden size, values
    are padded.
    """

    name: str
    bits: int
    group: int
    asymmetric: bool = False
    channels: Float[Tensor, "*C D"] | None = None
    tolerance: float = 0.05
    learns: bool = True

    @property
    def scales(self) -> Tensor | None:
        return self.channels

    def with_scales(self, scales: Tensor | None) -> Codec:
        return replace(self, channels=scales)

    def fitted(self, sample: Float[Tensor, "T *C D"]) -> Codec:
        return replace(self, channels=magnitudes(finite(sample.float())).cpu())

    def encode(self, states: Float[Tensor, "T *C D"]) -> dict[str, Tensor]:
        channels = self.channels
        if channels is None:
            channels = magnitudes(finite(states.float()))
        channels = channels.to(states.device)
        values = finite(taps_first(states).float() / _per_token(channels))
        group = self._group(values.shape[-1])
        values = F.pad(values, (0, -values.shape[-1] % group)).unflatten(-1, (-1, group))
        levels = 2**self.bits - 1
        if self.asymmetric:
            low, high = values.amin(-1).clamp_max(0), values.amax(-1).clamp_min(0)
            step, code, unit = _steps((high - low) / levels)
            zero = (-low / step * ZERO).round().clamp(0, 255)
            codes = values / step[..., None] + (zero / ZERO)[..., None]
        else:
            middle = levels // 2
            step, code, unit = _steps(values.abs().amax(-1) / middle)
            codes = (values / step[..., None]).round_().clamp_(-middle, middle) + middle
        codes = codes.round_().clamp_(0, levels).to(torch.uint8).flatten(-2)
        stored = {"codes": _fold(codes, self.bits), "steps": code, "units": unit}
        if self.asymmetric:
            stored["zeros"] = zero.to(torch.uint8)
        if self.channels is None:
            stored["channels"] = channels
        return {name: tensor.contiguous() for name, tensor in stored.items()}

    def decode(
        self, stored: dict[str, Tensor], dtype: torch.dtype | None = None, taps: Sequence[int] | None = None
    ) -> Float[Tensor, "T *C D"]:
        channels = chosen_taps(known_scales(self, stored), taps, dims=2).to(stored["codes"].device)
        codes = _unfold(chosen_taps(stored["codes"], taps, dims=3), self.bits).float()
        codes = codes.unflatten(-1, (-1, self._group(channels.shape[-1])))
        table = torch.exp2(-torch.arange(256, dtype=torch.float32) / OCTAVE).to(codes.device)
        step = table[chosen_taps(stored["steps"], taps, dims=3).long()]
        step *= chosen_taps(stored["units"], taps, dims=2).float().unsqueeze(-1)
        if self.asymmetric:
            codes -= (chosen_taps(stored["zeros"], taps, dims=3).float() / ZERO)[..., None]
        else:
            codes -= (2**self.bits - 1) // 2
        values = codes.mul_(step[..., None]).flatten(-2)[..., : channels.shape[-1]]
        return taps_last(values * _per_token(channels)).to(dtype or self.dtype)

    def bytes_per_value(self, hidden_size: int) -> float:
        group = self._group(hidden_size)
        groups = -(-hidden_size // group)
        codes = groups * group * self.bits / 8
        return (codes + groups * (1 + self.asymmetric) + 2) / hidden_size

    def _group(self, hidden_size: int) -> int:
        """Channels of a group. A smaller hidden size is one group, rounded up to a multiple of four for the packing."""
        return min(self.group, -(-hidden_size // 4) * 4)


def _per_token(channels: Tensor) -> Tensor:
    return channels.unsqueeze(-2)


def _steps(wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step sizes (..., G) as they will be decoded, not smaller than wanted; their bytes; the token's unit in bf16."""
    # Half a bf16 digit more than the maximum, so that rounding to bf16 cannot put the unit below it.
    unit = (wanted.amax(-1) * (1 + 2.0**-8)).to(torch.bfloat16)
    whole = unit.float().unsqueeze(-1).clamp_min(torch.finfo(torch.float32).tiny)
    octaves = torch.log2(whole / wanted.clamp_min(torch.finfo(torch.float32).tiny))
    code = (octaves * OCTAVE).floor().clamp(0, 255)
    return torch.exp2(-code / OCTAVE) * whole, code.to(torch.uint8), unit


def _fold(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of `bits` bits along the last axis: two halves into nibbles, or four quarters into three bytes."""
    if bits == 8:
        return codes
    if bits == 4:
        low, high = codes.chunk(2, -1)
        return low | high << 4
    first, second, third, last = codes.chunk(4, -1)
    parts = [value | (last >> 2 * n & 3) << 6 for n, value in enumerate((first, second, third))]
    return torch.cat(parts, -1)


def _unfold(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    if bits == 4:
        return torch.cat([packed & 15, packed >> 4], -1)
    parts = packed.chunk(3, -1)
    last = parts[0] >> 6 | parts[1] >> 6 << 2 | parts[2] >> 6 << 4
    return torch.cat([*(part & 63 for part in parts), last], -1)
