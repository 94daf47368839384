"""Our one layer with the weights of each family's own layer gives that layer's output."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specbench.drafts.initialisation import layer_weights
from specbench.models.attention import Visibility, attend, attend_flex, block_mask
from specbench.models.backbone import Backbone, Layer, RotaryEmbedding, backbone_of, chosen, rotate
from specbench.models.target import Target
from tests import tiny

BEFORE, LAYER = 2, 3  # taps that the layer reads and writes; in Gemma4 the layer of full attention


LENGTH = 30  # beyond the 16 original positions of the tiny rope scalings
SCALINGS = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.5},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn by its own factor": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 0.8,
        "beta_fast": 20,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn with mscale": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 4.0, 8.0],
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def scaled(name: str, theta: float = 1e4, **more) -> dict:
    """A tiny Llama configuration with one scaling; `dynamic` stretches beyond the model's own 16 positions."""
    rope = {"rope_type": name.split()[0], "rope_theta": theta, **SCALINGS[name]}
    return {**tiny.LLAMA, "rope_parameters": rope, "max_position_embeddings": 16 if name == "dynamic" else 64, **more}


def variant(model_type: str, like: str = "llama", **more) -> dict:
    return {**tiny.FAMILIES[like], "model_type": model_type, **more}


# Configurations whose layer is one of ours, beside a target of each family.
LAYERS = {
    **tiny.FAMILIES,
    **{f"llama, {name}": scaled(name) for name in SCALINGS},
    "qwen3, yarn": {**tiny.QWEN3, "rope_parameters": scaled("yarn")["rope_parameters"]},
    "llama, biased": {**tiny.LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama, heads of another size": {**tiny.LLAMA, "head_dim": 16},
    "qwen3, biased": {**tiny.QWEN3, "attention_bias": True},
    "granite, biased": {**tiny.GRANITE, "attention_bias": True, "mlp_bias": True},
    "mistral": variant("mistral", sliding_window=None),
    # Layers without rope, which no draft has, are turned into ones with it.
    "smollm3": variant("smollm3", no_rope_layers=[1, 1, 1, 1], pad_token_id=0, rope_parameters=None),
    "phi3, whole heads": {**tiny.PHI3, "partial_rotary_factor": 1.0, "rope_parameters": None},
    "gemma2, no caps": {**tiny.GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma4, values of their own": {**tiny.GEMMA4, "attention_k_eq_v": False},
}
LAYERS["gemma2, no caps"]["layer_types"] = tiny.GEMMA4["layer_types"]


def target_of(config: dict) -> Target:
    """A target whose norms, biases and scalars are away from neutral."""
    target = Target.from_config(config, (BEFORE, LAYER), seed=5, stop_token_ids=[])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in [*target.model.named_parameters(), *target.model.named_buffers()]:
        if "norm" in name or "scalar" in name or name.endswith("bias"):
            parameter.data.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return target


def causal(layer: Layer, backbone: Backbone, x: torch.Tensor) -> torch.Tensor:
    """The layer as an ordinary causal one, by the pieces that drafts use."""
    B, T, _ = x.shape
    position = torch.arange(T).expand(B, T)
    rope, y = RotaryEmbedding(backbone)(position, x.dtype), layer.normed(x)
    mask = Visibility(position + 1).context_mask(T, 1)
    query, pair = layer.self_attn.queries(y, rope)[:, :, None], layer.self_attn.keys_values(y, rope)
    seen = attend(query, pair, None, mask, backbone.scale, None, backbone.attention_soft_cap)
    return layer.finish(x, seen[:, :, 0])


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_the_librarys_own(name):
    """Strictly loaded with the library layer's weights, at positions beyond those of the rope scaling's origin."""
    config = LAYERS[name]
    target = target_of(config)
    backbone = backbone_of(target.config, length=LENGTH)
    choice = chosen(target.config)
    assert choice.own and choice.family == backbone.family
    assert choice.family == {"mistral": "llama", "smollm3": "llama"}.get(name, name.split(",")[0])
    layer = Layer(backbone)
    layer.load_state_dict(layer_weights(target.layers[LAYER].state_dict()), strict=True)
    tokens = torch.randint(0, tiny.VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    context = target.states(tokens, torch.tensor([LENGTH, LENGTH]))
    with torch.no_grad():
        found = causal(layer, backbone, context.taps[:, :, 0].clone())
    torch.testing.assert_close(found, context.taps[:, :, 1], atol=1e-5, rtol=1e-5)
    # A layer that ignores the past, or one layer's worth of anything else, is far from it.
    assert (context.taps[:, :, 0] - context.taps[:, :, 1]).abs().max() > 0.1


@pytest.mark.parametrize("length", [8, 16, 17, 40])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_the_librarys(name, theta, length):
    config = scaled(name, theta)
    reference = LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"})
    expected, factor = ROPE_INIT_FUNCTIONS[config["rope_parameters"]["rope_type"]](reference, "cpu", seq_len=length)
    backbone = backbone_of(config, length=length)
    torch.testing.assert_close(backbone.inverse_frequencies(), expected, rtol=1e-6, atol=0)
    cos, sin = RotaryEmbedding(backbone)(torch.arange(40), torch.float32)
    torch.testing.assert_close(cos.pow(2) + sin.pow(2), torch.full_like(cos, factor**2))
    # Only what depends on the length keeps it, and a folder's JSON brings everything back.
    assert (backbone.rope_length == length) == (name in ("dynamic", "longrope"))
    assert Backbone(**json.loads(json.dumps(dataclasses.asdict(backbone)))) == backbone


def test_older_spellings_of_a_scaling_mean_the_same():
    """rope_theta beside rope_scaling, its kind under `type`; Phi-3's su and yarn; original positions beside it."""
    config = scaled("llama3", 7e5)
    rope = config.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    older = {**config, "rope_theta": theta, "rope_scaling": {**rope, "type": kind}}
    assert backbone_of(older) == backbone_of(scaled("llama3", 7e5))
    for kind in ("su", "yarn"):
        phi = {**tiny.PHI3, "rope_parameters": None, "rope_theta": 1e4}
        phi["rope_scaling"] = {"type": kind, "short_factor": [1.1, 1.7], "long_factor": [1.3, 5.0]}
        assert backbone_of(phi, length=20) == backbone_of(tiny.PHI3, length=20)
    gemma = {k: v for k, v in tiny.GEMMA3.items() if k != "rope_parameters"}
    gemma |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    assert backbone_of(gemma) == backbone_of(tiny.GEMMA3)


@pytest.mark.parametrize(
    ("model_type", "theta"),
    [
        *((name, 1e4) for name in ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma", "gemma2")),
        *(("gemma3_text", 1e6), ("smollm3", 2e6), ("mixtral", 1e6)),
    ],
)
def test_an_absent_base_is_the_architectures_own(model_type, theta):
    config = {**tiny.PLAIN, "model_type": model_type}
    assert backbone_of(config).rope_theta == theta
    settings = {k: v for k, v in config.items() if k != "model_type"}
    library = AutoConfig.for_model(model_type, **settings).rope_parameters
    assert library.get("full_attention", library)["rope_theta"] == theta


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "spiral"}, "spiral"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": None}, "max_position"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor, high_freq_factor"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0}, "1 factors for 4"),
    ],
)
def test_a_rope_that_cannot_be_followed_is_refused_by_name(rope, named):
    config = {**tiny.LLAMA, "rope_parameters": rope}
    if "max_position" in named:
        config.pop("max_position_embeddings")
    with pytest.raises(ValueError, match=named):
        backbone_of(config).inverse_frequencies()


