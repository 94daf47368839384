"""The model card of a published draft, generated from the records of its runs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from specbench.checkpoints.obstacles import SGLANG, VLLM

UNKNOWN = "not recorded"
HOW_TO = {
    "specbench": "`specbench evaluate draft={repository} target={target}`.",
    "deepspec": "`specbench evaluate draft={repository} target={target}`, or the DeepSpec toolkit.",
    "vllm": "`{command}` ({engine}).",
    "sglang": "`{command}` ({engine}).",
}


def model_card(
    repository: str,
    form: str,
    target: str | None,
    licence: str | None,
    training: Mapping[str, Any] | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
    dtype: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a draft repository: front matter, use, training, measured numbers with intervals, licence.

    `training` is {"summary", "config", "provenance"} of the training run (None: a draft without one), `evaluations`
    the summaries of its evaluation runs; `target` is the target's hub id (None: not recorded; a folder is named and not
    linked, because nobody else has it), `dtype` that of the tensors, `config` the draft's config.json in this format,
    which decides how an engine is started.
    """
    local = target is not None and not is_hub_id(target)
    name, target = (PurePath(target).name if target else None), (None if local else target)
    front: dict[str, Any] = {"library_name": "specbench", "tags": ["speculative-decoding", "draft-model", form]}
    if target:
        front["base_model"] = target
    if licence:
        front["license"] = licence
    summary = (training or {}).get("summary", {})
    article = f"A {summary['method']} draft model" if "method" in summary else "A draft model"
    partner = "its target (which one is not recorded)"
    if local:
        partner = f"the target `{name}` (a folder of the author's, on no hub)"
    elif target:
        partner = f"[{target}](https://huggingface.co/{target})"
    stored = f", its tensors in {dtype}" if dtype else ""
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=True) + "---",
        f"# {repository}",
        f"{article} for speculative decoding with {partner}, in the {form} format{stored}. It proposes "
        "tokens; the target verifies them, so the output has the target's own law.",
        "## Use\n\n" + how_to(repository, form, target, config),
        "## Results\n\n" + _results(evaluations),
        "## Training\n\n" + _training(training),
        "## Licence\n\n" + (licence or "The author has named none; ask before you use it."),
    ]
    return "\n\n".join(parts) + "\n"


def how_to(repository: str, form: str, target: str | None, config: Mapping[str, Any] | None = None) -> str:
    """The command that decodes with a draft of this format; TARGET and DRAFT stand for folders of the reader's."""
    partner, engine = target or "TARGET", {"vllm": VLLM, "sglang": SGLANG}.get(form)
    command = serving_command(repository if is_hub_id(repository) else "DRAFT", form, partner, config)
    if engine is not None and not command:
        return f"{engine}."
    return HOW_TO[form].format(repository=repository, target=partner, command=command, engine=engine)


CHAIN = 7  # tokens of a chain, where a format does not keep how far the draft was unrolled
# Of SGLang, by the architecture of the drafts that are written for it.
SGLANG_ALGORITHMS = {
    "LlamaForCausalLMEagle": "EAGLE",
    "LlamaForCausalLMEagle3": "EAGLE3",
    "DFlashDraftModel": "DFLASH",
    "Qwen3DSparkModel": "DSPARK",
}


def serving_command(repository: str, form: str, target: str, config: Mapping[str, Any] | None) -> str:
    """How an engine is started with a draft, from the draft's config.json in that format; empty for the other formats.

    vLLM takes another method in silence where none is named, so method and number of tokens are always given.
    """
    if form not in ("vllm", "sglang") or config is None:
        return ""
    if form == "vllm":
        more: dict[str, Any] = {}
        if "speculators_config" in config:
            proposed = config["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
            method = config["speculators_model_type"]
            if method == "peagle":  # vLLM has no method of this name
                method, more = "eagle3", {"parallel_drafting": True}
        elif config["model_type"] == "medusa":
            proposed, method = config["num_heads"], "medusa"
        else:
            proposed, method = CHAIN, "eagle"
        asked = {"method": method, "model": repository, "num_speculative_tokens": proposed, **more}
        return f"vllm serve {target} --speculative-config '{json.dumps(asked)}'"
    start = f"python -m sglang.launch_server --model-path {target} --speculative-draft-model-path {repository}"
    algorithm = SGLANG_ALGORITHMS[config["architectures"][0]]
    if algorithm.startswith("EAGLE"):  # a chain; the format does not keep how far the draft was unrolled
        algorithm += (
            f" --speculative-num-steps {CHAIN} --speculative-eagle-topk 1 --speculative-num-draft-tokens {CHAIN + 1}"
        )
    return f"{start} --speculative-algorithm {algorithm}"


def is_hub_id(target: str) -> bool:
    """Whether `target` can be linked on the hub: OWNER/NAME, and neither a path nor a folder here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", target) is not None and not Path(target).exists()


def _results(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return "No evaluation is recorded."
    lines = [
        "Accepted length is tokens committed a verification, the bonus token included, pooled over all rounds; the "
        "interval is 95%, a cluster bootstrap over prompts.",
        "",
        "| suite | temperature | accepted length | interval | rounds | tokens/s and request | accounting |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in evaluations:
        metrics = run.get("metrics", {})
        # Evaluations of earlier versions have the same number under a name that now means the whole batch's.
        speed = metrics.get("tokens_per_second_per_request", metrics.get("tokens_per_second", {}))
        length = metrics.get("accepted_length", {})
        low, high = _number(length.get("low")), _number(length.get("high"))
        cells = (
            run.get("suite", UNKNOWN),
            f"{run['temperature']:g}" if "temperature" in run else UNKNOWN,
            _number(length.get("value")),
            f"{low} to {high}",
            length.get("count", UNKNOWN),
            _number(speed.get("value")),
            run.get("accounting", UNKNOWN),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _training(training: Mapping[str, Any] | None) -> str:
    if training is None:
        return "The record of the training run is not at hand."
    summary, config, provenance = training["summary"], training["config"], training["provenance"]
    cache = summary.get("lineage", {}).get("cache", {})
    rows = {
        "data": config.get("data", {}).get("name", UNKNOWN),
        "target cache": cache.get("fingerprint", UNKNOWN),
        "optimiser steps": summary.get("steps", UNKNOWN),
        "step of the chosen checkpoint": summary.get("best_step", UNKNOWN),
        "supervised tokens": summary.get("trained_tokens", UNKNOWN),
        "trained parameters": summary.get("parameters", UNKNOWN),
        "objective": config.get("method", {}).get("objective", UNKNOWN),
        "seeds": config.get("seed", UNKNOWN),
        "code": (provenance.get("code") or {}).get("commit") or UNKNOWN,
        "versions": ", ".join(
            f"{name} {provenance.get('versions', {}).get(name) or UNKNOWN}"
            for name in ("specbench", "torch", "transformers")
        ),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    command = shlex.join(provenance.get("command") or [UNKNOWN])
    return f"| | |\n|---|---|\n{table}\n\nCommand:\n\n    {command}"


def _number(value: Any) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"
