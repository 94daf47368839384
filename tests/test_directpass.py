"""The direct decoding pass against the library's own; key-value entries behind a row that do not count."""

from dataclasses import replace

import pytest
import torch

from specbench import fast
from specbench.models import selfcheck
from specbench.models.fast.direct_pass import facts_of, windows_of
from specbench.models.kv_cache import KVCache
from specbench.models.target import Target, new_causal_lm
from tests import families, tiny

# Every pre-norm family: biases, factors, partial and scaled ropes, windows shorter than the text.
CONFIGS = {
    **{name: families.config(name) for name in ("mistral", "qwen2, window", "phi3", "llama, llama3 rope")},
    **{name: tiny.FAMILIES[name] for name in ("llama", "qwen2", "qwen3", "granite", "gemma")},
    "llama, biases": {**tiny.LLAMA, "attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize(
    ("name", "taps"), [*((name, tiny.TAPS) for name in CONFIGS), ("qwen3", (-1, 1)), ("granite", (-1,)), ("llama", ())]
)
def test_direct_pass_equals_the_librarys(name, taps):
    taps = tuple(i for i in taps if i < CONFIGS[name]["num_hidden_layers"])
    target = Target.from_config(CONFIGS[name], taps, seed=3, stop_token_ids=[])
    assert target.decodes_directly and selfcheck.settle(target).mode == "direct"
    for name, parameter in target.decoder.layers.named_parameters():
        if "norm" in name or "bias" in name:  # away from neutral
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    tokens, lengths = (
        torch.randint(2, 90, (3, 19), generator=torch.Generator().manual_seed(0)),
        torch.tensor([19, 14, 16]),
    )

    def extended():
        state, context = target.prefill(tokens, lengths)
        found = []
        for size, kept in ((1, [1, 1, 1]), (5, [2, 5, 1]), (3, [0, 1, 3])):
            block = torch.randint(2, 90, (3, size), generator=torch.Generator().manual_seed(size))
            context = target.extend(state, block)
            found += [context.last, context.taps]
            state.advance(torch.tensor(kept))
        return found

    ours = extended()
    with fast.plain():
        assert not target.decodes_directly
        theirs = extended()
    for our, their in zip(ours, theirs, strict=True):
        # Of the largest: norms away from neutral make states of any size.
        assert our.shape == their.shape and (our.numel() == 0 or (our - their).abs().max() <= 1e-5 * their.abs().max())


@pytest.mark.parametrize("name", ["llama", "granite", "gemma"])
def test_direct_pass_in_bf16_passes_the_check(name):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = new_causal_lm(CONFIGS[name])
    for parameter in model.parameters():  # and not the frequencies of its rope, which a loaded model keeps in fp32
        parameter.data = parameter.data.bfloat16()
    target = Target(model, model.config.to_dict(), tiny.TAPS, stop_token_ids=[])
    report = selfcheck.examine(target)
    assert report.mode == "direct"
    # A factor forgotten in one layer is far beyond rounding.
    with torch.no_grad():
        target.direct.facts = replace(target.direct.facts, embedding_scale=0.5 * target.direct.facts.embedding_scale)
    assert selfcheck.examine(target).mode == "library"


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma4_text"},
        {"model_type": "mixtral"},
        {"hidden_act": "relu"},
        {"no_rope_layers": [1, 1, 0, 1]},
        {"layer_types": ["full_attention", "chunked_attention"]},
    ],
)
def test_other_architectures_take_the_librarys_pass(change):
    def ours(config, dtype=torch.float32):
        return facts_of(config, dtype) is not None and windows_of(config, 2) is not None

    assert ours(tiny.QWEN3)
    assert not ours({**tiny.QWEN3, **change})
    assert ours(tiny.QWEN3, torch.bfloat16) and not ours(tiny.QWEN3, torch.float16)


def test_a_check_under_plain_computations_is_a_check_of_the_direct_pass_too(monkeypatch):
    """What is remembered of a target must not depend on the switch of the process that checked it."""
    target = Target.from_config(tiny.QWEN3, tiny.TAPS, seed=5, stop_token_ids=[])
    monkeypatch.setattr(target.direct, "windows", [1] * 4)  # each token sees itself alone
    with fast.plain():
        report = selfcheck.examine(target)
    assert report.mode == "library" and "direct decoding differs" in report.reason


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
