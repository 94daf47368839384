"""Cost of a whole training step, compared with a straightforward implementation on the same weights and batch.

A step is the draft's forward pass, the loss and the backward pass of everything trainable. The straightforward
implementation sends every slot of every block through both heads at once (losses/reference.py), as trainers usually
do; an unrolled draft there starts a chain at every position and keeps the whole logits of each step until the backward
pass. The functions below build one step each, to be measured by step_measurement.measure.

Axes: B batch, T tokens, N blocks, K slots, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specbench import fast
from specbench.blocks import Batch, Blocks, Sample, pack, with_anchors
from specbench.drafts.draft import Draft
from specbench.drafts.dspark import DSpark
from specbench.drafts.eagle3 import Eagle3
from specbench.drafts.parallel import ParallelDraft
from specbench.losses.objective import Objective
from specbench.models.backbone import qwen3
from specbench.models.embedding_head import Tables
from specbench.profiling.step_measurement import PrepareStep
from specbench.ranges import Count, Layers, Rank, Slots, Tokens

DSPARK = {"ce": 0.1, "tv": 0.9, "confidence": 1.0, "slot_weight": {"exp": 4.0}}
EAGLE3 = {"soft_ce": 1.0, "slot_weight": {"power": 0.8}}
CLASSES: dict[str, type[Draft]] = {"dspark": DSpark, "eagle3": Eagle3}
# Tokens of twenty conversations: the 2.5%, 7.5%, ... 97.5% quantiles of the 4,155 prompts of eight published benchmarks
# (AIME 2025, Arena-Hard v2, GSM8K, HumanEval, LiveCodeBench, MATH-500, MBPP, MT-Bench) at four characters per token.
PROMPT_TOKENS = (14, 22, 34, 44, 51, 56, 62, 69, 74, 81, 90, 102, 120, 171, 284, 354, 407, 470, 557, 754)


@dataclass(frozen=True)
class StepShape:
    """Sizes of one step. The first `prompt` tokens of its only conversation are not supervised."""

    method: str = "dspark"
    hidden: Count = 256
    vocabulary: Tokens = 151936
    tokens: Tokens = 512
    prompt: Tokens = 128
    anchors: Count | None = 64
    slots: Slots = 7
    layers: Layers = 3
    taps: Layers = 3
    heads: Layers = 4
    rank: Rank = 256
    device: str = "cpu"
    dtype: str = "float32"
    objective: Mapping[str, Any] = field(default_factory=lambda: dict(DSPARK))


SMALL = {
    "dspark": StepShape(),
    "eagle3": StepShape(method="eagle3", layers=1, anchors=None, objective=EAGLE3),
}
_REAL = {"hidden": 2560, "tokens": 4096, "prompt": 1024, "heads": 20, "taps": 5, "dtype": "bfloat16", "device": "cuda"}
# Qwen3-4B's width and vocabulary, for a GPU. A chain at each of 4,096 positions is beyond any straightforward head.
REAL = {
    "dspark": replace(SMALL["dspark"], **_REAL, anchors=512, layers=5),
    "eagle3": replace(SMALL["eagle3"], **_REAL | {"tokens": 1024, "prompt": 256, "taps": 3}),
}
SHAPES = {"small": SMALL, "qwen3_4b": REAL}


def draft_of(shape: StepShape) -> tuple[Draft, Tables]:
    """A draft with random weights and the target's tables, the same for the same shape."""
    torch.manual_seed(0)
    D, V, place = shape.hidden, shape.vocabulary, {"device": shape.device, "dtype": getattr(torch, shape.dtype)}
    backbone = qwen3(
        {
            "hidden_size": D,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": max(1, shape.heads // 2),
            "head_dim": D // shape.heads,
            "intermediate_size": 3 * D,
            "vocab_size": V,
        }
    )
    head = torch.randn(V, D, **place).mul_(D**-0.5)
    tables = Tables(head, head)
    sizes = {"layers": shape.layers, "block_size": shape.slots, "anchors": shape.anchors}
    more = {"markov_rank": shape.rank} if shape.method == "dspark" else {}
    draft = CLASSES[shape.method](backbone, tables, tuple(range(shape.taps)), mask_token_id=0, **sizes, **more)
    draft = draft.to(**place).train()
    if isinstance(draft, DSpark) and draft.markov_head is not None:
        torch.nn.init.normal_(draft.markov_head.markov_w2.weight, std=0.02)  # with zero, its gradient would be zero too
    return draft, tables


