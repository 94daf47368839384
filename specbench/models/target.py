"""Targets: the language models that drafts are trained for. The only importer of transformers' models.

A target gives context features by hooks on its decoder layers (raw residual stream), its final hidden state after the
final norm, and ragged incremental decoding with per-row roll-back. Models whose own cache cannot be rolled back row by
row (recurrent or compressed attention) are recomputed from their tokens instead.

Axes: B rows, T tokens, S new tokens, C taps, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from specbench.blocks import Context
from specbench.files.atomic import read_object
from specbench.models.backbone import backbone_of
from specbench.models.embedding_head import Tables
from specbench.models.fast.direct_pass import DirectPass, fits
from specbench.models.kv_cache import KVCache

ROLLED_BACK_BY_LENGTH = {"full_attention", "sliding_attention"}


@dataclass
class TargetState:
    """What the target remembers of B requests: keys and values, or (recomputed targets) the tokens themselves."""

    cache: KVCache

    def advance(self, counts: Int[Tensor, " B"] | int) -> None:
        """Count `counts` of the tokens extended last; not advancing is rolling back."""
        self.cache.advance(counts)

    def select(self, rows: Int[Tensor, " R"]) -> TargetState:
        """The chosen requests."""
        return TargetState(self.cache.select(rows))

    def merge(self, other: TargetState) -> TargetState:
        """Both states' requests."""
        return TargetState(self.cache.merge(other.cache))


class _Bridge:
    """What transformers' attention layers see of a KVCache (their layout is (B, G, T, d))."""

    is_compileable = False

    def __init__(self, cache: KVCache):
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        stored = self.cache.write(layer, keys.transpose(1, 2), values.transpose(1, 2))
        return stored[0].transpose(1, 2), stored[1].transpose(1, 2)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.cache.longest


