"""Small checkpoints of every published format, written here by hand: configurations as their tools write them, and
random tensors under their names."""

from __future__ import annotations

import torch
from torch import Tensor

from tests import tiny

D, HEADS, KV, HEAD, WIDE, V, C = 32, 4, 2, 8, 48, tiny.VOCABULARY, 3
FACTS = {
    "hidden_size": D,
    "intermediate_size": WIDE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HEAD,
    "vocab_size": V,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
}
BOOKKEEPING = {"torch_dtype": "float32", "transformers_version": "4.57.1", "use_cache": True, "bos_token_id": 1}
BOOKKEEPING |= {"eos_token_id": 2, "initializer_range": 0.02, "attention_dropout": 0.0, "max_position_embeddings": 512}
TAPS = list(tiny.TAPS)
KINDS = (
    "sglang",
    "speculators_eagle3",
    "speculators_peagle",
    "speculators_dflash",
    "speculators_dspark",
    "z-lab",
    "deepspec",
    "deepspec_eagle3",
)


def config(kind: str) -> dict:
    """A configuration of the format with nothing unusual in it."""
    layer = FACTS | {"rope_theta": 5e4}
    proposals = [{"proposal_type": "greedy", "speculative_tokens": 4}]
    about = {"algorithm": "x", "default_proposal_method": "greedy", "proposal_methods": proposals}
    about |= {"verifier": {"name_or_path": "me/target", "architectures": []}}
    if kind == "sglang":
        inner = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": TAPS}
        own = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1}
        own |= {"draft_vocab_size": V, "tie_word_embeddings": False, "eagle_config": inner}
        return layer | BOOKKEEPING | own
    if kind.startswith("speculators"):
        name = kind.split("_")[1]
        eagle = name in ("eagle3", "peagle")
        inner = layer | {"model_type": "llama" if eagle else "qwen3", "num_hidden_layers": 1 if name == "eagle3" else 2}
        own = {"speculators_model_type": name, "transformer_layer_config": inner, "speculators_config": about}
        own |= {"draft_vocab_size": V, "target_hidden_size": None, "tie_word_embeddings": False}
        own |= {"speculators_version": "0.5.0", "architectures": [f"{name}Speculator"], "dtype": "float32"}
        if name == "peagle":
            own |= {"mask_token_id": tiny.MASK, "num_depths": 4, "down_sample_ratio": 0.7, "down_sample_ratio_min": 0.2}
        if eagle:
            return own | {"eagle_aux_hidden_state_layer_ids": [i + 1 for i in TAPS], "norm_before_residual": False}
        own |= {"aux_hidden_state_layer_ids": [i + 1 for i in TAPS], "mask_token_id": tiny.MASK, "block_size": 5}
        heads = {"markov_rank": 6, "markov_head_type": "vanilla", "enable_confidence_head": True}
        return own | ({"sample_from_anchor": True} | heads if name == "dspark" else {"sample_from_anchor": False})
    layer |= {"model_type": "qwen3", "num_hidden_layers": 2, "num_target_layers": 4, "tie_word_embeddings": False}
    layer |= {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 2} | BOOKKEEPING
    layer |= {"layer_types": ["full_attention"] * 2}
    if kind == "z-lab":
        inner = {"mask_token_id": tiny.MASK, "target_layer_ids": TAPS}
        about = {"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "rope_scaling": None}
        return layer | about | {"architectures": ["DFlashDraftModel"], "block_size": 5, "dflash_config": inner}
    if kind == "deepspec":
        own = {"architectures": ["Qwen3DSparkModel"], "block_size": 4, "mask_token_id": tiny.MASK, "num_anchors": 8}
        return layer | own | {"target_layer_ids": TAPS, "markov_rank": 0, "enable_confidence_head": False}
    own = {"architectures": ["Qwen3Eagle3Model"], "ttt_length": 4, "draft_num_hidden_layers": 1, "num_hidden_layers": 1}
    return layer | own | {"target_layer_ids": TAPS, "step_loss_decay": 0.8, "layer_types": ["full_attention"]}


def tensors(kind: str, seed: int = 0, rows: int = V, bias: str = "", qk_norms: bool | None = None) -> dict[str, Tensor]:
    """Random tensors under DeepSpec's names, tables included; projections in what `bias` names have biases."""
    generator = torch.Generator().manual_seed(seed)
    eagle, layers = "eagle" in kind or kind == "sglang", 1 if "eagle3" in kind or kind == "sglang" else 2
    shapes = {"embed_tokens": (V, D), "lm_head": (rows, D), "fc": (D, C * D), "norm": (D,)}
    if not eagle:
        shapes["hidden_norm"] = (D,)
    for i in range(layers):
        at, paired = f"layers.{i}", eagle and i == 0
        width = 2 * D if paired else D
        shapes |= {f"{at}.input_layernorm": (D,), f"{at}.post_attention_layernorm": (D,)}
        if paired:
            shapes[f"{at}.hidden_norm"] = (D,)
        for name, out in (("q", HEADS * HEAD), ("k", KV * HEAD), ("v", KV * HEAD)):
            shapes[f"{at}.self_attn.{name}_proj"] = (out, width)
        shapes[f"{at}.self_attn.o_proj"] = (D, HEADS * HEAD)
        if kind not in ("sglang", "speculators_eagle3", "speculators_peagle") if qk_norms is None else qk_norms:
            shapes |= {f"{at}.self_attn.q_norm": (HEAD,), f"{at}.self_attn.k_norm": (HEAD,)}
        shapes |= {f"{at}.mlp.gate_proj": (WIDE, D), f"{at}.mlp.up_proj": (WIDE, D), f"{at}.mlp.down_proj": (D, WIDE)}
    if kind == "speculators_dspark":
        shapes |= {
            "markov_head.markov_w1": (V, 6),
            "markov_head.markov_w2": (rows, 6),
            "confidence_head.proj": (1, D + 6),
        }
    found = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        found[f"{name}.weight"] = 1 + 0.3 * noise if len(shape) == 1 else 0.2 * noise
        if bias and bias in name and "proj" in name:
            found[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)
    if kind == "speculators_peagle":
        found["mask_hidden"] = torch.randn(1, 1, C * D, generator=generator)
    if kind == "speculators_dspark":
        found["confidence_head.proj.bias"] = torch.randn(1, generator=generator)
    return found


def stored(kind: str, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors under the format's own names, without the tables that it does not hold."""
    if kind == "z-lab":
        return {name: value for name, value in held.items() if name not in ("embed_tokens.weight", "lm_head.weight")}
    if kind == "sglang":
        return {name.replace("layers.0.", "midlayer."): value for name, value in held.items()}
    return held
