"""The load simulator: closed forms, conservation, replay, and the paper's curves in shape."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

import configs
from experiments import calibrate, serve
from experiments.cli import main
from specbench.decoding.calibration import fit
from specbench.decoding.cost_profile import CostProfile
from specbench.decoding.loop import Limits, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.decoding.scheduling import DelayedGlobal, FixedLength, HardwareAware, OracleScheduler, StaticThreshold
from specbench.evaluation.recorded_rounds import PromptRounds, flatten, from_lines
from specbench.serving.load import ServedPolicy, closed_loop, poisson, service_levels, workload
from specbench.serving.simulator import SimulatedEngine, Workload
from tests import tiny

SLOTS = 5
CONSTANT = CostProfile([1, 4096], [50.0, 50.0], "constant", "illustrative")


def uniform(accepted, rounds=40, prompts=3):
    """Prompts whose every round accepts the same number of SLOTS slots."""
    tokens = rounds * (accepted + 1)
    return [
        PromptRounds(
            f"{p:016x}", np.full(rounds, SLOTS), np.full(rounds, accepted), np.full(rounds, 0.1), tokens,
            np.full((rounds, SLOTS), 1.0),
        )
        for p in range(prompts)
    ]  # fmt: skip


def drawn(prompts=24, seed=0, ending=True):
    """Rounds of an honest confidence head, prompts of 30 to 60 rounds; the last round overruns the limit a bit."""
    generator = np.random.default_rng(seed)
    made = []
    for p in range(prompts):
        count = int(generator.integers(30, 60))
        logits = generator.normal(1.6, 1.5, (count, SLOTS))
        accepted = (generator.random((count, SLOTS)) < 1 / (1 + np.exp(-logits))).cumprod(1).sum(1)
        tokens = int(accepted.sum()) + count - (min(2, int(accepted[-1])) if ending else 0)
        made.append(PromptRounds(f"{seed:08x}{p:08x}", np.full(count, SLOTS), accepted, np.ones(count), tokens, logits))
    return made


def policy(scheduler, prompts):
    return ServedPolicy(scheduler.label, scheduler, workload(prompts))


@pytest.mark.parametrize("length", [0, 1, 3, 5, None])
@pytest.mark.parametrize("accepted", [0, 2, 5])
def test_constant_rate_and_fixed_length_have_a_closed_form(length, accepted):
    """50 steps a second x 4 users x (min(accepted, length) + 1) tokens, exactly."""
    row = closed_loop(policy(FixedLength(length), uniform(accepted)), CONSTANT, 4, steps=30, warmup=0)
    commits = min(accepted, SLOTS if length is None else length) + 1
    assert row["throughput"] == pytest.approx(50 * 4 * commits)
    assert row["interactivity"] == pytest.approx(50 * commits)
    assert row["verified_per_round"] == 1 + (SLOTS if length is None else length)
    assert row["accepted_length"] == commits and row["simulation"] is True


def test_a_linear_cost_has_a_closed_form_too():
    """Seconds = 0.01 + 0.001 B with B = 6 users x (1 + 3 verified)."""
    tokens = np.array([1, 100])
    profile = CostProfile(tokens, 1 / (0.01 + 0.001 * tokens), "line", "illustrative").with_draft(
        [1, 10], [0.002, 0.002]
    )
    row = closed_loop(policy(FixedLength(3), uniform(2)), profile, 6, steps=20, warmup=5)
    assert row["throughput"] == pytest.approx(6 * 3 / (0.01 + 0.024 + 0.002))


@pytest.mark.parametrize(
    "scheduler",
    [
        FixedLength(),
        FixedLength(2),
        StaticThreshold(0.6),
        HardwareAware(CONSTANT),
        DelayedGlobal(CONSTANT),
        OracleScheduler(),
    ],
    ids=lambda s: s.label,
)
@pytest.mark.parametrize("arrivals", [None, np.linspace(0, 3, 50)], ids=["closed", "open"])
def test_tokens_are_conserved(scheduler, arrivals):
    """What 50 requests committed is what was recorded for their prompts, whatever the scheduler and the load."""
    prompts = drawn()
    order = np.random.default_rng(4).permutation(len(prompts))
    engine = SimulatedEngine(workload(prompts), CONSTANT, scheduler, 7, order, arrivals=arrivals, limit=50)
    steps = list(engine.steps())
    expected = [prompts[order[i % len(order)]].tokens for i in range(50)]
    assert sorted(s.tokens for s in engine.served) == sorted(expected)
    assert sum(s.committed for s in steps) == sum(expected)
    assert max(s.requests for s in steps) <= 7
    assert all(s.accepted <= s.verified <= s.proposed for s in steps)
    assert all(s.arrived <= s.started < s.finished for s in engine.served)
    assert steps[-1].end >= sum(s.seconds for s in steps) - 1e-9


def test_a_full_length_replay_of_one_user_is_the_recording():
    """Round for round: as many steps as were recorded, each with the recorded acceptance."""
    prompts = drawn(prompts=3)
    engine = SimulatedEngine(workload(prompts), CONSTANT, FixedLength(), 1, [0, 1, 2], limit=3)
    steps = list(engine.steps())
    recorded = np.concatenate([p.accepted for p in prompts])
    assert len(steps) == len(recorded)
    assert [s.accepted for s in steps] == recorded.tolist()


@pytest.mark.parametrize(("batch", "length"), [(1, None), (3, None), (3, 2)])
def test_the_simulated_engine_takes_the_steps_of_the_real_one(batch, length):
    """Seven requests decoded for real and replayed: as many engine steps, and the same requests in flight in each."""
    owner, draft, in_flight = tiny.target("qwen3"), tiny.draft("dspark", "qwen3", seed=1), []
    propose = draft.propose

    def counting(state, anchor, *rest):
        in_flight.append(len(anchor))
        return propose(state, anchor, *rest)

    draft.propose = counting
    prompts, limits = [[5 + i, 9, 2 + i] for i in range(7)], Limits(max_new_tokens=14, batch_size=batch)
    sampling = Sampling(temperature=1.0)  # random drafts are accepted now and then
    done = list(speculative_decode(owner, draft, prompts, sampling, limits, scheduler=FixedLength(length)))
    done.sort(key=lambda request: request.index)
    lines = [
        {
            "prompt_ids": d.prompt_ids,
            "output_ids": d.output_ids,
            "proposed": [r.proposed for r in d.rounds],
            "accepted": [r.accepted for r in d.rounds],
            "seconds": [r.seconds for r in d.rounds],
            "confidence": [list(r.confidence) for r in d.rounds],
        }
        for d in done
    ]
    assert sum(sum(line["accepted"]) for line in lines) > 0
    engine = SimulatedEngine(workload(from_lines(lines)), CONSTANT, FixedLength(), batch, range(7), limit=7)
    assert [step.requests for step in engine.steps()] == in_flight


def test_the_oracle_verifies_what_is_accepted_and_bounds_every_policy():
    """Where a verified token costs time, no schedule beats verifying exactly what will be accepted, user by user."""
    prompts = drawn(ending=False)
    tokens = np.array([1, 400])
    profile = CostProfile(tokens, 1 / (0.005 + 0.001 * tokens), "line", "illustrative")
    rows = {
        s.label: closed_loop(policy(s, prompts), profile, 16, steps=400, warmup=50)
        for s in (OracleScheduler(), FixedLength(1), FixedLength(), StaticThreshold(0.7), HardwareAware(profile))
    }
    assert rows["oracle"]["acceptance_rate"] == 1.0 and rows["oracle"]["lossless"] is False
    best = rows.pop("oracle")["throughput"]
    assert all(row["throughput"] < best for row in rows.values())


def test_hardware_aware_follows_the_load():
    """Verified tokens a round fall with concurrency (figure 8) and its throughput keeps up with the best fixed length,
    with 3% allowed for the replay's sampling."""
    prompts = drawn(prompts=60)
    tokens = np.arange(1, 2049)
    profile = CostProfile(tokens, 1 / np.maximum(0.01, 5e-5 * tokens + 0.002), "knee at 160", "illustrative")
    users = (4, 32, 128, 300)
    aware = [closed_loop(policy(HardwareAware(profile), prompts), profile, c, 60, 20) for c in users]
    budgets = [row["verified_per_round"] for row in aware]
    assert budgets[0] == 6.0 and budgets == sorted(budgets, reverse=True) and budgets[-1] < 3.5
    for c, row in zip(users, aware, strict=True):
        fixed = [closed_loop(policy(FixedLength(n), prompts), profile, c, 60, 20) for n in (0, 1, 3, 5)]
        assert row["throughput"] > 0.97 * max(f["throughput"] for f in fixed)


