"""Published draft checkpoints in and out of our layout.

A draft folder is config.json + model.safetensors. Formats read: DeepSpec (DSpark, DFlash, Eagle3), z-lab DFlash, and
our own for methods without a published format. Key names and meanings: the formats' released checkpoints.
Unknown or missing keys are errors that list them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specbench.backbone import Backbone, backbone_of
from specbench.methods.dflash import DFlash
from specbench.methods.draft import Draft
from specbench.methods.dspark import DSpark
from specbench.methods.eagle3 import Eagle3
from specbench.methods.parallel import ParallelDraft
from specbench.tables import Tables

DEEPSPEC = {"DSparkModel": "dspark", "Eagle3Model": "eagle3"}


class FormatError(ValueError):
    """A draft folder that cannot be read as any known format."""


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and all tensors of a draft folder (one file or a sharded index)."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FormatError(f"draft={folder}: no config.json there; give a folder with config.json and *.safetensors")
    try:
        config = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise FormatError(f"draft={folder}: config.json is not JSON ({error})") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FormatError(f"draft={folder}: no *.safetensors there; is the download complete?")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except Exception as error:
            raise FormatError(f"{file} cannot be read as safetensors ({error}); copy it again") from error
    return config, tensors


def _setting(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise FormatError(f"config.json lacks {key!r}, which this architecture needs")
    return config[key]


def describe(config: Mapping[str, Any]) -> tuple[type[Draft], dict[str, Any]]:
    """The class and constructor settings that a draft's config.json asks for."""
    if "specbench" in config:
        own = config["specbench"]
        module, name = own["class"].rsplit(".", 1)
        return getattr(importlib.import_module(module), name), dict(own["settings"])
    architecture = (config.get("architectures") or ["none"])[0]
    method = next((m for suffix, m in DEEPSPEC.items() if architecture.endswith(suffix)), None)
    if method == "dspark":
        rank, confident = int(config.get("markov_rank") or 0), bool(config.get("enable_confidence_head"))
        settings = {
            "target_layer_ids": _setting(config, "target_layer_ids"),
            "mask_token_id": _setting(config, "mask_token_id"),
            "layers": _setting(config, "num_hidden_layers"),
            "block_size": _setting(config, "block_size"),
            "anchors": config.get("num_anchors", 512),
        }
        if rank == 0 and not confident:
            return DFlash, settings
        markov = rank > 0 and bool(config.get("confidence_head_with_markov", True))
        return DSpark, settings | {
            "markov_head": config.get("markov_head_type") or "vanilla",
            "markov_rank": rank,
            "confidence_head": confident,
            "confidence_with_markov": markov,
        }
    if method == "eagle3":
        return Eagle3, {
            "target_layer_ids": _setting(config, "target_layer_ids"),
            "layers": config.get("draft_num_hidden_layers", 1),
            "block_size": config.get("ttt_length", 7),
        }
    if architecture == "DFlashDraftModel":
        inner = _setting(config, "dflash_config")
        return DFlash, {
            "target_layer_ids": _setting(inner, "target_layer_ids"),
            "mask_token_id": _setting(inner, "mask_token_id"),
            "layers": _setting(config, "num_hidden_layers"),
            # The published block counts the anchor, which predicts nothing in this form.
            "block_size": _setting(config, "block_size") - 1,
            "sample_from_anchor": False,
        }
    raise FormatError(
        f"architecture {architecture!r} is no draft format known here; known: *DSparkModel, *Eagle3Model, "
        "DFlashDraftModel and SpecBench's own"
    )


