"""Format of a submitted result: one JSON file a result, with its per-prompt records beside it as JSON lines.

    results/NAME.json             a `Result`
    results/NAME.records.jsonl    one `RecordLine` a prompt and turn, from which every number of the result follows
    results/NAME.verified.json    a `Verification`, written by those who keep the folder

It imports neither torch nor wandb, so that `analysis` reads what `specbench submit` writes by the same names. A file
may be anybody's, so every field has a type and unknown fields are refused.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from specbench.files import json_lines as jsonl
from specbench.files.atomic import read_json

RESULT, RECORD_LINES, VERIFICATION = "specbench.result/1", "specbench.result-records/1", "specbench.verification/1"
RECORDS_ENDING, VERIFIED_ENDING = ".records.jsonl", ".verified.json"
# Largest difference of a stated and a recomputed number: the order of sums differs between processors.
ROUNDING = 1e-6
MOST_TOKENS = 4097  # of a round: the most slots that a result can state, and the bonus token

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
OneLine = Annotated[str, Field(min_length=1, max_length=400, pattern=r"^[^\x00-\x1f\x7f]+$")]
# The first publication of speculative decoding with a draft model (Leviathan et al., arXiv 2211.17192).
EARLIEST = datetime.date(2022, 11, 30)


def _calendar(text: str) -> str:
    """A day between EARLIEST and tomorrow (a day's difference between time zones)."""
    try:
        day = datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text} is no date of the calendar: write YYYY-MM-DD") from None
    tomorrow = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=1)
    if not EARLIEST <= day <= tomorrow:
        raise ValueError(f"{text} is not between {EARLIEST} and {tomorrow}: write the day of the measurement")
    return text


Date = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$"), AfterValidator(_calendar)]
PlainValue = str | int | float | bool | None
ResultFacts = dict[str, PlainValue | list[int] | list[str]]


class Part(BaseModel):
    """What every part of a result has in common: exact types, no unknown field, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ResultQuantity(Part):
    """A number with its 95% interval and its standard error, both over prompts; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None
    standard_error: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> ResultQuantity:
        if (self.low is None) != (self.high is None) or (self.low is not None and self.low > self.high):
            raise ValueError(f"an interval from {self.low} to {self.high}: takes both bounds in order, or neither")
        return self


class SlotRate(Part):
    """Conditional acceptance of slot k; `rounds`: how many reached it, None where a publication does not say."""

    slot: int = Field(ge=1)
    conditional: ResultQuantity
    rounds: int | None = Field(None, ge=0)


class OfBenchmark(Part):
    """One benchmark: which prompts, by version and by the digest of their tokens, and its accepted length."""

    domain: OneLine
    version: int | None = None
    dataset: str | None = None
    revision: str | None = None
    prompts: int | None = Field(None, ge=1)
    prompt_set: Digest | None = None
    rounds: int | None = Field(None, ge=0)
    accepted_length: ResultQuantity


class OfSuite(Part):
    """The suite by its name and full name, its version, and how its prompts were drawn."""

    name: OneLine
    title: OneLine | None = None
    version: int | None = Field(None, ge=0)
    limit: int | None = None
    turns: str | None = None
    seed: int | None = None
    benchmarks: dict[OneLine, OfBenchmark] = Field(min_length=1)


class ModelIdentity(Part):
    """Which weights: `place` is a hub id or a path inside the package (None: a folder that nobody else has)."""

    name: OneLine
    place: str | None = None
    revision: str | None = None
    weights: str | None = None


class DraftIdentity(ModelIdentity):
    """The draft; `name` is its method."""

    parameters: int | None = Field(None, ge=0, le=10**13)
    slots: int | None = Field(None, ge=1, le=4096)
    training: ResultFacts = {}


class Speedup(Part):
    """Tokens per second relative to plain decoding of the same prompts in the same process."""

    measured: float = Field(gt=0, le=1000)
    low: float | None = Field(None, ge=0, le=1000)
    high: float | None = Field(None, ge=0, le=1000)
    predicted: float | None = Field(None, gt=0, le=1000)
    batch_size: int | None = Field(None, ge=1, le=1 << 20)


class TreeSettings(Part):
    """Settings of token trees as `specbench.decoding.tree_shapes.tree_of` reads them; `kind` is no path to code."""

    kind: Literal["static", "dynamic", "best_first", "top_w"]
    rule: Literal["deterministic_tree", "drawn_children"]
    budget: int | None = Field(None, ge=1, le=65536)
    width: int | None = Field(None, ge=1, le=65536)
    depth: int | None = Field(None, ge=1, le=4096)
    paths: list[list[Annotated[int, Field(ge=0, le=65536)]]] | None = Field(None, max_length=65536)


class RecordsPlace(Part):
    """Where the per-prompt records lie (a file beside the result, or an address) and their digest."""

    schema_: Literal["specbench.result-records/1"] = Field(alias="schema")
    place: OneLine
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    lines: int = Field(ge=1)


class Publication(Part):
    """The publication of numbers that were not measured with this program."""

    title: OneLine
    where: OneLine
    note: str | None = None