def test_poisson_serves_what_is_offered_until_it_cannot():
    """Capacity is 8 x 50 x 3 = 1200 tokens a second and a request holds 30: 40 a second. Light load: what arrives is
    served, up to the at most 8 requests cut by the window's two ends (2 x 8 x 30 of 12,000 tokens: 4%)."""
    prompts = uniform(2, rounds=10)
    light = poisson(policy(FixedLength(), prompts), CONSTANT, rate=10, requests=500, concurrency=8)
    assert light["throughput"] == pytest.approx(light["offered"], rel=0.04) and light["waiting_end"] < 8
    assert light["interactivity"] == pytest.approx(150)
    heavy = poisson(policy(FixedLength(), prompts), CONSTANT, rate=80, requests=500, concurrency=8)
    assert heavy["throughput"] == pytest.approx(1200, rel=0.02)
    assert heavy["throughput"] < 0.7 * heavy["offered"] and heavy["waiting_end"] > 100
    assert heavy["wait_p95"] > 10 * light["wait_p95"]


def test_an_idle_engine_waits_for_the_next_arrival():
    engine = SimulatedEngine(workload(uniform(2)), CONSTANT, FixedLength(), 8, [0, 1, 2], arrivals=[1.0, 100.0])
    steps = list(engine.steps())
    assert [s.started for s in engine.served] == [1.0, 100.0]
    assert len(steps) == 80 and steps[40].end == pytest.approx(100.02)


