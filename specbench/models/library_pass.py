"""The forward pass of a causal language model of transformers over a KVCache with a different length in each row.

Masks are those of the model: transformers calls one function for every mask that a model needs (full, sliding,
chunked), and during a ragged pass this function counts the positions of each row from its own length. The operations of
a model between its final states and its logits are measured: its head is made to return known numbers, and the output
of the model shows a factor, a soft-cap, or an operation that Tables cannot represent.

Axes: B rows, S new tokens, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from specbench.models.branches import Branches
from specbench.models.kv_cache import KVCache

PROBED_TOKENS = 6
# Names of the final norm among the families of transformers.
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "out_norm", "ln_out")


class Unsupported(ValueError):
    """A model that cannot be a target; the message gives the reason."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal language model. `takes`: arguments of its decoder's forward; `positions`: the size of its
    table of learnt positions (None: it has no table, positions are computed)."""

    decoder: nn.Module
    layers: nn.ModuleList
    embedding: nn.Module
    head: nn.Module
    takes: frozenset[str]
    positions: int | None

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last layer, if the decoder has one with a known name."""
        return next((getattr(self.decoder, n) for n in FINAL_NORMS if hasattr(self.decoder, n)), None)


def anatomy(model: nn.Module) -> Anatomy:
    """Decoder, layers, embedding and head of `model`. Errors: Unsupported, naming the missing part."""
    kind, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(f"{kind} is an encoder-decoder: a draft continues one text, so the target must be causal")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "weight", None) is None or head.weight.dim() != 2:
        raise Unsupported(f"{kind} has no head that maps final states to logits by one matrix")
    if getattr(embedding, "weight", None) is None or embedding.weight.dim() != 2:
        raise Unsupported(f"{kind} has no embedding of one row per token")
    decoder = _decoder(model)
    text = config.get_text_config(decoder=True)
    count = getattr(text, "num_hidden_layers", None)
    lists = [module for module in _outermost_lists(decoder) if len(module)]
    layers = next((found for found in lists if len(found) == count), max(lists, key=len, default=None))
    if decoder is model or layers is None:
        raise Unsupported(f"{kind} has no decoder with a list of layers to read hidden states from")
    takes = frozenset(inspect.signature(decoder.forward).parameters)
    return Anatomy(decoder, layers, embedding, head, takes, _learnt_positions(decoder, embedding, layers, text))


def _decoder(model: nn.Module) -> nn.Module:
    """The module that maps token ids to final states."""
    found = model.get_decoder()
    if found is not model:
        return found
    bodies = [child for child in model.children() if next(_outermost_lists(child), None) is not None]
    return max(bodies, key=lambda body: sum(p.numel() for p in body.parameters()), default=model)


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def _learnt_positions(decoder: nn.Module, embedding: nn.Module, layers: nn.Module, text: Any) -> int | None:
    """Rows of a table of positions beside the token embedding, as many as the configuration states."""
    inside = {id(module) for module in layers.modules()}
    stated = stated_positions(text)
    sizes = [
        module.num_embeddings
        for module in decoder.modules()
        if isinstance(module, nn.Embedding) and module is not embedding and id(module) not in inside
    ]
    return stated if stated is not None and any(stated <= size <= stated + 8 for size in sizes) else None


def stated_positions(text: Any) -> int | None:
    """The longest text that a configuration states."""
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
    found = [getattr(text, name, None) for name in names]
    return next((value for value in found if isinstance(value, int) and value > 0), None)


class Bridge:
    """The interface of a KVCache for attention layers of transformers (their layout is (B, G, T, d))."""

    is_compileable = False
    is_sliding = ()

    def __init__(self, cache: KVCache):
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        stored = self.cache.write(layer, keys.transpose(1, 2), values.transpose(1, 2))
        return stored[0].transpose(1, 2), stored[1].transpose(1, 2)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.cache.longest

    def get_query_offset(self, layer: int = 0) -> int:
        return self.cache.longest

    def get_mask_sizes(self, size: int, layer: int = 0) -> tuple[int, int]:
        return self.cache.longest + size, 0


@dataclass
class Masks:
    """The calls of a model to the mask functions of transformers: their number, and the windows."""

    asked: int = 0
    windows: set[int] = field(default_factory=set)


