"""records.parquet: read columns, join many files, and check every record against its histogram."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from specbench.runs.run_schema import COLUMNS, OPTIONAL, RECORDS_READABLE, RECORDS_SCHEMA

HISTOGRAM = "histogram"
# Every column but the histogram, which is unpacked, and what is read later (analysis.read.details).
READ = pa.schema([field for field in COLUMNS if field.name != HISTOGRAM])
TEXT = [field.name for field in READ if pa.types.is_string(field.type)]
HASH = OPTIONAL.field("prompt_hash")  # null in older files
NODES = OPTIONAL.field("nodes")  # of chains: the tokens proposed
TREE = OPTIONAL.field("tree")  # of chains, and in files of before there were trees: CHAIN
CHAIN = "chain"
MORE = (HASH, TREE, NODES)
ALL_READ = pa.schema([*READ, *MORE])
CLUSTER = ("suite", "benchmark", "prompt_key")
IDENTITY = ("source", "benchmark", "prompt_id", "turn", "seed", "temperature", "scheduler", "method", "target")


@dataclass(frozen=True)
class Table:
    """One file: its columns, and its histograms as (cells of each record, (C, 3) proposed, accepted, count)."""

    columns: pa.Table
    sizes: np.ndarray
    triples: np.ndarray

    def content(self) -> str:
        """Digest of all counts: equal for a copy, and for a repetition with the same numbers."""
        mark = hashlib.sha256(self.triples.tobytes() + self.sizes.tobytes())
        for name in ("benchmark", "prompt_id", "turn", "committed"):
            mark.update(repr(self.columns[name].to_pylist()).encode())
        return mark.hexdigest()


def read_table(file: Path) -> Table:
    """Read one records.parquet; a missing column or one of the wrong type is an error that names it."""
    with pq.ParquetFile(file, pre_buffer=False, memory_map=True) as parquet:
        schema = (parquet.schema_arrow.metadata or {}).get(b"schema")
        if (schema and schema.decode()) not in RECORDS_READABLE:
            raise ValueError(
                f"{file.name} has the schema {schema.decode()!r}, and this version reads {RECORDS_SCHEMA!r}"
            )
        present = set(parquet.schema_arrow.names)
        missing = [name for name in COLUMNS.names if name not in present]
        if missing:
            raise ValueError(f"{file.name} lacks the column {', '.join(missing)}")
        more = [field.name for field in MORE if field.name in present]
        table = parquet.read([*COLUMNS.names, *more], use_threads=False)
    sizes, triples = _unpack(table[HISTOGRAM], file.name)
    columns = [_cast(table[field.name], field, file.name) for field in READ]
    absent = {TREE.name: pa.scalar(CHAIN), NODES.name: columns[READ.get_field_index("proposed")]}
    for field in MORE:
        held = field.name in more
        column = _cast(table[field.name], field, file.name) if held else pa.nulls(len(table), field.type)
        columns.append(pc.coalesce(column, absent[field.name]) if field.name in absent else column)
    return Table(pa.table(columns, ALL_READ), sizes, triples)


def _cast(column: pa.ChunkedArray, field: pa.Field, name: str) -> pa.ChunkedArray:
    if column.type == field.type:  # usually true; an unnecessary cast costs time
        return column
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        return column.cast(field.type)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name}, column {field.name}: {error}") from error


def _unpack(column: pa.ChunkedArray, name: str) -> tuple[np.ndarray, np.ndarray]:
    lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    sizes = _sizes(lists)
    inner = lists.flatten()
    if not len(inner):
        return sizes, np.zeros((0, 3), np.int64)
    if pa.types.is_struct(inner.type):
        fields = ("proposed", "accepted", "count")
        return sizes, np.stack([inner.field(field).to_numpy(zero_copy_only=False) for field in fields], 1)
    if (_sizes(inner) != 3).any():
        raise ValueError(f"{name}: a histogram holds an entry that is not [proposed, accepted, count]")
    return sizes, inner.flatten().to_numpy(zero_copy_only=False).astype(np.int64).reshape(-1, 3)


def _sizes(lists: pa.ListArray) -> np.ndarray:
    """Length of every list; 0 for a missing one."""
    if lists.null_count == 0 and pa.types.is_list(lists.type):
        return np.diff(lists.offsets.to_numpy()).astype(np.int64)
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def concatenate(tables: Sequence[tuple[int, Table]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The records of many runs and their histogram cells in long form; the number is each table's row in `runs`."""
    if not tables:
        records = ALL_READ.empty_table().to_pandas()
        cells = np.zeros((0, 3), np.int64)
        nothing = {name: np.zeros(0, np.int64) for name in ("source", "row", "prompt_key", "prompt")}
        return records.assign(**nothing), _cells(np.zeros(0, np.int64), cells)
    joined = pa.concat_tables([table.columns for _, table in tables])
    # Text values repeat often: categories keep a million records in memory and make grouping fast.
    records = joined.to_pandas(categories=[*TEXT, HASH.name, TREE.name])
    records["source"] = np.repeat([source for source, _ in tables], [len(table.columns) for _, table in tables])
    # Where the record stands in its own file, for what is read later (analysis.read.details).
    records["row"] = np.concatenate([np.arange(len(table.columns)) for _, table in tables])
    records["prompt_key"] = prompt_keys(records)
    records["prompt"] = prompt_numbers(records)
    sizes = np.concatenate([table.sizes for _, table in tables])
    return records, _cells(np.repeat(np.arange(len(sizes)), sizes), np.concatenate([t.triples for _, t in tables]))


