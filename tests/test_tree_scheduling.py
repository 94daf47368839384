"""The size of token trees chosen by a scheduler: against the literal rule, the target's law, and replayed rounds."""

from __future__ import annotations

import numpy as np
import pytest

from specbench.data.prompts.benchmarks import Prompt
from specbench.decoding.cost_profile import CostProfile
from specbench.decoding.loop import Limits, decode
from specbench.decoding.sampling import Sampling
from specbench.decoding.scheduling import (
    DelayedGlobal,
    FixedLength,
    HardwareAware,
    OracleScheduler,
    Scheduler,
    StaticThreshold,
)
from specbench.decoding.tree_loop import tree_decode
from specbench.decoding.tree_scheduling import joint_log_probs, shortened
from specbench.decoding.tree_shapes import BestFirst, DynamicTree
from specbench.decoding.trees import best_first_tree, dynamic_tree, most_likely
from specbench.evaluation.draft_evaluation import Protocol, answer
from specbench.evaluation.recorded_rounds import flatten, from_lines
from specbench.serving.load import ServedPolicy, closed_loop, workload
from tests import toys
from tests.test_lossless import ALARM, LENGTH, PROMPT, SAMPLINGS, p_value
from tests.test_trees import DEPTH, Table, paths_of

FALLING = CostProfile([1, 2, 4, 8, 40, 4096], [20, 19, 18, 14, 4, 0.03], "falling", "illustrative")
CUT = StaticThreshold(0.15, cumulative=True)
SCHEDULERS = [HardwareAware(FALLING), DelayedGlobal(FALLING, 1), CUT, FixedLength(3)]


def literal(paths: list[dict[tuple[int, ...], float]], profile: CostProfile) -> list[set[tuple[int, ...]]]:
    """Nodes whose parents are there already, the most probable of all requests first, while throughput rises."""
    chosen: list[set[tuple[int, ...]]] = [set() for _ in paths]
    taken, tau = 0, float(len(paths))
    while True:
        open_nodes = [
            (-joint, row, path)
            for row, own in enumerate(paths)
            for path, joint in own.items()
            if path not in chosen[row] and (len(path) == 1 or path[:-1] in chosen[row])
        ]
        if not open_nodes:
            return chosen
        negative, row, path = min(open_nodes)
        before, after = (tau + gain for gain in (0.0, -negative))
        rates = [float(profile.rates(len(paths), taken + more)[-1]) for more in (0, 1)]
        if after * rates[1] <= before * rates[0]:
            return chosen
        chosen[row].add(path)
        taken, tau = taken + 1, after


@pytest.mark.parametrize("independent", [True, False])
def test_nodes_are_added_by_their_gain_over_all_requests(independent: bool) -> None:
    tree = best_first_tree(Table(3, independent), 12, DEPTH)
    every = [{path: float(np.exp(joint)) for path, joint in paths_of(tree, row).items()} for row in range(3)]
    found = shortened(tree, HardwareAware(FALLING), range(3))
    sizes = [len(paths_of(found, row)) for row in range(3)]
    assert [set(paths_of(found, row)) for row in range(3)] == literal(every, FALLING)
    assert 0 < sum(sizes) < 36 and found.tokens.shape[1] == max(sizes) and found.levels == tree.levels


def test_a_threshold_keeps_the_nodes_above_it_and_none_can_be_left() -> None:
    tree = dynamic_tree(Table(3), most_likely, 2, DEPTH, 7)
    every = [{path: float(np.exp(joint)) for path, joint in paths_of(tree, row).items()} for row in range(3)]
    found = shortened(tree, CUT, range(3))
    for row in range(3):
        assert set(paths_of(found, row)) == {path for path, chance in every[row].items() if chance >= 0.15}
        joint = dict(zip(paths_of(found, row), joint_log_probs(found)[row][found.real[row]].tolist(), strict=True))
        assert all(np.exp(value) == pytest.approx(every[row][path], rel=1e-5) for path, value in joint.items())
    nothing = shortened(tree, FixedLength(0), range(3))
    assert nothing.tokens.shape == (3, 1) and not nothing.real.any()


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda one: one.label)
def test_greedy_text_is_the_targets_own(scheduler: Scheduler) -> None:
    prompts, limits = [[0, 3, 1], [2], [1, 1, 4, 0, 2, 3, 3]], Limits(12, stop_token_ids=(4,), batch_size=2)
    wanted = {d.index: d.output_ids for d in decode(toys.target(), prompts, Sampling(), limits)}
    pair = toys.target(), toys.draft("eagle3"), prompts, Sampling(), limits
    whole, found = (list(tree_decode(*pair, BestFirst(8), scheduler=own)) for own in (None, scheduler))
    assert {d.index: d.output_ids for d in found} == wanted
    nodes = [sum(r.nodes for d in decoded for r in d.rounds) / sum(len(d.rounds) for d in decoded)
             for decoded in (whole, found)]  # fmt: skip
    assert nodes[1] < nodes[0]


