"""Trees in the target's pass, in the drafts and in the decoding loop.

Chi-square tests: as in test_lossless.py, with the same false alarms (1e-4 for a correct loop with another seed).
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import specbench.decoding.tree_loop
from analysis.read.runs import load
from analysis.statistics.headline import headline
from specbench import fast
from specbench.data.prompts.benchmarks import Prompt
from specbench.decoding import trees
from specbench.decoding.loop import Decoded, Limits, decode, speculative_decode
from specbench.decoding.sampling import Sampler, Sampling, draw
from specbench.decoding.tree_loop import tree_decode
from specbench.decoding.tree_shapes import BestFirst, DynamicTree, StaticTree, TopW, TreeShape
from specbench.decoding.tree_verification import Descent
from specbench.decoding.trees import TokenTree
from specbench.drafts.draft import Draft
from specbench.evaluation.draft_evaluation import Protocol, answer
from specbench.evaluation.recorded_rounds import from_lines
from specbench.metrics.rounds import DecodingMetrics
from specbench.models.attention import attend_stored
from specbench.models.branches import Branches
from specbench.models.kv_cache import KVCache
from specbench.models.target import Target
from specbench.runs.run_folder import RunFolder
from tests import families, tiny, toys
from tests.test_lossless import ALARM, LENGTH, MANY, MOST, PROMPT, SAMPLINGS, p_value
from tests.test_trees import BRANCHY

PARENTS = [[0, 0, 0, 0, 1, 1, 2, 4, 7], [0, 0, 1, 1, 0, 2, 5, 6, 3], [0, 0, 1, 2, 3, 4, 5, 6, 7]]
LEVELS = 8


def path_to(parents: list[int], node: int) -> list[int]:
    path = [node]
    while path[0]:
        path.insert(0, parents[path[0]])
    return path


def agrees(target: Target, room: float = 2e-4) -> None:
    """Every node of three trees behind texts of different lengths, against a whole pass over its own path; and the
    tokens after a path that was kept."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([17, 11, 14])
    tokens = torch.randint(2, 90, (3, 17), generator=generator)
    block = torch.randint(2, 90, (3, len(PARENTS[0])), generator=generator)
    state, _ = target.prefill(tokens, lengths)
    context = target.extend(state, block, Branches.of(torch.tensor(PARENTS), LEVELS))

    def alone(row: int, more: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        text = torch.tensor([[*tokens[row, : lengths[row]].tolist(), *more]])
        whole = target.states(text, torch.tensor([text.shape[1]]))
        return whole.last[0, -1], whole.taps[0, -1]

    def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
        return bool((found - wanted).abs().max() <= room * max(1.0, float(wanted.abs().max())))

    for row, parents in enumerate(PARENTS):
        for node in range(len(parents)):
            last, taps = alone(row, block[row, path_to(parents, node)].tolist())
            assert near(context.last[row, node], last) and near(context.taps[row, node], taps), (row, node)
    ends = (8, 7, 2)
    paths = [path_to(parents, end) for parents, end in zip(PARENTS, ends, strict=True)]
    longest = max(map(len, paths))
    state.keep(torch.tensor([[*path, *[0] * (longest - len(path))] for path in paths]))
    state.advance(torch.tensor([len(path) for path in paths]))
    after = target.extend(state, torch.tensor([[5], [6], [7]]))
    for row, path in enumerate(paths):
        last, _ = alone(row, [*block[row, path].tolist(), 5 + row])
        assert near(after.last[row, 0], last), row


WINDOWED = {"mistral": families.config("mistral"), "gemma4": tiny.GEMMA4}


@pytest.mark.parametrize("name", WINDOWED)
def test_every_node_has_the_states_of_its_path(name):
    target = Target.from_config(WINDOWED[name], (0, 1), seed=3, stop_token_ids=[])
    assert target.decodes_directly == (name == "mistral")
    agrees(target)
    with fast.plain():
        agrees(target)


@pytest.mark.long
@pytest.mark.parametrize("name", families.CONFIGS)
def test_every_node_has_the_states_of_its_path_in_every_family(name):
    target = Target.from_config(families.config(name), (0, 1), seed=3, stop_token_ids=[])
    if target.no_trees_because(40):
        with pytest.raises(ValueError, match="cannot read a tree"):
            agrees(target)
    else:
        agrees(target)


def test_positions_by_index_and_leaks_are_seen(monkeypatch):
    """The two known mistakes give other states: a position that counts nodes, and a mask that shows a sibling."""
    target = Target.from_config(WINDOWED["mistral"], (0, 1), seed=3, stop_token_ids=[])
    right = Branches.of
    by_index = lambda parents, levels: Branches(  # noqa: E731
        torch.arange(parents.shape[1]).expand(parents.shape), right(parents, levels).seen
    )
    leaking = lambda parents, levels: Branches(right(parents, levels).depth, leaks(right(parents, levels)))  # noqa: E731
    for wrong in (by_index, leaking):
        monkeypatch.setattr(Branches, "of", wrong)
        with pytest.raises(AssertionError):
            agrees(target)


def leaks(branches: Branches) -> torch.Tensor:
    """Every node also sees its neighbour of the same depth that stands before it."""
    S = branches.depth.shape[1]
    sibling = (branches.depth[:, :, None] == branches.depth[:, None, :]) & torch.ones(S, S).tril(-1).bool()
    return branches.seen | sibling


def test_a_target_without_keys_to_roll_back_refuses_a_tree():
    target = Target.from_config(families.config("qwen3_next"), (0, 1), seed=0, stop_token_ids=[])
    draft = toys.draft("dflash")
    with pytest.raises(ValueError, match="linear_attention cannot be rolled back"):
        list(tree_decode(target, draft, [[3]], Sampling(), Limits(4), BestFirst(4)))


# Drafts: the child logits of a node are those of a proposal along its path.
@pytest.mark.parametrize("method", tiny.METHODS)
def test_child_logits_are_those_of_a_proposal_along_the_path(method):
    target, draft = tiny.target("qwen3"), tiny.draft(method, "qwen3").eval()
    tokens, lengths = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(1)), torch.tensor([9, 6])
    with torch.inference_mode(), target.tapping(draft.target_layer_ids):
        state = draft.begin(target.prefill(tokens, lengths)[1], tokens)
        anchor = torch.tensor([4, 9])
        own, replayed = draft.expand(state, anchor), Draft.expand(draft, state, anchor)
        assert own.depth == replayed.depth == draft.block_size
        near = lambda a, b: torch.allclose(a, b, atol=2e-4, rtol=2e-4)  # noqa: E731
        logits = own.root()
        assert near(logits, replayed.root())
        parents = torch.zeros(2, 3, dtype=torch.long)
        for _ in range(1, draft.block_size):
            rows = logits.topk(3, -1).indices[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)
            logits, wanted = own.below(rows, parents), replayed.below(rows, parents)
            assert near(logits, wanted)
            parents = torch.tensor([[2, 0, 0], [1, 1, 2]])
        assert (own.marginals is None) == (replayed.marginals is None)


