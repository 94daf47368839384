"""The interface of codecs of hidden states, and the layout from which a reader can take single taps.

Axes: T tokens, C taps, D hidden size. States are (T, C, D) or (T, D). Stored tensors lead with the tap, (C, T, ...), so
that reading some taps of many touches only theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Room = Callable[..., Tensor]  # room(shape, dtype=dtype) -> a tensor that holds anything


class Codec(ABC):
    """One way to store states. `dtype` is the default dtype of `decode`."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    learns: bool = False  # whether `fitted` computes scales from its sample
    tolerance: float = 0.05  # relative error of a log-probability vector beyond which a stored state counts as wrong

    @abstractmethod
    def encode(self, states: Float[Tensor, "T *C D"]) -> dict[str, Tensor]:
        """States -> storable tensors. Raises ValueError on NaN or infinity."""

    @abstractmethod
    def decode(
        self,
        stored: dict[str, Tensor],
        dtype: torch.dtype | None = None,
        taps: Sequence[int] | None = None,
        room: Room = torch.empty,
    ) -> Float[Tensor, "T *C D"]:
        """Stored tensors -> states in `dtype`; of the C stored taps only the positions in `taps`. A codec that computes
        its states in pieces asks `room` for their memory."""

    @abstractmethod
    def bytes_per_value(self, hidden_size: int) -> float:
        """Bytes of one state value on disk, scales included."""

    def fitted(self, sample: Float[Tensor, "T *C D"]) -> Codec:
        """The codec with scales from a first sample of states; the codec itself if it has no scales."""
        return self

    @property
    def scales(self) -> Tensor | None:
        """The scales from `fitted`, to be stored once for a cache: (C, D) or (D)."""
        return None

    def with_scales(self, scales: Tensor | None) -> Codec:
        """The codec with stored scales."""
        return self


def finite(values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise ValueError("the states hold NaN or infinity and cannot be stored: check the target's precision")
    return values


def taps_first(states: Tensor) -> Tensor:
    return states.transpose(0, 1) if states.dim() == 3 else states


def taps_last(values: Tensor) -> Tensor:
    return values.transpose(0, 1) if values.dim() == 3 else values


def chosen_taps(values: Tensor, taps: Sequence[int] | None, dims: int = 3) -> Tensor:
    """Select `taps` if the first axis of `values` is the tap (`values` then has `dims` axes); a view if they are
    adjacent."""
    if taps is None or values.dim() != dims or list(taps) == list(range(len(values))):
        return values
    first = taps[0]
    if list(taps) == list(range(first, first + len(taps))):
        return values[first : first + len(taps)]
    return values[list(taps)]


def magnitudes(states: Tensor) -> Tensor:
    """Median magnitude of every channel; the root mean square if that is 0; 1 for a channel of zeros."""
    size = states.abs().median(0).values
    size = torch.where(size > 0, size, states.square().mean(0).sqrt())
    return torch.where(size > 0, size, torch.ones_like(size))


def known_scales(codec: Codec, stored: dict[str, Tensor]) -> Tensor:
    channels = stored.get("channels", codec.scales)
    if channels is None:
        raise ValueError(f"codec {codec.name} needs the cache's channel scales: give it those with with_scales()")
    return channels
