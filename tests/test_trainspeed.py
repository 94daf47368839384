"""The training benchmark: both sides of it compute the same step, packed rows the same loss, and the verb its table."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import trainspeed as verb
from specbench.blocks import pack, with_anchors
from specbench.cli.assembly import build_draft
from specbench.cli.settings import check_settings
from specbench.losses.objective import Objective
from specbench.models.embedding_head import Tables
from specbench.profiling import step_report
from specbench.profiling.step_measurement import StepCost
from specbench.profiling.training_speed import (
    SHAPES,
    SMALL,
    agreement,
    batch_step,
    conversations,
    draft_of,
    flops,
    mixed_lengths,
    statistics_step,
)
from tests.test_layers import REPOSITORY
from tests.wandblog import offline_run

TINY = {"hidden": 16, "vocabulary": 311, "tokens": 40, "prompt": 10, "rank": 8}


@pytest.mark.parametrize("anchors", [6, None])
@pytest.mark.parametrize("method", SMALL)
def test_both_sides_compute_the_same_step(method, anchors):
    differences = agreement(replace(SMALL[method], **TINY, anchors=anchors))
    assert differences["loss"] < 1e-5 and differences["gradient"] <= differences["parameter"] < 1e-5


@pytest.mark.parametrize("method", SMALL)
def test_packed_conversations_have_the_loss_and_the_gradient_of_padded_ones(method):
    shape = replace(SMALL[method], **TINY, anchors=5)
    samples = conversations(shape, [(4, 9), (2, 3), (6, 20), (3, 11), (5, 1)])
    found = []
    for length in (None, 30):
        draft, tables = draft_of(shape)
        batch = with_anchors(pack(samples, length), 5, (3,))
        loss = Objective(**shape.objective)(draft, tables, draft(batch))
        loss.value.backward()
        found.append((len(batch.tokens), loss, [p.grad for p in draft.parameters() if p.requires_grad]))
    (rows, padded, before), (fewer, packed, after) = found
    assert fewer < rows and padded.weight == packed.weight
    torch.testing.assert_close(packed.value, padded.value, atol=1e-5, rtol=1e-5)
    for name in ("count", "hit", "agreement"):
        assert torch.equal(getattr(packed.slots, name), getattr(padded.slots, name)), name
    for one, other in zip(after, before, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_slots_that_share_a_target_state_are_judged_as_if_they_did_not():
    shape = replace(SMALL["dspark"], **TINY, anchors=None)
    draft, tables = draft_of(shape)
    blocks = draft(with_anchors(pack(conversations(shape, [(10, 30), (3, 17)])), None))
    assert len(blocks.source[blocks.mask].unique()) < int(blocks.mask.sum()) / 3
    objective = Objective(ce=0.1, tv=0.9, kl=0.3, js=0.2, slot_weight={"dpace": 0.5})
    shared, alone = (objective(draft, tables, b) for b in (blocks, replace(blocks, source=None)))
    torch.testing.assert_close(shared.value, alone.value)
    for name in vars(shared.slots):
        torch.testing.assert_close(getattr(shared.slots, name), getattr(alone.slots, name))


def test_the_benchmarks_other_steps_run_and_count():
    shape = replace(SMALL["eagle3"], **TINY | {"vocabulary": 50})
    assert batch_step(shape, 1024)().isfinite() and statistics_step(shape)().shape == (7,)
    assert sum(map(sum, mixed_lengths())) == 2 * 3816
    head = 2 * 16 * 50  # of one row and one product
    rows = 7 * 29 - 21  # 29 anchors, the last six of which end early
    assert flops(shape) > head * (2 * rows + 29)


def test_real_shapes_are_a_gpus():
    for shape in SHAPES["qwen3_4b"].values():
        assert (shape.hidden, shape.vocabulary, shape.dtype, shape.device) == (2560, 151936, "bfloat16", "cuda")
        small = step_report.sized(shape, {}, "cpu")
        assert (small.device, small.dtype) == ("cpu", "float32")
    with pytest.raises(ValueError, match=r"train\.sizes has no depth"):
        step_report.sized(SMALL["dspark"], {"depth": 2}, "cpu")


def settings(config: str, *overrides: str):
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        return compose(config, list(overrides))


def test_the_verb_writes_one_row_a_variant(monkeypatch, tmp_path, capsys):
    """Times and memory are made up here, because each takes a process of its own; the rest is real."""

    def measured(builds, how):
        assert all(build() is not None for build in builds.values())
        return {name: StepCost(2.0 + i, 1.0, 9.0, 2.0, 10, 20, 5) for i, name in enumerate(builds)}

    monkeypatch.setattr(step_report, "_measured", measured)
    monkeypatch.setattr(step_report, "fresh", lambda task: task())
    sizes = "train.sizes={hidden: 16, vocabulary: 101, tokens: 30, prompt: 8, anchors: 4, rank: 8}"
    cfg = settings(
        "speed",
        "what=train",
        f"root={tmp_path}",
        sizes,
        "train.packing.vocabulary=20",
        "device=cpu",
        "tracking=offline",
    )
    folder = verb.run(cfg)
    table = pd.read_csv(folder / "steps.csv")
    assert list(table.groupby("part", sort=False).size().items()) == [
        ("dspark", 2),
        ("eagle3", 2),
        ("terms", 4),
        ("packing", 5),
    ]
    assert table["time_ratio"][0] == pytest.approx(2 / 3)
    mirrored = offline_run(folder)
    assert (mirrored.job_type, mirrored.exit_code, mirrored.tables) == ("speed-train", 0, ["steps"])
    stored = json.loads((folder / "steps.json").read_text())
    assert mirrored.summary["dspark.difference_gradient"] == stored["checks"]["dspark.difference_gradient"]
    assert stored["checks"]["dspark.difference_gradient"] < 1e-5 and stored["shapes"]["eagle3"]["hidden"] == 16
    assert (folder / "steps.md").read_text() in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"train\.parts"):
        verb.run(settings("speed", "what=train", f"root={tmp_path}", "train.parts=[all]"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=eagle3", "head=rnn"], "has no Markov or confidence head"),
        (["method=mtp", "head=vanilla"], "has no Markov or confidence head"),
        (["method=dflash", "head=gated"], "has no Markov or confidence head"),
        (["method=dflash", "+method.draft.depth=3"], "depth=3: there is no such setting"),
        (["method=dspark", "head=none"], None),
    ],
)
def test_a_head_that_a_method_cannot_have_is_refused_with_the_reason(words, said):
    cfg = settings("train", "target=tiny_qwen3", *words)
    config = OmegaConf.to_container(cfg.target.config, resolve=True)
    tables = Tables(*torch.zeros(2, config["vocab_size"], config["hidden_size"]))
    if said is None:
        assert build_draft(cfg.method, cfg.target, config, tables).confidence_with_markov is False
        return
    with pytest.raises(ValueError, match=said):
        check_settings("train", cfg)