class Target:
    """A frozen causal language model with its tokenizer, taps and tables."""

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        target_layer_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "target",
        revision: str | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.config, self.tokenizer, self.name, self.revision = dict(config), tokenizer, name, revision
        self.text = dict(config.get("text_config") or config)
        inner = model.model
        self.decoder: nn.Module = getattr(inner, "language_model", inner)
        self.layers: nn.ModuleList = self.decoder.layers
        self.target_layer_ids = tuple(target_layer_ids)
        outside = [i for i in self.target_layer_ids if not -1 <= i < len(self.layers)]
        if outside:
            raise ValueError(
                f"target_layer_ids={outside}: {name} has layers 0 to {len(self.layers) - 1} (-1: embedding)"
            )
        facts = backbone_of(config)
        head = model.get_output_embeddings().weight.detach()
        embedding = model.get_input_embeddings().weight.detach()
        self.tables = Tables(embedding, head, facts.embedding_scale, facts.soft_cap)
        kinds = self.text.get("layer_types") or ["full_attention"] * len(self.layers)
        self.recomputes = not set(kinds) <= ROLLED_BACK_BY_LENGTH
        self.kinds, self.window = kinds, self.text.get("sliding_window")
        self.stop_token_ids = self._stops() if stop_token_ids is None else tuple(stop_token_ids)
        # The pass that `extend` takes: our own where it can, the library's where this is None.
        self.direct = DirectPass(self.text, self.decoder) if fits(self.text, embedding.dtype) else None
        self._captured: dict[int, Tensor] = {}
        for layer_id in self.target_layer_ids:
            module = self.layers[layer_id] if layer_id >= 0 else model.get_input_embeddings()
            module.register_forward_hook(self._capture(layer_id))

    @classmethod
    def load(
        cls,
        id: str | Path,
        target_layer_ids: Sequence[int],
        revision: str | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        name: str | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ) -> Target:
        """Load a local folder or a hub id; `stop_token_ids=[]` means that no token ends an answer."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        transformers_logging.disable_progress_bar()
        raw = raw_config(id, revision)
        try:
            model = AutoModelForCausalLM.from_pretrained(id, revision=revision, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(f"target {str(id)!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        tokenizer = None
        # A target without tokenizer files still decodes prompts that are already tokenised.
        if cached_file(
            str(id), "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
        ):
            tokenizer = AutoTokenizer.from_pretrained(id, revision=revision)
        return cls(
            model.to(device), raw, target_layer_ids, tokenizer, name or Path(str(id)).name, revision, stop_token_ids
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], target_layer_ids: Sequence[int], seed: int = 0, **kwargs) -> Target:
        """A target with random weights, for tests and tiny experiments."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = new_causal_lm(config)
        return cls(model, model.config.to_dict() | dict(config), target_layer_ids, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.tables.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tables.embedding.dtype

    @cached_property
    def weights_hash(self) -> str:
        """Digest of every parameter and buffer that is saved, independent of files and dtypes' names."""
        digest = xxhash.xxh3_128()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def logits(self, last: Float[Tensor, "*b D"]) -> Float[Tensor, "*b V"]:
        """The target's logits from its final hidden state."""
        return self.tables.logits(last)

    @torch.inference_mode()
    def live_logits(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, " B"]) -> Float[Tensor, "B T V"]:
        """The library model's own logits, by its own head: the oracle of what `states` captures."""
        return self.model(input_ids=tokens.to(self.device), use_cache=False).logits

    @torch.inference_mode()
    def states(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, " B"]) -> Context:
        """Taps and final states of right-padded rows in one causal pass, without a cache."""
        tokens = tokens.to(self.device)
        last = self.decoder(input_ids=tokens, use_cache=False).last_hidden_state
        return Context(self._taps(last), last, lengths.to(self.device))

    def prefill(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, " B"]) -> tuple[TargetState, Context]:
        """Start B requests from right-padded prompts."""
        if self.direct is not None:
            self.direct.stack.renew()
        state = TargetState(KVCache(len(tokens), self.device))
        context = self.extend(state, tokens)
        state.advance(lengths.to(self.device))
        return state, Context(context.taps, context.last, lengths.to(self.device))

    @torch.inference_mode()
    def extend(self, state: TargetState, tokens: Int[Tensor, "B S"]) -> Context:
        """States of S more tokens a row; they count only once the caller advances the state."""
        if self.recomputes:
            return self._recompute(state, tokens)
        if self.direct is None:
            taps, last = self._by_library(state.cache, tokens)
        else:
            taps, last = self.direct(state.cache, tokens, self.target_layer_ids)
        return Context(taps, last, torch.full((len(tokens),), tokens.shape[1], device=self.device))

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_new_tokens: int, stop_token_ids: Sequence[int] = ()) -> list[int]:
        """The library's own greedy generation for one prompt, its stop token included; the yardstick of our loop."""
        tokens = torch.tensor([list(prompt)], device=self.device)
        out = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # a model's own generation settings stay in force otherwise
            eos_token_id=list(stop_token_ids) or None,
            pad_token_id=0,
        )
        return out[0, len(prompt) :].tolist()

    def _by_library(self, cache: KVCache, tokens: Int[Tensor, "B S"]) -> tuple[Tensor, Tensor]:
        size = tokens.shape[1]
        position = cache.lengths[:, None] + torch.arange(size, device=self.device)
        mask = {"full_attention": cache.visible(size)}
        if "sliding_attention" in self.kinds:
            mask["sliding_attention"] = cache.visible(size, window=self.window)
        if not self.text.get("layer_types"):
            mask = mask["full_attention"]
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device) if mask is None else mask
        out = self.decoder(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=position,
            past_key_values=_Bridge(cache),
            use_cache=True,
        )
        return self._taps(out.last_hidden_state), out.last_hidden_state

    def _recompute(self, state: TargetState, tokens: Int[Tensor, "B S"]) -> Context:
        cache, size = state.cache, tokens.shape[1]
        stored, _ = cache.write(0, tokens[..., None, None], tokens[..., None, None])
        full = self.states(stored[..., 0, 0], cache.lengths + size)
        rows = torch.arange(len(tokens), device=self.device)[:, None]
        at = cache.lengths[:, None] + torch.arange(size, device=self.device)
        return Context(full.taps[rows, at], full.last[rows, at], torch.full((len(tokens),), size, device=self.device))

    def _capture(self, layer_id: int):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            # Hyper-connection streams (B, T, streams, D) enter a tap as their mean.
            self._captured[layer_id] = states.mean(2) if states.dim() == 4 else states

        return hook

    def _taps(self, last: Float[Tensor, "B T D"]) -> Float[Tensor, "B T C D"]:
        if not self.target_layer_ids:
            return last.new_empty(*last.shape[:2], 0, last.shape[2])
        taps = torch.stack([self._captured[i] for i in self.target_layer_ids], 2)
        self._captured.clear()
        return taps

    def _stops(self) -> tuple[int, ...]:
        declared = getattr(self.model, "generation_config", None)
        found = getattr(declared, "eos_token_id", None)
        if found is None:
            found = self.text.get("eos_token_id")
        ids = set([found] if isinstance(found, int) else found or [])
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return tuple(sorted(ids))


def raw_config(id: str | Path, revision: str | None = None) -> dict[str, Any]:
    """config.json of a folder or hub id, as it stands there."""
    try:
        found = cached_file(str(id), "config.json", revision=revision)
        if found is None:
            raise ValueError("there is none")
        return read_object(found)
    except (OSError, ValueError) as error:
        raise ValueError(f"target {str(id)!r} has no readable config.json: {str(error).splitlines()[0]}") from error


def new_causal_lm(config: Mapping[str, Any]) -> nn.Module:
    """A randomly initialised causal language model of a raw configuration (`model_type` names the architecture)."""
    settings = {k: v for k, v in dict(config).items() if k != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings)).eval()


def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> None:
    """Write a model and its tokenizer in the library's own folder format (safetensors)."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
