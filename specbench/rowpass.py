"""The row pass: every loss term, its gradient and the acceptance statistics from one visit of a chunk of logits.

The draft's logits are overwritten in place by d loss / d logits. With p, q as in losses.py and m = [p < q],
d tv / d logits = -2 p (m - sum p m), which is p (s - sum s p) for s = sign(p - q) without its cancellation when p and q
hardly overlap; every other term is p times a row-wise combination, plus a multiple of q, plus one entry at the label.
Where p equals q exactly, m = 0 (autograd of |p - q| takes the middle of the subgradients there).

Axes: r rows of a chunk, W draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specbench.losses import SMALLEST_ALPHA, Blend, draft_columns

# On CPU the rows are visited in tiles of about this many bytes a buffer, so that the dozen visits of a tile hit the
# cache: 448 rows of 151,936 took 0.32 s of one core in tiles of 1.8 MiB, 0.40 s in 5 MiB, 0.92 s in one piece.
TILE_BYTES = 2 * 2**20


@dataclass
class Rows:
    """Results of each row in at least fp32; `terms` holds the active ones."""

    ce: Float[Tensor, " r"]
    probability: Float[Tensor, " r"]
    tv: Float[Tensor, " r"]
    alpha: Float[Tensor, " r"]
    agreement: Bool[Tensor, " r"]
    hit: Bool[Tensor, " r"]
    label_outside: Bool[Tensor, " r"]
    outside: Float[Tensor, " r"]
    terms: dict[str, Tensor]

    @classmethod
    def join(cls, parts: list[Rows]) -> Rows:
        """The rows of several parts in order."""
        names = [field.name for field in fields(cls) if field.name != "terms"]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(**joined, terms={term: torch.cat([part.terms[term] for part in parts]) for term in parts[0].terms})


def _top(logits: Tensor, width: int = 512) -> tuple[Tensor, Tensor]:
    """Largest logit of each row and its first index, in two levels: torch's own search is some twenty times slower."""
    main = logits.shape[1] // width * width
    if main == 0:
        return logits.max(-1)
    heads = logits[:, :main].unflatten(1, (-1, width)).amax(-1)
    if main < logits.shape[1]:
        heads = torch.cat([heads, logits[:, main:].amax(-1, keepdim=True)], 1)
    best = heads.argmax(1, keepdim=True)
    index = (best * width + torch.arange(width, device=logits.device)).clamp_max(logits.shape[1] - 1)
    first = index.gather(1, logits.gather(1, index).argmax(1, keepdim=True))
    return heads.gather(1, best)[:, 0], first[:, 0]


