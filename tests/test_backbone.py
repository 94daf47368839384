"""Our one layer with the weights of each family's own layer gives that layer's output."""

from __future__ import annotations

import pytest
import torch

from specbench.models.attention import Visibility, attend, attend_flex, block_mask
from specbench.models.backbone import Backbone, Layer, RotaryEmbedding, backbone_of, rotate
from specbench.models.target import Target
from tests import tiny

BEFORE, LAYER = 2, 3  # taps that the layer reads and writes; in Gemma4 the layer of full attention


def target_of(family: str) -> Target:
    """A target whose norms, biases and scalars are away from neutral."""
    target = Target.from_config(tiny.FAMILIES[family], (BEFORE, LAYER), seed=5, stop_token_ids=[])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in [*target.model.named_parameters(), *target.model.named_buffers()]:
        if "norm" in name or "scalar" in name:
            parameter.data.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return target


def causal(layer: Layer, backbone: Backbone, x: torch.Tensor) -> torch.Tensor:
    """The layer as an ordinary causal one, by the pieces that drafts use."""
    B, T, _ = x.shape
    position = torch.arange(T).expand(B, T)
    rope, y = RotaryEmbedding(backbone)(position, x.dtype), layer.normed(x)
    mask = Visibility(position + 1).context_mask(T, 1)
    query = layer.self_attn.queries(y, rope)[:, :, None]
    return layer.finish(x, attend(query, layer.self_attn.keys_values(y, rope), None, mask, backbone.scale)[:, :, 0])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_layer_equals_the_librarys_own(family):
    target = target_of(family)
    backbone = backbone_of(target.config)
    layer = Layer(backbone)
    layer.load_state_dict(target.layers[LAYER].state_dict(), strict=True)
    tokens = torch.randint(0, tiny.VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    context = target.states(tokens, torch.tensor([30, 30]))
    with torch.no_grad():
        found = causal(layer, backbone, context.taps[:, :, 0].clone())
    torch.testing.assert_close(found, context.taps[:, :, 1], atol=1e-5, rtol=1e-5)
    # A layer that ignores the past, or one layer's worth of anything else, is far from it.
    assert (context.taps[:, :, 0] - context.taps[:, :, 1]).abs().max() > 0.1


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
    target = target_of(family)
    tokens = torch.randint(0, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([12, 12])
    found = target.logits(target.states(tokens, lengths).last)
    torch.testing.assert_close(found, target.live_logits(tokens, lengths), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(target.tables.embed(tokens), target.model.get_input_embeddings()(tokens))


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
