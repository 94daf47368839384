"""A method in two files: a class in a package of the user's own and its YAML in a folder of the user's own.

Once a block-parallel draft, once a class of the contract itself, of which the project knows nothing beforehand.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from experiments.cli import main
from specbench.checkpoints.config_keys import FormatError
from specbench.checkpoints.draft_folder import export_draft, load_draft, save_draft
from specbench.checkpoints.exports import require_names
from specbench.drafts.draft import Draft
from specbench.drafts.initialisation import first_weights
from specbench.files.atomic import read_json
from specbench.losses.objective import Objective
from specbench.training.draft_training import DraftTraining
from tests import independent_heads, test_contract, test_work, tiny
from tests.pipeline import prepare

ROOT = Path(__file__).resolve().parents[1]
CLASS = '''
"""A block-parallel draft whose slots learn an offset each."""

import torch
from torch import nn

from specbench.drafts.parallel import ParallelDraft


class SlotOffset(ParallelDraft):
    def __init__(self, *args, scale: float = 1.0, **settings):
        super().__init__(*args, **settings)
        self.scale = scale
        self.offset = nn.Parameter(torch.zeros(self.block_size, self.backbone.hidden_size))

    def features(self, hidden, previous):
        return hidden + self.scale * self.offset[: hidden.shape[-2]]
'''

SETTINGS = """
name: slot_offset
draft:
  _target_: fifthmethod.slot_offset.SlotOffset
  layers: 1
  block_size: 4
  anchors: 8
  scale: 2.0 # of the offsets
backbone: null
vocabulary: null
window: null
objective: {ce: 1.0, tv: 0.5, slot_weight: {exp: 4.0}}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "python" / "fifthmethod"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "slot_offset.py").write_text(CLASS)
    (tmp_path / "yaml" / "method").mkdir(parents=True)
    (tmp_path / "yaml" / "method" / "slot_offset.yaml").write_text(SETTINGS)
    monkeypatch.syspath_prepend(str(package.parent))
    yield tmp_path / "yaml"
    for name in [name for name in sys.modules if name.startswith("fifthmethod")]:
        del sys.modules[name]


