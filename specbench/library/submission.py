"""A submitted result: made from the run folder of an evaluation, and decoded again to verify it."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from analysis.read.results import FACTS
from analysis.statistics.intervals import RESAMPLES
from analysis.statistics.result_numbers import definitions, result_numbers
from analysis.tables.groups import BENCHMARK_ORDER, DOMAIN_ORDER
from specbench.checkpoints.model_card import is_hub_id
from specbench.data.prompts.benchmarks import Benchmarks
from specbench.decoding.loop import Limits
from specbench.decoding.sampling import Sampling
from specbench.decoding.scheduling import FixedLength
from specbench.decoding.tree_shapes import TreeShape, tree_of
from specbench.drafts.baselines import Baseline
from specbench.drafts.draft import Draft
from specbench.evaluation.draft_evaluation import THINKING, Protocol, answer
from specbench.evaluation.recorded_rounds import conversations, digest
from specbench.files.atomic import json_line, read_json, read_object, write_json, write_text
from specbench.library.drafts import weights_of
from specbench.models.target import Target
from specbench.runs.provenance import hardware
from specbench.runs.result_schema import (
    RECORD_LINES,
    RECORDS_ENDING,
    RESULT,
    VERIFICATION,
    VERIFIED_ENDING,
    RecordLine,
    Result,
    Verification,
    dumped,
    sha256,
    validated,
)
from specbench.runs.run_folder import read_lines, read_settings, read_summary
from specbench.runs.run_schema import FINISHED

HARDWARE = ("processor", "cores", "memory", "gpus", "cuda", "threads")
# Settings that a speedup and an evaluation have in common if both belong to one result.
TIMED_WITH = (
    *("temperature", "top_k", "top_p", "min_p", "scheduler", "slots", "accounting", "thinking", "dtype"),
    *("tree", "rule"),
)
BASELINE = "baseline:"  # before the name of a draft without weights, in the place of their digest
COUNTS = ("output_tokens", "truncated", "rounds", "committed", "histogram")


def submit(
    run: str | Path,
    results: str | Path = "results",
    *,
    signed_off_by: str,
    place: str | None = None,
    force: bool = False,
) -> Path:
    """Write the result of an evaluation, and its per-prompt records, into a folder of results.

    Args:
        run: run folder of a finished evaluation; its training and its speed measurement are read if they lie beside.
        results: folder of results.
        signed_off_by: who submits it, as `NAME <ADDRESS>`.
        place: address at which the records will lie instead of beside the result.
        force: replace a result of this name.

    Returns:
        The JSON file.

    Raises:
        ValueError: `run` is no finished evaluation with rounds, or the result is there already.
    """
    lines = record_lines(run)
    content = _content(Path(run), lines, signed_off_by)
    file = Path(results) / f"{content['name']}.json"
    if file.exists() and not force:
        raise ValueError(f"{file} is there already: force=true replaces it")
    text = "".join(json_line(dumped(line)) for line in lines)
    records = file.with_name(file.stem + RECORDS_ENDING)
    content["records"] = {
        "schema": RECORD_LINES,
        "place": place or records.name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "lines": len(lines),
    }
    result: Result = validated(Result, content, run)
    write_text(records, text)
    write_json(file, dumped(result))
    file.with_name(file.stem + VERIFIED_ENDING).unlink(missing_ok=True)  # it verified what was there before
    return file


def record_lines(run: str | Path) -> list[RecordLine]:
    """The per-prompt records of an evaluation with digests of its prompts and outputs.

    Errors: ValueError for a run without rounds.
    """
    run = Path(run)
    for name in ("records.parquet", "rounds.jsonl"):
        if not (run / name).is_file():
            raise ValueError(f"{run} has no {name}: name the run folder of a finished evaluation")
    rounds = read_lines(run / "rounds.jsonl")
    keys = [(line["benchmark"], line["prompt_id"], line["turn"]) for line in rounds]
    prompts = dict(zip(keys, conversations(rounds), strict=True))
    outputs = {key: digest(line["output_ids"]) for key, line in zip(keys, rounds, strict=True)}
    found = []
    for record in pq.read_table(run / "records.parquet").to_pylist():
        key = (record["benchmark"], record["prompt_id"], record["turn"])
        if key not in outputs:
            raise ValueError(f"{run}: rounds.jsonl has no line for {key}; evaluate this run again")
        about = dict(zip(("benchmark", "prompt_id", "turn"), key, strict=True))
        counts = {name: record[name] for name in COUNTS}
        found.append(RecordLine(**about, prompt=prompts[key], output=outputs[key], **counts))
    if not any(line.rounds for line in found):
        raise ValueError(f"{run} has no speculative round (plain decoding): there is no accepted length to submit")
    return found


def _content(run: Path, lines: Sequence[RecordLine], signed_off_by: str) -> dict[str, Any]:
    """Every field of the result except where its records lie."""
    summary, config = read_summary(run), read_settings(run)
    if summary.get("kind") != "evaluate" or summary["status"] != FINISHED:
        raise ValueError(f"{run} is a {summary.get('kind')} run, {summary['status']}: name a finished evaluation")
    facts = read_object(run / "provenance.json")
    prompts = summary["prompts"]
    about = {name: _about(prompts["benchmarks"][name]) for name in _ordered(prompts["benchmarks"])}
    numbers = result_numbers(lines, about, RESAMPLES, 0)
    parent = _parent(run, summary)
    named = config.get("target", {}).get("id")
    content: dict[str, Any] = {
        "schema": RESULT,
        "signed_off_by": signed_off_by,
        "date": str(facts.get("time", time.strftime("%Y-%m-%d", time.gmtime())))[:10],
        "draft": {
            "name": summary["method"],
            **_at(config.get("draft"), None),
            "weights": summary["lineage"]["draft"] or f"{BASELINE}{summary['method']}",
            "parameters": summary.get("draft_parameters"),
            "slots": summary["protocol"]["slots"],
            "training": {} if parent is None else _training(parent),
        },
        "target": {
            "name": summary["target"],
            **_at(named, config.get("target", {}).get("revision")),
            "weights": summary["lineage"]["target"],
        },
        "suite": {
            "name": summary["suite"],
            **{key: prompts.get(key) for key in ("title", "version")},  # runs of earlier versions have none
            **{key: prompts[key] for key in ("limit", "turns", "seed")},
            "benchmarks": {name: dumped(one) for name, one in numbers.benchmarks.items()},
        },
        "protocol": summary["protocol"],
        "tree": summary.get("tree"),
        "seeds": {**facts.get("seeds", {}), "training": summary["training_seed"]},
        "hardware": {key: facts["hardware"][key] for key in HARDWARE},
        "definitions": definitions(),
        "bootstrap": {"resamples": RESAMPLES, "seed": 0},
        "macro": dumped(numbers.macro),
        "suffix_decay": numbers.suffix_decay and dumped(numbers.suffix_decay),
        "curves": {domain: [dumped(slot) for slot in curve] for domain, curve in numbers.curves.items()},
        "speedup": _speedup(run, summary),
        "command": _command(facts.get("command", [])),
        "code": {key: facts["code"][key] for key in ("commit", "dirty", "diff_sha256")},
        "versions": facts.get("versions", {}),
    }
    sets = {name: one.prompt_set for name, one in numbers.benchmarks.items()}
    identity = json.dumps([summary["lineage"], summary["protocol"], sets, content["seeds"]], sort_keys=True)
    mark = hashlib.sha256(identity.encode()).hexdigest()[:8]
    heat = f"t{summary['temperature']:g}"
    words = (summary["method"], summary["target"], summary["suite"], heat, f"s{summary['training_seed']}", mark)
    content["name"] = re.sub(r"[^\w.+-]+", "-", "-".join(map(str, words))).lstrip("-.+")
    return content


def _about(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Which prompts a benchmark has: those of its data set, or of a file by its name and digest."""
    if "sha256" in facts:
        return {"domain": facts["domain"], "dataset": PurePath(facts["file"]).name, "revision": facts["sha256"]}
    return {key: facts.get(key) for key in FACTS}


