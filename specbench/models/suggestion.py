"""What to set for a target of one's own: taps, mask token, stop tokens, chat options, a first learning rate.

Every value comes with the reason for it. Only configuration and tokenizer are read, no weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from specbench.models.backbone import chosen
from specbench.models.target_files import generation_stops, location, mask_token_of, raw_config, read_tokenizer

TAPS = 5
# Width and learning rate of the recipes that are known: trainer=laptop on the embedded target, the published one from
# Qwen3-4B on. A rate between them follows the straight line through both on logarithmic axes.
NARROW, WIDE = (128, 2e-3), (2560, 6e-4)
OPTIONS = ("enable_thinking", "reasoning_effort", "thinking")


@dataclass(frozen=True)
class Suggestion:
    """Settings of configs/target for one model, with the reason for each, and `notes` on what is set elsewhere."""

    values: dict[str, Any]
    reasons: dict[str, str]
    notes: list[str]

    def yaml(self) -> str:
        """The file to write as configs/target/NAME.yaml, or to read settings from."""
        width = max(len(f"{key}: {json.dumps(value)}") for key, value in self.values.items())
        lines = [
            "# A suggestion: look at every value before numbers depend on it.",
            "defaults: [folder, _self_]",
        ]
        for key, value in self.values.items():
            setting = f"{key}: {json.dumps(value)}"
            lines.append(f"{setting:<{width}}  # {self.reasons[key]}")
        return "\n".join([*lines, *(f"# {note}" for note in self.notes)]) + "\n"


def suggest(id: str | Path, revision: str | None = None) -> Suggestion:
    """Settings for the model of a folder or hub id. Errors: ValueError for one that cannot be read."""
    place = location(id)
    raw = raw_config(place, revision)
    text = raw.get("text_config") or raw
    try:
        layers, rows, width = (int(text[key]) for key in ("num_hidden_layers", "vocab_size", "hidden_size"))
    except KeyError as error:
        raise ValueError(f"target {str(id)!r}: its config.json has no {error}, which a suggestion needs") from error
    tokenizer = read_tokenizer(place, revision, rows)
    stops = sorted({*generation_stops(place, revision), *_declared(text), *_ending(tokenizer)})
    mask, why = suggested_mask(tokenizer, rows, stops)
    length = text.get("max_position_embeddings")
    values: dict[str, Any] = {
        "name": Path(str(id)).name.lower().replace("-", "_").replace(".", "_"),
        "id": str(id),
        "target_layer_ids": spread(layers),
        "mask_token_id": mask,
        "stop_token_ids": None,
        "thinking": None,
        "max_length": min(4096, int(length)) if length else 4096,
    }
    options = [word for word in OPTIONS if tokenizer is not None and word in str(tokenizer.chat_template or "")]
    templated = tokenizer is not None and bool(tokenizer.chat_template)
    chat = (
        f"its template reads {', '.join(options) or 'no such option'}" if templated else "no template: answers need one"
    )
    reasons = {
        "name": "of folders and tables",
        "id": "folder or hub id",
        "target_layer_ids": f"of {layers} layers, evenly from 1 to L - 3, as released Qwen3 drafts; the final layer "
        "is left out, which released evaluators refuse",
        "mask_token_id": why,
        "stop_token_ids": f"null: the model's own, {_named(tokenizer, stops)}",
        "thinking": chat,
        "max_length": f"longest conversation; the model reads {length} positions",
    }
    rate = learning_rate(width)
    known = f"{NARROW[1]:g} at width {NARROW[0]} (trainer=laptop) and {WIDE[1]:g} from {WIDE[0]} on (published)"
    why_rate = f"for width {width}, by {known}; compare two rates for a few hundred steps"
    layer = f"draft layers: {chosen(raw).reason}"
    return Suggestion(values, reasons, [layer, f"trainer.recipe.lr={rate:g} {why_rate}"])


def learning_rate(width: int) -> float:
    """A first learning rate for drafts of a target of this width, to one digit."""
    (low, high), (slow, fast) = (math.log(WIDE[1]), math.log(NARROW[1])), (math.log(NARROW[0]), math.log(WIDE[0]))
    share = min(1.0, max(0.0, (math.log(width) - slow) / (fast - slow)))
    return float(f"{math.exp(high + share * (low - high)):.0e}")


def spread(layers: int, count: int = TAPS) -> list[int]:
    """`count` layers, evenly from layer 1 to layer L - 3; fewer where there are not as many."""
    last = max(layers - 3, 0)
    first = min(1, last)
    taps = {first + round(i * (last - first) / (count - 1)) for i in range(count)}
    return sorted(taps)


def suggested_mask(
    tokenizer: PreTrainedTokenizerBase | None, rows: int, stops: Sequence[int]
) -> tuple[int | None, str]:
    """A token that no text holds, and why that one; (None, why) where only the user can say."""
    try:
        return mask_token_of(tokenizer, rows, stops)
    except ValueError:
        if tokenizer is None:
            return None, "no tokenizer is there to find one by: name a token that no text holds"
        taken = {*stops, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        template = str(tokenizer.chat_template or "")
        control = [
            (i, token.content)
            for i, token in sorted(tokenizer.added_tokens_decoder.items())
            if token.special and i not in taken and i < rows and token.content not in template
        ]
        if not control:
            return None, "no unused row and no control token outside of the template: name a token that no text holds"
        i, word = control[-1]
        return i, f"{word}, the last control token that neither the template nor a stop token uses; no row is unused"


def _declared(text: dict[str, Any]) -> list[int]:
    found = text.get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def _ending(tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    return [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _named(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> str:
    if not ids:
        return "none, so answers end at their limit"
    words = tokenizer.convert_ids_to_tokens(list(ids)) if tokenizer is not None else ids
    return ", ".join(f"{word} {i}" if tokenizer is not None else str(i) for word, i in zip(words, ids, strict=True))
