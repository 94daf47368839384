"""What training is said to take, held against what a forward pass of every method really keeps and computes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from specbench.blocks import with_anchors
from specbench.drafts.draft import Draft
from specbench.drafts.work import of_parameters
from tests import tiny

LENGTH = 40


def measured(draft: torch.nn.Module) -> tuple[int, int, int]:
    """Numbers that the forward pass keeps for the backward pass beside weights, tables and inputs, its FLOPs, and the
    number of blocks."""
    batch = with_anchors(tiny.batch("qwen3", lengths=(LENGTH,)), None)
    own = {t.untyped_storage().data_ptr() for t in (*draft.parameters(), *draft.buffers(), batch.taps, batch.last)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage()
        if tensor.is_floating_point() and place.data_ptr() not in own:
            kept[place.data_ptr()] = place.nbytes() // tensor.element_size()
        return tensor

    alive = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: alive.append(pack(t)) or t, lambda t: t)
    with hooks, FlopCounterMode(display=False) as counter:
        alive.append(draft(batch))
    return sum(kept.values()), counter.get_total_flops(), int((batch.anchors >= 0).sum())


@pytest.mark.parametrize("method", tiny.METHODS)
def test_the_estimate_is_near_what_a_forward_pass_takes(method: str) -> None:
    draft = tiny.draft(method, "qwen3").train()
    kept, flops, anchors = measured(draft)
    work = draft.work(LENGTH, anchors)
    # A CPU keeps the scores of attention, which are small beside the rest and which the estimate leaves out.
    assert 0.5 < work.kept / kept < 1.5
    assert 0.8 < work.flops / flops < 1.25


@pytest.mark.parametrize("values", [torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.nonzero])
def test_a_forward_pass_that_depends_on_values_is_estimated_from_the_parameters(values, monkeypatch) -> None:
    draft = tiny.draft("eagle3", "qwen3")
    monkeypatch.setattr(type(draft), "forward", lambda self, batch: values(batch.tokens))
    apart = [*draft.tables.parameters(), *draft.projection_parameters()]
    assert Draft.work(draft, LENGTH, 3) == 3 * draft.block_size * of_parameters(draft, apart)
