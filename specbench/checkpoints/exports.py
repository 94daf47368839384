"""Writing of drafts in published formats: the fields and names of each.

Which drafts a format or its engine can hold, with the engine's version, is said in obstacles.py; a draft that is
refused there is not written. Sources as in formats.py. A Llama draft of another number of taps than three names that
number in `num_aux_hidden_states`, which vLLM and SGLang read (models/llama_eagle3.py of both).

Axes: V vocabulary, W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specbench.checkpoints.config_keys import FormatError
from specbench.checkpoints.draft_files import TABLES
from specbench.checkpoints.formats import EAGLE_FLAGS
from specbench.checkpoints.layer_config import POSITIONS
from specbench.checkpoints.medusa_format import medusa_vllm
from specbench.checkpoints.obstacles import norms_of, obstacle
from specbench.drafts.dflash2 import TAPS, DFlash2
from specbench.drafts.domino import Domino
from specbench.drafts.draft import Draft
from specbench.drafts.dspark import DSpark
from specbench.drafts.eagle1 import Eagle1
from specbench.drafts.eagle3 import Eagle3
from specbench.drafts.fused_taps import FusedTaps
from specbench.drafts.jetspec import JetSpec
from specbench.drafts.medusa import Medusa
from specbench.drafts.p_eagle import PEagle
from specbench.drafts.parallel import ParallelDraft
from specbench.models.backbone import Backbone

# Names that a draft's tables and vocabulary have in every format, so that no module of its own may have them.
TAKEN = (*TABLES, "d2t", "t2d")
DEFAULT_TAPS = 3  # of a Llama draft whose configuration names no number


def target_layers_of(text: Mapping[str, Any], draft: Draft) -> int | None:
    """How many layers the target has, from the configuration that a draft folder keeps; None where it does not say,
    because the folder came from a format that has the draft's own number in that place."""
    found = text.get("num_target_layers") or text.get("num_hidden_layers")
    return found if found is not None and found > max(draft.target_layer_ids, default=-1) else None


def deepspec_fields(draft: Draft, text: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that DeepSpec adds to a target's (or another draft's) text configuration."""
    gemma = draft.backbone.sandwich
    fields: dict[str, Any] = {
        "num_target_layers": text.get("num_target_layers", text["num_hidden_layers"]),
        "target_layer_ids": list(draft.target_layer_ids),
        "tie_word_embeddings": False,
        "model_type": "gemma4_text" if gemma else "qwen3",
    }
    if layers := len(draft.layers_in_order()):
        fields |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    if gemma and not draft.backbone.values_from_keys:
        fields["attention_k_eq_v"] = False
    if obstacle(draft, "deepspec") is not None:
        return fields | {"architectures": [f"SpecBench{type(draft).__name__}"]}
    if not gemma and text.get("model_type") != "qwen3":
        fields |= layer_fields(draft.backbone)
    family = "Gemma4" if gemma else "Qwen3"
    if isinstance(draft, Eagle3):
        return fields | {
            "architectures": [f"{family}Eagle3Model"],
            "ttt_length": draft.block_size,
            "draft_num_hidden_layers": len(draft.layers),
            # Its training constant, which decoding does not read: the released value where nothing else is known.
            "step_loss_decay": text.get("step_loss_decay", 0.8),
        }
    assert isinstance(draft, ParallelDraft)
    return fields | block_fields(draft) | {"architectures": [f"{family}DSparkModel"]}


def block_fields(draft: ParallelDraft) -> dict[str, Any]:
    """The fields of a block draft and its heads under DeepSpec's names."""
    fields: dict[str, Any] = {
        "block_size": draft.block_size,
        "mask_token_id": draft.mask_token_id,
        "num_anchors": draft.anchors_per_sample,
    }
    markov = draft.markov_head if isinstance(draft, DSpark) else None
    confident = isinstance(draft, DSpark) and draft.confidence_head is not None
    fields |= {"markov_rank": 0 if markov is None else markov.rank, "enable_confidence_head": confident}
    if markov is not None:
        fields["markov_head_type"] = markov.kind
    if confident:
        fields["confidence_head_with_markov"] = draft.confidence_with_markov
    return fields


def positions_of(text: Mapping[str, Any]) -> int | None:
    """How many positions a target has, from its text configuration: its own number, else the default of the class that
    model_type names, which transformers leaves out of the file; None where neither is known."""
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        if isinstance(text.get(key), int):
            return text[key]
    return POSITIONS.get(str(text.get("model_type")))


def layer_fields(facts: Backbone, positions: int | None = None) -> dict[str, Any]:
    """Facts of a pre-norm backbone under the names of a Qwen3 or Llama configuration; `positions`: how many the target
    has, which engines take for the longest text of the draft too."""
    known = {} if positions is None else {"max_position_embeddings": positions}
    return known | {
        "hidden_size": facts.hidden_size,
        "intermediate_size": facts.intermediate_size,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_dim,
        "vocab_size": facts.vocab_size,
        "hidden_act": facts.activation,
        "rms_norm_eps": facts.norm_eps,
        "attention_bias": facts.attention_bias,
        "rope_parameters": {"rope_type": "default", **(facts.rope_scaling or {}), "rope_theta": facts.rope_theta},
        # Older engines read this one.
        **({} if facts.rope_scaling is None else {"rope_scaling": dict(facts.rope_scaling)}),
    }


