"""Token trees without models: builders against exhaustive search, and both rules against the target's law.

The laws are enumerated exactly. One level: the real functions over a grid of uniforms on which every threshold lies.
Two levels: a transcription of the rules in fractions, over all draws and all decisions, whose law is the target's; the
real functions decide as it does for every draw of many uniforms.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction as F

import numpy as np
import pytest
import torch

from specbench.decoding.sampling import Sampler, Sampling
from specbench.decoding.tree_verification import deterministic_tree, drawn_children, greedy
from specbench.decoding.trees import (
    Children,
    Shape,
    TokenTree,
    best_first_tree,
    best_paths,
    drawn,
    dynamic_tree,
    most_likely,
    shared_tree,
    static_tree,
)
from specbench.decoding.verification import verify, verify_greedy
from specbench.drafts.draft import Proposal
from specbench.models.branches import Branches

WIDTH, DEPTH = 5, 3
BRANCHY = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 1]]


def logits_after(path: tuple[int, ...], row: int, independent: bool) -> torch.Tensor:
    """Logits of a draft that is a table: of a path, or only of its length."""
    key = len(path) if independent else sum((token + 1) * 7**k for k, token in enumerate(path))
    return 2 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(1000 * row + key))


class Table:
    """The expansion of that draft; it records how many nodes each call asks for."""

    def __init__(self, rows: int, independent: bool = False, depth: int = DEPTH):
        self.rows, self.independent, self.depth, self.marginals, self.asked = rows, independent, depth, None, []
        self.paths = [[()] for _ in range(rows)]

    def _logits(self):
        self.asked.append(len(self.paths[0]))
        each = [[logits_after(path, row, self.independent) for path in paths] for row, paths in enumerate(self.paths)]
        return torch.stack([torch.stack(own) for own in each])

    def root(self):
        if self.independent:
            slots = [[logits_after((0,) * d, row, True) for d in range(self.depth)] for row in range(self.rows)]
            self.marginals = torch.stack([torch.stack(own) for own in slots])
        return self._logits()

    def below(self, rows, parents):
        chosen = zip(self.paths, rows.tolist(), parents.tolist(), strict=True)
        self.paths = [[paths[p] + (t,) for t, p in zip(ts, ps, strict=True)] for paths, ts, ps in chosen]
        return self._logits()


def paths_of(tree: TokenTree, row: int) -> dict[tuple[int, ...], float]:
    """The token paths of a tree and their joint log-probabilities, after checks of its form."""
    found, joints, ranks = {0: ()}, {0: 0.0}, {}
    for n in range(tree.tokens.shape[1]):
        if not tree.real[row, n]:
            continue
        parent, rank = int(tree.parents[row, n]), int(tree.rank[row, n])
        assert rank == ranks.get(parent, 0), "ranks are consecutive and in the order of places"
        ranks[parent] = rank + 1
        found[n + 1] = (*found[parent], int(tree.tokens[row, n]))
        joints[n + 1] = joints[parent] + float(tree.log_probs[row, n])
        assert len(found[n + 1]) == int(tree.depth[row, n])
    assert len(set(found.values())) == len(found), "a path stands twice"
    return {found[n]: joints[n] for n in found if n}


def every_path(row: int, independent: bool, width: int = WIDTH) -> dict[tuple[int, ...], float]:
    """All paths of the table and their joint log-probabilities; with `width`, over the most likely of each slot."""
    known = {(): 0.0}
    for path in (p for d in range(DEPTH) for p in itertools.product(range(WIDTH), repeat=d)):
        if path in known:
            log_probs = logits_after(path, row, independent).double().log_softmax(0)
            for token in log_probs.topk(width).indices.tolist():
                known[(*path, token)] = known[path] + float(log_probs[token])
    return {path: joint for path, joint in known.items() if path}


def best(paths: dict, budget: int) -> set:
    return set(sorted(paths, key=paths.get, reverse=True)[:budget])


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("budget", [1, 4, 13, 40])
def test_best_first_finds_the_most_probable_nodes_of_all(independent, budget):
    tree = best_first_tree(Table(3, independent), budget, DEPTH)
    for row in range(3):
        found = paths_of(tree, row)
        assert set(found) == best(every_path(row, independent), budget)
        for path, joint in found.items():
            assert joint == pytest.approx(every_path(row, independent)[path], abs=1e-5)


def test_best_first_of_width_one_is_the_most_likely_chain():
    for independent in (True, False):
        found = paths_of(best_first_tree(Table(1, independent), 9, DEPTH, width=1), 0)
        assert set(found) == best(every_path(0, independent, width=1), 9) and len(found) == DEPTH


def test_the_heap_gives_paths_in_descending_order():
    log_probs = np.sort(np.random.default_rng(0).normal(size=(4, 3)) - 3, axis=1)[:, ::-1]
    sums = [
        (sum(log_probs[k, r] for k, r in enumerate(path)), path)
        for d in range(1, 5)
        for path in itertools.product(range(3), repeat=d)
    ]
    assert best_paths(log_probs, 50) == [path for _, path in sorted(sums, reverse=True)[:50]]
    assert len(best_paths(log_probs, 1000)) == 3 + 9 + 27 + 81


def test_shared_candidates_are_the_most_likely_of_a_slot():
    tree = shared_tree(Table(2, True), width=2, depth=DEPTH, budget=6)
    for row in range(2):
        assert set(paths_of(tree, row)) == best(every_path(row, True, width=2), 6)
    dependent = shared_tree(Table(1), width=3, depth=DEPTH, budget=39)
    likely, path = [], ()
    for _ in range(DEPTH):
        likely.append(logits_after(path, 0, False).topk(3).indices.tolist())
        path = (*path, likely[-1][0])
    assert set(paths_of(dependent, 0)) == {p for d in range(1, 4) for p in itertools.product(*likely[:d])}


def test_the_dynamic_tree_expands_the_most_probable_nodes_and_keeps_the_best():
    table = Table(2)
    tree = dynamic_tree(table, most_likely, width=2, depth=DEPTH, budget=7)
    assert table.asked == [1, 2, 2]
    for row in range(2):
        every = every_path(row, False)
        first = best({p: every[p] for p in every if len(p) == 1}, 2)
        second = {q for p in first for q in best({q: every[q] for q in every if q[:-1] == p}, 2)}
        expanded = best({p: every[p] for p in second}, 2)
        third = {q for p in expanded for q in best({q: every[q] for q in every if q[:-1] == p}, 2)}
        assert set(paths_of(tree, row)) == best({p: every[p] for p in (*first, *second, *third)}, 7)


def test_a_static_tree_holds_the_ranks_of_its_paths():
    tree, table = static_tree(Table(2), most_likely, Shape.of(BRANCHY)), Table(2)
    static_tree(table, most_likely, Shape.of(BRANCHY))
    assert table.asked == [1, 2, 2], "only nodes with children are asked for"
    for row in range(2):
        wanted = set()
        for ranks in BRANCHY:
            path = ()
            for rank in ranks:
                path = (*path, int(logits_after(path, row, False).topk(rank + 1).indices[rank]))
            wanted.add(path)
        assert set(paths_of(tree, row)) == wanted
    assert static_tree(Table(1, depth=1), most_likely, Shape.of(BRANCHY)).tokens.shape == (1, 3)


@pytest.mark.parametrize(("paths", "why"), [([[0, 0]], "needs"), ([[1]], "needs"), ([[0], [0]], "twice"), ([], "one")])
def test_shapes_that_are_none(paths, why):
    with pytest.raises(ValueError, match=why):
        Shape.of(paths)


def test_branches_are_the_ancestors():
    parents = torch.tensor([[0, 0, 0, 1, 2, 4], [0, 0, 1, 2, 3, 4]])
    found = Branches.of(parents, 5)
    assert found.depth.tolist() == [[0, 1, 1, 2, 2, 3], [0, 1, 2, 3, 4, 5]]
    for row in range(2):
        for s in range(6):
            above, at = {s}, s
            while at:
                at = int(parents[row, at])
                above.add(at)
            assert set(found.seen[row, s].nonzero()[:, 0].tolist()) == above


def test_children_are_drawn_without_replacement():
    """By chi-square over ordered pairs; false alarms 1e-4, seed fixed."""
    from scipy import stats

    logits = torch.tensor([1.0, 0.0, -0.5, 0.7]).expand(1, 20_000, 4)
    found = drawn(Sampler(Sampling(0.8), [3]))(logits, 2)
    p = (logits[0, 0] / 0.8).softmax(0).double()
    assert torch.allclose(found.law[0, 0].double(), p, atol=1e-6)
    pairs = torch.bincount(found.rows[0, :, 0] * 4 + found.rows[0, :, 1], minlength=16)
    wanted = torch.tensor([[0.0 if i == j else p[i] * p[j] / (1 - p[i]) for j in range(4)] for i in range(4)]).flatten()
    assert pairs[wanted == 0].sum() == 0
    some = wanted > 0
    expected = wanted[some] / wanted.sum() * 20_000
    assert stats.chisquare(pairs[some].double().numpy(), expected.numpy()).pvalue > 1e-4


def test_filters_leave_fewer_children():
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
    found = drawn(Sampler(Sampling(1.0, top_k=2), [0]))(logits, 4)
    assert found.real.tolist() == [[[True, True, False, False]]]
    assert set(found.rows[0, 0, :2].tolist()) == {0, 1}


# The rules. A target and a draft over three tokens, in fractions whose thresholds lie on a grid of twelfths.
Q = [F(1, 8), F(1, 2), F(3, 8)]
P = [F(1, 2), F(1, 4), F(1, 4)]
GRID = 12


def one_level(orders, law) -> TokenTree:
    """A tree of one level for each order of children."""
    tokens = torch.tensor(orders)
    B, C = tokens.shape
    zero = torch.zeros_like(tokens)
    wide = torch.tensor([float(x) for x in law]).expand(B, C + 1, 3).clone()
    return TokenTree(
        tokens, zero, zero + 1, torch.arange(C).expand(B, C), zero.float(), torch.ones_like(tokens).bool(), 1, wide
    )


def fractions_of(order, law) -> F:
    """Probability to draw children in this order without replacement."""
    chance, left = F(1), F(1)
    for token in order:
        chance, left = chance * law[token] / left, left - law[token]
    return chance


@pytest.mark.parametrize("children", [1, 2, 3])
def test_drawn_children_of_one_level_give_the_targets_law_exactly(children):
    orders = list(itertools.permutations(range(3), children))
    points = (torch.arange(GRID) + 0.5) / GRID
    uniforms = torch.cartesian_prod(*[points] * (children + 1)).view(-1, children + 1)
    law = [F(0)] * 3
    target = torch.tensor([float(x) for x in Q]).expand(len(uniforms), children + 1, 3)
    for order in orders:
        tree = one_level([order], P)
        tree = TokenTree(
            *(getattr(tree, name).expand(len(uniforms), -1) for name in ("tokens", "parents", "depth", "rank")),
            tree.log_probs.expand(len(uniforms), -1),
            tree.real.expand(len(uniforms), -1),
            1,
            tree.law.expand(len(uniforms), -1, -1),
        )
        found = drawn_children(tree, target, uniforms)
        first = tree.tokens.gather(1, (found.path[:, 1:2] - 1).clamp_min(0))[:, 0]
        first = torch.where(found.accepted > 0, first, found.following)
        counts = torch.bincount(first, minlength=3).tolist()
        for token in range(3):
            law[token] += fractions_of(order, P) * F(counts[token], len(uniforms))
    assert law == Q


def test_a_deterministic_tree_of_one_level_gives_the_targets_law_exactly():
    points = (torch.arange(8) + 0.5) / 8
    uniforms = torch.cartesian_prod(points, points)
    tree = one_level([[2, 0]] * len(uniforms), P)
    found = deterministic_tree(tree, torch.tensor([float(x) for x in Q]).expand(len(uniforms), 3, 3), uniforms)
    first = tree.tokens.gather(1, (found.path[:, 1:2] - 1).clamp_min(0))[:, 0]
    first = torch.where(found.accepted > 0, first, found.following)
    assert [F(c, len(uniforms)) for c in torch.bincount(first, minlength=3).tolist()] == Q
    assert F(int(found.accepted.sum()), len(uniforms)) == Q[2] + Q[0], "acceptance is the mass on the children"


# Two levels: laws of every prefix, in fractions.
def law_after(seed: int, prefix: tuple[int, ...]) -> list[F]:
    weights = np.random.default_rng([seed, 9, *prefix]).integers(1, 6, 3)
    return [F(int(w), int(weights.sum())) for w in weights]


def q_after(prefix):
    return law_after(1, prefix)


def p_after(prefix):
    return law_after(2, prefix)


def residual_of(q, p):
    left = [max(a - b, F(0)) for a, b in zip(q, p, strict=True)]
    return [x / sum(left) for x in left] if sum(left) else q


def without(p, token):
    rest = [F(0) if t == token else x for t, x in enumerate(p)]
    return [x / sum(rest) for x in rest] if sum(rest) else rest


def renormalised(q, p):
    """The mistake: after a refusal the target's law without the refused mass is only renormalised, not reduced by p."""
    return q


