"""The chunk's linear layers against plain autograd, and the step benchmark on a small draft."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from specbench.losses.gradients import Known, without
from specbench.models.fast.projection import Linears, SharedLookups, add_linear_
from specbench.profiling.step_measurement import _memory, _times, measure
from specbench.profiling.training_speed import StepShape, whole_step

W, R = 13, 4


def weights():
    generator = torch.Generator().manual_seed(0)
    frozen, trained = (torch.randn(W, R, generator=generator, dtype=torch.float64) for _ in range(2))
    chunks = torch.randn(3, 5, R, generator=generator, dtype=torch.float64)
    return frozen, nn.Parameter(trained), nn.Parameter(torch.zeros(W, dtype=torch.float64)), chunks


def test_weight_gradients_add_up_over_chunks():
    frozen, trained, bias, chunks = weights()
    linears, outer = Linears([trained, bias]), []
    for chunk in chunks:
        x = chunk.clone().requires_grad_()
        with linears:
            logits = add_linear_(F.linear(x, frozen), x, trained) + F.linear(x, trained, bias)
        outer.append(linears.back(x, logits, logits.detach().cos()))
    x = chunks.flatten(0, 1).requires_grad_()
    logits = F.linear(x, frozen) + 2 * F.linear(x, trained) + bias
    expected = torch.autograd.grad(logits, [x, trained, bias], logits.detach().cos())
    for found, wanted in zip([torch.cat(outer), *linears.totals()], expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_products_of_one_chunk_have_memory_of_their_own_and_the_next_chunk_reuses_it():
    frozen, trained, _, chunks = weights()
    linears, places = Linears(), []
    for chunk in chunks:
        with torch.no_grad(), linears:
            one, other = F.linear(chunk, frozen), F.linear(chunk, trained)
        torch.testing.assert_close(one, chunk @ frozen.T)
        torch.testing.assert_close(other, chunk @ trained.T)
        places.append((one.data_ptr(), other.data_ptr()))
    assert len(set(places)) == 1 and len(set(places[0])) == 2


def test_outside_of_a_chunk_add_linear_is_autograds():
    frozen, trained, _, chunks = weights()
    for x in (chunks[0], chunks):
        torch.testing.assert_close(add_linear_(F.linear(x, frozen), x, trained), x @ (frozen + trained).T)
    add_linear_(F.linear(chunks, frozen), chunks, trained).sum().backward()
    torch.testing.assert_close(trained.grad, chunks.sum((0, 1)).expand(W, R))


def test_a_lookup_is_shared_until_its_result_is_written_to():
    table, tokens = nn.Embedding(7, 3), torch.tensor([1, 2])
    with SharedLookups():
        first, second = table(tokens), table(tokens)
        assert first is second and table(tokens.clone()) is not first
        with torch.no_grad():
            assert not table(tokens).requires_grad
        scaled = table(tokens).mul_(2)
        assert torch.equal(table(tokens), table.weight[tokens]) and not torch.equal(scaled, table(tokens))


def test_without_trains_what_is_not_shared():
    own, shared = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    (3 * without((own * shared).sum(), [shared])).backward()
    assert torch.equal(own.grad, torch.full((2,), 3.0)) and shared.grad is None
    assert not without(shared.sum(), [shared]).requires_grad


def test_known_gradients_are_handed_over_scaled():
    x, gradient = torch.ones(2, requires_grad=True), torch.tensor([1.0, 2.0])
    (4 * Known.apply(torch.tensor(5.0), [gradient], x)).backward()
    assert torch.equal(x.grad, torch.tensor([4.0, 8.0]))


SMALL = StepShape(hidden=8, vocabulary=700, tokens=30, prompt=8, anchors=3, slots=4, layers=1, taps=1, heads=2, rank=4)


def test_costs_are_positive_and_complete():
    variants = {"chunked": partial(whole_step, SMALL), "straightforward": partial(whole_step, SMALL, True)}
    threads = torch.get_num_threads()
    costs = _times(variants, 3, 1, threads)
    for name, build_step in variants.items():
        before, peak = _memory(build_step, threads)
        assert 0 < before <= peak
        assert 0 < costs[name].low <= costs[name].seconds <= costs[name].high and costs[name].repeats == 3
    with pytest.raises(ValueError, match="repeats"):
        measure(variants, repeats=0)
