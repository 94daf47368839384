"""JetSpec (arXiv 2606.18394): a block-parallel draft whose block attends causally, made for trees.

    context features, block attention with slots i <= j alone        -> parallel.ParallelDraft, causal_block
    input of a block: anchor and masks (released heads, Automodel)   -> ParallelDraft.input_tokens
    or the tokens themselves (speculators)                           -> JetSpec.input_tokens
    p_k = softmax(lm_head(h_k))                                      -> Draft.project
    L = T^2 KL(q_T | p_T), mean over the supervised slots            -> objective: kl, kl_temperature

With masks, all slots come from one pass and do not read what was drafted before them, so every parent of a depth shares
the candidates of that depth. With tokens, slot k reads the tokens drafted before it, which takes one pass a slot in
decoding.

Deviations: the output at the anchor predicts slot 1 by default, as in this project's DFlash; released heads predict at
the masks only (`sample_from_anchor: false`).
"""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Float, Int
from torch import Tensor

from specbench.blocks import Batch, previous_tokens
from specbench.drafts.draft import Proposal, SampleFunction, State
from specbench.drafts.parallel import ParallelDraft
from specbench.models.backbone import Backbone
from specbench.models.embedding_head import Tables
from specbench.ranges import Among, Count, Layers, Slots

BLOCK_INPUTS = ("masks", "tokens")


class JetSpec(ParallelDraft):
    """Block-parallel draft with a causal block.

    Args:
        block_input: what enters a block behind its anchor: "masks", or "tokens", those of the text in training and the
            drafted ones in decoding.
        layers: see `ParallelDraft`, like all other arguments.

    Raises:
        ValueError: an unknown `block_input`, or "tokens" with `sample_from_anchor=false`, which would show a slot the
            token that it predicts.
    """

    published_format = "jetspec"

    def __init__(
        self,
        backbone: Backbone,
        tables: Tables,
        target_layer_ids: tuple[int, ...] | list[int],
        mask_token_id: int,
        *,
        block_input: Annotated[str, Among(BLOCK_INPUTS)] = "masks",
        layers: Layers = 5,
        block_size: Slots = 15,
        anchors: Count | None = 256,
        sample_from_anchor: bool = True,
        checkpointing: bool = False,
        train_tables: bool = False,
        draft_vocabulary: Int[Tensor, " W"] | None = None,
    ):
        super().__init__(
            backbone,
            tables,
            target_layer_ids,
            mask_token_id,
            layers=layers,
            block_size=block_size,
            anchors=anchors,
            sample_from_anchor=sample_from_anchor,
            causal_block=True,
            checkpointing=checkpointing,
            train_tables=train_tables,
            draft_vocabulary=draft_vocabulary,
        )
        if block_input not in BLOCK_INPUTS:
            raise ValueError(f"block_input={block_input!r}: choose one of {', '.join(BLOCK_INPUTS)}")
        if block_input == "tokens" and not sample_from_anchor:
            raise ValueError(
                "block_input=tokens with sample_from_anchor=false: every slot would read the token that it predicts; "
                "set sample_from_anchor=true"
            )
        self.block_input = block_input
        self.reads_previous = block_input == "tokens"

    def input_tokens(self, batch: Batch) -> Int[Tensor, "B N I"]:
        """Anchor and masks, or the token before every slot."""
        if self.block_input == "masks":
            return super().input_tokens(batch)
        return previous_tokens(batch, self.block_size)

    def propose(
        self, state: State, anchor: Int[Tensor, " B"], sample: SampleFunction, slots: int | None = None
    ) -> Proposal:
        """One pass; of a draft that reads tokens, one pass a slot."""
        if self.block_input == "masks":
            return super().propose(state, anchor, sample, slots)

        def logits(k: int, previous: list[Tensor]) -> Tensor:
            return self.project(self.run_block(previous[-1][:, None], state.cache, behind=k))

        return self.draw_each(self.block_size if slots is None else slots, anchor, sample, logits)

    def draw(self, hidden: Float[Tensor, "B K D"], anchor: Int[Tensor, " B"], sample: SampleFunction) -> Proposal:
        """All slots at once, so that the parents of a depth share their candidates."""
        return self.draw_at_once(hidden, anchor, sample)
