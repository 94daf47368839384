"""Medusa's heads in their two published forms: that of the release, and that of vLLM.

    release  medusa_num_heads, medusa_num_layers; tensors [medusa_head.]K.I.linear.{weight,bias} and K.L.weight, where L
             is the number of layers: every head has a vocabulary head. Its file medusa_lm_head.pt is pickled, so it is
             read once it was converted to safetensors (as text-generation-inference needs it)
    vLLM     architectures [MedusaModel]; num_heads, num_hidden_layers, medusa_fc_bias, original_lm_head,
             truncated_vocab_size; tensors blocks.K.layers.I.{weight,bias}, lm_heads.K.weight (only K = 0 if
             original_lm_head), token_map (W,) with the ids of a reduced vocabulary

Sources: FasterDecoding/Medusa medusa/model/medusa_model.py and train/train_legacy.py, text-generation-inference
layers/medusa.py, vLLM model_executor/models/medusa.py; read on 2026-11-27.

Axes: K heads, D hidden, V vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specbench.checkpoints.config_keys import FormatError, Keys
from specbench.drafts.medusa import Medusa
from specbench.models.backbone import Backbone

RELEASED_MAP = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.linear\.(weight|bias)")
RELEASED_HEAD = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.weight")
VLLM_MAP = re.compile(r"(?:medusa_heads\.)?blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
VLLM_HEAD = re.compile(r"(?:medusa_heads\.)?lm_heads\.(\d+)\.weight")


def medusa_settings(config: Keys, tensors: Any) -> tuple[dict[str, Any], int, int]:
    """The draft's settings, D and V. The release's configuration has no sizes: they are those of the `tensors`, if
    these are a mapping to tensors, else 0. Errors: FormatError."""
    if "medusa_num_heads" in config:
        config.get("base_model_name_or_path"), config.get("version")
        heads, depth, own = config.integer("medusa_num_heads"), config.integer("medusa_num_layers", 1), True
        shapes = [t.shape for name, t in tensors.items() if RELEASED_HEAD.fullmatch(name)] if _held(tensors) else []
        vocabulary, width = shapes[0] if shapes else (0, 0)
        width, vocabulary = config.integer("hidden_size", width), config.integer("vocab_size", vocabulary)
    else:
        for key in ("max_paths", "topk", "max_seq_len"):  # of vLLM's tree, which decoding here chooses itself
            config.get(key)
        heads, depth = (config.integer(config.needed(key)) for key in ("num_heads", "num_hidden_layers"))
        width, vocabulary = (config.integer(config.needed(key)) for key in ("hidden_size", "vocab_size"))
        own = not config.flag("original_lm_head")
        config.flag("medusa_fc_bias")
    return {"target_layer_ids": None, "block_size": heads, "depth": depth, "own_heads": own}, width, vocabulary


def medusa_backbone(width: int, vocabulary: int) -> tuple[Backbone, dict[str, Any]]:
    """The facts of a draft without layers, and the text configuration that a folder of ours needs."""
    facts = Backbone("llama", width, width, 1, 1, width, vocabulary, 1e4, head_norms=False)
    text = {"model_type": "llama", "hidden_size": width, "vocab_size": vocabulary, "num_hidden_layers": 0}
    return facts, text


def medusa_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under our names; those that are not known stay as they are, so that loading names them.

    A map without a bias has a bias of zero.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if match := VLLM_MAP.fullmatch(name) or RELEASED_MAP.fullmatch(name):
            found[f"medusa_head.{match[1]}.{match[2]}.linear.{match[3]}"] = value
        elif match := VLLM_HEAD.fullmatch(name):
            found[f"vocabulary_heads.{match[1]}" if settings["own_heads"] else "lm_head.weight"] = value
        elif (match := RELEASED_HEAD.fullmatch(name)) and int(match[2]) == settings["depth"]:
            found[f"vocabulary_heads.{match[1]}"] = value
        elif name == "token_map":
            if value.dtype != torch.int64 or value.dim() != 1:
                raise FormatError(f"token_map is {value.dtype} of shape {tuple(value.shape)}, not one row of token ids")
            found["d2t"] = value - torch.arange(len(value))
        else:
            found[name] = value
    for name in [name for name in found if name.startswith("medusa_head.") and name.endswith("weight")]:
        bias = name.removesuffix("weight") + "bias"
        found.setdefault(bias, found[name].new_zeros(len(found[name])))
    return found


def medusa_obstacle(draft: Medusa, engine: str) -> str | None:
    """Why vLLM cannot hold these heads; None when it can. `engine`: its name and version."""
    if draft.backbone.soft_cap is not None:
        return f"{engine} has no soft-cap of the logits of Medusa's heads (medusa.py)"
    if draft.tables.trainable:
        return f"{engine} gives Medusa the target's states alone (medusa.py); this draft has trained an embedding"
    if len(draft.vocabulary_heads) and draft.draft_vocabulary is not None:
        return (
            f"{engine} reads a vocabulary head of each slot with the whole vocabulary only (medusa.py); train with "
            "method.draft.own_heads=false or method.vocabulary=null"
        )
    return None


def medusa_vllm(draft: Medusa) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors as vLLM reads them. The caller has asked for the obstacle."""
    facts, tables, own = draft.backbone, draft.tables, list(draft.vocabulary_heads)
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": facts.hidden_size,
        "vocab_size": facts.vocab_size,
        "truncated_vocab_size": len(tables.head),
        "num_heads": draft.block_size,
        "num_hidden_layers": draft.depth,
        "medusa_fc_bias": True,
        "original_lm_head": not own,
        "torch_dtype": str(tables.head.dtype).removeprefix("torch."),
    }
    found = {}
    for name, value in draft.state_dict().items():
        if match := RELEASED_MAP.fullmatch(name):
            found[f"blocks.{match[1]}.layers.{match[2]}.{match[3]}"] = value
    for k, head in enumerate(own or [tables.head]):
        found[f"lm_heads.{k}.weight"] = head
    found = {name: value.detach().cpu().clone() for name, value in found.items()}
    if draft.draft_vocabulary is not None:
        found["token_map"] = draft.draft_vocabulary.cpu().clone()
    return config, found


def _held(tensors: Any) -> bool:
    return isinstance(tensors, Mapping) and all(isinstance(value, Tensor) for value in tensors.values())
