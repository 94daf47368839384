"""The target's tables: token embedding and vocabulary head, shared by target and draft."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.models.fast.packed_products import Kept


class Tables(nn.Module):
    """Embedding (V, D) and head (V', D), with the target's function from final states to logits.

    logits = cap(scale (h head^T + bias)), where cap(x) = soft_cap tanh(x / soft_cap) and each of `logit_scale`, `bias`
    (V',) and `soft_cap` may be absent (1, None, None). Frozen tables are buffers outside the state dict, so they are
    not part of a checkpoint and get no gradient; trainable ones are parameters. With a reduced draft vocabulary the
    head has V' < V rows and `ids` (V',) names them.
    """

    def __init__(
        self,
        embedding: Float[Tensor, "V D"],
        head: Float[Tensor, "W D"],
        embedding_scale: float = 1.0,
        soft_cap: float | None = None,
        trainable: bool = False,
        ids: Int[Tensor, " W"] | None = None,
        logit_scale: float = 1.0,
        bias: Float[Tensor, " W"] | None = None,
    ):
        super().__init__()
        if trainable:
            self.embedding, self.head = nn.Parameter(embedding.clone()), nn.Parameter(head.clone())
        else:
            self.register_buffer("embedding", embedding, persistent=False)
            self.register_buffer("head", head, persistent=False)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.embedding_scale, self.soft_cap, self.trainable = embedding_scale, soft_cap, trainable
        self.logit_scale = logit_scale
        self._product = Kept()

    @property
    def plain_head(self) -> bool:
        """Whether logits are only the product with the head, capped or not: no factor and no bias."""
        return self.logit_scale == 1.0 and self.bias is None

    def embed(self, tokens: Int[Tensor, "*b"]) -> Float[Tensor, "*b D"]:
        """Scaled token embeddings."""
        rows = F.embedding(tokens, self.embedding)
        if self.embedding_scale == 1.0:
            return rows
        # The scale is rounded to the table's dtype first, as the reference models do.
        return rows * torch.tensor(self.embedding_scale, dtype=rows.dtype, device=rows.device)

    def logits(self, hidden: Float[Tensor, "*b D"]) -> Float[Tensor, "*b W"]:
        """Vocabulary logits (..., V') of final states (..., D), with the bias, factor and soft-cap of the target."""
        return self.adjust(self._product(hidden, self.head, self.bias))

    def adjust(self, logits: Float[Tensor, "*b W"]) -> Float[Tensor, "*b W"]:
        """The factor and soft-cap that follow the head."""
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap

    def derive(self, trainable: bool = False, ids: Int[Tensor, " W"] | None = None) -> Tables:
        """Tables of a draft: the same tensors if frozen and whole, copies if trained or reduced to `ids`."""
        if not trainable and ids is None:
            return self
        head, bias = (x if x is None or ids is None else x[ids] for x in (self.head, self.bias))
        kept = self.ids if ids is None else ids
        return Tables(
            self.embedding.detach(),
            head.detach(),
            self.embedding_scale,
            self.soft_cap,
            trainable,
            kept,
            self.logit_scale,
            bias,
        )