def test_a_method_of_the_users_own_trains_decodes_and_stands_in_the_table(own: Path, tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    root.mkdir()
    settings = prepare(root)
    mine = [f"hydra.searchpath=[file://{own}]", "method=slot_offset", "method.draft.scale=3.0", "name=mine"]
    for words in (mine, ["method=dflash", "name=theirs"]):
        assert main(["train", *settings, *words]) == 0
    draft = read_json(root / "runs" / "train" / "mine" / "draft" / "config.json", None)["specbench"]
    assert draft["class"] == "fifthmethod.slot_offset.SlotOffset"
    assert draft["settings"]["scale"] == 3.0
    assert main(["compare", f"root={root}", "name=both", "figures=false", "resamples=50"]) == 0
    table = pd.read_csv(root / "compare" / "both" / "accepted_length.csv").set_index("method")
    assert set(table.index) == {"slot_offset", "dflash"}
    assert (table["accepted_length"] >= 1).all()
    slots = pd.read_csv(root / "compare" / "both" / "conditional_acceptance.csv")
    assert slots[slots.method == "slot_offset"]["slot"].max() == 4


@pytest.fixture
def heads(own: Path, monkeypatch: pytest.MonkeyPatch) -> type[Draft]:
    """The class of independent heads, as `tiny.draft("independent_heads", FAMILY)` builds it."""
    file = independent_heads.write(own.parent / "python" / "fifthmethod", "fifthmethod", own / "method")
    monkeypatch.setitem(tiny.FILES, "independent_heads", file)
    return importlib.import_module("fifthmethod.independent_heads").IndependentHeads


LAWS = {
    "test_proposing_the_true_tokens_gives_the_training_logits": ({},),
    "test_commits_in_pieces_equal_one_begin": ({},),
    "test_states_at_or_after_an_anchor_do_not_reach_its_block": (),
    "test_greedy_output_is_the_targets_own_and_the_batch_changes_nothing": (),
    "test_packed_rows_give_the_blocks_of_padded_ones": (),
    "test_every_parameter_gets_a_gradient_and_the_tables_none": (),
    "test_the_mask_is_a_prefix_that_ends_with_the_supervised_text": (),
}


@pytest.mark.parametrize("law", LAWS)
def test_a_class_of_the_contract_itself_keeps_its_laws(law: str, heads: type[Draft]) -> None:
    getattr(test_contract, law)("independent_heads", "qwen3", *LAWS[law])


def test_it_starts_at_random_or_as_its_class_says(heads: type[Draft]) -> None:
    target = tiny.target("qwen3")
    made = heads.for_target(target, mask_token_id=tiny.MASK, width=8, block_size=3)
    assert "start=random, 0 tensors" in made.origin and "IndependentHeads has no weights" in made.origin
    assert 0.01 < float(made.enter[0].weight.std()) < 0.03 and not made.enter[0].bias.any()
    assert torch.equal(made.scale, torch.ones(3))  # of no kind that is known: the constructor's
    with pytest.raises(ValueError, match="start=target: IndependentHeads has no weights"):
        first_weights(tiny.draft("independent_heads", "qwen3"), "target", target)

    class FromTarget(heads):
        def start_from(self, target):
            for leave in self.leave:
                nn.init.zeros_(leave.weight)  # every slot begins with the target's own state
            return ["leave"]

    made = FromTarget.for_target(target, mask_token_id=tiny.MASK, width=8)
    assert "start=target, 1 tensors" in made.origin and not made.leave[0].weight.any()


def test_its_plan_is_near_what_it_takes(heads: type[Draft], own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = tiny.draft("independent_heads", "qwen3").train()
    kept, flops, anchors = test_work.measured(draft)
    work = draft.work(test_work.LENGTH, anchors)
    assert (work.kept, work.flops) == (kept, flops)  # the forward pass itself, on shapes

    class AsksForValues(heads):
        def forward(self, batch):
            assert batch.anchors.max() < batch.tokens.shape[1]
            return super().forward(batch)

    settings = {"mask_token_id": tiny.MASK, "confident": True, "width": 64}
    bound = AsksForValues.for_target(tiny.target("qwen3"), **settings).work(test_work.LENGTH, anchors)
    # Every map is counted for each of the 4 slots, and the confidence head beside them.
    assert bound.kept > kept and bound.flops == 4 * flops + 2 * 4 * anchors * 32
    words = [f"hydra.searchpath=[file://{own}]", "method=independent_heads", "target=tiny_qwen3", "plan=true"]
    assert main(["train", *words, "memory=80"]) == 0
    said = capsys.readouterr().err
    assert "conversations in 80 GiB" in said and "TFLOP" in said


def test_its_learning_rate_decays_by_the_layers_that_it_names(heads: type[Draft]) -> None:
    class Deep(heads):
        def layers_in_order(self):
            return [self.enter, self.leave]

    def rates(draft: Draft) -> dict[str, float]:
        module = DraftTraining(draft, Objective(ce=1.0), max_steps=4, lr=1.0, layer_decay=0.5)
        module.steps_in_all, module.warmup = 4, 1
        names = {id(parameter): name for name, parameter in draft.named_parameters()}
        groups = module.configure_optimizers()["optimizer"].param_groups
        return {names[id(p)].split(".")[0]: group["initial_lr"] for group in groups for p in group["params"]}

    settings = {"mask_token_id": tiny.MASK, "width": 8, "confident": True}
    plain = rates(heads.for_target(tiny.target("qwen3"), **settings))
    assert plain == dict.fromkeys(("enter", "leave", "scale", "sure"), 1.0)
    deep = rates(Deep.for_target(tiny.target("qwen3"), **settings))
    assert deep == {"enter": 0.5, "leave": 1.0, "scale": 1.0, "sure": 1.0}


def test_its_folder_holds_it_exactly_and_no_engine_is_given_it(heads: type[Draft], tmp_path: Path) -> None:
    target = tiny.target("qwen3")
    draft = heads.for_target(target, mask_token_id=tiny.MASK, width=8, confident=True)
    draft.slots += 7  # whole numbers are part of it, too
    save_draft(draft, tmp_path / "draft", target.config, draft.settings)
    export_draft(tmp_path / "draft", tmp_path / "again", "specbench", methods=[heads])
    for folder in ("draft", "again"):
        loaded = load_draft(tmp_path / folder, methods=[heads])
        assert type(loaded) is heads and loaded.settings == draft.settings
        torch.testing.assert_close(loaded.state_dict(), draft.state_dict(), rtol=0, atol=0)
    for form in ("deepspec", "vllm", "sglang"):
        with pytest.raises(FormatError, match=r"IndependentHeads has no published format.*format=specbench"):
            export_draft(tmp_path / "draft", tmp_path / form, form, methods=[heads])
    with pytest.raises(FormatError, match="is not one of"):
        load_draft(tmp_path / "draft")


def test_tied_weights_are_written_and_a_tables_name_is_refused(heads: type[Draft], tmp_path: Path) -> None:
    class Tied(heads):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.leave[1].weight = self.leave[0].weight

    class Taken(heads):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.lm_head = nn.Linear(2, 2)

    target = tiny.target("qwen3")
    draft = Tied.for_target(target, mask_token_id=tiny.MASK, width=8)
    save_draft(draft, tmp_path, target.config, draft.settings)
    loaded = load_draft(tmp_path, methods=[Tied])
    assert loaded.leave[0].weight is loaded.leave[1].weight
    assert torch.equal(loaded.leave[0].weight, draft.leave[0].weight)
    with pytest.raises(FormatError, match=r"Taken has tensors named lm_head\.bias, lm_head\.weight"):
        require_names(Taken.for_target(target, mask_token_id=tiny.MASK))


def test_an_unknown_method_is_named_with_those_that_are_there(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"hydra.searchpath=[file://{own}]", "method=slot_ofset"]) == 2
    assert "did you mean 'slot_offset'?" in capsys.readouterr().err


@pytest.fixture
def pipeline(heads: type[Draft], own: Path, tmp_path: Path) -> tuple[Path, list[str], str, str]:
    root = tmp_path / "outputs"
    root.mkdir()
    kind = "methods=[fifthmethod.independent_heads.IndependentHeads]"
    return root, prepare(root), f"hydra.searchpath=[file://{own}]", kind


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_it_goes_through_every_verb(heads, pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, settings, search, kind = pipeline
    recipe = ["trainer.recipe.layer_decay=0.9", "trainer.recipe.ema=0.9", "trainer.max_steps=4"]
    assert main(["train", "-m", search, *settings, *recipe, "method=independent_heads,dflash"]) == 0
    said = capsys.readouterr().err
    assert "train: method.draft.anchors=8 (published: 512), width=16 (published: 64): a small draft" in said
    (run,) = (root / "runs" / "train").glob("independent_heads-*")
    assert len(list((root / "runs" / "evaluate").glob("independent_heads-*"))) == 1
    written = load_draft(run / "draft", methods=[heads])
    module = DraftTraining.load_from_checkpoint(run / "checkpoints" / "best.ckpt", methods=[heads])
    torch.testing.assert_close(module.published.state_dict(), written.state_dict(), rtol=0, atol=0)

    common = [f"root={root}", "tracking=disabled"]
    suite = settings[-1]
    assert suite.startswith("suite.prompts=")
    warm = [suite, "temperature=1.0", "max_new_tokens=8", "name=warm", "scheduler=threshold", "teacher_forced=true"]
    assert main(["evaluate", *common, *warm, f"draft={run}", kind]) == 0
    timing = ["batch_sizes=[1]", "lengths=[]", "check=[]", "clock_prompts=2", "clock_repeats=1", "repeats=3"]
    timing += ["max_new_tokens=8", "step_tokens=4", "context=16"]
    assert main(["speed", f"root={root}", suite, *timing, f"draft={run}", kind]) == 0
    warmed = root / "runs" / "evaluate" / "warm"
    assert main(["calibrate", f"root={root}", f"rounds={warmed}"]) == 0

    exported, imported = tmp_path / "exported", tmp_path / "imported"
    words = [f"root={root}", f"draft={run}", kind]
    assert main(["export", *words, "format=specbench", f"folder={exported}"]) == 0
    assert "specbench format" in (exported / "README.md").read_text()
    assert main(["import", f"root={root}", f"draft={exported}", f"folder={imported}", kind]) == 0
    again = load_draft(imported, methods=[heads])
    torch.testing.assert_close(again.state_dict(), written.state_dict(), rtol=0, atol=0)
    capsys.readouterr()
    assert main(["export", *words, "format=vllm", f"folder={tmp_path / 'vllm'}"]) == 2
    assert "IndependentHeads has no published format" in capsys.readouterr().err
    brought = ["name=brought", "max_new_tokens=8", f"draft={imported}", kind]
    assert main(["evaluate", *common, suite, *brought]) == 0

    filters = ["temperature=0.0", "resamples=50", "name=both"]
    runs = ",".join(map(str, (root / "runs" / "evaluate").glob("*-embedded-*")))
    assert main(["compare", f"root={root}", f"runs=[{runs}]", *filters]) == 0
    table = pd.read_csv(root / "compare" / "both" / "accepted_length.csv").set_index("method")
    assert set(table.index) == {"independent_heads", "dflash"}
    assert list((root / "compare" / "both" / "figures").glob("conditional_acceptance*.png"))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_quickstart_takes_it_beside_the_others(heads, own: Path, tmp_path: Path) -> None:
    sizes = ["steps=4", "prompts=6", "held_out=4", "benchmark_prompts=2", "max_new_tokens=12", "temperatures=[0.0]"]
    clock = [
        "clock.prompts=2",
        "clock.repeats=1",
        "clock.max_new_tokens=8",
        "tracking=disabled",
        f"root={tmp_path}/out",
    ]
    search = f"hydra.searchpath=[file://{own}]"
    assert main(["quickstart", search, "methods=[independent_heads,dflash]", *sizes, *clock]) == 0
    table = pd.read_csv(tmp_path / "out" / "compare" / "quickstart" / "accepted_length.csv")
    assert set(table["method"]) == {"independent_heads", "dflash"}


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_inside_the_package_two_files_are_enough_for_the_library_and_the_tests(tmp_path: Path) -> None:
    """A copy of the repository with the class in specbench/drafts and its YAML in configs/method, nothing else."""
    for folder in ("specbench", "experiments", "configs", "analysis", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    independent_heads.write(tmp_path / "specbench" / "drafts", "specbench.drafts", tmp_path / "configs" / "method")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def python(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    code = (
        "import specbench as sb; target = sb.Target.load('package:data/embedded', taps=[1, 3])\n"
        "print(sb.IndependentHeads.for_target(target, width=8).origin)"
    )
    assert "start=random" in python("-c", code)
    files = [f"tests/{name}.py" for name in ("test_contract", "test_configs", "test_work", "test_layers")]
    # Of the families of targets one: the laws of the others are those of test_contract.py.
    which = "independent_heads and not (llama or qwen2 or phi3 or granite or gemma)"
    said = python("-m", "pytest", "-v", "-n", "0", *files, "-k", which, "-p", "no:cacheprovider")
    assert int(re.search(r"(\d+) passed", said)[1]) >= 10
