"""A draft's layers start from the target's own: every weight in its place, for every family and method."""

from __future__ import annotations

import pytest
import torch

from specbench.drafts.initialisation import first_weights, layer_weights, resolved
from specbench.models.backbone import FAMILIES
from specbench.models.target import Target
from tests import tiny


def away_from_neutral(config: dict) -> Target:
    target = Target.from_config(config, tiny.TAPS, seed=3, stop_token_ids=[])
    for name, parameter in target.model.named_parameters():
        if "norm" in name:
            parameter.data.copy_(0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return target


@pytest.mark.parametrize(("method", "family"), tiny.across(tiny.LAYERED))
def test_every_weight_of_a_layer_is_the_targets(method, family):
    # Of the tiny Gemma 4's layers the last alone has the geometry of its drafts.
    layers = 1 if family == "gemma4" else 2
    target, draft = away_from_neutral(tiny.FAMILIES[family]), tiny.draft(method, family, layers=layers)
    copied = draft.start_from(target)
    for i, layer in enumerate(draft.layers):
        theirs = layer_weights(target.layers[len(target.layers) - layers + i].state_dict())
        for name, found in layer.state_dict().items():
            if "_conv." in name:  # DFlash2's own, which no target has
                continue
            assert f"layers.{i}.{name}" in copied
            given = theirs["input_layernorm.weight" if name.startswith("hidden_norm") else name]
            torch.testing.assert_close(found[..., -given.shape[-1] :], given, rtol=0, atol=0)  # the feature's half
    if draft.norm.state_dict():  # some methods have none
        torch.testing.assert_close(draft.norm.weight, target.decoder.norm.weight, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["mtp", "eagle1", "eagle3", "dspark"])
def test_every_method_starts_equally_informed_of_the_previous_token(method):
    """What the first layer's queries read: of the token's embedding as much as of the feature, or a hundredth of it.
    A parallel draft has no map to change."""
    target = tiny.target("qwen3")
    read = {}
    for previous in ("method", "wired", "none"):
        draft = tiny.draft(method, "qwen3", layers=1)
        torch.manual_seed(0)
        first_weights(draft, "target", target, previous)
        own = {"mtp": ("proj", -1), "eagle1": ("fc", 1), "eagle3": ("layers.0.self_attn.v_proj", 1)}
        if method not in own:
            read[previous] = {name: weight.clone() for name, weight in draft.state_dict().items()}
            continue
        name, order = own[method]
        read[previous] = draft.get_submodule(name).weight.chunk(2, 1)[::order]
    if method == "dspark":
        torch.testing.assert_close(read["method"], read["wired"])
        torch.testing.assert_close(read["method"], read["none"])
        return
    embedding, feature = read["wired"]
    torch.testing.assert_close(embedding, feature)
    plain, whole = read["none"]
    torch.testing.assert_close(whole, 2 * feature)
    assert float(plain.detach().std()) == pytest.approx(0.02, rel=0.2)
    wired = method != "eagle3"
    assert torch.allclose(read["method"][1], feature if wired else whole)
    with pytest.raises(ValueError, match="start_previous=none with start=random"):
        first_weights(tiny.draft(method, "qwen3"), "random", target, "none")


@pytest.mark.parametrize(("own", "other"), [("gemma", "llama"), ("llama", "gemma"), ("gemma3", "gemma2")])
def test_norms_keep_their_effect_in_another_family(own, other):
    """Gemma stores w for 1 + w."""
    target = away_from_neutral(tiny.FAMILIES[own])
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    draft = tiny.draft("dflash", own, backbone=other, layers=1)
    draft.start_from(target)
    for ours, theirs in (
        (draft.layers[0].input_layernorm, target.layers[-1].input_layernorm),
        (draft.layers[0].post_attention_layernorm, target.layers[-1].post_attention_layernorm),
        (draft.norm, target.decoder.norm),
    ):
        torch.testing.assert_close(ours(x), theirs(x))


def test_experts_leave_a_dense_feed_forward_at_random():
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    target = away_from_neutral({**tiny.QWEN3, **moe, "model_type": "qwen3_moe"})
    draft = tiny.draft("dflash", "qwen3", layers=1)
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    copied = draft.start_from(target)
    assert "layers.0.self_attn.q_proj.weight" in copied and not [name for name in copied if ".mlp." in name]
    kept = [name for name in before if ".mlp." in name]
    assert kept and all(torch.equal(before[name], draft.state_dict()[name]) for name in kept)


def test_gemma4_layers_of_full_attention_alone_are_copied():
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    target = away_from_neutral({**tiny.GEMMA4, "layer_types": kinds})
    draft = tiny.draft("dflash", "gemma4", layers=2)
    draft.start_from(target)
    for layer, at in zip(draft.layers, (0, 3), strict=True):
        theirs = target.layers[at].state_dict()
        torch.testing.assert_close(layer.state_dict(), {name: theirs[name] for name in layer.state_dict()})
    with pytest.raises(ValueError, match=r"layers=3: .* has 2 layers to copy"):
        tiny.draft("dflash", "gemma4", layers=3).start_from(target)


def test_a_target_whose_layer_is_not_ours_has_nothing_to_copy():
    target = Target.from_config({**tiny.QWEN3, "model_type": "olmo2", "pad_token_id": 0}, tiny.TAPS, stop_token_ids=[])
    with pytest.raises(ValueError, match=r"start=target: target model_type olmo2 .* use start=random"):
        tiny.draft("dflash", "qwen3").start_from(target)


def test_an_automatic_start_copies_where_it_can_and_says_why_it_cannot():
    known = tiny.target("qwen3")
    foreign = Target.from_config({**tiny.QWEN3, "model_type": "olmo2", "pad_token_id": 0}, tiny.TAPS, stop_token_ids=[])
    assert resolved("auto", known) == ("target", None)
    start, why = resolved("auto", foreign)
    assert start == "random" and "olmo2" in why
    assert [resolved(start, foreign) for start in ("target", "random", "x/y")] == [
        ("target", None),
        ("random", None),
        ("x/y", None),
    ]


def test_the_tiny_targets_are_of_every_family():
    assert list(tiny.FAMILIES) == list(FAMILIES)
