"""Initial weights of a draft: random, or copied from the target's layers.

Every method copies the target's layers in the same way, so that a comparison of methods compares only the methods.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from specbench.models.backbone import Layer, backbone_of, chosen
from specbench.models.target import Target

AUTO = "auto"
STARTS = ("target", "random", AUTO)
PREVIOUS = ("method", "wired", "none")


@runtime_checkable
class Startable(Protocol):
    """What gets first weights: a draft."""

    def randomise(self) -> None: ...

    def start_from(self, target: Target) -> list[str]: ...

    def start_previous(self, wired: bool) -> None: ...


@dataclass(frozen=True)
class Begun:
    """How a draft got its first weights: `start` is "target" or "random", `why` says so where that was a choice (None:
    it was asked for), `copied` names the tensors that are the target's."""

    start: str
    why: str | None
    copied: list[str]


def first_weights(draft: Startable, start: str, target: Target | None, previous: str = PREVIOUS[0]) -> Begun:
    """Give `draft` random weights and, where `start` says so, what it takes from `target`.

    `previous`: how a recurrent draft's maps read the previous token at first. "method": as each method begins; "wired":
    in every method like the feature beside it; "none": in every method almost not. A comparison whose methods begin
    differently informed also compares their starts.

    Errors: ValueError for start="target" where nothing can be copied, and for random weights with another `previous`
    than "method".
    """
    begun, why = resolved(start, target)
    if begun != "target" and previous != PREVIOUS[0]:
        raise ValueError(
            f"start_previous={previous} with start={start}: it changes what is copied from the target, and the draft "
            f"starts from random weights{'' if why is None else f' ({why})'}; use start_previous={PREVIOUS[0]}"
        )
    draft.randomise()
    if begun != "target":
        return Begun(begun, why, [])
    copied = draft.start_from(target)
    if not copied:
        none = f"{type(draft).__name__} has no weights that can start as the target's"
        if start == "target":
            raise ValueError(f"start=target: {none}; use start=random")
        return Begun("random", none, [])
    if previous != PREVIOUS[0]:
        draft.start_previous(previous == "wired")
    return Begun(begun, why, copied)


def randomise(module: nn.Module, std: float = 0.02, kept: Collection[str] = ()) -> None:
    """Normal(0, std) for every linear map, zero for its bias, Normal(0, 1) for embeddings; the modules named in `kept`
    and parameters of other kinds stay as their constructor made them."""
    for name, part in module.named_modules():
        if name in kept:
            continue
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight)


def layer_weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A target layer's weights under the names of our `Layer`: Phi-3's joined projections are split.

    Heads of queries come first, then those of keys, then of values, the last two of equal number; gate before up.
    """
    found = dict(theirs)
    joined = found.pop("self_attn.qkv_proj.weight", None)
    if joined is not None:
        queries = found["self_attn.o_proj.weight"].shape[1]
        rest = (len(joined) - queries) // 2
        for name, part in zip("qkv", joined.split([queries, rest, rest]), strict=True):
            found[f"self_attn.{name}_proj.weight"] = part
    joined = found.pop("mlp.gate_up_proj.weight", None)
    if joined is not None:
        found["mlp.gate_proj.weight"], found["mlp.up_proj.weight"] = joined.chunk(2)
    return found


def resolved(start: str, target: Target | None) -> tuple[str, str | None]:
    """What a start means for a target, and why where that is a choice: `auto` copies the target's own layers if the
    draft's layers can follow them, and begins with random weights otherwise."""
    if start != AUTO:
        return start, None
    own = chosen(target.config)
    return ("target", None) if own.own else ("random", own.reason)


@torch.no_grad()
def last_layers(draft: nn.Module, target: Target) -> list[str]:
    """Copy the target's last layers into `draft.layers` and its final norm into `draft.norm`, if the draft has one;
    returns the names of what was copied.

    Draft layer i of L takes target layer i - L from the end, of Gemma 4 among the layers of full attention, whose
    geometry a draft has. Where a layer's map has more input than the target's (a paired layer reads [embedding ;
    feature]), the feature's half takes the target's weights and the embedding's half starts small. What the target's
    layers do not have (a dense feed-forward in place of experts, norms of another family) keeps its random start. Norms
    keep their effect where one family stores 1 + w and the other w. Errors: ValueError when the target's layers are of
    no family known here, or the widths or heads differ, because then no such start exists.
    """
    own = chosen(target.config)
    if not own.own:
        raise ValueError(f"start=target: {own.reason}, so there is nothing to copy; use start=random")
    copied = []
    sources = list(target.layers)
    if own.family == "gemma4":
        kinds = target.text.get("layer_types") or []
        sources = [layer for layer, kind in zip(sources, kinds, strict=True) if kind == "full_attention"]
    if len(draft.layers) > len(sources):
        raise ValueError(
            f"layers={len(draft.layers)}: {target.name} has {len(sources)} layers to copy; use start=random"
        )
    # What to add to a stored norm so that it multiplies alike.
    shift = int(backbone_of(target.config).norm_adds_one) - int(draft.backbone.norm_adds_one)
    for i, layer in enumerate(draft.layers):
        source = layer_weights(sources[len(sources) - len(draft.layers) + i].state_dict())
        for name, parameter in layer.state_dict().items():
            known = "input_layernorm.weight" if name == "hidden_norm.weight" else name
            if known not in source:
                continue
            given = source[known] + shift if name.endswith("norm.weight") and shift else source[known]
            _fill(f"layers.{i}.{name}", parameter, given, layer)
            copied.append(f"layers.{i}.{name}")
    if isinstance(draft.norm, nn.Identity):
        return copied
    norm = getattr(target.parts.final_norm, "weight", None)
    if norm is None or norm.shape != draft.norm.weight.shape:
        raise ValueError(f"{target.name} has no final norm of the draft's width to copy; use start=random")
    draft.norm.weight.copy_(norm + shift)
    copied.append("norm.weight")
    return copied


@torch.no_grad()
def as_mean(maps: Mapping[str, nn.Linear]) -> list[str]:
    """Let each map that reads several features side by side start as their mean; returns the given names."""
    for linear in maps.values():
        parts = linear.in_features // linear.out_features
        linear.weight.copy_(torch.eye(linear.out_features).repeat(1, parts) / parts)
    return list(maps)


@torch.no_grad()
def weigh(weight: Tensor, kept: Tensor, embedding_first: bool, wired: bool) -> None:
    """Set the two halves of a map of embedding and feature side by side: each half of `kept` if `wired`; otherwise the
    feature's half is `kept` and the embedding's small random numbers."""
    embedding, feature = weight.chunk(2, 1)[:: 1 if embedding_first else -1]
    feature.copy_(kept / 2 if wired else kept)
    if wired:
        embedding.copy_(kept / 2)
    else:
        embedding.normal_(std=0.02)


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
