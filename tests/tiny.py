"""Tiny targets and drafts of every family and method, built from configurations; no downloads."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from specbench.blocks import Batch, Sample, pack
from specbench.cli.assembly import build_draft
from specbench.models.target import Target

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = {p.stem: p for p in sorted((CONFIGS / "method").glob("*.yaml"))}
METHODS = list(FILES)
# Those of the two families, whose layers are the target's. The others have heads without layers.
LAYERED = [method for method in METHODS if "layers" in OmegaConf.load(FILES[method]).draft]
VOCABULARY, MASK = 96, 95
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    **SIZES,
}
GEMMA4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    **SIZES,
}
PLAIN = {k: v for k, v in QWEN3.items() if k not in ("model_type", "head_dim")}
LLAMA = {
    **PLAIN,
    "model_type": "llama",
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
QWEN2 = {**PLAIN, "model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
PHI3 = {
    **PLAIN,
    "model_type": "phi3",
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.1, 1.7],
        "long_factor": [1.3, 5.0],
    },
}
GRANITE = {
    **PLAIN,
    "model_type": "granite",
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "embedding_multiplier": 3.0,
    "logits_scaling": 1.5,
}
GEMMA = {**PLAIN, "model_type": "gemma", "head_dim": 16, "pad_token_id": 0}
SANDWICHED = {**GEMMA, "query_pre_attn_scalar": 12, "sliding_window": 8}
GEMMA2 = {**SANDWICHED, "model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
GEMMA3 = {
    **SANDWICHED,
    "model_type": "gemma3_text",
    "layer_types": GEMMA4["layer_types"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
# A target of every family of specbench.models.backbone, with facts away from neutral.
FAMILIES = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "granite": GRANITE,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma4": GEMMA4,
}
# Families with which a default run tries every method; the others have the mark `long`.
USUAL = ("qwen3", "gemma4")


def across(methods: Iterable[str] = METHODS, *further: object) -> list:
    """Parameters (method, family, *further) of every method with every family."""
    return [
        pytest.param(method, family, *further, marks=() if family in USUAL else pytest.mark.long)
        for method in methods
        for family in FAMILIES
    ]


TAPS = (0, 2, 3)
SMALL = {"layers": 2, "block_size": 4, "markov_rank": 6, "correction_rank": 6, "gru_size": 10, "selector_rank": 6}


@cache
def target(family: str) -> Target:
    """A random target of four layers; its generator is its own."""
    return Target.from_config(FAMILIES[family], TAPS, seed=3, name=f"tiny_{family}", stop_token_ids=[])


def draft(method: str, family: str, seed: int = 0, **settings):
    """A random draft of the configuration of `method`, shrunk to two layers and K = 4."""
    cfg = OmegaConf.load(FILES[method])
    small = {key: size for key, size in SMALL.items() if key in cfg.draft}
    for key in ("backbone", "window", "objective"):
        if key in settings:
            cfg[key] = settings.pop(key)
    cfg.draft = OmegaConf.merge(cfg.draft, small, settings)
    owner = target(family)
    about = OmegaConf.create({"target_layer_ids": list(TAPS), "mask_token_id": MASK})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = build_draft(cfg, about, owner.config, owner.tables)
        built.randomise(std=0.2)
        for name, parameter in built.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
            elif any(zero in name for zero in ("markov_w2", "successor_codebook", "predecessor_codebook")):
                parameter.data.normal_(std=0.5)
    return built.eval()


def samples(family: str, lengths: tuple[int, ...] = (24, 17, 9), seed: int = 0, prompt: int = 4) -> list[Sample]:
    """Random conversations with the target's true states; the first `prompt` tokens are not supervised."""
    generator = torch.Generator().manual_seed(seed)
    owner, made = target(family), []
    for ordinal, length in enumerate(lengths):
        tokens = torch.randint(2, VOCABULARY - 1, (length,), generator=generator)
        context = owner.states(tokens[None], torch.tensor([length]))
        mask = torch.arange(length) >= prompt
        made.append(Sample(tokens, mask, context.taps[0].clone(), context.last[0].clone(), ordinal))
    return made


def batch(family: str, **kwargs) -> Batch:
    """Those conversations, one a row."""
    return pack(samples(family, **kwargs))
