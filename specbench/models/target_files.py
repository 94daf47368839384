"""The files of a target and their checks: configuration, weights, tokenizer.

Code in a folder or Hub repository is not run, pickled weights are not read, and weights that are missing, unused, of
another shape or not finite are refused with their names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from specbench.files.atomic import read_object

PICKLED = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "consolidated.00.pth",
)
# Weights of parts that the causal language model does not have: prediction heads for further tokens, encoders for
# images and sound, and buffers that older releases stored.
BESIDE = re.compile(
    r"(^|\.)(mtp|nextn|eh_proj|enorm|hnorm|shared_head|vision\w*|visual\w*|audio\w*|image_\w+|multi_modal_projector|"
    r"multimodal_projector|mm_projector|patch_embed)(\.|_|$)|(\.inv_freq|\.masked_bias|\.attn\.bias|attention\.bias)$"
)
# `package:PATH` is a path inside this package: the small targets that come with it are package:data/embedded and
# package:data/embedded_deep.
PACKAGED = "package:"
# Spellings of mask tokens in tokenizers.
MASKS = ("<|mask|>", "<mask>", "[MASK]", "<|MASK|>")
log = logging.getLogger("specbench")


def location(id: str | Path) -> str:
    """A target's id as a folder or hub id."""
    text = str(id)
    return str(Path(__file__).parents[1] / text.removeprefix(PACKAGED)) if text.startswith(PACKAGED) else text


def mask_token_of(
    tokenizer: PreTrainedTokenizerBase | None, rows: int, stop_token_ids: Sequence[int]
) -> tuple[int, str]:
    """The token id of the mask token (input of slots to be predicted), and the reason; `rows`: those of the embedding.

    The tokenizer's mask token, else the first row of the embedding that no token uses (the choice of DeepSpec for
    Qwen3), else a padding token that is not a stop token. Errors: ValueError if there is none of them.
    """
    if tokenizer is not None:
        own = tokenizer.mask_token_id
        spelled = [tokenizer.get_vocab().get(word) for word in MASKS]
        found = next((id for id in (own, *spelled) if id is not None and id < rows), None)
        if found is not None:
            return found, f"{tokenizer.convert_ids_to_tokens(found)} of the tokenizer"
        if len(tokenizer) < rows:
            return len(tokenizer), "the first row of the embedding that no token uses"
        padding = tokenizer.pad_token_id
        if padding is not None and padding < rows and padding not in stop_token_ids:
            return padding, f"{tokenizer.pad_token}, the padding token"
    raise ValueError(
        "the target has no mask token, no unused row of its embedding and no padding token of its own: give "
        "mask_token_id=ID, a token that never occurs in text"
    )


def raw_config(id: str | Path, revision: str | None = None) -> dict[str, Any]:
    """config.json of a folder or Hub id, unchanged."""
    try:
        found = cached_file(str(id), "config.json", revision=revision)
        if found is None:
            raise ValueError("there is none")
        return read_object(found)
    except (OSError, ValueError) as error:
        raise ValueError(f"target {str(id)!r} has no readable config.json: {_first(error)}") from error


