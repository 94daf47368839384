"""Prompts: read a source, drop duplicates and overlaps with evaluation prompts, split by conversation, write JSONL.

    root/prompts/NAME/train.jsonl, validation.jsonl     {"id", "messages", "source"} per line
    root/prompts/NAME/report.json                       counts of what was read, kept, and dropped by reason

Two passes, so data can be larger than memory: the first streams the source into a temporary file and keeps 8 bytes and
a signature (on disk) per conversation; the second copies what is kept. report.json is written last: if it is present,
the folder is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from specbench.data.prompts.deduplication import Contamination, Signatures, text_hash
from specbench.data.prompts.sources import Source, digest, questions
from specbench.data.prompts.turns import Conversation
from specbench.files import json_lines as jsonl
from specbench.files.atomic import read_json, write_json

SCHEMA = "specbench.prompts/1"
SPLITS = ("train", "validation")
EXAMPLES = 20


def split_of(messages: list[dict[str, str]], validation: float | int, seed: int = 0) -> str:
    """Train or validation, by a hash of the questions only: equal questions are always in the same split."""
    draw = text_hash(f"{seed}/{digest(messages)}") / 2**64
    return "validation" if draw < validation else "train"


def require_shares(validation: float | int, near_duplicate: float | int | None) -> None:
    """ValueError for a share or a similarity that is not between 0 and 1."""
    if not 0 <= validation < 1:
        raise ValueError(f"validation={validation} is not a share: choose a number from 0 up to, not including, 1")
    if near_duplicate is not None and not 0 < near_duplicate <= 1:
        raise ValueError(f"near_duplicate={near_duplicate} is not a similarity: choose a number in (0, 1], or null")


def build(
    source: Source,
    folder: Path | str,
    evaluation: Mapping[str, Iterable[str]],
    *,
    validation: float | int = 0.05,
    near_duplicate: float | int | None = 0.8,
    ngram: int | None = 13,
    seed: int = 0,
    progress: Callable[[int], None] = lambda read: None,
) -> dict[str, Any]:
    """Write the prompts of `source` into `folder` and return the report.

    evaluation: benchmark name -> texts of its prompts; a conversation with a question that overlaps one is removed.
    validation: share of conversations held out, if the source has no split of its own.
    near_duplicate: lowest Jaccard similarity of word 5-grams at which the later conversation is dropped; None drops
        equal questions only.
    ngram: words in a row that count as an overlap; None removes equal questions only.
    progress: called with the number of conversations read so far.
    """
    require_shares(validation, near_duplicate)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").unlink(missing_ok=True)
    contamination = Contamination(evaluation, ngram)
    signatures = Signatures()
    counts: Counter[str] = Counter()
    overlaps: dict[str, Counter[str]] = {name: Counter() for name in contamination.sizes}
    removed: list[dict[str, str]] = []
    spool = folder / "spool.jsonl.tmp"
    try:
        with spool.open("wb") as file:
            for split, conversation in source.conversations():
                counts["read"] += 1
                progress(counts["read"])
                asked = questions(conversation["messages"])
                overlap = contamination.match(asked)
                if overlap is not None:
                    benchmark, kind = overlap
                    overlaps[benchmark][kind] += 1
                    counts["contaminated"] += 1
                    if len(removed) < EXAMPLES:
                        removed.append({"id": conversation["id"], "benchmark": benchmark, "overlap": kind})
                    continue
                signatures.add("\n".join(asked))
                split = split or split_of(conversation["messages"], validation, seed)
                line = {"split": split, "place": source.place, "conversation": conversation}
                file.write(jsonl.line(line).encode())
        first = signatures.duplicates(None)
        near = signatures.duplicates(near_duplicate)
        counts["equal questions"] = int((first >= 0).sum())
        counts["near-duplicates"] = int(((near >= 0) & (first < 0)).sum())
        _copy(spool, folder, near >= 0, counts)
    finally:
        spool.unlink(missing_ok=True)
    report = {
        "schema": SCHEMA,
        "name": source.name,
        "settings": {"validation": validation, "near_duplicate": near_duplicate, "ngram": ngram, "seed": seed},
        "read": counts["read"] + sum(n for cause, n in source.dropped.items() if not cause.endswith("(cut)")),
        "unfit": dict(source.dropped),
        "unfit_examples": list(source.unfit),
        "contaminated": counts["contaminated"],
        "equal_questions": counts["equal questions"],
        "near_duplicates": counts["near-duplicates"],
        "kept": {split: counts[split] for split in SPLITS},
        "decontamination": {
            "prompts": contamination.sizes,
            "removed": {name: dict(kinds) for name, kinds in overlaps.items()},
            "boilerplate_runs_ignored": contamination.boilerplate,
            "examples": removed,
        },
    }
    if not counts["train"]:
        dropped = {key.replace("_", " "): report[key] for key in ("contaminated", "equal_questions", "near_duplicates")}
        dropped |= {"unfit": sum(report["unfit"].values()), "held out for validation": counts["validation"]}
        told = ", ".join(f"{count} {cause}" for cause, count in dropped.items() if count)
        raise ValueError(
            f"no conversation of {source.name!r} is left for training; of {report['read']}, {told or 'none fitted'}"
            + (f" (the first: {source.unfit[0]})" if source.unfit else "")
            + ("; decontaminate=null keeps those that overlap evaluation prompts" if counts["contaminated"] else "")
            + ("; the source is empty: check data.source.paths= or data.source.dataset=" if not report["read"] else "")
        )
    write_json(folder / "report.json", report)
    return report


def _copy(spool: Path, folder: Path, repeats: Any, counts: Counter[str]) -> None:
    """Second pass: copy what is not a duplicate into its split; both files are renamed into place when complete."""
    drafts = {split: folder / f"{split}.jsonl.tmp" for split in SPLITS}
    seen: dict[int, int] = {}
    with ExitStack() as stack:
        files = {split: stack.enter_context(path.open("wb")) for split, path in drafts.items()}
        for (number, line), repeated in zip(jsonl.read(spool), repeats, strict=True):
            if repeated:
                continue
            split, conversation = line["split"], line["conversation"]
            if split not in files:
                raise ValueError(f"conversation {conversation['id']!r} names the split {split!r}: use {SPLITS}")
            first = seen.setdefault(text_hash(conversation["id"]), number)
            if first != number:
                before = next(line["place"] for at, line in jsonl.read(spool) if at == first)
                raise ValueError(
                    f"id {conversation['id']!r} occurs twice, in {before} and in {line['place']}: ids must be unique; "
                    "set data.source.columns.id=null to have them made from the questions"
                )
            files[split].write(jsonl.line(conversation).encode())
            counts[split] += 1
    for split, path in drafts.items():
        path.replace(folder / f"{split}.jsonl")


def read(folder: Path | str, split: str = "train", limit: int | None = None) -> Iterator[Conversation]:
    """Conversations of one split, in file order; a broken line is an error that names file and line."""
    path = Path(folder) / f"{split}.jsonl"
    for _, row in islice(jsonl.conversations(path), limit):
        yield row


def finished(folder: Path | str) -> dict[str, Any] | None:
    """The report of a complete folder, or None."""
    return read_json(Path(folder) / "report.json", None)
