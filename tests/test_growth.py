"""Progressive stacking: a deep target that starts as exactly the function of a shallower one, and then differs."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from experiments.target import check, run
from specbench.cli.assembly import composed
from specbench.cli.settings import check_settings
from specbench.data.answers.embedded_tokenizer import rendered, train_tokenizer
from specbench.data.prompts.embedded_corpus import conversations
from specbench.models import target as targets
from specbench.training.growth import grow
from specbench.training.pretraining import initialise

SIZES = {"model_type": "qwen3", "vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16}
SIZES |= {"num_key_value_heads": 1, "intermediate_size": 64, "tie_word_embeddings": True}


def model(layers: int, seed: int, **sizes) -> torch.nn.Module:
    torch.manual_seed(seed)
    made = targets.new_causal_lm(SIZES | {"num_hidden_layers": layers} | sizes)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def test_the_deep_model_begins_as_the_shallow_one():
    shallow, deep = model(2, 0), grow(initialise(model(5, 1)), model(2, 0))
    tokens = torch.randint(300, (2, 9))
    with torch.no_grad():
        assert torch.equal(deep(tokens).logits, shallow(tokens).logits)
    sources = [0, 0, 0, 1, 1]
    for layer, source in zip(deep.model.layers, sources, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, shallow.model.layers[source].mlp.up_proj.weight)
    silent = [
        not layer.mlp.down_proj.weight.any() and not layer.self_attn.o_proj.weight.any() for layer in deep.model.layers
    ]
    assert silent == [False, True, True, False, True]


def test_a_silent_layer_learns_from_the_first_step():
    deep = grow(initialise(model(4, 1)), model(2, 0))
    deep(torch.randint(300, (2, 9))).logits.logsumexp(-1).sum().backward()
    for layer in deep.model.layers:
        assert layer.mlp.down_proj.weight.grad.abs().max() > 0 and layer.self_attn.o_proj.weight.grad.abs().max() > 0


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 layers cannot start from one of 3"):
        grow(model(2, 0), model(3, 0))
    with pytest.raises(ValueError, match=r"shape \(48, 32\) for model.layers.0.mlp.gate_proj.weight, and this one has"):
        grow(model(2, 0), model(2, 0, intermediate_size=48))


def words(root: Path, name: str, **settings) -> list[str]:
    small = ["vocabulary=300", "model.hidden_size=32", "model.intermediate_size=64", "data.limit=20", "every=2"]
    small += ["model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=16", f"name={name}"]
    small += ["data.validation=4", "trainer.enable_progress_bar=false", "tracking=disabled", f"root={root}"]
    return [*small, *(f"{key}={value}" for key, value in settings.items())]


@pytest.fixture
def shallow(tmp_path) -> Path:
    """The folder of a trained target, as far as a stage reads it."""
    folder = tmp_path / "shallow"
    texts = [rendered(c["messages"]) for c in conversations("math", "train", 50)]
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    targets.save(model(2, 0, max_position_embeddings=1024, **rope), train_tokenizer(texts, 300), folder)
    (folder / "provenance.json").write_text(json.dumps({"steps": 3, "python": "3.11"}))
    return folder


def test_the_stage_grows_a_target_and_says_from_what(tmp_path, shallow):
    layers = "model.num_hidden_layers"
    repeats = "{code: 0, prose: 0, math: 1}"
    grown = {layers: 3, "trainer.max_steps": 1, "start": shallow, "dtype": "float32", "data.repeats": repeats}
    # At this learning rate a step changes nothing, so the target that is written is the start itself.
    still = {"training.matrix_rate": "1e-30", "training.vector_rate": "1e-30"}
    run(composed("pretrain", words(tmp_path, "deep", **grown, **still)))
    deep = tmp_path / "runs" / "target" / "deep"
    facts = json.loads((deep / "provenance.json").read_text())
    weights = hashlib.sha256((shallow / "model.safetensors").read_bytes()).hexdigest()
    assert facts["start"] == {"steps": 3, "sha256": weights} and facts["steps"] == 1
    one, other = (targets.Target.load(folder, []) for folder in (shallow, deep))
    tokens = torch.randint(300, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(other.model(tokens).logits, one.model(tokens).logits)
    assert other.tokenizer.get_vocab() == one.tokenizer.get_vocab()


def test_a_start_that_does_not_fit_is_refused_before_any_work(tmp_path, shallow):
    layers = "model.num_hidden_layers"
    for changes, said in (
        ({layers: 1}, "has 2 layers, more than model.num_hidden_layers=1"),
        ({layers: 3, "model.head_dim": 32}, "its head_dim is 16 and model.head_dim is 32"),
        ({layers: 3, "start": tmp_path / "none"}, "no model.safetensors in this folder"),
    ):
        with pytest.raises(ValueError, match=said):
            check(composed("pretrain", words(tmp_path, "refused", **{"start": shallow} | changes)))
    with pytest.raises(ValueError, match="only a target that is trained starts from another"):
        check_settings("target", composed("pretrain", words(tmp_path, "refused", start=shallow, path="model.gguf")))
