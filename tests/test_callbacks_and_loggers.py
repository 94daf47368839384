"""Lightning's own callbacks and loggers, named on the command line: every option of both groups, run on the CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from experiments.cli import main
from specbench.cli.assembly import composed
from specbench.cli.identity import identity
from specbench.cli.lightning_parts import callbacks_of, loggers_of
from specbench.runs.run_folder import read_lines, read_summary
from tests.pipeline import prepare

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EVERY_STEP = ["trainer.probe.every=1", "trainer.validate_every=1", "trainer.recipe.log_every=1"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*prepare(tmp_path_factory.mktemp("outputs")), "method=mtp", "evaluate=false"]


def without_groups() -> DictConfig:
    """The settings of a run from before there were these groups."""
    cfg = composed("train")
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key not in ("callbacks", "logger")])


def trained(prepared: list[str], name: str, *words: str) -> Path:
    assert main(["train", *prepared, f"name={name}", *words]) == 0
    return Path(prepared[0].removeprefix("root=")) / "runs" / "train" / name


@pytest.mark.parametrize("entries", ["x", [1], {"x": 5}, {"x": {"monitor": "y"}}])
def test_a_record_with_anything_in_these_groups_is_refused_by_name(tmp_path: Path, entries: object) -> None:
    for group, built in (("callbacks", callbacks_of), ("logger", loggers_of)):
        with pytest.raises(ValueError, match=rf"^{group}"):
            built(OmegaConf.create({group: entries}), tmp_path)


def test_callbacks_and_loggers_do_what_their_options_say(prepared: list[str], capsys) -> None:
    folder = trained(
        prepared,
        "all",
        "callbacks=[default,learning_rate_monitor,early_stopping,model_checkpoint,model_summary]",
        "callbacks.early_stopping.patience=1",
        "callbacks.early_stopping.min_delta=100.0",
        "callbacks.model_checkpoint.save_top_k=2",
        "logger=csv",
        "trainer.max_steps=6",
        *EVERY_STEP,
    )
    summary = read_summary(folder)
    assert (summary["status"], summary["steps"]) == ("finished", 2), "the second probe is not longer by 100"
    assert [step for step, _ in summary["probes"]] == [1, 2]
    steps = [
        torch.load(file, weights_only=True)["global_step"] for file in (folder / "checkpoints/kept").glob("*.ckpt")
    ]
    assert sorted(steps) == [1, 2]
    lines, table = read_lines(folder / "metrics.jsonl"), pd.read_csv(folder / "csv" / "metrics.csv")
    rates = [line["lr-AdamW"] for line in lines if "lr-AdamW" in line]
    assert len(rates) == 2 and rates == table["lr-AdamW"].dropna().tolist()
    assert table["probe/accepted_length"].max() == summary["probe_accepted_length"]
    assert "layers" in capsys.readouterr().out, "the modules of the draft"


def test_without_callbacks_nothing_is_shown_and_the_probe_still_chooses(prepared: list[str], capsys) -> None:
    folder = trained(prepared, "bare", "callbacks=none", *EVERY_STEP)
    assert [step for step, _ in read_summary(folder)["probes"]] == [1, 2]
    assert {file.name for file in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    captured = capsys.readouterr()
    assert "it/s" not in captured.out + captured.err


@pytest.mark.parametrize("probe", ["null", "5"])
def test_the_step_that_a_callback_ends_at_is_kept(probe: str, prepared: list[str]) -> None:
    """EarlyStopping by validation, between two probes, or without any."""
    folder = trained(
        prepared,
        f"ended-{probe}",
        "callbacks=early_stopping",
        "callbacks.early_stopping.monitor=val/expected_length",
        "callbacks.early_stopping.patience=1",
        "callbacks.early_stopping.min_delta=100.0",
        "trainer.max_steps=6",
        "trainer.validate_every=1",
        f"trainer.probe.every={probe}",
    )
    summary = read_summary(folder)
    assert summary["steps"] == summary["best_step"] == 2
    lengths = [line["probe/accepted_length"] for line in read_lines(folder / "metrics.jsonl") if "probe/rounds" in line]
    assert len(summary["probes"]) == len(lengths) == (probe != "null")


TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


@pytest.mark.parametrize("option", ["tensorboard", "many"])
def test_event_files_are_written_or_the_package_is_asked_for(option: str, prepared: list[str], capsys) -> None:
    if TENSORBOARD:
        folder = trained(prepared, option, f"logger={option}")
        assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
        assert (folder / "csv" / "metrics.csv").exists() == (option == "many")
    else:
        assert main(["train", *prepared, f"name={option}", f"logger={option}"]) == 2
        assert "logger.tensorboard cannot be made" in (said := capsys.readouterr().err) and "tensorboard" in said


def test_wandb_as_a_logger_is_tracking_online(prepared: list[str], monkeypatch, capsys) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "nowhere")
    words = [word for word in prepared if not word.startswith("tracking")]
    assert composed("train", ["logger=wandb"]).tracking.mode == "online"
    assert main(["train", *words, "logger=wandb"]) == 2
    assert "there is no W&B key" in capsys.readouterr().err


def test_every_option_is_run_here() -> None:
    text = Path(__file__).read_text()
    for group in ("callbacks", "logger"):
        for file in (CONFIGS / group).glob("*.yaml"):
            assert file.stem in text, f"{group}={file.stem}"


def test_what_only_watches_does_not_change_what_a_run_is() -> None:
    plain = identity("train", composed("train")).code
    old = without_groups()
    watched = ["callbacks=[default,learning_rate_monitor,model_checkpoint,model_summary]", "logger=csv"]
    assert identity("train", old).code == plain
    assert identity("train", composed("train", watched)).code == plain
    assert identity("train", composed("train", ["callbacks=none"])).code == plain
    assert identity("train", composed("train", ["callbacks=early_stopping"])).code != plain


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["callbacks=model_checkpoint", "callbacks.model_checkpoint.dirpath=/tmp/elsewhere"],
            "inside of the run folder",
        ),
        (["logger=csv", "logger.csv.name=../../elsewhere"], "inside of the run folder"),
        (["logger=csv", "logger.csv._target_=lightning.pytorch.callbacks.Timer"], "takes a Logger"),
        (["callbacks=progress", "callbacks.progress._target_=os.system"], "takes a Callback"),
        (["callbacks=early_stopping", "callbacks.early_stopping.patience=many"], "callbacks.early_stopping.patience"),
        (["callbacks=early_stoping"], "early_stopping"),
        (["callbacks=early_stopping", "trainer.validate_every=null"], "validate_every"),
        (
            ["callbacks=model_checkpoint", "+callbacks.model_checkpoint.train_time_interval={hours: 1}"],
            "callbacks.model_checkpoint",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_in_a_sentence(words: list[str], said: str, prepared: list[str], capsys) -> None:
    assert main(["train", *prepared, "name=refused", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_record_of_a_run_without_these_groups_builds_none(tmp_path: Path) -> None:
    cfg = without_groups()
    assert callbacks_of(cfg, tmp_path) == loggers_of(cfg, tmp_path) == []
    assert json.dumps(list(tmp_path.iterdir())) == "[]"
