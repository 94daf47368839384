"""Published drafts on tiny targets: every number that the released DeepSpec toolkit (revision afdfa7c) gave for them.

The fixtures hold drafts, a batch with the target's states, and what the toolkit computed from them in fp32; logits keep
every eighth vocabulary entry. Tolerances: logits 1e-4 absolute, losses 1e-5, gradients 1e-4 relative, decoding exactly.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specbench.blocks import PADDING, Batch, valid_anchors, with_anchors
from specbench.checkpoints.draft_folder import build_draft, load_draft, read_folder
from specbench.decoding.loop import Limits, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.decoding.scheduling import StaticThreshold
from specbench.drafts.eagle3 import Eagle3
from specbench.losses.objective import Objective
from specbench.metrics.functional import deepspec_row
from specbench.models.target import Target

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
PARALLEL = ["qwen3_dspark_vanilla", "qwen3_dspark_rnn", "qwen3_dflash", "gemma4_dspark_vanilla"]
RECURRENT = ["qwen3_eagle3", "gemma4_eagle3"]
EVERY = 8  # every eighth logit is kept

parallel = pytest.mark.parametrize("case", PARALLEL)
recurrent = pytest.mark.parametrize("case", RECURRENT)
every = pytest.mark.parametrize("case", PARALLEL + RECURRENT)


@cache
def tensors(case: str, name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / case / f"{name}.safetensors")


@cache
def numbers(case: str, name: str) -> dict:
    return json.loads((GOLDEN / case / f"{name}.json").read_text())


@cache
def draft(case: str):
    return load_draft(GOLDEN / case / "draft")


@cache
def target(family: str, taps: tuple[int, ...]) -> Target:
    return Target.load(GOLDEN / "targets" / f"{family}_tiny", taps)


def target_of(case: str) -> Target:
    return target(case.split("_")[0], draft(case).target_layer_ids)


def published(case: str) -> Batch:
    """The toolkit's padded batch in our layout."""
    b = tensors(case, "batch")
    (B, T), taps = b["input_ids"].shape, b["target_hidden_states"]
    document = torch.where(b["attention_mask"] == 1, torch.arange(B)[:, None], PADDING)
    position = torch.arange(T).expand(B, T).contiguous()
    states = taps.view(B, T, len(draft(case).target_layer_ids), -1)
    return Batch(b["input_ids"], b["loss_mask"].bool(), document, position, states, b["target_last_hidden_states"])


def with_published_anchors(case: str) -> Batch:
    forward = tensors(case, "forward")
    kept = forward["block_keep_mask"].bool()
    return replace(published(case), anchors=torch.where(kept, forward["anchor_positions"], PADDING))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@every
def test_the_target_gives_the_published_features(case):
    b, batch = tensors(case, "batch"), published(case)
    real = batch.document != PADDING
    context = target_of(case).states(batch.tokens, b["attention_mask"].sum(1))
    close(context.taps[real], batch.taps[real])
    close(context.last[real], batch.last[real])


@parallel
def test_anchors_follow_the_published_rule(case):
    """The N smallest of uniform draws over the positions that are supervised together with the next one."""
    forward, batch = tensors(case, "forward"), published(case)
    (B, T), N = batch.tokens.shape, forward["anchor_positions"].shape[1]
    torch.manual_seed(numbers(case, "loss")["forward_seed"])
    draws = torch.rand(B, T - 1)
    valid = valid_anchors(batch)
    for b in range(B):
        candidates = valid[b].nonzero().flatten()
        chosen = candidates[draws[b, candidates].argsort()[:N]].sort().values
        kept = forward["block_keep_mask"][b].bool()
        assert forward["anchor_positions"][b, kept].tolist() == chosen.tolist()
        assert len(chosen) == min(N, len(candidates))