def _ordered(benchmarks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Benchmarks in the order of the tables, which is that of the macro average's strata."""

    def place(name: str, order: Sequence[str]) -> tuple[int, str]:
        return (order.index(name) if name in order else len(order), name)

    return sorted(
        benchmarks, key=lambda name: (place(benchmarks[name]["domain"], DOMAIN_ORDER), place(name, BENCHMARK_ORDER))
    )


def _at(named: Any, revision: str | None) -> dict[str, Any]:
    """The public place of weights: a hub id, or a path inside the package. A folder is nobody else's."""
    text, _, commit = str(named or "").partition("@")
    public = text.startswith("package:") or is_hub_id(text)
    return {"place": text if public else None, "revision": (revision or commit or None) if public else None}


def _parent(run: Path, summary: Mapping[str, Any]) -> Path | None:
    """The run folder that trained the draft, if it lies beside the evaluation or where it was recorded."""
    for named in summary["lineage"].get("parents") or ():
        for folder in (run.resolve().parents[1] / "train" / Path(named).name, Path(named)):
            if (folder / "summary.json").is_file():
                return folder
    return None


def _training(run: Path) -> dict[str, Any]:
    """What a reader must know of a draft's training to judge its number."""
    summary, config = read_summary(run), read_settings(run)
    facts = read_json(run / "provenance.json", {})
    found = {
        "budget": _budget(config.get("protocol")),
        "data": config.get("data", {}).get("name"),
        "steps": summary.get("steps"),
        "supervised_tokens": summary.get("trained_tokens"),
        "objective": json.dumps(config.get("method", {}).get("objective")),
        "layers": config.get("method", {}).get("draft", {}).get("layers"),
        "cache": summary.get("lineage", {}).get("cache", {}).get("fingerprint"),
        "command": _command(facts.get("command", [])),
    }
    return {key: value for key, value in found.items() if value is not None}


def _budget(protocol: Mapping[str, Any] | None) -> str:
    """The budget that a comparison gave to every method, or that of the trainer."""
    return f"{protocol['name']}, {protocol['amount']:g}" if protocol else "the trainer's steps"


def _command(words: Sequence[str]) -> list[str]:
    """A command line as one would type it: how the program was started is left out."""
    if not words:
        return []
    own = PurePath(words[0]).name in ("cli.py", "specbench")
    return ["specbench" if own else PurePath(words[0]).name, *words[1:]]


def _speedup(run: Path, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The speedup of this draft under this protocol, if a `specbench speed` below the same root measured it."""
    for file in sorted((run.resolve().parents[1] / "speed").glob("[!.]*/summary.json")):
        timed = read_summary(file.parent)
        if timed["status"] != FINISHED or "speedup_measured" not in timed:
            continue
        same = all(timed["lineage"].get(key) == summary["lineage"][key] for key in ("draft", "target"))
        if same and all(timed["protocol"].get(key) == summary["protocol"].get(key) for key in TIMED_WITH):
            return {
                "measured": timed["speedup_measured"],
                "low": timed["speedup_low"],
                "high": timed["speedup_high"],
                "predicted": timed["speedup_predicted"],
                "batch_size": timed["protocol"]["batch_size"],
            }
    return None


@dataclass(frozen=True)
class DecodedAgain:
    """Prompts of a result that were decoded again, and in what they differ from its records."""

    prompts: int
    turns: int
    seed: int
    differences: tuple[str, ...]


def protocol_of_result(result: Result) -> Protocol:
    """How the prompts of a result were decoded. Errors: ValueError for what this program cannot repeat from it."""
    facts = result.protocol
    if facts.get("scheduler") != FixedLength().label:
        raise ValueError(
            f"{result.name}: its scheduler {facts.get('scheduler')} has settings that a result does not hold; "
            "repeat it with its own command"
        )
    tree = _tree_of_result(result)
    thinking = {word: value for value, word in THINKING.items()}
    try:
        return Protocol(
            Sampling(float(facts["temperature"]), facts["top_k"], float(facts["top_p"]), float(facts["min_p"])),
            Limits(
                facts["max_new_tokens"], tuple(facts["stop_token_ids"]), facts["batch_size"], None, facts["accounting"]
            ),
            FixedLength(),
            facts["slots"],
            facts["turns"],
            thinking[facts["thinking"]],
            result.seeds["decoding"],
            tree=tree,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{result.name}: its protocol cannot be repeated ({error!r})") from error


def _tree_of_result(result: Result) -> TreeShape | None:
    """The trees of a result; None: chains. Errors: ValueError where it does not hold their settings, or other ones."""
    label = result.protocol.get("tree")
    if label is None and result.tree is None:
        return None
    if result.tree is None:
        raise ValueError(
            f"{result.name}: it does not hold the settings of its trees ({label}); repeat it with its own command"
        )
    tree = tree_of(result.tree.model_dump(exclude_none=True))  # what another kind of tree has is null
    if tree.label != label:
        raise ValueError(f"{result.name}: its protocol names the trees {label}, and its settings give {tree.label}")
    return tree


def decode_again(
    result: Result,
    lines: Sequence[RecordLine],
    target: Target,
    draft: Draft | Baseline,
    named: str,
    suite: Benchmarks,
    prompts: int,
    seed: int,
) -> DecodedAgain:
    """Decode `prompts` conversations of a result, drawn at random, and compare prompt, output and rounds of every turn.

    At temperature 0 the output depends on the target alone, so the rounds (proposed, accepted, count) are compared too:
    they tell the draft. `named` is the draft as it was asked for, which identifies a baseline without weights.

    Raises:
        ValueError: other weights than those of the result, or a suite without its prompts.
    """
    for what, own, stated in (
        ("draft", weights_of(draft) or f"{BASELINE}{named}", result.draft.weights),
        ("target", target.weights_hash, result.target.weights),
    ):
        if own != stated:
            raise ValueError(f"{result.name} was measured with the {what} weights {stated}, and {what}= holds {own}")
    protocol = protocol_of_result(result)
    known = {(prompt.benchmark, prompt.id): prompt for prompt in suite.load()}
    there = sorted({(line.benchmark, line.prompt_id) for line in lines})
    if missing := [key for key in there if key not in known]:
        raise ValueError(f"{result.name}: suite {suite.name} does not hold {len(missing)} of its prompts, {missing[0]}")
    rows = np.random.default_rng(seed).choice(len(there), min(prompts, len(there)), replace=False)
    chosen = [there[row] for row in sorted(rows)]
    stated = {
        (line.benchmark, line.prompt_id, line.turn): line
        for line in lines
        if (line.benchmark, line.prompt_id) in chosen
    }
    labels = {"run": result.name, "method": result.draft.name, "target": target.name, "suite": suite.name, "seed": 0}
    differences, seen = [], set()
    for done in answer(target, draft, [known[key] for key in chosen], protocol, labels):
        seen.add(done.key)
        line, where = stated.get(done.key), f"{done.key[0]}, prompt {done.key[1]}, turn {done.key[2]}"
        if line is None:
            differences.append(f"{where}: the result has no record of it")
            continue
        if line.turn == 0 and digest(done.rounds["prompt_ids"]) != line.prompt:
            differences.append(f"{where}: other prompt tokens")
        if digest(done.rounds["output_ids"]) != line.output:
            differences.append(f"{where}: other output tokens")
        if done.record["histogram"] != line.histogram or done.record["committed"] != line.committed:
            differences.append(f"{where}: other rounds ({done.record['histogram']} instead of {line.histogram})")
    differences += [f"{key[0]}, prompt {key[1]}, turn {key[2]}: not decoded" for key in stated if key not in seen]
    return DecodedAgain(len(chosen), len(stated), seed, tuple(differences))


def write_verification(file: str | Path, done: DecodedAgain, verified_by: str) -> Path:
    """NAME.verified.json beside a result whose prompts were decoded again without a difference."""
    file = Path(file)
    machine = hardware()
    found: Verification = validated(
        Verification,
        {
            "schema": VERIFICATION,
            "result_sha256": sha256(file),
            "prompts": done.prompts,
            "seed": done.seed,
            "verified_by": verified_by,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "hardware": {key: machine[key] for key in HARDWARE},
        },
        file,
    )
    place = file.with_name(file.stem + VERIFIED_ENDING)
    write_json(place, dumped(found))
    return place