def speculators(
    draft: Draft, verifier: str | None, text: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors in vLLM's speculators format; `text`: the target's text configuration.

    Errors: FormatError with the reason.
    """
    if isinstance(draft, Medusa):
        _require(draft, "vllm")
        return medusa_vllm(draft)
    positions = _required(draft, "vllm", text)
    if isinstance(draft, Eagle1):
        # As released: vLLM puts `Eagle` before the architecture if it is asked for the method `eagle`.
        return _eagle1(draft, "LlamaForCausalLM", positions)
    facts, name = draft.backbone, type(draft).__name__
    layers = layer_fields(facts, positions) | {
        "model_type": "qwen3" if facts.head_norms else "llama",
        "num_hidden_layers": len(draft.layers),
        "rope_theta": facts.rope_theta,
        "tie_word_embeddings": False,
    }
    slots = {"proposal_type": "greedy", "speculative_tokens": draft.block_size}
    config: dict[str, Any] = {
        "architectures": [f"{name}DraftModel"],
        "speculators_model_type": name.lower(),
        "draft_vocab_size": len(draft.tables.head),
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "dtype": str(draft.tables.head.dtype).removeprefix("torch."),
        "transformer_layer_config": layers,
        "speculators_config": {
            "algorithm": name.lower(),
            "default_proposal_method": "greedy",
            "proposal_methods": [slots],
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
    }
    taps = [i + 1 for i in draft.target_layer_ids]
    if isinstance(draft, FusedTaps):
        layers |= _tap_count(draft)
        config |= {
            "eagle_aux_hidden_state_layer_ids": taps,
            "norm_before_residual": facts.norm_before_residual,
            **dict.fromkeys(EAGLE_FLAGS, False),
            **norms_of(draft),
        }
        if isinstance(draft, PEagle):
            config |= {
                "mask_token_id": draft.mask_token_id,
                "num_depths": draft.block_size,
                "down_sample_ratio": draft.down_sample_ratio,
                "down_sample_ratio_min": draft.down_sample_ratio_min,
            }
    else:
        assert isinstance(draft, ParallelDraft)
        config |= {
            "aux_hidden_state_layer_ids": taps,
            "mask_token_id": draft.mask_token_id,
            "sample_from_anchor": draft.sample_from_anchor,
            "block_size": draft.block_size + (not draft.sample_from_anchor),
        }
    if isinstance(draft, DSpark):
        config |= {
            "markov_rank": draft.markov_head.rank,
            "markov_head_type": draft.markov_head.kind,
            "enable_confidence_head": draft.confidence_head is not None,
            "confidence_head_with_markov": draft.confidence_with_markov,
        }
    return config, tensors_of(draft) | vocabulary_map(draft)


def zlab(
    draft: Draft, text: Mapping[str, Any], target_layers: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors in z-lab's DFlash format, whose drafts take embedding and head from the target.

    `text`: the target's (or another draft's) text configuration; `target_layers`: how many layers the target has, where
    that is known. Errors: FormatError with the reason.
    """
    _require(draft, "zlab")
    assert isinstance(draft, ParallelDraft)
    layers, facts = len(draft.layers), draft.backbone
    inner: dict[str, Any] = {"mask_token_id": draft.mask_token_id, "target_layer_ids": list(draft.target_layer_ids)}
    config = layer_fields(facts, positions_of(text)) | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "rope_theta": facts.rope_theta,
        "tie_word_embeddings": False,
        "block_size": draft.inputs,
        "dflash_config": inner,
    }
    if target_layers is not None:
        config["num_target_layers"] = target_layers
    if isinstance(draft, Domino):
        config["architectures"] = ["DominoDraftModel"]
        inner |= {"projector_type": "domino", "emb_dim": draft.rank, "gru_hidden_dim": draft.gru_size}
        inner |= {"pure_draft_prefix_len": draft.prefix, "shift_label": draft.sample_from_anchor}
    if isinstance(draft, DFlash2):
        config["architectures"] = ["DFlash2DraftModel"]
        inner |= {"conv_kernel_size": TAPS, "conv_group_size": draft.conv_group, "selector_rank": draft.selector_rank}
        inner |= {"selector_top_k": draft.candidates, "block_size": config.pop("block_size")}
    if isinstance(draft, JetSpec):
        inner["causal_head"] = True
    elif draft.causal_block:
        config["is_causal"] = True
    if facts.soft_cap is not None:
        config["final_logit_softcapping"] = facts.soft_cap
    return config, {name: value for name, value in tensors_of(draft).items() if name not in TABLES}


