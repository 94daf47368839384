"""A cache folder's papers: identity and fingerprint, manifest, index and frozen tables.

manifest.json         written last: its presence means that the cache is complete
index.parquet         one row a sample, in the order of the conversations
tables.safetensors    embedding, head (absent if tied), norm, channel scales of the codecs
shard-00000.tar ...   the samples; parts/ holds each shard's own rows until and after they are merged
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file
from torch import Tensor

from specbench.atomic import plain, replacing, write_json
from specbench.data.shards import PARTS, Conversation
from specbench.data.storage import Storage, storage
from specbench.tables import Tables

SCHEMA = "specbench.cache/1"
MANIFEST, INDEX, TABLES = "manifest.json", "index.parquet", "tables.safetensors"
_COLUMNS = pa.schema(
    [("sample", pa.int64()), ("id", pa.string()), ("source", pa.string()), ("shard", pa.int32())]
    + [("offset", pa.int64()), ("bytes", pa.int64()), ("length", pa.int32()), ("supervised", pa.int32())]
    + [("checksum", pa.uint64())]
    + [(f"{part}_{name}", kind) for part in PARTS for name, kind in (("offset", pa.int64()), ("bytes", pa.int64()))]
    + [(f"{part}_checksum", pa.uint64()) for part in PARTS]
)


class CacheMismatch(ValueError):
    """A cache that was built for something else than what the run asks for."""


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Sixteen hex digits that stand for everything that decides what a cache holds."""
    text = json.dumps(plain(identity), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def conversations_hash(conversations: Iterable[Conversation]) -> str:
    """Hash over every conversation's id, tokens and loss mask, in order."""
    digest = hashlib.sha256()
    for one in conversations:
        digest.update(f"{one.id}\n{len(one.tokens)}\n".encode())
        digest.update(np.asarray(one.tokens, np.int32).tobytes())
        digest.update(np.asarray(one.loss_mask, np.uint8).tobytes())
    return digest.hexdigest()


def tokenizer_facts(tokenizer: Any) -> dict[str, str | None]:
    """Hashes of a tokenizer's vocabulary and of its chat template; None where there is none."""
    if tokenizer is None:
        return {"tokenizer": None, "template": None}
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    template = tokenizer.chat_template
    return {
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "template": None if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:16],
    }


def identity_of(
    target: Any, wanted: Storage, max_length: int, conversations: Iterable[Conversation], sources: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that decides what a cache of `target` over `conversations` holds. `sources`: file name -> SHA-256."""
    return {
        "target": target.name,
        "revision": target.revision,
        "weights": target.weights_hash,
        "taps": list(target.target_layer_ids),
        **tokenizer_facts(target.tokenizer),
        "max_length": max_length,
        "codec": wanted.facts(),
        "conversations": conversations_hash(conversations),
        "sources": dict(sources),
    }


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], stored_by: str = "the cache") -> list[str]:
    """One line for each field of `wanted` that `stored` answers otherwise."""
    return [
        f"{name}: {stored_by} has {stored.get(name)!r}, the run asks for {value!r}"
        for name, value in wanted.items()
        if plain(stored.get(name)) != plain(value)
    ]


def require_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: str | Path, remedy: str) -> None:
    """Raise CacheMismatch listing field by field where a stored identity is not the wanted one."""
    lines = differences(stored, wanted)
    if lines:
        raise CacheMismatch(f"{folder} does not belong to this run ({'; '.join(lines)}): {remedy}")


@dataclass(frozen=True)
class Manifest:
    """What a complete cache is. `identity` has the fields of `identity_of`; sizes in bytes, counts in tokens.

    `agreement`: share of checked positions at which log-probabilities from `last`, as captured and as stored, are the
    live ones within the codec's tolerance, and the share with the same first choice.
    """

    fingerprint: str
    identity: dict[str, Any]
    hidden_size: int
    vocabulary: int
    target_config: dict[str, Any]
    soft_cap: float | None
    embedding_scale: float
    samples: int
    tokens: int
    supervised: int
    shards: list[dict[str, Any]]
    index_hash: str
    tables_hash: str
    agreement: dict[str, float | int]
    layout: dict[str, int]
    schema: str = SCHEMA

    def write(self, folder: Path) -> None:
        """Write manifest.json, whole or not at all."""
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read manifest.json. Raises ValueError when there is none or it is of another schema."""
        path = Path(folder) / MANIFEST
        if not path.exists():
            raise ValueError(f"{folder} holds no complete cache (no {MANIFEST}): build it with `specbench cache`")
        try:
            facts = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}): build the cache anew") from error
        if facts.get("schema") != SCHEMA:
            raise ValueError(f"{path} is of schema {facts.get('schema')!r}, this version reads {SCHEMA}: build it anew")
        return cls(**facts)

    def storage(self) -> Storage:
        """The codecs by name, without their scales."""
        facts = self.identity["codec"]
        return storage(facts["taps"], facts["last"], facts["last_rows"])


def write_index(path: Path, rows: list[dict[str, Any]], notes: Mapping[str, Any] | None = None) -> None:
    """Rows as parquet, whole or not at all; `notes` travel in the file's metadata."""
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["sample"]), schema=_COLUMNS)
    if notes is not None:
        table = table.replace_schema_metadata({"notes": json.dumps(plain(notes))})
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def read_part(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and notes of one shard."""
    table = pq.read_table(path)
    return table.to_pylist(), json.loads(table.schema.metadata[b"notes"])


class Index:
    """The index as arrays, one entry a sample: `ids`, `sources` and every numeric column by name."""

    def __init__(self, path: Path):
        table = pq.read_table(path)
        missing = set(_COLUMNS.names) - set(table.column_names)
        if missing:
            raise ValueError(f"{path} lacks the columns {sorted(missing)}: build the cache anew")
        self.ids: list[str] = table["id"].to_pylist()
        self.sources: list[str] = table["source"].to_pylist()
        numeric = [field.name for field in _COLUMNS if not pa.types.is_string(field.type)]
        self._columns = {name: table[name].to_numpy() for name in numeric}

    def __getitem__(self, column: str) -> np.ndarray:
        return self._columns[column]

    def __len__(self) -> int:
        return len(self.ids)


def write_tables(path: Path, tables: Tables, norm: Tensor | None, scales: Mapping[str, Tensor]) -> None:
    """Store the frozen tables once; a head that is the embedding is not stored twice."""
    found = {"embedding": tables.embedding.detach().cpu().contiguous(), **scales}
    if tables.head.data_ptr() != tables.embedding.data_ptr():
        found["head"] = tables.head.detach().cpu().contiguous()
    if norm is not None:
        found["norm"] = norm.detach().cpu().contiguous()
    with replacing(path) as temporary:
        save_file(found, temporary)


def read_tables(folder: Path, manifest: Manifest) -> tuple[Tables, Tensor | None, dict[str, Tensor]]:
    """The frozen tables, the final norm's weight and the codecs' channel scales."""
    found = load_file(folder / TABLES)
    embedding = found["embedding"]
    head = found.get("head", embedding)
    scales = {name: value for name, value in found.items() if name.endswith(".channels")}
    return Tables(embedding, head, manifest.embedding_scale, manifest.soft_cap), found.get("norm"), scales
