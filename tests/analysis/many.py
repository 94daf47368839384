"""python -m tests.analysis.many [RUNS]: how long many run folders take to read, and to compare without figures.

Every run: 36 records of three benchmarks, and the configuration that `specbench evaluate` writes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from omegaconf import OmegaConf

from analysis.compare import compare
from analysis.read import runs
from specbench.cli import config_groups
from specbench.cli import overrides as composing
from tests.analysis.synthetic import LEVEL, simulate, write_run


def main(count: int) -> None:
    """Write `count` runs to a temporary folder, read them, compare them; prints seconds by the clock and by the CPU."""
    with config_groups.configs("configs"):
        cfg = composing.without_hydra(composing.compose("evaluate", ["draft=outputs/runs/train/some"]))
    config = OmegaConf.to_container(cfg, resolve=False)
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            method, seed = list(LEVEL)[number % 4], number // 4
            own = {**config, "seed": seed, "name": f"{method}-{seed}"}
            write_run(Path(name), f"{method}-{seed}", simulate(method, 12, seed), config=own)
        for what, work in {
            "read": lambda: runs.load(name),
            "compare": lambda: compare(name, Path(name) / "compare", draw=False),
        }.items():
            clock, processor = time.perf_counter(), time.process_time()
            work()
            took = f"{time.perf_counter() - clock:.1f} s, {time.process_time() - processor:.1f} s of processor time"
            print(f"{what} {count:,} runs, {36 * count:,} records: {took}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