def sglang(
    draft: Draft, text: Mapping[str, Any], target_layers: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors in the formats that SGLang reads, without the tables that it takes from the target.

    EAGLE-3 as LlamaForCausalLMEagle3, DFlash as z-lab's DFlashDraftModel, DSpark as DeepSpec's Qwen3DSparkModel with
    its tables, which SGLang skips. `text`: the target's text configuration; `target_layers`: how many layers it has,
    where that is known. Errors: FormatError with the reason.
    """
    positions = _required(draft, "sglang", text, target_layers)
    if isinstance(draft, Eagle1):
        return _eagle1(draft, "LlamaForCausalLMEagle", positions)
    counted = {} if target_layers is None else {"num_target_layers": target_layers}
    shared = layer_fields(draft.backbone, positions) | {
        "num_hidden_layers": len(draft.layers_in_order()),
        "rope_theta": draft.backbone.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": str(draft.tables.head.dtype).removeprefix("torch."),
    }
    taps = list(draft.target_layer_ids)
    if isinstance(draft, Eagle3):
        config = shared | norms_of(draft) | _tap_count(draft)
        config |= {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "draft_vocab_size": len(draft.tables.head),
            "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": taps},
        }
        renamed = {key.replace("layers.0.", "midlayer.", 1): value for key, value in tensors_of(draft).items()}
        del renamed["embed_tokens.weight"]
        return config, renamed | vocabulary_map(draft)
    assert isinstance(draft, ParallelDraft)
    if isinstance(draft, DSpark):
        config = shared | block_fields(draft) | {"architectures": ["Qwen3DSparkModel"], "model_type": "qwen3"}
        config |= counted | {"target_layer_ids": taps}
        if not draft.sample_from_anchor:
            config["sample_from_anchor"] = False
        return config, tensors_of(draft)
    return zlab(draft, text, target_layers)


def _eagle1(draft: Eagle1, architecture: str, positions: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors of an EAGLE-1, whose embedding and head are the target's in every engine."""
    config = layer_fields(draft.backbone, positions) | {
        "architectures": [architecture],
        "model_type": "llama",
        "num_hidden_layers": len(draft.layers),
        "rope_theta": draft.backbone.rope_theta,
        "tie_word_embeddings": False,
        "bias": draft.fc.bias is not None,
        "torch_dtype": str(draft.fc.weight.dtype).removeprefix("torch."),
    }
    return config, {name: value for name, value in tensors_of(draft).items() if name not in TABLES}


def _tap_count(draft: FusedTaps) -> dict[str, int]:
    """The key by which engines know how many taps a draft fuses, where it is not the number that they assume."""
    count = len(draft.target_layer_ids)
    return {} if count == DEFAULT_TAPS else {"num_aux_hidden_states": count}


def tensors_of(draft: Draft) -> dict[str, Tensor]:
    """Every tensor of a draft under the published names, its tables included."""
    require_names(draft)
    found, seen = {}, set()
    for name, value in draft.state_dict().items():
        if not name.startswith("tables."):
            value = value.detach().cpu().contiguous()
            # The file format holds no tensor twice: tied weights are written as the copies that they look like.
            found[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value
            seen.add(value.untyped_storage().data_ptr())
    found["embed_tokens.weight"] = draft.tables.embedding.detach().cpu().clone()
    found["lm_head.weight"] = draft.tables.head.detach().cpu().clone()
    if draft.tables.bias is not None:
        found["lm_head.bias"] = draft.tables.bias.detach().cpu().clone()
    return found


def require_names(draft: Draft) -> None:
    """Errors: FormatError for a module or buffer whose name in a folder is that of a table."""
    if taken := sorted(set(TAKEN) & set(draft.state_dict())):
        raise FormatError(
            f"{type(draft).__name__} has tensors named {', '.join(taken)}, which are the tables' names in a draft "
            "folder; give its modules other names"
        )


def vocabulary_map(draft: Draft) -> dict[str, Tensor]:
    """d2t (W,) int64 offsets and t2d (V,) bool of a reduced draft vocabulary; nothing when it is whole."""
    if draft.draft_vocabulary is None:
        return {}
    size, ids = draft.backbone.vocab_size, draft.draft_vocabulary.cpu()
    marks = torch.zeros(size, dtype=torch.bool).index_fill_(0, ids, True)
    return {"d2t": ids - torch.arange(len(ids)), "t2d": marks}


def _require(draft: Draft, form: str, target_layers: int | None = None) -> None:
    reason = obstacle(draft, form, target_layers)
    if reason is not None:
        raise FormatError(f"format={form} cannot hold this draft: {reason}")


def _required(draft: Draft, form: str, text: Mapping[str, Any], target_layers: int | None = None) -> int:
    """The positions of the target, which an engine needs. Errors: FormatError for a draft that `form` cannot hold, and
    for a target whose number of positions is not known."""
    _require(draft, form, target_layers)
    positions = positions_of(text)
    if positions is None:
        raise FormatError(
            f"format={form} needs max_position_embeddings, and the target's configuration, as this draft keeps it, has "
            f"none (model_type {text.get('model_type')!r}): add it to target_config in the draft's config.json"
        )
    return positions
