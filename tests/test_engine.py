"""A draft in vLLM: the same texts and the same accepted tokens at every position as here. Needs an engine of its own.

SPECBENCH_VLLM_PYTHON names the interpreter of an environment with vLLM (docs/serving.md says how to make one on a CPU).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

from experiments.quickstart import stage
from specbench.checkpoints.model_card import serving_command
from specbench.data.answers.engines import AnswerPolicy
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
    "medusa": ["method=medusa", "export_for=vllm"],
    "p_eagle": ["method=p_eagle", "export_for=vllm"],
    "eagle1": ["method=eagle1", "export_for=vllm"],
}
# Run by the engine's own interpreter: one process loads target and draft, decodes, and prints texts and counters.
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
target, speculative, file = sys.argv[1:]
lines = [json.loads(line) for line in open(file)]
llm = LLM(model=target, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=8,
          disable_log_stats=False, enable_prefix_caching=False,
          speculative_config=json.loads(speculative))
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


EMBEDDED = str(Path(__file__).parents[1] / "specbench" / "data" / "embedded")
# What vLLM makes of a request to a model with these defaults of its own.
REQUESTS = """
import json, sys
from vllm.config import ModelConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
folder, text = sys.argv[1:]
body = json.loads(text)
body |= body.pop("extra_body")
defaults = ModelConfig(model=folder).get_diff_sampling_param()
print("RESULT" + json.dumps(defaults))
names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
         "max_tokens", "seed")
for request in (ChatCompletionRequest(messages=[{"role": "user", "content": "a"}], **body),
                CompletionRequest(prompt=[1, 2], **body)):
    made = request.to_sampling_params(body["max_tokens"], dict(defaults))
    print("RESULT" + json.dumps({name: getattr(made, name) for name in names}))
"""


def run_there(script: str, *words: str) -> list[dict]:
    """What a script of ours prints in the engine's interpreter."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | VARIABLES
    done = subprocess.run([PYTHON, "-c", script, *words], env=clean, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr[-2000:])
    found = [line.removeprefix("RESULT") for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert found, done.stderr[-2000:]
    return [json.loads(line) for line in found]


def test_no_default_of_the_served_model_reaches_an_answer(tmp_path: Path) -> None:
    """A server fills what a request leaves out from the model's generation_config.json, so nothing is left out."""
    shutil.copytree(EMBEDDED, tmp_path / "target")
    own = {"temperature": 1.9, "top_p": 0.11, "top_k": 3, "min_p": 0.4, "repetition_penalty": 1.7, "max_new_tokens": 5}
    file = tmp_path / "target" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    off = AnswerPolicy("m", temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=77).sampling(5)
    defaults, *made = run_there(REQUESTS, str(tmp_path / "target"), json.dumps(off))
    own["max_tokens"] = own.pop("max_new_tokens")
    assert defaults == own  # vLLM takes all of them; transformers drops the other penalties from this file
    sent = {name: value for name, value in off.items() if name != "extra_body"}
    sent |= {name: off["extra_body"][name] for name in ("min_p", "repetition_penalty")}
    assert len(made) == 2
    for one in made:
        assert one.pop("top_k") in (0, -1) and one == sent


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
    # The configuration that the printed command has.
    command = serving_command(str(out), "vllm", "TARGET", json.loads((out / "config.json").read_text()))
    speculative = json.loads(shlex.split(command)[-1]) | {"model": str(out)}
    (there,), here = run_there(ENGINE, EMBEDDED, json.dumps(speculative), str(file)), of_rounds(lines)
    assert there["texts"] == [line["output_ids"] for line in lines]
    assert there["vllm:spec_decode_num_drafts"] == here.verifications
    # vLLM proposes whole blocks also in the last round, and counts what it accepts behind the limit of new tokens.
    behind = there["vllm:spec_decode_num_draft_tokens"] - here.proposed
    assert 0 <= there["vllm:spec_decode_num_accepted_tokens"] - here.accepted <= behind
    positions = there["vllm:spec_decode_num_accepted_tokens_per_pos"]
    assert all(0 <= a - b <= behind for a, b in zip_longest(positions, here.by_position, fillvalue=0))
    assert here.accepted > 0
