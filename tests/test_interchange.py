"""Published formats in and out: field by field, tensor by tensor, and what must be refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import Qwen3Config

from experiments.cli import main
from specbench.blocks import with_anchors
from specbench.checkpoints import formats
from specbench.checkpoints.draft_folder import (
    FormatError,
    dtype_of,
    export_draft,
    load_draft,
    read_folder,
    save_draft,
    taps_of,
)
from specbench.checkpoints.obstacles import obstacle
from specbench.cli.assembly import build_draft as compose_draft
from specbench.decoding.loop import Limits, decode, speculative_decode
from specbench.decoding.sampling import Sampling
from tests import tiny

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/draft"))
BELOW = [0, 1, 2]  # taps below the target's last layer, which SGLang cannot read
IDS = torch.tensor([1, 2, 3, 5, 8, 13, 21, 34, 55, 89])


def made(method: str, family: str = "qwen3", ids: torch.Tensor | None = None, **settings):
    """A random draft, its settings, and the target's raw configuration."""
    cfg = OmegaConf.load(tiny.CONFIGS / "method" / f"{method}.yaml")
    for key in ("backbone", "window"):
        if key in settings:
            cfg[key] = settings.pop(key)
    taps = settings.pop("taps", list(tiny.TAPS))
    small = {key: size for key, size in (tiny.SMALL | {"layers": 1}).items() if key in cfg.draft}
    cfg.draft = OmegaConf.merge(cfg.draft, small, settings)
    owner = tiny.target(family)
    about = OmegaConf.create({"target_layer_ids": taps, "mask_token_id": tiny.MASK})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        draft = compose_draft(cfg, about, owner.config, owner.tables.derive(ids=ids))
        draft.randomise(std=0.2)
        for name, parameter in draft.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
    kept = OmegaConf.to_container(cfg.draft) | {"target_layer_ids": taps, "mask_token_id": tiny.MASK}
    kept.pop("_target_")
    return draft.eval(), kept, owner.config


def logits(draft, family: str = "qwen3"):
    batch = with_anchors(tiny.batch(family), 3)
    with torch.no_grad():
        blocks = draft(batch)
        return draft.logits(blocks.hidden, blocks.previous)[blocks.mask]


def same_facts(one, other) -> None:
    assert type(one) is type(other)
    assert one.backbone == other.backbone and one.target_layer_ids == other.target_layer_ids
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def same(one, other, family: str = "qwen3") -> None:
    same_facts(one, other)
    assert torch.equal(logits(one, family), logits(other, family))


@pytest.mark.parametrize("case", CASES)
def test_a_deepspec_draft_is_written_back_as_it_came(case: str, tmp_path: Path) -> None:
    source = GOLDEN / case / "draft"
    config, tensors = read_folder(source)
    reading = formats.read(config, tensors)
    own = save_draft(load_draft(source), tmp_path / "own", reading.text, reading.settings)
    for folder in (source, own):  # straight, and through our own layout
        out = export_draft(folder, tmp_path / "out", "deepspec")
        assert json.loads((out / "config.json").read_text()) == config
        written = load_file(out / "model.safetensors")
        assert written.keys() == tensors.keys()
        for key, value in tensors.items():
            assert written[key].dtype == value.dtype and torch.equal(written[key], value), key


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["own", "deepspec", "vllm", "sglang"])
def test_the_dtype_says_what_the_tensors_are(form: str, stored: torch.dtype, tmp_path: Path) -> None:
    """Whatever the target's own configuration says: drafts are trained in another dtype than it is stored in."""
    small = {"backbone": "llama", "layers": 1, "taps": BELOW}
    kind, settings = ("eagle3", small) if form == "sglang" else ("dspark", {})
    draft, kept, config = made(kind, "qwen3", **settings)
    text = {**config, "dtype": "float64", "torch_dtype": "float64"}
    folder = save_draft(copy.deepcopy(draft).to(stored), tmp_path / "own", text, kept)
    if form != "own":
        folder = export_draft(folder, tmp_path / "out", form)
    config = json.loads((folder / "config.json").read_text())
    said = {config[key] for key in ("dtype", "torch_dtype") if key in config}
    floating = {t.dtype for t in load_file(folder / "model.safetensors").values() if t.is_floating_point()}
    assert floating == {stored} and said == {str(stored).removeprefix("torch.")}