@contextmanager
def masks_by_row(cache: KVCache, seen: Masks | None = None, branches: Branches | None = None) -> Iterator[None]:
    """Context in which masks count the new tokens of each row from its own length; rows of one length need no change.
    With `branches`, tokens are masked by their positions, and those of other branches are not seen.

    It changes the local table of mask functions in transformers and restores it at the end, also after errors.
    """
    lengths, even = cache.lengths, cache.even and branches is None
    if even and seen is None:
        yield
        return
    if branches is not None:
        own = cache.branching(branches)[:, 0]
        position = lengths[:, None] + branches.depth
        place = torch.arange(own.shape[2], device=lengths.device)
        inside = (place - lengths[:, None]).clamp(0, branches.depth.shape[1] - 1)
        key_position = torch.where(place < lengths[:, None], place, position.gather(1, inside))

    def by_row(original):
        def mask(*, mask_function, attention_mask=None, **settings):
            if seen is not None:
                seen.asked += 1
                seen.windows.add(settings.get("local_size") or 0)
            if even:
                return original(mask_function=mask_function, attention_mask=attention_mask, **settings)

            def shifted(row, head, query, key):
                if branches is None:
                    return mask_function(row, head, query + lengths[row], key)
                inner = mask_function(row, head, position[row, query], key_position[row, key])
                return inner & own[row, query, key]

            settings |= {"q_offset": 0, "allow_is_causal_skip": False}
            return original(mask_function=shifted, attention_mask=attention_mask, **settings)

        return mask

    table = ALL_MASK_ATTENTION_FUNCTIONS
    held = dict(table._local_mapping)
    for name in ("sdpa", "eager"):
        table[name] = by_row(table[name])
    try:
        yield
    finally:
        table._local_mapping.clear()
        table._local_mapping.update(held)


def run(
    parts: Anatomy,
    cache: KVCache,
    tokens: Int[Tensor, "B S"],
    seen: Masks | None = None,
    branches: Branches | None = None,
) -> Float[Tensor, "B S D"]:
    """Final states of S tokens per row, whose keys and values are written to `cache` after each row's length;
    `branches`: the tokens form a tree."""
    depth = torch.arange(tokens.shape[1], device=tokens.device) if branches is None else branches.depth
    position = cache.lengths[:, None] + depth
    with masks_by_row(cache, seen, branches):
        out = parts.decoder(input_ids=tokens, past_key_values=Bridge(cache), use_cache=True, **_placed(parts, position))
    return final_states(out)


def run_whole(parts: Anatomy, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    """Final states of texts from their beginning, without a cache."""
    placed = {}
    if parts.positions is not None and tokens.shape[1] > parts.positions:
        position = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        placed = _placed(parts, position)
    return final_states(parts.decoder(input_ids=tokens, use_cache=False, **placed))


def _placed(parts: Anatomy, position: Int[Tensor, "B S"]) -> dict[str, Tensor]:
    if "position_ids" not in parts.takes:
        return {}
    # Positions beyond the table belong to padding, or to a proposal beyond the maximum length.
    return {"position_ids": position if parts.positions is None else position.clamp_max(parts.positions - 1)}


def final_states(out: Any) -> Tensor:
    """The final hidden state of a decoder's output."""
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]


@dataclass(frozen=True)
class HeadFunction:
    """Factors between token embeddings and layers, and between final states and logits (see Tables).

    `streams`: the axis of parallel residual streams in the output of a layer; None if the output is (B, T, D).
    """

    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    soft_cap: float | None = None
    streams: int | None = None


def one_stream(states: Tensor, axis: int | None) -> Float[Tensor, "B T D"]:
    """The output of a layer as one state per token: the mean of parallel residual streams."""
    return states if axis is None or states.dim() == 3 else states.mean(axis)