def enumerate_drawn(counts, prefix=(), residual=residual_of):
    """Law of the committed tokens: children are drawn (counts[depth] of them), tried in order, and so on."""
    law: dict[tuple[int, ...], F] = {}
    for order in itertools.permutations(range(3), counts[0]) if counts else [()]:
        chance = fractions_of(order, p_after(prefix))
        q, p, reach = q_after(prefix), p_after(prefix), chance
        for token in order:
            accept = min(F(1), q[token] / p[token])
            if accept:
                for tail, below in enumerate_drawn(counts[1:], (*prefix, token), residual).items():
                    law[(token, *tail)] = law.get((token, *tail), F(0)) + reach * accept * below
            reach *= 1 - accept
            q, p = residual(q, p), without(p, token)
        for token in range(3):
            law[(token,)] = law.get((token,), F(0)) + reach * q[token]
    return law


def completed(law, length: int):
    """Texts of `length` tokens: what a round did not commit comes from the target."""
    found: dict[tuple[int, ...], F] = {}
    for text, chance in law.items():
        for tail in itertools.product(range(3), repeat=length - len(text)):
            whole, weight = text, chance
            for token in tail:
                weight *= q_after(whole)[token]
                whole = (*whole, token)
            found[whole] = found.get(whole, F(0)) + weight
    return {text: chance for text, chance in found.items() if chance}


