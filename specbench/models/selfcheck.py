"""Check that a target gives the same states as transformers. It runs when a target is loaded; its result is stored.

The reference is the forward pass of transformers without a cache, on random texts one by one. It is compared with the
states of padded texts, and of ragged decoding: prefill, blocks of several sizes, roll-backs of different lengths, and a
single row. If the incremental pass differs by more than rounding of the dtype, the target is recomputed from its
tokens, and one notice gives the reason. If whole texts differ too, the target is refused; the message names the first
layer that differs.

A result is valid for one set of weights (a digest of samples), one version of torch, of transformers and of the files
that compute the states, one dtype and one device.

Axes: B rows, T tokens, C layers, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor

from specbench import fast
from specbench.files.atomic import write_json
from specbench.models.library_pass import Masks

SCHEMA = "specbench.selfcheck/1"
MODES = ("direct", "library", "recompute", "prefixes")
SLOWER = {
    "recompute": "recomputed from its tokens in every round",
    "prefixes": "recomputed from its tokens, once for every token that a round verifies",
}
# Largest relative distance of two states or logit vectors that rounding explains, by dtype, and the share of positions
# that must satisfy it: in 16-bit formats the choice of an expert can differ at a few positions.
ROUNDING = {
    torch.float64: (1e-6, 1.0),
    torch.float32: (2e-4, 1.0),
    torch.float16: (2e-2, 0.9),
    torch.bfloat16: (8e-2, 0.9),
}
LONGEST, SHORTEST, LEAST = 288, 72, 24  # tokens of a text: enough for the window, limited by the size of the model
OPERATIONS = {"cpu": 2e11, "cuda": 2e13}  # that a check may take
ROWS = 2
# Blocks of ragged decoding: tokens written, and how many of them each row keeps.
BLOCKS = ((4, (2, 4)), (1, (1, 1)), (5, (1, 0)), (3, (3, 1)), (4, (4, 2)))
VIEW = (
    "selfcheck",
    "target",
    "library_pass",
    "kv_cache",
    "fast/direct_pass",
    "fast/folded_layers",
    "fast/packed_products",
    "backbone",
    "rope",
    "attention",
    "embedding_head",
)
NOT_CAUSAL = "the first states of a text change with what comes after them"
log = logging.getLogger("specbench")


class Disagreement(ValueError):
    """The states of a target differ from those of transformers; `report` says where."""

    def __init__(self, message: str, report: SelfCheckReport):
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Line:
    """One comparison: `pass_` and `part` name what was compared, `layer` where (-1: input of the first layer, "final",
    "logits")."""

    pass_: str
    part: str
    layer: str
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class SelfCheckReport:
    """Result of a check: the pass that is used (None: refused), why not a faster one, and every comparison."""

    target: str
    mode: str | None
    reason: str | None
    tokens: int
    lines: tuple[Line, ...]

    def first(self, pass_: str) -> Line | None:
        """The first comparison of a pass that does not agree."""
        return next((line for line in self.lines if line.pass_ == pass_ and not line.agrees), None)

    def text(self) -> str:
        """As a table: the largest difference of every layer (rows) in every part (columns)."""
        told = [f"{self.target}: {f'decoded by its {self.mode} pass' if self.mode else 'refused'}"]
        told += [f"because {self.reason}"] if self.reason else []
        tolerance = max((line.tolerance for line in self.lines), default=0.0)
        told.append(f"relative differences, texts of {self.tokens} tokens, allowed {tolerance:.0e}; * differs")
        parts = list(dict.fromkeys((line.pass_, line.part) for line in self.lines))
        found = {(line.pass_, line.part, line.layer): line for line in self.lines}
        layers = sorted({line.layer for line in self.lines}, key=lambda name: (not _number(name), _order(name)))
        rows = [["layer", *(f"{pass_}: {part}" for pass_, part in parts)]]
        for layer in layers:
            cells = [found.get((*part, layer)) for part in parts]
            rows.append([layer, *("" if x is None else f"{x.difference:.1e}{'' if x.agrees else ' *'}" for x in cells)])
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            told + ["  ".join(cell.ljust(n) for cell, n in zip(row, wide, strict=True)).rstrip() for row in rows]
        )


def _number(name: str) -> bool:
    return name.lstrip("-").isdigit()


def _order(name: str) -> int:
    return int(name) if _number(name) else ["final", "logits"].index(name)


def settle(target: Any, anew: bool = False) -> SelfCheckReport:
    """Check `target` unless the result of the same check is stored, and select the pass that agrees.

    Errors: Disagreement (a ValueError) naming the first layer whose states differ from those of transformers.
    """
    key = identity(target)
    path = folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"
    report = None if anew else remembered(path, key)
    fresh = report is None
    if fresh:
        report = examine(target)
        if report.mode is None:
            raise Disagreement(_refusal(report), report)
    _apply(target, report)
    if fresh:
        _remember(path, key, report)
    return replace(report, target=target.name)


def _apply(target: Any, report: SelfCheckReport) -> None:
    if report.mode != "direct":
        target.direct = None
    if report.mode in SLOWER:
        target.recomputed_because, target.by_prefix = report.reason, report.mode == "prefixes"
    if report.reason:
        log.warning("target %s is %s: %s", target.name, SLOWER.get(report.mode, "run by its library"), report.reason)


def _refusal(report: SelfCheckReport) -> str:
    worst = report.first("whole")
    if report.reason == NOT_CAUSAL:
        return f"target {report.target} cannot be used: {NOT_CAUSAL}, so it cannot continue a text token by token"
    where = {"final": "the final states", "logits": "the logits"}.get(worst.layer, f"the output of layer {worst.layer}")
    return (
        f"target {report.target} cannot be used: {worst.part} differ from transformers' own forward pass, first in "
        f"{where} (relative difference {worst.difference:.1e}, rounding explains {worst.tolerance:.0e}): texts decoded "
        "here would not have its law"
    )


def examine(target: Any) -> SelfCheckReport:
    """Compare every pass that `target` could use, the fastest first, until one agrees."""
    tokens, lengths = _texts(target)
    layers = range(-1, len(target.layers))
    lines: list[Line] = []
    mode, reason = None, target.recomputed_because
    held = target.direct
    with target.tapping(layers):
        truth = _guarded(lambda: [_truth(target, row[None, : int(n)]) for row, n in zip(tokens, lengths, strict=True)])
        whole = truth if isinstance(truth, Exception) else _guarded(lambda: _whole(target, tokens, lengths, truth))
        if isinstance(whole, Exception):
            raise ValueError(
                f"target {target.name} cannot be used: its forward pass over a text fails ({_said(whole)})"
            ) from whole
        lines += _hidden_states(target, truth) + whole
        if all(line.agrees for line in whole):
            mode = "recompute"
        elif not whole[0].agrees:
            reason = "two passes over one text differ"
        else:
            alone = _alone(target, tokens, lengths, truth)
            lines += alone
            worst = next(line for line in whole if not line.agrees)
            if not all(line.agrees for line in alone):
                reason = "a text alone differs as well"
            elif not _causal_start(target, tokens, truth):
                reason = NOT_CAUSAL
            else:
                mode = "prefixes"
                reason = (
                    f"the states of a text change with what comes after it, first in layer {worst.layer} (relative "
                    f"difference {worst.difference:.1e}, rounding explains {worst.tolerance:.0e})"
                )
        if mode and reason is None:
            for name in ("direct", "library") if target.direct is not None else ("library",):
                target.direct = held if name == "direct" else None
                target.masks = Masks()
                with fast.switched(True):  # what is remembered holds for whoever decodes with fast computations
                    found = _guarded(lambda name=name: _decoded(target, tokens, lengths, truth, name))
                asked, target.masks = target.masks.windows, None
                if isinstance(found, Exception):
                    kind = type(target.decoder).__name__
                    reason = f"its {kind} cannot run over a cache that is rolled back ({_said(found)})"
                    continue
                lines += found
                wrong = next((line for line in found if not line.agrees), None)
                unseen = _unseen_window(target, tokens.shape[1], asked) if name == "library" else None
                if wrong is None and unseen is None:
                    mode = name
                    break
                reason = unseen or (
                    f"{name} decoding differs from its own forward pass, first in layer {wrong.layer} of {wrong.part} "
                    f"(relative difference {wrong.difference:.1e}, rounding explains {wrong.tolerance:.0e})"
                )
            target.direct = held
    return SelfCheckReport(target.name, mode, None if mode == "direct" else reason, tokens.shape[1], tuple(lines))


def _guarded(run: Any) -> Any:
    """The result of `run`, or the error that it raised: models raise errors of any type for a cache that they do not
    support."""
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__


def _texts(target: Any) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
    """Random texts, longer than every window where the model's size allows."""
    size = sum(p.numel() for p in target.model.parameters())
    affordable = int(OPERATIONS.get(target.device.type, OPERATIONS["cuda"]) / (2 * size * ROWS * 4))
    windows = [w for w in _windows(target) if 2 * w <= LONGEST]
    count = min(max([SHORTEST, *(2 * w + 24 for w in windows)]), LONGEST, max(affordable, LEAST))
    count = min([count, *(limit for limit in (target.positions, target.rope_limit) if limit is not None)])
    generator = torch.Generator().manual_seed(0)
    rows = len(target.tables.embedding)
    tokens = torch.randint(0, rows, (ROWS, count), generator=generator).to(target.device)
    return tokens, torch.tensor([count, max(1, count - 7)], device=target.device)


