"""Repeating a run from its record alone: the same numbers, and every difference named."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from experiments import rerun, sync
from specbench.cli.stages import container
from specbench.cli.verbs import VERBS
from specbench.runs.provenance import provenance
from specbench.runs.run_folder import RunFolder
from tests.test_runfolder import RECORD


def evaluate(cfg: DictConfig) -> None:
    """A small seeded verb in the shape of the real ones."""
    accepted = (cfg.seed * 7919) % 29 if cfg.get("drift") is None else cfg.drift
    with RunFolder(cfg.root, "evaluate", cfg.name, container(cfg)) as folder:
        facts, diff = provenance(["specbench", "evaluate"], {"decoding": cfg.seed}, OmegaConf.to_container(cfg.cache))
        folder.write_provenance(facts, diff)
        folder.write_records([{**RECORD, "run": cfg.name, "accepted": accepted, "seconds": id(folder) % 97}])
        length = {"value": 1 + accepted / 4, "n": 4}
        folder.finish(metrics={"accepted_length": length, "tokens_per_second": id(folder) % 89})


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("specbench.runs.provenance.SOURCE", tmp_path)  # a checkout at work may change between two runs
    module = types.ModuleType("seeded_verb")
    module.run = evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "seeded_verb", module)
    monkeypatch.setitem(VERBS, "evaluate", replace(VERBS["evaluate"], module="seeded_verb"))
    cache = tmp_path / "cache" / "feed"
    cache.mkdir(parents=True)
    (cache / "manifest.json").write_text('{"fingerprint": "feed"}')
    settings = {"root": str(tmp_path), "name": "one", "seed": 3}
    evaluate(OmegaConf.create({**settings, "cache": {"folder": str(cache), "fingerprint": "feed"}}))
    return tmp_path / "runs" / "evaluate" / "one"


def settings(run: Path, **changed: object) -> DictConfig:
    base = {
        "run": str(run),
        "name": None,
        "root": None,
        "seconds": False,
        "strict": True,
        "force": False,
        "classes": [],
    }
    return OmegaConf.create({**base, **changed})


def test_the_same_machine_gives_the_same_numbers(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = rerun.run(settings(recorded))
    assert new == recorded.with_name("one-rerun")
    assert "all equal" in capsys.readouterr().out
    # every record column but the run's name and the seconds, and two numbers of the one metric without a clock
    assert rerun.compare(recorded, new) == ([], len(RECORD) - 2 + 2)


def test_numbers_that_differ_are_named(recorded: Path) -> None:
    file = recorded / "config.yaml"
    file.write_text(file.read_text() + "drift: 28\n")
    with pytest.raises(ValueError, match="0 facts and 2 numbers differ"):
        rerun.run(settings(recorded))
    unequal, _ = rerun.compare(recorded, recorded.with_name("one-rerun"))
    assert unequal == ["metrics.accepted_length.value: 2.5 -> 8.0", "records[m-1, 0].accepted: 6 -> 28"]


def test_facts_that_differ_are_named(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recorded / "provenance.json"
    text = file.read_text()
    file.write_text(text.replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    (recorded.parents[2] / "cache" / "feed" / "manifest.json").write_text('{"fingerprint": "beef"}')
    with pytest.raises(ValueError, match="2 facts and 0 numbers differ"):
        rerun.run(settings(recorded))
    errors = capsys.readouterr().err
    assert f"versions.torch: 1.0 -> {torch.__version__}" in errors and "feed -> beef" in errors


def test_threads_that_the_verb_sets_are_compared_where_it_has_set_them(
    recorded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process counts two threads until the verb sets one, as it did when the run was recorded."""
    counted = [torch.get_num_threads() + 1]
    monkeypatch.setattr("specbench.runs.provenance.torch.get_num_threads", lambda: counted[0])
    verb = sys.modules["seeded_verb"].run

    def settled(cfg: DictConfig) -> None:
        counted[0] -= 1
        verb(cfg)

    monkeypatch.setattr(sys.modules["seeded_verb"], "run", settled)
    rerun.run(settings(recorded))
    assert "threads" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="1 facts and 0 numbers differ"):  # now it runs with one thread less
        rerun.run(settings(recorded, name="fewer"))
    assert "hardware.threads" in capsys.readouterr().err


def test_it_does_not_overwrite_what_it_repeats(recorded: Path) -> None:
    with pytest.raises(ValueError, match="would overwrite"):
        rerun.run(settings(recorded, name="one"))


def test_sync_without_runs_and_without_a_key(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    assert sync.run(OmegaConf.create({"root": str(recorded.parents[2]), "run": None})) == []
    assert "nothing to upload" in capsys.readouterr().out
    (recorded / "tracking.json").write_text('{"artifacts": []}')
    log = recorded / "wandb" / "offline-run-1-ab" / "run-ab.wandb"
    log.parent.mkdir(parents=True)
    log.touch()
    with pytest.raises(ValueError, match="no W&B key"):
        sync.run(OmegaConf.create({"root": str(recorded.parents[2]), "run": None}))
    with pytest.raises(ValueError, match="no folder"):
        sync.run(OmegaConf.create({"root": "/nonexistent", "run": None}))
