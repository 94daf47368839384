"""The committed targets: every one with every method builds at its real sizes, on the meta device, from no download."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from experiments.train import print_plan
from specbench.cli import assembly
from specbench.cli.assembly import build_draft, composed, target_config
from specbench.cli.config_groups import configs
from specbench.cli.target_argument import expand
from specbench.models.backbone import backbone_of, sizes
from specbench.models.embedding_head import Tables
from specbench.models.target import new_causal_lm
from tests.tiny import CONFIGS, METHODS

TARGETS = sorted(file.stem for file in (CONFIGS / "target").glob("*.yaml") if file.stem != "folder")
REAL = [name for name in TARGETS if not name.startswith("tiny") and not name.startswith("embedded")]
GOLDEN = Path(__file__).parent / "fixtures" / "golden"
REPOSITORY = CONFIGS.parent


def option(name: str):
    """One option of the group with its defaults resolved, without composing a whole verb."""
    cfg = OmegaConf.load(CONFIGS / "target" / f"{name}.yaml")
    for parent in cfg.pop("defaults", []):
        cfg = OmegaConf.merge(option(parent), cfg) if parent != "_self_" else cfg
    return cfg


def meta(method: str, target: str, **settings):
    cfg, about = OmegaConf.load(CONFIGS / "method" / f"{method}.yaml"), option(target)
    backbone = settings.pop("backbone", None)
    cfg.backbone, cfg.draft = backbone, OmegaConf.merge(cfg.draft, settings)
    config = target_config(about)
    facts = backbone_of(config, backbone)
    with torch.device("meta"):
        empty = torch.empty(facts.vocab_size, facts.hidden_size)
        return build_draft(cfg, about, config, Tables(empty, empty, facts.embedding_scale, facts.soft_cap))


def trained(draft) -> int:
    return sum(p.numel() for p in draft.parameters() if p.requires_grad)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_the_same_settings(target: str) -> None:
    assert set(option("embedded")) <= set(option(target))
    assert set(option(target)) - set(option("embedded")) <= {"shapes", "config", "seed"}
    about, config = option(target), target_config(option(target))
    text = config.get("text_config") or config
    assert all(-1 <= i < text["num_hidden_layers"] for i in about.target_layer_ids)
    assert sorted(about.target_layer_ids) == list(about.target_layer_ids)
    assert 0 <= about.mask_token_id < text["vocab_size"]
    assert about.name == target


@pytest.mark.parametrize(
    ("method", "target"),
    [
        pytest.param(method, target, marks=() if "dspark" in method or "qwen3_4b" in target else pytest.mark.nightly)
        for method in METHODS
        for target in TARGETS
    ],
)
def test_every_target_builds_with_every_method(method: str, target: str) -> None:
    for family in (None, "qwen3", "gemma4", "llama"):
        draft = meta(method, target, backbone=family)
        width = target_config(option(target))["hidden_size"]
        facts = draft.backbone
        assert facts.hidden_size == width
        assert facts.heads % facts.kv_heads == 0 and facts.head_dim % 2 == 0
        assert all(p.is_meta for p in draft.parameters())
        for number, layer in enumerate(draft.layers_in_order()):
            # A first layer reads the hidden state, or [embedding ; feature].
            widths = (width, 2 * width) if number == 0 else (width,)
            rows, columns = layer.self_attn.q_proj.weight.shape
            assert rows == facts.heads * facts.head_dim and columns in widths


# Published parameters in millions: model cards and names, presets of Keras for Gemma, the GGUF file of SmolLM2-135M.
PUBLISHED = {
    "gemma3_270m": 268,
    "gemma3_1b": 999.886,
    "glm4_9b": 9400,
    "gpt_oss_20b": 20910,
    "llama3_2_1b": 1230,
    "llama3_2_3b": 3210,
    "qwen2_5_0_5b": 490,
    "qwen2_5_3b": 3090,
    "qwen2_5_7b": 7610,
    "qwen3_0_6b": 600,
    "qwen3_4b": 4000,
    "qwen3_5_9b": 9000,
    "qwen3_6_27b": 27000,
    "smollm2_135m": 134.515,
    "smollm2_1_7b": 1700,
}


@pytest.mark.parametrize("target", PUBLISHED)
def test_the_sizes_of_a_target_make_a_model_of_its_size(target: str) -> None:
    with torch.device("meta"):
        model = new_causal_lm(OmegaConf.to_container(option(target).shapes))
    millions = sum({id(p): p.numel() for p in model.parameters()}.values()) / 1e6
    assert millions == pytest.approx(PUBLISHED[target], rel=1e-2)
    taps = option(target).target_layer_ids
    assert len(taps) == 5 and taps[-1] < model.config.get_text_config().num_hidden_layers - 1


def test_the_released_qwen3_4b_drafts_have_these_numbers_of_parameters() -> None:
    D, V, M, q, kv, d = 2560, 151936, 9728, 32 * 128, 8 * 128, 128
    layer = q * D + 2 * kv * D + q * D + 3 * D * M + 2 * D + 2 * d
    fused = 5 * D * D + 2 * D  # fc, hidden_norm, norm
    dflash = 5 * layer + fused
    assert trained(meta("dflash", "qwen3_4b")) == dflash == 537_427_200
    markov, confidence = 2 * V * 256, (D + 256) + 1
    assert trained(meta("dspark", "qwen3_4b")) == dflash + markov + confidence == 615_221_249
    paired = layer + q * D + 2 * kv * D + D  # its projections read twice the width, and it norms the feature
    assert trained(meta("eagle3", "qwen3_4b")) == paired + 5 * D * D + D
    assert trained(meta("mtp", "qwen3_4b")) == layer + 2 * D * D + 3 * D


def test_gemma_drafts_take_the_geometry_of_full_attention() -> None:
    draft = meta("dspark", "gemma4_12b")
    attention = draft.layers[0].self_attn
    assert attention.q_proj.weight.shape == (16 * 512, 3840) and attention.k_proj.weight.shape == (512, 3840)
    assert attention.v_proj is None and attention.k_norm.weight.shape == (512,)
    assert draft.backbone.soft_cap == 30.0 and draft.backbone.rope_fraction == 0.25
    assert draft.fc.weight.shape == (3840, 5 * 3840)


@pytest.mark.parametrize(
    ("target", "heads", "feed_forward"), [("deepseek_v4_flash", 32, 12288), ("deepseek_v4_pro", 56, 21504)]
)
def test_latent_attention_lends_its_width_alone(target: str, heads: int, feed_forward: int) -> None:
    found = sizes(target_config(option(target)))
    assert found == {"heads": heads, "kv_heads": 8, "head_dim": 128, "intermediate_size": feed_forward}


@pytest.mark.parametrize("target", REAL)
def test_plans_need_no_network(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    with configs("configs"):
        found = print_plan(composed("train", [f"target={target}", "trainer=node", "memory=141"]))
    said = capsys.readouterr().err
    assert "parameters" in said and "141 GiB" in said
    assert found.trainable > 1e6 and found.largest_micro_batch >= 1


def test_a_path_or_a_hub_id_is_a_target() -> None:
    known = ["embedded", "folder", "qwen3_4b"]
    assert expand(["target=qwen3_4b", "seed=1"], known) == ["target=qwen3_4b", "seed=1"]
    assert expand(["target=Qwen/Qwen3-4B"], known) == ["target=folder", "target.id=Qwen/Qwen3-4B"]
    assert expand(["target=/a b,c/d"], known) == ["target=/a b,c/d"]  # a comma is a sweep
    assert expand(["target=/a b/it's"], known) == ["target=folder", "target.id='/a b/it\\'s'"]
    assert expand(["target=qwen3_4"], known) == ["target=qwen3_4"]  # misspelt: Hydra names the nearest
    assert expand(["target=x/y"], []) == ["target=x/y"]  # a verb without targets


@pytest.mark.parametrize(
    ("case", "target", "threshold", "stops"),
    [
        ("qwen3_dspark_vanilla", "qwen3_tiny", 0.3, None),
        pytest.param("qwen3_dspark_rnn", "qwen3_tiny", 0.6, None, marks=pytest.mark.long),
        pytest.param("qwen3_dflash", "qwen3_tiny", 0.0, [257], marks=pytest.mark.long),
        pytest.param("gemma4_eagle3", "gemma4_tiny", 0.0, [257], marks=pytest.mark.long),
        pytest.param("gemma4_dspark_vanilla", "gemma4_tiny", 0.0, [32, 10], marks=pytest.mark.long),
    ],
)
def test_the_bare_command_line_reproduces_the_released_decoding(case, target, threshold, stops, tmp_path) -> None:
    runs = json.loads((GOLDEN / case / "decode.json").read_text())["runs"]
    expected = [r for r in runs if (r["confidence_threshold"], r["stop_token_ids"]) == (threshold, stops)]
    assert len(expected) == 8
    prompts = tmp_path / "asked.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": r["prompt_ids"]}) + "\n" for r in expected))
    words = [
        "evaluate",
        f"draft={GOLDEN / case / 'draft'}",
        f"target={GOLDEN / 'targets' / target}",
        f"prompts={prompts}",
        "temperature=0",
        "max_new_tokens=48",
        f"stop_token_ids=[{','.join(map(str, stops or []))}]",
        "accounting=deepspec",
        *([f"confidence_threshold={threshold}"] if threshold else []),
        "tracking=disabled",
        f"root={tmp_path}",
        "name=run",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs" / "evaluate" / "run" / "rounds.jsonl").read_text().splitlines()
    found = {tuple(line["prompt_ids"]): line for line in map(json.loads, lines)}
    for run in expected:
        line = found[tuple(run["prompt_ids"])]
        assert line["output_ids"] == run["output_ids"][len(run["prompt_ids"]) :]
        assert line["committed"] == run["acceptance_lengths"]
        assert line["accepted"] == run["accepted_draft_lengths"]
        assert line["proposed"] == run["proposal_lengths"]


def test_the_threads_of_a_target_do_not_outlive_it(monkeypatch):
    monkeypatch.setattr(assembly, "THREADS", 2)
    for name, threads in (("embedded", 1), ("tiny_qwen3", 2), ("embedded", 1)):
        assembly.load_target(composed("answers", [f"target={name}"]).target, "cpu")
        assert torch.get_num_threads() == threads
