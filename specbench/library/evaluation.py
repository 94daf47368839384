"""Evaluate a draft: decode prompts and compute the metrics with intervals.

An evaluation is a run folder. The command line and the library write the same files, so their results can be compared.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import pandas as pd
from lightning.pytorch.loggers import Logger

from analysis.figures import acceptance as figures
from analysis.read.runs import load
from analysis.statistics.headline import PER_REQUEST, headline
from analysis.tables import frames as tables
from analysis.tables import groups as grouping
from specbench.data.answers.templates import template_facts
from specbench.data.prompts.benchmarks import Benchmarks, first_prompt
from specbench.data.prompts.suites import suite_of
from specbench.decoding.loop import Limits
from specbench.decoding.sampling import Sampling
from specbench.decoding.scheduling import FixedLength, Scheduler
from specbench.decoding.tree_shapes import TreeShape, tree_settings
from specbench.drafts.baselines import Baseline, Small
from specbench.drafts.draft import Draft
from specbench.evaluation.audit import verdict
from specbench.evaluation.draft_evaluation import Answered, DraftEvaluation, Protocol, merged, write_rounds
from specbench.files.atomic import json_line
from specbench.library.drafts import PLAIN, DraftRecord, weights_of
from specbench.models.target import Target
from specbench.ranges import Number
from specbench.runs.provenance import provenance
from specbench.runs.run_folder import RunFolder, read_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Prompts = Sequence[str] | Sequence[Sequence[str]] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval (cluster bootstrap over prompts). It prints as `2.31 [2.20, 2.40]`, and
    `float()` gives the value.

    Args:
        value: the value; NaN if it is not defined: a suffix decay if no slot after the first was reached.
        low: lower bound; NaN if fewer than two prompts had a round.
        high: upper bound.
        count: number of rounds.
    """

    value: float
    low: float
    high: float
    count: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "no value"
        if math.isnan(self.low):
            return f"{self.value:.2f} [no interval: fewer than two prompts]"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    __repr__ = __str__


class Evaluation:
    """Result of an evaluation: metrics with intervals, records as a data frame, figures.

    Args:
        folder: a run folder that `specbench evaluate` or `Evaluation.save` wrote.

    Raises:
        ValueError: the folder has no finished evaluation.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.summary: dict[str, Any] = read_summary(self.folder)
        except FileNotFoundError as error:
            raise ValueError(f"{folder} holds no summary.json: it is not the folder of an evaluation") from error
        if self.summary.get("kind") != "evaluate" or self.summary["status"] != "finished":
            state = f"{self.summary.get('kind')}, {self.summary['status']}"
            raise ValueError(f"{folder} is no finished evaluation ({state}): name one, or evaluate again")
        self.metrics: dict[str, Any] = self.summary["metrics"]

    def _estimate(self, name: str) -> Estimate:
        found = self.metrics.get(name)
        if found is None:
            raise ValueError(f"{self.summary['name']} has no {name}: plain decoding has no rounds, and so no proposals")
        value, low, high = (math.nan if found[key] is None else found[key] for key in ("value", "low", "high"))
        return Estimate(value, low, high, found["count"])

    @property
    def accepted_length(self) -> Estimate:
        """Tokens committed / rounds, pooled over all rounds; it includes the bonus token or the correction."""
        return self._estimate("accepted_length")

    @property
    def accepted_length_per_prompt(self) -> Estimate:
        """The mean over prompts of each prompt's own accepted length."""
        return self._estimate("accepted_length_per_prompt")

    @property
    def acceptance_rate(self) -> Estimate:
        """Tokens accepted / tokens proposed."""
        return self._estimate("acceptance_rate")

    @property
    def suffix_decay(self) -> Estimate:
        """Slope of log conditional acceptance per slot along the block; 0: no decay."""
        return self._estimate("suffix_decay")

    @property
    def conditional_acceptance(self) -> pd.DataFrame:
        """One row per slot: conditional acceptance with its interval, the number n of rounds that reached it, and
        survival.
        """
        return pd.DataFrame(self.metrics.get("slots", []))

    @property
    def records(self) -> pd.DataFrame:
        """One row per prompt and turn, with the columns of records.parquet."""
        return pd.read_parquet(self.folder / "records.parquet")

    def plot_conditional_acceptance(self, quantity: str = "conditional") -> Figure:
        """Figure of conditional acceptance (or quantity="survival") by slot with 95% bands, one panel per domain."""
        found = grouping.collect(load([self.folder]).decoded())
        return figures.by_slot(tables.conditional_by_domain(found), quantity)

    def save(self, folder: str | Path) -> Path:
        """Copy the run folder to `folder`, which `specbench compare runs=FOLDER` reads.

        Raises:
            ValueError: `folder` exists.
        """
        place = Path(folder)
        if place.exists() and any(place.iterdir()):
            raise ValueError(f"save({str(folder)!r}): there is something already; name a new folder")
        return Path(shutil.copytree(self.folder, place, dirs_exist_ok=True))

    def __repr__(self) -> str:
        about = " ".join(str(self.summary[key]) for key in ("method", "target", "suite"))
        prompts = self.metrics.get("prompts")
        said = f"Evaluation({about}, temperature={self.summary['temperature']:g}"
        if "accepted_length" not in self.metrics:
            return f"{said}: plain decoding)"
        return f"{said}: accepted_length={self.accepted_length}, {self.metrics['rounds']} rounds of {prompts} prompts)"


