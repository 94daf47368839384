"""Ranks of a training on one node: Lightning starts all ranks after the first by repeating the command."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from omegaconf import DictConfig

MARKS = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank_and_world() -> tuple[int, int]:
    """Rank and number of ranks from torchrun, Slurm or Lightning's launcher; (0, 1) without a launcher."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if int(os.environ.get("NODE_RANK", 0)):
            raise ValueError("several nodes need a launcher that numbers their processes: use torchrun or Slurm")
        return int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def repeats_the_command() -> bool:
    """Whether Lightning started this process as a further rank of one training."""
    return int(os.environ.get("LOCAL_RANK", 0)) > 0 and not {"RANK", "SLURM_PROCID"} & set(os.environ)


@contextmanager
def ranks() -> Iterator[None]:
    """Around a training. Lightning takes its own marks in the environment for another launcher's, so that a second
    training of this process would wait for ranks that nobody starts; afterwards they are gone."""
    before = {name: os.environ.get(name) for name in MARKS}
    try:
        yield
        if dist.is_initialized():
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if not repeats_the_command():
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def as_command(words: Sequence[str]) -> Iterator[None]:
    """Context in which ranks that repeat the command run `specbench WORDS` and nothing else."""
    mine = sys.argv
    sys.argv = [mine[0], *words]
    try:
        yield
    finally:
        sys.argv = mine


def shards_of(lightning: DictConfig) -> int:
    """Number of ranks over which a draft is sharded: 1 unless the strategy is ModelParallel. ValueError for other
    sizes."""
    if isinstance(lightning.strategy, str):
        return 1
    size, devices, nodes = lightning.strategy.get("data_parallel_size", 1), lightning.devices, lightning.num_nodes
    if not isinstance(devices, int) or devices < 1 or size != devices * nodes:
        raise ValueError(
            f"trainer.lightning.strategy.data_parallel_size={size} with devices={devices} and num_nodes={nodes}: a "
            "draft is sharded over all ranks; give devices as a number and data_parallel_size as devices x num_nodes"
        )
    return size
