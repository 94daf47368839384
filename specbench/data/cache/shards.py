"""Shards: tar files (USTAR) in the webdataset format, with four members per sample.

    KEY.json                  id, ordinal, length, supervised, source
    KEY.last.safetensors      the target's final states
    KEY.taps.safetensors      its taps, tap first
    KEY.tokens.safetensors    tokens (int32), loss_mask (uint8)

Modification times are 0 and members are sorted, so the same samples give the same bytes. The index has the offset
and size of each sample and of its parts, with xxh3 checksums of the finished file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import xxhash
from jaxtyping import UInt8
from safetensors.torch import save
from torch import Tensor
from webdataset import TarWriter

from specbench.blocks import Sample
from specbench.data.cache.codecs.interface import Room
from specbench.data.cache.storage import Storage
from specbench.files.atomic import replacing

BLOCK = 512  # a tar header, and the size that every member is padded to
PARTS = ("last", "taps", "tokens")
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@runtime_checkable
class EncodedConversation(Protocol):
    """The fields of a conversation that the cache needs; `specbench.data.answers.chat.encode` returns such objects."""

    id: str
    tokens: Sequence[int]
    loss_mask: Sequence[bool]
    source: str


class DamagedShard(ValueError):
    """Stored bytes differ from those that were written; the message names shard and sample."""


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.tar"


def members(
    ordinal: int, conversation: EncodedConversation, taps: Tensor, last: Tensor, storage: Storage
) -> dict[str, bytes]:
    """One conversation and its states (T, C, D) and (T, D) as the members of its sample, without the key."""
    loss_mask = torch.as_tensor(conversation.loss_mask, dtype=torch.bool)
    tokens = torch.as_tensor(conversation.tokens, dtype=torch.int32)
    facts = {
        "id": conversation.id,
        "ordinal": ordinal,
        "length": len(tokens),
        "supervised": int(loss_mask.sum()),
        "source": conversation.source,
    }
    stored_taps, stored_last = storage.encode(taps, last, loss_mask)
    return {
        "json": json.dumps(facts, ensure_ascii=False, sort_keys=True).encode(),
        "last.safetensors": save({name: value.cpu() for name, value in stored_last.items()}),
        "taps.safetensors": save({name: value.cpu() for name, value in stored_taps.items()}),
        "tokens.safetensors": save({"tokens": tokens, "loss_mask": loss_mask.to(torch.uint8)}),
    }


def write_shard(folder: Path, number: int, samples: Iterable[dict[str, bytes]]) -> list[dict[str, Any]]:
    """Write the samples (as `members` returns them) to a shard by an atomic rename, and return their index rows."""
    rows: list[dict[str, Any]] = []
    path = Path(folder) / shard_name(number)
    with replacing(path) as temporary:
        with open(temporary, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for place, sample in enumerate(samples):
                offset = tar.tarstream.offset
                row = json.loads(sample["json"])
                row = {"sample": row.pop("ordinal"), **row, "shard": number, "offset": offset}
                tar.write({"__key__": f"{number:05d}-{place:06d}", **sample})
                for name in sorted(sample):
                    if name != "json":
                        part = name.removesuffix(".safetensors")
                        row[f"{part}_offset"], row[f"{part}_bytes"] = offset + BLOCK, len(sample[name])
                        row[f"{part}_checksum"] = xxhash.xxh3_64_intdigest(sample[name])
                    offset += BLOCK + len(sample[name]) + -len(sample[name]) % BLOCK
                assert offset == tar.tarstream.offset, "the tar writer lays members out otherwise than expected"
                rows.append(row | {"bytes": offset - row["offset"]})
        _checksums(temporary, rows)
    return rows


def _checksums(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add the checksum of each sample, read back from the file, and compare its parts with what was to be written."""
    with open(path, "rb") as file:
        for row in rows:
            file.seek(row["offset"])
            span = memoryview(file.read(row["bytes"]))
            row["checksum"] = xxhash.xxh3_64_intdigest(span)
            for part in PARTS:
                start = row[f"{part}_offset"] - row["offset"]
                found = xxhash.xxh3_64_intdigest(span[start : start + row[f"{part}_bytes"]])
                if found != row[f"{part}_checksum"]:
                    raise OSError(
                        f"{path}: {part} of sample {row['id']} differs from what was written when it is read back"
                    )


def read_and_close(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill `view` from an open file at `offset` and close it; returns the number of bytes read."""
    done = 0
    try:
        while done < len(view):
            if hasattr(os, "preadv"):
                count = os.preadv(descriptor, [view[done:]], offset + done)
            else:  # some builds for macOS: one more copy
                part = os.pread(descriptor, len(view) - done, offset + done)
                count = len(part)
                view[done : done + count] = part
            if count == 0:
                break
            done += count
    finally:
        os.close(descriptor)
    return done


def tensors(blob: UInt8[Tensor, _]) -> dict[str, Tensor]:
    """The tensors of a safetensors file in memory, as views of it (nothing is copied)."""
    data = memoryview(blob.numpy())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, end = (start + offset for offset in entry["data_offsets"])
            found[name] = blob[first:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def decode_sample(
    parts: Mapping[str, UInt8[Tensor, _]],
    storage: Storage,
    ordinal: int,
    taps: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    room: Room = torch.empty,
) -> Sample:
    """Bytes of the parts `tokens`, `last` and `taps` (absent if no tap is wanted) -> Sample.

    `taps`: positions of the wanted taps among the stored ones. States in their stored dtype are views of the bytes;
    `room(shape, dtype=dtype)` gives the memory of those that a codec computes in pieces.
    """
    text = tensors(parts["tokens"])
    loss_mask = text["loss_mask"].view(torch.bool)
    last = storage.decode_last(tensors(parts["last"]), loss_mask, dtype, room)
    if "taps" in parts:
        states = storage.taps.decode(tensors(parts["taps"]), last.dtype, taps, room)
    else:
        states = last.new_zeros(len(last), 0, last.shape[-1])
    return Sample(text["tokens"], loss_mask, states, last, ordinal)


def from_webdataset(sample: Mapping[str, Any], storage: Storage, dtype: torch.dtype | None = None) -> Sample:
    """A sample of a standard webdataset pipeline (undecoded members) -> Sample."""
    parts = {part: torch.frombuffer(bytearray(sample[f"{part}.safetensors"]), dtype=torch.uint8) for part in PARTS}
    return decode_sample(parts, storage, int(json.loads(sample["json"])["ordinal"]), dtype=dtype)
