"""Targets: the language models that drafts are trained for, whatever their family.

A target gives context features by hooks on its decoder layers (raw residual stream), its final hidden state after the
final norm, and ragged incremental decoding with per-row roll-back. Models whose own cache cannot be rolled back row by
row (recurrent or compressed attention) are recomputed from their tokens instead. What a target gives is held against
the library's own forward pass when it is loaded (selfcheck.py).

Axes: B rows, T tokens, S new tokens, C taps, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from specbench import fast
from specbench.blocks import Context
from specbench.models import selfcheck
from specbench.models.branches import Branches
from specbench.models.embedding_head import Tables
from specbench.models.fast.direct_pass import DirectPass
from specbench.models.kv_cache import KVCache
from specbench.models.library_pass import (
    Masks,
    Unsupported,
    anatomy,
    final_states,
    first_of,
    head_function,
    one_stream,
    run,
    run_whole,
    stated_positions,
)
from specbench.models.target_files import (
    location,
    raw_config,
    read_model,
    read_tokenizer,
    require_finite,
    require_ids,
    tell_of_stops,
)

__all__ = ["Target", "TargetState", "new_causal_lm", "raw_config", "save"]

ROLLED_BACK_BY_LENGTH = {"full_attention", "sliding_attention", "chunked_attention"}
# Rope whose frequencies change with the length of the longest text in the batch.
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
TOKENS = -1  # the layer of a cache that holds the tokens themselves


@dataclass
class TargetState:
    """What the target remembers of B requests: keys and values, or (recomputed targets) the tokens themselves.

    tokens_only: keys and values are missing, because a text was so long that rope changes with its length.
    """

    cache: KVCache
    tokens_only: bool = False

    def advance(self, counts: Int[Tensor, " B"] | int) -> None:
        """Count `counts` of the tokens extended last; not advancing is rolling back."""
        self.cache.advance(counts)

    @torch.inference_mode()
    def keep(self, path: Int[Tensor, "B P"]) -> None:
        """Of the tree that was extended last, move the tokens at the places `path` to its beginning; none is
        counted."""
        self.cache.keep(path)

    def select(self, rows: Int[Tensor, " R"]) -> TargetState:
        """The chosen requests."""
        return TargetState(self.cache.select(rows), self.tokens_only)

    def shrink(self, rows: Int[Tensor, " R"]) -> None:
        """Keep the chosen requests only, in this order; those that stay in their place are not copied."""
        self.cache.shrink(rows)

    def merge(self, other: TargetState) -> TargetState:
        """Both states' requests; if one has tokens only, the other forgets its keys and values."""
        if self.tokens_only or other.tokens_only:
            self.forget_keys()
            other.forget_keys()
        return TargetState(self.cache.merge(other.cache), self.tokens_only)

    def forget_keys(self) -> None:
        """Keep only the tokens, which the cache holds like the keys of a layer TOKENS."""
        self.cache.keep_layer(TOKENS)
        self.tokens_only = True


