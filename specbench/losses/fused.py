"""The objective computed in chunks, without a whole [rows x vocabulary] tensor. `reference.py` is the plain version.

The supervised slots go through both heads in chunks of whole blocks. In each chunk the draft's logits are overwritten
by d loss / d logits, and the chunk's backward pass follows at once; only the gradients of the features and of the
projection's parameters are kept, which the outer backward pass uses.

With p, q as in terms.py and m = [p < q], the gradient of every term is a sum of few row-wise combinations:

    d ce         = p - onehot(y)
    d soft_ce    = p sum(q) - q                       (and d kl; sum(q) < 1 for a reduced draft vocabulary)
    d tv         = -2 p (m - sum p m)                 which is p (s - sum s p) for s = sign(p - q) without its
                                                      cancellation when p and q hardly overlap
    d accept     = d tv / (2 alpha)                   since alpha = 1 - tv / 2
    d reverse_kl = p (u - sum p u)                    u = log p - log q
    d js         = p (l - sum p l) / 2                l = log p - log((p + q) / 2)
    d blend      = w d kl + (1 - w) d tv / 2
    d further    by autograd on the rows of a tile (further_terms.py); d kl too at another temperature than 1

so that d loss = p (slope_m m + slope_u u + slope_l l + level) + slope_q q + spike at y, in one visit of the logits.
Where p equals q exactly, m = 0 (autograd of |p - q| takes the middle of the subgradients there).

Axes: M blocks, K slots, R supervised slots, r rows of a chunk, u target rows of a chunk, D hidden, F features,
W draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from specbench.blocks import Blocks
from specbench.losses.further_terms import FURTHER_TERMS
from specbench.losses.gradients import Known
from specbench.losses.slot_weights import SlotWeight
from specbench.losses.terms import SMALLEST_ALPHA, Combination, SlotResults, draft_columns, grid, softened_kl
from specbench.models.fast.projection import Linears

if TYPE_CHECKING:
    from specbench.drafts.draft import Draft
    from specbench.models.embedding_head import Tables

# Bytes of one [chunk x vocabulary] fp32 tensor; two or three are alive at once. Smaller chunks cost matrix products
# their efficiency: on a CPU core 448 rows of 151,936 took 3.9 s in chunks of 49, 3.2 s in chunks of 112, 2.6 s at once.
CHUNK_BYTES = {"cpu": 60 * 2**20, "cuda": 512 * 2**20}
# On CPU the rows are visited in tiles of about this many bytes a buffer, so that the dozen visits of a tile hit the
# cache: 448 rows of 151,936 took 0.32 s of one core in tiles of 1.8 MiB, 0.40 s in 5 MiB, 0.92 s in one piece.
TILE_BYTES = 2 * 2**20


def slot_losses(
    draft: Draft,
    tables: Tables,
    blocks: Blocks,
    features: Float[Tensor, "B N K F"],
    combination: Combination,
    slot_weight: SlotWeight,
    chunk_rows: int | None = None,
    factors: tuple[float, float] = (1.0, 0.0),
) -> tuple[SlotResults, SlotResults | None, Callable[[Tensor], Tensor]]:
    """Results of the supervised slots by the final logits and by the base logits, and a function that attaches the
    computed gradient to the summed loss.

    chunk_rows: rows of vocabulary size held at once (None: by vocabulary and device; at least one block). factors: of
    the loss of the final and of the base logits; base logits are computed only if theirs is not 0.
    """
    rows = features[blocks.mask]
    learn = [parameter for parameter in draft.projection_parameters() if parameter.requires_grad]
    learning = torch.is_grad_enabled() and bool(rows.requires_grad or learn)
    linears, ids = Linears(learn), draft.draft_vocabulary
    with torch.no_grad():
        visit = Chunks(draft, tables, blocks, rows.detach(), slot_weight, chunk_rows)
        mean_alpha = None
        if combination.blend is not None and combination.blend.over == "batch":
            mean_alpha = visit(RowPass(Combination(), ids), linears)[0].alpha.mean()
        visit.factors = factors
        results, base, outer = visit(RowPass(combination, ids, mean_alpha), linears, learning)
        gradients = [outer, *linears.totals()] if learning else []
    if not learning:
        return results, base, lambda value: value
    return results, base, lambda value: Known.apply(value, gradients, rows, *learn)


class Chunks:
    """The supervised slots of one step. `features` (R, F) are theirs, without gradient."""

    def __init__(
        self,
        draft: Draft,
        tables: Tables,
        blocks: Blocks,
        features: Tensor,
        slot_weight: SlotWeight,
        chunk_rows: int | None = None,
    ):
        self.draft, self.tables, self.features, self.slot_weight = draft, tables, features, slot_weight
        self.target_linears = Linears()
        self.factors = (1.0, 0.0)
        self.rows = chunk_rows
        self.mask = blocks.mask.flatten(0, 1)
        self.target, self.labels = blocks.target[blocks.mask], blocks.labels[blocks.mask]
        # Slots that share a target state share its logits too; on the CPU, because chunk by chunk would synchronise.
        self.source = None if blocks.source is None else blocks.source[blocks.mask].cpu()
        slots = self.mask.shape[1]
        self.static = self.slot_weight.static(slots, self.mask.device).expand(self.mask.shape)[self.mask]
        if self.rows is None:
            vocabulary = tables.logits(self.target[:0]).shape[-1]
            self.rows = CHUNK_BYTES.get(self.mask.device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary)
        self.spans = list(_spans(self.mask.sum(-1).tolist(), self.rows))
        self.target_linears.room = min(self.rows, len(self.target))

    def __call__(
        self, row_pass: RowPass, linears: Linears, learning: bool = False
    ) -> tuple[SlotResults, SlotResults | None, Tensor]:
        """Results of all rows by the final and by the base logits, and if `learning` the gradient of the features (else
        empty)."""
        linears.room = self.target_linears.room
        parts = [self.chunk(row_pass, linears, learning, rows, blocks) for rows, blocks in self.spans]
        final, base, outer = zip(*parts, strict=True)
        return (
            SlotResults.join(list(final)),
            SlotResults.join(list(base)) if self.factors[1] else None,
            torch.cat(outer),
        )

    def chunk(
        self, row_pass: RowPass, linears: Linears, learning: bool, rows: slice, blocks: slice
    ) -> tuple[SlotResults, SlotResults | None, Tensor]:
        """One chunk of whole blocks, forward and backward: the final logits, then in the same memory the base ones."""
        states, of = self.distinct(rows)
        with self.target_linears:
            verdict = row_pass.judge(self.tables.logits(states))
        labels, static, (final, base) = self.labels[rows], self.static[rows], self.factors
        scale = torch.ones_like(static) if self.slot_weight.dynamic else static
        judged = (verdict, labels, of)
        results, logits, features, gradient = self.differentiate(
            self.draft.project, row_pass, linears, judged, rows, final * scale if learning else None
        )
        weight = static
        if self.slot_weight.dynamic:
            mask = self.mask[blocks]
            weight = self.slot_weight.weigh(mask, grid(results.probability, mask), grid(results.hit, mask))[mask]
            if learning:
                gradient.mul_(weight[:, None])
        outer = linears.back(features, logits, gradient) if learning else self.features[:0]
        if not base:
            return results, None, outer
        others, logits, features, gradient = self.differentiate(
            self.draft.project_base, row_pass, linears, judged, rows, base * weight if learning else None
        )
        if learning:
            outer = outer + linears.back(features, logits, gradient)
        return results, others, outer

    def differentiate(
        self,
        project: Callable[[Tensor], Tensor],
        row_pass: RowPass,
        linears: Linears,
        judged: tuple[TargetRows, Tensor, Tensor | None],
        rows: slice,
        scale: Float[Tensor, " r"] | None,
    ) -> tuple[SlotResults, Tensor, Tensor, Tensor]:
        """Results of these rows by the logits of `project`, these logits, their features, and given `scale`, a factor
        on each row's loss, the gradient of the logits, which lies in their memory."""
        learning = scale is not None
        features = self.features[rows].detach().requires_grad_(learning)
        with torch.set_grad_enabled(learning), linears:
            logits = project(features)
        # Written to in place: if something saved these logits for its backward, autograd refuses rather than errs.
        gradient = logits.detach().contiguous() if learning else logits
        if gradient.untyped_storage().data_ptr() == features.untyped_storage().data_ptr():
            gradient = gradient.clone()
        verdict, labels, of = judged
        return row_pass(gradient, verdict, labels, scale, of), logits, features, gradient

    def distinct(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """A copy of the distinct target states (u, D) of these rows, and which of them each row has."""
        if self.source is None:
            return self.target[rows].clone(), None
        numbers, of = self.source[rows].unique(return_inverse=True)
        first = torch.empty_like(numbers).scatter_(0, of, torch.arange(len(of)))
        return self.target[rows][first.to(self.target.device)], of.to(self.target.device)


def _spans(lengths: list[int], rows: int) -> Iterator[tuple[slice, slice]]:
    """Consecutive chunks of whole blocks with at most `rows` supervised slots (one block at least): rows and blocks."""
    start = stop = first = 0
    for block, length in enumerate(lengths):
        if stop > start and length and stop + length - start > rows:
            yield slice(start, stop), slice(first, block)
            start, first = stop, block
        stop += length
    yield slice(start, stop), slice(first, len(lengths))


@dataclass
class TargetRows:
    """Target results of u rows: probabilities over the draft's vocabulary, and the first most likely token of each row.

    `cross` is sum q log q over the draft's vocabulary (None unless a term reads it); `logits` are
    kept for the terms that read the target's logarithms.
    """

    q: Float[Tensor, "u W"]
    first: Int[Tensor, " u"]
    outside: Float[Tensor, " u"]
    log_norm: Float[Tensor, " u"]
    cross: Float[Tensor, " u"] | None
    logits: Float[Tensor, "u V"] | None
    vocabulary: int


class RowPass:
    """The pass for one choice of terms and one vocabulary; keeps its scratch buffers between chunks."""

    def __init__(
        self,
        combination: Combination,
        ids: Int[Tensor, " W"] | None = None,
        mean_alpha: Float[Tensor, ""] | None = None,
    ):
        if combination.blend is not None and combination.blend.over == "batch":
            assert mean_alpha is not None, "a blend over the batch needs the batch's mean acceptance"
        self.blend, self.softened = combination.blend, combination.softened
        softened = [] if self.softened is None else ["kl"]
        self.by_autograd = {k: c for k, c in combination.coefficients.items() if k in FURTHER_TERMS or k in softened}
        self.coefficients = {k: c for k, c in combination.coefficients.items() if k not in self.by_autograd}
        self.ids, self.mean_alpha = ids, mean_alpha
        self._buffers: dict[str, Tensor] = {}

    def __call__(
        self,
        draft_logits: Float[Tensor, "r W"],
        verdict: TargetRows,
        labels: Int[Tensor, " r"],
        scale: Float[Tensor, " r"] | None = None,
        of: Int[Tensor, " r"] | None = None,
    ) -> SlotResults:
        """Results of the rows; given `scale`, a factor on each row's loss, the gradient replaces `draft_logits`.

        `of` names the target row of every draft row (None: they stand side by side): what concerns the target alone
        is computed once for each of its rows, by `judge`. The logits of draft and target may be of any floating dtype;
        they need not have the same.
        """
        columns, inside = draft_columns(labels, self.ids, verdict.vocabulary)
        parts = []
        for tile in _tiles(len(labels), verdict.vocabulary, draft_logits.device):
            picked = torch.arange(tile.start, tile.stop, device=labels.device) if of is None else of[tile]
            rows = (draft_logits[tile], verdict, picked, columns[tile], inside[tile])
            parts.append(self._tile(*rows, None if scale is None else scale[tile]))
        return SlotResults.join(parts)

    def judge(self, logits: Float[Tensor, "u V"]) -> TargetRows:
        """The results of the target, row by row; `logits` is overwritten where its dtype allows."""
        wide, ids, wanted = torch.promote_types(logits.dtype, torch.float32), self.ids, self.coefficients
        in_place = logits.dtype == wide and ids is None and not self._reads_target_logits
        width = logits.shape[1] if ids is None else len(ids)
        q = logits if in_place else self._scratch("verdict", (len(logits), width), logits.new_empty(0, dtype=wide))
        parts = []
        for tile in _tiles(len(logits), logits.shape[1], logits.device):
            t = logits[tile].to(wide)
            top, first = _top(t)
            whole = q[tile] if ids is None else self._scratch("q whole", t.shape, t)
            cross = top
            if self.blend or "kl" in wanted:
                # Relative to the largest logit, which keeps the sum's digits; `whole` may be t itself.
                t = torch.sub(t, top[:, None], out=self._scratch("relative", t.shape, t))
                log_norm = _softmax(t, torch.zeros_like(top), whole) + top
            else:
                log_norm = _softmax(t, top, whole)
            if ids is not None:
                torch.index_select(whole, 1, ids, out=q[tile])
            outside = torch.zeros_like(top) if ids is None else 1 - q[tile].sum(-1)
            if self.blend or "kl" in wanted:
                t = (
                    t
                    if ids is None
                    else torch.index_select(t, 1, ids, out=self._scratch("relative seen", q[tile].shape, t))
                )
                product = torch.mul(q[tile], t, out=self._scratch("product", t.shape, t))
                cross = product.sum(-1) - (log_norm - top) * (1 - outside)
            parts.append((first, outside, log_norm, cross))
        first, outside, log_norm, cross = (torch.cat(part) for part in zip(*parts, strict=True))
        kept = logits if self._reads_target_logits else None
        return TargetRows(q, first, outside, log_norm, cross, kept, logits.shape[1])

    @property
    def _reads_target_logits(self) -> bool:
        return bool(self.by_autograd) or not self.coefficients.keys().isdisjoint(("reverse_kl", "js"))

    def _scratch(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of `like`'s dtype that lives as long as the pass."""
        held = self._buffers.get(name)
        if held is None or len(held) < shape[0] or held.shape[1] != shape[1] or held.dtype != like.dtype:
            held = self._buffers[name] = like.new_empty(tuple(shape))
        return held[: shape[0]]

    def _tile(
        self,
        raw: Tensor,
        verdict: TargetRows,
        of: Tensor,
        columns: Tensor,
        inside: Tensor,
        scale: Tensor | None,
    ) -> SlotResults:
        wanted, blend = self.coefficients, self.blend
        z = raw.to(torch.promote_types(raw.dtype, torch.float32))
        top, first = _top(z)
        p = self._scratch("p", z.shape, z)
        log_norm = _softmax(z, top, p)
        q = torch.index_select(verdict.q, 0, of, out=self._scratch("q", z.shape, verdict.q))
        outside, target_log_norm = verdict.outside[of], verdict.log_norm[of]
        label = columns.clamp_min(0)[:, None]
        m, product = self._scratch("m", z.shape, z), self._scratch("product", z.shape, z)

        def dot(a: Tensor, b: Tensor) -> Tensor:  # torch's own row-wise dot is slower and sums without care
            return torch.mul(a, b, out=product).sum(-1)

        alpha = torch.minimum(p, q, out=m).sum(-1)
        tv = 2 * (1 - alpha)
        chosen = z.gather(1, label)[:, 0]
        inside = inside & (chosen > -torch.inf)  # else the label is none of the draft's candidates
        ce = torch.where(inside, log_norm - chosen, 0.0)
        terms: dict[str, Tensor] = {"ce": ce, "tv": tv}

        # d loss / d logits = p * (slope_m m + slope_u u + slope_l l + level) + slope_q q + spike at the label
        slope_m = torch.full_like(top, wanted.get("tv", 0.0))
        slope_q = torch.zeros_like(top)
        level = wanted.get("ce", 0.0) * inside.to(top.dtype)
        u = ratio = more = None
        if blend or not wanted.keys().isdisjoint(("kl", "soft_ce", "reverse_kl", "js")):
            terms["soft_ce"] = log_norm * (1 - outside) - dot(q, z)
            if blend or "kl" in wanted:
                terms["kl"] = terms["soft_ce"] + verdict.cross[of]
            slope_q -= wanted.get("kl", 0.0) + wanted.get("soft_ce", 0.0)
        if self._reads_target_logits:
            t = verdict.logits[of] if self.ids is None else verdict.logits[of[:, None], self.ids]
        differentiated: dict[str, Tensor] = {}
        if self.by_autograd:
            log_q = t.to(z.dtype) - target_log_norm[:, None]
            differentiated, more = self._differentiate(z, verdict.logits, of, log_q, outside, scale)
        if "reverse_kl" in wanted or "js" in wanted:
            u = torch.sub(z, t, out=self._scratch("u", z.shape, z)).add_(
                (target_log_norm - log_norm)[:, None]
            )  # log p/q
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
        rows = SlotResults(
            ce=ce,
            probability=p.gather(1, label)[:, 0] * inside,
            tv=tv,
            alpha=alpha,
            agreement=(first if self.ids is None else self.ids[first]) == verdict.first[of],
            hit=first == columns,
            label_outside=~inside,
            outside=outside,
            terms={term: value for term, value in terms.items() if term in wanted or term == "blend"} | differentiated,
        )
        if scale is None:
            return rows
        scale = scale.to(top.dtype)
        level = level - slope_q * (1 - outside)
        gradient = raw if raw.dtype == z.dtype else m
        # From here on z, and with it raw, may be overwritten.
        if bool(blend) or "tv" in wanted or "accept" in wanted:
            m = torch.lt(p, q, out=m)
            level = level + 2 * slope_m * dot(p, m)
            product.mul_((-2 * slope_m * scale)[:, None])  # of the dot above: p m
            torch.addcmul(product, p, (level * scale)[:, None], out=gradient)
        else:
            torch.mul(p, (level * scale)[:, None], out=gradient)
        if u is not None and "reverse_kl" in wanted:
            gradient.addcmul_(p, u.mul_((wanted["reverse_kl"] * scale)[:, None]))
        if ratio is not None:
            gradient.addcmul_(p, ratio.mul_((wanted["js"] / 2 * scale)[:, None]))
        if blend or "kl" in wanted or "soft_ce" in wanted:
            gradient.addcmul_(q, (slope_q * scale)[:, None])
        if "ce" in wanted:
            spike = -wanted["ce"] * scale * inside
            gradient.scatter_add_(1, label, spike[:, None])
        if more is not None:
            gradient.add_(more)
        if gradient is not raw:
            raw.copy_(gradient)
        return rows

    def _differentiate(
        self,
        z: Float[Tensor, "r W"],
        target: Float[Tensor, "u V"],
        of: Int[Tensor, " r"],
        log_q: Float[Tensor, "r W"],
        outside: Float[Tensor, " r"],
        scale: Float[Tensor, " r"] | None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Values of the terms without a closed form, and given `scale` the gradient of their scaled, weighted sum."""
        with torch.set_grad_enabled(scale is not None):
            logits = z.clone().requires_grad_(scale is not None)
            values = {}
            if self.softened is not None:
                values["kl"] = softened_kl(logits, target[of], self.softened, self.ids)
            if further := self.by_autograd.keys() & FURTHER_TERMS.keys():
                log_p = logits.log_softmax(-1)
                values |= {name: FURTHER_TERMS[name](log_p, log_q, outside) for name in further}
            if scale is None:
                return values, None
            total = sum((self.by_autograd[name] * value * scale).sum() for name, value in values.items())
            (gradient,) = torch.autograd.grad(total, logits)
        return {name: value.detach() for name, value in values.items()}, gradient


def _tiles(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Consecutive rows that are visited together (one empty tile if there are none)."""
    height = max(1, TILE_BYTES // (4 * vocabulary) if device.type == "cpu" else rows)
    return (slice(start, min(start + height, rows)) for start in range(0, max(1, rows), height))


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


def _softmax(logits: Tensor, top: Tensor, out: Tensor) -> Tensor:
    """Softmax into `out`; returns the log normaliser. torch's own sums 151,936 exponentials in fp32 to 6e-6 only."""
    torch.sub(logits, top[:, None], out=out).exp_()
    norm = out.sum(-1, keepdim=True)
    out.mul_(norm.reciprocal())
    return top + norm[:, 0].log()