def _windows(target: Any) -> list[int]:
    """Windows and chunks of attention that the model's configuration states."""
    text = target.model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"]
    found = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    local = any(kind != "full_attention" for kind in kinds)
    return [w for w in found if isinstance(w, int) and not isinstance(w, bool) and w > 0] if local else []


def _unseen_window(target: Any, count: int, asked: set[int]) -> str | None:
    """A window longer than the texts of the check is accepted if the model uses the mask functions of transformers."""
    wide = [w for w in _windows(target) if w >= count]
    if not wide or set(wide) <= asked:
        return None
    return (
        f"its configuration states a window of {max(wide)} tokens, longer than the text of the check, and the model "
        "makes its masks by itself"
    )


@dataclass(frozen=True)
class _Truth:
    """The pass of transformers over one text: layer outputs (T, C, D), final states (T, D), logits (T, V)."""

    taps: Tensor
    last: Tensor
    logits: Tensor
    hidden: tuple[Tensor, ...] | None


def _truth(target: Any, text: Int[Tensor, "1 T"]) -> _Truth:
    out, taps, last = target.library_states(text)
    hidden = getattr(out, "hidden_states", None)
    return _Truth(taps[0], last[0], out.logits[0], None if hidden is None else tuple(hidden))


def _hidden_states(target: Any, truth: Sequence[_Truth]) -> list[Line]:
    """Compare the states from hooks with `hidden_states` of transformers, if these are one (T, D) tensor per layer.

    The last layer is left out, because transformers applies the final norm to it.
    """
    count, lines = len(target.layers), []
    for layer in range(-1, count - 1):
        pairs = [
            (one.taps[:, layer + 1], one.hidden[layer + 1][0])
            for one in truth
            if one.hidden is not None and len(one.hidden) == count + 1 and one.hidden[layer + 1].dim() == 3
        ]
        if pairs and all(a.shape == b.shape for a, b in pairs):
            lines.append(_line(target, "hooks", "hidden_states", str(layer), pairs))
    return lines


