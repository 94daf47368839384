"""Published drafts load right or not at all: parity with the formulas, and every key and tensor accounted for."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig

from specbench.blocks import with_anchors
from specbench.checkpoints import obstacles
from specbench.checkpoints.config_keys import NEUTRAL, REASONS, FormatError
from specbench.checkpoints.draft_folder import build_draft, export_draft, load_draft, save_draft
from specbench.checkpoints.obstacles import obstacle
from specbench.models.embedding_head import Tables
from specbench.training.warm_start import from_draft
from tests import published, tiny, transcriptions
from tests.test_interchange import IDS, made, same

WHOLE = torch.arange(tiny.VOCABULARY)
GPT_OSS = {"norm_before_fc": True}
EAGLE31 = {"fc_norm": True, "norm_output": True}


def changed(kind: str, *path: str, **values) -> dict:
    """The format's configuration with `values` in the section at `path`."""
    config = copy.deepcopy(published.config(kind))
    section = config
    for name in path:
        section = section.setdefault(name, {}) if not isinstance(section, list) else section[int(name)]
    section.update(values)
    return config


def norms(facts: dict, seed: int = 9) -> dict[str, torch.Tensor]:
    """The tensors of Eagle3's norms before the fusion."""
    generator, width = torch.Generator().manual_seed(seed), published.D
    found = {}
    if facts.get("fc_norm"):
        found |= {f"fc_norm.{i}.weight": 1 + 0.3 * torch.randn(width, generator=generator) for i in range(published.C)}
    if facts.get("norm_before_fc"):
        found["input_norm.weight"] = 1 + 0.3 * torch.randn(published.C * width, generator=generator)
    return found


def logits(draft, anchors: tuple[int, ...] = (5, 9, 13)) -> dict[int, torch.Tensor]:
    """Training-view logits (K, W) of some anchors of one conversation."""
    batch = with_anchors(tiny.pack([tiny.samples("qwen3")[0]]), None)
    with torch.no_grad():
        blocks = draft(batch)
        found = draft.logits(blocks.hidden, blocks.previous)
    return {a: found[0, int((batch.anchors[0] == a).nonzero())] for a in anchors}


def held_to_transcription(draft, transcribe) -> None:
    """`transcribe(taps, tokens, anchor)` gives the logits that the formulas give."""
    sample = tiny.samples("qwen3")[0]
    for anchor, found in logits(draft).items():
        expected = transcribe(sample.taps, sample.tokens, anchor)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def biased(facts: dict) -> str:
    """Which projections of a checkpoint have biases."""
    return "self_attn" if facts.get("attention_bias") else "mlp" if facts.get("mlp_bias") else ""


LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
EAGLES = [
    ("sglang", (), {}),
    ("sglang", (), {"rope_theta": None}),
    ("sglang", (), EAGLE31),
    ("sglang", ("eagle_config",), EAGLE31),
    ("sglang", ("eagle_config",), GPT_OSS),
    ("sglang", (), {"norm_before_residual": True}),
    ("sglang", (), {"attention_bias": True}),
    ("sglang", (), {"mlp_bias": True}),
    *(("sglang", (), {"rope_scaling": scaling, "rope_theta": 100.0}) for scaling in (LINEAR, LLAMA3, YARN)),
    ("sglang", (), {"rope_scaling": YARN | {"attention_factor": 1.5}, "rope_theta": 100.0}),
    ("sglang", (), {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 0.3}),
    ("sglang", (), {"tie_word_embeddings": True}),
    ("sglang", (), {"layer_types": ["sliding_attention"], "sliding_window": 5}),
    ("speculators_eagle3", (), {}),
    ("speculators_eagle3", (), EAGLE31 | {"norm_before_residual": True}),
    ("speculators_eagle3", (), GPT_OSS | {"norm_output": True}),
    ("speculators_eagle3", ("transformer_layer_config",), {"model_type": "qwen3"}),
    ("speculators_eagle3", ("transformer_layer_config",), {"rope_theta": None, "rope_parameters": {"rope_theta": 7e3}}),
    ("deepspec_eagle3", (), {}),
    ("deepspec_eagle3", (), {"rope_theta": None}),
]