@parallel
def test_training_view_of_parallel_drafts(case):
    forward, batch, model = tensors(case, "forward"), with_published_anchors(case), draft(case)
    kept = forward["block_keep_mask"].bool()
    with torch.no_grad():
        blocks = model(batch)
        logits = model.logits(blocks.hidden, blocks.previous)
        confidence = model.confidence(blocks.hidden, blocks.previous)
        wanted = model.tables.logits(blocks.target)
    mask = forward["eval_mask"].bool() & kept[..., None]
    assert torch.equal(blocks.mask, mask)
    assert torch.equal(blocks.labels[mask], forward["target_ids"][mask])
    close(logits[kept][..., ::EVERY], forward["draft_logits"][kept])
    close(wanted[mask][..., ::EVERY], forward["aligned_target_logits"][mask])
    accept = 1 - 0.5 * (logits.softmax(-1) - wanted.softmax(-1)).abs().sum(-1)
    close(accept[mask], forward["accept_rate"][mask])
    assert (confidence is None) == ("confidence_pred" not in forward)
    if confidence is not None:
        close(confidence[kept], forward["confidence_pred"][kept])


def unshifted(case: str) -> tuple[Eagle3, Batch]:
    """The case's draft and batch under the released supervision."""
    config, held = read_folder(GOLDEN / case / "draft")
    model = build_draft(config, held)
    model.supervision = "unshifted"
    return model, with_anchors(published(case), None, supervision="unshifted")


@recurrent
def test_training_view_of_recurrent_drafts(case):
    """The toolkit's chain that starts at t is our anchor t + 1, its step our slot."""
    forward, (model, batch) = tensors(case, "forward"), unshifted(case)
    with torch.no_grad():
        blocks = model(batch)
        logits = model.logits(blocks.hidden, blocks.previous)
        wanted = model.tables.logits(blocks.target)
    supervised = torch.zeros_like(forward["position_mask"], dtype=torch.bool)
    for b, n in (batch.anchors != PADDING).nonzero().tolist():
        start = int(batch.anchors[b, n]) - 1
        for k in blocks.mask[b, n].nonzero().flatten().tolist():
            supervised[k, b, start] = True
            close(logits[b, n, k, ::EVERY], forward["draft_logits"][k, b, start])
            close(wanted[b, n, k, ::EVERY], forward["target_logits"][b, start + k + 1])
    assert torch.equal(supervised, forward["position_mask"].bool())


def objective(weights: dict) -> Objective:
    g = weights["loss_decay_gamma"]
    return Objective(
        ce=weights["ce_loss_alpha"],
        tv=weights["l1_loss_alpha"],
        confidence=weights["confidence_head_alpha"],
        slot_weight="uniform" if g is None else {"exp": g},
    )


def assert_gradients(model: torch.nn.Module, case: str) -> None:
    expected = {k: v for k, v in numbers(case, "loss")["grads"]["per_parameter"].items() if v is not None}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(expected)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found, about = parameter.grad.double(), expected[name]
            assert float(found.norm()) == pytest.approx(about["norm"], rel=1e-4), name
            assert float(found.abs().max()) == pytest.approx(about["absmax"], rel=1e-3), name
            assert float(found.sum()) == pytest.approx(about["sum"], rel=1e-3, abs=2e-4 * about["norm"]), name
    total = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).norm()
    assert float(total) == pytest.approx(numbers(case, "loss")["grads"]["total_norm"], rel=1e-4)


@parallel
def test_loss_and_gradients_of_parallel_drafts(case):
    batch, held = with_published_anchors(case), read_folder(GOLDEN / case / "draft")
    confident = draft(case).confidence(*(torch.zeros(1, 1, 64), torch.zeros(1, 1, dtype=torch.long))) is not None
    released = {"loss_decay_gamma": 4.0, "ce_loss_alpha": 0.1, "l1_loss_alpha": 0.9, "confidence_head_alpha": 1.0}
    if not confident:
        released = {"loss_decay_gamma": 4.0, "ce_loss_alpha": 1.0, "l1_loss_alpha": 0.0, "confidence_head_alpha": 0.0}
    model = build_draft(*held).train()
    loss = objective(released)(model, target_of(case).tables, model(batch))
    about = numbers(case, "loss")
    assert loss.mean.item() == pytest.approx(about["loss"], abs=1e-5)
    loss.mean.backward()
    assert_gradients(model, case)
    slots = loss.slots
    for k in range(model.block_size):
        found = float(slots.alpha[k] / slots.count[k])
        assert found == pytest.approx(about["metrics"][f"train/accept_rate@{k}"], abs=1e-5)
    expected_length = float(slots.expected_length / slots.blocks)
    assert expected_length == pytest.approx(about["metrics"]["train/tau_probabilistic"], abs=1e-5)