def test_service_levels_take_the_best_point_that_keeps_the_floor():
    def point(policy, concurrency, throughput, interactivity):
        return {"policy": policy, "concurrency": concurrency, "throughput": throughput, "interactivity": interactivity}

    rows = [point("a", 1, 100.0, 100.0), point("a", 4, 300.0, 75.0), point("b", 1, 150.0, 150.0)]
    rows.append(point("b", 4, 450.0, 90.0))
    table = {(r["floor"], r["policy"]): r for r in service_levels(rows, [80, 120], baseline="a")}
    assert table[80, "a"]["throughput"] == 100.0 and table[80, "b"]["throughput"] == 450.0
    assert table[80, "b"]["gain"] == pytest.approx(3.5) and table[80, "b"]["concurrency"] == 4
    assert table[120, "a"]["throughput"] is None and table[120, "b"]["gain"] is None
    with pytest.raises(ValueError, match="baseline='c'"):
        service_levels(rows, [80], baseline="c")


def test_a_schedule_is_not_judged_on_what_calibrated_it():
    prompts, others = drawn(), drawn(seed=1)
    rounds = flatten(prompts)
    calibration = fit(rounds.logits, rounds.accepted, rounds.proposed, rounds.prompts)
    with pytest.raises(ValueError, match="used to fit the calibration"):
        workload(prompts, calibration)
    calibrated = workload(others, calibration)
    np.testing.assert_allclose(calibrated.confidence, calibration.apply(flatten(others).logits))


def test_errors_name_the_remedy():
    bare = [PromptRounds("a", np.array([2]), np.array([1]), np.array([0.1]), 2)]
    with pytest.raises(ValueError, match="confidence head"):
        closed_loop(policy(StaticThreshold(0.5), bare), CONSTANT, 1, 5, 0)
    with pytest.raises(ValueError, match="concurrency=0"):
        closed_loop(policy(FixedLength(), bare), CONSTANT, 0, 5, 0)
    with pytest.raises(ValueError, match="change the concurrency"):
        closed_loop(policy(FixedLength(), bare), CostProfile([1, 4], [1.0, 1.0], "x", "measured"), 9, 5, 0)
    with pytest.raises(ValueError, match="recorded prompts"):
        Workload.of([])