@pytest.mark.parametrize(("kind", "path", "facts"), EAGLES)
def test_eagle3s_give_the_formulas_logits(kind: str, path: tuple[str, ...], facts: dict) -> None:
    config = changed(kind, *path, **facts)
    with_norms = None if facts.get("model_type") != "qwen3" else True
    held = published.tensors(kind, bias=biased(facts), qk_norms=with_norms) | norms(facts)
    if facts.get("tie_word_embeddings"):
        del held["lm_head.weight"]
    draft = build_draft(config, published.stored(kind, held))
    c = published.FACTS | {"rope_theta": 5e4} | facts
    c["rope_theta"] = c.get("rope_parameters", {}).get("rope_theta") or c["rope_theta"] or 1e4  # the classes' default
    held_to_transcription(draft, lambda *at: transcriptions.eagle3(c, held, *at, draft.block_size))


P_EAGLES = [
    ("speculators_peagle", {}),
    ("speculators_peagle", {"fc_norm": True, "norm_before_residual": True}),
    ("speculators_peagle", GPT_OSS | {"norm_output": True}),
    ("sglang", {"parallel_drafting": True, "pard_token": tiny.MASK}),
    ("sglang", {"ptd_token_id": tiny.MASK, "fc_norm": True}),
]


@pytest.mark.parametrize(("kind", "facts"), P_EAGLES)
def test_p_eagles_give_the_formulas_logits(kind: str, facts: dict) -> None:
    """speculators' format, and SGLang's with the mask token that vLLM reads. Depths that pass nothing on have no use
    for norm_output."""
    held = published.tensors("speculators_peagle") | norms(facts)
    config = changed(kind, **facts, **({"num_hidden_layers": 2} if kind == "sglang" else {}))
    draft = build_draft(config, published.stored(kind, held))
    assert draft.block_size == (8 if kind == "sglang" else 4) and len(draft.layers) == 2
    c = published.FACTS | {"rope_theta": 5e4, "num_hidden_layers": 2, "mask_token_id": tiny.MASK} | facts
    held_to_transcription(draft, lambda *at: transcriptions.p_eagle(c, held, *at, draft.block_size))


SLIDING = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 6, "use_sliding_window": True}
BLOCKS = [
    ("z-lab", (), {}, False),
    ("z-lab", (), {"rope_theta": None}, False),
    ("z-lab", (), SLIDING, True),
    ("z-lab", (), SLIDING | {"is_causal": False}, False),
    ("z-lab", (), {"layer_types": None, "max_window_layers": 0} | SLIDING | {"layer_types": None}, True),
    ("z-lab", (), {"is_causal": True}, True),
    ("z-lab", ("dflash_config",), {"causal_head": True}, True),
    ("z-lab", ("dflash_config",), {"causal": True}, True),
    ("z-lab", ("dflash_config",), {"output_multiplier": 0.5, "final_logit_softcapping": 3.0}, False),
    ("z-lab", (), {"output_multiplier": 2.0, "input_embedding_scale": 1.7}, False),
    ("z-lab", (), {"attention_bias": True}, False),
    ("z-lab", (), {"rope_scaling": LLAMA3, "rope_theta": 100.0}, False),
    ("z-lab", (), {"rope_scaling": YARN, "rope_theta": 100.0}, False),
    ("z-lab", (), SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}, True),
    ("z-lab", (), SLIDING | {"layer_types": ["full_attention", "sliding_attention"], "is_causal": False}, False),
    ("z-lab", (), SLIDING | {"layer_types": None, "max_window_layers": 1}, True),
    ("speculators_dflash", (), {}, False),
    (
        "speculators_dflash",
        ("transformer_layer_config",),
        SLIDING | {"layer_types": ["sliding_attention", "full_attention"]},
        True,
    ),
    ("speculators_dflash", ("transformer_layer_config",), SLIDING, True),
    ("speculators_dflash", ("transformer_layer_config",), {"model_type": "llama"}, False),
]


