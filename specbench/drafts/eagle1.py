"""EAGLE-1 (Li et al. 2024, arXiv 2401.15077) and HASS (Zhang et al. 2024, arXiv 2408.15766): regression of the target's
last states by one decoder layer.

    f_0 = last at a-1, after the target's final norm                  -> source
    x_k = W [e(x_{a+k-1}) ; f_{k-1}] + b                              -> enter
    f_k = layer(x_k), without a norm of the layer's input             -> norms_first_input=False
    logits_k = lm_head(f_k), without a norm before                    -> Draft.project, norms_output=False
    loss = smooth-L1(f_k, last at a+k-1) + 0.1 soft cross-entropy     -> Objective(feature=1.0, soft_ce=0.1)

    EAGLE-1   trains step 1 alone (trained_steps=1) and decodes K steps
    EAGLE-2   is the same draft, proposing a tree that depends on its confidence
    HASS      trains 3 steps on its own features (trained_steps=3), whose gradient stops between the steps
              (stop_gradient=True), and adds the soft cross-entropy of the target's 10 likeliest tokens (`top_ce`)

Deviations: the releases add uniform noise to the features in training and clip gradients by value; neither is here. A
draft of more than one layer norms the input of the later ones, as published.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.blocks import SUPERVISIONS
from specbench.drafts.initialisation import as_mean, weigh
from specbench.drafts.recurrent import RecurrentDraft
from specbench.drafts.work import Work, of_parameters
from specbench.models.backbone import Backbone
from specbench.models.embedding_head import Tables
from specbench.models.target import Target
from specbench.ranges import Among, Count, Layers, Slots


class Eagle1(RecurrentDraft):
    """Recurrent draft that predicts the target's next states.

    Args:
        trained_steps: steps of a chain in training; the later slots are not supervised then. None: all of them.
        stop_gradient: the gradient of a step stops at the feature that it reads from the step before.
        fc_bias: a bias in the map of [embedding ; feature], as in the release. vLLM decodes drafts without it alone.
        layers: see `RecurrentDraft`, like all other arguments.

    Raises:
        ValueError: `trained_steps` is larger than `block_size`.
    """

    published_format = "eagle1"
    tap_modules = ()
    reads_taps = False
    reads_last = True
    norms_first_input = False
    norms_output = False

    def __init__(
        self,
        backbone: Backbone,
        tables: Tables,
        target_layer_ids: tuple[int, ...] | list[int],
        mask_token_id: int | None = None,
        *,
        trained_steps: Count | None = 1,
        stop_gradient: bool = False,
        fc_bias: bool = True,
        layers: Layers = 1,
        block_size: Slots = 7,
        anchors: Count | None = None,
        supervision: Annotated[str, Among(SUPERVISIONS)] = "predicted",
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
            supervision=supervision,
            train_tables=train_tables,
            draft_vocabulary=draft_vocabulary,
        )
        if trained_steps is not None and trained_steps > block_size:
            raise ValueError(
                f"trained_steps={trained_steps}: a chain has block_size={block_size} steps; train at most so"
            )
        self.trained_steps, self.stops_gradient = trained_steps, stop_gradient
        D = self.backbone.hidden_size
        self.fc = nn.Linear(2 * D, D, bias=fc_bias)

    def start_from(self, target: Target) -> list[str]:
        return [*super().start_from(target), *as_mean({"fc.weight": self.fc})]

    def start_previous(self, wired: bool) -> None:
        weigh(self.fc.weight, torch.eye(self.fc.out_features), True, wired)

    def work(self, length: int, anchors: int) -> Work:
        """The map of embedding and feature serves every step, too."""
        return super().work(length, anchors) + anchors * (self.trained_steps or self.block_size) * of_parameters(
            self.fc
        )

    def source(self, taps: Float[Tensor, "B T C D"], last: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return last

    def enter(self, feature: Float[Tensor, "*b D"], embedding: Float[Tensor, "*b D"]) -> Float[Tensor, "*b D"]:
        return self.fc(torch.cat([embedding, feature], -1))
