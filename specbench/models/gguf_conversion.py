"""Conversion of a GGUF file to a target folder: dequantised weights, configuration, tokenizer with its chat template.

transformers reads the file (it asks for the packages gguf and accelerate); its weights are copied into a plain model of
the same configuration, because a model that was read from GGUF counts as quantised and cannot be saved.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from specbench.models import gguf_tokenizer
from specbench.models.gguf_file import read_metadata, require_reader
from specbench.models.target import save
from specbench.models.target_files import location

# The values of a configuration that a GGUF file stores as float32 and that are converted back to decimals.
ROUNDED = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")


def convert(
    file: Path,
    folder: Path,
    dtype: str = "float32",
    tokenizer: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write the model of a GGUF file to `folder` in the format of transformers; returns facts for its provenance.

    dtype: of the written weights; float32 keeps the dequantised values. tokenizer: folder or Hub id of the original
    tokenizer, instead of the one in the file. say: called with a line at each step.
    Errors: ValueError for a file that cannot be read, or whose tokenizer cannot be rebuilt.
    """
    require_reader()
    transformers_logging.disable_progress_bar()
    say("reading the metadata")
    facts = read_metadata(file)
    say("rebuilding the tokenizer and holding it against the file's tables")
    coder, compared = _tokenizer(file, facts, tokenizer)
    say("reading and dequantising the weights")
    model = _model(file, getattr(torch, dtype))
    stops = gguf_tokenizer.stop_ids(facts)
    pad, start = coder.pad_token_id, coder.bos_token_id
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = stops[0] if len(stops) == 1 else stops or None
        settings.pad_token_id, settings.bos_token_id = pad, start
    save(model, coder, folder)
    return {
        "architecture": facts["general.architecture"],
        "model": facts.get("general.name"),
        "licence": facts.get("general.license"),
        "quantised_to": _kinds(file),
        "tokenizer": {"model": facts.get("tokenizer.ggml.model"), "pre": facts.get("tokenizer.ggml.pre")},
        "compared": compared,
        "stop_token_ids": stops,
        "chat_template": coder.chat_template is not None,
        "parameters": sum(value.numel() for value in model.parameters()),
        "dtype": dtype,
    }


def _tokenizer(file: Path, facts: dict[str, Any], given: str | None) -> tuple[PreTrainedTokenizerBase, list[str]]:
    if given is not None:
        try:
            coder = AutoTokenizer.from_pretrained(location(given), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer={given} cannot be loaded: {str(error).splitlines()[0]}") from error
    else:
        if facts.get("tokenizer.ggml.model") == "gpt2":
            gguf_tokenizer.splits(facts)  # raised before the slow part
        try:
            coder = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        except Exception as error:
            raise ValueError(
                f"the tokenizer of {file.name} is not understood by transformers ({error}): give "
                "tokenizer=FOLDER_OR_ID, the original model's"
            ) from error
        coder = gguf_tokenizer.corrected(coder, facts)
    compared = gguf_tokenizer.check(coder, facts, rebuilt=given is None)
    length = facts.get(f"{facts['general.architecture']}.context_length")
    if length is not None:
        coder.model_max_length = int(length)
    return coder, compared


def _model(file: Path, dtype: torch.dtype) -> nn.Module:
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            read = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
            )
    except Exception as error:
        raise ValueError(f"{file.name} is not understood by transformers: {error}") from error
    raw = {key: value for key, value in read.config.to_dict().items() if key not in ("quantization_config", "dtype")}
    raw.pop("_name_or_path", None)
    raw.pop("_model_name_or_path", None)
    for key in ROUNDED:
        if isinstance(raw.get(key), float):
            raw[key] = _decimal(raw[key])
    config: PretrainedConfig = type(read.config).from_dict(raw)
    config.architectures = [type(read).__name__]
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    return plain.eval().to(dtype)


def _decimal(value: float) -> float:
    """The shortest decimal number with the same float32 value: 9.999999747378752e-06 is 1e-05."""
    packed = struct.pack("<f", value)
    return next(short for digits in range(1, 18) if struct.pack("<f", short := float(f"{value:.{digits}g}")) == packed)


def _kinds(file: Path) -> dict[str, int]:
    """Number of tensors of each number format in the file."""
    from gguf import GGUFReader

    kinds: dict[str, int] = {}
    for tensor in GGUFReader(file).tensors:
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
    return dict(sorted(kinds.items()))