@pytest.mark.parametrize(("kind", "path", "facts", "causal"), BLOCKS)
def test_blocks_give_the_formulas_logits(kind: str, path: tuple[str, ...], facts: dict, causal: bool) -> None:
    config, held = changed(kind, *path, **facts), published.tensors(kind, bias=biased(facts))
    tables = Tables(held["embed_tokens.weight"], held["lm_head.weight"])
    draft = build_draft(config, published.stored(kind, held), tables)
    assert draft.causal_block is causal and draft.block_size == 4 and not draft.sample_from_anchor
    c = (
        published.FACTS
        | {"rope_theta": 5e4, "num_hidden_layers": 2, "block_size": 5, "mask_token_id": tiny.MASK}
        | facts
    )
    c |= {"causal": causal, "rope_theta": c["rope_theta"] or 1e4}
    if c.get("sliding_window") and not c["layer_types"]:
        c["layer_types"] = ["sliding_attention" if i >= c["max_window_layers"] else "full_attention" for i in range(2)]
    held_to_transcription(draft, lambda taps, tokens, a: transcriptions.block(c, held, taps, int(tokens[a]), a))


def test_both_ways_in_a_window_is_not_one_way() -> None:
    held = published.tensors("speculators_dflash")
    found = {}
    for both in (False, True):
        config = changed("speculators_dflash", "transformer_layer_config", **SLIDING)
        draft = build_draft(config | {"sliding_window_non_causal": both}, held)
        assert draft.causal_block is not both and draft.backbone.window == 6
        found[both] = logits(draft)[9]
    assert (found[True] - found[False]).abs().max() > 1e-2


def test_zlab_keeps_the_targets_embedding_scale_and_takes_its_caps_from_its_own_configuration(tmp_path: Path) -> None:
    """A target with scale 5 and cap 2: the draft reads scaled embeddings, and its logits are capped by its own rule."""
    held = published.tensors("z-lab")
    tables = Tables(held["embed_tokens.weight"], held["lm_head.weight"], 5.0, 2.0)
    config = changed("z-lab", "dflash_config", input_embedding_scale=0.5, final_logit_softcapping=4.0)
    draft = build_draft(config, published.stored("z-lab", held), tables)
    c = published.FACTS | {"rope_theta": 5e4, "num_hidden_layers": 2, "block_size": 5, "mask_token_id": tiny.MASK}
    c |= {"causal": False, "input_embedding_scale": 2.5, "final_logit_softcapping": 4.0}
    held_to_transcription(draft, lambda taps, tokens, a: transcriptions.block(c, held, taps, int(tokens[a]), a))
    kept = {"layers": 2, "block_size": 4, "target_layer_ids": published.TAPS, "mask_token_id": tiny.MASK}
    again = load_draft(save_draft(draft, tmp_path, tiny.QWEN3, kept | {"sample_from_anchor": False}))
    same(draft, again)  # our own layout remembers the scales
    plain = build_draft(published.config("z-lab"), published.stored("z-lab", held), tables)
    assert (plain.tables.embedding_scale, plain.tables.soft_cap) == (5.0, None)


def sections(kind: str) -> list[tuple[str, ...]]:
    """Every mapping of a configuration, by the path to it."""

    def below(value, path):
        if isinstance(value, dict):
            yield path
            for key, inner in value.items():
                if key not in REASONS:
                    yield from below(inner, (*path, key))
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                yield from below(inner, (*path, str(i)))

    return list(below(published.config(kind), ()))


def built(config: dict, kind: str):
    held = published.tensors(kind)
    return build_draft(
        config, published.stored(kind, held), Tables(held["embed_tokens.weight"], held["lm_head.weight"])
    )


