"""Codecs that store hidden states as integers of few bits, in groups of channels.

Axes: T tokens, C taps, D hidden size, G groups of a token.

Every channel is first divided by its own scale, its median magnitude over a sample, so an outlier channel does not
determine the step size of its neighbours (real models have such channels).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType

import torch
from jaxtyping import Float
from torch import Tensor

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

# On CPU a tile of this many values passes through all operations while it is in the cache of a core.
TILE = 1 << 17
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
        channels, first = channels.to(states.device), taps_first(states)
        group = self._group(first.shape[-1])
        groups = -(-first.shape[-1] // group)
        shape, bytes_of = first.shape[:-1], {"dtype": torch.uint8, "device": first.device}
        stored = {
            "codes": torch.empty(*shape, groups * group * self.bits // 8, **bytes_of),
            "steps": torch.empty(*shape, groups, **bytes_of),
            "units": torch.empty(shape, dtype=torch.bfloat16, device=first.device),
        }
        if self.asymmetric:
            stored["zeros"] = torch.empty(*shape, groups, **bytes_of)
        room = torch.zeros(_height(first), groups, group, device=first.device)
        for tap, rows in _tiles(first):
            self._encode_rows(first[tap][rows], channels[tap], room, {k: v[tap][rows] for k, v in stored.items()})
        return stored if self.channels is not None else stored | {"channels": channels.contiguous()}

    def _encode_rows(
        self, states: Float[Tensor, "r D"], channels: Float[Tensor, " D"], room: Tensor, into: dict[str, Tensor]
    ) -> None:
        """Encode a few tokens of one tap; `room` (r or more, G, group) is scratch whose padding stays zero."""
        values, levels = room[: len(states)], 2**self.bits - 1
        plain = values.flatten(1)[:, : states.shape[-1]]
        torch.div(plain.copy_(states), channels, out=plain)
        low, high = values.amin(-1), values.amax(-1)  # aminmax takes eight times as long on a CPU
        # The extremes of a group are finite exactly if all of its values are.
        finite(torch.stack([low, high]))
        if self.asymmetric:
            low, high = low.clamp_max_(0), high.clamp_min_(0)
            step, code, unit = _steps((high - low) / levels)
            zero = (-low / step * ZERO).round().clamp(0, 255)
            values.div_(step[..., None]).add_((zero / ZERO)[..., None])
            values.round_().clamp_(0, levels)
            into["zeros"].copy_(zero)
        else:
            middle = levels // 2
            step, code, unit = _steps(torch.maximum(high, low.neg_()) / middle)
            values.div_(step[..., None]).round_().clamp_(-middle, middle).add_(middle)
        codes = values.to(torch.int32).to(torch.uint8).flatten(1)  # at once takes three times as long on a CPU
        values.flatten(1)[:, states.shape[-1] :] = 0
        into["codes"].copy_(_fold(codes, self.bits)), into["steps"].copy_(code), into["units"].copy_(unit)

    def decode(
        self,
        stored: dict[str, Tensor],
        dtype: torch.dtype | None = None,
        taps: Sequence[int] | None = None,
        room: Room = torch.empty,
    ) -> Float[Tensor, "T *C D"]:
        channels = chosen_taps(known_scales(self, stored), taps, dims=2).to(stored["codes"].device)
        codes = chosen_taps(stored["codes"], taps, dims=3)
        table = torch.exp2(-torch.arange(256, dtype=torch.float32) / OCTAVE).to(codes.device)
        steps = table[chosen_taps(stored["steps"], taps, dims=3).long()]
        steps *= chosen_taps(stored["units"], taps, dims=2).float().unsqueeze(-1)
        zeros = chosen_taps(stored["zeros"], taps, dims=3).float() / ZERO if self.asymmetric else None
        shape = (*codes.shape[:-1], channels.shape[-1])
        out = room((shape[1], shape[0], shape[2]) if len(shape) == 3 else shape, dtype=dtype or self.dtype)
        out = taps_first(out.to(codes.device))
        width, group = steps.shape[-1] * self._group(shape[-1]), self._group(shape[-1])
        height = _height(out)
        whole = torch.empty(height, width, dtype=torch.uint8, device=codes.device)
        scratch = torch.empty(height, width, device=codes.device)
        for tap, rows in _tiles(out):
            packed = codes[tap][rows]
            values = scratch[: len(packed)].copy_(_unfold(packed, self.bits, whole[: len(packed)]))
            grouped = values.unflatten(-1, (-1, group))
            if zeros is None:
                values -= (2**self.bits - 1) // 2
            else:
                grouped -= zeros[tap][rows][..., None]
            grouped *= steps[tap][rows][..., None]
            values = values[:, : shape[-1]]
            values *= channels[tap]
            out[tap][rows] = values
        return taps_last(out)

    def bytes_per_value(self, hidden_size: int) -> float:
        group = self._group(hidden_size)
        groups = -(-hidden_size // group)
        codes = groups * group * self.bits / 8
        return (codes + groups * (1 + self.asymmetric) + 2) / hidden_size

    def _group(self, hidden_size: int) -> int:
        """Channels of a group. A smaller hidden size is one group, rounded up to a multiple of four for the packing."""
        return min(self.group, -(-hidden_size // 4) * 4)


def _height(values: Tensor) -> int:
    """Rows of a tile of `values` (*C, T, D)."""
    return max(1, min(values.shape[-2], TILE // values.shape[-1] if values.device.type == "cpu" else values.shape[-2]))


def _tiles(values: Tensor) -> Iterator[tuple[int | EllipsisType, slice]]:
    """Tap (... if `values` has no axis of taps) and consecutive tokens of each tile of `values` (*C, T, D)."""
    height = _height(values)
    for tap in range(len(values)) if values.dim() == 3 else [...]:
        for start in range(0, values.shape[-2], height):
            yield tap, slice(start, start + height)


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


def _unfold(packed: Tensor, bits: int, out: Tensor) -> Tensor:
    """The codes of a `_fold`, one a byte: `packed` itself or written to `out`."""
    if bits == 8:
        return packed
    if bits == 4:
        low, high = out.chunk(2, -1)
        torch.bitwise_and(packed, 15, out=low)
        torch.bitwise_right_shift(packed, 4, out=high)
        return out
    *firsts, last = out.chunk(4, -1)
    for n, (part, first) in enumerate(zip(packed.chunk(3, -1), firsts, strict=True)):
        # The upper two bits of each third are two bits of the last quarter.
        torch.bitwise_right_shift(part, 6, out=first if n else last)
        if n:
            last.add_(first, alpha=4**n)
        torch.bitwise_and(part, 63, out=first)
    return out
