"""Cost curves on a tiny target: what is timed, and how rows become a profile."""

import itertools
import json
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import speed
from specbench.checkpoints.draft_folder import save_draft
from specbench.cli.assembly import build_draft, draft_settings, load_target
from specbench.decoding.cost_profile import CostProfile
from specbench.decoding.loop import Limits, decode
from specbench.decoding.sampling import Sampling
from specbench.decoding.scheduling import FixedLength, HardwareAware
from specbench.profiling.decoding_speed import (
    cost_profile,
    draft_cost,
    predicted_speedup,
    scheduler_cost,
    step_cost,
    target_cost,
    timed,
    wall_clock,
)
from specbench.serving.simulation_check import check
from tests import tiny
from tests.wandblog import offline_run

CPU = torch.device("cpu")


def test_preparation_and_warm_up_are_not_timed():
    calls = []

    def prepare():
        time.sleep(0.02)
        return len(calls)

    timing = timed(calls.append, CPU, repeats=5, warmup=2, prepare=prepare)
    assert calls == list(range(7)) and timing.repeats == 5
    assert timing.low <= timing.seconds <= timing.high < 0.02


def test_a_sleep_is_as_long_as_it_is():
    timing = timed(lambda _: time.sleep(0.01), CPU, repeats=3, warmup=0)
    assert 0.01 <= timing.seconds < 5


def test_cost_curves_leave_the_states_as_they_were_and_make_a_profile():
    owner = tiny.target("qwen3")
    draft = tiny.draft("dspark", "qwen3")
    rows = target_cost(owner, [1, 2], [1, 3], context=6, repeats=2, warmup=1)
    assert [(r["requests"], r["length"], r["tokens"]) for r in rows] == [(1, 1, 1), (1, 3, 3), (2, 1, 2), (2, 3, 6)]
    assert all(0 < r["low"] <= r["seconds"] <= r["high"] for r in rows)
    rows += draft_cost(owner, draft, [1, 2], [4], context=6, repeats=2, warmup=1)
    profile = cost_profile(rows, "tiny", slots=4)
    assert profile.tokens == (1, 2, 3, 6) and profile.source == "measured"
    own = {r["requests"]: 0.0 for r in rows}
    for row in rows:
        own[row["requests"]] += row["seconds"] * (row["part"] != "target")
    verify = next(r["seconds"] for r in rows if r["part"] == "target" and r["tokens"] == 6)
    assert profile.seconds(2, 4)[-1] == pytest.approx(verify + own[2])
    with pytest.raises(ValueError, match="slots=3"):
        cost_profile(rows, "tiny", slots=3)
    with pytest.raises(ValueError, match="1 to 4 slots"):
        draft_cost(owner, draft, [1], [5], context=6, repeats=1, warmup=0)


def test_step_cost_counts_only_rounds_with_every_request_in_flight():
    owner, draft = tiny.target("qwen3"), tiny.draft("dspark", "qwen3")
    rows = step_cost(owner, draft, [[5, 6], [7, 8, 9]], [1, 2], [0, 4], max_new_tokens=6)
    assert [(r["requests"], r["tokens"]) for r in rows] == [(1, 1), (1, 5), (2, 2), (2, 10)]
    assert [r["repeats"] for r in rows if r["length"] == 1] == [5, 5]  # one token a round, the first from the prefill
    assert all(1 <= r["repeats"] <= 5 and 0 < r["low"] <= r["high"] for r in rows)
    assert cost_profile(rows, "tiny", part="step").tokens == (1, 2, 5, 10)
    with pytest.raises(ValueError, match="2 prompts cannot fill a batch of 3"):
        step_cost(owner, draft, [[5], [6]], [3], [4])


