"""Writing of drafts in published formats: the fields and names of each, and the reasons for which a draft is refused.

An engine that ignores unknown fields would decode with a wrong draft, so a draft that a format or its engine cannot
represent is refused with the reason. Sources as in formats.py; vLLM's speculators updates map DSpark to a Qwen3
draft with the vanilla Markov head alone, and Eagle3 and P-EAGLE to Eagle3LlamaForCausalLM; SGLang's
LlamaForCausalLMEagle3 skips tensors that it does not know, shares the target's embedding and fuses three taps.

Axes: V vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specbench.checkpoints.config_keys import FormatError
from specbench.checkpoints.draft_files import TABLES
from specbench.checkpoints.formats import EAGLE_FLAGS
from specbench.checkpoints.medusa_format import medusa_obstacle, medusa_vllm
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

OWN = "specbench"  # every method; only SpecBench reads it
FORMATS = ("deepspec", "vllm", "sglang", "zlab", OWN)
# The published architectures that each of them holds.
HELD = {
    "deepspec": ("dspark", "dflash", "eagle3"),
    "vllm": ("dspark", "dflash", "eagle3", "p_eagle", "medusa"),
    "sglang": ("eagle3", "eagle1"),
    "zlab": ("dflash", "jetspec", "domino", "dflash2"),
}
# Names that a draft's tables and vocabulary have in every format, so that no module of its own may have them.
TAKEN = (*TABLES, "d2t", "t2d")
# Facts of a backbone that a Llama or Qwen3 configuration has keys for, or that are looked at before.
PLAIN = [
    "family",
    "hidden_size",
    "intermediate_size",
    "heads",
    "kv_heads",
    "head_dim",
    "vocab_size",
    "rope_theta",
    "rope_scaling",
    "norm_eps",
    "activation",
    "attention_bias",
    "head_norms",
    "norm_before_residual",
    "embedding_scale",
    "soft_cap",
    "logit_scale",
    "window",
]
ENGINE_TAPS = 3  # what the fusing projection of vLLM's and SGLang's Eagle3 takes


def obstacle(draft: Draft, form: str) -> str | None:
    """Why `draft` cannot be written as `form`; None when it can."""
    if form == OWN:
        return None
    if published(draft) is None:
        return f"{type(draft).__name__} has no published format: only SpecBench loads it; use format={OWN}"
    if published(draft) not in HELD[form]:
        others = [name for name, held in HELD.items() if published(draft) in held]
        return f"{type(draft).__name__} is no draft of this format; use format={' or '.join([*others, OWN])}"
    if draft.backbone.window is not None:
        return "a sliding window over the context has no common meaning there; train with method.window=null"
    if isinstance(draft, ParallelDraft) and draft.causal_block and form != "zlab":
        return "a causal block (causal_block) has no key there; train with method.draft.causal_block=false"
    if draft.backbone.logit_scale != 1.0:
        return f"scaled logits (logit_scale={draft.backbone.logit_scale:g}) have no key there"
    if draft.tables.bias is not None:
        return "the bias of the target's head has no key there"
    checks = {"deepspec": _deepspec_obstacle, "vllm": _vllm_obstacle, "sglang": _sglang_obstacle}
    checks["zlab"] = _zlab_obstacle
    return checks[form](draft)


def published(draft: Draft) -> str | None:
    """The published architecture that the draft's very class is; what a base class is does not count."""
    return vars(type(draft)).get("published_format")


def _deepspec_obstacle(draft: Draft) -> str | None:
    facts = draft.backbone
    if isinstance(draft, ParallelDraft) and not draft.sample_from_anchor:
        return "DeepSpec's blocks predict slot 1 from the anchor; this draft predicts at mask tokens only"
    if norms_of(draft):
        return (
            f"DeepSpec's Eagle3 has no {' or '.join(norms_of(draft))}; format=vllm holds this draft's layers if Llama's"
        )
    if draft.draft_vocabulary is not None:
        return "DeepSpec's drafts have the whole vocabulary; this one has a reduced vocabulary"
    if facts.family not in ("qwen3", "gemma4") or facts.norm_before_residual:
        like = "Llama-like" if facts.family == "llama" else f"{facts.family}'s"
        return f"DeepSpec has Qwen3 and Gemma4 layers only; this draft's layers are {like}"
    if facts.sandwich != (facts.embedding_scale != 1.0) or (facts.soft_cap is not None and not facts.sandwich):
        return "DeepSpec ties layers to the target's family; this draft's backbone is of another family than its target"
    beyond = None if facts.sandwich else _beyond_plain(facts)
    return None if beyond is None else f"DeepSpec: {beyond}"