SHAPES: dict[str, TreeShape] = {
    "static": StaticTree(BRANCHY),
    "dynamic": DynamicTree(budget=7, width=2),
    "best_first": BestFirst(budget=8),
    "top_w": TopW(budget=8, width=3),
    "static, drawn": StaticTree(BRANCHY, rule="drawn_children"),
    "dynamic, drawn": DynamicTree(budget=8, width=2, rule="drawn_children"),
}
DRAWN = [name for name in SHAPES if "drawn" in name]


NIGHTLY = pytest.mark.nightly
# By default a draft whose slots depend on each other, and one that runs step by step.
SOME = ("dspark", "eagle3")
EVERY = [
    method if method in SOME else pytest.param(method, marks=pytest.mark.long if method in toys.METHODS else NIGHTLY)
    for method in toys.CLASSES
]


@pytest.mark.parametrize("method", EVERY)
def test_greedy_text_is_the_targets_own(method):
    """Ragged prompts in a batch in which requests join and leave."""
    prompts = [[0, 3, 1], [2], [1, 1, 4, 0, 2, 3, 3], [4, 2], [0, 0, 0, 1, 2, 3]]
    limits = Limits(12, stop_token_ids=(4,), batch_size=2)
    wanted = {d.index: d.output_ids for d in decode(toys.target(), prompts, Sampling(), limits)}
    for shape in [SHAPES[name] for name in ("static", "dynamic", "best_first", "top_w")]:
        found = list(tree_decode(toys.target(), toys.draft(method), prompts, Sampling(), limits, shape))
        assert {d.index: d.output_ids for d in found} == wanted
        rounds = [r for d in found for r in d.rounds]
        assert any(r.accepted > 1 for r in rounds) and any(rank > 0 for r in rounds for rank in r.ranks)
        assert all(len(r.ranks) == r.accepted <= r.proposed and len(r.widths) >= r.accepted for r in rounds)
        assert all(r.nodes <= shape.nodes for r in rounds)


