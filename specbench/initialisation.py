"""Where a draft's weights start: from nothing, from the target's own layers, or from another draft.

Starting every method from the target's layers in the same way keeps a comparison of methods a comparison of methods.
"""

from __future__ import annotations

import torch
from torch import nn

from specbench.backbone import Layer
from specbench.methods.draft import Draft
from specbench.targets import Target

STARTS = ("target", "random")


def randomise(draft: Draft, std: float = 0.02) -> None:
    """Normal(0, std) for every linear map, Normal(0, 1) for Markov embeddings; the Markov output stays at zero."""
    for name, module in draft.named_modules():
        if isinstance(module, nn.Linear) and "markov_w2" not in name:
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)


@torch.no_grad()
def from_target(draft: Draft, target: Target) -> list[str]:
    """Copy the target's last layers and final norm into the draft; returns the names of what was copied.

    Draft layer i of L takes target layer i - L from the end. Where a draft's map has more input than the target's
    (a paired layer reads [embedding ; feature], a projection reads both), the feature's half takes the target's
    weights or the identity and the embedding's half starts small. Tap fusion starts as the mean of the taps. Errors:
    ValueError when the widths or heads differ, because then no such start exists.
    """
    D, copied = draft.backbone.hidden_size, []
    if len(draft.layers) > len(target.layers):
        raise ValueError(
            f"layers={len(draft.layers)}: {target.name} has {len(target.layers)} layers to copy; use start=random"
        )
    for i, layer in enumerate(draft.layers):
        source = target.layers[len(target.layers) - len(draft.layers) + i].state_dict()
        for name, parameter in layer.state_dict().items():
            if name == "hidden_norm.weight":
                given = source["input_layernorm.weight"]
            elif name not in source:
                continue
            else:
                given = source[name]
            _fill(f"layers.{i}.{name}", parameter, given, layer)
            copied.append(f"layers.{i}.{name}")
    draft.norm.weight.copy_(target.decoder.norm.weight)
    copied.append("norm.weight")
    for name in ("fc", "proj"):
        module = getattr(draft, name, None)
        if isinstance(module, nn.Linear) and module.in_features % D == 0:
            parts = module.in_features // D
            module.weight.copy_(torch.eye(D).repeat(1, parts) / parts)
            copied.append(f"{name}.weight")
    return copied


def _fill(name: str, parameter: torch.Tensor, given: torch.Tensor, layer: Layer) -> None:
    if parameter.shape == given.shape:
        parameter.copy_(given)
    elif parameter.dim() == 2 and parameter.shape == (given.shape[0], 2 * given.shape[1]):
        embedding, feature = parameter.chunk(2, 1)
        feature.copy_(given)
        embedding.normal_(std=0.02)
    else:
        raise ValueError(
            f"start=target: {name} is {tuple(parameter.shape)} in the draft and {tuple(given.shape)} in the target; "
            "use start=random, or a backbone of the target's own family"
        )