@parallel
def test_losses_under_other_weights(case):
    batch, model, tables = with_published_anchors(case), draft(case), target_of(case).tables
    with torch.no_grad():
        blocks = model(batch)
        for variant in numbers(case, "loss")["loss_variants"]:
            if case == "qwen3_dflash":
                variant = variant | {"confidence_head_alpha": 0.0}
            found = objective(variant)(model, tables, blocks)
            assert float(found.mean) == pytest.approx(variant["loss"], abs=1e-5), variant


@recurrent
def test_loss_and_gradients_of_recurrent_drafts(case):
    """Divided by all positions, under the unshifted supervision: the two parity settings."""
    (model, batch), about = unshifted(case), numbers(case, "loss")
    model.train()
    released = Objective(soft_ce=1.0, slot_weight={"power": 0.8}, normalise="positions")
    loss = released(model, target_of(case).tables, model(batch), positions=batch.tokens.numel())
    assert loss.mean.item() == pytest.approx(about["loss"], abs=1e-5)
    loss.mean.backward()
    assert_gradients(model, case)
    for k in range(model.block_size):
        assert float(loss.slots.count[k]) == about["metrics"][f"train/valid_tokens@{k}"]
        alpha = float(loss.slots.alpha[k] / loss.slots.count[k])
        assert alpha == pytest.approx(about["metrics"][f"train/accept_rate@{k}"], abs=1e-5)
        agreement = float(loss.slots.agreement[k] / loss.slots.count[k])
        assert agreement == pytest.approx(about["metrics"][f"train/accuracy@{k}"], abs=1e-6)


def decoded(case: str, runs: list[dict], batch_size: int) -> list:
    """Runs of one setting, decoded together."""
    setting = runs[0]
    stops, threshold = tuple(setting["stop_token_ids"] or ()), setting["confidence_threshold"]
    limits = Limits(setting["max_new_tokens"], stops, batch_size, accounting="deepspec")
    scheduler = StaticThreshold(threshold) if threshold else None
    prompts, sampling = [run["prompt_ids"] for run in runs], Sampling(setting["temperature"])
    found = speculative_decode(target_of(case), draft(case), prompts, sampling, limits, scheduler=scheduler)
    return sorted(found, key=lambda done: done.index)


def by_setting(case: str) -> dict[str, list[dict]]:
    """Runs under the toolkit's own name of their setting."""
    settings: dict[str, list[dict]] = {}
    for run in numbers(case, "decode")["runs"]:
        stops = "".join(f"_stop{token}" for token in run["stop_token_ids"] or ())
        settings.setdefault(f"thr{run['confidence_threshold']}{stops}", []).append(run)
    return settings


def assert_decoded(case: str, setting: str, batch_size: int) -> None:
    runs = by_setting(case)[setting]
    found = decoded(case, runs, batch_size)
    committed, proposed, accepted = (
        [[getattr(r, name) for r in one.rounds] for one in found] for name in ("committed", "proposed", "accepted")
    )
    assert [run["prompt_ids"] + one.output_ids for run, one in zip(runs, found, strict=True)] == [
        run["output_ids"] for run in runs
    ]
    assert committed == [run["acceptance_lengths"] for run in runs]
    assert proposed == [run["proposal_lengths"] for run in runs]
    assert accepted == [run["accepted_draft_lengths"] for run in runs]
    expected = numbers(case, "decode")["evaluator_metrics"].get(setting)
    if expected is not None:
        row = deepspec_row(committed, proposed, accepted, draft(case).block_size)
        assert row["summary"] == expected["summary"]
        for name, value in row["row"].items():
            assert value == pytest.approx(expected["row"][name]), name


@every
def test_decoding_and_the_released_evaluators_table(case):
    """Eight requests in one batch: their tokens, and what each round committed, proposed and accepted."""
    assert_decoded(case, "thr0.6" if "dspark" in case else "thr0.0_stop10", batch_size=8)


@pytest.mark.long
@every
@pytest.mark.parametrize("batch_size", [1, 8])
def test_every_published_decoding_run(case, batch_size):
    assert set(numbers(case, "decode")["evaluator_metrics"]) <= set(by_setting(case))
    for setting in by_setting(case):
        assert_decoded(case, setting, batch_size)