def test_the_stage_measures_and_leaves_a_profile_to_serve_from(tmp_path, monkeypatch, capsys):
    """As the command line runs it, on the embedded target with an untrained draft."""
    with initialize_config_dir(str(tiny.CONFIGS), version_base="1.3"):
        sizes = ["draft.layers=1", "draft.block_size=3", "draft.markov_rank=4"]
        method = compose("train", overrides=["method=dspark", *(f"method.{size}" for size in sizes)]).method
        overrides = [f"root={tmp_path}", f"draft={tmp_path / 'draft'}", "batch_sizes=[1,2]", "lengths=[1]", "context=8"]
        overrides += [
            "repeats=2",
            "warmup=0",
            "step_tokens=6",
            "clock_prompts=2",
            "clock_repeats=1",
            "max_new_tokens=6",
            "check=[1]",
        ]
        cfg = compose(
            "speed", overrides=[*overrides, f"prompts={tmp_path / 'own.jsonl'}", "device=cpu", "tracking=offline"]
        )
    lines = [json.dumps({"id": str(i), "prompt_ids": [7, 8 + i, 9]}) + "\n" for i in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(lines))
    owner = load_target(cfg.target, "cpu")
    draft = build_draft(method, cfg.target, owner.config, owner.tables)
    save_draft(draft, tmp_path / "draft", owner.config, draft_settings(method, cfg.target))
    with pytest.raises(ValueError, match=r"slots=4: the block of draft=.* holds 3"):
        speed.run(OmegaConf.merge(cfg, {"slots": 4, "name": "more"}))
    shorter = speed.run(OmegaConf.merge(cfg, {"slots": 2, "name": "shorter", "check": []}))
    assert json.loads((shorter / "summary.json").read_text())["protocol"]["slots"] == 2
    lines = pd.read_csv(shorter / "costs.csv")
    assert set(lines[lines.part == "propose"].length) == {1, 2}  # of three slots, two are proposed and no more timed
    # Stopped after the clock and the first costs: both are printed and kept, and the same command does not repeat them.
    with monkeypatch.context() as stopped, pytest.raises(RuntimeError, match="stopped"):
        stopped.setattr(speed, "step_cost", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("stopped")))
        speed.run(cfg)
    said = capsys.readouterr().out
    assert "2 prompts against the clock: speedup" in said and "breaks even at" in said and "target 1:" in said
    with monkeypatch.context() as resumed:
        resumed.setattr(speed, "wall_clock", lambda *_, **__: pytest.fail("measured again"))
        folder = speed.run(cfg)
    costs = pd.read_csv(folder / "costs.csv")
    assert set(costs.part) == {"target", "propose", "commit", "step"} and (costs.seconds > 0).all()
    profile = CostProfile.load(folder / "profile.json")
    assert profile.tokens == (1, 2, 4, 8) and profile.source == "measured" and "3 slots" in profile.label
    summary = json.loads((folder / "summary.json").read_text())
    metrics = summary["metrics"]
    held = pd.read_csv(folder / "simulation_check.csv")
    assert held.requests.tolist() == [1] and metrics["simulation_ratio"] == {"1": pytest.approx(held.ratio[0])}
    assert summary["status"] == "finished" and metrics["predicted_at_batch"] == 1
    mirrored = offline_run(folder, runs=2)  # the stopped one, and this
    assert (mirrored.job_type, mirrored.exit_code, mirrored.tables) == (
        "speed",
        0,
        ["clock", "costs", "simulation_check"],
    )
    assert mirrored.summary["speedup"] == metrics["speedup"] and mirrored.config["target"] == "embedded"
    row = {(r.part, r.requests, r.length): r.seconds for r in costs.itertuples()}
    drafting = row["propose", 1, 3] + row["commit", 1, 3]
    expected = metrics["accepted_length"] * row["target", 1, 1] / (drafting + row["target", 1, 4])
    assert metrics["predicted_speedup"] == pytest.approx(expected, rel=1e-6)


def test_predicted_speedup_by_hand():
    assert predicted_speedup(4.0, 0.2, 1.4, 1.0) == pytest.approx(2.5)
    assert predicted_speedup(1.0, 0.2, 1.4, 1.0) < 1