@pytest.mark.parametrize("kind", published.KINDS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_no_key_is_passed_over(kind: str, data) -> None:
    """A key of any name, with any value but null, at any depth, is an error that names it."""
    path = data.draw(st.sampled_from(sections(kind)))
    key = "x_" + data.draw(st.text("abcdefgh_", min_size=1, max_size=12))
    value = data.draw(st.sampled_from([True, False, 0, 1, 2.5, "text", [], [1], {}, {"a": 1}]))
    with pytest.raises(FormatError, match=rf"\b{key} is not known here"):
        built(changed(kind, *path, **{key: value}), kind)


# Which of the keys with a neutral value a format gives a meaning to, and so reads.
GIVEN_A_MEANING = {
    "sglang": {"fc_norm", "norm_before_fc", "norm_output", "norm_before_residual", "tie_word_embeddings"}
    | {"mlp_bias"},
    "speculators_eagle3": {"fc_norm", "norm_before_fc", "norm_output", "norm_before_residual"},
    "speculators_peagle": {"fc_norm", "norm_before_fc", "norm_output", "norm_before_residual"},
    "z-lab": {
        "is_causal",
        "final_logit_softcapping",
        "output_multiplier",
        "input_embedding_scale",
        "tie_word_embeddings",
    },
}


@pytest.mark.parametrize("kind", published.KINDS)
@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_a_key_that_changes_the_draft_is_implemented_or_refused_by_name(kind: str, key: str) -> None:
    neutral = NEUTRAL[key][0]
    other = next(v for v in (True, False, 2.5) if not any(v is n or (v == n and type(v) is type(n)) for n in neutral))
    if isinstance(other, bool) and any(isinstance(n, int) and not isinstance(n, bool) for n in neutral):
        other = 3
    for value in neutral:
        if value is not None or key not in published.config(kind):
            built(changed(kind, **{key: value}), kind)
    if key in GIVEN_A_MEANING.get(kind, ()):
        return  # held to the formulas above
    with pytest.raises(FormatError, match=key):
        built(changed(kind, **{key: other}), kind)


@pytest.mark.parametrize("kind", published.KINDS)
def test_what_is_declared_irrelevant_is_so(kind: str) -> None:
    plain, config = built(published.config(kind), kind), published.config(kind)
    extra = {key: value for key, value in dict.fromkeys(REASONS, "anything").items() if key not in config}
    extra.pop("model_type", None), extra.pop("architectures", None)
    found = built(config | extra, kind)
    assert found.backbone == plain.backbone
    for one, other in zip(logits(found).values(), logits(plain).values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("kind", "family"), [("sglang", "llama"), ("speculators_eagle3", "llama"), ("z-lab", "qwen3")])
def test_what_the_library_writes_is_understood(kind: str, family: str, whole: bool) -> None:
    """A configuration as transformers saves it: every key, and only those that differ from the class's defaults."""
    facts = published.FACTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    library = AutoConfig.for_model(family, **facts, num_hidden_layers=2 if family == "qwen3" else 1)
    layer = json.loads(json.dumps(library.to_dict() if whole else library.to_diff_dict()))
    config = published.config(kind)
    if kind.startswith("speculators"):
        config["transformer_layer_config"] = layer
    else:
        config = {k: v for k, v in config.items() if k not in facts | {"rope_theta": 0}} | {
            k: v for k, v in layer.items() if k != "architectures"
        }
    found, plain = built(config, kind), built(published.config(kind), kind)
    assert found.backbone == plain.backbone


TYPED = [
    ("sglang", ("hidden_size",), "32"),
    ("sglang", ("hidden_size",), 32.0),
    ("sglang", ("num_attention_heads",), 0),
    ("sglang", ("num_key_value_heads",), 3),
    ("sglang", ("rms_norm_eps",), "1e-6"),
    ("sglang", ("rope_theta",), float("nan")),
    ("sglang", ("rope_theta",), -1.0),
    ("sglang", ("attention_bias",), 1),
    ("sglang", ("hidden_act",), "relu"),
    ("sglang", ("architectures",), "LlamaForCausalLMEagle3"),
    ("sglang", ("eagle_config",), [1, 2]),
    ("sglang", ("eagle_config", "eagle_aux_hidden_state_layer_ids"), [0, "2", 3]),
    ("sglang", ("eagle_config", "fc_norm"), "yes"),
    ("sglang", ("rope_scaling",), {"rope_type": "dynamic", "factor": 4.0}),
    ("sglang", ("rope_scaling",), {"rope_type": "yarn", "factor": 4.0, "long_factor": [1.0]}),
    ("sglang", ("rope_scaling",), {"rope_type": "linear", "factor": "4"}),
    ("sglang", ("rope_scaling",), {"rope_type": "default", "factor": 4.0}),
    ("sglang", ("rope_parameters",), {"rope_theta": 1e6}),
    ("sglang", ("num_hidden_layers",), 2),
    ("sglang", ("quantization_config",), {"bits": 4}),
    ("sglang", ("target_hidden_size",), 64),
    ("speculators_dflash", ("block_size",), "5"),
    ("speculators_dflash", ("mask_token_id",), None),
    ("speculators_dflash", ("aux_hidden_state_layer_ids",), None),
    ("speculators_dflash", ("draft_vocab_size",), 40),
    ("speculators_dflash", ("transformer_layer_config",), None),
    ("speculators_dflash", ("speculators_config", "proposal_methods"), [3]),
    ("speculators_dspark", ("markov_head_type",), "cubic"),
    ("speculators_dspark", ("markov_rank",), -1),
    ("z-lab", ("dflash_config",), None),
    ("z-lab", ("layer_types",), ["sliding_attention"]),
    ("z-lab", ("layer_types",), ["sliding_attention", "sliding_attention"]),
    ("z-lab", ("layer_types",), ["full_attention", "linear_attention"]),
    ("z-lab", ("dflash_config", "mask_token_id"), 1000),
    ("z-lab", ("block_size",), 1),
    ("z-lab", ("dflash_config", "block_size"), 9),
    ("deepspec", ("model_type",), "llama"),
    ("deepspec", ("target_layer_ids",), None),
    ("deepspec_eagle3", ("num_hidden_layers",), 2),
]


@pytest.mark.parametrize(("kind", "path", "value"), TYPED)
def test_a_value_that_cannot_be_is_refused_by_its_key(kind: str, path: tuple[str, ...], value) -> None:
    with pytest.raises(ValueError, match=path[-1]) as caught:
        built(changed(kind, *path[:-1], **{path[-1]: value}), kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        ("z-lab", {"is_causal": False, "dflash_config": {"causal": True}}, "contradicts itself"),
        ("z-lab", {"block_size": 5, "dflash_config": {"block_size": 4}}, "contradicts itself"),
        ("z-lab", SLIDING | {"is_causal": False, "sliding_window": 4}, "sliding_window=4 is smaller than a block"),
        ("z-lab", SLIDING | {"use_sliding_window": False}, "use_sliding_window=False"),
        (
            "z-lab",
            SLIDING | {"layer_types": ["full_attention", "sliding_attention"], "is_causal": True},
            "is_causal .* layer_types mixes",
        ),
        ("sglang", {"norm_output": True, "eagle_config": {"norm_output": False}}, "contradicts itself"),
        ("sglang", {"fc_norm": True, "norm_before_fc": True}, "fc_norm and norm_before_fc"),
        ("sglang", {"pard_token": 3, "ptd_token_id": 4}, "contradicts itself"),
        ("sglang", {"parallel_drafting": True}, "none of mask_token_id, pard_token, ptd_token_id"),
        ("sglang", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "contradicts itself"),
        ("sglang", {"model_type": "phi3", "rope_theta": None}, "rope_theta"),
        ("sglang", {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "llama3.* lacks low_freq_factor"),
        ("sglang", {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 2.0}}, "contradicts itself"),
    ],
)
def test_what_contradicts_itself_is_refused(kind: str, values: dict, reason: str) -> None:
    config = published.config(kind)
    nested = {key: config[key] | value for key, value in values.items() if isinstance(config.get(key), dict)}
    with pytest.raises(FormatError, match=reason):
        built(config | values | nested, kind)


