"""Estimate of the GPU memory and operations of training a draft, from shapes only.

Counted: fp32 master weights, gradients and Adam moments of the trained parameters, the frozen tables in bf16 (or fp32),
what the method's forward pass keeps (`Draft.work`), the batch's target states, and one vocabulary-sized chunk.
Sharded over n ranks (FSDP2), master weights, gradients and moments are divided by n; the whole weights and gradients of
a micro-batch's backward pass come on top.
Operations: the forward pass, the backward pass at twice of it, and the projections of draft and target on the
vocabulary.
Not counted: allocator fragmentation, compiler workspaces, communication buffers. FlexAttention saves no score matrix.

Axes: T tokens, N anchors, K slots, D hidden, C taps.
"""

from __future__ import annotations

from dataclasses import dataclass

from specbench.drafts.draft import Draft

CHUNK_ROWS = 512  # rows of vocabulary size that the objective holds on a GPU, in fp32, three at once
GIB = 2**30
# Settings of a draft on which its memory depends, if it has them.
SIZES = ("block_size", "anchors", "layers")


@dataclass(frozen=True)
class Footprint:
    """Bytes; `fixed` does not depend on the micro-batch, `per_sample` is one conversation of the longest length.
    `flops`: floating-point operations of such a conversation in one step."""

    parameters: int
    trainable: int
    fixed: float
    per_sample: float
    flops: float
    memory: float | None

    @property
    def largest_micro_batch(self) -> int | None:
        """Conversations that fit into nine tenths of `memory` GiB; None when no GPU was named."""
        if self.memory is None:
            return None
        return max(0, int((0.9 * self.memory * GIB - self.fixed) // self.per_sample))

    def text(self) -> str:
        """The plan as the command line prints it."""
        lines = [
            f"parameters        {self.parameters:,} ({self.trainable:,} trained)",
            f"fixed memory      {self.fixed / GIB:.2f} GiB (weights, gradients, Adam moments, tables, one chunk)",
            f"a conversation    {self.per_sample / GIB:.3f} GiB (estimate)",
            f"its step          {self.flops / 1e12:.3g} TFLOP (estimate; forward, backward, vocabulary)",
        ]
        if self.memory is None:
            lines.append("micro-batch       name a GPU with memory=GIB to see what fits")
        else:
            lines.append(f"micro-batch       {self.largest_micro_batch} conversations in {self.memory:.0f} GiB")
        return "\n".join(lines)


def footprint(draft: Draft, length: int, precision: str, memory: float | None = None, shards: int = 1) -> Footprint:
    """The footprint, on one of `shards` ranks, of training `draft` on conversations of `length` tokens under
    Lightning's `precision`."""
    size = 2 if "16" in precision else 4
    trainable = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    tables = draft.tables.embedding.numel() + draft.tables.head.numel()
    frozen = 0 if draft.tables.trainable else tables
    facts = draft.backbone
    states_of_weights = 16 if shards == 1 else 8 + 16 / shards
    fixed = states_of_weights * trainable + size * frozen + 3 * 4 * CHUNK_ROWS * facts.vocab_size
    anchors = min(length, draft.anchors_per_sample or length)
    slots, work = anchors * draft.block_size, draft.work(length, anchors)
    states = length * (len(draft.target_layer_ids) + 1) * facts.hidden_size
    per_sample = size * (work.kept + 2 * slots * facts.hidden_size + states)
    flops = flops_of(draft, length, anchors)
    parameters = tables + sum(p.numel() for p in draft.parameters())
    return Footprint(parameters, trainable, float(fixed), float(per_sample), float(flops), memory)


def flops_of(draft: Draft, length: int, anchors: int) -> float:
    """Operations of one conversation of `length` tokens with `anchors` blocks in a step: the draft forward and, at
    twice that, backward; the draft's projection on its vocabulary likewise; the target's projection forward."""
    columns = 3 * len(draft.tables.head) + draft.backbone.vocab_size
    rows = anchors * draft.block_size
    return float(3 * draft.work(length, anchors).flops + 2 * rows * draft.backbone.hidden_size * columns)


def require_memory(
    draft: Draft, longest: int, conversations: int, precision: str, free: float, shards: int = 1
) -> None:
    """Raise ValueError if a micro-batch of so many `conversations` of `longest` tokens would need more than twice the
    `free` bytes, because the operating system would then kill the process without a message."""
    found = footprint(draft, longest, precision, None, shards)
    needed = found.fixed + conversations * found.per_sample
    if needed > 2 * free:
        sizes = [f"method.draft.{key}={draft.settings[key]}" for key in SIZES if key in draft.settings]
        raise ValueError(
            f"{', '.join(sizes)} with trainer.data.samples_per_micro={conversations}: about {needed / GIB:.0f} GiB "
            f"for conversations of {longest} tokens, and {free / GIB:.0f} GiB are free; lower one of them"
        )
