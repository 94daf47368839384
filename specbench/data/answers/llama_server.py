"""Requests to the server of llama.cpp: its names of the settings, and what it says it decoded with.

Its OpenAI interface differs from that of vLLM and SGLang in four points:

    names      no repetition_penalty (an unknown field is ignored in silence); top_k 0 is off; token ids come only with
               return_tokens and verbose, and lie in `__verbose`
    order      its samplers run in the order of `samplers`, by default with the temperature last, after top-k, top-p and
               min-p: another law at any temperature but 1. Here they run as in decoding.sampling.warp
    defaults   samplers that a request does not name (dry, xtc, typical_p, ...) are those of the server's command line:
               the list names all that run
    penalties  count tokens of the prompt too and only in a window, so they are refused

Every reply echoes the settings that were applied, so that a server that does otherwise is found out.

Source: llama.cpp b11434 tools/server/server-schema.cpp, server-task.cpp, server-context.cpp (init_sampler); read on
2026-11-27, run with b11549.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

OWNER = "llamacpp"  # owned_by of the models that it lists
SAMPLERS = ("temperature", "top_k", "top_p", "min_p")
# What no request here asks for, and what the echo says where it is off.
OFF = {"logit_bias": [], "grammar": "", "ignore_eos": False, "stop": [], "lora": []}


def translated(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request to vLLM under llama.cpp's names. Errors: ValueError for a penalty."""
    extra = dict(body["extra_body"])
    penalties = {
        "repetition_penalty": extra.pop("repetition_penalty"),
        "presence_penalty": body["presence_penalty"],
        "frequency_penalty": body["frequency_penalty"],
    }
    if given := [f"{name}={value:g}" for name, value in penalties.items() if value != (name == "repetition_penalty")]:
        raise ValueError(
            f"{', '.join(given)}: llama.cpp counts the tokens of the prompt too, and only those in a window, so its "
            "answers have another law; set repetition_penalty=1 and presence_penalty=0, or use vLLM or SGLang"
        )
    if extra.pop("return_token_ids", False):
        extra |= {"return_tokens": True, "verbose": True}
    extra["top_k"] = max(0, extra["top_k"])
    extra |= {"samplers": list(SAMPLERS), "dynatemp_range": 0.0, "mirostat": 0, "reasoning_format": "none"}
    return {**body, "extra_body": extra}


def tokens_of(extra: Mapping[str, Any]) -> Any:
    """The ids of an answer in the further fields of a reply; None where there are none."""
    return (extra.get("__verbose") or {}).get("tokens")


def differences(body: Mapping[str, Any], extra: Mapping[str, Any]) -> list[str]:
    """Settings that the reply says were applied and that the translated request did not send, as NAME=VALUE."""
    applied = (extra.get("__verbose") or {}).get("generation_settings")
    if applied is None:
        return []
    sent = {**OFF, **body, **body["extra_body"]}
    return [f"{name}={value!r}" for name, value in applied.items() if name in sent and not _same(value, sent[name])]


def _same(applied: Any, sent: Any) -> bool:
    """Equality of settings, of which the server keeps numbers in 32 bits."""
    if isinstance(sent, float):
        return isinstance(applied, (int, float)) and math.isclose(applied, sent, rel_tol=1e-6, abs_tol=1e-7)
    return applied == sent
