"""The tokenizer, the small language model's training, and the checkpoint that is shipped."""

import hashlib
import json
import math
import random
from pathlib import Path

import lightning
import pytest
import torch
from hydra import compose, initialize_config_module
from torch import nn
from transformers import AutoTokenizer

from experiments.target import run
from specbench.data.answers.embedded_tokenizer import rendered, train_tokenizer
from specbench.data.loading.padded_rows import CorpusText, batches, unigram_loss
from specbench.data.prompts.embedded_corpus import DOMAINS, conversations
from specbench.models import target as targets
from specbench.runs.run_folder import read_lines, read_summary
from specbench.training.pretraining import CorpusBatches, LanguageModeling, initialise, split_parameters, token_losses
from tests.wandblog import offline_run

EMBEDDED = Path(targets.__file__).parents[1] / "data" / "embedded"
DEEP = EMBEDDED.with_name("embedded_deep")
TALK = [
    {"role": "user", "content": "Add 12 and 7."},
    {"role": "assistant", "content": "12 + 7 = 19.\nThe answer is 19."},
    {"role": "user", "content": "Twice that?"},
    {"role": "assistant", "content": "19 * 2 = 38.\n"},
]


def tiny(vocabulary: int) -> nn.Module:
    config = {"model_type": "qwen3", "vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
    return initialise(targets.new_causal_lm(config | {"tie_word_embeddings": True, "max_position_embeddings": 256}))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([rendered(c["messages"]) for c in conversations("math", "train", 300)], 384)


@pytest.fixture(scope="module")
def shipped():
    return AutoTokenizer.from_pretrained(EMBEDDED, local_files_only=True)


@pytest.mark.parametrize("which", ["tokenizer", "shipped"])
@pytest.mark.parametrize(
    "text", ["", "def f(x):\n\treturn x", "Zürich 東京 \U0001f600", "  a  \n\n b", "1234567", "\x00\x7f"]
)
def test_any_text_survives_the_tokenizer(which, text, request):
    coder = request.getfixturevalue(which)
    assert coder.decode(coder.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False) == text


def test_digits_stand_alone_and_special_tokens_are_one_token(tokenizer):
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    for special in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|mask|>"):
        assert len(tokenizer.encode(special, add_special_tokens=False)) == 1
    assert tokenizer.convert_ids_to_tokens(tokenizer.mask_token_id) == "<|mask|>"


@pytest.mark.parametrize("which", ["tokenizer", "shipped"])
def test_the_template_marks_exactly_what_follows_each_prompt(which, request):
    coder = request.getfixturevalue(which)
    out = coder.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    expected = [0] * len(out["input_ids"])
    for turn in (1, 3):
        prompt = coder.apply_chat_template(TALK[:turn], tokenize=True, add_generation_prompt=True)["input_ids"]
        answer = coder.encode(TALK[turn]["content"] + "<|im_end|>", add_special_tokens=False)
        assert out["input_ids"][: len(prompt) + len(answer)] == prompt + answer
        expected[len(prompt) : len(prompt) + len(answer)] = [1] * len(answer)
    assert out["assistant_masks"] == expected
    assert coder.apply_chat_template(TALK, tokenize=False) == rendered(TALK)


def test_a_vocabulary_without_room_is_refused():
    with pytest.raises(ValueError, match="vocabulary=200 has no room for 256 bytes and 4 special tokens"):
        train_tokenizer(["a"], 200)


def test_batches_hold_every_conversation_once_with_the_right_weights():
    draw = random.Random(1)
    examples = []
    for i in range(300):
        size = draw.randint(3, 60)
        examples.append(CorpusText([i + 1] * size, [0] * (size // 2) + [1] * (size - size // 2), i % 3))
    seen = {}
    for rows in batches(examples, 256, 0.25, random.Random(2)):
        assert rows.tokens.numel() <= 256
        for tokens, weight, domain in zip(*rows, strict=True):
            size = int((tokens > 0).sum())
            name = int(tokens[0])
            assert name not in seen
            seen[name] = (tokens[:size].tolist(), weight.tolist(), int(domain))
            half = size // 2
            assert weight.tolist() == [0.25] * half + [1.0] * (size - half) + [0.0] * (len(weight) - size)
    assert {k: (v[0], v[2]) for k, v in seen.items()} == {i + 1: (e.tokens, e.domain) for i, e in enumerate(examples)}


def test_token_losses_are_those_of_plain_counting():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    losses = token_losses(logits, tokens)
    for b in range(2):
        for t in range(4):
            odds = [math.exp(float(x)) for x in logits[b, t]]
            expected = -math.log(odds[int(tokens[b, t + 1])] / sum(odds))
            assert float(losses[b, t]) == pytest.approx(expected, abs=1e-5)


def test_unigram_loss_of_known_counts():
    assert unigram_loss([CorpusText([9, 1, 1, 2], [0, 1, 1, 1], 0)]) == pytest.approx(
        -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    )


def test_every_parameter_has_one_optimizer_and_tied_embeddings_are_no_matrix():
    model = tiny(300)
    matrices, others = split_parameters(model)
    assert {id(p) for p in matrices} | {id(p) for p in others} == {id(p) for p in model.parameters()}
    assert not {id(p) for p in matrices} & {id(p) for p in others}
    assert len(matrices) == 2 * 7 and all(p.dim() == 2 for p in matrices)
    assert any(p is model.get_input_embeddings().weight for p in others)


def test_training_beats_the_unigram_baseline_and_stops_at_its_budget(tokenizer):
    lightning.seed_everything(0, verbose=False)
    repeats = {"code": 0, "prose": 0}
    data = CorpusBatches(tokenizer, batch_tokens=1024, repeats=repeats, limit=200, validation=10, length=256)
    module = LanguageModeling(tiny(len(tokenizer)), steps=40, matrix_rate=0.02, vector_rate=0.02, warmup=5)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_steps=40, val_check_interval=40,
                                check_val_every_n_epoch=None, num_sanity_val_steps=0, **quiet)  # fmt: skip
    trainer.fit(module, data)
    assert trainer.global_step == 40 and module.progress() == 1.0
    held_out = [e for e in data.examples["validation"] if e.domain == DOMAINS.index("math")]
    assert float(trainer.callback_metrics["val/loss/math"]) < unigram_loss(held_out) - 0.5


def test_a_budget_in_seconds_ends_training(tokenizer):
    data = CorpusBatches(tokenizer, batch_tokens=256, repeats={"code": 0, "prose": 0}, limit=50, validation=0)
    module = LanguageModeling(tiny(len(tokenizer)), seconds=0.5, warmup=1)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    lightning.Trainer(accelerator="cpu", devices=1, max_steps=10**6, limit_val_batches=0, **quiet).fit(module, data)
    assert module.elapsed() >= 0.5 and module.progress() == 1.0
    with pytest.raises(ValueError, match="needs steps or seconds"):
        LanguageModeling(nn.Linear(2, 2))


def test_the_learning_rate_warms_up_and_ends_at_a_hundredth():
    module = LanguageModeling(nn.Linear(2, 2), steps=100, warmup=10)
    rates = []
    for step in range(101):
        module.__class__ = type("At", (LanguageModeling,), {"global_step": step})
        rates.append(module.rate())
    assert rates[0] == pytest.approx(0.1) and rates[50] == pytest.approx(0.5) and rates[100] == 0.01
    assert max(rates) == rates[9] and rates[9:] == sorted(rates[9:], reverse=True)


def test_long_conversations_are_left_out_and_counted(tokenizer):
    everything = CorpusBatches(tokenizer, limit=60, validation=0, repeats={"code": 0, "prose": 0})
    short = CorpusBatches(tokenizer, limit=60, validation=0, repeats={"code": 0, "prose": 0}, length=150)
    everything.setup("fit")
    short.setup("fit")
    long = sum(len(e.tokens) > 150 for e in everything.examples["train"])
    assert 0 < long == short.left_out and everything.left_out == 0


@pytest.mark.parametrize("folder", [EMBEDDED, DEEP], ids=lambda folder: folder.name)
def test_a_shipped_target_is_small_and_is_the_one_that_its_provenance_describes(folder):
    facts = json.loads((folder / "provenance.json").read_text())
    assert sum(f.stat().st_size for f in folder.iterdir()) < 10_000_000
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == facts["sha256"]
    config = json.loads((folder / "config.json").read_text())
    recipe = facts["recipe"]["model"]
    assert {k: config[k] for k in recipe} == recipe and config["dtype"] == facts["dtype"]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert len(tokenizer) == config["vocab_size"] and config["eos_token_id"] == tokenizer.eos_token_id
    assert facts["tokens_seen"] > 0 and set(facts["loss"]) == set(DOMAINS)


def test_the_deep_target_was_grown_from_the_shallow_one(shipped):
    facts = json.loads((DEEP / "provenance.json").read_text())
    assert facts["start"]["sha256"] == hashlib.sha256((EMBEDDED / "model.safetensors").read_bytes()).hexdigest()
    assert AutoTokenizer.from_pretrained(DEEP, local_files_only=True).get_vocab() == shipped.get_vocab()


@pytest.mark.parametrize("folder", [EMBEDDED, DEEP], ids=lambda folder: folder.name)
def test_a_shipped_target_has_the_loss_that_its_provenance_states(folder, shipped):
    facts = json.loads((folder / "provenance.json").read_text())
    model = targets.Target.load(folder, taps=[]).model
    # The problems are the same on every machine; the library's files change with the Python version.
    checked = DOMAINS if folder == EMBEDDED else ("math",)
    repeats = {domain: int(domain in checked) for domain in DOMAINS}
    data = CorpusBatches(shipped, validation=100, limit=0, repeats=repeats, seed=facts["recipe"]["data"]["seed"])
    data.setup("validate")
    losses = {d: [] for d in checked}
    with torch.no_grad():
        for rows in data.val_dataloader():
            nats = token_losses(model(rows.tokens).logits, rows.tokens)
            for row, weight, domain in zip(nats, rows.weight, rows.domain, strict=True):
                losses[DOMAINS[domain]] += row[weight[1:] > 0].tolist()
    assert sum(losses["math"]) / len(losses["math"]) == pytest.approx(facts["loss"]["math"], abs=2e-3)
    for domain in set(checked) - {"math"}:
        assert sum(losses[domain]) / len(losses[domain]) < facts["loss"][domain] + 0.5


def test_the_stage_writes_a_target_that_loads_and_skips_it_the_second_time(tmp_path, capsys):
    overrides = [f"root={tmp_path}", "trainer.max_steps=4", "every=2", "data.limit=20", "data.validation=4"]
    overrides += ["vocabulary=300", "model.hidden_size=32", "model.num_hidden_layers=2", "model.intermediate_size=32"]
    with initialize_config_module("configs", version_base=None):
        cfg = compose("pretrain", overrides=[*overrides, "trainer.enable_progress_bar=false", "tracking=offline"])
    run(cfg)
    folder = tmp_path / "runs" / "target" / "embedded"
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["steps"] == 4 and facts["recipe"]["vocabulary"] == 300 and str(tmp_path) not in json.dumps(facts)
    assert "tracking" not in facts["recipe"] and (folder / "checkpoints" / "last.ckpt").exists()
    summary, mirrored = read_summary(folder), offline_run(folder)
    assert summary["status"] == "finished" and summary["metrics"]["loss"] == facts["loss"]
    assert (mirrored.job_type, mirrored.name, mirrored.exit_code) == ("target", "embedded", 0)
    assert mirrored.summary["loss/math"] == facts["loss"]["math"] and mirrored.summary["tokens_seen"] > 0
    assert {"train/loss", "val/loss/math"} <= {key for line in read_lines(folder / "metrics.jsonl") for key in line}
    target = targets.Target.load(folder, taps=[0, 1])
    assert len(target.tokenizer) == 300 and target.stop_token_ids == (target.tokenizer.eos_token_id,)
    assert target.model.dtype == torch.float32 and facts["dtype"] == "bfloat16"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    run(cfg)
    assert "skipped" in capsys.readouterr().err and (folder / "model.safetensors").stat().st_mtime_ns == written