def conversations(shape: StepShape, lengths: Sequence[tuple[int, int]]) -> list[Sample]:
    """Random conversations of (prompt, answer) tokens each."""
    generator = torch.Generator().manual_seed(1)
    dtype, found = getattr(torch, shape.dtype), []
    for ordinal, (prompt, answer) in enumerate(lengths):
        size = prompt + answer
        tokens = torch.randint(0, shape.vocabulary, (size,), generator=generator)
        states = torch.randn(size, shape.taps + 1, shape.hidden, generator=generator).to(dtype)
        found.append(Sample(tokens, torch.arange(size) >= prompt, states[:, :-1], states[:, -1], ordinal))
    return found


def whole_step(shape: StepShape, straightforward: bool = False, compiled: bool = False) -> Callable[[], Tensor]:
    """Forward, loss and backward of one conversation; gradients are dropped, the loss is returned."""
    loss, draft = _loss(shape, straightforward, compiled)

    def step() -> Tensor:
        value = loss()
        value.backward()
        draft.zero_grad(set_to_none=True)
        return value.detach()

    return step


def _loss(shape: StepShape, straightforward: bool, compiled: bool = False) -> tuple[Callable[[], Tensor], Draft]:
    draft, tables = draft_of(shape)
    if compiled:
        draft.compile()
    plain = pack(conversations(shape, [(shape.prompt, shape.tokens - shape.prompt)])).to(shape.device)
    batch, objective = with_anchors(plain, shape.anchors), Objective(**shape.objective)
    if not straightforward:
        return lambda: objective(draft, tables, draft(batch)).mean, draft
    if shape.method == "dspark":

        def plain_loss() -> Tensor:
            blocks = draft(batch)
            with fast.plain():
                return objective(draft, tables, blocks).mean

        return plain_loss, draft
    everywhere = replace(plain, anchors=torch.arange(shape.tokens, device=shape.device)[None])
    allowed = torch.zeros_like(plain.loss_mask)[..., None]
    allowed[0, batch.anchors[0]] = True

    def unrolled() -> Tensor:
        blocks = draft(everywhere)
        return unrolled_objective(objective, draft, tables, replace(blocks, mask=blocks.mask & allowed))

    return unrolled, draft


def unrolled_objective(objective: Objective, draft: Draft, tables: Tables, blocks: Blocks) -> Tensor:
    """Mean soft cross-entropy of a draft unrolled from every position, as its trainers usually compute it.

    The target's distribution of all positions is made once; each step's whole logits live until the backward pass.
    `blocks` must start one at every position of the batch. For objectives of soft_ce alone with static slot weights.
    """
    assert objective.combination.coefficients.keys() == {"soft_ce"} and not objective.slot_weight.dynamic
    with torch.no_grad():
        judged = tables.logits(blocks.target[:, :, 0].flatten(0, 1)).float().softmax(-1)
        best = judged.argmax(-1)
    weights = objective.slot_weight.static(blocks.mask.shape[-1], blocks.mask.device).float()
    features = draft.features(blocks.hidden, blocks.previous)
    value, hits = judged.new_zeros(()), []
    for k, weight in enumerate(weights):
        logits = draft.project(features[:, :, k].flatten(0, 1))
        seen, kept = blocks.source[..., k].flatten(), blocks.mask[..., k].flatten()
        losses = -(judged[seen] * logits.float().log_softmax(-1)).sum(-1)
        hits.append((logits.detach().argmax(-1) == best[seen])[kept].sum())
        value = value + weight * (losses * kept).sum()
    return objective.combination.coefficients["soft_ce"] * value / (weights * blocks.mask.flatten(0, 1).sum(0)).sum()


def agreement(shape: StepShape) -> dict[str, float]:
    """Relative differences of the two steps: of the loss, of the whole gradient, and the largest one of any parameter's
    (norms)."""
    values, gradients = [], []
    for straightforward in (False, True):
        loss, draft = _loss(shape, straightforward)
        value = loss()
        value.backward()
        values.append(float(value.detach()))
        gradients.append({name: p.grad for name, p in draft.named_parameters() if p.requires_grad})
    product, reference = gradients
    apart = torch.stack([(product[k] - reference[k]).double().norm() for k in reference])
    sizes = torch.stack([gradient.double().norm() for gradient in reference.values()])
    return {
        "loss": abs(values[0] - values[1]) / abs(values[1]),
        "gradient": float(apart.norm() / sizes.norm()),
        "parameter": float((apart / sizes).max()),
    }


