"""The direct decoding pass against the library's own; key-value entries behind a row that do not count."""

import pytest
import torch

from specbench.models.fast.direct_pass import fits
from specbench.models.kv_cache import KVCache
from specbench.models.target import Target
from tests import tiny


@pytest.mark.parametrize("taps", [tiny.TAPS, (-1, 1), ()])
def test_direct_pass_equals_the_librarys(taps):
    direct = Target.from_config(tiny.QWEN3, taps, seed=3, stop_token_ids=[])
    library = Target.from_config(tiny.QWEN3, taps or (0,), seed=3, stop_token_ids=[])
    library.direct = None
    assert direct.direct is not None
    tokens, lengths = torch.randint(2, 90, (3, 9), generator=torch.Generator().manual_seed(0)), torch.tensor([9, 4, 6])
    states = [owner.prefill(tokens, lengths)[0] for owner in (direct, library)]
    for size, kept in ((1, [1, 1, 1]), (5, [2, 5, 1]), (3, [0, 1, 3])):
        block = torch.randint(2, 90, (3, size), generator=torch.Generator().manual_seed(size))
        ours, theirs = (owner.extend(state, block) for owner, state in zip((direct, library), states, strict=True))
        torch.testing.assert_close(ours.last, theirs.last, atol=2e-5, rtol=1e-4)
        if taps:
            torch.testing.assert_close(ours.taps, theirs.taps, atol=2e-5, rtol=1e-4)
        for state in states:
            state.advance(torch.tensor(kept))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma4_text"},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"use_sliding_window": True},
    ],
)
def test_other_architectures_take_the_librarys_pass(change):
    assert fits(tiny.QWEN3, torch.float32)
    assert not fits({**tiny.QWEN3, **change}, torch.float32)
    assert not fits(tiny.QWEN3, torch.bfloat16)


@pytest.mark.parametrize("lengths", [[4, 4], [4, 2]])
def test_entries_behind_a_row_do_not_count_and_are_seen_causally(lengths):
    cache = KVCache(2)
    entry = torch.arange(1.0, 9.0).view(1, 8, 1, 1).expand(2, -1, -1, -1)
    cache.write(0, entry[:, :4], entry[:, :4])
    cache.advance(torch.tensor(lengths))
    cache.write(0, 10 * entry[:, :1], entry[:, :1])
    keys, _ = cache.write(0, 20 * entry[:, :1], entry[:, :1], behind=1)
    assert keys.shape[1] == max(lengths) + 2 and cache.lengths.tolist() == lengths
    mask = cache.visible(1, behind=1)
    for row, length in enumerate(lengths):
        seen = keys[row, :, 0, 0] if mask is None else keys[row, mask[row, 0, 0], 0, 0]
        assert seen.tolist() == [float(i + 1) for i in range(length)] + [10.0, 20.0]
    block = cache.visible(2, causal=False)
    assert (block is None) == (len(set(lengths)) == 1)
    windowed = cache.visible(2, window=3)
    assert windowed.sum(-1).flatten().tolist() == [3] * 4
