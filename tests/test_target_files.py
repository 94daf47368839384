"""Targets as they are found: odd weights, broken side files and adapters are taken right, or refused by their file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from specbench.models.target import Target, new_causal_lm, save
from specbench.progress import Progress
from tests import families


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets") / "whole"
    torch.manual_seed(0)
    save(new_causal_lm(families.config("llama")), None, folder)
    return folder


def edited(whole: Path, tmp_path: Path, file: str, text: str) -> Path:
    folder = tmp_path / "edited"
    shutil.copytree(whole, folder)
    (folder / file).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("generation_config.json", "{", "no readable generation_config.json"),
        ("generation_config.json", "[1]", "no readable generation_config.json"),
        ("generation_config.json", '{"eos_token_id": [1, "x"]}', "eos_token_id='x', which is not a token id"),
        ("generation_config.json", '{"eos_token_id": true}', "eos_token_id=True, which is not a token id"),
        ("generation_config.json", '{"eos_token_id": -3}', "eos_token_id=-3, which is not a token id"),
        ("adapter_config.json", '{"base_model_name_or_path": "/elsewhere"}', "merge it into its base model"),
    ],
)
def test_side_files_that_would_change_the_distribution_are_refused(
    whole: Path, tmp_path: Path, file: str, text: str, said: str
) -> None:
    with pytest.raises(ValueError, match="edited") as caught:
        Target.load(edited(whole, tmp_path, file, text), [0])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_act", "banana", "KeyError 'banana': a name in its files"),
        ("num_attention_heads", None, "num_attention_heads.*int"),
        ("rope_parameters", {"rope_type": "banana", "rope_theta": 1e4}, "banana"),
    ],
)
def test_a_library_error_over_the_configuration_says_what_was_wrong(
    whole: Path, tmp_path: Path, key: str, value: object, said: str
) -> None:
    config = json.loads((whole / "config.json").read_text()) | {key: value}
    with pytest.raises(ValueError, match=said):
        Target.load(edited(whole, tmp_path, "config.json", json.dumps(config)), [0])


def test_stop_tokens_beyond_the_vocabulary_are_told_or_refused(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = edited(whole, tmp_path, "generation_config.json", json.dumps({"eos_token_id": [1, families.V]}))
    Target.load(folder, [0])
    assert f"its stop tokens [{families.V}] lie beyond its vocabulary of {families.V}" in caplog.text
    with pytest.raises(ValueError, match=rf"target.stop_token_ids=\[1, {families.V}\]: {families.V} is beyond"):
        Target.load(whole, [0], stop_token_ids=[1, families.V])


def test_weights_that_overflow_are_refused_as_such(tmp_path: Path) -> None:
    model = new_causal_lm(families.config("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e38)
    save(model, None, tmp_path / "target")
    with pytest.raises(ValueError, match="NaN or infinite final states in float32"):
        Target.load(tmp_path / "target", [0])


def test_weights_of_no_axis_have_a_digest() -> None:
    """Activations with a learnt number of their own (xIELU) bring tensors without an axis."""
    settings = {k: v for k, v in families.config("llama").items() if k != "model_type"}
    config = AutoConfig.for_model("apertus", **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    scalars = [p for p in model.parameters() if p.dim() == 0 or p.numel() == 1]
    assert scalars
    first = Target(model, config.to_dict(), [0], stop_token_ids=[]).weights_hash
    scalars[0].data += 1
    assert Target(model, config.to_dict(), [0], stop_token_ids=[]).weights_hash != first


def test_a_stage_that_ends_before_its_first_unit_states_no_rate() -> None:
    assert Progress("evaluate", 3, "prompts").state() == "0/3 prompts, estimating time left"