def test_mixed_tensors_are_called_what_holds_them_all() -> None:
    pair = {"a": torch.zeros(2, dtype=torch.bfloat16), "d2t": torch.zeros(2, dtype=torch.int64)}
    assert dtype_of(pair) == "bfloat16"
    assert dtype_of(pair | {"b": torch.zeros(2)}) == "float32"
    assert dtype_of(pair | {"b": torch.zeros(2, dtype=torch.float16)}) == "float32"


@pytest.mark.parametrize(
    ("method", "family", "settings"),
    [
        *tiny.across(tiny.METHODS, {}),
        *((m, "qwen3", {"window": 5}) for m in tiny.LAYERED),
        *((m, "qwen3", {"backbone": "gemma4"}) for m in tiny.LAYERED),
        *((m, "gemma4", {"backbone": "qwen3"}) for m in tiny.LAYERED),
        *((m, "qwen3", {"backbone": "llama"}) for m in tiny.LAYERED),
        *((m, "qwen3", {"ids": IDS}) for m in tiny.METHODS),
        ("dspark", "gemma4", {"markov_head": "rnn", "ids": IDS}),
        ("dspark", "qwen3", {"markov_head": "gated", "confidence_with_markov": False}),
        ("dflash", "qwen3", {"sample_from_anchor": False}),
        ("eagle3", "qwen3", {"train_tables": True, "ids": IDS}),
    ],
)
def test_our_own_layout_holds_every_draft(method: str, family: str, settings: dict, tmp_path: Path) -> None:
    draft, kept, config = made(method, family, **settings)
    loaded = load_draft(save_draft(draft, tmp_path, config, kept))
    same(draft, loaded, family)
    ids = settings.get("ids")
    assert (ids is None) == (loaded.draft_vocabulary is None)
    assert ids is None or torch.equal(loaded.draft_vocabulary, ids)
    assert taps_of(tmp_path) == list(tiny.TAPS)
    # Other tools know the folder for what it is: a name of DeepSpec's only where DeepSpec can read it.
    name = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    assert name.startswith("SpecBench") == (obstacle(draft, "deepspec") is not None)


@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_reduced_vocabulary_decodes_losslessly(method: str, tmp_path: Path) -> None:
    draft, kept, config = made(method, ids=IDS)
    draft = load_draft(save_draft(draft, tmp_path, config, kept))
    owner = tiny.target("qwen3")
    prompts = [s.tokens[:5].tolist() for s in tiny.samples("qwen3", lengths=(9, 9, 9))]
    limits = Limits(max_new_tokens=12, batch_size=3)
    own = {d.index: d.output_ids for d in decode(owner, prompts, Sampling(), limits)}
    done = list(speculative_decode(owner, draft, prompts, Sampling(), limits))
    assert {d.index: d.output_ids for d in done} == own
    sampled = speculative_decode(owner, draft, prompts, Sampling(1.0), limits)
    assert all(len(d.output_ids) == 12 for d in sampled)
    proposals = []
    draft_propose = draft.propose
    draft.propose = lambda *a, **k: proposals.append(draft_propose(*a, **k)) or proposals[-1]
    list(speculative_decode(owner, draft, prompts, Sampling(1.0), limits))
    assert {int(t) for p in proposals for t in p.tokens.flatten()} <= set(IDS.tolist())
    assert all(p.probabilities.shape[-1] == tiny.VOCABULARY for p in proposals)
    outside = torch.ones(tiny.VOCABULARY, dtype=torch.bool).index_fill_(0, IDS, False)
    assert all(float(p.probabilities[..., outside].abs().sum()) == 0 for p in proposals)


