"""Evaluation prompts: a suite of benchmarks, the same prompts on every machine, divided exactly among ranks.

A benchmark is defined by data: where its rows are (a data set of the Hugging Face Hub, or the embedded corpus), how a
row becomes a prompt (a Jinja template with the row's columns, or a column with turns), which rows are drawn, its
domain, and a version that is raised whenever any of these changes. Prompts can also be read from a folder of JSONL
files, one per benchmark, whose lines have `turns` (texts) or `prompt_ids` (token ids), or from a single file of any
format and layout of foreign_layouts.py and turns.py. In such a file `benchmark` or `category` names the benchmark of a
row, as in the question files of Spec-Bench and SPEED-Bench, and `question_id` is its id.

A suite whose benchmarks all have `file` is divided: one file in the layout of its publisher holds the rows of several
benchmarks, and `where` says which rows belong to which. Such a file can have any format of foreign_layouts.py.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
from jinja2 import StrictUndefined, TemplateError, UndefinedError
from jinja2.environment import TemplateExpression
from jinja2.sandbox import SandboxedEnvironment
from torch.utils.data import DataLoader, IterableDataset

from specbench.data.prompts import foreign_layouts as foreign
from specbench.data.prompts import turns
from specbench.data.prompts.deduplication import SHORTEST, text_hash, words
from specbench.data.prompts.embedded_corpus import conversations
from specbench.files import hub_datasets as hub
from specbench.files.json_lines import text_id
from specbench.ranges import LARGEST_TOKEN, Among, Count, Natural, Seed

TURNS = ("all", "first")
OWN = "own"  # domain of prompts that belong to no benchmark of the suite
# MT-Bench's questions keep their numbers and categories wherever they are copied to, ten of each from 81 on.
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
log = logging.getLogger("specbench")
_jinja = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
# Endings of a file of prompts in a folder, in the order in which they are looked for.
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".json", ".json.gz", ".csv", ".tsv")


@dataclass(frozen=True)
class Prompt:
    """One evaluation prompt: user turns as text, or one prompt as token ids; exactly one of the two is set."""

    id: str
    benchmark: str
    domain: str
    turns: tuple[str, ...] | None
    prompt_ids: tuple[int, ...] | None
    seed: int

    @property
    def length(self) -> int:
        """Number of token ids, or of characters of the text: prompts are sorted by it."""
        return len(self.prompt_ids) if self.prompt_ids is not None else sum(map(len, self.turns or ()))


@dataclass(frozen=True)
class Benchmark:
    """Definition of a benchmark: where its rows are and how a row becomes a prompt.

    rows: how many are drawn (None: all), by the permutation that datasets.Dataset.shuffle(row_seed) uses.
    dataset, revision, subset, split, files: a data set of the Hub; `files` are paths inside its repository.
    address: where the file of a data set lies that is not on the Hub; {revision} stands for its revision.
    template: Jinja with the row's columns; turns: the column with the user turns. Exactly one of the two.
    where: Jinja expression over a row's columns that is true for the rows of this benchmark (None: every row).
    file: name, without its ending, of the file in a folder of prompts that holds this benchmark's rows among others.
    id: the column with the id of a row (None: the benchmark's name and the row's number).
    corpus: a domain of the embedded corpus, instead of a dataset.
    """

    name: str
    domain: str
    version: Natural = 1
    rows: Count | None = None
    row_seed: Seed = 0
    dataset: str | None = None
    revision: str | None = None
    subset: str | Sequence[str] | None = None
    split: str = "test"
    files: Sequence[str] | None = None
    address: str | None = None
    template: str | None = None
    turns: str | None = None
    where: str | None = None
    file: str | None = None
    id: str | None = None
    corpus: str | None = None

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row belongs to this benchmark; a row without a column of `where` does not."""
        if self.where is None:
            return True
        try:
            return bool(_condition(self.where)(dict(row)))
        except UndefinedError:
            return False
        except (TemplateError, TypeError, ValueError) as error:
            why = f"where={self.where!r} does not fit the data ({hub.first_line(error)})"
            raise ValueError(f"benchmark {self.name!r}: {why}; the columns are {', '.join(row)}") from error

    def render(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The user turns of one row. A missing column is an error that names it."""
        try:
            if self.template is not None:
                return (_jinja.from_string(self.template).render(**row),)
            found = tuple(turn["content"] for turn in turns.asked(row[self.turns or "turns"]))
            if not found:
                raise turns.Unfit("a row without turns")
            return found
        except (TemplateError, KeyError, TypeError, turns.Unfit) as error:
            raise ValueError(
                f"benchmark {self.name!r}: its template does not fit the data ({hub.first_line(error)}); the "
                f"columns are {', '.join(row)}"
            ) from error

    def download(self) -> list[tuple[str, tuple[str, ...]]]:
        """Id and turns of every row of this benchmark in its data set, in the order of the data set.

        Raises:
            ValueError: the data cannot be loaded, do not fit the template, or hold no row of this benchmark.
        """
        held = f"{self.file or self.name}.jsonl"
        remedy = f"connect to the hub, or set prompts=FOLDER with FOLDER/{held} in it, or use suite=embedded"
        if self.address is not None:
            file = hub.file(self.address.format(revision=self.revision), remedy=remedy, label=self.dataset)
            parts: list[Any] = [[row for _, row in foreign.rows(file)]]
        elif self.files is not None:
            at = f"@{self.revision}" if self.revision else ""
            urls = [f"hf://datasets/{self.dataset}{at}/{file}" for file in self.files]
            kind = "parquet" if self.files[0].endswith(".parquet") else "json"
            parts = [hub.load(kind, data_files=urls, split="train", remedy=remedy, label=self.dataset)]
        else:
            subsets = [self.subset] if isinstance(self.subset, str) or self.subset is None else self.subset
            parts = [
                hub.load(self.dataset, subset, split=self.split, revision=self.revision, remedy=remedy)
                for subset in subsets
            ]
        found = []
        for row in (row for part in parts for row in part if self.holds(row)):
            id = f"{self.name}/{len(found)}" if self.id is None else text_id(row.get(self.id))
            found.append((id, self.render(row)))
        if not found:
            raise ValueError(f"data set {self.dataset} has no row of benchmark {self.name} ({self.where}): {remedy}")
        return found

    def sample(self, count: int, limit: int | None = None) -> list[int]:
        """Which of `count` rows are drawn. A `limit` keeps the first of them, so a smaller suite is a subset of a
        larger one."""
        order = np.random.default_rng(self.row_seed).permutation(count)[: self.rows]
        return [int(row) for row in order[:limit]]


class Benchmarks(L.LightningDataModule):
    """The prompts of a suite; a test batch is this rank's share of one benchmark, longest first.

    name, title, version: the suite's name for commands, its full name, and a number that is raised whenever its prompts
        change.
    prompts: folder of JSONL files, or one file, read instead of the Hub and the corpus. A folder follows the suite
        (benchmarks without a file are left out and named); a single file is used completely, in its order. The files
        of a divided suite have the layout and the name that their publisher gives them; every row must belong to one
        of its benchmarks.
    limit: at most so many prompts of each benchmark. turns: "all", or "first" for the published protocol.
    seed: the seed of each prompt is a hash of it and the prompt's id.
    """

    def __init__(
        self,
        name: str,
        benchmarks: Mapping[str, Benchmark] | Sequence[Benchmark],
        prompts: str | Path | None = None,
        limit: Count | None = None,
        turns: Annotated[str, Among(TURNS)] = "all",
        seed: Seed = 0,
        title: str | None = None,
        version: Natural = 1,
    ) -> None:
        super().__init__()
        if turns not in TURNS:
            raise ValueError(f"turns={turns!r}: choose one of {', '.join(TURNS)}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit}: ask for at least one prompt, or null for all")
        self.name, self.limit, self.turns, self.seed = name, limit, turns, seed
        self.title, self.version = title or name, version
        self.benchmarks = list(benchmarks.values()) if isinstance(benchmarks, Mapping) else list(benchmarks)
        self.folder = None if prompts is None else Path(prompts).expanduser()
        self.missing: list[str] = []
        self._prompts: list[Prompt] | None = None

    def load(self) -> list[Prompt]:
        """All prompts of the suite, benchmark by benchmark."""
        if self._prompts is None:
            chosen = [p for b, pool in self._pools() for p in self._choose(b, pool)]
            if not chosen:
                if self.folder is not None and self.folder.is_file():
                    raise ValueError(
                        f"prompts={self.folder} holds no prompt: a line is one, with `turns` or `prompt_ids`"
                    )
                names = ", ".join(dict.fromkeys(f"{b.file or b.name}.jsonl" for b in self.benchmarks))
                raise ValueError(f"prompts={self.folder} holds no prompt of suite {self.name!r}: it looks for {names}")
            self._prompts = chosen
        return self._prompts

    def texts(self) -> dict[str, list[str]]:
        """The user turns of every row, drawn or not; training prompts must not overlap with them.

        Follow-up questions of fewer than `SHORTEST` words ("And what is twice as much?") are not specific and are left
        out.
        """
        return {
            b.name: [t for p in pool for i, t in enumerate(p.turns or ()) if i == 0 or len(words(t)) >= SHORTEST]
            for b, pool in self._pools()
        }

    def facts(self) -> dict[str, Any]:
        """Identity of these prompts for the record of a run: their source, with revision or digest."""
        loaded = self.load()
        counts = Counter(p.benchmark for p in loaded)
        domains = {p.benchmark: p.domain for p in loaded}
        known = {b.name: b for b in self.benchmarks}
        described = {}
        for name, count in counts.items():
            b = known.get(name, Benchmark(name, domains[name]))
            described[name] = {"domain": b.domain, "prompts": count}
            if self.folder is None:
                described[name] |= {"version": b.version, "dataset": b.dataset or b.corpus, "revision": b.revision}
            else:
                file = self.folder if self.folder.is_file() else self._file(b)
                assert file is not None  # its prompts were read from it
                described[name] |= {"file": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        return {
            "suite": self.name,
            "title": self.title,
            "version": self.version,
            "prompts": None if self.folder is None else str(self.folder),
            "limit": self.limit,
            "turns": self.turns,
            "seed": self.seed,
            "missing": self.missing,
            "benchmarks": described,
        }

    def test_dataloader(self) -> DataLoader:
        """Batches of list[Prompt]: each is this rank's part of one benchmark. Nothing is padded or repeated."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        own = for_rank(self.load(), rank, world)
        names = list(dict.fromkeys(p.benchmark for p in self.load()))
        own.sort(key=lambda p: names.index(p.benchmark))  # stable: longest first stays
        return DataLoader(_Batches([list(g) for _, g in groupby(own, lambda p: p.benchmark)]), batch_size=None)

    def transfer_batch_to_device(self, batch: list[Prompt], device: Any, dataloader_idx: int) -> list[Prompt]:
        """Prompts are text and numbers: there is nothing to move."""
        return batch

    def _pools(self) -> Iterator[tuple[Benchmark, list[Prompt]]]:
        """Every benchmark with all of its rows as prompts."""
        if self.folder is not None and self.folder.is_file():
            if self._divided:
                held = self._held_by(self.folder)
                self.missing = [b.name for b in self.benchmarks if b not in held]
                yield from self._divide(self.folder, held)
                return
            named = {b.name: b for b in self.benchmarks}
            name = Path(self.folder.name.removesuffix(".gz")).stem
            prompts = self._read(self.folder, named.get(name, Benchmark(name, OWN)), by_row=name not in named)
            for benchmark in dict.fromkeys(p.benchmark for p in prompts):
                pool = [p for p in prompts if p.benchmark == benchmark]
                yield replace(named.get(benchmark, Benchmark(benchmark, pool[0].domain)), rows=None), pool
            return
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"prompts={self.folder} does not exist: give a folder of JSONL files, or one such file")
        if self.folder is not None:
            self.missing = [b.name for b in self.benchmarks if self._file(b) is None]
            if self.missing:
                log.warning(
                    "%s has no file for %s: left out of suite %s", self.folder, ", ".join(self.missing), self.name
                )
        present = [b for b in self.benchmarks if b.name not in self.missing]
        if self.folder is not None and self._divided:
            for file in dict.fromkeys(self._file(b) for b in present):
                assert file is not None  # those without a file are missing
                yield from self._divide(file, [b for b in present if self._file(b) == file])
            return
        for benchmark in present:
            if self.folder is not None:
                file = self._file(benchmark)
                assert file is not None  # those without a file are missing
                yield benchmark, self._read(file, benchmark)
            elif benchmark.corpus is not None:
                rows = conversations(benchmark.corpus, "benchmark")
                pool = [(str(c["id"]), tuple(m["content"] for m in c["messages"] if m["role"] == "user")) for c in rows]
                yield benchmark, [self._prompt(benchmark, id, turns, None) for id, turns in pool]
            else:
                yield benchmark, [self._prompt(benchmark, id, turns, None) for id, turns in benchmark.download()]

    @property
    def _divided(self) -> bool:
        """Whether benchmarks share the files of their publisher."""
        return bool(self.benchmarks) and all(b.file is not None for b in self.benchmarks)

    def _held_by(self, file: Path) -> list[Benchmark]:
        """The benchmarks of a divided suite that a single file holds. Of a suite with one file that is all of them,
        whatever the name; of several files the name tells which one it is."""
        names = list(dict.fromkeys(b.file for b in self.benchmarks))
        held = [b for b in self.benchmarks if any(file.name == f"{b.file}{ending}" for ending in ENDINGS)]
        if not held and len(names) > 1:
            raise ValueError(
                f"prompts={file}: suite {self.name} has several files, and this name is none of "
                f"{', '.join(map(str, names))} (with one of {', '.join(ENDINGS)}); rename it to the one that it is"
            )
        return held or self.benchmarks

    def _file(self, benchmark: Benchmark) -> Path | None:
        """The file of a benchmark in the folder of prompts: FOLDER/NAME with one of ENDINGS where its publisher
        chooses the format, otherwise FOLDER/NAME.jsonl."""
        assert self.folder is not None
        if benchmark.file is None:
            places = [self.folder / f"{benchmark.name}.jsonl"]
        else:
            places = [self.folder / f"{benchmark.file}{ending}" for ending in ENDINGS]
        return next((place for place in places if place.is_file()), None)

    def _divide(self, file: Path, benchmarks: Sequence[Benchmark]) -> Iterator[tuple[Benchmark, list[Prompt]]]:
        """The benchmarks that share a file, each with its rows; another number of rows than the suite has is reported.

        A single file can be a part of the suite, so benchmarks without a row in it are missing.
        """

        def owner(row: Mapping[str, Any]) -> tuple[str, str]:
            found = next((b for b in benchmarks if b.holds(row)), None)
            if found is None:
                held = ", ".join(b.name for b in benchmarks)
                stated = turns.kind(row.get("category"))
                raise ValueError(f"category {stated} is in no benchmark of suite {self.name} (it has {held})")
            return found.name, found.domain

        prompts = self._read(file, Benchmark(self.name, OWN), owner=owner)
        for benchmark in benchmarks:
            pool = [p for p in prompts if p.benchmark == benchmark.name]
            if benchmark.rows not in (None, len(pool)):
                log.warning(
                    "%s has %d prompts of %s, and suite %s (version %d) has %d: results are not those of the suite",
                    *(file, len(pool), benchmark.name, self.name, self.version, benchmark.rows),
                )
            if pool:
                yield benchmark, pool
            else:
                self.missing.append(benchmark.name)

    def _choose(self, benchmark: Benchmark, pool: Sequence[Prompt]) -> list[Prompt]:
        whole = self.folder is not None and self.folder.is_file() and not self._divided
        rows = range(len(pool))[: self.limit] if whole else benchmark.sample(len(pool), self.limit)
        short = self.turns == "first"
        return [replace(p, turns=p.turns[:1]) if short and p.turns else p for p in (pool[row] for row in rows)]

    def _prompt(self, benchmark: Benchmark, id: str, turns, ids) -> Prompt:
        return Prompt(id, benchmark.name, benchmark.domain, turns, ids, text_hash(f"{self.seed}/{id}") >> 1)

    def _read(
        self,
        path: Path,
        benchmark: Benchmark,
        by_row: bool = False,
        owner: Callable[[Mapping[str, Any]], tuple[str, str]] | None = None,
    ) -> list[Prompt]:
        """All prompts of one file; a row that is not a prompt is an error with its number.

        by_row: a row can name its benchmark; otherwise all rows belong to `benchmark`.
        owner: benchmark and domain of a row, whatever it names.
        """
        rows, prompts = foreign.rows(path), []
        places: dict[str, int] = {}
        domains: dict[str, str] = {}
        for number, row in rows:
            try:
                asked, ids = _content(row)
                id = _id(row) or f"{benchmark.name}/{len(prompts)}"
                named = owner(row) if owner is not None else _benchmark(row) if by_row else None
                name, domain = named or (benchmark.name, benchmark.domain)
            except ValueError as error:
                raise rows.broken(number, str(error)) from None
            first = places.setdefault(id, number)
            if first != number:
                raise rows.broken(number, f"repeats the id {id!r} of {rows.unit} {first}")
            if domains.setdefault(name, domain) != domain:
                why = f"puts benchmark {name!r} into domain {domain!r}, and rows before it into {domains[name]!r}"
                raise rows.broken(number, why)
            prompts.append(self._prompt(replace(benchmark, name=name, domain=domain), id, asked, ids))
        return prompts