@pytest.mark.parametrize("kind", published.KINDS)
def test_every_tensor_is_used_or_named(kind: str) -> None:
    config, held = published.config(kind), published.stored(kind, published.tensors(kind))
    tables = Tables(*(published.tensors(kind)[f"{name}.weight"] for name in ("embed_tokens", "lm_head")))
    plain = build_draft(config, held, tables)
    optional = {"sglang": {"embed_tokens.weight", "lm_head.weight"}}.get(kind, set())
    if kind.startswith("speculators"):
        optional = {"embed_tokens.weight"}
    for name in held:
        cut = {key: value for key, value in held.items() if key != name}
        if name in optional:
            build_draft(config, cut, tables)
            continue
        with pytest.raises(
            FormatError, match=r"missing \['[\w.]*" + name.removeprefix("midlayer.").replace(".", r"\.")
        ):
            build_draft(config, cut, tables)
    strange = "second_norm.weight" if kind == "speculators_peagle" else "mask_hidden"
    for name in ("layers.0.self_attn.sinks", strange, "fc_norm.0.weight", "fc.bias", "input_norm.weight"):
        with pytest.raises(FormatError, match=rf"unknown .*{name}"):
            build_draft(config, held | {name: torch.ones(3)}, tables)
    twice = "midlayer.mlp.up_proj.weight" if kind == "sglang" else "norm.weight"
    with pytest.raises(FormatError, match=r"twice"):
        build_draft(config, held | {f"model.{twice}": held[twice]}, tables)
    frequencies = plain.backbone.inverse_frequencies()
    known = {"verifier_norm.weight": torch.ones(3), "layers.0.self_attn.rotary_emb.inv_freq": frequencies}
    for one, other in zip(
        logits(build_draft(config, held | known, tables)).values(), logits(plain).values(), strict=True
    ):
        assert torch.equal(one, other)
    with pytest.raises(FormatError, match=r"inv_freq holds other rope frequencies"):
        build_draft(config, held | {"layers.0.self_attn.rotary_emb.inv_freq": frequencies * 2}, tables)


