"""The files that describe a cache: manifest with identity and fingerprint, index, and frozen tables.

manifest.json         written last; if it is present, the cache is complete
index.parquet         one row per sample, in the order of the conversations
tables.safetensors    embedding, head (absent if tied), head_bias (if there is one), norm, channel scales of the codecs
shard-00000.tar ...   the samples; parts/ contains the index rows of each shard
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file
from torch import Tensor

from specbench.data.answers.templates import date_of
from specbench.data.cache.shards import PARTS, EncodedConversation, shard_name
from specbench.data.cache.storage import Storage, storage
from specbench.files import json_lines as jsonl
from specbench.files.atomic import plain, replacing, write_json
from specbench.models.embedding_head import Tables

SCHEMA = "specbench.cache/1"
MANIFEST, INDEX, TABLES = "manifest.json", "index.parquet", "tables.safetensors"
_COLUMNS = pa.schema(
    [("sample", pa.int64()), ("id", pa.string()), ("source", pa.string()), ("shard", pa.int32())]
    + [("offset", pa.int64()), ("bytes", pa.int64()), ("length", pa.int32()), ("supervised", pa.int32())]
    + [("checksum", pa.uint64())]
    + [(f"{part}_{name}", kind) for part in PARTS for name, kind in (("offset", pa.int64()), ("bytes", pa.int64()))]
    + [(f"{part}_checksum", pa.uint64()) for part in PARTS]
)


class DamagedManifest(ValueError):
    """A manifest that contradicts itself or the files that it describes."""


class CacheMismatch(ValueError):
    """A cache with another identity (target, taps, codec, ...) than the run requires."""


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hash (16 hex digits) of the identity, that is of everything that decides the content of a cache."""
    text = json.dumps(plain(identity), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def conversations_hash(conversations: Iterable[EncodedConversation]) -> str:
    """Hash over every conversation's id, tokens and loss mask, in order."""
    digest = hashlib.sha256()
    for one in conversations:
        digest.update(f"{one.id}\n{len(one.tokens)}\n".encode())
        digest.update(np.asarray(one.tokens, np.int32).tobytes())
        digest.update(np.asarray(one.loss_mask, np.uint8).tobytes())
    return digest.hexdigest()


def tokenizer_facts(tokenizer: Any) -> dict[str, str | None]:
    """Hashes of a tokenizer's vocabulary and of its chat template; None where there is none.

    A template that reads the clock adds the date with which it was rendered.
    """
    if tokenizer is None:
        return {"tokenizer": None, "template": None}
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    template, date = tokenizer.chat_template, date_of(tokenizer)
    dated = {} if date is None else {"date": date}
    return dated | {
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "template": None if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:16],
    }


