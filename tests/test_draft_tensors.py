"""A checkpoint's tensors are finite weights of one dtype, or refused by name, whatever the format and the method."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specbench.checkpoints.config_keys import FormatError
from specbench.checkpoints.draft_folder import load_draft, save_draft
from tests import tiny

NAME = "layers.1.mlp.up_proj.weight"


def saved(method, path):
    draft = tiny.draft(method, "qwen3")
    return save_draft(draft, path, tiny.target("qwen3").config, draft.settings)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return saved("dspark", tmp_path_factory.mktemp("kept") / "draft")


@pytest.fixture
def folder(kept, tmp_path):
    return Path(shutil.copytree(kept, tmp_path / "draft"))


def changed(folder, change):
    """The same folder with `change` applied to its tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


def set_to(name, value):
    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[3] = value

    return change


def as_type(name, dtype):
    def change(tensors):
        tensors[name] = tensors[name].to(dtype)

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [NAME, "norm.weight", "lm_head.weight", "embed_tokens.weight"])
def test_numbers_that_are_not_finite_are_refused_by_tensor(folder, name, value):
    with pytest.raises(FormatError, match=rf"{name} \(float32\): 1 of \d+ are NaN or infinite"):
        load_draft(changed(folder, set_to(name, value)))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("name", [NAME, "norm.weight", "lm_head.weight"])
def test_what_is_no_weight_is_refused_by_tensor(folder, name, dtype):
    with pytest.raises(FormatError, match=f"{name} is {str(dtype).removeprefix('torch.')}, not (weights|float32)"):
        load_draft(changed(folder, as_type(name, dtype)))


@pytest.mark.parametrize("method", tiny.LAYERED)
def test_every_wrong_tensor_is_named_at_once(method, tmp_path):
    def change(tensors):
        for name, dtype in ((NAME, torch.int32), (norm, torch.bool)):
            tensors[name] = tensors[name].to(dtype)

    norm = "layers.1.post_attention_layernorm.weight"
    with pytest.raises(FormatError) as caught:
        load_draft(changed(saved(method, tmp_path / "draft"), change))
    assert f"{NAME} is int32" in str(caught.value) and f"{norm} is bool" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "dtype", "expected", "said"),
    [
        ([NAME], torch.float64, torch.float32, "float32 and float64; .* converted to float32"),
        ([NAME], torch.bfloat16, torch.float32, "bfloat16 and float32; .* converted to float32"),
        (None, torch.float64, torch.float32, "float64; .* converted to float32"),
        (None, torch.bfloat16, torch.bfloat16, None),
        (None, torch.float16, torch.float16, None),
    ],
)
def test_floating_point_tensors_become_one_dtype_and_that_is_said(folder, names, dtype, expected, said):
    def change(tensors):
        for name in names or [n for n, tensor in tensors.items() if tensor.is_floating_point()]:
            tensors[name] = tensors[name].to(dtype)

    before = load_file(folder / "model.safetensors")
    changed(folder, change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draft = load_draft(folder)
    lines = [str(one.message) for one in caught if "checkpoint holds" in str(one.message)]
    assert len(lines) == (said is not None)
    if said is not None:
        with pytest.warns(UserWarning, match=said):
            load_draft(folder)
    assert {p.dtype for p in draft.state_dict().values()} == {expected} == {draft.tables.head.dtype}
    torch.testing.assert_close(draft.state_dict()[NAME], before[NAME].to(dtype).to(expected), rtol=0, atol=0)


def test_a_dtype_that_was_asked_for_must_hold_every_number(folder):
    changed(folder, set_to(NAME, 1e6))
    assert load_draft(folder, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16
    with pytest.raises(FormatError, match=rf"{NAME} \(float16\): 1 of \d+ do not fit it"):
        load_draft(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    ("name", "dtype"), [("d2t", torch.float32), ("d2t", torch.bool), ("t2d", torch.float32), ("d2t", torch.complex64)]
)
def test_a_vocabulary_map_is_of_whole_numbers_and_marks(tmp_path, name, dtype):
    draft = tiny.draft("dflash", "qwen3")
    draft.tables = draft.tables.derive(ids=torch.arange(0, tiny.VOCABULARY, 2))
    settings = {"layers": 2, "block_size": 4, "target_layer_ids": list(tiny.TAPS), "mask_token_id": tiny.MASK}
    folder = save_draft(draft, tmp_path / "draft", tiny.target("qwen3").config, settings)
    assert load_draft(folder).draft_vocabulary.tolist() == list(range(0, tiny.VOCABULARY, 2))
    with pytest.raises(FormatError, match=f"{name} is {dtype}, not whole numbers"):
        load_draft(changed(folder, as_type(name, dtype)))


def test_wrong_shapes_are_named_by_tensor(folder):
    def change(tensors):
        tensors[NAME] = tensors[NAME][:-1].clone()

    with pytest.raises(FormatError, match=rf"{NAME} \(47, 32\), not \(48, 32\)"):
        load_draft(changed(folder, change))


def test_a_folder_says_all_that_its_layers_are(tmp_path):
    """Facts of every family come back from config.json, the scaling of its rope included."""
    for family in tiny.FAMILIES:
        draft = tiny.draft("dflash", family)
        settings = {"layers": 2, "block_size": 4, "target_layer_ids": list(tiny.TAPS), "mask_token_id": tiny.MASK}
        folder = save_draft(draft, tmp_path / family, tiny.target(family).config, settings)
        assert load_draft(folder).backbone == draft.backbone
        assert json.loads((folder / "config.json").read_text())["specbench"]["backbone"]["family"] == family