def test_a_map_that_was_never_filled_in_is_refused() -> None:
    held, rows = published.tensors("sglang", rows=10), torch.zeros(10, dtype=torch.long)
    config = published.config("sglang") | {"draft_vocab_size": 10}
    with pytest.raises(FormatError, match="all zeros and there is no t2d"):
        build_draft(config, published.stored("sglang", held) | {"d2t": rows})
    marks = torch.arange(tiny.VOCABULARY) < 10
    found = build_draft(config, published.stored("sglang", held) | {"d2t": rows, "t2d": marks})
    assert found.draft_vocabulary.tolist() == list(range(10))
    with pytest.raises(FormatError, match="no d2t"):
        build_draft(config, published.stored("sglang", held))
    with pytest.raises(FormatError, match=r"d2t is .*float32"):
        build_draft(config, published.stored("sglang", held) | {"d2t": rows.float(), "t2d": marks})
    whole = published.stored("sglang", published.tensors("sglang")) | {"d2t": torch.zeros(tiny.VOCABULARY).long()}
    assert build_draft(published.config("sglang"), whole).draft_vocabulary is None


def test_a_target_of_other_sizes_does_not_lend_its_tables() -> None:
    held = published.tensors("z-lab")
    for shape in ((tiny.VOCABULARY + 1, 32), (tiny.VOCABULARY, 16)):
        with pytest.raises(FormatError, match="do not belong together"):
            build_draft(published.config("z-lab"), published.stored("z-lab", held), Tables(*torch.zeros(2, *shape)))


ROUND_TRIPS = [
    *(("dflash", form, {"sample_from_anchor": form == "deepspec"}) for form in ("deepspec", "vllm")),
    *(("dspark", form, {}) for form in ("deepspec", "vllm")),
    ("dspark", "deepspec", {"markov_head": "rnn"}),
    ("dspark", "vllm", {"ids": IDS, "confidence_with_markov": False}),
    ("eagle3", "deepspec", {}),
    *(("eagle3", form, {"backbone": "llama", "rope": LLAMA3}) for form in ("vllm", "sglang")),
    *(("dspark", form, {"rope": LINEAR}) for form in ("vllm", "deepspec")),
    *(
        ("eagle3", form, {"backbone": "llama"} | flags)
        for form in ("vllm", "sglang")
        for flags in ({}, {"fc_norm": True}, {"norm_output": True}, EAGLE31, {"ids": IDS}, EAGLE31 | {"ids": IDS})
    ),
    *(("eagle3", "vllm", {"backbone": "llama"} | flags) for flags in (GPT_OSS, GPT_OSS | {"norm_output": True})),
    *(("p_eagle", "vllm", {"backbone": "llama", "layers": 3} | flags) for flags in ({}, {"ids": IDS})),
    ("eagle3", "sglang", {"backbone": "llama"} | GPT_OSS),
]