def first_of(output: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    return output[0] if isinstance(output, tuple | list) else output


@torch.inference_mode()
def head_function(model: nn.Module, parts: Anatomy) -> HeadFunction:
    """Measure these factors on the model, by one pass over a few tokens. Errors: Unsupported if Tables cannot represent
    them."""
    device = parts.embedding.weight.device
    tokens = torch.arange(1, PROBED_TOKENS + 1, device=device)[None] % len(parts.embedding.weight)
    found: dict[str, Tensor] = {}

    def entering(module, args, kwargs):
        found.setdefault("entering", args[0] if args else kwargs["hidden_states"])

    def through(module, args, out):
        found.setdefault("through", first_of(out))

    def leaving(module, args, out):
        found["last"] = final_states(out)

    def ramp(module, args, out):
        found["read"] = args[0]
        count = out.shape[-1]
        # The outermost value saturates any soft-cap; 1/128 is far below every one.
        known = torch.linspace(-40.0, 40.0, count, device=out.device)
        known[0], known[1] = 2.0**20, 2.0**-7
        found["known"] = known.expand(out.shape)
        return found["known"].clone()

    hooks = [
        parts.layers[0].register_forward_pre_hook(entering, with_kwargs=True),
        parts.layers[0].register_forward_hook(through),
        parts.decoder.register_forward_hook(leaving),
        parts.head.register_forward_hook(ramp),
    ]
    kind = type(model).__name__
    try:
        out = model(input_ids=tokens, use_cache=False).logits
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        raise Unsupported(
            f"{kind} fails on a text of {PROBED_TOKENS} tokens ({type(error).__name__}: {said})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if "through" not in found or found["entering"].dim() not in (3, 4):
        raise Unsupported(f"{kind} does not hand hidden states from layer to layer")
    axis = None if found["through"].dim() == 3 else 2 if found["through"].shape[:2] == tokens.shape else 0
    width = found["through"].shape[-1]
    if parts.embedding.weight.shape[1] != width or parts.head.weight.shape[1] != width:
        raise Unsupported(
            f"{kind} has embeddings of {parts.embedding.weight.shape[1]} features, layers of {width} and a head of "
            f"{parts.head.weight.shape[1]}: a draft shares all three and needs them to be one width"
        )
    if "known" not in found or "last" not in found or out.shape != found["known"].shape:
        raise Unsupported(f"{kind} does not compute its logits by its own head from its decoder's final states")
    if not bool(torch.isfinite(found["last"]).all()):
        raise Unsupported(
            f"{kind} gives NaN or infinite final states in {str(found['last'].dtype).removeprefix('torch.')}: its "
            "weights are broken, or need a dtype with a wider range"
        )
    before = _factor(found["read"], found["last"])
    if before is None:
        raise Unsupported(f"{kind} changes its final states before the head by more than a factor")
    dtype, numbers = parts.head.weight.dtype, _numbers(model.config.get_text_config(decoder=True))
    after, cap = _elementwise(found["known"].double(), out.double(), dtype, kind)
    scale = _factor(one_stream(found["entering"], axis), parts.embedding.weight[tokens]) or 1.0
    near = 1e-4 if dtype in (torch.float32, torch.float64) else 8e-3
    return HeadFunction(
        _snapped(scale, [*numbers, width**0.5], near),
        _snapped(before * after, [*numbers, *(1 / n for n in numbers)], near),
        cap,
        axis,
    )


def _numbers(config: Any) -> list[float]:
    """Every number in a configuration; a measured factor that is nearly equal to one of them is replaced by it."""
    values = config.to_dict().values()
    return [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v]


def _snapped(value: float, numbers: list[float], near: float) -> float:
    best = min([1.0, *numbers], key=lambda number: abs(number - value))
    return best if abs(best - value) <= near * abs(value) else value


def _factor(ours: Tensor, theirs: Tensor) -> float | None:
    """The number a with ours = a * theirs up to rounding; None if there is none."""
    if ours.shape != theirs.shape:
        return None
    room = 1e-4 if ours.dtype in (torch.float32, torch.float64) else 2e-2
    ours, theirs = ours.double(), theirs.double()
    energy = float((theirs * theirs).sum())
    if energy == 0:
        return None
    factor = float((ours * theirs).sum()) / energy
    rest = float((ours - factor * theirs).norm())
    return factor if factor and rest <= room * float(ours.norm()) else None


def _elementwise(known: Tensor, out: Tensor, dtype: torch.dtype, kind: str) -> tuple[float, float | None]:
    """Factor and soft-cap that convert the head's output to the model's logits."""
    largest, smallest = float(known[0, 0, 0]), float(known[0, 0, 1])
    slope, top = float(out[0, -1, 1]) / smallest, float(out[0, -1, 0])
    capped = abs(top) < 0.5 * abs(slope) * largest
    factor, cap = slope, top if capped else None
    said = known * factor if cap is None else cap * torch.tanh(known * factor / cap)
    room = (2e-5 if dtype in (torch.float32, torch.float64) else 2e-2) * said.abs().clamp_min(1e-3)
    if not (factor and bool(((out - said).abs() <= room).all())):
        raise Unsupported(
            f"{kind} changes its head's numbers by more than a factor and a soft-cap before they are logits"
        )
    return factor, cap