def prompt_numbers(records: pd.DataFrame) -> np.ndarray:
    """One number a prompt, in the order of suite, benchmark and key, whichever runs were read beside it: bootstrap
    draws go by this order, so that a run has the same intervals everywhere (analysis.statistics.headline orders
    alike)."""
    found = records.groupby(list(CLUSTER), observed=True, dropna=False, sort=False).ngroup().to_numpy()
    _, first = np.unique(found, return_index=True)
    keys = records[list(CLUSTER)].iloc[first].astype(str).itertuples(index=False, name=None)
    rank = np.empty(len(first), np.int64)
    rank[[place for _, place in sorted((key, place) for place, key in enumerate(keys))]] = np.arange(len(first))
    return rank[found] if len(first) else found


def prompt_keys(records: pd.DataFrame) -> pd.Series:
    """Key of each record's prompt: the hash of the tokens of the first turn of its conversation.

    Records without a hash take that of the same id in other runs if there is exactly one, otherwise `id:ID`.
    """
    on = ["benchmark", "prompt_id"]
    first = records.loc[records["turn"] == 0, ["source", *on, HASH.name]].drop_duplicates(["source", *on])
    hashed = first.dropna(subset=[HASH.name])
    once = hashed.drop_duplicates([*on, HASH.name])
    once = once.drop_duplicates(on, keep=False)
    own = pd.MultiIndex.from_frame(records[["source", *on]].astype(object))
    by_run = hashed.astype(object).set_index(["source", *on])[HASH.name].reindex(own).to_numpy()
    if pd.isna(by_run).any():
        of_id = once.astype(object).set_index(on)[HASH.name].reindex(own.droplevel("source")).to_numpy()
        plain = ("id:" + records["prompt_id"].astype(str)).to_numpy()
        by_run = np.where(pd.isna(by_run), np.where(pd.isna(of_id), plain, of_id), by_run)
    return pd.Series(by_run, records.index, dtype="category")


def _cells(record: np.ndarray, triples: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {"record": record, "proposed": triples[:, 0], "accepted": triples[:, 1], "count": triples[:, 2]}
    )


def check(records: pd.DataFrame, cells: pd.DataFrame) -> None:
    """Check rounds, proposed, accepted and committed of every record against its histogram.

    A round commits accepted + 1 tokens, or accepted where a stop token ended it, so `committed` lies between the two
    sums. An error names the run, the prompt and the column, because such records would give wrong tables.
    """
    triples = cells[["proposed", "accepted", "count"]].to_numpy()
    wrong = (triples < 0).any(1) | (triples[:, 1] > triples[:, 0])
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        _refuse(records, int(cells["record"].iloc[at]), f"has the impossible histogram entry {triples[at].tolist()}")

    def total(weights: np.ndarray) -> np.ndarray:
        return np.bincount(cells["record"], weights=weights, minlength=len(records)).astype(np.int64)

    rounds = total(triples[:, 2])
    accepted = total(triples[:, 1] * triples[:, 2])
    expected = {"rounds": rounds, "proposed": total(triples[:, 0] * triples[:, 2]), "accepted": accepted}
    for name, numbers in expected.items():
        off = np.flatnonzero(records[name].to_numpy() != numbers)
        if len(off):
            at = int(off[0])
            _refuse(records, at, f"says {name} = {records[name].iloc[at]}, its histogram {numbers[at]}")
    off = np.flatnonzero(records["nodes"].to_numpy() < records["proposed"].to_numpy())
    if len(off):
        at = int(off[0])
        _refuse(
            records,
            at,
            f"says nodes = {records['nodes'].iloc[at]}, and its trees have {expected['proposed'][at]} levels",
        )
    committed = records["committed"].to_numpy()
    off = np.flatnonzero((committed < accepted) | (committed > accepted + rounds))
    if len(off):
        at = int(off[0])
        span = f"{accepted[at]} to {accepted[at] + rounds[at]}"
        _refuse(records, at, f"says committed = {committed[at]}, its histogram allows {span}")
    doubled = np.flatnonzero(records.duplicated(list(IDENTITY)))
    if len(doubled):
        _refuse(records, int(doubled[0]), "stands twice with the same turn, seed, temperature and scheduler")


def _refuse(records: pd.DataFrame, at: int, what: str) -> None:
    row = records.iloc[at]
    raise ValueError(
        f"run {row['run']}: prompt {row['prompt_id']} of {row['benchmark']} (turn {row['turn']}) {what}; "
        "the records are damaged, evaluate this run again"
    )
