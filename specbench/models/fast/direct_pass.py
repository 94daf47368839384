"""The decoding pass of a dense pre-norm target by our own layers: the library's parameters without its cost of a call.

A decoding step of a small target, or of any target at batch 1, is bound by what the interpreter spends around each
operation. The library's own pass stays the reference: the self-check of a target (models/selfcheck.py) compares the two
when it is loaded, and `specbench.fast.plain()` selects the library's. Targets in fp32 and bf16 go this way; in bf16 the
two round differently, as two implementations of one model do, and agree within the rounding that the check allows.

Axes: B rows, S new tokens, C taps, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.models.backbone import ACTIVATIONS, FAMILIES, MODEL_TYPES, OF_EXPERTS, Backbone, Layer, RotaryEmbedding
from specbench.models.branches import Branches
from specbench.models.fast.folded_layers import Stack
from specbench.models.kv_cache import KVCache
from specbench.models.rope import KINDS, declared_kind

# Families whose layer is norm, attention, norm, feed-forward, with one rope for all layers.
PRE_NORM = ("llama", "qwen2", "qwen3", "phi3", "granite", "gemma")
FULL, SLIDING = "full_attention", "sliding_attention"


def facts_of(config: Mapping[str, Any], dtype: torch.dtype) -> Backbone | None:
    """The layer of a target of this configuration (the library's, defaults included) where DirectPass can run it."""
    kind = config.get("model_type", "")
    family = MODEL_TYPES.get(kind)
    if dtype not in (torch.float32, torch.bfloat16) or family not in PRE_NORM or kind in OF_EXPERTS:
        return None
    if declared_kind(config) not in ("default", *KINDS) or 0 in (config.get("no_rope_layers") or ()):
        return None
    facts = FAMILIES[family](config)
    return facts if facts.activation in ACTIVATIONS else None


def windows_of(config: Mapping[str, Any], layers: int) -> list[int | None] | None:
    """How far back each layer sees (None: everything); None in whole where a layer attends in another way."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if kinds is None:
        return [window] * layers
    if not set(kinds) <= {FULL, SLIDING}:
        return None
    return [window if kind == SLIDING else None for kind in kinds]


class DirectPass:
    """Layers that share the parameters of a library decoder."""

    def __init__(self, facts: Backbone, decoder: nn.Module, layers: list[Layer], windows: list[int | None]):
        self.norm, self.embedding, self.facts, self.windows = decoder.norm, decoder.embed_tokens, facts, windows
        self.rope = RotaryEmbedding(facts).to(decoder.embed_tokens.weight.device)
        self.stack = Stack(layers, facts)
        self.final = facts.norm(facts.hidden_size).to(decoder.norm.weight.device)
        self.final.weight = decoder.norm.weight

    @classmethod
    def of(cls, config: Mapping[str, Any], decoder: nn.Module) -> DirectPass | None:
        """The pass of a decoder of this configuration (the library's, defaults included); None where its layers are
        not ours."""
        if config.get("model_type") not in MODEL_TYPES:
            return None
        facts = facts_of(config, decoder.embed_tokens.weight.dtype)
        windows = None if facts is None else windows_of(config, len(decoder.layers))
        if windows is None:
            return None
        layers = [_shared(theirs, facts) for theirs in decoder.layers]
        return None if None in layers else cls(facts, decoder, layers, windows)

    def __call__(
        self, cache: KVCache, tokens: Int[Tensor, "B S"], taps: tuple[int, ...], branches: Branches | None = None
    ) -> tuple[Float[Tensor, "B S C D"], Float[Tensor, "B S D"]]:
        """Outputs of the layers in `taps` (-1: the embedding) and the final states of S tokens written to `cache`;
        `branches`: the tokens form a tree."""
        size, scale = tokens.shape[1], self.facts.embedding_scale
        if branches is None:
            masks = {window: cache.visible(size, window=window) for window in set(self.windows)}
        else:
            masks = {window: cache.branching(branches, window) for window in set(self.windows)}
        x = F.embedding(tokens, self.embedding.weight)
        if scale != 1.0:
            x = x * scale
        rope = self.rope.behind(cache, size, x.dtype, None if branches is None else branches.depth)
        found = {-1: x}
        for i, window in enumerate(self.windows):
            found[i] = x = self.stack.extend(i, x, rope, cache, masks[window])
        chosen = torch.stack([found[i] for i in taps], 2) if taps else x.new_empty(*x.shape[:2], 0, x.shape[2])
        return chosen, self.final(x)


def _shared(theirs: nn.Module, facts: Backbone) -> Layer | None:
    """Our layer over the parameters of the library's; None where their names or shapes are others."""
    found = theirs.state_dict()
    for joined, parts, sizes in (
        ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), (facts.heads, facts.kv_heads, facts.kv_heads)),
        ("mlp.gate_up_proj", ("gate_proj", "up_proj"), (1, 1)),
    ):
        for name in [name for name in found if name.startswith(f"{joined}.")]:
            whole, owner = found.pop(name), joined.partition(".")[0]
            pieces = whole.split([len(whole) * size // sum(sizes) for size in sizes])
            found |= {
                f"{owner}.{part}.{name.rpartition('.')[2]}": piece for part, piece in zip(parts, pieces, strict=True)
            }
    with torch.device("meta"):
        own = Layer(facts)
    if {name: value.shape for name, value in own.state_dict().items()} != {name: v.shape for name, v in found.items()}:
        return None
    own.load_state_dict(found, assign=True)
    return own.eval().requires_grad_(False)
