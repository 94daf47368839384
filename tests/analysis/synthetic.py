"""Run folders written by hand in the documented format, with rounds drawn from a known law."""

from __future__ import annotations

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
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "records.parquet")
    return folder


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