def _whole(target: Any, tokens: Tensor, lengths: Tensor, truth: Sequence[_Truth]) -> list[Line]:
    """Padded texts in one pass, and a second pass over the first text: the same text gives the same numbers."""
    again = _truth(target, tokens[:1, : int(lengths[0])])
    twice = [(again.logits, truth[0].logits)]
    found = [_line(target, "whole", "two passes over one text", "logits", twice)]
    context = target.states(tokens, lengths)
    pieces = [(b, 0, context.taps[b, :n], context.last[b, :n]) for b, n in enumerate(lengths.tolist())]
    return found + _against(target, "whole", "padded texts", pieces, truth)


def _alone(target: Any, tokens: Tensor, lengths: Tensor, truth: Sequence[_Truth]) -> list[Line]:
    """Texts one by one, each at its own length."""
    pieces = []
    for b, n in enumerate(lengths.tolist()):
        context = target.states(tokens[b : b + 1, :n], lengths[b : b + 1])
        pieces.append((b, 0, context.taps[0], context.last[0]))
    return _against(target, "whole", "texts alone", pieces, truth)


def _causal_start(target: Any, tokens: Tensor, truth: Sequence[_Truth]) -> bool:
    """Whether the beginning of a text is independent of its end. Choices between nearly equal values may differ, masks
    not."""
    count = max(1, min(8, tokens.shape[1] // 4))
    part = _truth(target, tokens[:1, :count])
    return _line(target, "", "", "logits", [(part.logits, truth[0].logits[:count])]).agrees


def _decoded(target: Any, tokens: Tensor, lengths: Tensor, truth: Sequence[_Truth], name: str) -> list[Line]:
    """Ragged decoding with roll-backs, and decoding of one row alone."""
    found = _rounds(target, tokens, lengths, truth, name, (0, 1), "ragged")
    return found + _rounds(target, tokens, lengths, truth, name, (0,), "lone row")


def _rounds(target, tokens, lengths, truth, name: str, rows: tuple[int, ...], how: str) -> list[Line]:
    rest = sum(max(kept[b] for b in range(ROWS)) for _, kept in BLOCKS) + max(size for size, _ in BLOCKS)
    start = [max(1, int(lengths[b]) - rest - 2 * b) for b in rows]
    texts = tokens[list(rows)]
    state, context = target.prefill(texts[:, : max(start)], torch.tensor(start, device=target.device))
    first = [(rows[i], 0, context.taps[i, :n], context.last[i, :n]) for i, n in enumerate(start)]
    found = _against(target, name, f"{how}, prefill", first, truth)
    at, pieces = start, []
    for size, kept in BLOCKS:
        keep = [min(kept[b], int(lengths[b]) - n) for b, n in zip(rows, at, strict=True)]
        block = torch.stack([_block(texts[i], n, size, k) for i, (n, k) in enumerate(zip(at, keep, strict=True))])
        context = target.extend(state, block)
        pieces += [
            (b, n, context.taps[i, :k], context.last[i, :k])
            for i, (b, n, k) in enumerate(zip(rows, at, keep, strict=True))
            if k
        ]
        state.advance(torch.tensor(keep, device=target.device))
        at = [n + k for n, k in zip(at, keep, strict=True)]
    return found + _against(target, name, f"{how}, blocks and roll-backs", pieces, truth)


def _block(text: Int[Tensor, " T"], start: int, size: int, kept: int) -> Int[Tensor, " S"]:
    """`size` tokens of a text, those beyond `kept` replaced by others: a proposal that is not accepted."""
    block = text[start : start + size]
    block = torch.cat([block, text[: size - len(block)]]).clone()
    block[kept:] = text[:1]
    return block


def _against(target, name: str, part: str, pieces: Sequence[tuple[int, int, Tensor, Tensor]], truth) -> list[Line]:
    """Comparisons of states at stretches of texts: (row, first position, taps, final states) each."""
    lines = []
    for layer in range(len(target.layers) + 1):
        pairs = [(taps[:, layer], truth[b].taps[n : n + len(taps), layer]) for b, n, taps, _ in pieces]
        lines.append(_line(target, name, part, str(layer - 1), pairs))
    pairs = [(last, truth[b].last[n : n + len(last)]) for b, n, _, last in pieces]
    lines.append(_line(target, name, part, "final", pairs))
    pairs = [(target.logits(last), truth[b].logits[n : n + len(last)]) for b, n, _, last in pieces]
    return [*lines, _line(target, name, part, "logits", pairs)]


def _line(target: Any, name: str, part: str, layer: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Line:
    tolerance, share = ROUNDING.get(target.dtype, ROUNDING[torch.bfloat16])
    found = torch.cat([distance(a, b, centred=layer == "logits") for a, b in pairs]).sort().values
    # NaN is sorted last and never agrees.
    worst = float(found[min(len(found) - 1, math.ceil(share * len(found)) - 1)])
    return Line(name, part, layer, worst if math.isfinite(worst) else math.inf, tolerance)


def distance(a: Float[Tensor, "T N"], b: Float[Tensor, "T N"], centred: bool = False) -> Float[Tensor, " T"]:
    """|a - b| / |b| row by row; `centred` first subtracts each row's mean, which does not change the distribution of
    tokens."""
    a, b = a.double(), b.double()
    if centred:
        a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-12)


def folder() -> Path:
    """Where results are stored: $SPECBENCH_CACHE, else specbench/ in $XDG_CACHE_HOME, else in ~/.cache."""
    own = os.environ.get("SPECBENCH_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(home).expanduser() / "specbench") / "selfcheck"


def identity(target: Any) -> dict[str, str]:
    """Everything that a result depends on."""
    here, code = Path(__file__).parent, hashlib.sha256()
    config = {k: v for k, v in target.model.config.to_dict().items() if k != "_name_or_path"}
    for name in VIEW:
        code.update((here / f"{name}.py").read_bytes())
    device = target.device
    return {
        "weights": sampled_digest(target.model),
        "config": hashlib.sha256(repr(sorted(config.items(), key=str)).encode()).hexdigest(),
        "attention": str(getattr(target.model.config, "_attn_implementation", None)),
        "dtype": str(target.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "view": code.hexdigest(),
    }


def sampled_digest(model: torch.nn.Module, samples: int = 64) -> str:
    """Names, shapes and evenly spaced values of all weights: cheap at any size, and other weights give another one."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().reshape(-1)
        picked = flat[:: max(1, len(flat) // samples)].cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(picked.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def remembered(path: Path, key: Mapping[str, str]) -> SelfCheckReport | None:
    """The stored result of the same check; None if there is none, or if the file is not a valid result."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA or found["key"] != dict(key) or found["report"]["mode"] not in MODES:
            return None
        report = found["report"]
        lines = tuple(
            Line(str(x["pass_"]), str(x["part"]), str(x["layer"]), float(x["difference"]), float(x["tolerance"]))
            for x in report["lines"]
        )
        reason = None if report["reason"] is None else str(report["reason"])
        if report["mode"] == "recompute" and not reason:
            return None
        return SelfCheckReport(str(report["target"]), report["mode"], reason, int(report["tokens"]), lines)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _remember(path: Path, key: Mapping[str, str], report: SelfCheckReport) -> None:
    """Store a result; if the folder cannot be written to, the next load checks again."""
    found = asdict(report)
    for line in found["lines"]:
        if math.isinf(line["difference"]):
            line["difference"] = 1e300  # strict JSON has no infinity
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": SCHEMA, "key": dict(key), "report": found})
    except OSError as error:
        log.warning("the check of target %s is not remembered: %s (set SPECBENCH_CACHE)", report.target, error)