def _beyond_plain(facts: Backbone) -> str | None:
    """What a backbone has that the configuration of a Llama or Qwen3 layer has no key for."""
    if facts.family not in ("qwen3", "llama"):
        return f"its layers are Qwen3's or Llama's; this draft's are {facts.family}'s"
    found = [
        f"{fact.name}={getattr(facts, fact.name)}"
        for fact in dataclasses.fields(facts)
        if fact.name not in PLAIN and getattr(facts, fact.name) != fact.default
    ]
    return f"its layers have no key for {', '.join(found)}" if found else None


def _vllm_obstacle(draft: Draft) -> str | None:
    facts = draft.backbone
    if isinstance(draft, Medusa):
        return medusa_obstacle(draft)
    if facts.sandwich or facts.soft_cap is not None or facts.embedding_scale != 1.0:
        return (
            "speculators has no Gemma4-like layers, embedding scale or soft-cap; format=deepspec holds this draft, and "
            "vLLM has a Gemma4 DSpark model for that format"
        )
    if (beyond := _beyond_plain(facts)) is not None:
        return f"speculators: {beyond}"
    if isinstance(draft, FusedTaps):
        return _eagle3_obstacle(draft, "vLLM")
    if not facts.head_norms:
        return "vLLM's block drafts have Qwen3 layers, with norms of queries and keys; this draft's are Llama-like"
    if isinstance(draft, DSpark):
        if draft.markov_head is None or draft.markov_head.kind != "vanilla":
            kind = "no Markov head" if draft.markov_head is None else f"a {draft.markov_head.kind} Markov head"
            return f"vLLM decodes the vanilla Markov head only; this draft has {kind}"
        if not draft.sample_from_anchor:
            return "DSpark in this format predicts slot 1 from the anchor; this draft predicts at mask tokens only"
    elif draft.sample_from_anchor:
        return "vLLM's DFlash predicts at mask tokens only; train with method.draft.sample_from_anchor=false"
    return None


def _sglang_obstacle(draft: Draft) -> str | None:
    facts = draft.backbone
    if facts.sandwich or facts.soft_cap is not None or facts.embedding_scale != 1.0:
        return "SGLang's EAGLE-3 has Llama layers, no Gemma4-like layers, embedding scale or soft-cap"
    if (beyond := _beyond_plain(facts)) is not None:
        return f"SGLang: {beyond}"
    if "norm_before_fc" in norms_of(draft):
        return "SGLang's EAGLE-3 has no norm of all taps together (norm_before_fc); format=vllm holds it"
    if isinstance(draft, Eagle1):
        return _eagle1_obstacle(draft)
    if facts.norm_before_residual:
        return "SGLang's EAGLE-3 adds to the feature as it is; this draft adds to the normed feature"
    if draft.tables.trainable:
        return "SGLang's EAGLE-3 shares the target's embedding; this draft has trained its own"
    return _eagle3_obstacle(draft, "SGLang")


def _eagle1_obstacle(draft: Eagle1) -> str | None:
    if draft.backbone.head_norms:
        return "SGLang's EAGLE-1 has Llama layers without norms of queries and keys; train with method.backbone=llama"
    if draft.fc.bias is None:
        return "SGLang's EAGLE-1 has a bias in the map of embedding and feature; train with method.draft.fc_bias=true"
    if draft.tables.trainable or draft.draft_vocabulary is not None:
        return "SGLang's EAGLE-1 shares the target's embedding and head; this draft has its own or a reduced vocabulary"
    return None


def _zlab_obstacle(draft: Draft) -> str | None:
    assert isinstance(draft, ParallelDraft)
    facts = draft.backbone
    if facts.sandwich:
        return "z-lab's drafts have Qwen3 layers; this draft's are Gemma4-like"
    if (beyond := _beyond_plain(facts)) is not None:
        return f"z-lab: {beyond}"
    if not facts.head_norms:
        return "z-lab's drafts have Qwen3 layers, with norms of queries and keys; this draft's are Llama-like"
    if draft.tables.trainable or draft.draft_vocabulary is not None:
        return "z-lab's drafts share the target's embedding and head; this draft has its own or a reduced vocabulary"
    if draft.sample_from_anchor and not isinstance(draft, Domino):
        return "z-lab's drafts predict at mask tokens only; train with method.draft.sample_from_anchor=false"
    if draft.full_layers and draft.causal_block:
        return "layers without the causal block of the others (full_layers) have no key there"
    if isinstance(draft, JetSpec) and draft.block_input != "masks":
        return f"JetSpec's released blocks hold masks; this draft reads block_input={draft.block_input}"
    return None


