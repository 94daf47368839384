"""Every committed configuration composes; every method trains and decodes with the smoke budget."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from experiments import train
from experiments.cli import main
from experiments.quickstart import stage
from specbench.cli.assembly import composed
from specbench.cli.config_groups import configs
from specbench.cli.overrides import check
from specbench.cli.studies import jobs, question, study_of
from specbench.cli.verbs import VERBS
from specbench.runs.run_folder import read_settings, read_summary
from tests.pipeline import prepare

FOLDER = Path(__file__).resolve().parents[1] / "configs"
EXPERIMENTS = sorted(file.stem for file in (FOLDER / "experiment").glob("*.yaml"))
METHODS = sorted(file.stem for file in (FOLDER / "method").glob("*.yaml"))
# The verb whose configuration holds a group, and what an option of it needs beside it.
TAKEN_BY = {
    "data": "prompts",
    "profile": "serve",
    "scheduler": "evaluate",
    "suite": "evaluate",
    "tree": "evaluate",
    "stages": "reproduce",
    "suite/benchmark": None,
    "experiment": None,
}
NEEDS = {"target=folder": ["target.id=FOLDER", "target.name=NAME"], "profile=file": ["profile.path=FILE"]}
NEEDS["scheduler=calibrated"] = ["scheduler.calibration.path=FILE"]
OPTIONS = sorted(
    (str(file.parent.relative_to(FOLDER)), file.stem)
    for file in FOLDER.rglob("*.yaml")
    if file.parent != FOLDER and str(file.parent.relative_to(FOLDER)) != "experiment"
)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_composes(verb: str) -> None:
    assert composed(VERBS[verb].config) is not None


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str) -> None:
    top = "suite/benchmark" if group.startswith("suite/benchmark/") else group
    verb = TAKEN_BY.get(top, "train")
    if verb is None:
        cfg = composed("evaluate", [f"+{group}@suite.benchmarks.one={option}"])
        assert {"name", "domain", "version"} <= set(cfg.suite.benchmarks.one)
        return
    cfg = composed(VERBS[verb].config, [f"{group}={option}", *NEEDS.get(f"{group}={option}", [])])
    cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if not OmegaConf.is_missing(cfg, key)])
    OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_at_both_sizes(name: str) -> None:
    text = (FOLDER / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    for word in ("Axes:", "Seeds:", "Cost:", "Expected:", "Result:"):
        assert f"# {word}" in text
    study = study_of(name)
    assert study.question == question(text) and study.question.endswith("?")
    small = composed("train", study.trainings[-1])
    assert small.method.draft.get("anchors") in (24, None)
    large = composed("train", [*study.trainings[-1], "trainer=node"])
    assert large.method.draft.get("anchors") in (512, None)
    assert large.trainer.epochs == 10 and large.limit is None
    if study.evaluations:
        composed("evaluate", study.evaluations[-1])
    for simulation in study.simulations:
        composed("serve", [*simulation, "rounds=FOLDER", "policies.mtp_1.rounds=FOLDER"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_repeats_no_run_and_groups_by_its_axes(name: str) -> None:
    written = yaml.safe_load((FOLDER / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
    study, axes = study_of(name), written["hydra"]["sweeper"]["params"]
    combinations = study.evaluations or study.simulations or study.trainings
    assert len({tuple(job) for job in combinations}) == len(combinations)
    told = {"method.head": "head", "method.loss": "objective", "protocol.name": "protocol"}
    grouped = {told.get(key, key) for key in study.group_by}
    open_axes = {key for key, values in axes.items() if len(jobs({key: values})) > 1}
    assert grouped == open_axes - {"method", "seed.init", "profile"}


def test_a_shared_run_has_one_name_and_another_setting_another() -> None:
    first, second, third = (study_of(name) for name in ("table1_main", "fig2_position", "fig3_depth"))
    names = [[train.run_name(composed("train", job)) for job in study.trainings[:2]] for study in (first, second)]
    assert names[0] == names[1]
    assert len({train.run_name(composed("train", job)) for job in third.trainings[:4]}) == 4


def test_a_given_setting_replaces_its_axis() -> None:
    study = study_of("fig3_depth", ["method=dspark", "seed.init=7"])
    assert [job[1:] for job in study.trainings] == [
        [f"method.draft.layers={layers}", "method=dspark", "seed.init=7"] for layers in (1, 2, 3, 5)
    ]


# What each choice changes, and the default of its method in all else.
CHOICES = {
    "dspark_exponent_7": {"method.objective.slot_weight.exp": 7.0},
    "dspark_confidence_detached": {"method.objective.detach_confidence": True},
    "dspark_random_start": {"start": "random"},
    "dflash_masks_predict": {"method.draft.sample_from_anchor": False},
    "eagle3_all_positions": {"method.objective.normalise": "positions"},
    "eagle3_unshifted": {"method.draft.supervision": "unshifted"},
    "eagle3_random_start": {"start": "random"},
}


def test_a_choice_changes_what_it_says_and_nothing_else() -> None:
    names = {file.stem for file in (FOLDER / "choice").glob("*.yaml")}
    assert {name for name in names if not name.endswith("_default")} == set(CHOICES)

    def flat(tree: dict, where: str = "") -> dict:
        found = {}
        for key, value in tree.items():
            path = f"{where}.{key}" if where else key
            found |= flat(value, path) if isinstance(value, dict) else {path: value}
        return found

    def chosen(name: str) -> dict:
        return flat(OmegaConf.to_container(composed("train", [f"choice={name}"]), resolve=True))

    for name, expected in CHOICES.items():
        default, other = chosen(f"{name.split('_')[0]}_default"), chosen(name)
        changed = {key: other.get(key) for key in default | other if default.get(key) != other.get(key)}
        assert changed == expected | {"choice": name}, name


def test_an_experiment_that_is_not_named_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 2
    assert "reproduce needs name=... (an experiment of configs/experiment" in capsys.readouterr().err


def test_no_comment_holds_the_rest_of_a_replaced_text() -> None:
    found = [file.name for file in FOLDER.rglob("*.yaml") if re.search(r"\bW#", file.read_text(encoding="utf-8"))]
    assert not found


def test_an_unknown_experiment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no experiment 'fig9'.*fig3_depth"):
        study_of("fig9")


@pytest.mark.parametrize("words", [["method=dspark,dflash", "seed.init=0,1"], ["head=rnn", "objective=tv"]])
def test_axes_pass_the_command_lines_check(words: list[str]) -> None:
    with configs("configs"):
        check("train", "train", words)


@pytest.mark.parametrize(
    "file", sorted((FOLDER.parent / "experiments" / "sweeps").glob("*.yaml")), ids=lambda f: f.stem
)
def test_a_sweep_for_wandb_agents_sets_what_there_is(file: Path) -> None:
    """Every corner of its grid, as an agent would type it, and a metric that training logs."""
    sweep = yaml.safe_load(file.read_text())
    program, verb, *words = [word for word in sweep["command"] if not word.startswith("$")]
    assert (program, verb, sweep["metric"]["name"]) == ("specbench", "train", "probe/accepted_length")
    for pick in (min, max):
        chosen = {
            key: pick(found.get("values") or (found["min"], found["max"])) for key, found in sweep["parameters"].items()
        }
        with configs("configs"):
            check("train", "train", [*words, *(f"{key}={value}" for key, value in chosen.items())])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare(tmp_path_factory.mktemp("outputs"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_decodes_with_the_smoke_budget(method: str, prepared: list[str]) -> None:
    folder = stage("train", [*prepared, f"method={method}"])
    summary = read_summary(folder)
    assert summary["status"] == "finished" and summary["method"] == method and summary["steps"] == 2
    runs = [path for path in (folder.parents[1] / "evaluate").iterdir() if path.name.startswith(method)]
    assert len(runs) == 1
    numbers = read_summary(runs[0])["metrics"]["accepted_length"]
    assert 1 <= numbers["value"] <= read_settings(folder)["method"]["draft"]["block_size"] + 1
