"""What is suggested for a target of one's own, and that it composes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from experiments.cli import main
from specbench.models.suggestion import learning_rate, spread, suggest

CONFIG = {"model_type": "llama", "num_hidden_layers": 30, "vocab_size": 8, "hidden_size": 576, "eos_token_id": 2}
WORDS = ["<|end|>", "<|start|>", "<|stop|>", "<spare>", "<other>", "a", "b", "c"]


def folder(tmp_path: Path, template: str = "<|start|>{{ enable_thinking }}") -> Path:
    """A model whose tokenizer uses every row and has no mask and no padding token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "a"))
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:5]])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|stop|>", chat_template=template)
    fast.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return tmp_path


def test_taps_are_even_and_leave_the_final_layer_out() -> None:
    assert spread(36) == [1, 9, 17, 25, 33] and spread(40) == [1, 10, 19, 28, 37]  # those of the released drafts
    assert spread(28) == [1, 7, 13, 19, 25] and spread(6) == [1, 2, 3] and spread(2) == [0]
    assert all(max(spread(layers)) < layers - 1 for layers in range(2, 100))


def test_the_rate_is_that_of_the_recipes_at_their_widths() -> None:
    assert learning_rate(128) == learning_rate(32) == 2e-3 and learning_rate(2560) == learning_rate(5120) == 6e-4
    assert learning_rate(128) > learning_rate(576) > learning_rate(1152) > learning_rate(2560)


def test_the_mask_is_a_control_token_that_nothing_uses_where_no_row_is_free(tmp_path: Path) -> None:
    found = suggest(folder(tmp_path))
    assert found.values["mask_token_id"] == 4 and "<other>" in found.reasons["mask_token_id"]
    assert "<|stop|> 2" in found.reasons["stop_token_ids"] and "<|end|> 0" in found.reasons["stop_token_ids"]
    assert "reads enable_thinking" in found.reasons["thinking"]
    used = suggest(folder(tmp_path, "<|start|><spare><other>"))
    assert used.values["mask_token_id"] is None and "name a token" in used.reasons["mask_token_id"]


def test_a_suggestion_is_yaml_of_settings_that_a_target_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["target", f"suggest={folder(tmp_path)}"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed.pop("defaults") == ["folder", "_self_"]
    known = yaml.safe_load((Path(__file__).parents[1] / "configs/target/folder.yaml").read_text())
    assert set(printed) <= set(known) and printed["id"] == str(tmp_path) and printed["target_layer_ids"][0] == 1
    (tmp_path / "config.json").write_text("{}")
    assert main(["target", f"suggest={tmp_path}"]) == 2
    assert "which a suggestion needs" in capsys.readouterr().err
