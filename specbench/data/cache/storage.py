"""How a cache stores the states of a conversation: codec of the taps, codec of `last`, and which rows of `last`.

Axes: T tokens, C taps, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from specbench.data.cache.codecs.codecs import NAMES, codec
from specbench.data.cache.codecs.interface import Codec, Room

TOKEN_BYTES = 5  # int32 id and one byte of loss mask
PRESETS = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16"),
    "exact": ("bf16-lossless", "bf16-lossless"),
    "int8": ("int8", "int8"),
    "fp8": ("fp8", "fp8"),
    "smallest": ("int4-wide", "int6"),
}


def kept_rows(loss_mask: Bool[Tensor, " T"]) -> Bool[Tensor, " T"]:
    """Rows of `last` that supervised slots can need: every supervised token and its two neighbours."""
    near = F.max_pool1d(loss_mask.float()[None, None], 3, stride=1, padding=1) if len(loss_mask) else loss_mask
    return near.reshape(-1).bool()


@dataclass(frozen=True)
class Storage:
    """Codecs of taps and `last`. With `last_rows` "supervised" the other rows of `last` are dropped and read as zeros.

    Parallel drafts need `last` only at supervised slots; MTP has `last` as its input and needs all rows.
    """

    taps: Codec
    last: Codec
    last_rows: str = "all"

    def facts(self) -> dict[str, str]:
        """The names that identify this storage in a manifest."""
        return {"taps": self.taps.name, "last": self.last.name, "last_rows": self.last_rows}

    @property
    def dtype(self) -> torch.dtype:
        """The states' dtype unless a reader asks for another."""
        return torch.promote_types(self.taps.dtype, self.last.dtype)

    def bytes_per_token(self, hidden_size: int, taps: int, kept: float = 1.0) -> dict[str, float]:
        """Bytes per token by part; `kept` is the share of rows of `last` that `kept_rows` keeps."""
        share = kept if self.last_rows == "supervised" else 1.0
        return {
            "tokens": float(TOKEN_BYTES),
            "taps": self.taps.bytes_per_value(hidden_size) * taps * hidden_size,
            "last": self.last.bytes_per_value(hidden_size) * share * hidden_size,
        }

    @property
    def learns(self) -> bool:
        """True when a codec takes channel scales from a first sample of states."""
        return self.taps.learns or self.last.learns

    def fitted(self, taps: Float[Tensor, "T C D"], last: Float[Tensor, "T D"]) -> Storage:
        """With the channel scales of a first sample of states."""
        return replace(self, taps=self.taps.fitted(taps), last=self.last.fitted(last))

    def scales(self) -> dict[str, Tensor]:
        """The scales that are stored once per cache and are needed to decode the shards."""
        found = {"taps.channels": self.taps.scales, "last.channels": self.last.scales}
        return {name: scales for name, scales in found.items() if scales is not None}

    def with_scales(self, scales: dict[str, Tensor]) -> Storage:
        """With stored channel scales."""
        taps = self.taps.with_scales(scales.get("taps.channels"))
        return replace(self, taps=taps, last=self.last.with_scales(scales.get("last.channels")))

    def encode(
        self, taps: Float[Tensor, "T C D"], last: Float[Tensor, "T D"], loss_mask: Bool[Tensor, " T"]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """States of one conversation -> stored tensors of its taps and of its `last`."""
        if self.last_rows == "supervised":
            last = last[kept_rows(loss_mask).to(last.device)]
        return self.taps.encode(taps), self.last.encode(last)

    def decode_last(
        self,
        stored: dict[str, Tensor],
        loss_mask: Bool[Tensor, " T"],
        dtype: torch.dtype | None = None,
        room: Room = torch.empty,
    ) -> Float[Tensor, "T D"]:
        """Stored `last` -> (T, D), zeros in the rows that were not kept."""
        values = self.last.decode(stored, dtype or self.dtype, room=room)
        if self.last_rows == "all":
            return values
        rows = values.new_zeros(len(loss_mask), values.shape[-1])
        rows[kept_rows(loss_mask)] = values
        return rows


def storage(name: str, last: str | None = None, last_rows: str = "all") -> Storage:
    """A preset (fp32, bf16, exact, int8, fp8, smallest) or a codec's name; `last` may name a codec of its own."""
    if name not in PRESETS and name not in NAMES:
        known = ", ".join([*PRESETS, *(n for n in NAMES if n not in PRESETS)])
        raise ValueError(f"codec={name} does not exist: choose one of {known}")
    if last_rows not in ("all", "supervised"):
        raise ValueError(f"last_rows={last_rows} does not exist: choose all or supervised")
    for_taps, for_last = PRESETS.get(name, (name, name))
    return Storage(codec(for_taps), codec(last or for_last), last_rows)