def target_law(length: int):
    return completed({(): F(1)}, length)


@pytest.mark.parametrize("counts", [(1,), (2, 1), (2, 2), (3, 2)], ids=str)
def test_the_law_of_drawn_children_is_the_targets(counts):
    assert completed(enumerate_drawn(counts), 3) == target_law(3)
    assert completed(enumerate_drawn(counts, residual=renormalised), 3) != target_law(3)


class Scripted:
    """Draws of a choose function that are given, and their laws; and the expansion of the draft p."""

    def __init__(self, first, second):
        self.first, self.second, self.depth, self.marginals = first, second, 2, None

    def root(self):
        self.paths = [[()] for _ in self.first]
        return self._laws()

    def below(self, rows, parents):
        self.paths = [[(t,) for t in row] for row in rows.tolist()]
        return self._laws()

    def _laws(self):
        return torch.tensor([[[float(x) for x in p_after(path)] for path in own] for own in self.paths]).log()

    def choose(self, logits, count):
        if logits.shape[1] == 1 and self.paths[0] == [()]:
            rows = torch.tensor(self.first)[:, None]
        else:  # what a node draws depends on its token alone, so that the script does not depend on the expansion
            rows = torch.tensor([[self.second[b][path[0]] for path in own] for b, own in enumerate(self.paths)])
        law = logits.exp()
        return Children(rows, law.gather(-1, rows).log(), torch.ones_like(rows).bool(), law)


