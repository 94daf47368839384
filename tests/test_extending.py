"""The differences in docs/extending.md, applied to a copy of the repository: each addition is there and works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each heading of the page promises, checked in one process on the changed copy.
CHECKS = """
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra.utils import instantiate

import specbench as sb
from analysis.statistics.headline import headline
from experiments.cli import main
from specbench.cli.assembly import composed
from specbench.cli.settings import check_settings
from specbench.cli.studies import study_of
from specbench.data.prompts.benchmarks import Benchmark
from specbench.losses.objective import Objective
from specbench.losses.terms import slot_terms
from specbench.metrics.rounds import DecodingMetrics
from specbench.models.backbone import Layer, RotaryEmbedding, backbone_of, chosen
from specbench.models.target import Target

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_hidden_layers": 3, "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0}
BIASES = {"attention_bias": True, "attention_out_bias": True, "initializer_range": 0.2}


def method():
    small, large = composed("train", ["method=slot_offset"]), composed("train", ["method=slot_offset", "trainer=node"])
    assert (small.method.draft.layers, large.method.draft.layers) == (2, 5)
    target = sb.Target.load("package:data/embedded", taps=[1, 3])
    draft = sb.SlotOffset.for_target(target, layers=1, block_size=3, scale=2.0)
    draft.offset.data += 1.0
    hidden = torch.zeros(1, 3, draft.backbone.hidden_size)
    assert draft.features(hidden, torch.zeros(1, 3, dtype=torch.long)).eq(2.0).all()
    assert sb.evaluate(target, draft, ["What is 3 + 4?"], max_new_tokens=6).accepted_length.value >= 1


def target():
    cfg = composed("cache", ["target=my_qwen3"])
    check_settings("cache", cfg)
    assert (cfg.target.id, cfg.target.mask_token_id) == ("/models/my_qwen3", 151669)


def family():
    config = {**SIZES, **BIASES, "model_type": "seed_oss"}
    assert chosen(config).own and backbone_of(config).output_bias
    owner = Target.from_config(config, [0, 1], seed=3, stop_token_ids=[])
    for name, parameter in owner.model.named_parameters():
        if "bias" in name:
            parameter.data.normal_()
    draft = sb.DFlash.for_target(owner, start="target", layers=1, mask_token_id=1)
    layer, facts, kept = draft.layers[0], draft.backbone, []
    owner.layers[-1].register_forward_hook(lambda module, args, out: kept.extend((args[0], out)))
    owner.live_logits(torch.arange(2, 14)[None], torch.tensor([12]))
    x, theirs = kept[0], kept[1] if torch.is_tensor(kept[1]) else kept[1][0]
    y, rope = layer.normed(x), RotaryEmbedding(facts)(torch.arange(12)[None], x.dtype)
    heads = [layer.self_attn.queries(y, rope), *layer.self_attn.keys_values(y, rope)]
    query, keys, values = (one.transpose(1, 2) for one in heads)
    seen = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=facts.scale, enable_gqa=True)
    torch.testing.assert_close(layer.finish(x, seen.transpose(1, 2)), theirs, atol=1e-5, rtol=1e-5)


def metric():
    rounds = [(2, 2, 1), (2, 1, 2), (1, 1, 1)]
    collection = DecodingMetrics(slots=2)
    collection.update(rounds, committed=8)
    assert abs(float(collection.compute()["whole_blocks"]) - 1 / 3) < 1e-12
    record = {"benchmark": "b", "histogram": [list(cell) for cell in rounds], "committed": 8, "truncated": False}
    record |= {"seconds": 1.0, "output_tokens": 8}
    found = headline([record | {"prompt_id": str(n)} for n in range(3)], resamples=20)["whole_blocks"]
    assert abs(found["value"] - 1 / 3) < 1e-12 and found["low"] is not None


def loss():
    cfg = composed("train", ["method=dflash", "+method.objective.further={hellinger: 0.5}"])
    check_settings("train", cfg)
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    q = torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64)
    found = slot_terms(p.log(), q.log(), torch.tensor([0]), wanted=["hellinger"])["hellinger"]
    torch.testing.assert_close(found, 1 - (p * q).sqrt().sum(-1))
    assert Objective(**cfg.method.objective).combination.coefficients["hellinger"] == 0.5


def scheduler():
    cfg = composed("evaluate", ["scheduler=doubt", "scheduler.budget=0.65", "draft=ngram"])
    check_settings("evaluate", cfg)
    rule = instantiate(cfg.scheduler)
    assert rule.label == "doubt-0.65"
    import numpy as np
    assert rule.lengths(np.array([[0.9, 0.5, 0.9], [0.9, 0.9, 0.9]]), np.array([3, 3])).tolist() == [2, 3]


def data():
    lines = ["problem,answer", *(f"What is {n} times {n + 1}?,x" for n in range(40))]
    Path("word_problems.csv").write_text("\\n".join(lines))
    assert main(["prompts", "data=word_problems", "root=out", "decontaminate=null", "near_duplicate=null"]) == 0
    assert "What is 7 times 8?" in Path("out/prompts/word_problems/train.jsonl").read_text()


def benchmark():
    cfg = composed("evaluate", ["+suite/benchmark@suite.benchmarks.riddles=riddles", "draft=ngram"])
    check_settings("evaluate", cfg)
    one = instantiate(cfg.suite.benchmarks.riddles)
    assert isinstance(one, Benchmark)
    assert one.render({"riddle": "What has keys?"}) == ("What has keys?\\nAnswer in one word.",)


def experiment():
    study = study_of("slot_weight")
    assert study.question.endswith("?") and len(study.trainings) == 3
    assert composed("train", study.trainings[2]).method.objective.slot_weight.exp == 8


for check in (method, target, family, metric, loss, scheduler, data, benchmark, experiment):
    check()
    print("checked", check.__name__)
"""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_difference_of_the_page_adds_what_it_says(tmp_path: Path) -> None:
    for folder in ("specbench", "experiments", "configs", "analysis"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    parts = re.findall(r"^```diff\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^## (?:A|An) ([a-z ]+)", page, flags=re.MULTILINE)
    assert len(parts) == len(headings) == 9, "every heading of the page has its difference"
    for number, part in enumerate(parts):
        file = tmp_path / f"{number}.diff"
        file.write_text(part, encoding="utf-8")
        done = subprocess.run(
            ["git", "apply", "-C1", file.name], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, part + done.stderr
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CHECKS], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert len(re.findall("^checked", done.stdout, flags=re.MULTILINE)) == 9
