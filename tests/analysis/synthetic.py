"""Run folders written by hand in the documented format, with rounds drawn from a known distribution."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

DOMAINS = {"gsm8k": "math", "mbpp": "code", "alpaca": "chat"}
EASE = {"gsm8k": 0.85, "mbpp": 0.75, "alpaca": 0.6}
# Conditional acceptance of slot k is EASE * LEVEL - DECAY * (k - 1): known curves with a known order.
LEVEL = {"dspark": 1.05, "dflash": 1.0, "eagle3": 0.95, "mtp": 0.85}
DECAY = {"dspark": 0.0, "dflash": 0.03, "eagle3": 0.005, "mtp": 0.04}
TEXT = ("run", "method", "target", "suite", "benchmark", "domain", "prompt_id")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in TEXT),
        ("turn", pa.int64()),
        ("temperature", pa.float64()),
        ("scheduler", pa.string()),
        ("accounting", pa.string()),
        ("thinking", pa.bool_()),
        *((name, pa.int64()) for name in ("seed", "prompt_tokens", "output_tokens")),
        ("truncated", pa.bool_()),
        *((name, pa.int64()) for name in ("rounds", "committed", "proposed", "accepted")),
        ("seconds", pa.float64()),
        ("histogram", pa.list_(pa.list_(pa.int64()))),
    ]
)


def record(rounds: list[tuple[int, int]], stops: int = 0, **facts) -> dict:
    """One row from rounds (proposed, accepted); `stops` of them were ended by an accepted stop token."""
    accepted = sum(a for _, a in rounds)
    committed = accepted + len(rounds) - stops
    row = {
        "run": "run",
        "method": "dspark",
        "target": "qwen3_4b",
        "suite": "paper",
        "benchmark": "gsm8k",
        "domain": "math",
        "prompt_id": "p0",
        "turn": 0,
        "temperature": 0.0,
        "scheduler": "fixed",
        "accounting": "specbench",
        "thinking": False,
        "seed": 0,
        "prompt_tokens": 20,
        "output_tokens": committed + 1,
        "truncated": False,
        "rounds": len(rounds),
        "committed": committed,
        "proposed": sum(p for p, _ in rounds),
        "accepted": accepted,
        "seconds": 0.01 * len(rounds),
        "histogram": [[p, a, n] for (p, a), n in sorted(Counter(rounds).items())],
    }
    return row | facts


def write_run(root: Path, name: str, rows: list[dict], kind="evaluate", status="finished", config=None, **summary):
    """A run folder below root/runs/KIND/NAME; returns it."""
    folder = root / "runs" / kind / name
    folder.mkdir(parents=True)
    first = rows[0] if rows else {"method": "dspark", "target": "qwen3_4b", "suite": "paper"}
    named = {key: first[key] for key in ("method", "target", "suite")}
    facts = {"schema": "specbench.run/1", "kind": kind, "name": name, "status": status, **named, **summary}
    (folder / "summary.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text(yaml.safe_dump({**named, **(config or {})}))
    command = ["specbench", kind, f"method={named['method']}"]
    (folder / "provenance.json").write_text(json.dumps({"command": command, "code": {"commit": "0123abcd"}}))
    if rows:
        rows = [{**row, "run": name} for row in rows]
        schema = SCHEMA
        if "prompt_hash" in rows[0]:
            schema = SCHEMA.append(pa.field("prompt_hash", pa.string()))
            schema = schema.with_metadata({"schema": "specbench.records/2"})
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "records.parquet")
    return folder


def hashed(rows: list[dict], text: str = "") -> list[dict]:
    """The same records with hashes of their prompts; another `text` stands for other tokens under the same ids."""
    return [
        {**row, "prompt_hash": hashlib.sha256(f"{row['prompt_id']} {row['turn']} {text}".encode()).hexdigest()[:16]}
        for row in rows
    ]


PROTOCOL = {
    "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_new_tokens": 128, "stop_token_ids": [2],
    "scheduler": "fixed", "slots": 7, "accounting": "specbench", "thinking": "off", "turns": "all",
    "dtype": "float32", "batch_size": 16,
}  # fmt: skip


def train(root: Path, name: str, seed: int = 0, summary: dict | None = None, **config) -> Path:
    """A training run whose settings are `config` over a few common ones, dotted keys as they are."""
    settings = {
        "root": str(root), "name": name, "cache": str(root / "cache" / "feed"),
        "seed": {"init": seed, "data": seed, "anchors": seed}, "limit_samples": None, "start": "target",
        "method": {"name": "eagle3", "draft": {"layers": 1, "block_size": 7}, "objective": {"kl": 1.0}, "window": None},
        "target": {"name": "qwen3_4b", "target_layer_ids": [1, 2, 3], "id": str(root / "target")},
        "trainer": {"max_steps": 300, "recipe": {"lr": 0.002, "log_every": 10}, "lightning": {"devices": 1}},
    }  # fmt: skip
    for key, value in config.items():
        *path, last = key.split(".")
        place = settings
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    facts = {"parameters": 1000, "lineage": {"cache": {"fingerprint": "feed0000"}, "checkpoint": f"draft-{name}"}}
    return write_run(root, name, [], kind="train", config=settings, **{**facts, **(summary or {})})


def evaluation(
    root: Path, name: str, trained: Path | None = None, seed: int = 0, rows: list[dict] | None = None,
    protocol: dict | None = None, weights: str | None = None, prompts: int = 8, **config,
) -> Path:  # fmt: skip
    """An evaluation as this version writes them, of the draft of `trained` or one that was brought along."""
    stated = PROTOCOL | (protocol or {})
    facts = {key: stated[key] for key in ("temperature", "scheduler", "accounting")}
    rows = rows if rows is not None else hashed(simulate("eagle3", prompts, seed))
    rows = [{**row, **facts, "method": "eagle3", "seed": seed} for row in rows]
    lineage = {"draft": weights or f"draft-{trained.name}", "target": "target-weights"}
    lineage["parents"] = [] if trained is None else [str(trained)]
    settings = {"root": str(root), "name": name, "draft": str(trained or root / "mine"), "seed": 0, "batch_size": 16}
    settings |= {"max_new_tokens": stated["max_new_tokens"], "suite": {"limit": prompts}, **config}
    return write_run(root, name, rows, config=settings, lineage=lineage, protocol=stated)


def clock(root: Path, name: str, trained: Path, speedup: float, weights: str | None = None, **protocol) -> Path:
    """A run against the clock of the draft of `trained`."""
    lineage = {"draft": weights or f"draft-{trained.name}", "target": "target-weights", "parents": [str(trained)]}
    numbers = {"speedup_measured": speedup, "speedup_low": speedup - 0.1, "speedup_high": speedup + 0.1}
    stated = PROTOCOL | {"batch_size": 1} | protocol
    numbers |= {"speedup_predicted": 1.0, "metrics": {"accepted_length": 2.5}}
    return write_run(root, name, [], kind="speed", lineage=lineage, protocol=stated, **numbers)


def simulate(method: str, prompts: int, seed: int = 0, slots: int = 7, **facts) -> list[dict]:
    """Records of `prompts` prompts on each of three benchmarks. A prompt's ease is shared by all methods."""
    rows = []
    for b, (benchmark, domain) in enumerate(DOMAINS.items()):
        shared = np.random.default_rng([b, 5])
        own = np.random.default_rng([b, seed, *method.encode()])
        ease = EASE[benchmark] + shared.normal(0, 0.08, prompts)
        for p in range(prompts):
            alpha = np.clip(LEVEL[method] * ease[p] - DECAY[method] * np.arange(slots), 0.02, 0.99)
            hits = own.random((int(own.integers(5, 30)), slots)) < alpha
            rounds = [(slots, int(a)) for a in hits.cumprod(1).sum(1)]
            place = {"benchmark": benchmark, "domain": domain, "prompt_id": f"{benchmark}-{p}"}
            rows.append(record(rounds, method=method, seed=seed, **place, **facts))
    return rows