def test_a_chain_as_a_tree_decodes_as_the_loop_of_chains():
    chain = StaticTree([[0], [0, 0], [0, 0, 0]])
    prompts, limits = [[0, 3, 1], [2, 2], [1, 4, 4, 0]], Limits(14, stop_token_ids=(4,), batch_size=2)
    for method in SOME:
        pair = toys.target(), toys.draft(method), prompts, Sampling(), limits
        branched, plain = list(tree_decode(*pair, chain)), list(speculative_decode(*pair))
        for a, b in zip(branched, plain, strict=True):
            assert (a.index, a.output_ids, a.truncated) == (b.index, b.output_ids, b.truncated)
            assert [(r.proposed, r.accepted, r.tokens, r.stop) for r in a.rounds] == [
                (r.proposed, r.accepted, r.tokens, r.stop) for r in b.rounds
            ]
            assert [r.nodes for r in a.rounds] == [r.proposed for r in b.rounds]


@pytest.mark.parametrize("name", ["best_first", "dynamic", "static, drawn"])
def test_a_request_does_not_depend_on_its_neighbours(name):
    prompts, seeds = [[0, 3, 1], [2], [1, 1, 4, 0, 2, 3, 3], [4, 2]], [5, 6, 7, 8]
    pair = toys.target(), toys.draft("eagle3")

    def texts(batch_size: int) -> list:
        limits = Limits(10, batch_size=batch_size)
        found = tree_decode(*pair, prompts, Sampling(1.0), limits, SHAPES[name], seeds)
        return sorted((d.index, d.output_ids, [r.ranks for r in d.rounds]) for d in found)

    assert texts(1) == texts(4)


def test_refusals():
    pair = toys.target(), toys.draft("dflash"), [[1]], Sampling()
    with pytest.raises(ValueError, match="accounting=deepspec counts chains"):
        list(tree_decode(*pair, Limits(4, accounting="deepspec"), BestFirst(4)))
    with pytest.raises(ValueError, match="Small proposes one chain"):
        list(tree_decode(toys.target(), toys.draft("small"), [[1]], Sampling(), Limits(4), BestFirst(4)))
    for kind in (BestFirst, TopW):
        with pytest.raises(ValueError, match="drawn children must all be kept"):
            kind(budget=4, rule="drawn_children")


# The law through the whole loop.
def write(
    method: str, shape: TreeShape, draws: int, sampling: str = "warm", seed: int = 0, batch: int = 512
) -> list[Decoded]:
    limits = Limits(LENGTH, batch_size=batch)
    pair = toys.target(), toys.draft(method), [PROMPT] * draws
    return list(tree_decode(*pair, SAMPLINGS[sampling], limits, shape, range(seed, seed + draws)))


@pytest.mark.parametrize(
    ("method", "name", "sampling"),
    [("eagle3", "dynamic", "warm"), ("dspark", "static, drawn", "top-p")],
)
def test_the_loop_has_the_targets_distribution(method, name, sampling):
    written = write(method, SHAPES[name], 2048, sampling)
    rounds = [r for d in written for r in d.rounds]
    assert {r.accepted for r in rounds} >= {0, 1, 2} and {rank for r in rounds for rank in r.ranks} >= {0, 1}
    assert p_value(written, SAMPLINGS[sampling]) > ALARM


