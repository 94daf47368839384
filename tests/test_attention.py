"""attend against plain attention with an explicit mask over one row of keys, and its FlexAttention twin against it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from specbench.models.attention import Visibility, attend, attend_flex, attend_stored, block_mask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
B, N, Q, S, T, G, D = 2, 3, 4, 4, 11, 2, 8
SCALE = 0.3
SETTINGS = {
    "one conversation": {},
    "window": {"window": 3},
    "packed": {"packed": True},
    "packed window": {"packed": True, "window": 4},
    "causal inside": {"causal_own": True},
    "window of one": {"window": 1},
    "window below the block": {"packed": True, "window": 2},
    "causal inside a window": {"causal_own": True, "window": 2},
    "own keys behind": {"window": 3, "ahead": 1},
}


def visibility(packed: bool = False, window: int | None = None, causal_own: bool = False, ahead: int = 0) -> Visibility:
    limit = torch.tensor([[2, 5, 9], [1, 7, 11]])
    document = torch.tensor([[0] * 6 + [1] * 5, [2] * 3 + [3] * 8]) if packed else None
    owner = torch.tensor([[0, 0, 1], [2, 3, 3]]) if packed else None
    start = torch.tensor([[0, 6], [0, 3]]) if packed else torch.zeros(2, 2, dtype=torch.long)
    key_position = torch.arange(T).repeat(B, 1)
    if packed:
        key_position = torch.stack([key_position[b] - start[b][(document[b] - document[b, 0])] for b in range(B)])
    place = (limit - 1).clamp_min(0)
    query_position = key_position.gather(1, place)[..., None] + 1 + torch.arange(Q)
    return Visibility(limit, document, owner, query_position, key_position, window, causal_own, ahead)


def sees(v: Visibility, b: int, n: int, q: int, key: int) -> bool:
    """The rule for one pair, in words: keys before the limit, of the own conversation; own keys; within the window."""
    if key >= T:
        block, slot = divmod(key - T, S)
        position = int(v.query_position[b, n, 0]) - v.ahead + slot
        back = int(v.query_position[b, n, q]) - position
        return block == n and (back >= 0 or not v.causal_own) and (v.window is None or back < v.window)
    inside = key < v.limit[b, n]
    if v.document is not None:
        inside = inside and v.document[b, key] == v.owner[b, n]
    if v.window is not None:
        inside = inside and v.query_position[b, n, q] - v.key_position[b, key] < v.window
    return bool(inside)


def tensors(heads: int, own: bool = True):
    generator = torch.Generator().manual_seed(heads)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    pair = (make(B, N, S, G, D), make(B, N, S, G, D)) if own else None
    return make(B, N, Q, heads, D), (make(B, T, G, D), make(B, T, G, D)), pair


def whole(v: Visibility, query, context, own) -> torch.Tensor:
    """Plain attention of all queries to all keys, context and every block's own, under the mask written out."""
    keys, values = context
    if own is not None:
        keys, values = (torch.cat([x, y.flatten(1, 2)], 1) for x, y in zip(context, own, strict=True))
    size = keys.shape[1]
    mask = torch.tensor(
        [[[[sees(v, b, n, q, k) for k in range(size)] for q in range(Q)] for n in range(N)] for b in range(B)]
    ).view(B, 1, N * Q, size)
    out = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query.flatten(1, 2), keys, values)), attn_mask=mask, scale=SCALE, enable_gqa=True
    )
    return out.transpose(1, 2).view(query.shape)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("heads", [G, 3 * G])
def test_attend_equals_plain_attention_under_the_mask_written_out(name, heads):
    v, (query, context, own) = visibility(**SETTINGS[name]), tensors(heads)
    found = attend(query, context, own, v.context_mask(T, Q), SCALE, v.own_mask(Q, S))
    torch.testing.assert_close(found, whole(v, query, context, own), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["one conversation", "packed window"])
def test_attend_without_own_keys(name):
    v, (query, context, _) = visibility(**SETTINGS[name]), tensors(2 * G, own=False)
    found, expected = attend(query, context, None, v.context_mask(T, Q), SCALE), whole(v, query, context, None)
    # Queries that see nothing are meaningless in both.
    seen = v.context_mask(T, Q).expand(B, N, Q, T).any(-1)
    assert seen.any() and found.isfinite().all()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("soft_cap", [None, 0.5])
@pytest.mark.parametrize("name", SETTINGS)
def test_flex_attention_equals_attend(name, soft_cap):
    v, (query, context, own) = visibility(**SETTINGS[name]), tensors(2 * G)
    expected = attend(query, context, own, v.context_mask(T, Q), SCALE, v.own_mask(Q, S), soft_cap)
    found = attend_flex(query, context, own, block_mask(v, (B, N, Q, T, S)), SCALE, soft_cap=soft_cap)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_mask_of_own_keys_is_made_where_all_are_seen():
    assert visibility().own_mask(Q, S) is None and visibility(window=Q).own_mask(Q, S) is None
    assert visibility(window=Q - 1).own_mask(Q, S).tolist() == [[True] * S] * (Q - 1) + [[False] + [True] * (S - 1)]


@pytest.mark.parametrize("masked", [True, False])
def test_capped_scores_by_hand(masked):
    """One head a group, a row at a time: softmax(c tanh(s / c)) over what the mask shows."""
    query, context, _ = tensors(G, own=False)
    cap, mask = 0.4, torch.arange(T) <= torch.tensor([[4, 5, 6, 7], [0, 1, 2, 3]])[:, None, :, None]
    found = attend_stored(query[:, 0], context, mask if masked else None, SCALE, cap)
    for b in range(B):
        for q in range(Q):
            last = int(mask[b, 0, q].sum()) if masked else T
            for g in range(G):
                scores = cap * torch.tanh(SCALE * context[0][b, :last, g] @ query[b, 0, q, g] / cap)
                expected = scores.softmax(0) @ context[1][b, :last, g]
                torch.testing.assert_close(found[b, q, g], expected, atol=1e-5, rtol=1e-5)


def test_flex_attention_without_own_keys():
    v, (query, context, _) = visibility(), tensors(G, own=False)
    expected = attend(query, context, None, v.context_mask(T, Q), SCALE)
    found = attend_flex(query, context, None, block_mask(v, (B, N, Q, T, 0)), SCALE)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_of_plain_attention():
    v, (query, context, own) = visibility(packed=True), tensors(2 * G)
    leaves = [x.requires_grad_() for x in (query, *context, *own)]
    weight = torch.randn(query.shape, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad((attend(query, context, own, v.context_mask(T, Q), SCALE) * weight).sum(), leaves)
    expected = torch.autograd.grad((whole(v, query, context, own) * weight).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [G, 3 * G])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_to_stored_keys_equals_attend(heads, masked):
    query, context, _ = tensors(heads, own=False)
    mask = torch.arange(T) <= torch.tensor([[4, 5, 6, 7], [0, 1, 2, 3]])[:, None, :, None]
    every = torch.ones_like(mask)
    expected = attend(query[:, :1], context, None, mask if masked else every, SCALE)[:, 0]
    found = attend_stored(query[:, 0], context, mask if masked else None, SCALE)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