@pytest.mark.parametrize(
    ("scheduler", "method"),
    [
        (SCHEDULERS[0], "dspark"),
        *(pytest.param(one, name, marks=pytest.mark.nightly) for one in (SCHEDULERS[0], CUT) for name in toys.CLASSES),
    ],
)
def test_sizes_by_gain_keep_the_targets_distribution(scheduler: Scheduler, method: str) -> None:
    """Requests share a forward pass, so that their sizes depend on each other's probabilities."""
    limits = Limits(LENGTH, batch_size=512)
    pair = toys.target(), toys.draft(method), [PROMPT] * 2048, SAMPLINGS["warm"], limits
    wide = CostProfile([1, 1024, 1 << 16], [20.0, 19.0, 0.1], "wide", "illustrative")
    own = HardwareAware(wide) if isinstance(scheduler, HardwareAware) else scheduler
    written = list(tree_decode(*pair, BestFirst(8), range(2048), scheduler=own))
    assert len({r.nodes for d in written for r in d.rounds}) > 2
    assert p_value(written, SAMPLINGS["warm"]) > ALARM


@pytest.mark.parametrize(
    ("scheduler", "shape", "says"),
    [
        (StaticThreshold(0.5), BestFirst(4), "reads the confidences of slots"),
        (OracleScheduler(), BestFirst(4), "reads the confidences of slots"),
        (CUT, DynamicTree(4, 2, rule="drawn_children"), "all that were drawn must be kept"),
    ],
)
def test_what_has_no_meaning_or_breaks_the_law_is_refused(scheduler, shape, says) -> None:
    with pytest.raises(ValueError, match=says):
        Protocol(Sampling(1.0), scheduler=scheduler, tree=shape)
    with pytest.raises(ValueError, match=says):
        list(
            tree_decode(
                toys.target(), toys.draft("dspark"), [[1]], Sampling(1.0), Limits(4), shape, scheduler=scheduler
            )
        )


@pytest.fixture(scope="module")
def recorded() -> list[dict]:
    prompts = [Prompt(str(i), "one", "chat", None, (0, 3, 1 + i % 4, i % 5), seed=i) for i in range(4)]
    protocol = Protocol(Sampling(), Limits(24, batch_size=4), tree=BestFirst(8))
    names = {"run": "r", "method": "eagle3", "target": "toy", "suite": "s", "seed": 0}
    return [one.rounds for one in answer(toys.target(), toys.draft("eagle3"), prompts, protocol, names)]


def test_a_recorded_round_says_what_a_smaller_tree_would_have_accepted(recorded: list[dict]) -> None:
    """Against decoding with the smaller tree, in the round of each prompt that both have: the first."""
    whole = workload(from_lines(recorded))
    for size in (1, 2, 4):
        prompts = [line["prompt_ids"] for line in recorded]
        pair = toys.target(), toys.draft("eagle3"), prompts, Sampling(), Limits(24, batch_size=4)
        smaller = sorted(tree_decode(*pair, BestFirst(8), scheduler=FixedLength(size)), key=lambda d: d.index)
        replayed = whole.accepts(whole.start, np.full(len(prompts), size))
        assert replayed.tolist() == [d.rounds[0].accepted for d in smaller]
    every = np.arange(len(whole.proposed))
    assert whole.accepts(every, whole.proposed).tolist() == whole.accepted.tolist()
    assert whole.accepts(every, whole.needs(every)).tolist() == whole.accepted.tolist()
    assert (whole.accepts(every, np.maximum(whole.needs(every) - 1, 0)) <= whole.accepted).all()


def test_load_shrinks_the_trees_of_a_simulation(recorded: list[dict]) -> None:
    prompts = from_lines(recorded)
    policies = [ServedPolicy(one.label, one, workload(prompts)) for one in (HardwareAware(FALLING), FixedLength())]
    light, heavy, fixed = (
        closed_loop(policy, FALLING, users, steps=60, warmup=0)
        for policy, users in ((policies[0], 1), (policies[0], 4), (policies[1], 4))
    )
    assert heavy["verified_per_round"] < light["verified_per_round"]
    assert heavy["throughput"] > fixed["throughput"]


def test_damaged_rounds_of_trees_and_a_calibration_of_them_are_refused(recorded: list[dict]) -> None:
    line = next(line for line in recorded if any(line["accepted"]))
    places = [[len(row), *at[1:]] if at else at for row, at in zip(line["joint"], line["places"], strict=True)]
    with pytest.raises(ValueError, match="`joint` and `places` are not those"):
        from_lines([line | {"places": places}])
    with pytest.raises(ValueError, match="do not say how probable"):
        from_lines([{key: value for key, value in line.items() if key != "joint"}])
    with pytest.raises(ValueError, match="a confidence is of the slots of chains"):
        flatten(from_lines(recorded))
