"""Submitted results: their numbers against an independent transcription, what a check finds, ranks, and the site."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.html.leaderboard import write_site
from analysis.read.published_results import published_results
from analysis.read.results import RECOMPUTED, REPORTED, VERIFIED, check, result_files
from analysis.statistics.ranks import ranks
from analysis.statistics.result_numbers import counts_of_lines, definitions, result_numbers
from specbench.files.atomic import json_line, write_json
from specbench.runs.result_schema import RecordLine, Result, ResultQuantity, dumped

REPOSITORY = Path(__file__).resolve().parents[2]
ABOUT = {"math": {"domain": "math", "version": 1}, "code": {"domain": "code", "version": 2}}
RESAMPLES = 300


def drawn(seed: int, prompts: int = 8, ease: float = 0.6) -> list[RecordLine]:
    """Records of `prompts` prompts on each of two benchmarks with three slots; odd prompts have two turns."""
    generator, lines = np.random.default_rng(seed), []
    for benchmark in ABOUT:
        for prompt in range(prompts):
            for turn in range(1 + prompt % 2):
                rounds = int(generator.integers(3, 12))
                accepted = (generator.random((rounds, 3)) < ease).cumprod(1).sum(1)
                cells = [[3, j, int((accepted == j).sum())] for j in range(4) if (accepted == j).any()]
                lines.append(
                    RecordLine(
                        benchmark=benchmark,
                        prompt_id=f"p{prompt}",
                        turn=turn,
                        prompt=hashlib.sha256(f"{benchmark}{prompt}".encode()).hexdigest()[:16],
                        output=hashlib.sha256(f"{seed}{benchmark}{prompt}{turn}".encode()).hexdigest()[:16],
                        output_tokens=rounds + int(accepted.sum()) + 1,
                        truncated=False,
                        rounds=rounds,
                        committed=rounds + int(accepted.sum()),
                        histogram=cells,
                    )
                )
    return lines


def result(folder: Path, name: str, lines: list[RecordLine], **more) -> Path:
    """A result as `specbench submit` writes it, of these records."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json_line(dumped(line)) for line in lines)
    (folder / f"{name}.records.jsonl").write_text(text)
    numbers = result_numbers(lines, ABOUT, RESAMPLES, 0)
    place = {"schema": "specbench.result-records/1", "place": f"{name}.records.jsonl", "lines": len(lines)}
    content = {
        "schema": "specbench.result/1",
        "name": name,
        "signed_off_by": "Ada Lovelace <ada@example.org>",
        "date": "2026-01-02",
        "draft": {"name": name, "weights": f"weights of {name}", "slots": 3},
        "target": {"name": "tiny", "weights": "weights of tiny"},
        "suite": {"name": "two", "benchmarks": {key: dumped(one) for key, one in numbers.benchmarks.items()}},
        "protocol": {"temperature": 0.0, "max_new_tokens": 64, "slots": 3},
        "seeds": {"decoding": 0},
        "hardware": {"processor": "abacus", "cores": 2, "gpus": []},
        "definitions": definitions(),
        "bootstrap": {"resamples": RESAMPLES, "seed": 0},
        "macro": dumped(numbers.macro),
        "suffix_decay": numbers.suffix_decay and dumped(numbers.suffix_decay),
        "curves": {key: [dumped(slot) for slot in curve] for key, curve in numbers.curves.items()},
        "records": place | {"sha256": hashlib.sha256(text.encode()).hexdigest()},
        **more,
    }
    file = folder / f"{name}.json"
    write_json(file, dumped(Result.model_validate(content)))
    return file