@pytest.mark.parametrize(("method", "form", "flags"), ROUND_TRIPS)
def test_what_is_exported_is_read_back(method: str, form: str, flags: dict, tmp_path: Path) -> None:
    rope = flags.get("rope")
    settings = {key: value for key, value in flags.items() if key != "rope"}
    draft, kept, config = made(method, **({"block_size": 7, "taps": [0, 1, 2]} if form == "sglang" else {}), **settings)
    if rope is not None:
        config = config | {"rope_parameters": rope | {"rope_theta": 1e4}}
        scaled = dataclasses.replace(draft.backbone, rope_scaling=rope)
        weights, tables = draft.state_dict(), draft.tables
        draft = type(draft)(scaled, tables, **kept)
        draft.load_state_dict(weights)
    save_draft(draft, tmp_path / "own", config, kept)
    same(draft, load_draft(tmp_path / "own"))
    out = export_draft(tmp_path / "own", tmp_path / "out", form)
    found = load_draft(out, tiny.target("qwen3").tables)
    same(draft, found)
    written = json.loads((out / "config.json").read_text())
    places = [written, written.get("transformer_layer_config", {})]
    assert [p["max_position_embeddings"] for p in places if "max_position_embeddings" in p] == [512]


REFUSED = [
    *(("dflash", form, {"causal_block": True}, "causal_block") for form in ("deepspec", "vllm")),
    ("dspark", "vllm", {"causal_block": True}, "causal_block"),
    *(("eagle3", "deepspec", {name: True}, name) for name in ("fc_norm", "norm_output", "norm_before_fc")),
    *(("p_eagle", form, {"backbone": "llama"}, "P-?E") for form in ("deepspec", "sglang")),
    ("p_eagle", "vllm", {"backbone": "llama", "fc_norm": True}, "fc_norm"),
]