def written(path: Path, prompts) -> Path:
    path.mkdir()
    with open(path / "rounds.jsonl", "w") as file:
        for index, p in enumerate(prompts):
            line = {"prompt_ids": [index, len(prompts)], "output_ids": [0] * (p.tokens + 1)}
            line |= {"proposed": p.proposed.tolist(), "accepted": p.accepted.tolist(), "seconds": p.seconds.tolist()}
            file.write(json.dumps({**line, "confidence": p.logits.tolist()}) + "\n")
    return path


def composed(name, *overrides):
    with initialize_config_dir(str(Path(configs.__file__).parent), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def test_calibrate_then_serve_from_recorded_rounds(tmp_path, capsys):
    """The two stages as the command line runs them, on rounds recorded for two sets of prompts."""
    fitted, held_out = written(tmp_path / "a", drawn(30)), written(tmp_path / "b", drawn(20, seed=1))
    draft = tmp_path / "draft"
    draft.mkdir()
    common = [f"root={tmp_path}", f"held_out={held_out}", f"draft={draft}"]
    folder = calibrate.run(composed("calibrate", f"rounds={fitted}", *common))
    slots = pd.read_csv(folder / "slots.csv")
    assert len(slots) == 2 * SLOTS and (draft / "calibration.json").exists()
    cfg = composed(
        "serve", f"root={tmp_path}", f"rounds={held_out}", f"calibration={draft / 'calibration.json'}",
        "concurrency=[2,64]", "rate=[5]", "requests=10", "steps=10", "warmup=2", "profile=h200_jagged",
    )  # fmt: skip
    folder = serve.run(cfg)
    content = json.loads((folder / "points.json").read_text())
    points = pd.read_csv(folder / "points.csv")
    assert len(points) == 7 * 3 and points.simulation.all() and "simulation" in content["notice"]
    assert set(points.profile_source) == {"illustrative"}
    assert points[points.policy == "fixed_1"].verified_per_round.tolist() == [2.0] * 3
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["simulation"] is True and summary["status"] == "finished"
    assert "simulation" in capsys.readouterr().out
    assert CostProfile.load(folder / "profile.json").source == "illustrative"
    with pytest.raises(ValueError, match="used to fit the calibration"):
        serve.run(composed("serve", f"root={tmp_path}", f"rounds={fitted}", f"calibration={draft}/calibration.json"))


def test_a_calibration_that_is_worse_leaves_the_draft_alone(tmp_path):
    """Fitted on rounds that accept nothing and judged on those of a head that is too sure: the error grows."""
    hopeless = [replace(p, accepted=np.zeros_like(p.accepted), tokens=len(p.accepted)) for p in drawn(20, seed=1)]
    held, more = ([replace(p, logits=3 * p.logits) for p in drawn(60 + 10 * seed, seed)] for seed in (0, 2))
    fitted, held_out, draft = tmp_path / "a", written(tmp_path / "b", held), tmp_path / "draft"
    written(fitted, hopeless)
    draft.mkdir()
    wrong = [f"root={tmp_path}", f"rounds={fitted}", f"held_out={held_out}", f"draft={draft}", "name=wrong"]
    with pytest.raises(ValueError, match=r"draft=.*calibration error is 0\.\d+ with .* and 0\.\d+ without"):
        calibrate.run(composed("calibrate", *wrong))
    assert not (draft / "calibration.json").exists()
    good = written(tmp_path / "c", more)
    calibrate.run(composed("calibrate", *wrong[:1], f"rounds={good}", f"held_out={held_out}", f"draft={draft}"))
    before = (draft / "calibration.json").read_bytes()
    with pytest.raises(ValueError, match="was left as it was"):
        calibrate.run(composed("calibrate", *wrong))
    assert (draft / "calibration.json").read_bytes() == before
    # Its own folder holds what was found, for whoever wants to see it.
    assert (tmp_path / "calibrate" / "wrong" / "slots.csv").exists()


def test_what_calibrate_says_comes_next_works_as_it_is_printed(tmp_path, capsys):
    """The rounds are split, and serve refuses those that were fitted on: the next command names the others."""
    rounds = written(tmp_path / "with space", drawn(30))
    assert main(["calibrate", f"root={tmp_path}", f"rounds='{rounds}'"]) == 0
    words = shlex.split(re.search(r"next: specbench (.*)", capsys.readouterr().out)[1])
    assert main([*words, "concurrency=[2]", "steps=5", "warmup=1"]) == 0, capsys.readouterr().err