def only_renormalised(tree, target, uniforms):
    """The mistake: after a refusal the target's law without the refused child is renormalised, not reduced by p."""
    at, going = torch.zeros_like(tree.tokens[:, 0]), torch.ones_like(tree.tokens[:, 0], dtype=torch.bool)
    rows, accepted, path = torch.arange(len(at)), torch.zeros_like(at), [at]
    q = target[rows, at].double()
    for _ in range(tree.levels):
        here, went = at, torch.zeros_like(going)
        for rank in range(int(tree.rank.max()) + 1):
            matches = tree.real & (tree.parents == here[:, None]) & (tree.rank == rank)
            node = matches.int().argmax(1)
            trying = going & ~went & matches.any(1)
            token = tree.tokens[rows, node]
            took = trying & (uniforms[rows, node] * tree.law[rows, here, token] < q[rows, token])
            struck = q.scatter(1, token[:, None], 0)
            q = torch.where((trying & ~took)[:, None], struck / struck.sum(-1, keepdim=True), q)
            at, went = torch.where(took, node + 1, at), went | took
        q = torch.where(went[:, None], target[rows, at].double(), q)
        going, accepted = went, accepted + went
        path.append(torch.where(going, at, 0))
    return Descent(torch.stack(path, 1), accepted, draw(q, uniforms[:, -1]))


def test_a_renormalised_target_is_found_out(monkeypatch):
    monkeypatch.setattr(specbench.decoding.tree_loop, "drawn_children", only_renormalised)
    assert p_value(write("dspark", SHAPES["static, drawn"], 2048), SAMPLINGS["warm"]) < ALARM


@pytest.mark.long
def test_children_left_out_after_they_were_drawn_are_found_out(monkeypatch):
    """EAGLE-2's reranking removes drawn children that are improbable, and so the drawn rule does not hold for it."""

    def pruned(expansion, choose, width, depth, budget, prune=True):
        return trees.dynamic_tree(expansion, choose, width, depth, 3, prune=True)

    monkeypatch.setattr("specbench.decoding.tree_shapes.dynamic_tree", pruned)
    assert p_value(write("dspark", SHAPES["dynamic, drawn"], 4096), SAMPLINGS["warm"]) < ALARM


WRONG = {
    "index": lambda found: Branches(torch.arange(found.depth.shape[1]).expand(found.depth.shape), found.seen),
    "leak": lambda found: Branches(found.depth, leaks(found)),
}


@cache
def attentive_target() -> Target:
    """The toy target with sharp attention of large effect, and a rope that turns within a few positions: one whose
    text shows what a node attended to."""
    target = Target.from_config(
        {**toys.CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 10.0}},
        toys.TAPS,
        seed=1,
        name="attentive toy",
        stop_token_ids=[],
    )
    for layer in target.layers:
        layer.self_attn.o_proj.weight.data.mul_(10)
        layer.self_attn.q_norm.weight.data.mul_(3)
    target.direct.stack.forget()
    return target


@pytest.fixture
def attentive(monkeypatch):
    monkeypatch.setattr(toys, "target", attentive_target)
    toys.draft.cache_clear()
    yield
    toys.draft.cache_clear()


def mistaken(monkeypatch, mistake: str) -> None:
    right = TokenTree.branches
    monkeypatch.setattr(TokenTree, "branches", lambda tree: WRONG[mistake](right(tree)))


def test_wrong_positions_and_masks_are_found_out(attentive, monkeypatch):
    assert p_value(write("eagle3", BestFirst(30), 2048), SAMPLINGS["warm"]) > ALARM
    for mistake in WRONG:
        with monkeypatch.context() as patch:
            mistaken(patch, mistake)
            assert p_value(write("eagle3", BestFirst(30), 2048), SAMPLINGS["warm"]) < ALARM, mistake


@pytest.mark.nightly
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("method", toys.CLASSES)
def test_the_distribution_of_method_and_builder_and_rule_with_many_draws(method, name):
    assert p_value(write(method, SHAPES[name], MANY, "all", 1 << 22), SAMPLINGS["all"]) > ALARM


@pytest.mark.nightly
@pytest.mark.parametrize(("method", "name"), [("eagle3", "dynamic"), ("dspark", "static, drawn")])
def test_the_distribution_of_both_rules_with_1e5_draws(method, name):
    assert p_value(write(method, SHAPES[name], MOST, "warm", 1 << 23), SAMPLINGS["warm"]) > ALARM


@pytest.mark.nightly
@pytest.mark.parametrize("mistake", ["none", *WRONG])
def test_the_distribution_and_the_mistakes_with_1e5_draws(mistake, attentive, monkeypatch):
    if mistake in WRONG:
        mistaken(monkeypatch, mistake)
    found = p_value(write("eagle3", DynamicTree(budget=12, width=3), MOST, "warm", 1 << 24), SAMPLINGS["warm"])
    assert found < ALARM if mistake in WRONG else found > ALARM