def _softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Softmax into `out`, normalised again: torch sums a row of 151,936 exponentials in fp32 to 6e-6 only."""
    torch.softmax(logits, -1, out=out)
    return out.mul_(out.sum(-1, keepdim=True).reciprocal_())


class RowPass:
    """The pass for one choice of terms and one vocabulary; keeps its scratch buffers between chunks."""

    def __init__(
        self,
        coefficients: Mapping[str, float],
        blend: Blend | None = None,
        ids: Int[Tensor, " W"] | None = None,
        mean_alpha: Float[Tensor, ""] | None = None,
    ):
        if blend is not None and blend.over == "batch":
            assert mean_alpha is not None, "a blend over the batch needs the batch's mean acceptance"
        self.coefficients = {term: value for term, value in coefficients.items() if value}
        self.blend, self.ids, self.mean_alpha = blend, ids, mean_alpha
        self._buffers: dict[str, Tensor] = {}

    def __call__(
        self,
        draft_logits: Float[Tensor, "r W"],
        target_logits: Float[Tensor, "r V"],
        labels: Int[Tensor, " r"],
        scale: Float[Tensor, " r"] | None = None,
    ) -> Rows:
        """Results of the rows; given `scale`, a factor on each row's loss, the gradient replaces `draft_logits`.

        Both logits may be of any floating dtype; they need not have the same.
        """
        columns, inside = draft_columns(labels, self.ids, target_logits.shape[1])
        height = len(labels)
        if draft_logits.device.type == "cpu":
            height = max(1, TILE_BYTES // (4 * target_logits.shape[1]))
        parts = []
        for start in range(0, max(1, len(labels)), max(1, height)):
            tile = slice(start, start + height)
            rows = (draft_logits[tile], target_logits[tile], columns[tile], inside[tile])
            parts.append(self._tile(*rows, None if scale is None else scale[tile]))
        return Rows.join(parts)

    def _scratch(self, name: str, like: Tensor, width: int | None = None) -> Tensor:
        """An uninitialised tensor of `like`'s rows and dtype that lives as long as the pass."""
        shape = (len(like), width or like.shape[1])
        held = self._buffers.get(name)
        if held is None or len(held) < shape[0] or held.shape[1] != shape[1] or held.dtype != like.dtype:
            held = self._buffers[name] = like.new_empty(shape)
        return held[: shape[0]]

    def _tile(
        self,
        raw: Tensor,
        target: Tensor,
        columns: Tensor,
        inside: Tensor,
        scale: Tensor | None,
    ) -> Rows:
        wanted, blend = self.coefficients, self.blend
        z = raw.to(torch.promote_types(raw.dtype, torch.float32))
        t = target.to(z.dtype)
        (top, first), (target_top, target_first) = _top(z), _top(t)
        p, q = _softmax(z, self._scratch("p", z)), _softmax(t, self._scratch("q", t))
        log_norm = top - p.gather(1, first[:, None])[:, 0].log()
        target_log_norm = target_top - q.gather(1, target_first[:, None])[:, 0].log()
        label = columns.clamp_min(0)[:, None]
        outside = torch.zeros_like(top)
        if self.ids is not None:
            q = torch.index_select(q, 1, self.ids, out=self._scratch("q seen", z))
            outside = 1 - q.sum(-1)
        m, product = self._scratch("m", z), self._scratch("product", z)

        def dot(a: Tensor, b: Tensor) -> Tensor:  # torch's own row-wise dot is slower and sums without care
            return torch.mul(a, b, out=product).sum(-1)

        alpha = torch.minimum(p, q, out=m).sum(-1)
        tv = 2 * (1 - alpha)
        ce = torch.where(inside, log_norm - z.gather(1, label)[:, 0], 0.0)
        terms: dict[str, Tensor] = {"ce": ce, "tv": tv}

        # d loss / d logits = p * (slope_m m + slope_u u + slope_l l + level) + slope_q q + spike at the label
        slope_m = torch.full_like(top, wanted.get("tv", 0.0))
        slope_q = torch.zeros_like(top)
        level = wanted.get("ce", 0.0) * inside.to(top.dtype)
        u = ratio = None
        if blend or not wanted.keys().isdisjoint(("kl", "soft_ce", "reverse_kl", "js")):
            t = t if self.ids is None else torch.index_select(t, 1, self.ids, out=self._scratch("t seen", z))
            terms["soft_ce"] = log_norm * (1 - outside) - dot(q, z)
            if blend or "kl" in wanted:
                terms["kl"] = terms["soft_ce"] - target_log_norm * (1 - outside) + dot(q, t)
            slope_q -= wanted.get("kl", 0.0) + wanted.get("soft_ce", 0.0)
        if "reverse_kl" in wanted or "js" in wanted:
            u = torch.sub(z, t, out=self._scratch("u", z)).add_((target_log_norm - log_norm)[:, None])  # log p/q
            terms["reverse_kl"] = dot(p, u)
            level = level - wanted.get("reverse_kl", 0.0) * terms["reverse_kl"]
        if "js" in wanted:
            ratio = F.logsigmoid(u).add_(math.log(2))  # log p / ((p + q) / 2)
            held = dot(p, ratio)
            terms["js"] = (held + dot(q, ratio) - dot(q, u) + outside * math.log(2)) / 2
            level = level - wanted["js"] / 2 * held
        if "accept" in wanted:
            terms["accept"] = -alpha.clamp_min(SMALLEST_ALPHA).log()
            slope_m += torch.where(alpha > SMALLEST_ALPHA, wanted["accept"] / (2 * alpha), 0.0)
        if blend:
            share = blend.weight(alpha if blend.over == "row" else self.mean_alpha).to(top.dtype)
            terms["blend"] = share * terms["kl"] + (1 - share) * (1 - alpha)
            slope_q, slope_m = slope_q - share, slope_m + (1 - share) / 2
        rows = Rows(
            ce=ce,
            probability=p.gather(1, label)[:, 0] * inside,
            tv=tv,
            alpha=alpha,
            agreement=(first if self.ids is None else self.ids[first]) == target_first,
            hit=first == columns,
            label_outside=~inside,
            outside=outside,
            terms={term: value for term, value in terms.items() if term in wanted or term == "blend"},
        )
        if scale is None:
            return rows
        scale = scale.to(top.dtype)
        level = level - slope_q * (1 - outside)
        gradient = raw if raw.dtype == z.dtype else p
        # From here on z, and with it raw, may be overwritten.
        if bool(blend) or "tv" in wanted or "accept" in wanted:
            m = torch.lt(p, q, out=m)
            level = level + 2 * slope_m * dot(p, m)
            m.mul_((-2 * slope_m * scale)[:, None]).add_((level * scale)[:, None])
        else:
            m = m.copy_((level * scale)[:, None].expand_as(m))
        if u is not None and "reverse_kl" in wanted:
            m.add_(u.mul_((wanted["reverse_kl"] * scale)[:, None]))
        if ratio is not None:
            m.add_(ratio.mul_((wanted["js"] / 2 * scale)[:, None]))
        torch.mul(p, m, out=gradient)
        if blend or "kl" in wanted or "soft_ce" in wanted:
            gradient.add_(q.mul_((slope_q * scale)[:, None]))
        if "ce" in wanted:
            spike = -wanted["ce"] * scale * inside
            gradient.scatter_add_(1, label, spike[:, None])
        if gradient is not raw:
            raw.copy_(gradient)
        return rows