def test_the_numbers_are_those_of_a_transcription() -> None:
    """Cluster bootstrap with the draws of numpy's generator, written out prompt by prompt."""
    lines = drawn(1)
    found = result_numbers(lines, ABOUT, RESAMPLES, 0)
    for benchmark in ABOUT:
        sums: dict[str, list[int]] = {}
        for line in (line for line in lines if line.benchmark == benchmark):
            own = sums.setdefault(line.prompt, [0, 0])
            own[0] += line.committed
            own[1] += line.rounds
        table = np.array([sums[key] for key in sorted(sums)])
        generator, draws = np.random.default_rng([0, 8]), []
        for rows in (128, 128, 44):  # the chunks of 300 resamples
            for chosen in generator.integers(0, 8, (rows, 8), dtype=np.int32):
                draws.append(table[chosen, 0].sum() / table[chosen, 1].sum())
        tail = stats.norm.cdf(-np.sqrt(8 / 7) * stats.t.ppf(0.975, 7))
        length = found.benchmarks[benchmark].accepted_length
        assert length.value == pytest.approx(table[:, 0].sum() / table[:, 1].sum(), abs=1e-12)
        assert [length.low, length.high] == pytest.approx(list(np.quantile(draws, [tail, 1 - tail])), abs=1e-12)
        assert length.standard_error == pytest.approx(np.std(draws, ddof=1) * np.sqrt(8 / 7), abs=1e-12)
        assert found.benchmarks[benchmark].rounds == table[:, 1].sum()
        assert found.benchmarks[benchmark].prompts == 8
    both = [found.benchmarks[name].accepted_length for name in ABOUT]
    assert found.macro.value == pytest.approx((both[0].value + both[1].value) / 2, abs=1e-12)
    error = np.sqrt(both[0].standard_error ** 2 + both[1].standard_error ** 2) / 2
    assert found.macro.standard_error == pytest.approx(error, abs=1e-12)
    cells = [cell for line in lines for cell in line.histogram]
    for slot in found.curves["all"]:
        reached = sum(times for _, accepted, times in cells if accepted >= slot.slot - 1)
        passed = sum(times for _, accepted, times in cells if accepted >= slot.slot)
        assert (slot.conditional.value, slot.rounds) == (pytest.approx(passed / reached), reached)


def edited(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def resigned(file: Path, change: Callable[[list[dict]], object]) -> None:
    """The records changed, and their digest and number stated anew, as somebody would who wants to pass."""
    records = file.with_name(f"{file.stem}.records.jsonl")
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    change(lines)
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    digest = hashlib.sha256(records.read_bytes()).hexdigest()
    edited(file, lambda content: content["records"].update(sha256=digest, lines=len(lines)))


def stated(*path: str, value: object) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (stated("macro", "high", value=3.9), "macro.high: the result states 3.9, and its records give"),
        (stated("macro", "standard_error", value=0.001), "macro.standard_error"),
        (stated("suffix_decay", value=None), "suffix_decay: the result states None"),
        (lambda c: c["curves"]["all"].pop(), "curves.all"),
        (lambda c: c["curves"]["math"][0].update(rounds=1), "curves.math.1.rounds: the result states 1"),
        (stated("suite", "benchmarks", "math", "prompt_set", value="0" * 8), "benchmarks.math.prompt_set"),
        (stated("suite", "benchmarks", "code", "rounds", value=10**6), "benchmarks.code.rounds"),
        (stated("draft", "slots", value=2), "a round proposes more than the 2 slots"),
        (stated("records", "lines", value=1), "lines, and the result states 1"),
        (stated("name", value="another"), "its name is 'another'"),
    ],
)
def test_a_changed_result_is_found(tmp_path: Path, change: Callable, says: str) -> None:
    file = result(tmp_path, "one", drawn(2))
    assert (check(file).state, check(file).problems, check(file).notes) == (RECOMPUTED, (), ())
    edited(file, change)
    found = check(file)
    assert found.state == REPORTED
    assert says in "\n".join(found.problems)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: lines[0].update(committed=lines[0]["committed"] + 50), "committed ="),
        (lambda lines: lines[0].update(rounds=1), "rounds = 1, and its histogram has"),
        (lambda lines: lines[0]["histogram"].append([2, 3, 1]), "accepts more than it proposed"),
        (lambda lines: lines.append(lines[0]), "stands twice"),
        (lambda lines: lines.pop(), "benchmarks.code"),
        (lambda lines: [line.update(prompt_id="p1", turn=5) for line in lines[:1]], "different prompts"),
        (lambda lines: [line.update(benchmark="chat") for line in lines[:3]], "benchmarks chat"),
        (lambda lines: lines[0]["histogram"].reverse() or lines[0].update(committed=lines[0]["rounds"]), ""),
    ],
)
def test_changed_records_are_found_though_their_digest_fits(tmp_path: Path, change: Callable, says: str) -> None:
    file = result(tmp_path, "one", drawn(2))
    resigned(file, change)
    found = check(file)
    assert found.state == REPORTED
    assert found.problems and says in "\n".join(found.problems)