def evaluate(
    target: Target,
    draft: Draft | Baseline | None,
    suite: str | Path | Prompts | Benchmarks = "quick",
    *,
    temperature: Number = 0.0,
    top_k: int = 0,
    top_p: Number = 1.0,
    min_p: Number = 0.0,
    max_new_tokens: int = 256,
    stop_token_ids: Sequence[int] | None = None,
    prompts: str | Path | None = None,
    limit: int | None = None,
    turns: str | None = None,
    thinking: bool | None = None,
    scheduler: Scheduler | None = None,
    tree: TreeShape | None = None,
    slots: int | None = None,
    accounting: str = "specbench",
    teacher_forced: bool = False,
    seed: int = 0,
    batch_size: int = 16,
    token_budget: int | None = None,
    folder: str | Path | None = None,
    method: str | None = None,
    training_seed: int = 0,
    loggers: Sequence[Logger] = (),
) -> Evaluation:
    """Decode prompts losslessly with a target and a draft, and count what is accepted.

    The same settings give the same records as `specbench evaluate`. An interrupted call is not continued (that of the
    command line is).

    Args:
        target: the target.
        draft: a draft or baseline; it is moved to the target's device. None: plain decoding.
        suite: a name of configs/suite ("quick", "paper", "embedded", ...; all but "embedded" need the Hugging Face
            Hub), a file or folder of prompts, or a list of prompts: texts, lists of user turns, or lists of token ids.
        temperature: 0 decodes greedily.
        top_k: keep the k most likely tokens; 0: off.
        top_p: keep the most likely tokens with this total probability; 1: off.
        min_p: keep tokens with at least this share of the largest probability; 0: off.
        max_new_tokens: maximum tokens of an answer.
        stop_token_ids: tokens that end an answer. None: those of the target.
        prompts: a file or folder read instead of the prompts of the suite.
        limit: maximum number of prompts of each benchmark. None: that of the suite.
        turns: "all" or "first" user turns. None: that of the suite.
        thinking: passed to the chat template. None: not passed.
        scheduler: decides how many proposed tokens are verified. None: all.
        tree: proposals are token trees of this shape (specbench/decoding/tree_shapes.py). None: chains.
        slots: tokens proposed per round. None: the block of the draft.
        accounting: "specbench" or "deepspec": how rounds at the end of a text are counted (docs/evaluation.md).
        teacher_forced: also compute teacher-forced acceptance on the decoded texts.
        seed: of decoding; each prompt and turn has its own seed, derived from it.
        batch_size: requests decoded at once.
        token_budget: maximum sum of prompt and new tokens of the requests decoded at once. None: no limit.
        folder: run folder to write, new or empty. None: a temporary one that is removed with the result.
        method: name of the draft in tables. None: its class.
        training_seed: value of the seed column of the records.
        loggers: Lightning loggers that receive the metrics.

    Returns:
        The evaluation.

    Raises:
        ValueError: naming the setting.
    """
    label = method or (PLAIN if draft is None else type(draft).__name__.lower())
    if teacher_forced and draft is None:
        raise ValueError("teacher_forced=True examines what a draft proposes, and draft=None proposes nothing")
    if teacher_forced and getattr(draft, "reads_other_requests", False):
        raise ValueError(
            f"teacher_forced=True with {label}: it keeps the decoded answers and would read those that it is asked "
            "about; use draft=suffix, or teacher_forced=False"
        )
    if slots is not None and draft is not None and not 1 <= slots <= draft.block_size:
        raise ValueError(f"slots={slots}: the block of this draft holds {draft.block_size}; ask for 1 to so many")
    place = Path(tempfile.mkdtemp(prefix="specbench-")) if folder is None else Path(folder)
    try:
        if folder is not None and place.exists() and any(place.iterdir()):
            raise ValueError(f"folder={str(folder)!r} is not empty: name a new one")
        chosen = _suite(suite, place, prompts, limit, turns)
        stops = target.stop_token_ids if stop_token_ids is None else tuple(stop_token_ids)
        limits = Limits(max_new_tokens, stops, batch_size, token_budget, accounting)
        protocol = Protocol(
            Sampling(float(temperature), top_k, float(top_p), float(min_p)),
            limits,
            scheduler or FixedLength(),
            slots,
            chosen.turns,
            thinking,
            seed,
            teacher_forced,
            tree=tree,
        )
        mark = PLAIN if draft is None else weights_of(draft)[:8]
        name = place.name if folder is not None else f"{label}-{target.name}-{chosen.name}-t{temperature:g}-{mark}"
        settings = {
            "target": {"name": target.name, "id": target.source and target.source[0]},
            "draft": label,
            "suite": {"name": chosen.name, "limit": chosen.limit, "turns": chosen.turns, "seed": chosen.seed},
            **protocol.facts(str(target.dtype), draft and draft.block_size),
            "seed": seed,
        }
        about = DraftRecord(label, training_seed)
        with RunFolder(place.parent, "evaluate", name, settings, folder=place) as run, _decoding(target, draft):
            evaluate_into(run, target, draft, chosen, protocol, about, loggers=loggers)
    except BaseException:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)
        raise
    found = Evaluation(place)
    if folder is None:
        weakref.finalize(found, shutil.rmtree, place, True)
    return found


