"""A method in two files: a class in a package of the user's own and its YAML in a folder of the user's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments.cli import main
from specbench.files.atomic import read_json
from tests.pipeline import prepare

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


def test_an_unknown_method_is_named_with_those_that_are_there(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"hydra.searchpath=[file://{own}]", "method=slot_ofset"]) == 2
    assert "did you mean 'slot_offset'?" in capsys.readouterr().err