def test_vllm_dspark_field_by_field(tmp_path: Path) -> None:
    draft, kept, config = made("dspark", layers=2)
    save_draft(draft, tmp_path / "own", config, kept)
    out = export_draft(tmp_path / "own", tmp_path / "out", "vllm", verifier="me/target")
    written = json.loads((out / "config.json").read_text())
    expected = {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": "dspark",
        "draft_vocab_size": tiny.VOCABULARY,
        "aux_hidden_state_layer_ids": [1, 3, 4],
        "mask_token_id": tiny.MASK,
        "block_size": 4,
        "sample_from_anchor": True,
        "markov_rank": 6,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "tie_word_embeddings": False,
    }
    assert {key: written[key] for key in expected} == expected
    layer = written["transformer_layer_config"]
    assert layer["model_type"] == "qwen3" and layer["num_hidden_layers"] == 2 and layer["head_dim"] == 8
    assert layer["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert layer["max_position_embeddings"] == config["max_position_embeddings"] == 512
    assert written["speculators_config"]["verifier"]["name_or_path"] == "me/target"
    assert written["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    tensors = load_file(out / "model.safetensors")
    assert not {"d2t", "t2d"} & tensors.keys()  # a whole vocabulary needs no map
    same(draft, load_draft(out))


def test_vllm_dflash_counts_the_anchor(tmp_path: Path) -> None:
    draft, kept, config = made("dflash", sample_from_anchor=False)
    save_draft(draft, tmp_path / "own", config, kept)
    out = export_draft(tmp_path / "own", tmp_path / "out", "vllm")
    written = json.loads((out / "config.json").read_text())
    assert (written["block_size"], written["sample_from_anchor"]) == (5, False)
    assert "markov_rank" not in written
    same(draft, load_draft(out))
    del written["sample_from_anchor"]  # older files do not have it
    (out / "config.json").write_text(json.dumps(written))
    same(draft, load_draft(out))


@pytest.mark.parametrize("form", ["vllm", "sglang"])
def test_llama_like_eagle3_with_a_reduced_vocabulary(form: str, tmp_path: Path) -> None:
    draft, kept, config = made("eagle3", backbone="llama", ids=IDS, block_size=7, taps=BELOW)
    save_draft(draft, tmp_path / "own", config, kept)
    out = export_draft(tmp_path / "own", tmp_path / "out", form)
    written, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert torch.equal(tensors["d2t"] + torch.arange(len(IDS)), IDS)
    assert tensors["t2d"].nonzero().flatten().tolist() == IDS.tolist()
    assert tensors["lm_head.weight"].shape == (len(IDS), 32) and written["draft_vocab_size"] == len(IDS)
    if form == "vllm":
        assert written["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
        assert written["norm_before_residual"] is False
        assert "layers.0.self_attn.q_proj.weight" in tensors
    else:
        assert written["architectures"] == ["LlamaForCausalLMEagle3"]
        assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == BELOW
        assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
        assert "embed_tokens.weight" not in tensors and not any("layers.0" in key for key in tensors)
        with pytest.raises(FormatError, match="ships no embedding"):
            load_draft(out)
    same(draft, load_draft(out, tiny.target("qwen3").tables))


def test_norm_before_residual_adds_to_the_normed_feature(tmp_path: Path) -> None:
    draft, kept, config = made("eagle3", backbone="llama")
    save_draft(draft, tmp_path / "own", config, kept)
    out = export_draft(tmp_path / "own", tmp_path / "out", "vllm")
    written = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(written | {"norm_before_residual": True}))
    other = load_draft(out)
    assert other.backbone == dataclasses.replace(draft.backbone, norm_before_residual=True)
    layer, x = other.layers[0], torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(3, 4, 8)  # attention gives nothing: what is left is the residual and the feed-forward
    normed = layer.hidden_norm(x)
    expected = normed + layer.mlp(layer.post_attention_layernorm(normed))
    torch.testing.assert_close(layer.finish(x, seen), expected)
    torch.testing.assert_close(
        draft.layers[0].finish(x, seen), x + draft.layers[0].mlp(layer.post_attention_layernorm(x))
    )
    again = export_draft(out, tmp_path / "again", "vllm")
    assert json.loads((again / "config.json").read_text())["norm_before_residual"] is True
    same(other, load_draft(again))
    assert "normed feature" in obstacle(other, "sglang")


@pytest.mark.parametrize(
    ("method", "family", "settings", "form", "reason"),
    [
        ("mtp", "qwen3", {}, "deepspec", "MTP has no published format"),
        ("mtp", "qwen3", {}, "vllm", "MTP has no published format"),
        ("dspark", "qwen3", {"window": 8}, "vllm", "sliding window"),
        ("dspark", "qwen3", {"markov_head": "rnn"}, "vllm", "rnn Markov head"),
        ("dspark", "qwen3", {"markov_head": "gated"}, "vllm", "gated Markov head"),
        ("dspark", "qwen3", {"markov_rank": 0, "confidence_with_markov": False}, "vllm", "no Markov head"),
        ("dspark", "qwen3", {"sample_from_anchor": False}, "deepspec", "mask tokens only"),
        ("dspark", "qwen3", {"ids": IDS}, "deepspec", "reduced vocabulary"),
        ("dspark", "qwen3", {"backbone": "gemma4"}, "deepspec", "another family"),
        ("dspark", "qwen3", {"backbone": "llama"}, "deepspec", "Llama-like"),
        ("dspark", "gemma4", {"backbone": "qwen3"}, "deepspec", "another family"),
        ("dspark", "gemma4", {}, "vllm", "format=deepspec"),
        ("dflash", "qwen3", {}, "vllm", "sample_from_anchor=false"),
        ("dflash", "qwen3", {}, "sglang", r"SGLang 0\.5\.23 .*sample_from_anchor=false"),
        ("dflash", "qwen3", {"backbone": "llama"}, "vllm", r"vLLM 0\.32\.0 .*method.backbone=qwen3"),
        ("dflash", "qwen3", {"sample_from_anchor": False}, "sglang", "last layer.*layer 3 of 4"),
        ("dspark", "qwen3", {"ids": IDS}, "sglang", "reduced vocabulary"),
        ("dspark", "qwen3", {"markov_rank": 0, "confidence_with_markov": False}, "sglang", "needs a Markov head"),
        ("eagle3", "qwen3", {}, "sglang", "method.backbone=llama"),
        ("eagle3", "qwen3", {"backbone": "llama", "layers": 2}, "sglang", "first layer alone"),
        ("eagle3", "qwen3", {"backbone": "llama", "train_tables": True}, "sglang", "trained its own"),
    ],
)
def test_what_an_engine_cannot_load_is_refused(method, family, settings, form, reason, tmp_path: Path) -> None:
    draft, kept, config = made(method, family, **settings)
    save_draft(draft, tmp_path / "own", config, kept)
    with pytest.raises(FormatError, match=reason):
        export_draft(tmp_path / "own", tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings", [{}, {"markov_head": "gated"}, {"markov_head": "rnn"}, {"sample_from_anchor": False}]
)
def test_sglang_dspark_has_deepspecs_names(settings: dict, tmp_path: Path) -> None:
    """SGLang 0.5.23: gamma is block_size whether or not the anchor predicts; markov_head_type is needed."""
    draft, kept, config = made("dspark", taps=[-1, 0, 1, 2], **settings)
    save_draft(draft, tmp_path / "own", config, kept)
    out = export_draft(tmp_path / "own", tmp_path / "out", "sglang")
    written, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert written["architectures"] == ["Qwen3DSparkModel"] and written["target_layer_ids"] == [-1, 0, 1, 2]
    assert (written["block_size"], written["markov_rank"]) == (4, 6) and written["num_target_layers"] == 4
    assert written["markov_head_type"] == settings.get("markov_head", "vanilla")
    assert written.get("sample_from_anchor", True) == settings.get("sample_from_anchor", True)
    assert written["max_position_embeddings"] == 512
    assert tensors["fc.weight"].shape == (32, 4 * 32) and tensors["markov_head.markov_w2.weight"].shape[1] == 6
    loaded = load_draft(out)
    same_facts(draft, loaded)
    assert (loaded.markov_head.kind, loaded.sample_from_anchor) == (draft.markov_head.kind, draft.sample_from_anchor)


def test_sglang_dflash_is_z_labs(tmp_path: Path) -> None:
    draft, kept, config = made("dflash", taps=BELOW, sample_from_anchor=False, layers=2)
    save_draft(draft, tmp_path / "own", config, kept)
    out = export_draft(tmp_path / "own", tmp_path / "out", "sglang")
    written, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert written["architectures"] == ["DFlashDraftModel"] and written["block_size"] == 5
    assert written["dflash_config"] == {"target_layer_ids": BELOW, "mask_token_id": tiny.MASK}
    assert not {"embed_tokens.weight", "lm_head.weight"} & tensors.keys() and "layers.1.mlp.up_proj.weight" in tensors
    same(draft, load_draft(out, tiny.target("qwen3").tables))


@pytest.mark.parametrize("form", ["vllm", "sglang"])
@pytest.mark.parametrize("taps", [[0, 1], [-1, 0, 1, 2]])
def test_a_llama_draft_says_how_many_taps_it_fuses(form: str, taps: list[int], tmp_path: Path) -> None:
    """Without `num_aux_hidden_states`, llama_eagle3.py of vLLM fuses three."""
    draft, kept, config = made("eagle3", backbone="llama", taps=taps)
    save_draft(draft, tmp_path / "own", config, kept)
    out = export_draft(tmp_path / "own", tmp_path / "out", form)
    written = json.loads((out / "config.json").read_text())
    place = written["transformer_layer_config"] if form == "vllm" else written
    assert place["num_aux_hidden_states"] == len(taps)
    tables = tiny.target("qwen3").tables
    loaded = load_draft(out, tables)
    same_facts(draft, loaded)
    place["num_aux_hidden_states"] = 3
    (out / "config.json").write_text(json.dumps(written))
    with pytest.raises(FormatError, match="num_aux_hidden_states=3"):
        load_draft(out, tables)


def test_vllm_takes_norms_of_queries_and_masks_only_dspark(tmp_path: Path) -> None:
    for number, (method, settings) in enumerate([("eagle3", {}), ("dspark", {"sample_from_anchor": False})]):
        draft, kept, config = made(method, **settings)
        save_draft(draft, tmp_path / f"own{number}", config, kept)
        out = export_draft(tmp_path / f"own{number}", tmp_path / f"out{number}", "vllm")
        written = json.loads((out / "config.json").read_text())
        assert written["transformer_layer_config"]["model_type"] == "qwen3"
        assert method == "eagle3" or (written["block_size"], written["sample_from_anchor"]) == (5, False)
        same(draft, load_draft(out, tiny.target("qwen3").tables))


@pytest.mark.parametrize("form", ["vllm", "sglang"])
def test_an_engine_is_always_told_the_positions(form: str, tmp_path: Path) -> None:
    """A configuration that leaves its class's default out has that default; one of an unknown class is refused."""
    draft, kept, config = made("eagle3", backbone="llama", taps=BELOW)
    short = {key: value for key, value in config.items() if key != "max_position_embeddings"}
    save_draft(draft, tmp_path / "own", short, kept)
    out = export_draft(tmp_path / "own", tmp_path / "out", form)
    written = json.loads((out / "config.json").read_text())
    place = written["transformer_layer_config"] if form == "vllm" else written
    assert place["max_position_embeddings"] == Qwen3Config().max_position_embeddings
    save_draft(draft, tmp_path / "odd", {**short, "model_type": "other"}, kept)
    with pytest.raises(FormatError, match="max_position_embeddings"):
        export_draft(tmp_path / "odd", tmp_path / "none", form)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_written_draft_stays_until_its_successor_is_whole(verb, tmp_path, capsys):
    source = GOLDEN / "qwen3_dspark_vanilla" / "draft"
    place = tmp_path / "written"
    words = [verb, f"draft={source}", f"folder={place}", f"root={tmp_path}"]
    words += ["format=deepspec"] if verb == "export" else []
    assert main(words) == 0, capsys.readouterr().err
    before = bytes_of(place)
    assert main(words) == 2 and "force=true" in capsys.readouterr().err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((source / "config.json").read_text())
    assert main([w if not w.startswith("draft=") else f"draft={tmp_path}/broken" for w in words] + ["force=true"]) == 2
    assert bytes_of(place) == before
    assert main([*words, "force=true"]) == 0, capsys.readouterr().err
    assert bytes_of(place).keys() == before.keys() and sorted(p.name for p in tmp_path.iterdir()) == [
        "broken",
        "written",
    ]
    other = tmp_path / "notes"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert main([w if not w.startswith("folder=") else f"folder={other}" for w in words] + ["force=true"]) == 2
    assert bytes_of(other) == {"thesis.txt": b"mine"}


@pytest.mark.parametrize(
    "where, key",
    [((), "foo"), ((), "final_logit_softcap"), (("specbench",), "class_"), (("specbench", "settings"), "slots")],
)
def test_no_key_of_our_own_format_is_passed_over(where, key, tmp_path):
    draft, kept, config = made("dspark")
    save_draft(draft, tmp_path / "draft", config, kept)
    tables = tiny.target("qwen3").tables
    load_draft(tmp_path / "draft", tables)
    file = tmp_path / "draft" / "config.json"
    facts = json.loads(file.read_text())
    place = facts
    for name in where:
        place = place[name]
    place[key] = 1
    file.write_text(json.dumps(facts))
    with pytest.raises(FormatError, match=key):
        load_draft(tmp_path / "draft", tables)


def test_a_field_that_contradicts_the_settings_is_refused(tmp_path):
    draft, kept, config = made("dspark")
    save_draft(draft, tmp_path / "draft", config, kept)
    file = tmp_path / "draft" / "config.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "target_layer_ids": [0, 1]}))
    with pytest.raises(FormatError, match=r"target_layer_ids=\[0, 1\] and specbench.settings.target_layer_ids"):
        load_draft(tmp_path / "draft", tiny.target("qwen3").tables)
