"""Folded layers against the modules that they are folded from."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import pytest
import torch

from specbench import fast
from specbench.decoding.loop import Limits, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.models.backbone import Backbone, Layer, RotaryEmbedding, backbone_of
from specbench.models.fast import folded_layers as stack
from specbench.models.fast import packed_products
from specbench.models.fast.folded_layers import Folded, Joined, Plain, Stack
from specbench.models.kv_cache import KVCache
from tests import tiny

QWEN3 = backbone_of(tiny.QWEN3)
ROWS, LAYERS = 3, 2


def layers_of(backbone: Backbone, paired: bool = False, seed: int = 0) -> list[Layer]:
    """Random layers whose norms are away from neutral."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [Layer(backbone, paired).requires_grad_(False) for _ in range(LAYERS)]
        for layer in layers:
            for name, parameter in layer.named_parameters():
                if "norm" in name:
                    parameter.copy_(0.5 + torch.rand(parameter.shape))
    return layers


def both(layers: list[Layer], backbone: Backbone) -> tuple[Stack, Stack]:
    folded, plain = (Stack(layers, backbone, reads_context=layers[0].hidden_norm is None) for _ in range(2))
    folded.renew()
    with fast.plain():
        plain.renew()
    assert isinstance(folded._steps, Folded) and isinstance(plain._steps, Plain)
    return folded, plain


