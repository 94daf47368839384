"""Codecs: exactness, error bounds, sizes at the published target's shape, and what they do to the output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specbench.data.cache.codecs import grouped
from specbench.data.cache.codecs.codecs import NAMES, codec
from specbench.data.cache.storage import PRESETS, kept_rows, storage

PUBLISHED = 30_720  # bytes per token of five taps and `last` in bf16 at hidden size 2560


def states(tokens: int = 48, taps: int = 3, hidden: int = 256, spread: float = 0.7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.exp(spread * torch.randn(taps, hidden, generator=generator))
    return torch.randn(tokens, taps, hidden, generator=generator) * channels


def stored_bytes(stored: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.itemsize for value in stored.values())


def relative_error(name: str, values: Tensor, scale: Tensor) -> float:
    """Error over size, both in units of the channel's own scale."""
    one = codec(name).fitted(values)
    decoded = one.decode(one.encode(values), torch.float32)
    return float(((decoded - values) / scale).norm() / (values / scale).norm())


@pytest.mark.parametrize("name", ["bf16", "bf16-lossless"])
def test_bf16_codecs_return_bf16_states_bit_by_bit(name):
    values = states().bfloat16()
    values[0, 0, :4] = torch.tensor([0.0, -0.0, 3e38, -1e-40])
    for given in (values, values[:, 0]):
        for one in (codec(name), codec(name).fitted(given)):
            decoded = one.decode(one.encode(given))
            assert decoded.dtype == torch.bfloat16
            assert torch.equal(decoded.contiguous().view(torch.int16), given.contiguous().view(torch.int16))


def test_fp32_is_exact():
    values = states()
    assert torch.equal(codec("fp32").decode(codec("fp32").encode(values)), values)


# Uniform steps over groups of standard normal values; the measured errors are .0061, .0251, .0928, .1029 and .0265.
@pytest.mark.parametrize(
    ("name", "bound"), [("int8", 0.0075), ("int6", 0.03), ("int4", 0.11), ("int4-wide", 0.12), ("fp8", 0.03)]
)
def test_error_stays_within_its_bound_and_outlier_channels_cost_nothing(name, bound):
    values = states(tokens=128)
    scale = values.abs().median(0).values
    assert 0 < relative_error(name, values, scale) < bound
    wild = torch.ones(values.shape[1:])
    wild[:, ::16] = 30.0
    if name != "fp8":  # the only lossy codec that does not know channels
        ours = relative_error(name, values * wild, scale * wild)
        assert ours < bound


@pytest.mark.parametrize("name", NAMES)
def test_sizes_taps_and_shapes(name):
    values = states(taps=4)
    one = codec(name).fitted(values)
    stored = one.encode(values)
    assert all(value.is_contiguous() for value in stored.values())
    if name != "bf16-lossless":
        assert stored_bytes(stored) == pytest.approx(one.bytes_per_value(256) * values.numel(), abs=1)
    whole = one.decode(stored, torch.float32)
    assert whole.shape == values.shape
    for chosen in ([0, 1, 2, 3], [1, 2], [0, 3], [2]):
        assert torch.equal(one.decode(stored, torch.float32, taps=chosen), whole[:, chosen])
    flat = one.fitted(values[:, 1])
    assert flat.decode(flat.encode(values[:, 1])).shape == (48, 256)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hidden", [2, 24, 96, 200])
def test_any_hidden_size_round_trips(name, hidden):
    sample = states(hidden=hidden)
    values, one = sample[:5], codec(name).fitted(sample)
    decoded = one.decode(one.encode(values), torch.float32)
    assert decoded.shape == values.shape
    assert float((decoded - values).norm() / values.norm()) < 0.2


