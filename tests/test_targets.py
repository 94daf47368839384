"""Targets: the tiny ones of configs/target by the library's own forward, and DeepSeek-V4 from cache to decoding."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from specbench.cli.assembly import build_draft, build_objective, load_target
from specbench.data.answers.chat import Encoded
from specbench.data.cache.build import build
from specbench.data.cache.storage import storage
from specbench.data.loading.target_cache import TargetCache
from specbench.decoding.loop import Limits, decode, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.models.backbone import backbone_of
from specbench.models.target import Target
from specbench.training.draft_training import DraftTraining

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = ("tiny_qwen3", "tiny_gemma4", "tiny_deepseek_v4")


@cache
def option(name: str) -> DictConfig:
    return OmegaConf.load(CONFIGS / "target" / f"{name}.yaml")


@cache
def target(name: str) -> Target:
    return load_target(option(name), "cpu")


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 95, (3 + 2 * i,), generator=generator).tolist() for i in range(count)]


@pytest.mark.parametrize("name", TINY)
def test_states_are_the_librarys_and_do_not_see_what_comes_after(name: str) -> None:
    owner = target(name)
    tokens = torch.randint(2, 95, (2, 21), generator=torch.Generator().manual_seed(1))
    whole = owner.states(tokens, torch.tensor([21, 21]))
    assert whole.taps.shape == (2, 21, 3, 32)
    found = owner.logits(whole.last)
    torch.testing.assert_close(found, owner.live_logits(tokens, torch.tensor([21, 21])), atol=1e-5, rtol=1e-5)
    for cut in (5, 8, 13):
        part = owner.states(tokens[:, :cut], torch.tensor([cut, cut]))
        torch.testing.assert_close(part.taps, whole.taps[:, :cut], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(part.last, whole.last[:, :cut], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_extending_and_rolling_back_gives_the_states_of_one_pass(name: str) -> None:
    owner = target(name)
    tokens = torch.randint(2, 95, (2, 16), generator=torch.Generator().manual_seed(2))
    whole = owner.states(tokens, torch.tensor([16, 16]))
    lengths = torch.tensor([5, 3])
    state, _ = owner.prefill(tokens[:, :5], lengths)
    for step in (4, 3, 4):
        block = torch.stack([tokens[b, n : n + step] for b, n in enumerate(state.cache.lengths.tolist())])
        block[:, -1] = 94  # a proposal that is not kept
        start = state.cache.lengths.clone()
        found = owner.extend(state, block)
        keep = torch.tensor([step - 1, step - 2])
        for b in range(2):
            rows = slice(int(start[b]), int(start[b] + keep[b]))
            torch.testing.assert_close(found.taps[b, : keep[b]], whole.taps[b, rows], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(found.last[b, : keep[b]], whole.last[b, rows], atol=2e-5, rtol=1e-4)
        state.advance(keep)


def test_deepseek_taps_are_the_mean_over_its_streams() -> None:
    owner, seen = target("tiny_deepseek_v4"), {}
    assert owner.recomputes  # compressed attention has no roll-back by length
    hooks = [
        owner.layers[i].register_forward_hook(lambda module, inputs, output, i=i: seen.update({i: output}))
        for i in owner.target_layer_ids
    ]
    tokens = torch.tensor([prompts(3)[2]])
    taps = owner.states(tokens, torch.tensor([tokens.shape[1]])).taps
    for hook in hooks:
        hook.remove()
    for at, layer in enumerate(owner.target_layer_ids):
        assert seen[layer].shape == (1, tokens.shape[1], 2, 32)
        torch.testing.assert_close(taps[:, :, at], seen[layer].sum(2) / 2)


@pytest.mark.parametrize(("method", "settings"), [("dspark", {"markov_rank": 8}), ("mtp", {"block_size": 1})])
def test_deepseek_goes_through_cache_training_and_lossless_decoding(method, settings, tmp_path: Path) -> None:
    name, owner = "tiny_deepseek_v4", target("tiny_deepseek_v4")
    asked = prompts(8, seed=5)
    answered = decode(owner, asked, Sampling(1.0), Limits(max_new_tokens=16, batch_size=8))
    talks = [
        Encoded(str(d.index), d.prompt_ids + d.output_ids, [False] * len(d.prompt_ids) + [True] * len(d.output_ids))
        for d in answered
    ]
    manifest = build(owner, talks, tmp_path / "cache", storage("bf16"), max_length=64, shard_bytes=1 << 20)
    assert manifest.samples == 8
    cfg = OmegaConf.load(CONFIGS / "method" / f"{method}.yaml")
    cfg.draft = OmegaConf.merge(cfg.draft, {"layers": 1}, settings)
    cfg.backbone = "qwen3"
    data = TargetCache(
        tmp_path / "cache",
        dtype="float32",
        samples_per_micro=4,
        micro_batches_per_step=1,
        row_length=None,
        validation_fraction=0.0,
        threads=1,
        seed=0,
    )
    torch.manual_seed(0)
    draft = build_draft(cfg, option(name), owner.config, owner.tables)
    assert draft.backbone == backbone_of(owner.config, "qwen3") and draft.backbone.hidden_size == 32
    draft.randomise()
    before = {key: value.clone() for key, value in draft.state_dict().items()}
    module = DraftTraining(draft, build_objective(cfg), target_tables=owner.tables, max_steps=4, lr=1e-3)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    assert all(not torch.equal(value, before[key]) for key, value in draft.state_dict().items() if "proj" in key)
    limits = Limits(max_new_tokens=10, batch_size=4)
    own = {d.index: d.output_ids for d in decode(owner, asked[:4], Sampling(), limits)}
    # Plain decoding itself against one whole pass over its text: the state's tokens are what the output says.
    for index, output in own.items():
        tokens = torch.tensor([asked[index] + output])
        greedy = owner.live_logits(tokens, torch.tensor([tokens.shape[1]]))[0].argmax(-1)
        assert greedy[len(asked[index]) - 1 : -1].tolist() == output
    done = {d.index: d for d in speculative_decode(owner, draft.eval(), asked[:4], Sampling(), limits)}
    assert {index: d.output_ids for index, d in done.items()} == own
    assert all(r.proposed == draft.block_size for d in done.values() for r in d.rounds)
