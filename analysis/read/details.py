"""Optional columns of records.parquet: every round in order, the class of every token, teacher-forced sums, and counts
by depth and rank in token trees.

These columns are larger than the rest, so they are read only if a table needs them. Records without them (older ones)
are counted and reported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.read.runs import Runs
from analysis.statistics.acceptance_gap import TeacherForcedSums
from specbench.runs.run_schema import OPTIONAL

DETAILS = [OPTIONAL.field(name) for name in ("by_round", "token_classes", "teacher_forced", "by_rank")]


def rounds(runs: Runs) -> pd.DataFrame:
    """One row per round: prompt, position, context, proposed, accepted, committed, and record (its row in `runs`).

    `position` counts the generated tokens before the round, its anchor included (1 in the first round); `context` adds
    the prompt's tokens.
    """
    parts = []
    for places, columns in _files(runs):
        lists = columns["by_round"].take(pa.array(runs.records["row"].to_numpy()[places]))
        sizes = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        triples = lists.flatten().flatten().to_numpy(zero_copy_only=False).astype(np.int64).reshape(-1, 3)
        record = np.repeat(places, sizes)
        before = np.cumsum(triples[:, 2]) - triples[:, 2]
        starts = np.cumsum(sizes) - sizes
        first = before[np.minimum(starts, max(len(before) - 1, 0))] if len(before) else np.zeros(len(sizes), np.int64)
        position = 1 + before - np.repeat(first, sizes)
        parts.append(np.column_stack([record, position, triples]))
    table = np.concatenate(parts) if parts else np.zeros((0, 5), np.int64)
    frame = pd.DataFrame(table, columns=["record", "position", "proposed", "accepted", "committed"])
    of = runs.records.iloc[frame["record"]]
    return frame.assign(
        prompt=of["prompt"].to_numpy(), context=frame["position"].to_numpy() + of["prompt_tokens"].to_numpy()
    )


def classes(runs: Runs, known: pd.DataFrame) -> pd.DataFrame:
    """One row per slot that was reached: prompt, token_class (the letter of the token that the text has there),
    accepted.

    `known` are `rounds(runs)`. Slots beyond an answer that was cut short have no token and are left out.
    """
    texts = np.full(len(runs.records), "", dtype=object)
    for places, columns in _files(runs):
        taken = columns["token_classes"].take(pa.array(runs.records["row"].to_numpy()[places]))
        texts[places] = pc.fill_null(taken, "").to_numpy(zero_copy_only=False)
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    letters = np.frombuffer("".join(texts).encode("ascii"), dtype="S1").astype("U1")
    offsets = np.cumsum(lengths) - lengths
    record, position, proposed, accepted = (known[n].to_numpy() for n in ("record", "position", "proposed", "accepted"))
    reached = np.minimum(accepted + 1, proposed)
    index = np.repeat(np.arange(len(known)), reached)
    slot = 1 + np.arange(len(index)) - np.repeat(np.cumsum(reached) - reached, reached)
    place = position[index] - 1 + slot
    inside = place < lengths[record[index]]
    index, slot, place = index[inside], slot[inside], place[inside]
    return pd.DataFrame(
        {
            "prompt": known["prompt"].to_numpy()[index],
            "token_class": letters[offsets[record[index]] + place],
            "accepted": slot <= accepted[index],
        }
    )


def ranks(runs: Runs) -> pd.DataFrame:
    """One row per record, depth and rank of token trees: prompt, depth (from 1), rank (from 0), how many of the nodes
    that were reached had a child there (offered), and how many of these were accepted. Empty for chains."""
    parts = [np.zeros((0, 5), np.int64)]
    for places, columns in _files(runs):
        lists = columns["by_rank"].take(pa.array(runs.records["row"].to_numpy()[places]))
        sizes = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        counted = lists.flatten().flatten().to_numpy(zero_copy_only=False).astype(np.int64).reshape(-1, 4)
        prompts = runs.records["prompt"].to_numpy()[places]
        parts.append(np.column_stack([np.repeat(prompts, sizes), counted]))
    return pd.DataFrame(np.concatenate(parts), columns=["prompt", "depth", "rank", "offered", "accepted"])


def forced(runs: Runs) -> tuple[TeacherForcedSums, Runs] | None:
    """Teacher-forced sums by prompt and the records that carry them; None where no record does."""
    prompts, sums, kept = [], [], []
    for places, columns in _files(runs):
        for place, row in zip(places, runs.records["row"].to_numpy()[places], strict=True):
            slots = columns["teacher_forced"][int(row)].as_py()
            if slots:
                prompts.append(runs.records["prompt"].iloc[place])
                sums.append(slots)
                kept.append(place)
    return (TeacherForcedSums.of(prompts, sums), runs.pick(np.sort(kept))) if prompts else None


def _files(runs: Runs) -> Iterator[tuple[np.ndarray, dict[str, pa.Array]]]:
    """For every run, where its records stand in `runs`, and the optional columns of its file."""
    source = runs.records["source"].to_numpy()
    for run in dict.fromkeys(source):
        file = Path(runs.runs.loc[run, "path"]) / "records.parquet"
        state = os.stat(file)
        yield np.flatnonzero(source == run), _read(str(file), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4096)
def _read(file: str, changed: int, size: int) -> dict[str, Any]:
    names = pq.read_schema(file).names
    present = [field.name for field in DETAILS if field.name in names]
    table = pq.read_table(file, columns=[*present, "turn"], use_threads=False)
    return {
        field.name: table[field.name].combine_chunks() if field.name in present else pa.nulls(len(table), field.type)
        for field in DETAILS
    }
