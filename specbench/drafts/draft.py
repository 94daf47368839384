"""The contract of every draft method.

A draft has two views. Training: `forward(batch)` computes all blocks at once, teacher-forced. Decoding: `begin` after
the target's prefill, then rounds of `propose` and `commit`. The contract tests check for every method that both agree.

A method contains no code about Lightning, temperature, transformers' cache or verification.

Axes: B batch, T tokens, N blocks, K slots, C taps, D hidden, F features, V vocabulary (of the draft).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbench.blocks import Batch, Blocks, Context
from specbench.drafts.expansion import Expansion, ExpansionByPath
from specbench.drafts.initialisation import AUTO, STARTS, first_weights, randomise
from specbench.drafts.work import Work, of_forward, of_parameters
from specbench.models.backbone import Backbone, backbone_of, chosen
from specbench.models.embedding_head import Tables
from specbench.models.fast.folded_layers import Stack
from specbench.models.kv_cache import KVCache
from specbench.models.target import Target
from specbench.models.target_files import mask_token_of
from specbench.ranges import Count, Slots

# Constructor arguments that are objects, which a file cannot store.
OBJECTS = ("backbone", "tables", "draft_vocabulary")
# logits (B, S, V) of S consecutive slots -> tokens (B, S) and, when drawn, the probabilities (B, S, V) they came from
SampleFunction = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Proposal:
    """K proposed tokens per row, the probabilities from which they were drawn (None: greedy), confidence logits if
    any."""

    tokens: Int[Tensor, "B K"]
    probabilities: Float[Tensor, "B K V"] | None
    confidence: Float[Tensor, "B K"] | None


@dataclass
class State:
    """State of a draft between rounds: its keys and values, and the target state that has no next token yet."""

    cache: KVCache
    feature: Float[Tensor, "B D"] | None = None

    def select(self, rows: Int[Tensor, " R"]) -> State:
        """The state of the chosen rows (when requests leave)."""
        return State(self.cache.select(rows), None if self.feature is None else self.feature[rows])

    def merge(self, other: State) -> State:
        """The rows of both states (when requests join)."""
        feature = None if self.feature is None else torch.cat([self.feature, other.feature])
        return State(self.cache.merge(other.cache), feature)


@runtime_checkable
class Proposer(Protocol):
    """The interface of a draft in decoding; its state can be any object with `select(rows)` and `merge(other)`."""

    block_size: int
    halts_on_stop: bool

    def begin(self, context: Context, tokens: Tensor) -> Any: ...

    def propose(self, state: Any, anchor: Tensor, sample: SampleFunction, slots: int | None = None) -> Proposal: ...

    def commit(self, state: Any, context: Context, tokens: Tensor) -> Any: ...


class Draft(nn.Module):
    """Base class of all drafts: sizes, tables, and the function `hidden -> features -> logits` of both views.

    A method defines `forward`, `propose` and `commit`. Everything else that the project needs from a draft (initial
    weights, parameter groups, cost of training, published format) has a default for any module, which a method can
    override.

    Args:
        backbone: sizes and facts of the decoder layers.
        tables: embedding and head of the target.
        target_layer_ids: the taps, ascending.
        mask_token_id: input token of slots to be predicted, if the method needs one.
        block_size: slots K of a block.
        anchors: anchors that training draws from a conversation. None: every valid one.
        train_tables: train a copy of embedding and head instead of sharing the target's frozen ones.
        draft_vocabulary: token ids (W,) of a reduced draft vocabulary. None: the target's vocabulary.

    Raises:
        ValueError: `block_size` is below 1, or `target_layer_ids` is empty or not ascending.
    """

    # Which target states the draft reads: a cache reads no taps for a method that does not, and must have every final
    # state for one that reads them at all positions.
    reads_taps = True
    reads_last = False
    # Whether `forward` itself, not only `features`, reads the tokens before the slots (blocks.previous_tokens), and
    # whether it draws them where `Batch.policy` says so (else on-policy training takes a pass for each slot).
    reads_previous = False
    draws_previous = False
    # The released evaluator ends an Eagle3 proposal at its first proposed stop token (accounting "deepspec" only).
    halts_on_stop = False
    # Which slots training supervises: one of blocks.SUPERVISIONS.
    supervision = "predicted"
    # Tokens that a slot can propose, if its law is 0 for all others (logits of -inf); None: any.
    candidates: int | None = None
    # Modules that keep the initial weights of their constructor, also with start=random.
    keeps_first_weights: tuple[str, ...] = ()
    # Modules that read the taps; their weights are useless for other taps. None: unknown, so any module can be one.
    tap_modules: tuple[str, ...] | None = None
    # The published architecture that this class is, of specbench.checkpoints.exports: "dflash", "dspark" or "eagle3".
    # It is not inherited, because a subclass computes something else. None: only SpecBench reads its folders.
    published_format: str | None = None
    # The layers as decoding runs them, if the draft has layers; renewed as requests begin.
    stack: Stack | None = None
    # Constructor settings by name, with defaults and without `OBJECTS`; draft folders and checkpoints store them.
    settings: dict[str, Any]
    # A description of how `for_target` made it; empty for a draft that was made differently.
    origin: str = ""
    # The target's whole tables, in a tuple so that they are not a submodule; empty if only `tables` is known.
    target_tables: tuple[Tables, ...] = ()
    # The source of these tables: the target's id and revision.
    target_source: tuple[str, str | None] | None = None

    def __new__(cls, *args: Any, **settings: Any) -> Draft:
        """Record the settings of the constructor call."""
        draft = super().__new__(cls)
        # nn.Module.__init__ is called later and keeps this attribute.
        object.__setattr__(draft, "settings", _settings(cls, args, settings))
        return draft

    @classmethod
    def for_target(
        cls,
        target: Target,
        *,
        start: str = AUTO,
        seed: int = 0,
        mask_token_id: int | None = None,
        backbone: str | None = None,
        window: int | None = None,
        max_length: int | None = None,
        draft_vocabulary: Int[Tensor, " W"] | None = None,
        **settings: Any,
    ) -> Draft:
        """A draft of this method for `target`, with the target's taps, tables and layer sizes, and initial weights.

        Args:
            target: a target loaded with taps.
            start: initial weights: "target" copies the target's last layers and final norm, "random" does not, "auto"
                copies them if the layers can be copied. `print(draft)` shows what was chosen.
            seed: of the random part of the initial weights; the global generator of torch is not changed.
            mask_token_id: input token of slots to be predicted. None: the tokenizer's mask token, else the first row of
                the embedding that no token uses, else a padding token that is not a stop token.
            backbone: family of the layers (specbench.models.backbone). None: that of the target, else "qwen3".
            window: attention window in positions. None: no limit.
            max_length: longest text in tokens, for rope scalings that depend on it.
            draft_vocabulary: token ids of a reduced draft vocabulary. None: the target's vocabulary.
            **settings: arguments of the method's constructor, for example `layers` and `block_size`.

        Returns:
            The draft, on the target's device.

        Raises:
            ValueError: the target has no taps, `start` is not possible, or a setting is not valid.
        """
        if not target.target_layer_ids:
            raise ValueError(f"target {target.name} was loaded without taps: give Target.load(..., taps=[...])")
        if start not in STARTS:
            raise ValueError(f"start={start!r}: choose one of {', '.join(STARTS)}")
        mask, named = (
            (mask_token_id, "given")
            if mask_token_id is not None
            else mask_token_of(target.tokenizer, len(target.tables.embedding), target.stop_token_ids)
        )
        tables = target.tables
        scales = {name: getattr(tables, name) for name in ("embedding_scale", "soft_cap", "logit_scale")}
        facts = replace(backbone_of(target.config, backbone, window, max_length), **scales)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            draft = cls(
                facts,
                tables,
                target_layer_ids=list(target.target_layer_ids),
                mask_token_id=mask,
                draft_vocabulary=draft_vocabulary,
                **settings,
            )
            begun = first_weights(draft, start, target)
        draft.target_tables, draft.target_source = (tables,), target.source
        reason = f" ({begun.why})" if begun.why else ""
        draft.origin = (
            f"{chosen(target.config, backbone).reason}; start={begun.start}, {len(begun.copied)} tensors of "
            f"{target.name}{reason}; seed={seed}; mask_token_id={mask} ({named})"
        )
        return draft.to(target.device)

    def extra_repr(self) -> str:
        return self.origin

    def __init__(
        self,
        backbone: Backbone,
        tables: Tables,
        target_layer_ids: tuple[int, ...] | list[int],
        mask_token_id: int | None = None,
        *,
        block_size: Slots = 7,
        anchors: Count | None = None,
        train_tables: bool = False,
        draft_vocabulary: Int[Tensor, " W"] | None = None,
    ):
        super().__init__()
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: a block holds at least one slot")
        ids = list(target_layer_ids)
        if not ids or ids != sorted(set(ids)):
            raise ValueError(f"target_layer_ids={ids}: give at least one target layer, in ascending order")
        # Scales belong to the tables; the backbone has the same values, so that a draft is written as it decodes.
        scales = {name: getattr(tables, name) for name in ("embedding_scale", "soft_cap", "logit_scale")}
        self.backbone = replace(backbone, **scales)
        self.block_size, self.anchors_per_sample = block_size, anchors
        self.target_layer_ids, self.mask_token_id = tuple(target_layer_ids), mask_token_id
        self.tables = tables.derive(train_tables, draft_vocabulary)

    @property
    def draft_vocabulary(self) -> Int[Tensor, " W"] | None:
        """Token ids of a reduced draft vocabulary (None: the target's whole vocabulary)."""
        return self.tables.ids

    def forward(self, batch: Batch) -> Blocks:
        """Training view: every block of the batch at once, from true tokens and true target states."""
        raise NotImplementedError

    def begin(self, context: Context, tokens: Int[Tensor, "B T"]) -> State:
        """Decoding view after the target's prefill of `tokens`: commit them to an empty state."""
        if self.stack is not None:
            self.stack.renew()
        return self.commit(State(KVCache(len(tokens), tokens.device)), context, tokens)

    def propose(
        self, state: State, anchor: Int[Tensor, " B"], sample: SampleFunction, slots: int | None = None
    ) -> Proposal:
        """Propose `slots` (default: block_size) tokens after `anchor`; the state is not changed."""
        raise NotImplementedError

    def expand(self, state: State, anchor: Int[Tensor, " B"], slots: int | None = None) -> Expansion:
        """The child logits of a token tree after `anchor`, of at most `slots` levels (default: block_size).

        By default the draft is asked for a proposal along every path; if it draws all slots at once, one proposal is
        enough. A method that knows a shorter way overrides this. The state is not changed.
        """

        def propose(requests: Int[Tensor, " R"], sample: SampleFunction, count: int) -> Proposal:
            return self.propose(state.select(requests), anchor[requests], sample, count)

        return ExpansionByPath(propose, len(anchor), min(slots or self.block_size, self.block_size), anchor.device)

    def commit(self, state: State, context: Context, tokens: Int[Tensor, "B S"]) -> State:
        """Read the target's true states of the committed tokens, the old anchor first."""
        raise NotImplementedError

    def features(self, hidden: Float[Tensor, "*b K D"], previous: Int[Tensor, "*b K"]) -> Float[Tensor, "*b K F"]:
        """Input of the vocabulary projection, from whole blocks; much smaller than the vocabulary."""
        return hidden

    def project(self, features: Float[Tensor, "*r F"]) -> Float[Tensor, "*r W"]:
        """Logits of each row of features; the only operation of a draft with an axis of vocabulary size."""
        return self.tables.logits(features)

    def project_base(self, features: Float[Tensor, "*r F"]) -> Float[Tensor, "*r W"] | None:
        """Logits of each row before the method corrects them; None for a method that has no such logits. A loss can
        supervise them too (`objective.base`). They read no parameter that `project` does not read."""
        return None

    def logits(self, hidden: Float[Tensor, "*b K D"], previous: Int[Tensor, "*b K"]) -> Float[Tensor, "*b K W"]:
        """Draft logits of whole blocks."""
        return self.project(self.features(hidden, previous))

    def projection_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that `project` reads (the chunked objective differentiates them)."""
        return [p for p in (self.tables.head,) if isinstance(p, nn.Parameter)]

    def confidence(self, hidden: Float[Tensor, "*b K D"], previous: Int[Tensor, "*b K"]) -> Tensor | None:
        """Logit of the probability that a slot is accepted if all before it are; None without a confidence head."""
        return None

    def draw_each(
        self,
        slots: int,
        anchor: Int[Tensor, " B"],
        sample: SampleFunction,
        logits: Callable[[int, list[Tensor]], Float[Tensor, "B 1 V"]],
    ) -> Proposal:
        """Sample slot k (from 0) from `logits(k, previous)`; `previous`: the anchor and the k tokens before the slot.
        The proposal has no confidence yet (`scored`)."""
        previous, probabilities = [anchor], []
        for k in range(slots):
            tokens, drawn = sample(logits(k, previous))
            previous.append(self.to_target(tokens[:, 0]))
            probabilities.append(drawn)
        tokens = torch.stack(previous, 1)
        drawn = None if probabilities[0] is None else self.widen(torch.cat(probabilities, 1))
        return Proposal(tokens[:, 1:], drawn, None)

    def draw_at_once(
        self, hidden: Float[Tensor, "B K D"], anchor: Int[Tensor, " B"], sample: SampleFunction
    ) -> Proposal:
        """Sample all slots from one projection, for drafts whose logits do not depend on `previous`."""
        tokens, drawn = sample(self.project(hidden))
        return self.scored(Proposal(self.to_target(tokens), self.widen(drawn), None), hidden, anchor)

    def scored(self, proposal: Proposal, hidden: Float[Tensor, "B K D"], anchor: Int[Tensor, " B"]) -> Proposal:
        """The proposal with the draft's confidence in each of its slots, if it has a confidence head."""
        previous = torch.cat([anchor[:, None], proposal.tokens[:, :-1]], 1)
        return replace(proposal, confidence=self.confidence(hidden, previous))

    def randomise(self, std: float = 0.02) -> None:
        """Set random initial weights of all linear maps and embeddings; other parameters keep those of the
        constructor."""
        randomise(self, std, self.keeps_first_weights)

    def start_from(self, target: Target) -> list[str]:
        """Copy initial weights from the target; returns the names of the copied parameters.

        By default nothing is copied, because the target has no parameters that correspond to an unknown module.
        """
        return []

    def start_previous(self, wired: bool) -> None:
        """After `start_from`: let the maps that read the previous token's embedding beside a feature start like those
        of the feature (`wired`), or almost not read it. By default nothing: a parallel draft has no such maps."""

    def layers_in_order(self) -> Sequence[nn.Module]:
        """The layers of the draft in order; empty if a draft has no such order."""
        return ()

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Trainable parameters, grouped by the number of layers between them and the head, the nearest first.

        Parameters outside of `layers_in_order()` belong to the nearest group.
        """
        layers = self.layers_in_order()
        away = {id(p): len(layers) - 1 - i for i, layer in enumerate(layers) for p in layer.parameters()}
        groups: list[list[nn.Parameter]] = [[] for _ in range(max(1, len(layers)))]
        for parameter in self.parameters():
            if parameter.requires_grad:
                groups[away.get(id(parameter), 0)].append(parameter)
        return groups

    def work(self, length: int, anchors: int) -> Work:
        """Memory and operations of the training view for `anchors` blocks of one conversation of `length` tokens.

        By default the forward pass is run on shapes (`work.of_forward`). If it depends on values, every parameter
        counts once per slot (`work.of_parameters`), without attention to a context.
        """
        tokens = torch.zeros(1, length, dtype=torch.long)
        states = torch.empty(1, length, len(self.target_layer_ids) + 1, self.backbone.hidden_size, device="meta")
        batch = Batch(tokens, tokens.bool(), tokens, tokens, states[:, :, :-1], states[:, :, -1], tokens[:, :anchors])
        apart = [*self.tables.parameters(), *self.projection_parameters()]
        return of_forward(self, batch) or anchors * self.block_size * of_parameters(self, apart)

    def to_target(self, tokens: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
        """Rows of the draft's vocabulary -> token ids of the target."""
        return tokens if self.draft_vocabulary is None else self.draft_vocabulary[tokens]

    def widen(self, probabilities: Float[Tensor, "*b W"] | None) -> Float[Tensor, "*b V"] | None:
        """Draft probabilities over the target's vocabulary: zero where the draft has no token."""
        if probabilities is None or self.draft_vocabulary is None:
            return probabilities
        wide = probabilities.new_zeros(*probabilities.shape[:-1], self.backbone.vocab_size)
        return wide.index_copy_(-1, self.draft_vocabulary, probabilities)


def _settings(kind: type, args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    """Constructor settings by name: those given, by position or by name, over the defaults of the class and its bases.

    A class that passes `*args` or `**settings` on has also the settings of its base.
    """
    found, names, settled = {}, [], False
    for part in kind.__mro__:
        if "__init__" not in vars(part) or not issubclass(part, nn.Module) or part is nn.Module:
            continue
        parameters = list(signature(part.__init__).parameters.values())[1:]
        if not settled:
            names += [p.name for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
            settled = not any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)
        for one in parameters:
            if one.default is not Parameter.empty:
                found.setdefault(one.name, one.default)
        if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
            break
    found |= dict(zip(names, args, strict=False)) | given
    held = {name: value for name, value in found.items() if name not in OBJECTS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in held.items()}