def _eagle3_obstacle(draft: Draft, engine: str) -> str | None:
    if draft.backbone.head_norms:
        return (
            f"{engine}'s EAGLE-3 has Llama layers without norms of queries and keys; this draft has them: train with "
            "method.backbone=llama"
        )
    if isinstance(draft, Eagle3) and len(draft.layers) != 1:
        return f"{engine}'s EAGLE-3 reads the embedding in its first layer alone; this draft has {len(draft.layers)}"
    if len(draft.target_layer_ids) != ENGINE_TAPS:
        return f"{engine}'s EAGLE-3 fuses {ENGINE_TAPS} taps; this draft reads {len(draft.target_layer_ids)}"
    return None


def norms_of(draft: Draft) -> dict[str, bool]:
    """The settings of formats.EAGLE_FLAGS that are on in a draft."""
    if not isinstance(draft, FusedTaps):
        return {}
    found = (draft.fc_norm is not None, draft.input_norm is not None, draft.feeds_normed_output)
    return {name: True for name, on in zip(EAGLE_FLAGS, found, strict=True) if on}


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
    fields |= {
        "architectures": [f"{family}DSparkModel"],
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
    draft: Draft, verifier: str | None, positions: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors in vLLM's speculators format; `positions`: how many the target has.

    Errors: FormatError with the reason.
    """
    _require(draft, "vllm")
    if isinstance(draft, Medusa):
        return medusa_vllm(draft)
    facts, name = draft.backbone, type(draft).__name__
    text = layer_fields(facts, positions) | {
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
        "transformer_layer_config": text,
        "speculators_config": {
            "algorithm": name.lower(),
            "default_proposal_method": "greedy",
            "proposal_methods": [slots],
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
    }
    taps = [i + 1 for i in draft.target_layer_ids]
    if isinstance(draft, FusedTaps):
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
    draft: Draft, text: Mapping[str, Any], positions: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors in z-lab's DFlash format, whose drafts take embedding and head from the target; `text`:
    the target's (or another draft's) text configuration, `positions`: how many the target has."""
    _require(draft, "zlab")
    assert isinstance(draft, ParallelDraft)
    layers, facts = len(draft.layers), draft.backbone
    inner: dict[str, Any] = {"mask_token_id": draft.mask_token_id, "target_layer_ids": list(draft.target_layer_ids)}
    config = layer_fields(facts, positions) | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "num_target_layers": text.get("num_target_layers", text["num_hidden_layers"]),
        "rope_theta": facts.rope_theta,
        "tie_word_embeddings": False,
        "block_size": draft.inputs,
        "dflash_config": inner,
    }
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


def sglang(draft: Draft, positions: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors in SGLang's EAGLE-3 format, without the embedding, which it takes from the target;
    `positions`: how many the target has."""
    _require(draft, "sglang")
    if isinstance(draft, Eagle1):
        shared = {
            "architectures": ["LlamaForCausalLMEagle"],
            "model_type": "llama",
            "num_hidden_layers": len(draft.layers),
            "rope_theta": draft.backbone.rope_theta,
            "tie_word_embeddings": False,
            "bias": True,
            "torch_dtype": str(draft.fc.weight.dtype).removeprefix("torch."),
        }
        own = {name: value for name, value in tensors_of(draft).items() if name not in TABLES}
        return layer_fields(draft.backbone, positions) | shared, own
    config = (
        layer_fields(draft.backbone, positions)
        | norms_of(draft)
        | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "rope_theta": draft.backbone.rope_theta,
            "tie_word_embeddings": False,
            "draft_vocab_size": len(draft.tables.head),
            "torch_dtype": str(draft.tables.head.dtype).removeprefix("torch."),
            "eagle_config": {
                "use_aux_hidden_state": True,
                "eagle_aux_hidden_state_layer_ids": list(draft.target_layer_ids),
            },
        }
    )
    renamed = {key.replace("layers.0.", "midlayer.", 1): value for key, value in tensors_of(draft).items()}
    del renamed["embed_tokens.weight"]
    return config, renamed | vocabulary_map(draft)


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


def _require(draft: Draft, form: str) -> None:
    reason = obstacle(draft, form)
    if reason is not None:
        raise FormatError(f"format={form} cannot hold this draft: {reason}")