def test_wall_clock_interleaves_and_splits_a_round():
    owner, draft = tiny.target("qwen3"), tiny.draft("dflash", "qwen3")
    result = wall_clock(
        owner, draft, [[5, 6, 7], [8, 9]], Sampling(), Limits(max_new_tokens=8, batch_size=2), repeats=2, warmup=0
    )
    assert len(result["speedup_repeats"]) == 2 and min(result["speedup_repeats"]) > 0
    (row,) = result["batches"]
    assert (row["first"], row["prompts"], row["plain_tokens"]) == (0, 2, 16)
    assert row["committed"] / row["rounds"] == pytest.approx(result["accepted_length"])
    assert 1 <= result["accepted_length"] <= 5 and result["repeats"] == 2
    assert min(result[f"{part}_seconds"] for part in ("draft", "verify", "commit", "overhead")) > 0
    assert result["break_even_length"] * result["speedup"] == pytest.approx(result["accepted_length"])
    assert result["speedup_processor"] > 0


def test_the_librarys_generation_takes_its_turn_with_the_same_texts(monkeypatch):
    owner, draft, asked = tiny.target("qwen3"), tiny.draft("dflash", "qwen3"), [[5, 6, 7], [8, 9]]
    plain = {d.index: d.output_ids for d in decode(owner, asked, Sampling(), Limits(8, (1,)))}
    assert [owner.generate(p, 8, (1,)) for p in asked] == [plain[0], plain[1]]
    # By a clock that any way takes a second of, a speed is a count of tokens and equal texts are equally fast.
    ticks = itertools.count()
    monkeypatch.setattr("specbench.profiling.decoding_speed.clock", lambda device: float(next(ticks)))
    result = wall_clock(owner, draft, asked, Sampling(), Limits(8), repeats=3, warmup=1, library=True)
    speeds = [result[f"{way}tokens_per_second"] for way in ("", "plain_", "library_")]
    assert speeds == [8, 8, 8] and result["loop_plain"] == result["loop_speculative"] == 1
    for limits, sampling in ((Limits(8, batch_size=2), Sampling()), (Limits(8), Sampling(1.0))):
        with pytest.raises(ValueError, match="batch_size=1 and temperature=0"):
            wall_clock(owner, draft, asked, sampling, limits, library=True)


def test_the_simulation_is_held_against_the_engine(monkeypatch):
    """By a clock on which a step takes 50 ms, a prefill 300 ms and all else nothing, the two are equal."""
    owner, draft = tiny.target("qwen3"), tiny.draft("dflash", "qwen3")
    now, extend, prefill = [0.0], owner.extend, owner.prefill
    monkeypatch.setattr("specbench.decoding.loop.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def taking(seconds, action):
        def timed(*inputs):
            now[0] += seconds
            return action(*inputs)

        return timed

    monkeypatch.setattr(owner, "extend", taking(0.05, extend))
    monkeypatch.setattr(owner, "prefill", taking(0.3, prefill))
    prompts = [[5 + i, 6, 7, 9 + i][: 2 + i % 3] for i in range(9)]
    rows = check(owner, draft, prompts, [1, 2], 2, max_new_tokens=12, repeats=2)
    assert [(row["requests"], row["length"], row["repeats"]) for row in rows] == [(1, 2, 2), (2, 2, 2)]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["simulated"] / row["measured"])
        assert row["low"] == pytest.approx(1) and row["high"] == pytest.approx(1)
    assert rows[0]["measured"] > 19.9 and 1.3 < rows[1]["measured"] / rows[0]["measured"] < 2.01
    with pytest.raises(ValueError, match="at least 16"):
        check(owner, draft, prompts, [4], 2)


def test_scheduler_cost_counts_the_schedule():
    rates = cost_profile([{"part": "target", "tokens": n, "seconds": 0.01 + 1e-5 * n} for n in (1, 4096)], "line")
    timing = scheduler_cost(HardwareAware(rates), repeats=20)
    assert 1e-6 < timing.seconds < 0.05
    assert np.isfinite(scheduler_cost(FixedLength(), repeats=5).seconds)