@lru_cache
def _condition(where: str) -> TemplateExpression:
    return _jinja.compile_expression(where, undefined_to_none=False)


def _content(row: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """User turns or token ids of a row. ValueError with the reason if it does not have exactly one of them."""
    given, ids = row.get("turns"), row.get("prompt_ids")
    if ids is None:
        if given is not None and not ((given and turns.is_turns(given)) or _filled(given, str)):
            raise ValueError("`turns` is not a list of texts with at least one word each")
        if given is None and not any(row.get(key) for key in (*turns.LISTS, *turns.TEXTS, "instruction")):
            raise ValueError("a prompt needs `turns` or `prompt_ids`, and not both")
        found = turns.find(row)
        if any(turn["role"] == "system" for turn in found):
            raise ValueError("a system message, and prompts are user turns: write it into the first turn")
        asked = tuple(turn["content"] for turn in found if turn["role"] == "user")
        if not asked:
            raise ValueError("no question")
        return asked, None
    if given is not None:
        raise ValueError("a prompt needs `turns` or `prompt_ids`, and not both")
    if not (_filled(ids, int) and min(ids) >= 0 and max(ids) <= LARGEST_TOKEN):
        raise ValueError("`prompt_ids` is not a list of token ids (whole numbers from 0)")
    return None, tuple(ids)


def _id(row: Mapping[str, Any]) -> str | None:
    value = next((row[key] for key in ("id", "question_id") if row.get(key) not in (None, "")), None)
    return None if value is None else text_id(value)


def _benchmark(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Benchmark and domain that a row names."""
    for key in ("benchmark", "category", "domain"):
        if not isinstance(row.get(key, ""), (str, type(None))) or (row.get(key) or "x").strip() == "":
            raise ValueError(f"`{key}` is not text")
    number = row.get("question_id")
    if (
        str(number).isdecimal()
        and 81 <= int(number) < 161
        and row.get("category") == MT_BENCH[(int(number) - 81) // 10]
    ):
        return "mt-bench", "chat"
    name = row.get("benchmark") or row.get("category")
    return (name, row.get("domain") or OWN) if name else None


def for_rank(prompts: Sequence[Prompt], rank: int, world: int) -> list[Prompt]:
    """The prompts of this rank, longest first. Every prompt belongs to exactly one rank; sizes differ by at most 1."""
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} of world={world}: ranks count from 0 to world - 1")
    ordered = sorted(prompts, key=lambda p: (-p.length, p.benchmark, p.id))
    return ordered[rank::world]


def _filled(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and set(map(type, value)) == {kind}


class _Batches(IterableDataset):
    """An iterable, because Lightning would add a sampler to a map-style data set, which pads ranks to equal length."""

    def __init__(self, batches: list[list[Prompt]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Prompt]]:
        return iter(self.batches)


def first_prompt(prompts: Sequence[Prompt]) -> str:
    """The first prompt as text, or its token ids, for the record of a run."""
    return prompts[0].turns[0] if prompts[0].turns else str(list(prompts[0].prompt_ids or ()))
