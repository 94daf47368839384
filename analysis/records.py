"""records.parquet: read columns, join many files, and hold every record against its own histogram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

TEXT = ("run", "method", "target", "suite", "benchmark", "domain", "prompt_id", "scheduler", "accounting", "thinking")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in TEXT[:7]),
        ("turn", pa.int64()),
        ("temperature", pa.float64()),
        *((name, pa.string()) for name in TEXT[7:]),
        ("seed", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("truncated", pa.bool_()),
        ("rounds", pa.int64()),
        ("committed", pa.int64()),
        ("proposed", pa.int64()),
        ("accepted", pa.int64()),
        ("seconds", pa.float64()),
    ]
)
CLUSTER = ("suite", "benchmark", "prompt_id")
IDENTITY = ("source", "benchmark", "prompt_id", "turn", "seed", "temperature", "scheduler", "method", "target")


@dataclass(frozen=True)
class Table:
    """One file: its columns, and its histograms as (cells of each record, (C, 3) proposed, accepted, count)."""

    columns: pa.Table
    sizes: np.ndarray
    triples: np.ndarray

    def identity(self) -> tuple[object, ...] | None:
        """What a copy of the same records (a mirror, a moved folder) would have too; None for an empty file."""
        if not len(self.columns):
            return None
        first = self.columns.slice(0, 1).to_pylist()[0]
        named = tuple(first[key] for key in ("run", "method", "target", "suite", "temperature", "seed"))
        return (*named, len(self.columns), self.triples.sum(0).tobytes(), hash(self.triples.tobytes()))


def read_table(file: Path) -> Table:
    """Read one records.parquet; a missing column or one of the wrong type is an error that names it."""
    with pq.ParquetFile(file, pre_buffer=False, memory_map=True) as parquet:
        present = set(parquet.schema_arrow.names)
        missing = [name for name in (*SCHEMA.names, "histogram") if name not in present]
        if missing:
            raise ValueError(f"{file.name} lacks the column {', '.join(missing)}")
        table = parquet.read([*SCHEMA.names, "histogram"], use_threads=False)
    sizes, triples = _unpack(table["histogram"], file.name)
    return Table(pa.table([_cast(table[field.name], field, file.name) for field in SCHEMA], SCHEMA), sizes, triples)


def _cast(column: pa.ChunkedArray, field: pa.Field, name: str) -> pa.ChunkedArray:
    if column.type == field.type:  # nearly always, and a cast that changes nothing is not free
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
        records = SCHEMA.empty_table().to_pandas()
        cells = np.zeros((0, 3), np.int64)
        nothing = {name: np.zeros(0, np.int64) for name in ("source", "row", "prompt")}
        return records.assign(**nothing), _cells(np.zeros(0, np.int64), cells)
    joined = pa.concat_tables([table.columns for _, table in tables])
    # Text repeats a lot: categories keep a million records in memory and make grouping cheap.
    records = joined.to_pandas(categories=list(TEXT))
    records["source"] = np.repeat([source for source, _ in tables], [len(table.columns) for _, table in tables])
    # Where the record stands in its own file, for what is read later (analysis.details).
    records["row"] = np.concatenate([np.arange(len(table.columns)) for _, table in tables])
    # One number a prompt, the same in every run: what statistics cluster and pair by.
    records["prompt"] = records.groupby(list(CLUSTER), observed=True, dropna=False, sort=False).ngroup()
    sizes = np.concatenate([table.sizes for _, table in tables])
    return records, _cells(np.repeat(np.arange(len(sizes)), sizes), np.concatenate([t.triples for _, t in tables]))


def _cells(record: np.ndarray, triples: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {"record": record, "proposed": triples[:, 0], "accepted": triples[:, 1], "count": triples[:, 2]}
    )


def check(records: pd.DataFrame, cells: pd.DataFrame) -> None:
    """Hold rounds, proposed, accepted and committed of every record against its histogram.

    A round commits accepted + 1 tokens, or accepted where a stop token ended it, so `committed` lies between the two
    sums. An error names the run, the prompt and the column: such records would give wrong tables silently.
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
