"""Files from others are data: crafted ones at every entry, each of which would leave a marker if it were executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from experiments import rerun
from experiments.cli import main
from specbench.checkpoints.draft_folder import FormatError, load_draft, save_draft
from specbench.data.cache.released_cache import ReleasedCache
from specbench.drafts.installed import installed, takes
from specbench.files import hub_datasets
from specbench.files.torch_checkpoints import read_checkpoint
from specbench.models.target import Target
from specbench.runs.run_folder import RunFolder, read_settings
from specbench.training.draft_training import DraftTraining
from tests import tiny
from tests.pipeline import prepare
from tests.test_interchange import made


class Bomb:
    """An object whose pickle, when it is loaded, makes the folder `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path):
    """Where a crafted file would leave its mark; the test fails if it does. The crafting is tried first."""
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Bomb(proof)))
    assert proof.is_dir(), "the crafted object does nothing, so nothing is tested"
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists(), "code that came from a file was executed"


def craft(kind: str, path: Path, marker: Path) -> None:
    """A checkpoint that is a bomb in one of the forms that torch reads."""
    content = {"state_dict": {}, "global_step": 1, "epoch": 0, "bomb": Bomb(marker)}
    if kind == "zip":
        torch.save(content, path)
    elif kind == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif kind == "list":
        torch.save([Bomb(marker)], path)
    elif kind == "cut":
        torch.save(content, path)
        path.write_bytes(path.read_bytes()[:-200])
    else:  # torchscript: code in an archive
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/constants.pkl", pickle.dumps(Bomb(marker)))
            archive.writestr("archive/data.pkl", pickle.dumps(Bomb(marker)))


FORMS = ["zip", "legacy", "pickle", "list", "cut", "torchscript"]


@pytest.mark.parametrize("kind", FORMS)
def test_a_crafted_checkpoint_is_refused_in_a_sentence(kind: str, tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "last.ckpt"
    craft(kind, path, marker)
    for reader in (read_checkpoint, DraftTraining.load_from_checkpoint):
        with pytest.raises(ValueError, match=r"last\.ckpt") as said:
            reader(path)
        assert "\n" not in str(said.value) and "train again" in str(said.value)


def test_a_checkpoint_of_plain_data_is_read(tmp_path: Path) -> None:
    state = {"state_dict": {"draft.w": torch.arange(3)}, "global_step": 4, "callbacks": {"a": [(1, 0.5)]}}
    torch.save(state, tmp_path / "best.ckpt")
    found = read_checkpoint(tmp_path / "best.ckpt")
    assert torch.equal(found.pop("state_dict")["draft.w"], torch.arange(3))
    assert found == {"global_step": 4, "callbacks": {"a": [(1, 0.5)]}}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["zip", "pickle"])
def test_a_training_that_resumes_from_a_crafted_checkpoint_stops(
    kind: str, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    words = ["train", *prepare(root), "method=dflash", "name=a", "evaluate=false"]
    assert main(words) == 0
    run = root / "runs" / "train" / "a"
    stage = json.loads((run / "stage.json").read_text())
    (run / "stage.json").write_text(json.dumps(stage | {"status": "interrupted"}))
    craft(kind, run / "checkpoints" / "last.ckpt", marker)
    assert main(words) == 2
    assert "last.ckpt" in capsys.readouterr().err.splitlines()[-1]


NAMES = [
    "hydra.utils.instantiate", "os.system", "subprocess.run", "builtins.exec", "builtins.eval",
    "importlib.import_module", "torch.load", "specbench.drafts.draft.Draft", "specbench.models.target.Target",
    "crafted.Module", "os", "", ".", "..x",
    None, 3, ["os.system"], {"_target_": "os.system"},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draft, kept, config = made("dspark")
    return save_draft(draft, tmp_path_factory.mktemp("draft"), config, kept)


def changed(folder: Path, to: Path, **section: object) -> Path:
    """A copy of a draft folder with other entries in its section `specbench`."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["specbench"] |= section
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_a_draft_folder_cannot_say_what_to_import(
    name: object, folder: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crafted.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Module: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {"_target_": "os.mkdir", "_args_": [str(marker)], "path": str(marker), "args": f"mkdir {marker}"}
    for given in ({}, settings):
        section = {"class": name} | ({"settings": given} if given else {})
        with pytest.raises(FormatError, match=r"is not one of .*specbench\.drafts\.dspark\.DSpark"):
            load_draft(changed(folder, tmp_path / f"draft{len(given)}", **section))


@pytest.mark.parametrize("verb", ["import", "export", "evaluate"])
def test_no_verb_runs_what_a_draft_folder_names(
    verb: str, folder: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"_target_": "os.mkdir", "path": str(marker)}
    crafted = changed(folder, tmp_path / "d", **{"class": "hydra.utils.instantiate", "settings": {"config": settings}})
    words = [verb, f"draft={crafted}", f"root={tmp_path / 'root'}"] + (["format=vllm"] if verb == "export" else [])
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "hydra.utils.instantiate" in said and "DSpark" in said


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layerz": 1}, "layerz"), ({"layers": "1"}, "layers"), ({"layers": True}, "layers"),
        ({"layers": 1.5}, "layers"),
        ({"layers": None}, "layers"), ({"layers": [1]}, "layers"), ({"markov_head": 3}, "markov_head"),
        ({"confidence_head": 1}, "confidence_head"), ({"target_layer_ids": "012"}, "target_layer_ids"),
        ({"target_layer_ids": [0, "2"]}, "target_layer_ids"), ({"tables": {}}, "tables"),
        ({"backbone": {}}, "backbone"),
        ({"draft_vocabulary": [1]}, "draft_vocabulary"), ({"anchors": {"_target_": "os.system"}}, "anchors"),
    ],
)  # fmt: skip
def test_settings_of_a_folder_are_held_against_the_signature(
    settings: dict, named: str, folder: Path, tmp_path: Path
) -> None:
    own = json.loads((folder / "config.json").read_text())["specbench"]["settings"]
    with pytest.raises(FormatError, match=rf"specbench\.settings\.{named}"):
        load_draft(changed(folder, tmp_path / "d", settings=own | settings))


def test_a_backbone_of_a_folder_is_held_against_its_facts(folder: Path, tmp_path: Path) -> None:
    facts = json.loads((folder / "config.json").read_text())["specbench"]["backbone"]
    for wrong, named in (({"heads": "4"}, "heads"), ({"shell": "x"}, "shell"), ({"rope_theta": None}, "rope_theta")):
        with pytest.raises(FormatError, match=rf"specbench\.backbone\.{named}"):
            load_draft(changed(folder, tmp_path / named, backbone=facts | wrong))


def test_folders_written_under_earlier_names_still_load(folder: Path, tmp_path: Path) -> None:
    assert (
        type(load_draft(changed(folder, tmp_path / "d", **{"class": "specbench.methods.dspark.DSpark"}))).__name__
        == "DSpark"
    )


def test_the_installed_methods_are_those_of_the_configurations() -> None:
    named = {OmegaConf.load(file).draft._target_ for file in (tiny.CONFIGS / "method").glob("*.yaml")}
    assert set(installed()) == named
    for kind in installed().values():
        assert {"target_layer_ids", "block_size"} <= set(takes(kind))


def test_a_draft_of_pickled_weights_is_refused(folder: Path, tmp_path: Path, marker: Path) -> None:
    shutil.copytree(folder, tmp_path / "d")
    weights = tmp_path / "d" / "model.safetensors"
    weights.unlink()
    torch.save({"w": Bomb(marker)}, tmp_path / "d" / "pytorch_model.bin")
    with pytest.raises(FormatError, match="safetensors"):
        load_draft(tmp_path / "d")
    torch.save({"w": Bomb(marker)}, weights)
    with pytest.raises(FormatError, match="safetensors"):
        load_draft(tmp_path / "d")


CUSTOM = """
import os
os.mkdir({marker!r})
from transformers import PreTrainedTokenizerFast as CustomTokenizer
from transformers import Qwen3Config as CustomConfig
from transformers import Qwen3ForCausalLM as CustomModel
"""


@pytest.mark.parametrize("crafted", ["weights", "safetensors", "config", "model", "tokenizer"])
def test_a_target_folder_runs_no_code_of_its_own(crafted: str, tmp_path: Path, marker: Path) -> None:
    owner = Target.from_config(tiny.QWEN3, [0], seed=1)
    target = tmp_path / "target"
    owner.model.save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    (target / "custom.py").write_text(CUSTOM.format(marker=str(marker)))
    if crafted == "weights":
        (target / "model.safetensors").unlink()
        torch.save({"w": Bomb(marker)}, target / "pytorch_model.bin")
    elif crafted == "safetensors":
        torch.save({"w": Bomb(marker)}, target / "model.safetensors")
    elif crafted == "tokenizer":
        about = {"tokenizer_class": "CustomTokenizer", "auto_map": {"AutoTokenizer": ["custom.CustomTokenizer", None]}}
        (target / "tokenizer_config.json").write_text(json.dumps(about))
    else:
        if crafted == "config":
            config["model_type"] = "custom"
        config["auto_map"] = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}
        (target / "config.json").write_text(json.dumps(config))
    if crafted == "model":  # a known architecture: the library's own class is used
        Target.load(target, [0])
        return
    with pytest.raises(ValueError, match="target"):
        Target.load(target, [0])


def test_a_dataset_with_a_loading_script_is_refused(tmp_path: Path, marker: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    for path in (tmp_path / "data", tmp_path / "data" / "data.py"):
        with pytest.raises(ValueError, match="cannot be read"):
            hub_datasets.load(str(path), remedy="give a file")


def record(root: Path, **settings: object) -> Path:
    """A finished run with such settings in its record."""
    with RunFolder(root, "evaluate", "a", {"seed": 1, **settings}) as run:
        run.write_provenance({"command": ["x"]})
        run.finish(metrics={})
    return run.path


def again(run: Path, **settings: object):
    base = {"run": str(run), "name": None, "root": None, "seconds": False, "strict": False, "force": False}
    return rerun.run(OmegaConf.create(base | {"classes": []} | settings))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"scheduler": {"_target_": "os.mkdir", "path": "MARKER"}}, "scheduler._target_"),
        ({"suite": {"benchmarks": [{"_target_": "subprocess.run", "args": "x"}]}}, "suite.benchmarks.0._target_"),
        ({"methods": ["os.mkdir"]}, "methods"),
        ({"note": "${oc.env:HOME}"}, "note"),
        ({"note": "a ${oc.decode:${oc.env:HOME}}"}, "note"),
        ({"note": "${basename:x}"}, "note"),
        ({"cache": "https://***@host/x"}, "cache"),
        ({"cache": "pipe:touch MARKER; cat {name}"}, "cache is the command"),
    ],
    ids=str,
)
def test_a_record_is_not_run_beyond_the_projects_own_classes(
    settings: dict, named: str, tmp_path: Path, marker: Path
) -> None:
    run = record(tmp_path)
    filled = json.loads(json.dumps(settings).replace("MARKER", str(marker)))
    (run / "config.yaml").write_text(json.dumps({"seed": 1, **filled}))
    with pytest.raises(ValueError, match=rf"config\.yaml.*{named}"):
        again(run)
    assert not (run.parent / "a-rerun").exists()


def test_a_records_yaml_and_kind_are_data(tmp_path: Path, marker: Path) -> None:
    run = record(tmp_path)
    (run / "config.yaml").write_text(f"!!python/object/apply:os.mkdir ['{marker}']\n")
    for reader in (read_settings, again):
        with pytest.raises(ValueError, match=r"config\.yaml is no YAML of plain values"):
            reader(run)
    (run / "config.yaml").write_text("seed: 1\n")
    summary = json.loads((run / "summary.json").read_text())
    for kind in ("os", "rerun", "sync", None, ["evaluate"]):
        (run / "summary.json").write_text(json.dumps(summary | {"kind": kind}))
        with pytest.raises(ValueError, match="kind is"):
            again(run)


def test_the_classes_that_a_record_may_name_are_read_from_the_configurations() -> None:
    found = rerun.classes()
    assert {"specbench.drafts.dspark.DSpark", "specbench.runs.wandb_tracking.Tracking"} <= found
    parts = tuple(f"lightning.pytorch.{part}." for part in ("strategies", "callbacks", "loggers"))
    assert all(name.startswith(("specbench.", *parts)) for name in found)
    old = {
        "a": [{"_target_": "specbench.methods.dspark.DSpark"}],
        "b": {"_target_": "specbench.costs.CostProfile.load"},
    }
    new = rerun.with_moved_classes(old)
    assert new["a"][0]["_target_"] == "specbench.drafts.dspark.DSpark" and new["b"]["_target_"] in found
    assert rerun.with_moved_classes({"_target_": "os.system"}) == {"_target_": "os.system"}


def test_a_released_cache_of_pickles_is_refused(tmp_path: Path, marker: Path) -> None:
    for name in ("manifest.json", "samples.idx", "shard-00000.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError):
        ReleasedCache(tmp_path)


def test_nothing_in_the_project_unpickles() -> None:
    """Beside the one restricted reader of torch's checkpoints: no call that can run what a file says."""
    calls = ("pickle.load", "weights_only=False", "allow_pickle=True", "yaml.load(", "yaml.unsafe_load", "joblib",
             "trust_remote_code=True", "read_pickle", "marshal.load", "shelve", "dill", "OmegaConf.load(")  # fmt: skip
    sources = [file for part in ("specbench", "experiments", "analysis") for file in Path(part).rglob("*.py")]
    assert sources
    for file in sources:
        text = file.read_text(encoding="utf-8")
        found = [call for call in calls if call in text]
        assert not found, f"{file}: {found}"
        assert "torch.load(" not in text or file == Path("specbench/files/torch_checkpoints.py"), file
