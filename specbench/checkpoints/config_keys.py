"""Reading of a published config.json with a check of every key.

A loader that ignores a key can decode with another draft than was trained. So every key, nested ones too, is read here,
or is listed in IRRELEVANT with the reason, or has one of the values in NEUTRAL that mean "not used"; any other key is
an error that names it. The types of values are checked.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# Keys that do not affect the computation of a draft, by reason.
IRRELEVANT: dict[str, str] = {
    "bookkeeping": """_name_or_path name_or_path _commit_hash architectures auto_map model_type transformers_version
        speculators_version dtype torch_dtype _attn_implementation attn_implementation _attn_implementation_autoset
        attn_implementation_autoset has_no_defaults_at_init use_cache pretraining_tp return_dict use_return_dict
        output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward
        is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention tie_encoder_decoder pruned_heads
        finetuning_task id2label label2id num_labels task_specific_params problem_type prefix tokenizer_class""",
    "the target's own, which decides on tokens, positions and stops": """bos_token_id eos_token_id pad_token_id
        sep_token_id decoder_start_token_id max_position_embeddings num_target_layers target_layer_count
        target_model_type target_text_model_type target_model_name_or_path verifier""",
    "generation settings, which decoding here takes from its own": """max_length min_length do_sample early_stopping
        num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
        length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
        output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens verifier_accept_k accept_tolerance
        algorithm default_proposal_method""",
    "of experts, which no draft has (num_experts decides)": """decoder_sparse_step mlp_only_layers norm_topk_prob
        num_experts_per_tok output_router_logits router_aux_loss_coef shared_expert_intermediate_size""",
    "training alone": """initializer_range attention_dropout hidden_dropout dropout step_loss_decay loss_decay_gamma
        embed_requires_grad max_anchors confidence_head_alpha ce_loss_alpha l1_loss_alpha ttt_steps
        ttt_step_loss_decay gradient_checkpointing""",
}
REASONS = {key: reason for reason, keys in IRRELEVANT.items() for key in keys.split()}
# Keys that change the computation unless they have one of these values, and what they mean otherwise.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization_config": ((None,), "quantised weights; give the checkpoint of full precision"),
    "compression_config": ((None,), "compressed weights; give the checkpoint of full precision"),
    "mlp_bias": ((None, False), "biases in the feed-forward"),
    "bias": ((None, False), "a bias in the fusion of the taps"),
    "qkv_bias": ((None, False), "biases of queries, keys and values alone"),
    "tie_word_embeddings": ((None, False), "a head that is the embedding"),
    "norm_before_residual": ((None, False), "a residual on the normed feature"),
    "fc_norm": ((None, False), "a norm of each tap"),
    "norm_before_fc": ((None, False), "a norm of the taps together"),
    "norm_output": ((None, False), "normed outputs that are fed back"),
    "logit_scale": ((None, 1), "scaled logits, which some engines apply to this format and others do not"),
    "output_multiplier": ((None, 1), "scaled logits, which this format does not define"),
    "final_logit_softcapping": ((None, 0), "capped logits, which some engines apply to this format and others do not"),
    "input_embedding_scale": ((None, 1), "scaled embeddings, which this format does not define"),
    "embedding_multiplier": ((None, 1), "scaled embeddings"),
    "residual_multiplier": ((None, 1), "scaled residuals"),
    "attention_multiplier": ((None,), "another scale of attention scores"),
    "logits_scaling": ((None, 1), "divided logits"),
    "scale_emb": ((None, 1), "scaled embeddings"),
    "attn_logit_softcapping": ((None, 0), "capped attention scores"),
    "is_causal": ((None,), "another attention inside a block or chain"),
    "causal": ((None,), "another attention inside a block or chain"),
    "causal_head": ((None,), "another attention inside a block or chain"),
    "use_swa": ((None, False), "a sliding window in every layer"),
    "attention_sink_bias": ((None, False), "attention sinks"),
    "add_swa_attention_sink_bias": ((None, False), "attention sinks"),
    "is_neox_style": ((None, True), "interleaved rope"),
    "rope_interleave": ((None, False), "interleaved rope"),
    "partial_rotary_factor": ((None, 1), "rope on a part of each head"),
    "projector_type": ((None, "dflash"), "a head on top of DFlash"),
    "attention_mode": ((None, "gqa"), "another attention than grouped queries"),
    "parallel_drafting": ((None, False), "a draft that proposes all tokens in one pass (P-EAGLE)"),
    "parallel_draft_step": ((None, 1), "a draft that proposes several tokens per pass"),
    "use_aux_hidden_state": ((None, True), "the last state alone as feature, as EAGLE-1 has it"),
    "use_input_layernorm_in_first_layer": ((None, True), "an embedding without a norm"),
    "use_last_layernorm": ((None, True), "logits without a norm before"),
    "use_mtp_layernorm": ((None, False), "further norms of the features"),
    "has_lm_head": ((None, True), "a draft without a head"),
    "position_embedding_type": ((None, "rope"), "other positions than rope"),
    "conv_kernel_size": ((None, 0), "convolutions along the block (DFlash2)"),
    "conv_group_size": ((None, 0), "convolutions along the block (DFlash2)"),
    "selector_rank": ((None, 0), "a candidate selector (DFlash2)"),
    "selector_top_k": ((None, 0), "a candidate selector (DFlash2)"),
    "pure_draft_prefix_len": ((None, 0), "a recurrent head (Domino)"),
    "shift_label": ((None, False), "a recurrent head (Domino)"),
    "emb_dim": ((None, 0), "a recurrent head (Domino)"),
    "gru_hidden_dim": ((None, 0), "a recurrent head (Domino)"),
    "num_experts": ((None, 0), "experts"),
    "top_k_experts": ((None, 0), "experts"),
    "moe_intermediate_size": ((None, 0), "experts"),
    "enable_moe_block": ((None, False), "experts"),
    "use_double_wide_mlp": ((None, False), "a feed-forward of twice the width"),
    "hidden_size_per_layer_input": ((None, 0), "embeddings of each layer's own"),
    "num_kv_shared_layers": ((None, 0), "layers that share keys and values"),
    "use_bidirectional_attention": ((None, False), "attention to later tokens"),
}


class FormatError(ValueError):
    """A draft folder that cannot be read as any known format, or a draft that a format cannot hold."""


class Keys:
    """A mapping of config.json that remembers which of its keys were read. Errors: FormatError naming the key.

    `get` and the typed readers return `default` for a key that is absent or null.
    """

    def __init__(self, values: Mapping[str, Any], path: str = ""):
        self.values, self.path = values, path
        self._read: set[str] = set()
        self._sections: dict[str, Keys] = {}

    def __contains__(self, key: str) -> bool:
        """Whether the key is there and not null; asking does not count as reading."""
        return self.values.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def section(self, key: str) -> Keys:
        """A nested mapping, whose keys are followed too; an empty one where it is absent."""
        if key not in self._sections:
            self._sections[key] = Keys(self._typed(key, dict, "a mapping", {}), f"{self.path}{key}.")
        return self._sections[key]

    def flag(self, key: str, default: bool | None = False) -> Any:
        return self._typed(key, bool, "true or false", default)

    def text(self, key: str, default: str | None = None) -> Any:
        return self._typed(key, str, "text", default)

    def items(self, key: str) -> list[Any] | None:
        return self._typed(key, list, "a list", None)

    def integers(self, key: str) -> list[int] | None:
        found = self.items(key)
        if found is not None and not all(type(value) is int for value in found):
            raise FormatError(f"config.json: {self.path}{key}={found!r} is not a list of whole numbers")
        return found

    def choice(self, key: str, choices: Collection[str], default: str | None = None) -> Any:
        """One of several words."""
        found = self.text(key, default)
        if found is not None and found not in choices:
            raise FormatError(f"config.json: {self.path}{key}={found!r} is not known; known: {', '.join(choices)}")
        return found

    def integer(self, key: str, default: int | None = None) -> Any:
        return self._typed(key, int, "a whole number", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """A finite number."""
        found = self._typed(key, (int, float), "a number", default)
        if found is not None and not math.isfinite(found):
            raise FormatError(f"config.json: {self.path}{key}={found!r} is not finite")
        return None if found is None else float(found)

    def needed(self, key: str) -> str:
        """The key itself, if it is there. Errors: FormatError naming it."""
        if key not in self:
            raise FormatError(f"config.json lacks {self.path + key!r}, which this architecture needs")
        return key

    def settle(self) -> None:
        """Check every key that was not read. Errors: FormatError naming those that can affect the draft."""
        wrong = list(self._unsettled())
        if wrong:
            raise FormatError(
                f"config.json: {'; '.join(wrong)}. A draft is loaded as it was trained or not at all; take a key out "
                "of config.json only if you know that it does not change the draft"
            )

    def _unsettled(self) -> Iterator[str]:
        for key, value in self.values.items():
            if key in self._sections:
                yield from self._sections[key]._unsettled()
            elif key in self._read or key in REASONS:
                continue
            elif key not in NEUTRAL:
                yield f"{self.path}{key} is not known here"
            elif not any(value is neutral or _equal(value, neutral) for neutral in NEUTRAL[key][0]):
                yield f"{self.path}{key}={value!r} asks for {NEUTRAL[key][1]}, which this draft cannot have here"

    def _typed(self, key: str, kind: Any, what: str, default: Any) -> Any:
        found = self.get(key)
        if found is None:
            return default
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise FormatError(f"config.json: {self.path}{key}={found!r} is not {what}")
        return found


def agreed(key: str, *sections: Keys) -> Any:
    """The value of a key that can be in any of `sections`; None if it is in none.

    Errors: FormatError if two of them have different values.
    """
    said = [(section.path + key, section.get(key)) for section in sections if key in section]
    if any(value != said[0][1] for _, value in said):
        raise FormatError(
            "config.json contradicts itself: " + " and ".join(f"{where}={value!r}" for where, value in said)
        )
    for section in sections:
        section.get(key)
    return said[0][1] if said else None


def agreed_flag(key: str, *sections: Keys) -> bool | None:
    """`agreed` of a key that is true or false."""
    for section in sections:
        section.flag(key)
    return agreed(key, *sections)


def agreed_number(key: str, *sections: Keys) -> float | None:
    """`agreed` of a key that is a finite number."""
    for section in sections:
        section.number(key)
    found = agreed(key, *sections)
    return None if found is None else float(found)


def _equal(value: Any, neutral: Any) -> bool:
    """Equality in which true is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
