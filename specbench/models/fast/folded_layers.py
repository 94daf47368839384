"""The layers of a draft or a target run over a key-value cache: as their modules say, or folded.

A decoding step of a small model, or of any model at batch 1, is bound by what is spent around each operation, not by
the operation. A folded layer asks for a quarter of them: query, key and value projections are one matrix with the
norm's weight inside, gate and up projections another, residuals are added by the product before them (a factor on what
is added lies in the weights), and norm(x) = x / hypot(|x|, sqrt(n eps)) leaves its sqrt(n) in the weight. In bf16 a
norm's weight inside another would be rounded with it, so layers are joined only: the same matrices, and the norms as
the modules compute them. A larger model is bound by the reading of its weights (packed_products.py). The modules are
the reference and do everything that folding does not cover. docs/performance.md ("Decoding") has what it buys.

Axes: B rows, S new tokens, R = B S, L layers, D hidden, H query and G key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

import torch
from jaxtyping import Float
from torch import Tensor, nn

from specbench import fast
from specbench.models.attention import attend_stored
from specbench.models.backbone import ACTIVATIONS, Backbone, Layer, Rope, rotate
from specbench.models.fast.packed_products import Product, version
from specbench.models.kv_cache import KVCache

# A folded layer is a copy, and beyond this size its memory counts.
FOLDED_BYTES = 2 * 2**30
# Where the products are no faster in a copy, they outweigh what is spent around them in smaller layers already.
FOLDED_BYTES_ELSEWHERE = 256 * 2**20
# Facts that folded layers follow; those of rope, tables and window reach them through their arguments.
FOLDED = {
    *("family", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim", "vocab_size"),
    *("norm_eps", "norm_adds_one", "activation", "attention_scale", "attention_soft_cap", "head_norms"),
    *("attention_bias", "output_bias", "mlp_bias", "residual_scale"),
    *("rope_theta", "rope_fraction", "rope_leading", "rope_scaling", "rope_length"),
    *("embedding_scale", "soft_cap", "logit_scale", "window"),
}


class Stack:
    """Layers of one backbone that extend a KVCache. `renew` before a request begins: it folds them anew if they were
    changed since; until the next one, folded layers keep the weights that it saw. Changes through `Tensor.data`, which
    autograd does not count, go unseen. `reads_context`: `store_context` will be asked for. `specbench.fast.plain()`
    keeps to the modules, and so does autocast, which would cast the folded norms too.
    """

    def __init__(self, layers: Iterable[Layer], backbone: Backbone, reads_context: bool = False):
        self.layers, self.backbone, self.reads_context = list(layers), backbone, reads_context
        self._steps: Plain | Folded = Plain(self.layers, backbone)
        self._seen: tuple | None = None

    def __getstate__(self) -> dict:
        """Copies and pickles leave the folded layers out."""
        return self.__dict__ | {"_steps": Plain(self.layers, self.backbone), "_seen": None}

    def renew(self) -> None:
        """Take the layers' present weights."""
        parameters = [p for layer in self.layers for p in layer.parameters()]
        known = all(type(layer) is Layer for layer in self.layers)  # a subclass computes something else
        folds = fast.enabled() and known and not torch.is_autocast_enabled(parameters[0].device.type)
        seen = (folds, *((p.data_ptr(), p.device, version(p)) for p in parameters))
        if seen == self._seen:
            return
        self._seen = seen
        normed = not any(isinstance(layer.input_layernorm, nn.Identity) for layer in self.layers)
        if folds and normed and foldable(self.backbone, parameters):
            with torch.inference_mode(False), torch.no_grad():
                kind = Folded if parameters[0].dtype == torch.float32 else Joined
                self._steps = kind(self.layers, self.backbone, self.reads_context)
        else:
            self._steps = Plain(self.layers, self.backbone)

    def forget(self) -> None:
        """Take the weights anew at the next `renew`, whatever they look like."""
        self._seen = None

    def extend(
        self,
        layer: int,
        x: Float[Tensor, "B S D"],
        rope: Rope,
        cache: KVCache,
        mask: Tensor | None,
        embedding: Float[Tensor, "B S D"] | None = None,
        behind: int = 0,
    ) -> Float[Tensor, "B S D"]:
        """One layer for S new tokens a row; their keys and values go `behind` entries after each row's length.
        `embedding`: what a paired layer reads beside x (others do not look at it). `mask`: KVCache.visible."""
        return self._steps.extend(layer, x, rope, cache, mask, embedding, behind)

    def store(
        self,
        layer: int,
        x: Float[Tensor, "B S D"],
        rope: Rope,
        cache: KVCache,
        embedding: Float[Tensor, "B S D"] | None = None,
    ) -> None:
        """The keys and values of `extend` alone."""
        self._steps.store(layer, x, rope, cache, embedding)

    def store_context(self, features: Float[Tensor, "B S D"], rope: Rope, cache: KVCache) -> None:
        """Keys and values of every layer straight from context features, which no layer's norm touches."""
        self._steps.store_context(features, rope, cache)