def flops(shape: StepShape) -> int:
    """Floating-point operations of the matrix products of one product step (attention by FlexAttention not counted)."""
    from torch.utils.flop_counter import FlopCounterMode

    def addmm(base: Sequence[int], x: Sequence[int], y: Sequence[int], **_: Any) -> int:
        return 2 * x[0] * x[1] * y[1]

    step = whole_step(shape)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
        step()
    return counter.get_total_flops()


def matrix_step(shape: StepShape, size: int) -> Callable[[], Tensor]:
    """One product of two (size, size) matrices in the step's dtype, whose rate is compared with that of a step."""
    left, right = torch.randn(2, size, size, device=shape.device).to(getattr(torch, shape.dtype))
    return partial(torch.mm, left, right)


def statistics_step(shape: StepShape) -> Callable[[], Tensor]:
    """The work of the statistics alone: the most likely token of every row of draft and target, and the sums by
    slot."""
    from specbench.losses.fused import _tiles, _top
    from specbench.metrics.slot_statistics import SlotStatistics

    torch.manual_seed(0)
    N = shape.anchors or shape.tokens - shape.prompt
    chunk = torch.randn(min(112, N * shape.slots), shape.vocabulary, device=shape.device)
    rounds, mask = N * shape.slots / len(chunk), torch.ones(N, shape.slots, dtype=torch.bool, device=shape.device)
    names = ("ce", "tv", "alpha", "agreement", "hit", "label_outside", "outside")
    grids = {name: torch.rand(N, shape.slots, device=shape.device) for name in names}

    def step() -> Tensor:
        # One search per row for the draft. Slots with the same state share that of the target, which is not counted.
        for _ in range(round(2 * rounds)):
            for tile in _tiles(len(chunk), chunk.shape[1], chunk.device):
                _top(chunk[tile])
        return SlotStatistics.of(mask, grids["ce"], grids, grids["tv"]).alpha

    return step


def mixed_lengths() -> list[tuple[int, int]]:
    """Twenty conversations whose prompts have the sizes of PROMPT_TOKENS in a fixed mixed order, each with an answer as
    long as the prompt of another one.
    """
    order = torch.randperm(len(PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    return [(PROMPT_TOKENS[i], PROMPT_TOKENS[j]) for i, j in zip(order, [*order[1:], order[0]], strict=True)]


def batch_step(shape: StepShape, row_length: int | None, dense: bool = False) -> Callable[[], Tensor]:
    """A step over `mixed_lengths`, packed into rows of `row_length` tokens or padded (None).

    `dense`: a block-parallel draft computes its padded blocks too, as one dense piece.
    """
    draft, tables = draft_of(shape)
    if isinstance(draft, ParallelDraft):
        draft.by_span = not dense
    batch: Batch = with_anchors(pack(conversations(shape, mixed_lengths()), row_length), shape.anchors)
    batch, objective = batch.to(shape.device), Objective(**shape.objective)

    def step() -> Tensor:
        loss = objective(draft, tables, draft(batch))
        loss.mean.backward()
        draft.zero_grad(set_to_none=True)
        return loss.value.detach()

    return step


def against_straightforward(shape: StepShape) -> dict[str, PrepareStep]:
    """The two sides of the table, and on CUDA the compiled draft."""
    sides: dict[str, PrepareStep] = {"product": partial(whole_step, shape)}
    if shape.device == "cuda":
        sides["compiled"] = partial(whole_step, shape, compiled=True)
    return sides | {"straightforward": partial(whole_step, shape, True)}


def one_more_term(shape: StepShape) -> dict[str, PrepareStep]:
    """The step, the step with one more term each, and what the statistics add."""
    more = {name: replace(shape, objective={**shape.objective, name: 0.1}) for name in ("accept", "kl")}
    steps = {f"with {name}": partial(whole_step, other) for name, other in more.items()}
    return {"product": partial(whole_step, shape), **steps, "statistics": partial(statistics_step, shape)}


def packing(shape: StepShape, row_length: int) -> dict[str, PrepareStep]:
    """Packed rows against padded ones, which the product computes conversation by conversation where it can."""
    steps = {"packed": partial(batch_step, shape, row_length), "padded": partial(batch_step, shape, None, True)}
    if issubclass(CLASSES[shape.method], ParallelDraft):
        steps["padded, by conversation"] = partial(batch_step, shape, None)
    return steps