def run(one: Stack, backbone: Backbone, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Context, then extensions of ragged rows, keys behind a row that do not count, and keys alone: all outputs and
    everything that is stored."""
    generator, cache, rope = torch.Generator().manual_seed(seed), KVCache(ROWS), RotaryEmbedding(backbone)

    def states(size: int) -> torch.Tensor:
        return torch.randn(ROWS, size, backbone.hidden_size, generator=generator).to(dtype)

    outputs = []
    if one.reads_context:
        one.store_context(states(6), rope.behind(cache, 6, dtype), cache)
    else:
        for layer in range(LAYERS):
            one.store(layer, states(6), rope.behind(cache, 6, dtype), cache, states(6))
    cache.advance(torch.tensor([6, 6, 6]))
    for size, kept in ((4, [4, 4, 4]), (3, [1, 3, 0]), (1, [1, 1, 1])):
        x, embedding = states(size), states(size)
        turned = rope.behind(cache, size, dtype)
        for layer in range(LAYERS):
            x = one.extend(layer, x, turned, cache, cache.visible(size), embedding)
        outputs.append(x)
        one.store(1, x, turned, cache, embedding)
        cache.advance(torch.tensor(kept))
    pair = rope.behind(cache, 2, dtype)
    for k in range(2):
        turned = tuple(side[:, k : k + 1] for side in pair)
        outputs.append(one.extend(0, states(1), turned, cache, cache.visible(1, behind=k), states(1), behind=k))
    kept = torch.arange(cache.keys[0].shape[2]) < cache.lengths[:, None]
    outputs += [side[layer].transpose(1, 2)[kept] for side in (cache.keys, cache.values) for layer in range(LAYERS)]
    return outputs


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        *({}, {"head_norms": False}, {"activation": "gelu_pytorch_tanh"}, {"attention_scale": 0.7}, {"norm_eps": 0.1}),
        *({"attention_bias": True}, {"attention_bias": True, "output_bias": False}, {"mlp_bias": True}),
        *({"norm_adds_one": True}, {"attention_soft_cap": 2.0}),
        {"residual_scale": 0.5, "attention_bias": True, "mlp_bias": True},
        {"rope_fraction": 0.5, "rope_leading": True},
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0, "attention_factor": 0.7}},
    ],
)
def test_folded_layers_equal_their_modules(change, paired):
    backbone = replace(QWEN3, **change)
    for ours, theirs in zip(*(run(one, backbone) for one in both(layers_of(backbone, paired), backbone)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("change", [{}, {"head_norms": False, "attention_bias": True, "residual_scale": 0.5}])
def test_folded_layers_with_arranged_weights_equal_their_modules(change, paired, monkeypatch):
    monkeypatch.setattr(packed_products, "SMALL", 0)
    backbone = replace(QWEN3, **change)
    folded, plain = both(layers_of(backbone, paired), backbone)
    assert folded._steps.down[0].packed
    for ours, theirs in zip(run(folded, backbone), run(plain, backbone), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("small", [0, 2**18])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("change", [{}, {"head_norms": False, "mlp_bias": True, "residual_scale": 0.5}])
def test_joined_layers_in_bf16_equal_their_modules(change, paired, small, monkeypatch):
    """The same roundings in the same places: products of the same numbers, in another order of additions."""
    monkeypatch.setattr(packed_products, "SMALL", small)
    backbone = replace(QWEN3, **change)
    layers = [layer.bfloat16() for layer in layers_of(backbone, paired)]
    folded, plain = both(layers, backbone)
    assert isinstance(folded._steps, Joined)
    for ours, theirs in zip(*(run(one, backbone, 0, torch.bfloat16) for one in (folded, plain)), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).float().norm() <= 0.01 * theirs.float().norm()


def test_copies_of_layers_fold_their_own_weights():
    layers = layers_of(QWEN3)
    folded, _ = both(layers, QWEN3)
    copied = copy.deepcopy(folded)
    assert isinstance(copied._steps, Plain) and copied.layers[0] is not layers[0]
    with torch.no_grad():
        copied.layers[0].mlp.down_proj.weight.zero_()
    copied.renew()
    assert isinstance(copied._steps, Folded) and not torch.equal(run(copied, QWEN3)[0], run(folded, QWEN3)[0])


def test_a_request_sees_the_weights_of_its_beginning():
    layers = layers_of(QWEN3)
    folded, plain = both(layers, QWEN3)
    before = run(folded, QWEN3)
    weight = layers[0].self_attn.o_proj.weight.requires_grad_()
    optimiser = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimiser.step()
    torch.testing.assert_close(run(folded, QWEN3)[0], before[0], rtol=0, atol=0)
    folded.renew()
    after = run(folded, QWEN3)
    assert (after[0] - before[0]).abs().max() > 0.01
    torch.testing.assert_close(after[0], run(plain, QWEN3)[0], atol=2e-5, rtol=1e-5)
    # Unchanged weights are not folded again.
    steps = folded._steps
    folded.renew()
    assert folded._steps is steps


@pytest.mark.parametrize(
    "backbone, dtype",
    [
        (backbone_of(tiny.GEMMA4), torch.float32),
        (replace(QWEN3, norm_before_residual=True), torch.float32),
        (replace(QWEN3, sandwich=True), torch.float32),
        (replace(QWEN3, layer_scalar=True), torch.float32),
        (QWEN3, torch.float16),
    ],
)
def test_what_folding_does_not_cover_stays_with_the_modules(backbone, dtype):
    layers = [layer.to(dtype) for layer in layers_of(backbone)]
    one = Stack(layers, backbone)
    one.renew()
    assert isinstance(one._steps, Plain)


def test_what_folding_covers_is_named_fact_by_fact():
    """A fact that is new must be looked at before a folded layer may follow it."""
    covered, refused = set(), set()
    parameters = [p for layer in layers_of(QWEN3) for p in layer.parameters()]
    for fact in fields(Backbone):
        neutral = getattr(QWEN3, fact.name)
        if fact.name in ("output_bias", "layer_scalar"):
            other = True
        elif fact.name == "rope_scaling":
            other = {"rope_type": "linear", "factor": 2.0}
        elif fact.name in ("window", "rope_length"):
            other = 2
        else:
            other = {bool: not neutral, int: 16, str: "other"}.get(type(neutral), 2.0)
        assert other != neutral
        (covered if stack.foldable(replace(QWEN3, **{fact.name: other}), parameters) else refused).add(fact.name)
    assert covered == stack.FOLDED
    assert refused == {
        *("values_from_keys", "value_norm", "sandwich", "layer_scalar", "norm_before_residual"),
    }


def test_large_layers_are_not_copied(monkeypatch):
    size = sum(p.numel() * 4 for layer in layers_of(QWEN3) for p in layer.parameters())
    for limit, kind in ((size, Folded), (size - 1, Plain)):
        monkeypatch.setattr(stack, "FOLDED_BYTES", limit)
        one = Stack(layers_of(QWEN3), QWEN3)
        one.renew()
        assert isinstance(one._steps, kind)


def test_positions_behind_a_cache_are_those_of_its_rows():
    rope, cache = RotaryEmbedding(QWEN3), KVCache(ROWS)
    entry = torch.zeros(ROWS, 400, 1, 2)
    cache.write(0, entry, entry)
    for lengths in ([5, 5, 5], [300, 2, 7]):
        cache.lengths.zero_()
        cache.advance(torch.tensor(lengths))
        expected = rope(torch.tensor(lengths)[:, None] + torch.arange(3), torch.float32)
        for ours, theirs in zip(rope.behind(cache, 3, torch.float32), expected, strict=True):
            torch.testing.assert_close(ours.expand_as(theirs), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_prompt_of_one_token_alone_is_decoded(method: str) -> None:
    """A chain has no feature to pair with a next token then, so no row enters the layers before the first round."""
    target, draft = tiny.target("qwen3"), tiny.draft(method, "qwen3").eval()
    (done,) = speculative_decode(target, draft, [[7]], Sampling(), Limits(12))
    assert done.output_ids == target.generate([7], 12)