@pytest.mark.parametrize("name", NAMES)
def test_without_a_sample_the_scales_travel_with_the_states(name):
    values = states()
    stored = codec(name).encode(values)
    fitted = codec(name).fitted(values)
    assert torch.equal(codec(name).decode(stored, torch.float32), fitted.decode(fitted.encode(values), torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_zeros_tokens_of_any_size_and_no_tokens(name):
    values = states(tokens=4)
    values[1], values[2], values[3] = 0.0, values[2] * 1e6, values[3] * 1e-6
    one = codec(name).fitted(states())
    decoded = one.decode(one.encode(values), torch.float32)
    assert torch.equal(decoded[1], torch.zeros_like(values[1]))
    for row in (2, 3):  # each token has its own range
        assert float((decoded[row] - values[row]).norm() / values[row].norm()) < 0.2
    assert one.decode(one.encode(values[:0])).shape == (0, 3, 256)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_refused(name):
    values = states()
    values[3, 1, 7] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        codec(name).fitted(states()).encode(values)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="int4-wide"):
        codec("int3")
    with pytest.raises(ValueError, match="smallest"):
        storage("tiny")
    with pytest.raises(ValueError, match="last_rows=some"):
        storage("int8", last_rows="some")


def test_presets_reach_their_sizes_at_the_published_shape():
    values = states(tokens=32, taps=6, hidden=2560, spread=1.0).bfloat16()
    ratios = {}
    for name in PRESETS:
        kept = storage(name).fitted(values[:, :5], values[:, 5])
        taps, last = kept.encode(values[:, :5], values[:, 5], torch.ones(32, dtype=torch.bool))
        ratios[name] = (stored_bytes(taps) + stored_bytes(last)) / 32 / PUBLISHED
        if name != "exact":
            promised = sum(kept.bytes_per_token(2560, 5).values()) - 5
            assert ratios[name] * PUBLISHED == pytest.approx(promised, abs=0.1)
    assert ratios["bf16"] == 1
    assert ratios["exact"] <= 0.70
    assert ratios["int8"] <= 0.52
    assert ratios["smallest"] <= 0.28


def test_int8_moves_the_output_no_more_than_bf16_arithmetic():
    """Total variation of next-token distributions against an fp32 run of the same small network."""
    torch.manual_seed(0)
    hidden, vocabulary = 256, 2000
    layers = [torch.randn(2, hidden, hidden) / hidden**0.5 for _ in range(6)]
    head = torch.randn(vocabulary, hidden) * 3 / hidden**0.5

    def run(dtype: torch.dtype) -> Tensor:
        x = torch.randn(128, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
        for up, down in layers:
            x = x + torch.tanh(x @ up.to(dtype)) @ down.to(dtype)
        return x * x.float().square().mean(-1, keepdim=True).rsqrt().to(dtype)

    exact = run(torch.float32)
    reference = (exact @ head.T).softmax(-1)

    def variation(last: Tensor) -> float:
        return float(((last.float() @ head.T).softmax(-1) - reference).abs().sum(-1).mean() / 2)

    one = codec("int8").fitted(exact)
    ours, floor = variation(one.decode(one.encode(exact), torch.float32)), variation(run(torch.bfloat16))
    assert 0 < ours <= floor


def test_kept_rows_are_the_supervised_and_their_neighbours():
    mask = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1], dtype=torch.bool)
    assert kept_rows(mask).tolist() == [False, True, True, True, True, False, True, True]
    values = states(tokens=8, taps=2)
    kept = storage("fp32", last_rows="supervised")
    _, stored = kept.encode(values, values[:, 0], mask)
    assert len(stored["values"]) == 6
    decoded = kept.decode_last(stored, mask)
    assert torch.equal(decoded, values[:, 0] * kept_rows(mask)[:, None])


@pytest.mark.parametrize("name", ["int8", "int6", "int4", "int4-wide"])
@pytest.mark.parametrize("hidden", [60, 256])
def test_integers_decode_to_their_definition_whatever_the_tiles(name, hidden, monkeypatch):
    """Every value is (code - zero) x step x scale in fp32, in this order, with codes unpacked here one by one."""
    values = states(tokens=23, hidden=hidden).bfloat16()
    one = codec(name).fitted(values)
    stored = one.encode(values)
    decoded = {dtype: one.decode(stored, dtype) for dtype in (torch.float32, torch.bfloat16)}
    chosen = one.decode(stored, torch.float32, [0, 2])
    monkeypatch.setattr(grouped, "TILE", 7 * hidden)
    again = one.encode(values)
    assert all(torch.equal(again[part], stored[part]) for part in stored)
    room = torch.full((23, 3, hidden), 7.0)
    assert one.decode(stored, torch.float32, room=lambda shape, dtype: room).data_ptr() == room.data_ptr()

    assert torch.equal(room, decoded[torch.float32]) and torch.equal(chosen, room[:, [0, 2]])
    assert torch.equal(room.bfloat16(), decoded[torch.bfloat16])
    table = torch.exp2(torch.arange(256) / -16)  # in one call: torch rounds a single power otherwise
    size, width = one._group(hidden), stored["codes"].shape[-1] * 8 // one.bits
    for tap, token in ((0, 0), (1, 8), (2, 22)):
        packed = stored["codes"][tap, token].tolist()
        parts = 1 if one.bits == 8 else 2 if one.bits == 4 else 4
        for channel in range(0, hidden, 29):
            part, at = divmod(channel, width // parts)
            if one.bits == 8:
                code = packed[channel]
            elif one.bits == 4:
                code = packed[at] >> 4 * part & 15
            elif part < 3:
                code = packed[part * (width // 4) + at] & 63
            else:
                code = sum((packed[n * (width // 4) + at] >> 6) << 2 * n for n in range(3))
            group = channel // size
            step = table[int(stored["steps"][tap, token, group])] * stored["units"][tap, token].float()
            zero = float(2 ** (one.bits - 1) - 1)
            if one.asymmetric:
                zero = stored["zeros"][tap, token, group].float() / 17
            assert room[token, tap, channel] == (torch.tensor(float(code)) - zero) * step * one.channels[tap, channel]


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_integers_refuse_one_value_that_is_not_finite(name, bad):
    values = states()
    one = codec(name).fitted(values)
    values[40, 2, 255] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        one.encode(values)