def foldable(backbone: Backbone, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether Folded or Joined covers these layers: pre-norm, in fp32 or bf16 throughout, not too large to be copied.

    A fact that is not among those that they read must be at its default.
    """
    plain = all(getattr(backbone, fact.name) == fact.default for fact in fields(backbone) if fact.name not in FOLDED)
    dtypes = {p.dtype for p in parameters}
    room = FOLDED_BYTES if parameters[0].device.type == "cpu" else FOLDED_BYTES_ELSEWHERE
    return (
        plain
        and dtypes in ({torch.float32}, {torch.bfloat16})
        and sum(p.numel() * p.element_size() for p in parameters) <= room
    )


class Plain:
    """The steps as the modules compute them."""

    def __init__(self, layers: list[Layer], backbone: Backbone):
        self.layers, self.scale, self.soft_cap = layers, backbone.scale, backbone.attention_soft_cap

    def extend(self, layer, x, rope, cache, mask, embedding, behind) -> Tensor:
        module = self.layers[layer]
        y = module.normed(x, embedding)
        query = module.self_attn.queries(y, rope)
        stored = cache.write(layer, *module.self_attn.keys_values(y, rope), behind)
        return module.finish(x, attend_stored(query, stored, mask, self.scale, self.soft_cap))

    def store(self, layer, x, rope, cache, embedding) -> None:
        module = self.layers[layer]
        cache.write(layer, *module.self_attn.keys_values(module.normed(x, embedding), rope))

    def store_context(self, features, rope, cache) -> None:
        for layer, module in enumerate(self.layers):
            cache.write(layer, *module.self_attn.keys_values(features, rope))


class Folded:
    """The same steps from folded copies of the layers' weights."""

    # Whether factors lie in the weights: those of the norms, and that on what is added to the residual.
    inside = True

    def __init__(self, layers: list[Layer], backbone: Backbone, reads_context: bool):
        self.layers, self.residual_scale = layers, backbone.residual_scale
        self.heads, self.kv_heads, self.head_dim = backbone.heads, backbone.kv_heads, backbone.head_dim
        self.activation = ACTIVATIONS[backbone.activation]
        device = layers[0].mlp.down_proj.weight.device
        self.floor, self.head_floor = (
            torch.tensor((size * backbone.norm_eps) ** 0.5, device=device)
            for size in (backbone.hidden_size, backbone.head_dim)
        )
        self.scale, self.soft_cap = backbone.scale, backbone.attention_soft_cap
        self.paired = [layer.hidden_norm is not None for layer in layers]
        self.head_norms = backbone.head_norms
        root, head_root, added = backbone.hidden_size**0.5, backbone.head_dim**0.5, backbone.residual_scale
        self.project, self.out, self.gate_up, self.down, self.head_weights = [], [], [], [], []

        def gain(norm: nn.RMSNorm) -> Tensor:
            return 1.0 + norm.weight if backbone.norm_adds_one else norm.weight

        def joined(linears: Sequence[nn.Linear], norms: Sequence[nn.RMSNorm]) -> Product:
            weight = torch.cat([linear.weight for linear in linears])
            if self.inside:
                weight = weight * (torch.cat([gain(norm) for norm in norms]) * root)
            return Product(weight, _biases(linears))

        def adding(linear: nn.Linear) -> Product:
            if not self.inside:
                return Product(linear.weight, linear.bias)
            return Product(linear.weight * added, _biases([linear], added))

        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            entering = [layer.input_layernorm, *([] if layer.hidden_norm is None else [layer.hidden_norm])]
            self.project.append(joined([attention.q_proj, attention.k_proj, attention.v_proj], entering))
            self.out.append(adding(attention.o_proj))
            self.gate_up.append(joined([mlp.gate_proj, mlp.up_proj], [layer.post_attention_layernorm]))
            self.down.append(adding(mlp.down_proj))
            if backbone.head_norms and self.inside:
                sides = ((attention.q_norm, self.heads), (attention.k_norm, self.kv_heads))
                self.head_weights.append(torch.cat([gain(n).expand(count, -1) for n, count in sides]) * head_root)
        if reads_context:
            pairs = [(layer.self_attn.k_proj, layer.self_attn.v_proj) for layer in layers]
            everything = [*(k for k, _ in pairs), *(v for _, v in pairs)]
            self.context = Product(torch.cat([p.weight for p in everything]), _biases(everything))

    def extend(self, layer, x, rope, cache, mask, embedding, behind) -> Tensor:
        B, S, D = x.shape
        rows = x.reshape(B * S, D)
        heads = self.project[layer](self.entering(layer, rows, embedding))
        heads = heads.view(B, S, self.heads + 2 * self.kv_heads, self.head_dim)
        turned = self.turn(heads.narrow(2, 0, self.heads + self.kv_heads), layer, rope)
        keys = turned.narrow(2, self.heads, self.kv_heads)
        stored = cache.write(layer, keys, heads.narrow(2, self.heads + self.kv_heads, self.kv_heads), behind)
        seen = attend_stored(turned.narrow(2, 0, self.heads), stored, mask, self.scale, self.soft_cap)
        rows = self.add(self.out[layer], rows, seen.reshape(B * S, self.heads * self.head_dim))
        gate, up = self.gate_up[layer](self.between(layer, rows)).chunk(2, -1)
        return self.add(self.down[layer], rows, self.activation(gate) * up).view(B, S, D)

    def store(self, layer, x, rope, cache, embedding) -> None:
        B, S, D = x.shape
        y = self.entering(layer, x.reshape(B * S, D), embedding)
        heads = self.project[layer].behind(y, self.heads * self.head_dim)
        heads = heads.reshape(B, S, 2 * self.kv_heads, self.head_dim)
        turned = self.turn(heads.narrow(2, 0, self.kv_heads), layer, rope, keys_only=True)
        cache.write(layer, turned, heads.narrow(2, self.kv_heads, self.kv_heads))

    def store_context(self, features, rope, cache) -> None:
        (B, S, D), G = features.shape, self.kv_heads
        L = len(self.project)
        heads = self.context(features.reshape(B * S, D)).view(B, S, 2 * L * G, self.head_dim)
        keys = rotate(self.normed_keys(heads.narrow(2, 0, L * G)), rope)
        for layer in range(L):
            cache.write(layer, keys.narrow(2, layer * G, G), heads.narrow(2, (L + layer) * G, G))

    def entering(self, layer: int, rows: Float[Tensor, "R D"], embedding: Float[Tensor, "B S D"] | None) -> Tensor:
        """What the joined projection of a layer reads."""
        y = unit(rows, self.floor)
        return torch.cat([unit(embedding.reshape_as(rows), self.floor), y], -1) if self.paired[layer] else y

    def between(self, layer: int, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        """What the feed-forward reads."""
        return unit(rows, self.floor)

    def add(self, product: Product, rows: Float[Tensor, "R D"], x: Float[Tensor, "R n"]) -> Float[Tensor, "R D"]:
        """The residual stream after a sublayer whose last product this is."""
        return product.added(rows, x)

    def turn(self, heads: Float[Tensor, "B S h d"], layer: int, rope: Rope, keys_only: bool = False) -> Tensor:
        """Heads normed and rotated: queries and keys, or keys."""
        if self.head_norms:
            heads = unit(heads, self.head_floor) * self.head_weights[layer][self.heads if keys_only else 0 :]
        return rotate(heads, rope)

    def normed_keys(self, keys: Float[Tensor, "B S h d"]) -> Float[Tensor, "B S h d"]:
        """Keys of every layer, those of the first layer first, before they are rotated."""
        if not self.head_norms:
            return keys
        return unit(keys, self.head_floor) * torch.cat([weights[self.heads :] for weights in self.head_weights])


class Joined(Folded):
    """The steps from joined copies of the weights as they are; norms and factors as the modules compute them."""

    inside = False

    def entering(self, layer, rows, embedding) -> Tensor:
        return self.layers[layer].normed(rows, None if embedding is None else embedding.reshape_as(rows))

    def between(self, layer, rows) -> Tensor:
        return self.layers[layer].post_attention_layernorm(rows)

    def add(self, product, rows, x) -> Tensor:
        # Rounded before it is added, as in the modules.
        return self.layers[0].add(rows, product(x))

    def turn(self, heads, layer, rope, keys_only: bool = False) -> Tensor:
        if self.head_norms:
            own = self.layers[layer].self_attn
            queries, keys = heads.split([heads.shape[2] - self.kv_heads, self.kv_heads], 2)
            keys = own.k_norm(keys)
            heads = keys if keys_only else torch.cat([own.q_norm(queries), keys], 2)
        return rotate(heads, rope)

    def normed_keys(self, keys) -> Tensor:
        if not self.head_norms:
            return keys
        parts = zip(self.layers, keys.split(self.kv_heads, 2), strict=True)
        return torch.cat([layer.self_attn.k_norm(part) for layer, part in parts], 2)


def unit(x: Float[Tensor, "*b n"], floor: Float[Tensor, ""]) -> Float[Tensor, "*b n"]:
    """RMSNorm without weight and without the factor sqrt(n); `floor` is sqrt(n eps)."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)


def _biases(linears: Sequence[nn.Linear], factor: float = 1.0) -> Tensor | None:
    """The biases of several layers end to end; None where they have none."""
    return None if linears[0].bias is None else torch.cat([linear.bias for linear in linears]) * factor
