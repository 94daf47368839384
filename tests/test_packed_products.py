"""Products from arranged weights against the product itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from specbench import fast
from specbench.models.embedding_head import Tables
from specbench.models.fast import packed_products
from specbench.models.fast.packed_products import Kept, Product

M, N = 530, 500  # more elements than SMALL, and no multiples of a register


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype, room", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [1, 2, 8, 70])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_the_product(rows, biased, dtype, room):
    weight, x, base = (
        numbers(M, N, seed=1).to(dtype),
        numbers(rows, 2 * N).to(dtype)[:, ::2],
        numbers(rows, M).to(dtype),
    )
    bias = numbers(M, seed=2).to(dtype) if biased else None
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    with torch.inference_mode():
        product = Product(weight, bias)
        pairs = [
            (product(x), expected),
            (product.behind(x, 7), expected[:, 7:]),
            (product.added(base, x), expected + base.double()),
            (Kept()(x[None], weight, bias)[0], expected),
            (Kept().added(base, x, weight), x.double() @ weight.double().t() + base.double()),
        ]
    for ours, true in pairs:
        assert ours.dtype == dtype and ours.shape == true.shape
        assert (ours.double() - true).norm() <= room * true.norm()


def test_a_head_that_changes_is_arranged_anew():
    tables = Tables(numbers(M, N, seed=1), numbers(M, N, seed=2), trainable=True)
    x = numbers(3, N)

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return tables.logits(x)

    before = logits()
    with torch.no_grad():
        tables.head.mul_(2)
    torch.testing.assert_close(logits(), 2 * before, rtol=1e-4, atol=1e-3)
    copied = copy.deepcopy(tables)
    with torch.no_grad():
        copied.head.zero_()
    with torch.inference_mode():
        assert not copied.logits(x).any()
    torch.testing.assert_close(logits(), 2 * before, rtol=1e-4, atol=1e-3)


def test_training_autocast_and_plain_computations_take_the_plain_product():
    weight, x, kept = numbers(M, N, seed=1).requires_grad_(), numbers(3, N), Kept()
    kept(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(M, N), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        with fast.plain():
            assert torch.equal(kept(x, weight), F.linear(x, weight))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert kept(x, weight).dtype == torch.bfloat16
        assert kept._arranged is None
        kept(x, weight)
        assert (kept._arranged is not None) == packed_products._supported(torch.float32)