@pytest.mark.parametrize(("method", "form", "flags", "key"), REFUSED)
def test_what_a_format_has_no_key_for_is_refused_by_name(method, form, flags, key, tmp_path: Path) -> None:
    draft, kept, config = made(method, **flags)
    save_draft(draft, tmp_path / "own", config, kept)
    same(draft, load_draft(tmp_path / "own"))
    with pytest.raises(FormatError, match=key):
        export_draft(tmp_path / "own", tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_scaled_logits_have_no_key_in_any_format() -> None:
    draft = made("dflash", sample_from_anchor=False)[0]
    draft.backbone = dataclasses.replace(draft.backbone, logit_scale=0.5)
    for form in ("deepspec", "vllm"):
        assert "logit_scale=0.5" in obstacle(draft, form)


@pytest.mark.parametrize(("method", "form"), [("dflash", "deepspec"), ("dspark", "vllm"), ("eagle3", "sglang")])
def test_a_fact_of_the_layers_that_has_no_key_is_refused_by_name(method: str, form: str) -> None:
    """Every fact of a backbone that is away from its default, of the kinds that no export writes."""
    draft = made(method, backbone="llama" if method == "eagle3" else "qwen3")[0]
    facts, tried = draft.backbone, 0
    assert obstacle(draft, form) is None
    for fact in dataclasses.fields(facts):
        if fact.name in obstacles.PLAIN:
            continue
        kinds = {"bool": not fact.default, "Mapping": {"rope_type": "dynamic"}, "int": 3, "float": 0.25}
        other = next(value for kind, value in kinds.items() if kind in str(fact.type))
        draft.backbone = dataclasses.replace(facts, **{fact.name: other})
        assert f"{fact.name}=" in obstacle(draft, form) or fact.name == "sandwich"
        tried += 1
    assert tried > 5
    draft.backbone = dataclasses.replace(facts, family="gemma")
    assert "gemma's" in obstacle(draft, form)


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """A DeepSpec draft in two shards with an index."""
    held = published.tensors("deepspec")
    names, places = sorted(held), {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: held[name] for name in names[i::2]}, folder / file)
        places |= dict.fromkeys(names[i::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(published.config("deepspec")))
    return held


def test_shards_are_read_whole(tmp_path: Path) -> None:
    held = sharded(tmp_path)
    found = load_draft(tmp_path)
    assert all(torch.equal(value, held[name]) for name, value in found.state_dict().items())
    (tmp_path / "model.safetensors.index.json").unlink()
    load_draft(tmp_path)  # without an index the names of the shards say that all are there


def broken(folder: Path, fault: str) -> None:
    index, first, second = (
        folder / name
        for name in (
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        )
    )
    about = json.loads(index.read_text())
    names = sorted(about["weight_map"])
    if fault in ("shard", "shard without index"):
        second.unlink()
        if fault == "shard without index":
            index.unlink()
    elif fault == "index lacks":
        del about["weight_map"][names[0]]
    elif fault == "index adds":
        about["weight_map"]["ghost.weight"] = first.name
    elif fault == "index moves":
        about["weight_map"][names[0]] = second.name
    elif fault == "no map":
        about = {"metadata": {}}
    elif fault == "outside":
        about["weight_map"][names[0]] = "../elsewhere.safetensors"
    elif fault == "twice":
        index.unlink()
        save_file({names[0]: torch.zeros(1)}, folder / "extra.safetensors")
    elif fault == "beside":
        save_file({"other.weight": torch.zeros(1)}, folder / "extra.safetensors")
    elif fault == "cut":
        first.write_bytes(first.read_bytes()[:-9])
    elif fault == "key twice":
        index.write_text('{"weight_map": {"a": "b", "a": "c"}}')
    if index.exists() and fault != "key twice":
        index.write_text(json.dumps(about) if fault != "no json" else "{")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("shard", "names model-00002-of-00002.safetensors, which is not there"),
        ("shard without index", "is one of 2 shards"),
        ("index lacks", "disagree"),
        ("index adds", r"also names \['ghost.weight'\]"),
        ("index moves", "disagree"),
        ("no map", "no weight_map"),
        ("no json", "is not JSON"),
        ("outside", r"names ../elsewhere.safetensors"),
        ("twice", "stands in extra.safetensors and in model-0000"),
        ("beside", "does not name extra.safetensors"),
        ("cut", "copy it again"),
        ("key twice", "holds 'a' twice"),
    ],
)
def test_a_folder_with_a_part_missing_is_refused(fault: str, reason: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    broken(tmp_path, fault)
    with pytest.raises(FormatError, match=reason):
        load_draft(tmp_path)


def foreign(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """A folder of the format; returns its tensors under our names."""
    held = published.tensors(kind)
    (folder / "config.json").write_text(json.dumps(published.config(kind)))
    save_file(published.stored(kind, held), folder / "model.safetensors")
    return held


STARTED = [("sglang", "eagle3"), ("speculators_eagle3", "eagle3"), ("z-lab", "dflash"), ("deepspec", "dflash")]
STARTED += [("speculators_dspark", "dspark")]


@pytest.mark.parametrize(("kind", "method"), STARTED)
def test_a_draft_starts_from_any_format_with_every_tensor(kind: str, method: str, tmp_path: Path) -> None:
    held = foreign(tmp_path, kind)
    layers = {"layers": 1, "backbone": "llama"} if method == "eagle3" else {"layers": 2}
    draft, _, _ = made(method, **layers)
    copied, left = from_draft(draft, tmp_path, tiny.target("qwen3").tables)
    assert left == [] and set(copied) == set(draft.state_dict())
    assert all(torch.equal(value, held[name]) for name, value in draft.state_dict().items())


def test_what_another_draft_does_not_give_is_counted(tmp_path: Path) -> None:
    foreign(tmp_path, "sglang")
    draft, _, _ = made("eagle3", backbone="llama", taps=[0, 1, 3], fc_norm=True)
    before = draft.fc.weight.clone()
    copied, left = from_draft(draft, tmp_path, tiny.target("qwen3").tables)
    assert left == ["fc.weight", *(f"fc_norm.{i}.weight" for i in range(3))]  # other taps: what fuses them is no start
    assert torch.equal(draft.fc.weight, before) and len(copied) == 11
    with pytest.raises(ValueError, match="there is no such folder"):
        from_draft(draft, tmp_path / "none", None)


class Marks:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "draft.pt", "draft.pth"])
def test_pickled_weights_are_refused_and_never_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published.config("sglang")))
    torch.save({"fc.weight": Marks(tmp_path / "opened")}, tmp_path / name)
    with pytest.raises(FormatError, match=rf"{name} holds pickled weights.*convert them to safetensors"):
        load_draft(tmp_path)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"hidden_size": 1, "hidden_size": 2}', "[" * 100000, "\xff"])
def test_a_config_that_is_no_object_is_refused_by_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"config\.json"):
        load_draft(tmp_path)
