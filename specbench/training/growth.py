"""Progressive stacking: a deep language model starts from the weights of a shallower one of the same width.

A step of a shallow model is cheaper, so the first part of the training is done there (Gong et al. 2019, "Efficient
Training of BERT by Progressively Stacking"). Here every layer of the shallow model is followed by copies of itself
whose two output matrices are zero. A copy therefore adds nothing to the residual stream at first: the deep model
begins as exactly the function that the shallow one had learned, and its matrices receive a gradient at once.
"""

from __future__ import annotations

import torch
from torch import nn

# Matrices that add to the residual stream.
ADDING = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@torch.no_grad()
def grow(deep: nn.Module, shallow: nn.Module) -> nn.Module:
    """Give `deep` the function of `shallow`, a model of the same sizes with fewer layers (both: `model.layers`).

    Layer j of L takes the weights of layer floor(j l / L) of l; of the layers that take the same, the first adds to the
    residual stream and the others add zero. Returns `deep`. Errors: ValueError if other sizes differ.
    """
    ours, theirs = deep.state_dict(), shallow.state_dict()
    L, l = len(deep.model.layers), len(shallow.model.layers)  # noqa: E741
    if l > L:
        raise ValueError(f"a model of {L} layers cannot start from one of {l}: it needs at least as many")
    seen: set[int] = set()
    for j in range(L):
        source, prefix = j * l // L, f"model.layers.{j}."
        for name in [name for name in ours if name.startswith(prefix)]:
            part = name.removeprefix(prefix)
            _copy(ours[name], theirs.get(f"model.layers.{source}.{part}"), name)
            if source in seen and part in ADDING:
                ours[name].zero_()
        seen.add(source)
    for name in [name for name in ours if not name.startswith("model.layers.")]:
        _copy(ours[name], theirs.get(name), name)
    return deep


def _copy(to: torch.Tensor, found: torch.Tensor | None, name: str) -> None:
    if found is None or found.shape != to.shape:
        shape = "nothing" if found is None else f"shape {tuple(found.shape)}"
        raise ValueError(f"the model to start from has {shape} for {name}, and this one has {tuple(to.shape)}")
    to.copy_(found)
