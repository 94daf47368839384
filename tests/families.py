"""Tiny random targets of many architectures: widths of 32, two to four layers, windows shorter than the texts."""

from __future__ import annotations

from typing import Any

V = 128
_SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_WINDOW = {"sliding_window": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    **_SIZES,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_MIXED = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "llama, llama3 rope": {**_GROUPED, "rope_parameters": _LLAMA3},
    "mistral": {**_GROUPED, **_WINDOW},
    "mixtral": {**_GROUPED, **_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": _GROUPED,
    "qwen2, window": {**_GROUPED, **_WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": _GROUPED,
    "qwen3_moe": {**_GROUPED, **_EXPERTS},
    "qwen3_next": {**_GROUPED, **_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 24},
    "qwen3_5_text": {**_GROUPED, **_LINEAR},
    "phi3": {**_GROUPED, **_WINDOW},
    "gemma": _GROUPED,
    "gemma2": {**_GROUPED, **_WINDOW, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_GROUPED, **_WINDOW, **_MIXED},
    "gemma4_text": {
        **_GROUPED,
        **_WINDOW,
        **_MIXED,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": V,
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": 5.0,
    },
    "gpt_oss": {**_GROUPED, **_WINDOW, **_MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {
        **_GROUPED,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.3,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "cohere2": {**_GROUPED, **_WINDOW, **_MIXED, "logit_scale": 0.25, "tie_word_embeddings": True},
    "olmo2": _GROUPED,
    "olmo3": {**_GROUPED, **_WINDOW, **_MIXED},
    "glm4": {**_GROUPED, "partial_rotary_factor": 0.5},
    "glm4_moe": {**_GROUPED, **_ROUTED},
    "deepseek_v3": {**_LATENT, **_ROUTED},
    "deepseek_v4": {
        **_SIZES,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        "sliding_window": 8,
    },
    "llama4_text": {
        **_GROUPED,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "smollm3": {**_GROUPED, "no_rope_layers": [1, 0]},
    "falcon_h1": {
        **_GROUPED,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
        "lm_head_multiplier": 0.4,
        "embedding_multiplier": 2.0,
    },
    "gpt2": {
        "vocab_size": V,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    "gpt_neox": {**_SIZES, "rotary_pct": 0.5},
}


def config(name: str) -> dict[str, Any]:
    """The configuration of a family; "FAMILY, variant" is of type FAMILY."""
    return {"model_type": name.split(",")[0], **CONFIGS[name]}