def by_hand(children, tree_law, prefix, uniforms, tried):
    """`drawn_children` of one request, transcribed: `children` maps a path to its drawn tokens in order."""
    q, p = q_after(prefix), p_after(prefix)
    for token in children.get(prefix, ()):
        if F(uniforms[tried[(*prefix, token)]]) * p[token] < q[token]:
            return by_hand(children, tree_law, (*prefix, token), uniforms, tried)
        q, p = residual_of(q, p), without(p, token)
    return prefix, q


@pytest.mark.parametrize("builder", ["static", "dynamic"])
def test_the_real_functions_decide_as_the_transcription(builder):
    firsts = list(itertools.permutations(range(3), 2))
    generator = np.random.default_rng(5)
    B = 600
    first = [list(firsts[i % 6]) for i in range(B)]
    second = [[list(firsts[generator.integers(6)]) for _ in range(3)] for _ in range(B)]
    scripted = Scripted(first, second)
    if builder == "static":
        shape = Shape.of([[0], [1], [0, 0], [0, 1], [1, 0]])
        tree = static_tree(scripted, scripted.choose, shape)
    else:  # room for the children of one node: those of the more probable one
        tree = dynamic_tree(scripted, scripted.choose, width=2, depth=2, budget=4, prune=False)
    N = tree.tokens.shape[1]
    uniforms = torch.from_numpy(generator.random((B, N + 1)))
    paths = [{0: ()} for _ in range(B)]
    for b in range(B):
        for n in range(N):
            paths[b][n + 1] = (*paths[b][int(tree.parents[b, n])], int(tree.tokens[b, n]))
    target = torch.tensor([[[float(x) for x in q_after(paths[b][n])] for n in range(N + 1)] for b in range(B)])
    found = drawn_children(tree, target.double(), uniforms)
    depths = set()
    for b in range(B):
        if builder == "dynamic":
            a, z = (tuple(first[b])[i : i + 1] for i in range(2))
            likely = max((a, z), key=lambda path: (p_after(())[path[0]], path == a))
            assert {path[:1] for path in paths[b].values() if len(path) == 2} == {likely}
        children = {}
        for path in list(paths[b].values())[1:]:
            children.setdefault(path[:-1], []).append(path[-1])
        tried = {path: n - 1 for n, path in paths[b].items() if n}
        prefix, q = by_hand(children, None, (), uniforms[b].tolist(), tried)
        assert tuple(paths[b][n] for n in found.path[b, 1 : 1 + int(found.accepted[b])].tolist()) == tuple(
            prefix[:d] for d in range(1, len(prefix) + 1)
        )
        edges = np.cumsum([float(x) for x in q])
        assert int(found.following[b]) == int(np.searchsorted(edges, float(uniforms[b, -1]), side="right"))
        depths.add(int(found.accepted[b]))
    assert depths == {0, 1, 2}


