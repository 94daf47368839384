"""specbench check-submission: check results from public information, and decode some of their prompts again."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from analysis.read.results import VERIFIED, Submitted
from analysis.read.results import check as check_result
from specbench.cli.assembly import composed, load_pair
from specbench.cli.checks import check_before
from specbench.cli.config_groups import known_options
from specbench.cli.target_argument import quoted
from specbench.library.drafts import draft_place
from specbench.library.submission import decode_again, write_verification
from specbench.runs.result_schema import VERIFIED_ENDING, Result

SHOWN = 5  # problems of one result that are printed


def run(cfg: DictConfig) -> list[Submitted]:
    """Print the state of every result; returns them. Errors: ValueError if one does not hold."""
    check_before("check-submission", cfg)
    files = named_files(cfg)
    found, wrong = [], 0
    for file in files:
        one = check_result(file)
        problems = [*one.problems, *suite_problems(one.result)]
        if cfg.draft is not None and not problems:
            problems, one = _decoded(cfg, one)
        found.append(one)
        wrong += bool(problems)
        print(f"{file}: {'NOT IN ORDER' if problems else one.state}")
        for note in one.notes:
            print(f"  note: {note}")
        for problem in problems[:SHOWN]:
            print(f"  {problem}")
        if len(problems) > SHOWN:
            print(f"  and {len(problems) - SHOWN} more")
    if wrong:
        raise ValueError(f"{wrong} of {len(files)} results are not in order: correct what is printed above")
    return found


def check(cfg: DictConfig) -> None:
    """Draft and target are given together, for one result."""
    files = named_files(cfg)
    if (cfg.draft is None) != (cfg.get("target") is None):
        raise ValueError(f"draft={cfg.draft} target={cfg.get('target')}: decoding again needs both")
    if cfg.draft is not None and len(files) != 1:
        raise ValueError(f"draft={cfg.draft} belongs to one result: name one file, not {len(files)}")
    if cfg.verified_by is not None and cfg.draft is None:
        raise ValueError(
            f"verified_by={cfg.verified_by}: a result is verified by decoding again; give draft= and target="
        )


def named_files(cfg: DictConfig) -> list[str]:
    """The result files; the verifications that `results/*.json` names beside them are read with their results."""
    files = [cfg.files] if isinstance(cfg.files, str) else list(cfg.files)
    results = [file for file in files if not file.endswith(VERIFIED_ENDING)]
    if not results:
        raise ValueError(f"files={', '.join(files)}: name the results, not their verifications")
    return results


def suite_problems(result: Result) -> Iterator[str]:
    """In what the benchmarks of a result are not those of this program's suites; those of an own suite or file pass."""
    if result.source is not None or result.suite.name not in known_options("suite"):
        return
    suite = composed("evaluate", [f"suite={result.suite.name}", "draft=plain"]).suite
    if result.suite.version not in (None, suite.version):
        yield f"suite {result.suite.name} has version {result.suite.version}, and this program has {suite.version}"
    own = suite.benchmarks
    here = {one.name: one for one in (own.values() if OmegaConf.is_dict(own) else own)}
    for name, stated in result.suite.benchmarks.items():
        if stated.version is None:  # prompts of a file, which the result names by its digest
            continue
        if name not in here:
            yield f"suite {result.suite.name} has no benchmark {name}"
            continue
        known = here[name]
        expected = (known.get("version", 1), known.get("dataset") or known.get("corpus"), known.get("revision"))
        found = (stated.version, stated.dataset, stated.revision)
        if found != expected:
            yield f"benchmark {name} is (version, data set, revision) {found}, and this program has {expected}"


def _decoded(cfg: DictConfig, one: Submitted) -> tuple[list[str], Submitted]:
    """The differences after decoding again, and the result with its new state."""
    if not one.lines:
        raise ValueError(f"{one.path}: its records do not lie beside it, so there are no tokens to compare with")
    result = one.result
    settings = composed("evaluate", [*_suite(cfg, result), f"draft={quoted(cfg.draft)}", f"device={cfg.device}"])
    settings.target = cfg.target
    settings.methods = cfg.methods
    if draft_place(cfg.draft) is None:  # a baseline proposes as many tokens as it is asked for
        settings.slots = result.draft.slots
    suite = instantiate(settings.suite, _convert_="all")
    target, draft = load_pair(settings, draft_place(cfg.draft))
    if draft is None:
        raise ValueError(f"draft={cfg.draft} proposes nothing: name the draft of the result")
    seed = secrets.randbelow(1 << 31) if cfg.seed is None else cfg.seed
    done = decode_again(result, one.lines, target, draft, str(cfg.draft), suite, cfg.decode, seed)
    print(
        f"decoded again: {done.prompts} prompts, {done.turns} turns (seed={done.seed}): {len(done.differences)} differ"
    )
    if done.differences:
        return list(done.differences), one
    if cfg.verified_by is not None:
        print(write_verification(one.path, done, cfg.verified_by))
        return [], check_result(one.path)
    return [], replace(one, state=VERIFIED)


def _suite(cfg: DictConfig, result: Result) -> list[str]:
    """The overrides that give the suite of a result."""
    name = result.suite.name
    if name not in known_options("suite"):
        raise ValueError(f"{result.name}: there is no suite {name} here; a suite of your own needs its own program")
    settings = {"limit": result.suite.limit, "turns": result.suite.turns, "seed": result.suite.seed}
    chosen = [f"suite.{key}={'null' if value is None else value}" for key, value in settings.items()]
    prompts = [] if cfg.prompts is None else [f"prompts={quoted(str(Path(cfg.prompts)))}"]
    return [f"suite={name}", *chosen, *prompts]
