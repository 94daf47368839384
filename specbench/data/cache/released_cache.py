"""Reader of the released DeepSpec toolkit's own cache (version 2), so that what was built with it can be used.

manifest.json     hidden_size, target_layer_ids, hidden_dtype, token_dtype, mask_dtype, shards, ...
samples.idx       56 bytes per sample: u64 number, u32 shard, u32 length T, then u64 offsets into the shard of
                  token ids (T), attention mask (T), loss mask (T), taps (T, C*D) and final states (T, D)
shard-00000.bin   the arrays themselves, unaligned and without checksums
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from specbench.blocks import Sample
from specbench.files import json_lines as jsonl

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RECORD = np.dtype(
    [("number", "<u8"), ("shard", "<u4"), ("length", "<u4")]
    + [(name, "<u8") for name in ("tokens", "attention", "loss_mask", "taps", "last")]
)


class ReleasedCache:
    """Samples of such a cache by number. A damaged or truncated shard raises ValueError, which names shard and
    sample."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no manifest.json: it is not a cache of the released toolkit")
        try:
            self.manifest, _ = jsonl.parse(path.read_bytes().decode().strip())
        except ValueError as error:
            raise ValueError(f"{path} is not a manifest ({error}): copy the cache again") from error
        if not isinstance(self.manifest, dict):
            raise ValueError(f"{path} holds no object: copy the cache again")
        facts = {"version": 2, "index_record_size": RECORD.itemsize, "token_dtype": "int32", "mask_dtype": "uint8"}
        for name, value in facts.items():
            if self.manifest.get(name) != value:
                raise ValueError(f"{path}: {name} is {self.manifest.get(name)!r}, this reader knows {value!r} only")
        self._require(path)
        self.dtype: torch.dtype = DTYPES[self.manifest["hidden_dtype"]]
        self.target_layer_ids = tuple(self.manifest["target_layer_ids"])
        index = self.folder / "samples.idx"
        if not index.is_file() or index.stat().st_size % RECORD.itemsize:
            raise ValueError(f"{index} is missing or truncated: copy the cache again")
        self.index = np.fromfile(index, RECORD)
        if len(self.index) != self.manifest["num_samples"]:
            listed = f"{len(self.index)} samples, the manifest {self.manifest['num_samples']}"
            raise ValueError(f"{self.folder}/samples.idx lists {listed}: it is truncated or belongs to another cache")

    def _require(self, path: Path) -> None:
        """ValueError for a manifest with fields of wrong types, or with file names outside of the folder."""
        facts = self.manifest
        if facts.get("hidden_dtype") not in DTYPES:
            known = ", ".join(DTYPES)
            raise ValueError(f"{path}: hidden_dtype is {facts.get('hidden_dtype')!r}, this reader knows {known}")
        for name in ("hidden_size", "num_samples"):
            if type(facts.get(name)) is not int or facts[name] < 0:
                raise ValueError(f"{path}: {name} is {facts.get(name)!r}, not a count")
        layers, shards = facts.get("target_layer_ids"), facts.get("shards")
        if not isinstance(layers, list) or set(map(type, layers)) - {int}:
            raise ValueError(f"{path}: target_layer_ids is {layers!r}, not a list of layers")
        names = (
            [isinstance(one, dict) and one.get("file_name") for one in shards] if isinstance(shards, list) else [None]
        )
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"{path}: a shard's file_name is {name!r}, not the name of a file beside it")

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, number: int) -> Sample:
        """One conversation with its states."""
        row = self.index[number]
        if int(row["shard"]) >= len(self.manifest["shards"]):
            raise ValueError(
                f"{self.folder}/samples.idx: sample {number} lies in shard {row['shard']}, which is not listed"
            )
        name = self.manifest["shards"][int(row["shard"])]["file_name"]
        length, hidden, taps = int(row["length"]), self.manifest["hidden_size"], len(self.target_layer_ids)
        if not (self.folder / name).is_file() or (self.folder / name).stat().st_size == 0:
            raise ValueError(f"{name} of {self.folder} is missing or empty: copy the cache again")
        data = np.memmap(self.folder / name, np.uint8, "c")

        def take(part: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            size = int(np.prod(shape)) * dtype.itemsize
            blob = data[int(row[part]) : int(row[part]) + size]
            if len(blob) < size:
                raise ValueError(f"{name} of {self.folder}: sample {number} is truncated in its {part}")
            return torch.frombuffer(bytearray(blob), dtype=dtype).view(shape)

        return Sample(
            tokens=take("tokens", torch.int32, length),
            loss_mask=take("loss_mask", torch.uint8, length).bool(),
            taps=take("taps", self.dtype, length, taps, hidden),
            last=take("last", self.dtype, length, hidden),
            ordinal=number,
        )
