"""A target and drafts of five tokens, small enough to enumerate every text that they can write."""

from __future__ import annotations

import itertools
from functools import cache

import torch

from specbench.decoding.sampling import Sampling, warp
from specbench.drafts.baselines import Small
from specbench.drafts.dflash import DFlash
from specbench.drafts.dflash2 import DFlash2
from specbench.drafts.domino import Domino
from specbench.drafts.draft import Draft
from specbench.drafts.dspark import DSpark
from specbench.drafts.eagle1 import Eagle1
from specbench.drafts.eagle3 import Eagle3
from specbench.drafts.hydra import Hydra
from specbench.drafts.jetspec import JetSpec
from specbench.drafts.medusa import Medusa
from specbench.drafts.mtp import MTP
from specbench.drafts.p_eagle import PEagle
from specbench.drafts.parallel import ParallelDraft
from specbench.drafts.recurrent import RecurrentDraft
from specbench.models.backbone import backbone_of
from specbench.models.target import Target

VOCABULARY, TAPS = 5, (0, 1)
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.25,
}
METHODS: dict[str, type[Draft]] = {"dflash": DFlash, "dspark": DSpark, "eagle3": Eagle3, "mtp": MTP}
# All of them, for tests of one method and for long ones.
CLASSES = METHODS | {"eagle1": Eagle1, "medusa": Medusa, "hydra": Hydra, "p_eagle": PEagle, "jetspec": JetSpec}
CLASSES |= {"domino": Domino, "dflash2": DFlash2}


@cache
def target() -> Target:
    """Random, and far enough from uniform that truncation bites."""
    return Target.from_config(CONFIG, TAPS, seed=1, name="toy", stop_token_ids=[])


@cache
def draft(method: str, slots: int = 3, **settings) -> Draft | Small:
    """A draft that starts from the target's layers and never saw data: some proposals are accepted, some rejected."""
    owner = target()
    if method == "small":
        return Small(Target.from_config(CONFIG, [], seed=4, stop_token_ids=[]), VOCABULARY, slots)
    if method == "dspark":
        settings = {"markov_rank": 4, **settings}
    if method == "dflash2":
        settings = {"selector_rank": 4, "candidates": 3, "conv_group": 4, **settings}
    if method == "domino":
        settings = {"correction_rank": 4, "gru_size": 6, **settings}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        made = CLASSES[method](
            backbone_of(owner.config),
            owner.tables,
            TAPS,
            mask_token_id=VOCABULARY - 1,
            block_size=slots,
            **({"layers": 1} if issubclass(CLASSES[method], ParallelDraft | RecurrentDraft) else {}),
            **settings,
        )
        made.randomise(std=0.1)
        made.start_from(owner)
        for name, parameter in made.named_parameters():
            if "markov_w2" in name or "codebook" in name:
                parameter.data.normal_(std=0.7)
    return made.eval()


def texts(length: int) -> torch.Tensor:
    """Every text of `length` tokens, (V ** length, length), in counting order."""
    rows = list(itertools.product(range(VOCABULARY), repeat=length))
    return torch.tensor(rows, dtype=torch.long).view(len(rows), length)


@torch.inference_mode()
def joint_distribution(prompt: list[int], length: int, sampling: Sampling) -> torch.Tensor:
    """The target's exact probability of each of those texts after `prompt`, in fp64, from whole forward passes."""
    continued = texts(length)
    rows = torch.cat([torch.tensor(prompt).expand(len(continued), -1), continued], 1)
    context = target().states(rows, torch.full((len(rows),), rows.shape[1]))
    distributions = warp(target().logits(context.last[:, len(prompt) - 1 : -1]), sampling).double()
    return distributions.gather(-1, continued[..., None])[..., 0].prod(-1)
