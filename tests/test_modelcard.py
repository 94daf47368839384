"""The model card says what the records say."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml

from specbench.checkpoints.model_card import model_card, serving_command

TRAINING = {
    "summary": {
        "method": "dspark",
        "steps": 240,
        "best_step": 200,
        "trained_tokens": 123456,
        "parameters": 77,
        "lineage": {"cache": {"fingerprint": "abc123"}},
    },
    "config": {"data": {"name": "embedded"}, "method": {"objective": {"ce": 0.1}}, "seed": {"init": 3}},
    "provenance": {
        "command": ["specbench", "train", "data.name=a b"],
        "code": {"commit": "f00"},
        "versions": {"torch": "2.13.0"},
    },
}
EVALUATION = {
    "suite": "paper",
    "temperature": 1.0,
    "accounting": "specbench",
    "metrics": {
        "accepted_length": {"value": 3.14159, "low": 3.0, "high": 3.25, "count": 999},
        "tokens_per_second_per_request": {"value": 50.0},
    },
}


def test_a_card_holds_what_the_records_hold() -> None:
    card = model_card("me/draft", "vllm", "Qwen/Qwen3-4B", "apache-2.0", TRAINING, [EVALUATION])
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "Qwen/Qwen3-4B",
        "library_name": "specbench",
        "license": "apache-2.0",
        "tags": ["speculative-decoding", "draft-model", "vllm"],
    }
    assert "| paper | 1 | 3.142 | 3.000 to 3.250 | 999 | 50.000 | specbench |" in body
    assert "    specbench train 'data.name=a b'" in body  # the command can be pasted
    for fact in ("abc123", "123456", "| optimiser steps | 240 |", "f00", "torch 2.13.0", "embedded", "apache-2.0"):
        assert fact in body
    assert "transformers not recorded" in body  # what is unknown is said, not left out


@pytest.mark.parametrize("folder", ["/home/me/targets/small", "./small", "outputs/runs/target/small", "~/small"])
def test_a_card_links_no_folder(folder: str) -> None:
    card = model_card("me/draft", "vllm", folder, None, dtype="bfloat16")
    assert folder not in card and "huggingface.co" not in card and "base_model" not in card
    assert "`small` (a folder of the author's" in card and "its tensors in bfloat16" in card


def test_a_card_does_not_link_a_folder_that_looks_like_an_id(tmp_path, monkeypatch) -> None:
    (tmp_path / "my" / "target").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "huggingface.co" not in model_card("me/draft", "vllm", "my/target", None)
    assert "(https://huggingface.co/my/other)" in model_card("me/draft", "vllm", "my/other", None)


def test_a_card_of_older_evaluations_shows_their_rate() -> None:
    metrics = {**EVALUATION["metrics"], "tokens_per_second": {"value": 7.0}}
    del metrics["tokens_per_second_per_request"]
    assert "| 7.000 |" in model_card(
        "me/draft", "vllm", "Qwen/Qwen3-4B", None, None, [{**EVALUATION, "metrics": metrics}]
    )


def test_a_card_without_records_says_so() -> None:
    card = model_card("me/draft", "deepspec", "Qwen/Qwen3-4B", None)
    assert "No evaluation is recorded." in card and "named none" in card and "license:" not in card


def test_a_card_of_an_unknown_target_names_none() -> None:
    card = model_card("me/draft", "deepspec", None, None)
    assert "base_model" not in card and "which one is not recorded" in card and "None" not in card


VLLM = {
    "speculators_model_type": "dflash",
    "speculators_config": {"proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}]},
}


def test_the_command_of_a_card_names_method_and_number_of_tokens() -> None:
    """vLLM takes another method in silence where none is named."""
    card = model_card("me/draft", "vllm", "my/target", None, config=VLLM)
    (line,) = [line for line in card.splitlines() if line.startswith("`vllm serve")]
    words = shlex.split(line.removeprefix("`").split("`")[0])
    assert words[:4] == ["vllm", "serve", "my/target", "--speculative-config"]
    assert json.loads(words[4]) == {"method": "dflash", "model": "me/draft", "num_speculative_tokens": 5}
    assert "vLLM 0.32.0" in line


@pytest.mark.parametrize(
    ("architecture", "algorithm"),
    [
        ("LlamaForCausalLMEagle", "EAGLE"),
        ("LlamaForCausalLMEagle3", "EAGLE3"),
        ("DFlashDraftModel", "DFLASH"),
        ("Qwen3DSparkModel", "DSPARK"),
    ],
)
def test_the_command_for_sglang_names_the_algorithm(architecture: str, algorithm: str) -> None:
    words = serving_command("me/draft", "sglang", "my/target", {"architectures": [architecture]}).split()
    assert words[words.index("--speculative-algorithm") + 1] == algorithm
