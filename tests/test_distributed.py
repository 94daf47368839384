"""Two processes (gloo) train and evaluate to what one process does."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file

from specbench.data.loading.online import OnlineTarget
from specbench.data.prompts.benchmarks import Benchmark, Benchmarks
from specbench.decoding.loop import Limits
from specbench.decoding.sampling import Sampling
from specbench.evaluation.draft_evaluation import DraftEvaluation, Protocol, merged
from specbench.losses.objective import Objective
from specbench.training.callbacks import DecodeProbe
from specbench.training.draft_training import DraftTraining
from tests import toys
from tests.data.tiny_target import talks
from tests.pipeline import prepare

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 5  # of 3 to an epoch; the third of an epoch has a micro-batch on the first rank alone


def ranks(work, *args) -> None:
    """Run work(rank, *args) in two processes as a launcher like torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_rank, (work, port, *args), nprocs=2, start_method="fork")


def _rank(rank: int, work, port: int, *args) -> None:
    about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in about.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    work(rank, *args)


def trainer(world: int, strategy: str = "ddp", **settings) -> L.Trainer:
    if strategy == "sharded":
        strategy = ModelParallelStrategy(world, 1, save_distributed_checkpoint=False)
    return L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy if world > 1 else "auto",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **settings,
    )


class Numbers(L.Callback):
    """Keeps what was logged."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, *args):
        measured = "train/data_wait_share"  # a time, which no two runs have in common
        self.seen |= {k: float(v) for k, v in trainer.callback_metrics.items() if k != measured}


def fresh(method: str):
    settings = {"anchors": 4} if method == "dspark" else {}
    return copy.deepcopy(toys.draft(method, **settings)).train()


def train(
    rank: int, world: int, folder: Path, method: str, strategy: str = "ddp", until: int = STEPS, **recipe
) -> None:
    """To optimiser step `until`, from last.ckpt of `folder` if an earlier call left one there."""
    owner = toys.target()
    data = OnlineTarget(
        owner, talks(11, toys.VOCABULARY), samples_per_micro=2, micro_batches_per_step=2, threads=0, balance=False
    )
    draft = fresh(method)
    terms = {"ce": 0.1, "tv": 0.9, "confidence": 1.0} if method == "dspark" else {"kl": 1.0}
    objective = Objective(**terms, slot_weight={"exp": 4.0})
    module = DraftTraining(
        draft, objective, target_tables=owner.tables, max_steps=STEPS, lr=1e-2, log_every=1, **recipe
    )
    kept = folder / f"{world}-{strategy}"
    probe = DecodeProbe(owner, [[0, 3, 1], [2, 2], [4]], every=2, max_new_tokens=6, folder=kept)
    numbers = Numbers()
    one = trainer(world, strategy, max_steps=until, callbacks=[probe, numbers])
    last = kept / "last.ckpt"
    one.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    one.strategy.barrier()
    weights = torch.load(last, weights_only=False)["state_dict"]
    found = {"weights": weights, "numbers": numbers.seen, "supervised": module.supervised}
    torch.save(found | {"probe": probe.history}, folder / f"{world}-{rank}.pt")


def _train(rank: int, folder: Path, method: str, strategy: str, recipe: dict) -> None:
    train(rank, 2, folder, method, strategy, **recipe)


@pytest.mark.parametrize(
    "method, strategy, recipe",
    [
        ("dspark", "ddp", {}),
        ("dspark", "sharded", {"ema": 0.5}),
        pytest.param("eagle3", "ddp", {}, marks=pytest.mark.long),
        pytest.param("eagle3", "sharded", {}, marks=pytest.mark.long),
    ],
)
def test_two_ranks_train_to_the_weights_of_one(method, strategy, recipe, tmp_path):
    before = fresh(method).state_dict()
    train(0, 1, tmp_path, method, **recipe)
    ranks(_train, tmp_path, method, strategy, recipe)
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    moved = max((one["weights"][f"draft.{k}"] - before[k]).abs().max() for k in before)
    assert moved > 1e-2, "training moved nothing"
    for other in two:
        for name, weight in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], weight, atol=1e-6, rtol=1e-6, msg=name)
        assert other["supervised"] == one["supervised"]
        assert other["probe"] == one["probe"]
        assert other["numbers"].keys() == one["numbers"].keys()
        for name, value in one["numbers"].items():
            assert other["numbers"][name] == pytest.approx(value, rel=1e-5, nan_ok=True), name


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.long), "sharded"])
def test_an_interrupted_run_continues_from_its_checkpoint(strategy, tmp_path):
    recipe = {"ema": 0.5}
    train(0, 1, tmp_path, "dspark", **recipe)
    for until in (2, STEPS):
        ranks(_train, tmp_path, "dspark", strategy, recipe | {"until": until})
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0"))
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=1e-6, rtol=1e-6, msg=name)
    assert two["probe"] == one["probe"] and two["supervised"] == one["supervised"]


@pytest.mark.parametrize(
    "tensor_parallel, compile, said",
    [(2, False, "tensor_parallel_size=2"), (1, True, "recipe.compile=true")],
)
def test_what_a_sharded_draft_cannot_do_is_refused(tensor_parallel, compile, said):
    owner = toys.target()
    module = DraftTraining(fresh("dspark"), Objective(ce=1.0), target_tables=owner.tables, max_steps=1, compile=compile)
    sizes = {"tensor_parallel": SimpleNamespace(size=lambda: tensor_parallel)}
    module._device_mesh = sizes
    with pytest.raises(ValueError, match=said):
        module.configure_model()


def evaluate(rank: int, world: int, folder: Path) -> None:
    suite = Benchmarks("toys", [Benchmark(n, "toy") for n in ("long", "short", "one")], prompts=folder / "prompts")
    protocol = Protocol(Sampling(1.0), Limits(8, batch_size=2))
    labels = {"run": "r", "method": "dspark", "target": "toy", "suite": "toys", "seed": 0}
    module = DraftEvaluation(toys.target(), toys.draft("dspark"), protocol, folder / str(world), labels)
    run = trainer(world)
    values = run.test(module, datamodule=suite, verbose=False)
    (folder / f"{world}-{rank}.json").write_text(json.dumps(values[0]))


def _evaluate(rank: int, folder: Path) -> None:
    evaluate(rank, 2, folder)


def test_two_ranks_evaluate_to_the_records_of_one(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name, count in (("long", 5), ("short", 4), ("one", 1)):
        rows = [json.dumps({"prompt_ids": [(i + k) % 5 for k in range(1 + i)]}) for i in range(count)]
        (tmp_path / "prompts" / f"{name}.jsonl").write_text("\n".join(rows))
    evaluate(0, 1, tmp_path)
    ranks(_evaluate, tmp_path)

    def untimed(item) -> tuple[dict, dict]:
        return tuple({k: v for k, v in part.items() if "seconds" not in k} for part in (item.record, item.rounds))

    one, two = ([untimed(item) for item in merged(tmp_path / world)] for world in "12")
    assert len(one) == 10
    assert [r["output_ids"] for _, r in two] == [r["output_ids"] for _, r in one]
    for (record, rounds), (other_record, other_rounds) in zip(one, two, strict=True):
        confidence, other = rounds.pop("confidence"), other_rounds.pop("confidence")
        assert record == other_record and rounds == other_rounds
        torch.testing.assert_close(torch.tensor(confidence), torch.tensor(other), atol=1e-5, rtol=1e-5)
    expected = json.loads((tmp_path / "1-0.json").read_text())
    for rank in (0, 1):
        assert json.loads((tmp_path / f"2-{rank}.json").read_text()) == pytest.approx(expected, nan_ok=True)


SHARDED = (
    "trainer.lightning.strategy={_target_: lightning.pytorch.strategies.ModelParallelStrategy, data_parallel_size: 2, "
    "tensor_parallel_size: 1, save_distributed_checkpoint: false}"
)


@pytest.mark.long
def test_the_command_line_trains_on_two_devices_to_the_draft_of_one(tmp_path):
    """A sweep of two trainings starts ranks twice and leaves one evaluation a training."""
    prepared = [word for word in prepare(tmp_path) if not word.startswith("tracking=")]
    command = [sys.executable, "-m", "experiments.cli", "train", *prepared, "trainer.data.micro_batches_per_step=2"]
    command += ["tracking=offline", "trainer.probe.every=1", "limit=1", "target=embedded", "method=dspark"]
    command += ["trainer.lightning.accelerator=cpu"]
    two = "trainer.lightning.devices=2"
    ways = {
        "one": ["evaluate=false"],
        "ddp": ["--multirun", "seed.init=0,1", two, "trainer.lightning.strategy=ddp"],
        "sharded": [two, SHARDED, "evaluate=false"],
    }
    drafts, probes = {}, {}
    for name, words in ways.items():
        known = set((tmp_path / "runs").glob("train/*"))
        subprocess.run([*command, *words], check=True, timeout=300, cwd=REPOSITORY)
        for folder in set((tmp_path / "runs").glob("train/*")) - known:
            summary, key = json.loads((folder / "summary.json").read_text()), (name, "-s1-" in folder.name)
            drafts[key], probes[key] = load_file(folder / "draft" / "model.safetensors"), summary["probes"]
    assert set(drafts) == {("one", False), ("ddp", False), ("ddp", True), ("sharded", False)}
    expected = drafts["one", False]
    for name in ("ddp", "sharded"):
        assert probes[name, False] == probes["one", False]
        for key, weight in expected.items():
            torch.testing.assert_close(drafts[name, False][key], weight, atol=1e-5, rtol=1e-5, msg=f"{name} {key}")
    assert any((drafts["ddp", True][key] - weight).abs().max() > 1e-2 for key, weight in expected.items())
    evaluated = sorted((tmp_path / "runs" / "evaluate").iterdir())
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in evaluated]
    assert sorted(summary["training_seed"] for summary in summaries) == [0, 1]
    for folder, summary in zip(evaluated, summaries, strict=True):
        asked = [(r["benchmark"], r["prompt_id"]) for r in map(json.loads, (folder / "rounds.jsonl").open())]
        assert summary["status"] == "finished" and 0 < len(set(asked)) == len(asked) == summary["metrics"]["prompts"]