def read_model(id: str | Path, revision: str | None, dtype: torch.dtype, raw: Mapping[str, Any]) -> nn.Module:
    """The causal language model of a folder or Hub id, with exactly the weights that it needs.

    Errors: ValueError naming the target and the reason.
    """
    transformers_logging.disable_progress_bar()
    # If peft is installed, transformers would load the base model from the location that the adapter names.
    if _beside(id, "adapter_config.json", revision):
        raise ValueError(
            f"target {str(id)!r} holds an adapter (adapter_config.json): merge it into its base model, save that "
            "whole, and use that folder"
        )
    generation_stops(id, revision)
    config = _config(id, revision, raw)
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            id,
            config=config,
            revision=revision,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the error below names them
        )
    except Exception as error:
        raise ValueError(f"target {str(id)!r} cannot be loaded: {_cause(id, revision, error)}") from error
    stated = raw.get("text_config") or raw
    layers, more = (stated.get(key) for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    _require_whole(id, told, range(layers, layers + more) if layers and more else range(0))
    return model


def generation_stops(id: str | Path, revision: str | None) -> list[int]:
    """The stop tokens of generation_config.json; none if there is no such file.

    Errors: ValueError if it cannot be read, because transformers would ignore it and its stop tokens.
    """
    found = _beside(id, "generation_config.json", revision)
    if found is None:
        return []
    try:
        stops = read_object(found).get("eos_token_id")
    except (OSError, ValueError) as error:
        raise ValueError(f"target {str(id)!r} has no readable generation_config.json: {_first(error)}") from error
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if wrong := [stop for stop in stops if not isinstance(stop, int) or isinstance(stop, bool) or stop < 0]:
        raise ValueError(
            f"target {str(id)!r}: generation_config.json states eos_token_id={wrong[0]!r}, which is not a token id"
        )
    return stops


def tell_of_stops(id: str | Path, revision: str | None, rows: int) -> None:
    """Warn once of a stop token beyond the `rows` of the embedding, which can never be generated."""
    if beyond := [stop for stop in generation_stops(id, revision) if stop >= rows]:
        log.warning(
            "target %r: its stop tokens %s lie beyond its vocabulary of %d, so none of them ends an answer",
            str(id),
            beyond,
            rows,
        )


def _beside(id: str | Path, name: str, revision: str | None) -> str | None:
    """Path of a file of a folder or Hub id; None if there is none."""
    return cached_file(
        str(id), name, revision=revision, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip


def _config(id: str | Path, revision: str | None, raw: Mapping[str, Any]) -> Any:
    kind = raw.get("model_type")
    try:
        config = AutoConfig.from_pretrained(id, revision=revision, trust_remote_code=False)
    except Exception as error:
        if raw.get("auto_map"):
            raise ValueError(
                f"target {str(id)!r} is a {kind!r} whose model is code of its own (auto_map of config.json), which is "
                "not run: use a checkpoint that the installed transformers knows by itself"
            ) from error
        known = "" if kind else ", which names no model_type"
        raise ValueError(f"target {str(id)!r}: its config.json{known} is not understood: {_first(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"target {str(id)!r} is an encoder-decoder ({kind}): a draft continues one text, so its target has to be a "
            "causal language model"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping.keys():  # noqa: SIM118
        raise ValueError(
            f"target {str(id)!r} is of type {kind!r}, for which the installed transformers has no causal language model"
        )
    return config


def _cause(id: str | Path, revision: str | None, error: Exception) -> str:
    found = [name for name in PICKLED if _beside(id, name, revision)]
    if isinstance(error, OSError) and found:
        return (
            f"its weights are in {found[0]}, which has to be unpickled and may run code: convert them to safetensors "
            "(save_pretrained of a model that you trust) and use that folder"
        )
    return _first(error)


def _require_whole(id: str | Path, told: Mapping[str, Any], predicting: range) -> None:
    """Refuse a checkpoint whose weights are not exactly those of its model. `predicting`: numbers of layers behind the
    last one, which predict further tokens and are not part of the target."""
    surplus = [key for key in sorted(told["unexpected_keys"]) if not BESIDE.search(key) and not _among(key, predicting)]
    mismatched = sorted(map(_shapes, told["mismatched_keys"]))
    for what, names, remedy in (
        ("lacks", sorted(told["missing_keys"]), "they would be random numbers; download or save it whole"),
        ("has other shapes than its config.json says:", mismatched, "config.json and weights belong to two models"),
        ("has weights that its model does not use:", surplus, "config.json names another model than these weights are"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"target {str(id)!r} {what} {', '.join(names[:3])}{more}: {remedy}")
    if told.get("error_msgs"):
        raise ValueError(f"target {str(id)!r} cannot be loaded: {' '.join(str(told['error_msgs']).split())}")


def _shapes(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    name, stored, wanted = entry
    return f"{name} {tuple(stored)}, not {tuple(wanted)}"


def _among(key: str, layers: range) -> bool:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    return found is not None and int(found[1]) in layers


def require_finite(id: str | Path, model: nn.Module) -> None:
    """Refuse weights with NaN or infinity; the message names them."""
    wrong = []
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.numel() and value.element_size() > 1:
            low, high = torch.aminmax(value)
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                wrong.append(name)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"target {str(id)!r}: {', '.join(wrong[:3])}{more} hold NaN or infinite numbers, so every logit would: "
            "download it again, or load it in a dtype with a wider range (target.dtype=float32)"
        )


def read_tokenizer(id: str | Path, revision: str | None, rows: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or hub id (None without one), whose ids have to be among the `rows` of the embedding.

    Added tokens without a row cause one warning, and an error if a text contains them.
    """
    # A target without tokenizer files can decode prompts of token ids.
    if not cached_file(
        str(id), "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
    ):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(id, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"target {str(id)!r} has a tokenizer that cannot be loaded: {_first(error)}") from error
    beyond = sorted((value, token) for token, value in tokenizer.get_vocab().items() if value >= rows)
    if not beyond:
        return tokenizer
    said = f"its tokenizer gives ids up to {beyond[-1][0]} ({beyond[-1][1]!r}) and its embedding has {rows} rows"
    added = set(tokenizer.get_added_vocab().values())
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if any(value not in added or value in ends for value, _ in beyond):
        raise ValueError(f"target {str(id)!r}: {said}: the tokenizer belongs to another model")
    log.warning("target %r: %s; a text with such a token is refused", str(id), said)
    return tokenizer


def require_ids(what: str, tokens: Sequence[int], rows: int) -> None:
    """Refuse token ids outside of the vocabulary. `what` names the text."""
    if len(tokens) and not (min(tokens) >= 0 and max(tokens) < rows):
        at = next(i for i, token in enumerate(tokens) if not 0 <= token < rows)
        raise ValueError(
            f"{what} holds the token id {int(tokens[at])} at position {at}, and the target's vocabulary ends at "
            f"{rows - 1}: the text was made with another tokenizer"
        )


def _first(error: BaseException) -> str:
    """The first sentence of a library's error, with the type of the error or its second line if it is not clear
    alone."""
    if isinstance(error, KeyError):
        return f"KeyError {error}: a name in its files that the installed transformers does not know, or a missing one"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__
