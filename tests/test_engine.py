"""A draft in vLLM: the same texts and the same accepted tokens at every position as here. Needs an engine of its own.

SPECBENCH_VLLM_PYTHON names the interpreter of an environment with vLLM (docs/serving.md says how to make one on a CPU).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.quickstart import stage
from specbench.evaluation.engine_counters import of_rounds

PYTHON = os.environ.get("SPECBENCH_VLLM_PYTHON")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(PYTHON is None, reason="SPECBENCH_VLLM_PYTHON names no interpreter with vLLM"),
]
METHODS = {
    "eagle3": ["method=eagle3", "method.backbone=llama", "target.target_layer_ids=[1,2,3]"],
    # One layer: vLLM 0.32.0's kernel for a CPU norms the keys of further layers with the first layer's weights.
    "dflash": ["method=dflash", "export_for=vllm", "method.draft.layers=1"],
}
# Run by the engine's own interpreter: one process loads target and draft, decodes, and prints texts and counters.
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
target, draft, method, tokens, file = sys.argv[1:]
lines = [json.loads(line) for line in open(file)]
llm = LLM(model=target, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=8,
          disable_log_stats=False, enable_prefix_caching=False,
          speculative_config={"model": draft, "method": method, "num_speculative_tokens": int(tokens)})
sampling = SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, min_p=0.0, max_tokens=48)
done = llm.generate([{"prompt_token_ids": line["prompt_ids"]} for line in lines], sampling)
found = {m.name: getattr(m, "value", None) or getattr(m, "values", None) for m in llm.get_metrics()}
texts = [list(one.outputs[0].token_ids) for one in done]
print("RESULT" + json.dumps({"texts": texts, **{k: v for k, v in found.items() if "spec_decode" in k}}))
"""
VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    stage("prompts", [f"root={root}"])
    stage("answers", [f"root={root}", "count=120", "max_new_tokens=96"])
    stage("cache", [f"root={root}"])
    return root


@pytest.mark.parametrize("method", METHODS)
def test_vllm_accepts_what_is_accepted_here(cached: Path, method: str, tmp_path: Path) -> None:
    root, draft, out = cached, cached / "runs" / "train" / method, tmp_path / "draft"
    train = ["trainer.max_steps=250", "trainer.probe.every=null", "trainer.validate_every=null", "evaluate=false"]
    stage("train", [f"root={root}", f"name={method}", *METHODS[method], *train])
    stage("evaluate", [f"root={root}", f"draft={draft}", f"name={method}", "suite.limit=8", "max_new_tokens=48"])
    stage("export", [f"root={root}", f"draft={draft}", "format=vllm", f"folder={out}"])
    file = root / "runs" / "evaluate" / method / "rounds.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    config = json.loads((out / "config.json").read_text())
    words = [config["speculators_config"]["verifier"]["name_or_path"], str(out), method, "7", str(file)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | VARIABLES
    done = subprocess.run([PYTHON, "-c", ENGINE, *words], env=clean, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr[-2000:])
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    there, here = json.loads(said.removeprefix("RESULT")), of_rounds(lines)
    assert there["texts"] == [line["output_ids"] for line in lines]
    assert there["vllm:spec_decode_num_drafts"] == here.verifications
    assert there["vllm:spec_decode_num_accepted_tokens"] == here.accepted
    assert tuple(there["vllm:spec_decode_num_accepted_tokens_per_pos"]) == here.by_position