def test_records_of_another_digest_are_found(tmp_path: Path) -> None:
    file = result(tmp_path, "one", drawn(2))
    records = tmp_path / "one.records.jsonl"
    records.write_text(records.read_text().replace('"truncated":false', '"truncated":true', 1))
    assert "the digest of one.records.jsonl" in check(file).problems[0]
    records.unlink()
    assert (check(file).state, check(file).problems) == (REPORTED, ())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (stated("macro", "value", value=9.0), "the whole: macro says 9, and the unweighted mean"),
        (stated("colour", value="red"), "colour: Extra inputs"),
        (stated("draft", "slots", value="3"), "draft.slots: Input should be a valid integer"),
        (stated("records", value=None), "a measured result needs records"),
        (stated("target", "weights", value=None), "a measured result needs target.weights"),
        (stated("name", value="../one"), "name: String should match"),
        (stated("records", "place", value="../../secret"), "takes the name of a file beside the result"),
        (stated("schema", value="specbench.result/9"), "schema: Input should be 'specbench.result/1'"),
    ],
)
def test_what_is_no_result_is_refused_by_field(tmp_path: Path, change: Callable, says: str) -> None:
    file = result(tmp_path, "one", drawn(2))
    edited(file, change)
    with pytest.raises(ValueError, match=re.escape(says)):
        check(file)


def test_a_result_under_another_definition_is_not_compared_and_not_wrong(tmp_path: Path) -> None:
    file = result(tmp_path, "one", drawn(2))
    edited(file, stated("definitions", "suffix_decay", value="0" * 8))
    edited(file, stated("suffix_decay", "value", value=-7.0))
    found = check(file)
    assert (found.state, found.problems) == (REPORTED, ())  # a number that was not compared may be anything
    assert found.notes == ("suffix decay: written under another definition than this program's, not compared",)


def test_a_verification_holds_for_the_bytes_that_it_names(tmp_path: Path) -> None:
    file = result(tmp_path, "one", drawn(2))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    content = {"schema": "specbench.verification/1", "result_sha256": digest, "prompts": 4, "seed": 7}
    content |= {"verified_by": "Ada", "date": "2026-01-03", "hardware": {}}
    (tmp_path / "one.verified.json").write_text(json.dumps(content))
    assert check(file).state == VERIFIED
    edited(file, stated("date", value="2026-01-09"))
    assert (check(file).state, len(check(file).problems)) == (REPORTED, 1)


