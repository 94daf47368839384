"""The decoding pass of a Qwen3 target by our own layers: the same parameters without the library's cost of a call.

A decoding step of a small target, or of any target at batch 1, is bound by what the interpreter spends around each
operation. The library's own pass stays the oracle (`Target.direct` None selects it); only fp32 goes this way, because
in shorter formats the two round the norms differently.

Axes: B rows, S new tokens, C taps, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.models.backbone import ACTIVATIONS, Layer, RotaryEmbedding, qwen3
from specbench.models.fast.folded_layers import Stack
from specbench.models.kv_cache import KVCache


def fits(text: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether a target of this text configuration can be decoded by DirectPass."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return (
        text.get("model_type") == "qwen3"
        and dtype == torch.float32
        and rope.get("rope_type", rope.get("type", "default")) == "default"
        and set(text.get("layer_types") or ["full_attention"]) == {"full_attention"}
        and not text.get("use_sliding_window")
        and text.get("hidden_act", "silu") in ACTIVATIONS
    )


class DirectPass:
    """Layers that share the parameters of a library decoder of Qwen3's architecture."""

    def __init__(self, text: Mapping[str, Any], decoder: nn.Module):
        facts = qwen3(text)
        self.norm, self.embedding, self.eps = decoder.norm, decoder.embed_tokens, facts.norm_eps
        self.rope = RotaryEmbedding(facts).to(decoder.embed_tokens.weight.device)
        layers: list[Layer] = []
        for theirs in decoder.layers:
            with torch.device("meta"):
                own = Layer(facts)
            own.load_state_dict(theirs.state_dict(), assign=True)
            layers.append(own.eval().requires_grad_(False))
        self.stack = Stack(layers, facts)

    def __call__(
        self, cache: KVCache, tokens: Int[Tensor, "B S"], taps: tuple[int, ...]
    ) -> tuple[Float[Tensor, "B S C D"], Float[Tensor, "B S D"]]:
        """Outputs of the layers in `taps` (-1: the embedding) and the final states of S tokens written to `cache`."""
        size = tokens.shape[1]
        mask, x = cache.visible(size), F.embedding(tokens, self.embedding.weight)
        rope = self.rope.behind(cache, size, x.dtype)
        found = {-1: x}
        for i in range(len(self.stack.layers)):
            found[i] = x = self.stack.extend(i, x, rope, cache, mask)
        chosen = torch.stack([found[i] for i in taps], 2) if taps else x.new_empty(*x.shape[:2], 0, x.shape[2])
        return chosen, F.rms_norm(x, x.shape[-1:], self.norm.weight, self.eps)
