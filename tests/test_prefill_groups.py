"""Requests that join together are prefilled in groups of similar length."""

from __future__ import annotations

from specbench.decoding.loop import Limits, decode, speculative_decode
from specbench.decoding.sampling import Sampling
from tests import tiny


def test_one_long_prompt_does_not_pad_the_others_to_its_length(monkeypatch):
    owner, shapes = tiny.target("qwen3"), []
    prompts = [[5 + i, 6, 7] for i in range(6)] + [[9 + i % 50 for i in range(300)]]
    alone = [next(iter(decode(owner, [prompt], Sampling(), Limits(6)))).output_ids for prompt in prompts]
    prefill = owner.prefill

    def recorded(tokens, lengths):
        shapes.append(tuple(tokens.shape))
        return prefill(tokens, lengths)

    monkeypatch.setattr(owner, "prefill", recorded)
    together = {d.index: d.output_ids for d in decode(owner, prompts, Sampling(), Limits(6, batch_size=7))}
    assert [together[i] for i in range(7)] == alone
    assert sorted(shapes) == [(1, 300), (6, 3)]
    shapes.clear()
    drafted = speculative_decode(owner, tiny.draft("dspark", "qwen3"), prompts, Sampling(), Limits(6, batch_size=7))
    assert {d.index: d.output_ids for d in drafted} == together and sorted(shapes) == [(1, 300), (6, 3)]