class Target:
    """A frozen causal language model with its tokenizer, taps and tables. `Target.load` reads one from a folder or
    the Hugging Face Hub.

    Args:
        model: a causal language model of transformers.
        config: its raw configuration, as in config.json.
        target_layer_ids: the taps, layers whose output drafts read, from 0, ascending; -1 is the output of the
            embedding.
        tokenizer: its tokenizer. None: prompts are given as token ids.
        name: name in tables and records.
        revision: commit, tag or branch from which it was loaded.
        stop_token_ids: tokens that end an answer. None: those of the model's own settings.

    Raises:
        ValueError: the model cannot be a target, or a tap does not exist.
    """

    # Id and revision that it was loaded by; None for one that was made in this process.
    source: tuple[str, str | None] | None = None

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
        self.parts = anatomy(model)
        self.decoder, self.layers = self.parts.decoder, self.parts.layers
        self.target_layer_ids = tuple(target_layer_ids)
        outside = [i for i in self.target_layer_ids if not -1 <= i < len(self.layers)]
        if outside:
            raise ValueError(
                f"target_layer_ids={outside}: {name} has layers 0 to {len(self.layers) - 1} (-1: embedding)"
            )
        factors, head = head_function(model, self.parts), self.parts.head
        embedding, bias = self.parts.embedding.weight.detach(), getattr(head, "bias", None)
        self.tables = Tables(
            embedding,
            head.weight.detach(),
            factors.embedding_scale,
            factors.soft_cap,
            logit_scale=factors.logit_scale,
            bias=None if bias is None else bias.detach(),
        )
        own = model.config.get_text_config(decoder=True)
        self.positions = stated_positions(own)
        kinds = set(getattr(own, "layer_types", None) or [])
        # Why incremental decoding is replaced by passes over whole texts; None where it is not.
        self.recomputed_because: str | None = None
        if not kinds <= ROLLED_BACK_BY_LENGTH:
            named = ", ".join(sorted(kinds - ROLLED_BACK_BY_LENGTH))
            self.recomputed_because = f"layers of kind {named} cannot be rolled back"
        # Whether a text's earlier states depend on its length, so that every prefix is a pass of its own.
        self.by_prefix = False
        self.rope_limit = _rope_limit(own)
        self._streams = factors.streams
        self._keeps_logits = "logits_to_keep" in signature(model.forward).parameters
        self.stop_token_ids = self._stops() if stop_token_ids is None else tuple(stop_token_ids)
        # Our own pass for `extend`; the library's is taken where this is None.
        self.direct = DirectPass.of(own.to_dict(), self.decoder)
        self.masks: Masks | None = None
        self._captured: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        self._tap()

    @classmethod
    def load(
        cls,
        id: str | Path,
        taps: Sequence[int],
        revision: str | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        name: str | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ) -> Target:
        """Load a causal language model of transformers from safetensors. No code of a checkpoint is run.

        The forward pass of the loaded target is compared with that of transformers (specbench/models/selfcheck.py).

        Args:
            id: a local folder, an id on the Hugging Face Hub, or `package:data/embedded`, the small target in this
                package.
            taps: layers whose output drafts read, counted from 0, ascending; -1 is the output of the embedding. `[]`:
                no taps, for decoding with a draft that has its own list.
            revision: commit, tag or branch on the Hub.
            dtype: number format of weights and states, as a name or a torch dtype.
            device: device of weights and states.
            name: name in tables and records. None: the last part of `id`.
            stop_token_ids: tokens that end an answer. None: those of generation_config.json. `[]`: none.

        Returns:
            The target, in evaluation mode.

        Raises:
            ValueError: the folder or id cannot be read, weights are missing, unused or not finite, a tap does not
                exist, or the forward pass does not agree with transformers.
        """
        source, id = (str(id), revision), location(id)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        raw = raw_config(id, revision)
        model = read_model(id, revision, dtype, raw).to(device)
        require_finite(id, model)
        rows = len(model.get_input_embeddings().weight)
        tokenizer = read_tokenizer(id, revision, rows)
        if stop_token_ids is None:
            tell_of_stops(id, revision, rows)
        elif beyond := [stop for stop in stop_token_ids if not 0 <= stop < rows]:
            raise ValueError(
                f"target.stop_token_ids={list(stop_token_ids)}: {beyond[0]} is beyond the target's vocabulary of {rows}"
            )
        name = name or Path(str(id)).name
        try:
            target = cls(model, raw, taps, tokenizer, name, revision, stop_token_ids)
        except Unsupported as error:
            raise ValueError(f"target {str(id)!r} cannot be used: {error}") from error
        target.source = source
        selfcheck.settle(target)
        return target

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        target_layer_ids: Sequence[int],
        seed: int = 0,
        device: str | torch.device = "cpu",
        **kwargs: Any,
    ) -> Target:
        """A target with random weights, for tests and small experiments.

        Args:
            config: raw configuration as in config.json; `model_type` names the architecture.
            target_layer_ids: layers whose output drafts read.
            seed: of the weights.
            device: device of weights and states.
            **kwargs: further arguments of the constructor.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = new_causal_lm(config).to(device)
        target = cls(model, model.config.to_dict() | dict(config), target_layer_ids, **kwargs)
        selfcheck.settle(target)
        return target

    @property
    def device(self) -> torch.device:
        return self.tables.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tables.embedding.dtype

    @property
    def decodes_directly(self) -> bool:
        """Whether `extend` runs our own pass (models/fast/direct_pass.py) and not the library's."""
        return self.direct is not None and fast.enabled()

    @cached_property
    def weights_hash(self) -> str:
        """Digest of every parameter and buffer that is saved, independent of files and dtypes' names."""
        digest = xxhash.xxh3_128()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def logits(self, last: Float[Tensor, "*b D"]) -> Float[Tensor, "*b V"]:
        """Logits of the target, with its bias, factor and soft-cap, from final states after the final norm."""
        return self.tables.logits(last)

    @torch.inference_mode()
    def live_logits(
        self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, " B"], keep: int | None = None
    ) -> Float[Tensor, "B kept V"]:
        """Logits of the model in transformers, by its own head and without a cache: the reference for all other
        passes.

        Args:
            tokens: right-padded rows.
            lengths: tokens of each row.
            keep: return only the last `keep` positions, if the model supports this. None: all.
        """
        few = {"logits_to_keep": keep} if keep is not None and self._keeps_logits else {}
        return self.model(input_ids=tokens.to(self.device), use_cache=False, **few).logits

    @torch.inference_mode()
    def states(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, " B"]) -> Context:
        """Taps (B, T, C, D) and final states (B, T, D) of right-padded rows, in one causal pass without a cache."""
        tokens, lengths = tokens.to(self.device), lengths.to(self.device)
        if len(tokens) == 1 or not (self.by_prefix or self._beyond(tokens.shape[1])):
            taps, last = self._whole(tokens)
            return Context(taps, last, lengths)
        # A row's states change with the length of what it runs in, so each runs at its own.
        rows = [self._whole(row[None, :count]) for row, count in zip(tokens, lengths.tolist(), strict=True)]
        room = [tokens.shape[1] - last.shape[1] for _, last in rows]
        taps = torch.cat([F.pad(part[0], (0, 0, 0, 0, 0, more)) for part, more in zip(rows, room, strict=True)])
        last = torch.cat([F.pad(part[1], (0, 0, 0, more)) for part, more in zip(rows, room, strict=True)])
        return Context(taps, last, lengths)

    def prefill(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, " B"]) -> tuple[TargetState, Context]:
        """Start B requests from right-padded prompts. Returns their state and the target states of all prompt
        tokens.
        """
        if self.decodes_directly:
            self.direct.stack.renew()
        state, lengths = TargetState(KVCache(len(tokens), self.device)), lengths.to(self.device)
        if self.recomputes or self._beyond(tokens.shape[1]):
            self._remember(state.cache, tokens)
            state.tokens_only = not self.recomputes
            context = self.states(tokens, lengths)
        else:
            context = self.extend(state, tokens)
        state.advance(lengths)
        return state, Context(context.taps, context.last, lengths)

    @torch.inference_mode()
    def extend(self, state: TargetState, tokens: Int[Tensor, "B S"], branches: Branches | None = None) -> Context:
        """Target states of S further tokens per row. They are part of the text only after `state.advance(counts)`.

        branches: the tokens form a tree; `state.keep(path)` then moves one path of it to the front, before `advance`.
        """
        changes = self._beyond(state.cache.longest + tokens.shape[1])
        if changes and not self.recomputes:
            state.forget_keys()
        elif state.tokens_only:
            # The long texts have left: one pass gives the keys and values of the others.
            known = state.cache.keys[TOKENS][:, 0, : state.cache.longest, 0]
            state.cache, state.tokens_only = self.prefill(known, state.cache.lengths)[0].cache, False
        cache, size = state.cache, tokens.shape[1]
        if self.recomputes or self.rope_limit is not None:
            stored = self._remember(cache, tokens)
        if branches is not None and (self.recomputes or changes):
            raise ValueError(f"{self.name} cannot read a tree: {self.no_trees_because(cache.longest + size)}")
        if self.by_prefix or changes:
            taps, last = self._prefixes(stored, cache.lengths, size)
        elif self.recomputes:
            taps, last = self._recompute(stored, cache.lengths, size)
        elif self.decodes_directly:
            taps, last = self.direct(cache, tokens, self.target_layer_ids, branches)
        else:
            taps, last = self._by_library(cache, tokens, branches)
        return Context(taps, last, torch.full((len(tokens),), size, device=self.device))

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_new_tokens: int, stop_token_ids: Sequence[int] = ()) -> list[int]:
        """Greedy generation of transformers for one prompt, the stop token included: the reference for decoding
        here.
        """
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

    def no_trees_because(self, longest: int) -> str | None:
        """Why trees of tokens cannot be read in texts of up to `longest` tokens, the tree's included; None where they
        can."""
        if self.recomputes:
            return f"{self.recomputed_because}, and every branch would be a pass over the whole text"
        if self._beyond(longest):
            return (
                f"its rope changes with texts of more than {self.rope_limit} tokens, and prompt, answer and tree have "
                f"up to {longest}"
            )
        if "position_ids" not in self.parts.takes and not self.decodes_directly:
            return "its decoder takes no positions, and the tokens of one depth share one"
        return None

    def _by_library(
        self, cache: KVCache, tokens: Int[Tensor, "B S"], branches: Branches | None = None
    ) -> tuple[Tensor, Tensor]:
        last = run(self.parts, cache, tokens, self.masks, branches)
        return self._taps(last), last

    def _whole(self, tokens: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        last = run_whole(self.parts, tokens)
        return self._taps(last), last

    def _beyond(self, count: int) -> bool:
        """Whether texts of `count` tokens are so long that the rope of all their tokens depends on it."""
        return self.rope_limit is not None and count > self.rope_limit

    @staticmethod
    def _remember(cache: KVCache, tokens: Int[Tensor, "B S"]) -> Int[Tensor, "B T"]:
        """Keep tokens like the keys of one more layer; returns all that are stored, the new ones included."""
        return cache.write(TOKENS, tokens[..., None, None], tokens[..., None, None])[0][..., 0, 0]

    def _recompute(self, stored: Int[Tensor, "B T"], lengths: Int[Tensor, " B"], size: int) -> tuple[Tensor, Tensor]:
        """States of the last `size` tokens of texts of `lengths` + `size`, by a pass over all of them."""
        full = self.states(stored, lengths + size)
        rows = torch.arange(len(stored), device=self.device)[:, None]
        at = lengths[:, None] + torch.arange(size, device=self.device)
        return full.taps[rows, at], full.last[rows, at]

    def _prefixes(self, stored: Int[Tensor, "B T"], lengths: Int[Tensor, " B"], size: int) -> tuple[Tensor, Tensor]:
        """The same by one pass for each prefix that ends at one of them."""
        rows = []
        for text, count in zip(stored, lengths.tolist(), strict=True):
            ends = [self._whole(text[None, : count + i + 1]) for i in range(size)]
            rows.append([torch.cat([end[part][:, -1:] for end in ends], 1) for part in range(2)])
        taps, last = (torch.cat([row[part] for row in rows]) for part in range(2))
        return taps, last

    @property
    def recomputes(self) -> bool:
        """Whether every extension is a pass over the whole texts."""
        return self.recomputed_because is not None

    @contextmanager
    def tapping(self, layer_ids: Sequence[int]) -> Iterator[None]:
        """Context in which the taps are those of other layers."""
        held, self.target_layer_ids = self.target_layer_ids, tuple(layer_ids)
        self._tap()
        try:
            yield
        finally:
            self.target_layer_ids = held
            self._tap()

    @torch.inference_mode()
    def library_states(self, tokens: Int[Tensor, "B T"]) -> tuple[Any, Float[Tensor, "B T C D"], Tensor]:
        """The pass of transformers over rows of one length: its whole output, taps and final states."""
        seen: list[Tensor] = []
        hook = self.decoder.register_forward_hook(lambda module, args, out: seen.append(final_states(out)))
        try:
            out = self.model(input_ids=tokens.to(self.device), use_cache=False, output_hidden_states=True)
        finally:
            hook.remove()
        return out, self._taps(seen[-1]), seen[-1]

    def require(self, texts: Sequence[Sequence[int]], new_tokens: int = 0, names: Sequence[str] | None = None) -> None:
        """Refuse texts that this target cannot read: ids beyond its vocabulary, or more tokens than its maximum
        length.

        Args:
            texts: token ids.
            new_tokens: tokens to be generated, which also need positions if positions are learnt.
            names: names of the texts in errors. None: prompts by number.

        Raises:
            ValueError: with the name of the first such text.
        """
        rows = len(self.tables.embedding)
        room = self.positions if self.parts.positions is None else self.parts.positions - new_tokens
        for i, text in enumerate(texts):
            name = f"prompt {i}" if names is None else names[i]
            require_ids(name, text, rows)
            if room is not None and len(text) > room:
                more = f" and is to get {new_tokens} more" if room != self.positions else ""
                raise ValueError(
                    f"{name} has {len(text)} tokens{more}, and {self.name} has {self.positions} positions: "
                    f"leave it out or shorten it{', or lower max_new_tokens' if more else ''}"
                )

    def _tap(self) -> None:
        """Hooks on the layers of `target_layer_ids`, instead of those that were there."""
        for hook in self._hooks:
            hook.remove()
        self._captured.clear()
        self._hooks = [
            self.layers[i].register_forward_hook(self._capture(i))
            if i >= 0
            else self.layers[0].register_forward_pre_hook(self._entering, with_kwargs=True)
            for i in sorted(set(self.target_layer_ids))
        ]

    def _entering(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._captured[-1] = one_stream(args[0] if args else kwargs["hidden_states"], self._streams)

    def _capture(self, layer_id: int):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._captured[layer_id] = one_stream(first_of(output), self._streams)

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


def _rope_limit(config: Any) -> int | None:
    """The length of text up to which rope does not depend on it; None where it never does."""
    stated = getattr(config, "rope_parameters", None) or {}
    sets = [stated, *(value for value in stated.values() if isinstance(value, dict))]
    limits = [
        found.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or stated_positions(config)
        for found in sets
        if found.get("rope_type", found.get("type")) in LENGTH_DEPENDENT_ROPE
    ]
    return min((limit for limit in limits if limit), default=None)


def new_causal_lm(config: Mapping[str, Any]) -> nn.Module:
    """A randomly initialised causal language model of a raw configuration (`model_type` names the architecture)."""
    settings = {k: v for k, v in dict(config).items() if k != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings)).eval()


def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> None:
    """Write a model and its tokenizer in the library's own folder format (safetensors)."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
