"""Where a draft's weights start: from nothing, from the target's own layers, or from another draft.

Starting every method from the target's layers in the same way keeps a comparison of methods a comparison of methods.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from specbench.checkpoints.draft_folder import fetch, load_draft
from specbench.drafts.draft import Draft
from specbench.models.backbone import Layer
from specbench.models.embedding_head import Tables
from specbench.models.target import Target

STARTS = ("target", "random")
FUSION = ("fc.", "fc_norm.", "input_norm.", "hidden_norm.")


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
    norm = getattr(target.parts.final_norm, "weight", None)
    if norm is None or norm.shape != draft.norm.weight.shape:
        raise ValueError(f"{target.name} has no final norm of the draft's width to copy; use start=random")
    draft.norm.weight.copy_(norm)
    copied.append("norm.weight")
    for name in ("fc", "proj"):
        module = getattr(draft, name, None)
        if isinstance(module, nn.Linear) and module.in_features % D == 0:
            parts = module.in_features // D
            module.weight.copy_(torch.eye(D).repeat(1, parts) / parts)
            copied.append(f"{name}.weight")
    return copied


@torch.no_grad()
def from_draft(draft: Draft, folder: str | Path, tables: Tables | None) -> tuple[list[str], list[str]]:
    """Start from the draft of a folder in any format that loads; returns the names that were copied and those that
    were not, because that draft has no such tensor, or one of another shape.

    `tables` are the target's, for formats that ship none. What fuses the taps is taken over only from a draft of the
    same taps. Errors: ValueError when nothing fits; FormatError for a folder that does not load.
    """
    path = fetch(folder)
    path = path / "draft" if (path / "draft").is_dir() else path
    found = load_draft(path, tables, taps=list(draft.target_layer_ids), methods=[type(draft)])
    given, own = found.state_dict(), draft.state_dict()
    if found.target_layer_ids != draft.target_layer_ids:
        given = {name: value for name, value in given.items() if not name.startswith(FUSION)}
    if draft.tables.trainable and _same_rows(found.tables.ids, draft.tables.ids):
        given |= {"tables.embedding": found.tables.embedding, "tables.head": found.tables.head}
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise ValueError(f"start={folder}: no tensor there fits this draft; choose a draft of the same widths")
    draft.load_state_dict(fitting, strict=False)
    return sorted(fitting), sorted(own.keys() - fitting)


def _same_rows(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.cpu(), other.cpu())


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
