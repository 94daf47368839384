"""Who is which rank, and what a training on several devices leaves behind."""

from __future__ import annotations

import os
import sys

import pytest

from experiments.train import print_plan
from specbench.cli.assembly import composed
from specbench.cli.launching import MARKS, as_command, rank_and_world, ranks, repeats_the_command, shards_of

ALL = (*MARKS, "RANK", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.mark.parametrize(
    ("marks", "place", "repeats"),
    [
        ({}, (0, 1), False),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8), False),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, (2, 4), False),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2", "NODE_RANK": "0"}, (0, 2), False),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"}, (1, 2), True),
    ],
)
def test_every_launcher_numbers_its_ranks(monkeypatch, marks, place, repeats):
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    for name, value in marks.items():
        monkeypatch.setenv(name, value)
    assert rank_and_world() == place and repeats_the_command() == repeats


def test_a_second_node_needs_another_launcher(monkeypatch):
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "4", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun or Slurm"):
        rank_and_world()


def test_a_training_leaves_no_marks_of_its_ranks(monkeypatch):
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "here")
    with pytest.raises(KeyError), ranks():
        os.environ |= {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "there"}
        raise KeyError
    assert "LOCAL_RANK" not in os.environ and "WORLD_SIZE" not in os.environ and os.environ["MASTER_ADDR"] == "here"


def test_ranks_repeat_the_training_and_not_what_runs_it():
    mine = list(sys.argv)
    with as_command(["train", "seed.init=1"]):
        assert sys.argv == [mine[0], "train", "seed.init=1"]
    assert sys.argv == mine


def test_a_sharded_plan_divides_what_sharding_divides():
    plans = [print_plan(composed("train", ["target=qwen3_4b", f"trainer={name}"])) for name in ("node", "sharded")]
    assert plans[0].fixed - plans[1].fixed == pytest.approx((16 - 8 - 16 / 8) * plans[0].trainable)
    assert plans[0].per_sample == plans[1].per_sample


@pytest.mark.parametrize("change", ["devices=auto", "devices=-1", "num_nodes=2", "strategy.data_parallel_size=4"])
def test_a_draft_is_sharded_over_all_ranks(change):
    cfg = composed("train", ["trainer=sharded", f"trainer.lightning.{change}"])
    with pytest.raises(ValueError, match="devices x num_nodes"):
        shards_of(cfg.trainer.lightning)
    assert shards_of(composed("train", ["trainer=node"]).trainer.lightning) == 1
    assert shards_of(composed("train", ["trainer=sharded"]).trainer.lightning) == 8
