"""Reader of the released DeepSpec toolkit's own cache (version 2), so that what was built with it can be used.

manifest.json     hidden_size, target_layer_ids, hidden_dtype, token_dtype, mask_dtype, shards, ...
samples.idx       56 bytes a sample: u64 number, u32 shard, u32 length T, then u64 offsets into the shard of
                  token ids (T), attention mask (T), loss mask (T), taps (T, C*D) and final states (T, D)
shard-00000.bin   the arrays themselves, unaligned and without checksums
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from specbench.blocks import Sample

RECORD = np.dtype(
    [("number", "<u8"), ("shard", "<u4"), ("length", "<u4")]
    + [(name, "<u8") for name in ("tokens", "attention", "loss_mask", "taps", "last")]
)


class ReleasedCache:
    """Samples of such a cache by number; a damaged or cut shard is a ValueError that names shard and sample."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.exists():
            raise ValueError(f"{folder} holds no manifest.json: it is not a cache of the released toolkit")
        self.manifest = json.loads(path.read_text())
        facts = {"version": 2, "index_record_size": RECORD.itemsize, "token_dtype": "int32", "mask_dtype": "uint8"}
        for name, value in facts.items():
            if self.manifest.get(name) != value:
                raise ValueError(f"{path}: {name} is {self.manifest.get(name)!r}, this reader knows {value!r} only")
        self.dtype: torch.dtype = getattr(torch, self.manifest["hidden_dtype"])
        self.target_layer_ids = tuple(self.manifest["target_layer_ids"])
        self.index = np.fromfile(self.folder / "samples.idx", RECORD)
        if len(self.index) != self.manifest["num_samples"]:
            listed = f"{len(self.index)} samples, the manifest {self.manifest['num_samples']}"
            raise ValueError(f"{self.folder}/samples.idx lists {listed}: it is cut or of another cache")

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, number: int) -> Sample:
        """One conversation with its states."""
        row = self.index[number]
        name = self.manifest["shards"][int(row["shard"])]["file_name"]
        length, hidden, taps = int(row["length"]), self.manifest["hidden_size"], len(self.target_layer_ids)
        data = np.memmap(self.folder / name, np.uint8, "c")

        def take(part: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            size = int(np.prod(shape)) * dtype.itemsize
            blob = data[int(row[part]) : int(row[part]) + size]
            if len(blob) < size:
                raise ValueError(f"{name} of {self.folder}: sample {number} is cut in its {part}")
            return torch.frombuffer(bytearray(blob), dtype=dtype).view(shape)

        return Sample(
            tokens=take("tokens", torch.int32, length),
            loss_mask=take("loss_mask", torch.uint8, length).bool(),
            taps=take("taps", self.dtype, length, taps, hidden),
            last=take("last", self.dtype, length, hidden),
            ordinal=number,
        )