def identity_of(
    target: Any,
    wanted: Storage,
    max_length: int,
    conversations: Iterable[EncodedConversation],
    sources: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that decides the content of a cache of `target` over `conversations`. `sources`: file name ->
    SHA-256."""
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
    """One line for each field of `wanted` that has another value in `stored`."""
    return [
        f"{name}: {stored_by} has {stored.get(name)!r}, the run asks for {value!r}"
        for name, value in wanted.items()
        if plain(stored.get(name)) != plain(value)
    ]


def require_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: str | Path, remedy: str) -> None:
    """Raise CacheMismatch with every field in which the stored identity differs from the wanted one."""
    lines = differences(stored, wanted)
    if lines:
        raise CacheMismatch(f"{folder} does not belong to this run ({'; '.join(lines)}): {remedy}")


REMEDY = "remove it and run `specbench cache` again, which keeps the complete shards"
_KINDS = {"str": str, "int": int, "float": (int, float), "float | None": (int, float, type(None))}


def _seal(facts: Mapping[str, Any]) -> str:
    """SHA-256 of the whole content of a manifest."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _fault(facts: Mapping[str, Any]) -> str | None:
    """The reason why these are not the fields of a manifest; None if they are."""
    known = {field.name: field.type for field in fields(Manifest)}
    optional = {field.name for field in fields(Manifest) if field.default is not MISSING}
    odd = sorted((set(known) - optional - set(facts)) | (set(facts) - set(known)))
    if odd:
        return f"{odd[0]!r} is {'missing' if odd[0] in known else 'no field of it'}"
    for name, kind in known.items():
        if name not in facts:
            continue
        value, wanted = facts[name], _KINDS.get(kind, list if kind.startswith("list") else dict)
        if not isinstance(value, wanted) or isinstance(value, bool):
            return f"{name} is of type {type(value).__name__}"
        if isinstance(value, (int, float)) and not (math.isfinite(value) and (value >= 0 or name == "soft_cap")):
            return f"{name} is {value}"
    identity = facts["identity"]
    for name, wanted in (("target", str), ("taps", list), ("codec", dict), ("max_length", int), ("sources", dict)):
        if not isinstance(identity.get(name), wanted):
            return f"its identity has no {name}"
    if not {"taps", "last", "last_rows"} <= set(identity["codec"]) or set(map(type, identity["taps"])) - {int}:
        return "its identity names no taps or codecs"
    if fingerprint(identity) != facts["fingerprint"]:
        return f"its fingerprint is {facts['fingerprint']} and that of its identity {fingerprint(identity)}"
    for number, shard in enumerate(facts["shards"]):
        sizes = [shard.get(key) for key in ("bytes", "samples")] if isinstance(shard, dict) else [None]
        if any(type(size) is not int or size < 0 for size in sizes) or shard.get("name") != shard_name(number):
            return f"shard {number} is not described by name, bytes and samples"
    return None


def _unstored_scale(facts: Mapping[str, Any]) -> str | None:
    """A factor or soft-cap of the target's logits that a manifest without `logit_scale` does not store."""
    text = facts["target_config"].get("text_config") or facts["target_config"]
    for name in ("logits_scaling", "logit_scale", "lm_head_multiplier"):
        if text.get(name) not in (None, 1):
            return f"{name}={text[name]}"
    cap = text.get("final_logit_softcapping")
    return f"final_logit_softcapping={cap}" if cap and facts["soft_cap"] is None else None


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json. `identity` has the fields of `identity_of`; sizes in bytes, counts in tokens.

    `agreement`: share of checked positions at which log-probabilities from `last`, as captured and as stored, equal
    those of the model's own head within the codec's tolerance, and the share with the same most likely token.
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
    logit_scale: float = 1.0
    schema: str = SCHEMA

    def write(self, folder: Path) -> None:
        """Write manifest.json by an atomic rename, with a hash (`seal`) of its whole content."""
        facts = plain(asdict(self))
        write_json(folder / MANIFEST, facts | {"seal": _seal(facts)})

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read manifest.json. ValueError if there is none or it has another schema; DamagedManifest if it was changed:
        its fingerprint and its `seal` (early caches have none) are computed again from its content."""
        path = Path(folder) / MANIFEST
        if not path.exists():
            raise ValueError(f"{folder} holds no complete cache (no {MANIFEST}): build it with `specbench cache`")
        try:
            facts, _ = jsonl.parse(jsonl.require_file(path).read_bytes().decode().strip())
        except ValueError as error:
            raise DamagedManifest(f"{path} is not a manifest ({error}): build the cache again") from error
        if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
            schema = facts.get("schema") if isinstance(facts, dict) else None
            raise ValueError(f"{path} has schema {schema!r}, this version reads {SCHEMA}: build the cache again")
        seal = facts.pop("seal", None)
        why = _fault(facts) or (seal is not None and seal != _seal(facts) and "its seal does not match its content")
        if why:
            raise DamagedManifest(f"{path} was changed after it was written ({why}): {REMEDY}")
        unread = None if "logit_scale" in facts else _unstored_scale(facts)
        if unread:
            raise ValueError(
                f"{path} was written by a version that did not read {unread} of its target, so its tables give other "
                "logits than the target: build the cache again"
            )
        return cls(**facts)

    def require(self, index: Index, folder: Path) -> None:
        """Raise DamagedManifest if counts and shards differ from those of the index."""
        found = {
            "samples": len(index),
            "tokens": int(index["length"].sum()),
            "supervised": int(index["supervised"].sum()),
        }
        wrong = [
            f"{name} is {getattr(self, name)}, the index says {n}"
            for name, n in found.items()
            if getattr(self, name) != n
        ]
        ends = index["offset"] + index["bytes"]
        for number, shard in enumerate(self.shards):
            rows = index["shard"] == number
            if shard["samples"] != int(rows.sum()) or (rows.any() and int(ends[rows].max()) > shard["bytes"]):
                wrong.append(f"{shard['name']} is not as the index lists it")
        if len(index) and not 0 <= int(index["shard"].min()) <= int(index["shard"].max()) < len(self.shards):
            wrong.append("the index lists shards that it does not")
        if wrong:
            raise DamagedManifest(f"{folder / MANIFEST} was changed after it was written ({wrong[0]}): {REMEDY}")

    def storage(self) -> Storage:
        """The codecs by name, without their scales."""
        facts = self.identity["codec"]
        return storage(facts["taps"], facts["last"], facts["last_rows"])


def write_index(path: Path, rows: list[dict[str, Any]], notes: Mapping[str, Any] | None = None) -> None:
    """Write rows as parquet by an atomic rename; `notes` go into the metadata of the file."""
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
    """The index as arrays with one entry per sample: `ids`, `sources` and every numeric column by name."""

    def __init__(self, path: Path):
        table = pq.read_table(path)
        missing = set(_COLUMNS.names) - set(table.column_names)
        if missing:
            raise ValueError(f"{path} lacks the columns {sorted(missing)}: build the cache again")
        self.ids: list[str] = table["id"].to_pylist()
        self.sources: list[str] = table["source"].to_pylist()
        numeric = [field.name for field in _COLUMNS if not pa.types.is_string(field.type)]
        self._columns = {name: table[name].to_numpy() for name in numeric}

    def __getitem__(self, column: str) -> np.ndarray:
        return self._columns[column]

    def __len__(self) -> int:
        return len(self.ids)


def write_tables(path: Path, tables: Tables, norm: Tensor | None, scales: Mapping[str, Tensor]) -> None:
    """Store the frozen tables; a head that shares the weights of the embedding is not stored twice."""
    found = {"embedding": tables.embedding.detach().cpu().contiguous(), **scales}
    if tables.head.data_ptr() != tables.embedding.data_ptr():
        found["head"] = tables.head.detach().cpu().contiguous()
    if tables.bias is not None:
        found["head_bias"] = tables.bias.detach().cpu().contiguous()
    if norm is not None:
        found["norm"] = norm.detach().cpu().contiguous()
    with replacing(path) as temporary:
        save_file(found, temporary)


def read_tables(folder: Path, manifest: Manifest) -> tuple[Tables, Tensor | None, dict[str, Tensor]]:
    """The frozen tables, the final norm's weight and the codecs' channel scales."""
    found = load_file(folder / TABLES)
    wanted, embedding = (manifest.vocabulary, manifest.hidden_size), found.get("embedding")
    if embedding is None or embedding.shape != wanted:
        shape = None if embedding is None else tuple(embedding.shape)
        raise DamagedManifest(f"{folder / TABLES} holds an embedding of {shape}, the manifest says {wanted}: {REMEDY}")
    head = found.get("head", embedding)
    scales = {name: value for name, value in found.items() if name.endswith(".channels")}
    head_settings = {"logit_scale": manifest.logit_scale, "bias": found.get("head_bias")}
    tables = Tables(embedding, head, manifest.embedding_scale, manifest.soft_cap, **head_settings)
    return tables, found.get("norm"), scales