@pytest.mark.parametrize(
    ("config", "family", "own", "said"),
    [
        (tiny.QWEN3, None, True, "model_type qwen3: draft uses the target's own layer, qwen3"),
        (variant("mistral", sliding_window=8), None, True, r"own layer, llama; windows of its layers \(8 positions\)"),
        (variant("smollm3"), None, True, "llama; its layers without rope are drafted with rope"),
        (variant("qwen3_moe", "qwen3"), None, True, "qwen3; one dense feed-forward takes the place of its experts"),
        (tiny.LLAMA, "qwen3", False, "method.backbone=qwen3: draft uses qwen3's layer in place of .* own, llama"),
        (variant("gpt_oss"), None, False, "gpt_oss has no layer of ours: draft uses qwen3's layer with .* sizes, with"),
        (variant("olmo2", "qwen3"), "llama", False, "olmo2 has no layer of ours: draft uses llama's layer"),
        ({"text_config": tiny.GEMMA3, "model_type": "gemma3"}, None, True, "gemma3_text: .* own layer, gemma3"),
        ({"text_config": variant("mistral"), "model_type": "mistral3"}, None, True, "own layer, llama"),
        ({}, None, False, "unknown has no layer of ours"),
    ],
)
def test_the_family_is_said_with_its_reason(config, family, own, said):
    choice = chosen(config, family)
    assert choice.own is own
    assert re.search(said, choice.reason), choice.reason


