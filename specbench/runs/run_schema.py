"""Format of run folders: kinds, files, schemas and the columns of records.

It imports neither torch nor wandb, so that `analysis` reads what `run_folder.py` writes by the same names.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA = "specbench.run/1"  # of summary.json
KINDS = ("target", "train", "evaluate", "speed", "serve")  # the verbs that write a run folder: root/runs/KIND/NAME
# Stages with another output (prompts, answers, a cache, ...): a run on W&B without a run folder.
OUTPUTS = ("prompts", "answers", "cache", "calibrate", "tune", "speed-train")
UNTRAINED = ("ngram", "oracle", "suffix", "suffix_all")  # drafts without weights, by the names of their methods
TIMED = ("speed", "speed-train")  # what measures seconds
FINISHED = "finished"  # the status of a complete run; the others are running, failed and interrupted

# Any one of these in a folder makes it a run folder.
MARKS = ("summary.json", "config.yaml", "provenance.json", "records.parquet")
# What W&B holds of a run folder, in the folder MIRROR (W&B has a config.yaml of its own beside it).
MIRRORED = ("summary.json", "config.yaml", "provenance.json", "metrics.jsonl", "records.parquet")
MIRROR = "record"
# What a run that starts over removes of the one before it; config.yaml is written anew at once.
WRITTEN = (*(file for file in MIRRORED if file != "config.yaml"), "rounds.jsonl", "dirty.diff", "tracking.json")
STEP = "trainer/global_step"  # the step that curves on W&B are drawn over

# Of records.parquet, in the metadata of the file. Version 1 stated none and had no prompt_hash; version 2 had no trees.
RECORDS_SCHEMA = "specbench.records/3"
RECORDS_READABLE = (None, "specbench.records/2", RECORDS_SCHEMA)
COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("run", "method", "target", "suite", "benchmark", "domain", "prompt_id")),
        ("turn", pa.int64()),
        ("temperature", pa.float64()),
        ("scheduler", pa.string()),
        ("accounting", pa.string()),
        ("thinking", pa.string()),
        ("seed", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("truncated", pa.bool_()),
        *((name, pa.int64()) for name in ("rounds", "committed", "proposed", "accepted")),
        ("seconds", pa.float64()),
        ("histogram", pa.list_(pa.list_(pa.int64()))),  # [proposed, accepted, count]
    ]
)
# What a record may hold beside, where any row of its file does.
OPTIONAL = pa.schema(
    [
        ("prompt_hash", pa.string()),  # of the prompt's token ids, as recorded_rounds.digest has it
        ("by_round", pa.list_(pa.list_(pa.int32()))),  # [proposed, accepted, committed], in order
        ("token_classes", pa.string()),  # a letter of TOKEN_CLASSES an output token
        ("teacher_forced", pa.list_(pa.list_(pa.float64()))),  # a slot: anchors, alpha, survived, reached
        # Of rounds with token trees, whose levels `proposed` and `histogram` count; `nodes`: all that was verified.
        ("tree", pa.string()),  # kind and size of the trees
        ("nodes", pa.int64()),
        ("by_rank", pa.list_(pa.list_(pa.int64()))),  # [depth, rank, offered, accepted]
        ("audit", pa.list_(pa.float64())),  # [] or position, gap, spacing of the first token that differs
    ]
)
TOKEN_CLASSES = {"d": "digits", "s": "whitespace", "c": "symbols", "w": "words", "x": "special"}