def test_ranks_pair_by_prompt_and_keep_ties() -> None:
    """A gap that is the same on every prompt is resolved, although prompts differ far more than drafts do."""
    generator = np.random.default_rng(3)
    rates = generator.uniform(1, 4, 40)

    def lines(extra: float, noise: float) -> list[RecordLine]:
        found = []
        for prompt, rate in enumerate(rates):
            accepted = round(100 * (rate - 1 + extra) + noise * generator.normal())
            accepted = min(max(accepted, 0), 400)
            found.append(
                RecordLine(
                    benchmark="math", prompt_id=str(prompt), turn=0, prompt=f"{prompt:016x}", output="0" * 16,
                    output_tokens=0, truncated=False, rounds=100, committed=100 + accepted,
                    histogram=[[4, 4, accepted // 4], [4, 0, 99 - accepted // 4], [4, accepted % 4, 1]],
                )
            )  # fmt: skip
        return found

    drafts = [lines(0.1, 2), lines(0.2, 2), lines(0.2, 2)]
    strata = [[counts_of_lines(own)] for own in drafts]
    numbers = [result_numbers(own, {"math": {"domain": "math"}}, RESAMPLES, 0).macro for own in drafts]
    assert abs(numbers[1].value - numbers[0].value) < numbers[0].standard_error  # not to be seen without pairing
    unknown = ResultQuantity(value=99.0)
    assert [str(rank) for rank in ranks([*numbers, unknown], [*strata, None])] == ["3", "1–2", "1–2", "None"]
    assert [str(rank) for rank in ranks(numbers, [None] * 3)] == ["1–3"] * 3
    far = [ResultQuantity(value=value, low=value, high=value, standard_error=0.1) for value in (1.0, 2.0, 2.05)]
    assert [str(rank) for rank in ranks(far, [None] * 3)] == ["3", "1–2", "1–2"]


class Page(HTMLParser):
    """Tags that are closed in order, and everything that a page refers to."""

    VOID = ("meta", "link", "br", "img", "input", "hr", "line", "circle", "polyline", "polygon")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.scripts = 0
        self.feed(file.read_text(encoding="utf-8"))
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.references += [value for key, value in attrs if key in ("href", "src", "action", "srcset", "data")]
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}>"


def closed(site: Path) -> None:
    """Every page parses, refers to files of the site alone, and has the one script of its own."""
    for file in site.glob("*.html"):
        page, text = Page(file), file.read_text(encoding="utf-8")
        assert page.scripts == 1, file
        assert not re.search(r"https?:|@import|url\(|//[a-z]", text.replace("</", "")), file
        for reference in page.references:
            assert (site / reference).is_file(), f"{file.name} -> {reference}"


def test_the_site_of_results_stands_alone_and_escapes_what_others_wrote(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    one = result(tmp_path / "results", "one", drawn(2))
    two = result(tmp_path / "results", "two", drawn(3), signed_off_by=evil, command=["specbench", evil])
    edited(two, stated("suite", "name", value=evil))
    edited(two, stated("draft", value={"name": evil, "weights": "w", "slots": 3, "training": {"data": evil}}))
    assert check(two).state == RECOMPUTED
    site = tmp_path / "site"
    pages = write_site([check(one), check(two)], site, evil, f"specbench leaderboard {evil}")
    assert len(pages) == 5  # the index, two boards, two drafts
    closed(site)
    assert {row["rank"] and tuple(row["rank"]) for row in json.loads((site / "leaderboard.json").read_text())} == {
        (1, 1)
    }


def test_a_board_ranks_and_filters_what_it_shows(tmp_path: Path) -> None:
    slow = {"measured": 0.5, "low": 0.4, "high": 0.6}
    files = [
        result(tmp_path / "results", "weak", drawn(2, 20, 0.2), speedup=slow),
        result(tmp_path / "results", "strong", drawn(3, 20, 0.9)),
        result(tmp_path / "results", "other", drawn(4, 20, 0.9), protocol={"temperature": 1.0}, hardware={}),
    ]
    write_site([check(file) for file in files], tmp_path / "site", "Board", "specbench leaderboard results")
    text = (tmp_path / "site" / "tiny--two.html").read_text(encoding="utf-8")
    rows = re.findall(r'<tr data-protocol="(\w)" data-hardware="([^"]*)" data-state="(\w+)">(.*?)</tr>', text)
    names = [re.search(r">(\w+)</a>", cells)[1] for *_, cells in rows]
    assert names[0] == "weak"  # the only one with a measured speedup
    found = dict(zip(names, rows, strict=True))
    assert found["weak"][0] == found["strong"][0] != found["other"][0]
    assert {name: row[1] for name, row in found.items()} == {
        "weak": "abacus, 2 cores",
        "strong": "abacus, 2 cores",
        "other": "not stated",
    }
    cells = {name: re.findall(r"<td[^>]*>(.*?)</td>", row[3]) for name, row in found.items()}
    assert (cells["strong"][1], cells["weak"][1], cells["other"][1]) == ("1", "2", "1")
    assert "<td class=best" in found["strong"][3]
    assert (
        "<td class=best" not in found["weak"][3] + found["other"][3]
    )  # alone under its protocol: nothing to be best of
    macro = check(files[1]).result.macro
    assert cells["strong"][2].startswith(f'{macro.value:.2f} <span class="soft">± {macro.standard_error:.2f}</span>')


def test_the_published_numbers_are_shipped_as_reported() -> None:
    own = {one.name: dumped(one) for one in published_results()}
    shipped = {file.stem: json.loads(file.read_text()) for file in (REPOSITORY / "results/reported").glob("*.json")}
    assert shipped == json.loads(json.dumps(own))
    table = pd.read_csv(REPOSITORY / "analysis/paper/table1_accepted_length.csv")
    assert len(shipped) == len(table.groupby(["target", "method"]))
    for row in table.itertuples():
        one = shipped[f"dspark-paper-{row.method}-{row.target}"]
        assert one["suite"]["benchmarks"][row.benchmark]["accepted_length"]["value"] == row.accepted_length


def test_the_shipped_results_hold_and_make_a_site(tmp_path: Path) -> None:
    found = [check(file) for file in result_files(REPOSITORY / "results")]
    assert not [(one.path.name, one.problems) for one in found if one.problems]
    measured = [one for one in found if one.result.source is None]
    assert measured and all(one.lines for one in measured)
    write_site(found, tmp_path, "SpecBench", "specbench leaderboard results/")
    closed(tmp_path)
    text = (tmp_path / "qwen3_4b--paper.html").read_text(encoding="utf-8")
    assert ">speedup<" not in text and ">speedup<" in (tmp_path / "embedded--embedded.html").read_text(encoding="utf-8")
    assert text.count("as published") == 2 and text.count('<td data-sort="1000000">–</td>') == 3


IMPOSSIBLE = {
    "no date of the calendar": lambda told: told.update(date="2026-02-30"),
    "is not between 2022-11-30": lambda told: told.update(date="2019-01-01"),
    "9999-01-01 is not between": lambda told: told.update(date="9999-01-01"),
    "accepted length of math": lambda told: told["suite"]["benchmarks"]["math"]["accepted_length"].update(high=4.5),
    "at most 3": lambda told: told["draft"].update(slots=1),
    "conditional acceptance is a share": lambda told: told["curves"]["all"][0]["conditional"].update(value=1.5),
    "speedup.measured": lambda told: told.update(speedup={"measured": 1e9}),
    "speedup.low": lambda told: told.update(speedup={"measured": 2.0, "low": -1.0}),
    "draft.parameters": lambda told: told["draft"].update(parameters=-1),
}


@pytest.mark.parametrize("why", IMPOSSIBLE)
def test_impossible_numbers_and_dates_are_refused(tmp_path, why: str) -> None:
    told = json.loads(result(tmp_path, "one", drawn(1)).read_text())
    Result.model_validate(told)
    IMPOSSIBLE[why](told)
    if why == "at most 3":
        told["draft"]["slots"], told["suite"]["benchmarks"]["math"]["accepted_length"]["high"] = 2, 3.5
    with pytest.raises(ValueError, match=why):
        Result.model_validate(told)