def test_a_stated_choice_takes_sizes_and_base_and_nothing_that_may_not_fit():
    """An unknown architecture: a rope scaled for other heads and an activation of its own stay behind."""
    strange = scaled("yarn", 3e4, model_type="strange", hidden_act="relu2", sliding_window=5)
    facts = backbone_of(strange, length=99)
    own = backbone_of({**tiny.QWEN3, "head_dim": None, "rope_theta": 3e4})
    assert facts == own and facts.rope_scaling is None
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "vocab_size": 50}
    assert (backbone_of(gpt2).hidden_size, backbone_of(gpt2).heads) == (64, 4)
    with pytest.raises(ValueError, match=r"relu2.*method\.backbone"):
        backbone_of({**tiny.LLAMA, "hidden_act": "relu2"})
    assert backbone_of({**tiny.LLAMA, "hidden_act": "relu2"}, "qwen3").activation == "silu"
    with pytest.raises(ValueError, match="window=0"):
        backbone_of(tiny.QWEN3, window=0)


def test_published_gemma3_configurations_leave_defaults_out():
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    facts = backbone_of({"model_type": "gemma3", "text_config": text})
    assert (facts.heads, facts.kv_heads, facts.head_dim, facts.vocab_size) == (8, 4, 256, 262208)
    assert (facts.rope_theta, facts.rope_scaling["factor"], facts.scale) == (1e6, 8.0, 1 / 16)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_queries_keys_and_values_have_one_dtype_under_autocast(family):
    """FlexAttention takes no mixture, and the norms of fp32 weights would make one."""
    backbone = backbone_of(tiny.FAMILIES[family])
    layer, rope = Layer(backbone).requires_grad_(False), RotaryEmbedding(backbone)
    x, position = torch.randn(1, 6, backbone.hidden_size), torch.arange(6)[None]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        turned = rope(position, x.dtype)
        query, (keys, values) = layer.self_attn.queries(x, turned), layer.self_attn.keys_values(x, turned)
        visible = Visibility(torch.full((1, 3), 4))
        blocks = [one.unflatten(1, (3, 2)) for one in (query, keys, values)]
        mask = block_mask(visible, (1, 3, 2, 6, 2))
        found = attend_flex(blocks[0], (keys, values), tuple(blocks[1:]), mask, backbone.scale)
        dense = attend(blocks[0], (keys, values), tuple(blocks[1:]), visible.context_mask(6, 2), backbone.scale)
    assert {query.dtype, keys.dtype, values.dtype} == {torch.bfloat16}
    torch.testing.assert_close(found.float(), dense.float(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tables_give_the_librarys_own_embeddings_and_logits(family):
    target = target_of(tiny.FAMILIES[family])
    tokens = torch.randint(0, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([12, 12])
    found = target.logits(target.states(tokens, lengths).last)
    torch.testing.assert_close(found, target.live_logits(tokens, lengths), atol=1e-5, rtol=1e-5)
    entered: list[torch.Tensor] = []
    target.layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    target.live_logits(tokens, lengths)
    torch.testing.assert_close(target.tables.embed(tokens), entered[0])


def test_rope_turns_by_position_and_leaves_the_rest():
    """A quarter of the head is turned: features of the zero frequencies stay as they are, lengths are kept."""
    backbone = backbone_of(tiny.GEMMA4)
    frequencies = backbone.inverse_frequencies()
    assert backbone.head_dim == 16 and (frequencies > 0).tolist() == [True] * 2 + [False] * 6
    rope = RotaryEmbedding(backbone)
    x = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rope(torch.tensor([0, 1, 2, 50, 1000]), torch.float32))
    torch.testing.assert_close(turned[0], x[0])
    still = [i + half for half in (0, 8) for i in range(2, 8)]
    torch.testing.assert_close(turned[..., still], x[..., still])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert (turned[3] - x[3]).abs().max() > 0.1


def test_products_of_turned_heads_depend_on_the_distance_alone():
    rope = RotaryEmbedding(backbone_of(tiny.QWEN3))
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(3))

    def product(at: int, distance: int) -> float:
        one, other = (rotate(x, rope(torch.tensor([p]), torch.float32)) for x, p in ((q, at), (k, at - distance)))
        return float((one * other).sum())

    assert product(9, 4) == pytest.approx(product(400, 4), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


def test_a_family_other_than_the_targets_keeps_what_belongs_to_its_tables():
    own, foreign = backbone_of(tiny.GEMMA4), backbone_of(tiny.GEMMA4, "qwen3")
    assert (foreign.family, foreign.sandwich) == ("qwen3", False)
    assert (foreign.embedding_scale, foreign.soft_cap) == (own.embedding_scale, own.soft_cap) == (32**0.5, 30.0)
    with pytest.raises(ValueError, match="llama9"):
        backbone_of(tiny.QWEN3, "llama9")