@pytest.mark.nightly
def test_a_renormalised_target_is_found_out_with_1e5_draws(monkeypatch):
    monkeypatch.setattr(specbench.decoding.tree_loop, "drawn_children", only_renormalised)
    assert p_value(write("dspark", SHAPES["static, drawn"], MOST, "warm", 1 << 24), SAMPLINGS["warm"]) < ALARM


def test_uniforms_are_those_of_each_request():
    sampler = Sampler(Sampling(1.0), [1, 2])
    alone = Sampler(Sampling(1.0), [2])
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(trees.drawn(sampler)(logits, 2).rows[1:], trees.drawn(alone)(logits[1:], 2).rows)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_flex_attention_over_the_branches_equals_the_dense_pass(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cache, generator = KVCache(3, device), torch.Generator().manual_seed(2)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    cache.write(0, normal(3, 20, 2, 16), normal(3, 20, 2, 16))
    cache.advance(torch.tensor([20, 7, 13], device=device))
    branches = Branches.of(torch.tensor(PARENTS, device=device), LEVELS)
    size = branches.depth.shape[1]
    query, stored = normal(3, size, 4, 16), cache.write(0, normal(3, size, 2, 16), normal(3, size, 2, 16))
    for window in (None, 6):
        mask = cache.branching(branches, window)
        seen = lambda b, h, q, k, mask=mask: mask[b, 0, q, k]  # noqa: E731
        blocks = create_block_mask(seen, 3, None, size, mask.shape[-1], device=device)
        sides = (query, *stored)
        found = flex_attention(*(side.transpose(1, 2) for side in sides), block_mask=blocks, enable_gqa=True)
        wanted = attend_stored(query, stored, mask, 16**-0.5)
        assert torch.allclose(found.transpose(1, 2), wanted, atol=1e-5)


def test_records_count_levels_nodes_and_ranks(tmp_path):
    """The record of a prompt and the tables that are read back, against the rounds themselves."""
    prompts = [Prompt(str(i), "one", "chat", None, (0, 3, 1 + i), seed=i) for i in range(3)]
    protocol = Protocol(Sampling(1.0), Limits(20, batch_size=3), tree=SHAPES["best_first"])
    names = {"run": "r", "method": "eagle3", "target": "toy", "suite": "s", "seed": 0}
    done = list(answer(toys.target(), toys.draft("eagle3"), prompts, protocol, names))
    for one in done:
        record, rounds = one.record, one.rounds
        assert record["tree"] == "best-first-8" and record["nodes"] == sum(rounds["nodes"]) > record["proposed"]
        assert record["by_round"] == [
            list(r) for r in zip(*(rounds[k] for k in ("proposed", "accepted", "committed")), strict=True)
        ]
        for depth, rank, offered, accepted in record["by_rank"]:
            assert offered == sum(len(w) >= depth and w[depth - 1] > rank for w in rounds["widths"])
            assert accepted == sum(len(r) >= depth and r[depth - 1] == rank for r in rounds["ranks"])
        assert sum(row[3] for row in record["by_rank"]) == record["accepted"]
        (read,) = from_lines([rounds])
        assert read.proposed.tolist() == rounds["nodes"] and (read.places >= 0).sum(1).tolist() == rounds["accepted"]
    with RunFolder(tmp_path, "evaluate", "r", {}) as run:
        run.write_records([one.record for one in done])
        run.finish()
    total = load([run.path]).counts().total()
    rounds, nodes, accepted = (sum(one.record[name] for one in done) for name in ("rounds", "nodes", "accepted"))
    assert total.verified_per_round == pytest.approx(nodes / rounds + 1)
    assert total.acceptance_rate == pytest.approx(accepted / nodes)
    found, metrics = headline([one.record for one in done], 20), DecodingMetrics(3)
    for one in done:
        metrics.update(one.record["histogram"], one.record["committed"], one.record["nodes"])
    assert found["verified_per_round"]["value"] == pytest.approx(float(metrics.compute()["verified_per_round"]))
    first = [row for row in found["ranks"] if row["depth"] == 1]
    assert found["depths"][0]["n"] == rounds == first[0]["n"]
    assert found["depths"][0]["any_child"] == pytest.approx(
        sum(row["conditional"] * row["n"] for row in first) / rounds
    )