def test_a_deterministic_tree_follows_what_the_target_draws():
    tree = static_tree(Table(64), most_likely, Shape.of(BRANCHY))
    target = torch.rand(64, len(BRANCHY) + 1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target /= target.sum(-1, keepdim=True)
    uniforms = torch.rand(64, DEPTH + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sampled, likely, lengths = deterministic_tree(tree, target, uniforms), greedy(tree, target.argmax(-1)), set()
    for b in range(64):
        for found, pick in (
            (sampled, lambda at, d: int(np.searchsorted(np.cumsum(target[b, at]), uniforms[b, d], side="right"))),  # noqa: B023
            (likely, lambda at, d: int(target[b, at].argmax())),  # noqa: B023
        ):
            at, path = 0, [0]
            while True:
                token = pick(at, len(path) - 1)
                below = [n + 1 for n in range(len(BRANCHY)) if tree.parents[b, n] == at and tree.tokens[b, n] == token]
                if not below:
                    break
                at = below[0]
                path.append(at)
            assert found.path[b, : len(path)].tolist() == path and int(found.accepted[b]) == len(path) - 1
            assert int(found.following[b]) == token
            lengths.add(len(path))
    assert {1, 2, 3} <= lengths


def test_a_chain_is_a_tree_of_one_branch():
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(500, 4, 6, generator=generator).softmax(-1)
    q = (torch.rand(500, 5, 6, generator=generator) * 2).softmax(-1)
    tokens = torch.distributions.Categorical(p).sample()
    uniforms = torch.rand(500, 5, dtype=torch.float64, generator=generator)
    tree = TokenTree.chain(Proposal(tokens, p, None))
    found, wanted = drawn_children(tree, q, uniforms), verify(tokens, p, q, torch.full((500,), 4), uniforms)
    assert torch.equal(found.accepted, wanted[0]) and torch.equal(found.following, wanted[1])
    assert len(set(wanted[0].tolist())) == 5
    likely, chosen = greedy(tree, q.argmax(-1)), verify_greedy(tokens, q.argmax(-1), torch.full((500,), 4))
    assert torch.equal(likely.accepted, chosen[0]) and torch.equal(likely.following, chosen[1])


def test_padding_is_never_accepted():
    tree = one_level([[1, 2]], P)
    gone = replace(tree, real=torch.tensor([[False, True]]))
    assert int(greedy(gone, torch.tensor([[1, 0, 0]])).accepted) == 0
    certain = torch.tensor([[[0.0, 1.0, 0.0]] * 3])
    assert int(drawn_children(gone, certain, torch.zeros(1, 3)).accepted) == 0
    assert int(deterministic_tree(gone, certain, torch.zeros(1, 2)).accepted) == 0
