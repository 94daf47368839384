"""Decoding with token trees: the rounds of loop.py with a tree in the place of a chain.

    round: draft.expand -> builder -> scheduler -> target.extend(anchor + tree) -> rule -> keep the path, commit draft

Requests, their batch, seeds and results are those of chains, and so is the state of the draft: it commits the accepted
path as it commits the accepted part of a chain.

Axes: B requests, N nodes, P places of a path, C taps, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specbench.blocks import Context
from specbench.decoding.loop import Decoded, Lanes, Limits, Round, clock, run
from specbench.decoding.sampling import Sampling, warp
from specbench.decoding.scheduling import FixedLength, Scheduler
from specbench.decoding.tree_scheduling import by_probability, check_pair, shortened
from specbench.decoding.tree_shapes import TreeShape
from specbench.decoding.tree_verification import Descent, deterministic_tree, drawn_children, greedy
from specbench.decoding.trees import TokenTree, drawn, most_likely
from specbench.drafts.draft import Draft, Proposer
from specbench.models.target import Target


def tree_decode(
    target: Target,
    draft: Proposer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    limits: Limits,
    shape: TreeShape,
    seeds: Sequence[int] | None = None,
    slots: int | None = None,
    scheduler: Scheduler | None = None,
) -> Iterator[Decoded]:
    """Decode every prompt with trees of `draft`, as `speculative_decode` does with chains, and as losslessly.

    Args:
        shape: kind and size of the trees, and the rule of verification.
        slots: the deepest level. None: the draft's block.
        scheduler: decides how many nodes of each tree are verified (tree_scheduling.py). None: all.

    Raises:
        ValueError: the target cannot read trees, the draft has none, the accounting is that of chains, or the scheduler
            cannot shorten these trees.
    """
    scheduler = scheduler or FixedLength()
    check_pair(scheduler, shape.draws)
    scheduler.reset()
    if limits.accounting != "specbench":
        raise ValueError(
            f"accounting={limits.accounting} counts chains as the released evaluator does: use accounting=specbench "
            "with a tree, or tree=chain"
        )
    if not hasattr(draft, "expand"):
        raise ValueError(f"{type(draft).__name__} proposes one chain, so it has no tree: use tree=chain")
    longest = max(map(len, prompts), default=0) + limits.max_new_tokens + shape.nodes + 1
    if reason := target.no_trees_because(longest):
        raise ValueError(f"target {target.name} cannot read a tree: {reason}; use tree=chain")
    yield from run(
        target,
        draft,
        prompts,
        sampling,
        limits,
        seeds,
        lambda lanes: _round(target, draft, lanes, limits, shape, slots, scheduler),
    )


def grow(draft: Draft, lanes: Lanes, shape: TreeShape, slots: int | None = None) -> TokenTree:
    """The tree of every request, in the target's vocabulary."""
    draws = shape.draws and not lanes.sampler.sampling.greedy
    expansion = draft.expand(lanes.draft, lanes.anchor, slots)
    tree = shape.grow(expansion, drawn(lanes.sampler) if draws else most_likely)
    return replace(tree, tokens=draft.to_target(tree.tokens), law=draft.widen(tree.law))


def descend(tree: TokenTree, logits: Tensor, lanes: Lanes) -> Descent:
    """The accepted path by the rule of the tree, from the target's logits (B, N + 1, V)."""
    sampler, device = lanes.sampler, logits.device
    if sampler.sampling.greedy:
        return greedy(tree, logits.argmax(-1))
    target = warp(logits, sampler.sampling)
    if tree.law is None:
        return deterministic_tree(tree, target, sampler.uniforms(tree.levels + 1, device))
    return drawn_children(tree, target, sampler.uniforms(tree.tokens.shape[1] + 1, device))