def backbone_from(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Backbone:
    """Backbone facts of a draft's own config.json (its head sizes are read raw, before any library rewrites them)."""
    own = config.get("specbench")
    if own is not None:
        return backbone_of(own["target_config"], own["family"], own["window"])
    text = config.get("text_config") or config
    facts = dict(text)
    if "gemma4" not in str(config.get("model_type", "")) and "num_attention_heads" not in facts:
        raise FormatError("config.json lacks num_attention_heads, so the draft's layers cannot be built")
    if "layers.0.self_attn.v_proj.weight" in tensors and facts.get("attention_k_eq_v"):
        facts["attention_k_eq_v"] = False
    window = facts.get("sliding_window") if facts.get("use_sliding_window") else None
    return backbone_of(facts, window=window)


def load_draft(folder: str | Path, target_tables: Tables | None = None, dtype: torch.dtype | None = None) -> Draft:
    """Build the draft of a folder and load every tensor; `target_tables` serve formats that ship none.

    Errors: FormatError listing missing and unexpected keys, or naming a shape that differs.
    """
    config, tensors = read_folder(folder)
    return build_draft(config, tensors, target_tables, dtype)


def build_draft(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    target_tables: Tables | None = None,
    dtype: torch.dtype | None = None,
) -> Draft:
    """The same from a configuration and tensors already read."""
    kind, settings = describe(config)
    backbone = backbone_from(config, tensors)
    tensors = {key.removeprefix("model."): value for key, value in tensors.items()}
    embedding, head = tensors.pop("embed_tokens.weight", None), tensors.pop("lm_head.weight", None)
    if embedding is not None:
        head = embedding if head is None else head
        tables = Tables(embedding, head, backbone.embedding_scale, backbone.soft_cap)
    elif target_tables is not None:
        tables = target_tables
    else:
        raise FormatError("this draft ships no embedding and head; give target=FOLDER_OR_ID so that they can be shared")
    draft = kind(backbone, tables, **settings)
    expected = draft.state_dict()
    missing = sorted(set(expected) - set(tensors) - {k for k in expected if k.startswith("tables.")})
    unknown = sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise FormatError(f"draft checkpoint does not fit {kind.__name__}: missing {missing}, unknown {unknown}")
    wrong = [
        f"{k} {tuple(tensors[k].shape)}, not {tuple(expected[k].shape)}"
        for k in tensors
        if tensors[k].shape != expected[k].shape
    ]
    if wrong:
        raise FormatError(f"draft checkpoint has other shapes than its config.json says: {'; '.join(wrong)}")
    draft.load_state_dict(dict(tensors), strict=False)
    return draft.to(dtype or next(iter(tensors.values())).dtype).eval()


def save_draft(draft: Draft, folder: str | Path, target_config: Mapping[str, Any], settings: Mapping[str, Any]) -> Path:
    """Write `draft` as config.json + model.safetensors: the published DeepSpec keys where the method has them.

    `settings` are the constructor arguments beyond backbone and tables; they are kept under `specbench` in
    config.json, so that any method, published or not, can be built again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = dict(target_config.get("text_config") or target_config)
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    config = text | _published(draft, text)
    config["specbench"] = {
        "class": f"{type(draft).__module__}.{type(draft).__qualname__}",
        "settings": settings,
        "family": draft.backbone.family,
        "window": draft.backbone.window,
        "target_config": dict(target_config),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in draft.state_dict().items() if not k.startswith("tables.")}
    tensors["embed_tokens.weight"] = draft.tables.embedding.detach().cpu().clone()
    tensors["lm_head.weight"] = draft.tables.head.detach().cpu().clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def _published(draft: Draft, text: Mapping[str, Any]) -> dict[str, Any]:
    family = "Gemma4" if draft.backbone.sandwich else "Qwen3"
    shared = {
        "num_target_layers": text["num_hidden_layers"],
        "num_hidden_layers": len(draft.layers),
        "layer_types": ["full_attention"] * len(draft.layers),
        "target_layer_ids": list(draft.target_layer_ids),
        "tie_word_embeddings": False,
    }
    if isinstance(draft, Eagle3):
        return shared | {
            "architectures": [f"{family}Eagle3Model"],
            "ttt_length": draft.block_size,
            "draft_num_hidden_layers": len(draft.layers),
        }
    if isinstance(draft, ParallelDraft):
        markov = draft.markov_head if isinstance(draft, DSpark) else None
        confident = isinstance(draft, DSpark) and draft.confidence_head is not None
        return shared | {
            "architectures": [f"{family}DSparkModel"],
            "block_size": draft.block_size,
            "mask_token_id": draft.mask_token_id,
            "num_anchors": draft.anchors_per_sample,
            "markov_rank": 0 if markov is None else markov.rank,
            "markov_head_type": "vanilla" if markov is None else markov.kind,
            "enable_confidence_head": confident,
            "confidence_head_with_markov": isinstance(draft, DSpark) and draft.confidence_with_markov,
        }
    return shared | {"architectures": [f"SpecBench{type(draft).__name__}"]}