def evaluate_into(
    run: RunFolder,
    target: Target,
    draft: Draft | Baseline | None,
    suite: Benchmarks,
    protocol: Protocol,
    about: DraftRecord,
    *,
    loggers: Sequence[Logger] = (),
    devices: int = 1,
    progress: Callable[[Answered], None] | None = None,
    audit_spacings: float = 2.0,
) -> dict[str, Any] | None:
    """Decode every prompt of the suite into a run folder that is open, and finish it: records.parquet, rounds.jsonl and
    summary.json with the headline numbers. Prompts that it has already are not decoded again.

    Returns what summary.json says; None on the ranks beside the first. audit_spacings: distances of neighbouring
    numbers within which a token that an audit finds (`protocol.audit`) counts as a tie.
    """
    first = first_prompt(suite.load())
    seeds = {"decoding": protocol.seed, "init": about.seed}
    run.write_provenance(*provenance(sys.argv, seeds, None, first))
    labels = {"run": run.name, "method": about.method, "target": target.name, "suite": suite.name, "seed": about.seed}
    trainer = L.Trainer(
        accelerator="cpu" if target.device.type == "cpu" else "gpu",
        devices=devices,
        logger=list(loggers) or False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    module = DraftEvaluation(target, draft, protocol, run.path, labels, progress)
    trainer.test(module, datamodule=suite, verbose=False)
    if trainer.global_rank:
        return None
    done = merged(run.path)
    run.write_records([item.record for item in done])
    write_rounds(run.path / "rounds.jsonl", done)
    costs = {"draft_parameters": draft.parameters_count} if isinstance(draft, Small) else about.costs
    summary = {
        **labels,
        "temperature": protocol.sampling.temperature,
        "accounting": protocol.limits.accounting,
        "prompts": suite.facts() | template_facts(target.tokenizer),
        "protocol": protocol.facts(str(target.dtype), draft and draft.block_size),
        **({} if protocol.tree is None else {"tree": tree_settings(protocol.tree)}),
        "metrics": headline_of(done, draft is None),
        "lineage": {"draft": weights_of(draft), "target": target.weights_hash, "parents": about.parents},
        "training_seed": about.seed,
        **costs,
    }
    if protocol.audit:
        summary["audit"] = verdict([item.record["audit"] for item in done], audit_spacings)
    run.finish(**summary)
    return summary


def headline_of(done: Sequence[Answered], plain: bool = False) -> dict[str, Any]:
    """The metrics of an evaluation with intervals; for plain decoding, which has no rounds, only tokens per second."""
    if not plain:
        return headline([item.record for item in done])
    seconds = sum(item.record["seconds"] for item in done)
    tokens = sum(item.record["output_tokens"] for item in done)
    return {PER_REQUEST: {"value": tokens / seconds if seconds else None, "count": tokens}}


@contextmanager
def _decoding(target: Target, draft: Draft | Baseline | None) -> Iterator[None]:
    """Context in which the draft is on the target's device and in evaluation mode, and the target has the draft's
    taps."""
    if not isinstance(draft, Draft):
        yield
        return
    training = draft.training
    draft.to(target.device).eval()
    try:
        with target.tapping(draft.target_layer_ids):
            yield
    finally:
        draft.train(training)


def _suite(
    suite: str | Path | Prompts | Benchmarks,
    place: Path,
    prompts: str | Path | None,
    limit: int | None,
    turns: str | None,
) -> Benchmarks:
    if isinstance(suite, Benchmarks):
        if (prompts, limit, turns) != (None, None, None):
            raise ValueError("prompts, limit and turns belong to a suite that is named: set them in your Benchmarks")
        return suite
    if isinstance(suite, (str, Path)):
        return suite_of(suite, prompts, limit, turns)
    if prompts is not None:
        raise ValueError(f"suite is a list of prompts, and prompts={prompts} names others: give one of them")
    if not len(suite):
        raise ValueError("suite=[] holds no prompt: give texts, lists of user turns, or lists of token ids")
    place.mkdir(parents=True, exist_ok=True)
    file = place / "own.jsonl"
    file.write_text("".join(json_line(_line(one)) for one in suite), encoding="utf-8")
    return suite_of(file, None, limit, turns)


def _line(prompt: Any) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"turns": [prompt]}
    words = list(prompt)
    return {"turns": words} if words and all(isinstance(word, str) for word in words) else {"prompt_ids": words}