@torch.inference_mode()
def _round(
    target: Target,
    draft: Draft,
    lanes: Lanes,
    limits: Limits,
    shape: TreeShape,
    slots: int | None,
    scheduler: Scheduler,
) -> None:
    """One forward of the target for the whole batch."""
    started, device = time.perf_counter(), lanes.anchor.device
    tree = grow(draft, lanes, shape, slots)
    if scheduler.label != "fixed":
        tree = shortened(tree, scheduler, [request.index for request in lanes.requests])
    drafted = clock(device)
    block = torch.cat([lanes.anchor[:, None], tree.tokens], 1)
    context = target.extend(lanes.target, block, tree.branches())
    found = descend(tree, target.logits(context.last), lanes)
    told = _told(tree, found, block)
    verified = time.perf_counter()
    path = found.path[:, : 1 + max(one.accepted for one, _ in told)]
    lanes.target.keep(path)
    lanes.target.advance(found.accepted + 1)
    rows = torch.arange(len(block), device=device)[:, None]
    committed = Context(context.taps[rows, path], context.last[rows, path], found.accepted + 1)
    lanes.draft = draft.commit(lanes.draft, committed, block.gather(1, path))
    lanes.anchor = found.following
    ended = clock(device)
    times = {
        "draft_seconds": drafted - started,
        "verify_seconds": verified - drafted,
        "seconds": ended - started,
        "commit_seconds": ended - verified,
    }
    for request, (one, nodes) in zip(lanes.requests, told, strict=True):
        request.seconds += ended - started
        _book(request, replace(one, **times), nodes, limits)


def _told(tree: TokenTree, found: Descent, block: Tensor) -> list[tuple[Round, list[int]]]:
    """What happened to each request, before stop tokens are looked at, and the nodes of each of its tree's levels."""
    real, parents = tree.real[:, None], tree.parents[:, None]
    widths = (real & (parents == found.path[..., None])).sum(-1)
    ranks = tree.rank.gather(1, (found.path[:, 1:] - 1).clamp_min(0))
    tokens = block.gather(1, found.path[:, 1:])
    levels = torch.arange(1, tree.levels + 1, device=block.device)
    nodes = (real & (tree.depth[:, None] == levels[:, None])).sum(-1)
    order, joint = by_probability(tree)
    places = order.argsort(-1).gather(1, (found.path[:, 1:] - 1).clamp_min(0))
    host = (part.tolist() for part in (found.accepted, found.following, tokens, ranks, widths, nodes, places))
    told = []
    for accepted, following, ids, of, wide, by_depth, at, chance in zip(*host, joint.tolist(), strict=True):
        by_depth = by_depth[: max((d for d, count in enumerate(by_depth, 1) if count), default=0)]
        one = Round(
            proposed=len(by_depth),
            accepted=accepted,
            tokens=(*ids[:accepted], following),
            confidence=None,
            draft_seconds=0.0,
            verify_seconds=0.0,
            seconds=0.0,
            stop=False,
            nodes=sum(by_depth),
            ranks=tuple(of[:accepted]),
            widths=tuple(wide[: accepted + 1]),
            joint=tuple(chance[: sum(by_depth)]),
            places=tuple(at[:accepted]),
        )
        told.append((one, by_depth))
    return told


def _book(request: Decoded, found: Round, nodes: list[int], limits: Limits) -> None:
    """Record a round: an accepted stop token ends the text there, and only what is not deeper counts."""
    stop = next((i for i, token in enumerate(found.tokens[:-1]) if token in limits.stop_token_ids), None)
    if stop is not None:
        found = replace(
            found,
            proposed=stop + 1,
            accepted=stop + 1,
            tokens=found.tokens[: stop + 1],
            nodes=sum(nodes[: stop + 1]),
            ranks=found.ranks[: stop + 1],
            widths=found.widths[: stop + 1],
            places=found.places[: stop + 1],
        )
    request.rounds.append(replace(found, stop=found.tokens[-1] in limits.stop_token_ids))
    request.output_ids.extend(found.tokens)
