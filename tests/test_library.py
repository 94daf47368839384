"""The package as a library: what a script or a notebook calls, without Hydra, on the embedded target."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import specbench as sb
from specbench.cli.assembly import composed
from specbench.data.prompts.suites import names, suite_of
from specbench.files.folder_lock import locked
from specbench.files.torch_checkpoints import read_checkpoint
from specbench.library.drafts import record_of
from specbench.runs.run_folder import read_summary

EMBEDDED = "package:data/embedded"
ROOT = Path(__file__).parents[1]
SMALL = {"layers": 1, "block_size": 3, "anchors": 6}


def answers(folder: Path, count: int = 10) -> Path:
    """Short conversations in the layout of `specbench answers`."""
    file = folder / "answers.jsonl"
    with open(file, "w") as lines:
        for n in range(count):
            question = {"role": "user", "content": f"What is {n + 11} + {n}?"}
            answer = {"role": "assistant", "content": f"{n + 11} + {n} = {2 * n + 11}, which is the answer."}
            row = {"id": f"a{n}", "messages": [question, answer], "source": "own"}
            lines.write(json.dumps({**row, "answer_tokens": None, "truncated": [False]}) + "\n")
    return file


@pytest.fixture(scope="module")
def target() -> sb.Target:
    torch.set_num_threads(1)
    return sb.Target.load(EMBEDDED, taps=[1, 3, 5])


@pytest.fixture(scope="module")
def cache(target: sb.Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    sb.TargetCache.build(target, answers(folder), folder / "cache", codec="fp32")
    return folder / "cache"


def data_of(cache: Path, **order) -> sb.TargetCache:
    return sb.TargetCache(cache, **{"samples_per_micro": 2, "validation_fraction": 0.3, "threads": 0} | order)


def module_of(target: sb.Target, **settings) -> sb.DraftTraining:
    draft = sb.DSpark.for_target(target, markov_rank=8, **SMALL)
    return sb.DraftTraining(draft, sb.Objective(ce=0.1, tv=0.9, confidence=1.0), log_every=1, lr=1e-2, **settings)


def same(one: sb.DraftTraining, other: sb.DraftTraining) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_whole_way_from_answers_to_a_table(tmp_path: Path) -> None:
    target = sb.Target.load(EMBEDDED, taps=[1, 3, 5])
    data = sb.TargetCache.build(
        target, answers(tmp_path), tmp_path / "cache", samples_per_micro=2, validation_fraction=0.3, threads=0
    )
    draft = sb.DSpark.for_target(target, layers=2, block_size=7, anchors=6, markov_rank=8)
    before = {name: value.clone() for name, value in draft.state_dict().items()}
    module = sb.DraftTraining(draft, sb.Objective(ce=0.1, tv=0.9, confidence=1.0), log_every=1)
    probe = sb.DecodeProbe(target, every=2, max_new_tokens=8)
    logger = CSVLogger(tmp_path / "logs")
    trainer = sb.Trainer(max_steps=3, logger=logger, callbacks=[probe], enable_progress_bar=False)
    trainer.fit(module, data)
    assert trainer.global_step == 3
    assert [step for step, _ in probe.history] == [2, 3]
    assert any(not torch.equal(before[name], value) for name, value in draft.state_dict().items())
    logged = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    assert {"train/loss", "probe/accepted_length"} <= set(logged)

    asked = {"suite": "embedded", "temperature": 0, "limit": 2, "max_new_tokens": 12}
    result = sb.evaluate(target, draft, **asked)
    other = sb.evaluate(target, sb.MTP.for_target(target, block_size=3, start="random"), **asked)
    records = result.records
    assert len(records) == result.metrics["prompts"] == 6
    pooled = records["committed"].sum() / records["rounds"].sum()
    length = result.accepted_length
    assert length.value == pytest.approx(pooled)
    assert length.low <= length.value <= length.high
    assert length.count == records["rounds"].sum()
    assert str(length) == f"{length.value:.2f} [{length.low:.2f}, {length.high:.2f}]"
    assert float(result.acceptance_rate) == pytest.approx(records["accepted"].sum() / records["proposed"].sum())
    decay = result.metrics["suffix_decay"]["value"]
    assert str(result.suffix_decay) == "no value" if decay is None else float(result.suffix_decay) == decay
    first = result.conditional_acceptance.iloc[0]
    accepted = sum(count for cells in records["histogram"] for _, taken, count in cells if taken)
    assert first["conditional"] == pytest.approx(accepted / first["n"])
    assert result.plot_conditional_acceptance().axes[0].lines

    kept = result.save(tmp_path / "runs" / "evaluate" / "mine")
    compared = sb.compare([kept, other])
    table = compared.table()
    assert set(table["method"]) == {"dspark", "mtp"}
    own = table[table["method"] == "dspark"]
    assert own["rounds"].sum() == records["rounds"].sum()
    assert "dspark" in compared.markdown()
    assert sb.Evaluation(kept).accepted_length == length


def test_evaluating_leaves_nothing_behind(target: sb.Target, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    draft = sb.DFlash.for_target(target, **SMALL).train()
    result = sb.evaluate(target, draft, ["What is 3 + 4?", "Count to five."], max_new_tokens=6)
    assert draft.training
    assert list(result.records["benchmark"]) == ["own", "own"]
    assert "DFlash" not in repr(result) and "dflash" in repr(result)
    assert len(list(tmp_path.iterdir())) == 1
    del result
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="slots=9"):
        sb.evaluate(target, draft, ["one"], slots=9)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        sb.evaluate(target, draft, ["one"], max_new_tokens=0)
    assert not list(tmp_path.iterdir())


def test_the_command_line_and_the_library_give_the_same_records(target: sb.Target, tmp_path: Path) -> None:
    from experiments.evaluate import run
    from specbench.checkpoints.draft_folder import save_draft

    draft = sb.DSpark.for_target(target, markov_rank=8, **SMALL)
    settings = {name: value for name, value in draft.settings.items() if name != "anchors_per_sample"}
    save_draft(draft, tmp_path / "draft", target.config, settings)
    common = ["temperature=1.0", "max_new_tokens=10", "seed=3", "suite.limit=2", "tracking=disabled", "batch_size=4"]
    folder = run(composed("evaluate", [f"root={tmp_path}", f"draft={tmp_path / 'draft'}", *common]))
    loaded = sb.load_draft(tmp_path / "draft", target)
    asked = {"temperature": 1.0, "max_new_tokens": 10, "seed": 3, "limit": 2, "batch_size": 4}
    result = sb.evaluate(target, loaded, "embedded", **asked, folder=tmp_path / "own")
    decided = lambda frame: frame.drop(columns=["run", "method", "seconds"])  # noqa: E731
    by_command, by_library = (pd.read_parquet(place / "records.parquet") for place in (folder, tmp_path / "own"))
    assert len(by_library) == 6
    pd.testing.assert_frame_equal(decided(by_library), decided(by_command))
    theirs, mine = (json.loads((place / "summary.json").read_text()) for place in (folder, tmp_path / "own"))
    assert theirs["metrics"]["accepted_length"] == mine["metrics"]["accepted_length"]
    assert theirs["protocol"] == mine["protocol"]
    assert theirs["lineage"]["draft"] == mine["lineage"]["draft"]
    with pytest.raises(ValueError, match="is not empty"):
        sb.evaluate(target, loaded, "embedded", folder=tmp_path / "own")
    assert str(result.folder) == str(tmp_path / "own")


@pytest.mark.parametrize("name", names())
def test_a_suite_by_name_is_the_one_that_the_command_line_composes(name: str) -> None:
    from hydra.utils import instantiate

    composition = composed("evaluate", ["draft=plain", f"suite={name}"])
    theirs, mine = instantiate(composition.suite, _convert_="all"), suite_of(name)
    assert mine.benchmarks == theirs.benchmarks
    for fact in ("name", "limit", "turns", "seed", "folder"):
        assert getattr(mine, fact) == getattr(theirs, fact), fact


def test_an_unknown_suite_is_named_with_those_that_are_there(target: sb.Target) -> None:
    with pytest.raises(ValueError, match=r"suite='qick' is none of .*quick"):
        sb.evaluate(target, None, "qick")


def test_a_stock_trainer_fits_validates_and_tests(target: sb.Target, cache: Path, tmp_path: Path) -> None:
    data, module = data_of(cache), module_of(target)
    trainer = L.Trainer(max_steps=3, default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 3
    assert module.steps_in_all == 3
    (validated,) = trainer.validate(module, datamodule=data, verbose=False)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert validated["val/expected_length"] > 0
    assert {key.removeprefix("val/"): value for key, value in validated.items()} == {
        key.removeprefix("test/"): value for key, value in tested.items()
    }
    mine = module_of(target)
    sb.Trainer(max_steps=3, accelerator="cpu", enable_progress_bar=False).fit(mine, data_of(cache))
    assert same(module, mine)


def test_the_schedule_follows_the_trainers_epochs(target: sb.Target, cache: Path) -> None:
    data, module = data_of(cache), module_of(target)
    trainer = sb.Trainer(max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    trainer.fit(module, data)
    assert module.steps_in_all == trainer.global_step == 2 * data.steps_per_epoch > 2
    with pytest.raises(ValueError, match=r"give Trainer\(max_steps=N\)"):
        sb.Trainer(max_time="00:00:01:00", accelerator="cpu", enable_progress_bar=False).fit(module_of(target), data)


@pytest.mark.parametrize("setting", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 4}], ids=str)
def test_what_belongs_to_the_module_is_refused_by_the_trainer(setting, target: sb.Target, cache: Path) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}.*set"):
        sb.Trainer(max_steps=1, **setting)
    stock = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, **setting)
    with pytest.raises(Exception, match="not supported for manual optimization"):
        stock.fit(module_of(target), datamodule=data_of(cache))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", "64-true", "bf16-true", "16-true"])
def test_every_precision_trains_or_is_refused(precision: str, target: sb.Target, cache: Path) -> None:
    module, data = module_of(target), data_of(cache)
    trainer = sb.Trainer(max_steps=1, precision=precision, accelerator="cpu", enable_progress_bar=False)
    if precision in ("bf16-mixed", "32-true"):
        before = module.draft.norm.weight.clone()
        trainer.fit(module, data)
        assert module.draft.norm.weight.dtype == torch.float32
        assert not torch.equal(before, module.draft.norm.weight)
    else:
        with pytest.raises(ValueError, match=f"precision={precision}"):
            trainer.fit(module, data)


def test_standard_callbacks_watch_the_probe_and_validation(target: sb.Target, cache: Path, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="probe/accepted_length", mode="max", every_n_train_steps=1)
    early = EarlyStopping("val/expected_length", mode="max", patience=1, min_delta=100.0)
    callbacks = [sb.DecodeProbe(target, every=1, max_new_tokens=6), best, early, LearningRateMonitor()]
    logger = CSVLogger(tmp_path / "logs")
    trainer = sb.Trainer(
        max_steps=50,
        accelerator="cpu",
        callbacks=callbacks,
        logger=logger,
        val_check_interval=1,
        enable_progress_bar=False,
    )
    trainer.fit(module_of(target), data_of(cache))
    assert trainer.global_step == 2, "the second validation is not better by 100"
    assert float(best.best_model_score) == pytest.approx(max(length for _, length in callbacks[0].history))
    logged = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    assert logged["lr-AdamW"].max() > 0
    assert {"train/loss", "val/expected_length", "probe/accepted_length"} <= set(logged)


class Terminate(L.Callback):
    """SIGTERM, as a batch system sends it, after the first optimiser step."""

    def on_train_batch_end(self, trainer, module, *args) -> None:
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_training_in_one_call_is_a_run_that_continues_and_can_be_evaluated(
    target: sb.Target, cache: Path, tmp_path: Path
) -> None:
    def train(folder: str, **settings) -> sb.Trained:
        return sb.train(
            module_of(target, ema=0.5),
            data_of(cache),
            tmp_path / folder,
            max_steps=3,
            probe=sb.DecodeProbe(target, every=1, max_new_tokens=8),
            method="mine",
            training_seed=4,
            accelerator="cpu",
            **settings,
        )

    made = train("whole")
    lengths = dict(made.summary["probes"])
    assert made.step == min(step for step, length in lengths.items() if length == max(lengths.values()))
    assert made.summary["probe_accepted_length"] == max(lengths.values())
    loaded = sb.load_draft(tmp_path / "whole", target)
    assert all(torch.equal(value, made.draft.state_dict()[name]) for name, value in loaded.state_dict().items())
    known = record_of(str(tmp_path / "whole"), tmp_path / "whole" / "draft", target.name)
    assert (known.method, known.seed, known.costs["training_tokens"]) == ("mine", 4, made.summary["trained_tokens"])
    with pytest.raises(ValueError, match="holds a finished training"):
        train("whole")

    with pytest.raises(KeyboardInterrupt):
        train("stopped", callbacks=[Terminate()])
    assert read_summary(tmp_path / "stopped")["status"] == "interrupted"
    with pytest.raises(ValueError, match="of other settings"):
        sb.train(module_of(target), data_of(cache), tmp_path / "stopped", max_steps=3)
    again = train("stopped")
    assert again.summary["lineage"] == made.summary["lineage"]
    assert again.summary["probes"] == made.summary["probes"]
    with pytest.raises(ValueError, match="is not empty and holds no training"):
        sb.train(module_of(target), data_of(cache), cache, max_steps=3)
    (tmp_path / "taken").mkdir()
    with (
        locked(tmp_path / "taken", tmp_path / "taken", warnings.warn),
        pytest.raises(ValueError, match="taken is being written by process"),
    ):
        train("taken")


class Fail(L.Callback):
    def on_train_batch_end(self, trainer, module, *args) -> None:
        raise OSError("full disk")


def test_a_training_that_fails_leaves_the_signals_as_they_were(target: sb.Target, cache: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError, match="full disk"):
        sb.train(
            module_of(target), data_of(cache), tmp_path / "run", max_steps=2, callbacks=[Fail()], accelerator="cpu"
        )
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_probe_judges_every_training_anew_and_threads_train(target: sb.Target, cache: Path, tmp_path: Path) -> None:
    probe = sb.DecodeProbe(target, every=1, max_new_tokens=8)
    probe.best, probe.history = 1e9, [(1, 1e9)]  # as an earlier training left them

    def train() -> sb.Trained:
        return sb.train(
            module_of(target), data_of(cache), tmp_path / "run", max_steps=1, probe=probe, accelerator="cpu"
        )

    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(train).result()
    assert made.step == 1 and [step for step, _ in made.summary["probes"]] == [1] and probe.best < 1e9


def test_an_interrupted_training_continues_with_its_own_length_and_data_only(
    target: sb.Target, cache: Path, tmp_path: Path
) -> None:
    def train(steps: int, **order) -> sb.Trained:
        callbacks, place = [Terminate()], tmp_path / "run"
        data = data_of(cache, **order)
        return sb.train(module_of(target), data, place, max_steps=steps, callbacks=callbacks, accelerator="cpu")

    with pytest.raises(KeyboardInterrupt):
        train(3)
    for steps, order, said in ((4, {}, "max_steps=3, and this one has 4"), (3, {"seed": 5}, "in another order")):
        with pytest.raises(ValueError, match=said):
            train(steps, **order)
    with pytest.raises(ValueError, match="max_steps=0"):
        train(0)


def test_what_lightning_would_ignore_is_refused(target: sb.Target, cache: Path, tmp_path: Path) -> None:
    by_clock = ModelCheckpoint(tmp_path, train_time_interval=timedelta(hours=1))
    with pytest.raises(ValueError, match="every_n_train_steps"):
        L.Trainer(max_steps=1, accelerator="cpu", logger=False, callbacks=[by_clock]).fit(
            module_of(target), datamodule=data_of(cache)
        )
    early = EarlyStopping("val/expected_length")
    with pytest.raises(ValueError, match=r"validate_every=None.*asks for none"):
        sb.train(module_of(target), data_of(cache), tmp_path / "early", max_steps=1, callbacks=[early])


@pytest.mark.parametrize("method", ["DSpark", "DFlash", "Eagle3", "MTP"])
@pytest.mark.parametrize("where", ["target", "checkpoint", "given"])
def test_a_checkpoint_alone_gives_the_module_back(
    method, where, target: sb.Target, cache: Path, tmp_path: Path
) -> None:
    settings = {"markov_rank": 8} if method == "DSpark" else {}
    draft = getattr(sb, method).for_target(target, **SMALL, **settings)
    if where != "target":
        draft.target_source = None
    ids = None
    if where == "given":
        ids = torch.arange(0, len(target.tables.embedding), 2)
        draft = getattr(sb, method).for_target(target, draft_vocabulary=ids, **SMALL, **settings)
    loss = sb.Objective(kl=0.5, tv=0.5, slot_weight={"exp": 4.0})
    module = sb.DraftTraining(draft, loss, lr=3e-3, ema=0.9, anchor_seed=5)
    trainer = sb.Trainer(max_steps=2, accelerator="cpu", enable_progress_bar=False)
    trainer.fit(module, data_of(cache))
    path = tmp_path / "kept.ckpt"
    trainer.save_checkpoint(path)
    assert ("target_tables" in read_checkpoint(path)) == (where == "checkpoint")
    again = sb.DraftTraining.load_from_checkpoint(path, target=target if where == "given" else None)
    assert same(module, again)
    assert type(again.draft) is type(draft)
    assert again.draft.settings == draft.settings
    assert again.draft.backbone == draft.backbone
    assert again.objective.settings == loss.settings
    assert (again.recipe, again.anchor_seed, again.ema) == (module.recipe, 5, 0.9)
    assert again.supervised == module.supervised > 0
    assert torch.equal(again.target_tables.head, target.tables.head)
    if ids is not None:
        assert torch.equal(again.draft.draft_vocabulary, ids)
    prompts = ["What is 3 + 4?", "Name a colour."]
    drafts = (module.published, again.published)
    one, two = (sb.evaluate(target, draft, prompts, max_new_tokens=8).records["by_round"].tolist() for draft in drafts)
    assert str(one) == str(two)


def test_a_password_in_the_address_of_the_tables_is_not_kept(target: sb.Target) -> None:
    module = module_of(target, tables_from={"cache": "https://reader:Zx81planted@shards.example/cache"})
    assert "Zx81planted" not in repr(module.hparams) and "Zx81planted" not in repr(module.tables_from)
    assert "shards.example/cache" in module.hparams["training"]["tables_from"]["cache"]


def test_a_checkpoint_that_does_not_say_how_it_was_built_is_refused(target: sb.Target, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "global_step": 1}, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"old\.ckpt does not say how its draft was built"):
        sb.DraftTraining.load_from_checkpoint(tmp_path / "old.ckpt", target=target)


def test_online_states_train_as_the_cache_does(target: sb.Target, cache: Path) -> None:
    order = {"samples_per_micro": 2, "validation_fraction": 0.3, "threads": 0}
    online = sb.OnlineTarget(target, cache.parent / "answers.jsonl", **order)
    modules = module_of(target), module_of(target)
    for module, data in zip(modules, (online, data_of(cache)), strict=True):
        sb.Trainer(max_steps=2, accelerator="cpu", enable_progress_bar=False).fit(module, data)
    one, two = (module.state_dict() for module in modules)
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)


def test_a_draft_says_what_was_chosen_for_it(target: sb.Target) -> None:
    draft = sb.DSpark.for_target(target, markov_rank=8, **SMALL)
    assert draft.mask_token_id == 3
    assert "mask_token_id=3 (<|mask|> of the tokenizer)" in repr(draft)
    assert "start=target" in repr(draft)
    last = target.layers[-1].self_attn.q_proj.weight
    assert torch.equal(draft.layers[-1].self_attn.q_proj.weight, last)
    state = torch.random.get_rng_state()
    one, two, three = (
        sb.DSpark.for_target(target, markov_rank=8, start="random", seed=seed, **SMALL).layers[0].mlp.up_proj.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    with pytest.raises(ValueError, match="start='elsewhere'"):
        sb.DSpark.for_target(target, start="elsewhere")
    with pytest.raises(ValueError, match="loaded without taps"):
        sb.DSpark.for_target(sb.Target.load(EMBEDDED, taps=[]))


def test_the_probe_says_when_nothing_is_held_out(target: sb.Target, cache: Path, caplog) -> None:
    probe = sb.DecodeProbe(target, every=1, max_new_tokens=4)
    with caplog.at_level(logging.WARNING, "specbench"):
        sb.Trainer(max_steps=1, accelerator="cpu", callbacks=[probe], enable_progress_bar=False).fit(
            module_of(target), data_of(cache, validation_fraction=0.0)
        )
    assert "trained on" in caplog.text
    rendered = target.tokenizer.decode(probe.prompts[0])
    assert "What is" in rendered and "which is the answer" not in rendered


METHODS = {"DSpark": "dspark", "DFlash": "dflash", "Eagle3": "eagle3", "MTP": "mtp", "PEagle": "p_eagle"}


@pytest.mark.parametrize("method", METHODS)
def test_a_constructor_names_the_settings_of_the_methods_yaml(method: str) -> None:
    import yaml

    held = yaml.safe_load((ROOT / "configs" / "method" / f"{METHODS[method]}.yaml").read_text())["draft"]
    parameters = inspect.signature(getattr(sb, method)).parameters
    assert not [p for p in parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for name, value in held.items():
        if name != "_target_":
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            default = parameters[name].default
            assert (list(default) if isinstance(default, tuple) else default) == value, name


def test_public_names_load_on_use_and_are_typed() -> None:
    assert set(sb.__all__) <= set(dir(sb))
    for name in sb.__all__:
        assert getattr(sb, name).__doc__, name
    stub = ast.parse((ROOT / "specbench" / "__init__.pyi").read_text())
    imported = {
        alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == sb.PUBLIC
    assert (ROOT / "specbench" / "py.typed").exists()
    code = "import sys, specbench; dir(specbench); sys.exit(bool({'torch', 'hydra', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    with pytest.raises(AttributeError, match="evaluate"):
        sb.evalute  # noqa: B018


def test_a_script_needs_no_hydra() -> None:
    names_used = ", ".join(f"specbench.{name}" for name in sb.__all__)
    code = f"import sys, specbench; {names_used}; sys.exit('hydra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def cells() -> list[str]:
    """The code of the notebook, cell by cell."""
    held = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in held if cell["cell_type"] == "code"]


@pytest.mark.long
def test_the_notebook_runs_from_top_to_bottom() -> None:
    found: dict[str, object] = {}
    for number, cell in enumerate(cells(), start=1):
        exec(compile(cell, f"cell {number}", "exec"), found)
    assert set(found["compared"].table()["method"]) == {"dspark", "dflash"}
    assert len(found["results"]["dspark"].records) == 36


def test_the_notebook_shows_what_it_made() -> None:
    held = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text())["cells"]
    outputs = [output for cell in held for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    named = {name for cell in cells() for name in re.findall(r"\bsb\.(\w+)", cell)}
    assert named <= set(sb.__all__)


def test_the_reference_page_lists_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert sorted(re.findall(r"^::: specbench\.(\w+)$", page, re.M)) == sorted(sb.__all__)


def documented(value: object) -> set[str]:
    """Arguments that the docstring of a function, or of a class and its bases, describes."""
    owners = value.__mro__ if inspect.isclass(value) else [value]
    text = "\n".join(inspect.cleandoc(one.__doc__ or "") for one in owners if one.__module__.startswith("specbench"))
    return set(re.findall(r"^ {4}\**(\w+): ", text, re.M))


def test_every_public_parameter_is_documented() -> None:
    called = [getattr(sb, name) for name in sb.__all__ if name != "Draft"]
    called += [sb.Target.load, sb.TargetCache.build, sb.Draft.for_target, sb.DraftTraining.load_from_checkpoint]
    missing = {one.__qualname__: sorted(set(inspect.signature(one).parameters) - documented(one)) for one in called}
    assert {name: names for name, names in missing.items() if names} == {}