class Bootstrap(Part):
    """Resamples and seed of the intervals, so that they can be recomputed exactly."""

    resamples: int = Field(ge=100, le=100_000)
    seed: int = Field(ge=0)


class Result(Part):
    """One draft on one suite under one protocol."""

    schema_: Literal["specbench.result/1"] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[\w][\w.+-]{0,180}$")]
    signed_off_by: OneLine
    date: Date
    source: Publication | None = None
    draft: DraftIdentity
    target: ModelIdentity
    suite: OfSuite
    protocol: ResultFacts
    tree: TreeSettings | None = None
    seeds: dict[str, int]
    hardware: ResultFacts
    definitions: dict[str, Digest]  # analysis.statistics.result_numbers.definitions
    bootstrap: Bootstrap | None = None
    macro: ResultQuantity
    suffix_decay: ResultQuantity | None = None
    curves: dict[OneLine, list[SlotRate]] = {}
    speedup: Speedup | None = None
    records: RecordsPlace | None = None
    command: list[str] = []
    code: ResultFacts = {}
    versions: dict[str, str | None] = {}

    @model_validator(mode="after")
    def _complete(self) -> Result:
        mean = sum(one.accepted_length.value for one in self.suite.benchmarks.values()) / len(self.suite.benchmarks)
        if abs(mean - self.macro.value) > ROUNDING:
            raise ValueError(f"macro says {self.macro.value:g}, and the unweighted mean of its benchmarks is {mean:g}")
        lengths = {name: one.accepted_length for name, one in self.suite.benchmarks.items()} | {"macro": self.macro}
        most = MOST_TOKENS if self.draft.slots is None else self.draft.slots + 1
        for name, length in lengths.items():
            numbers = [x for x in (length.value, length.low, length.high) if x is not None]
            if not all(0 < x <= most + ROUNDING for x in numbers):
                raise ValueError(f"accepted length of {name} is {numbers}: a round commits more than 0, at most {most}")
        rates = [(slot.slot, slot.conditional.value) for curve in self.curves.values() for slot in curve]
        wrong = [f"slot {slot}: {value:g}" for slot, value in rates if not 0 <= value <= 1]
        if wrong:
            raise ValueError(f"conditional acceptance is a share from 0 to 1, and this says {', '.join(wrong[:3])}")
        if self.source is None:
            lacking = [key for key in ("bootstrap", "records") if getattr(self, key) is None]
            lacking += [f"{key}.weights" for key in ("draft", "target") if getattr(self, key).weights is None]
            if lacking:
                raise ValueError(
                    f"a measured result needs {', '.join(lacking)}; numbers of a publication name a source"
                )
        return self


class RecordLine(Part):
    """The counts of one prompt and turn. `prompt` and `output` are digests of token ids (recorded_rounds.digest).

    `prompt` is that of the first turn, so that all turns of a conversation are one cluster; `histogram` has
    [proposed, accepted, count] over the rounds.
    """

    benchmark: str
    prompt_id: str
    turn: int = Field(ge=0)
    prompt: Digest
    output: Digest
    output_tokens: int = Field(ge=0)
    truncated: bool
    rounds: int = Field(ge=0)
    committed: int = Field(ge=0)
    histogram: list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=3, max_length=3)]]


class Verification(Part):
    """That the result with this digest was decoded again: its tokens and rounds were the same."""

    schema_: Literal["specbench.verification/1"] = Field(alias="schema")
    result_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    prompts: int = Field(ge=1)
    seed: int = Field(ge=0)
    verified_by: OneLine
    date: Date
    hardware: ResultFacts


def read_result(path: str | Path) -> Result:
    """A result file. Errors: ValueError that names the file and the field."""
    return validated(Result, read_json(jsonl.require_file(path, "name the JSON file of a result"), None), path)


def read_verification(path: str | Path) -> Verification:
    """NAME.verified.json. Errors: as for `read_result`."""
    return validated(Verification, read_json(Path(path), None), path)


def read_record_lines(path: str | Path) -> list[RecordLine]:
    """NAME.records.jsonl. Errors: ValueError that names the file, the line and the field."""
    return [validated(RecordLine, line, f"{path}, line {number}") for number, line in jsonl.read(path)]


def dumped(part: Part) -> dict[str, Any]:
    """A part as plain data with the names of the file; a result of chains has no `tree`, as before there were trees."""
    found = part.model_dump(by_alias=True, mode="json")
    if isinstance(part, Result) and part.tree is None:
        del found["tree"]
    return found


def sha256(path: str | Path) -> str:
    """Digest of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def beside(result: str | Path, place: str) -> Path | None:
    """The file `place` in the folder of a result; None for an address elsewhere and for a file that is not there.

    Errors: ValueError for a path that leaves the folder.
    """
    if re.match(r"[a-z][a-z0-9+.-]*://", place):
        return None
    if Path(place).name != place:
        raise ValueError(
            f"{result}: records lie at {place!r}; takes the name of a file beside the result, or an address"
        )
    file = Path(result).parent / place
    return file if file.is_file() else None


def validated(model: type[Any], content: Any, where: str | Path) -> Any:
    """`content` as a `model`. Errors: ValueError that names `where` and the first field that is wrong."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} holds {type(content).__name__} and not an object of names and values")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}") from error
