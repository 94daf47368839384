"""What a long loop shows: on a terminal one live line, elsewhere plain lines with honest estimates."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from specbench.cli.summary import report, within
from specbench.progress import Progress, RecentRate, duration

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    yield now


def test_lines_have_count_rate_and_time_left(clock: list[float], capsys: Capture) -> None:
    with Progress("answers", 1200, "prompts", start=200) as bar:
        for _ in range(20):
            clock[0] += 4.0
            bar.advance(50, note="loss 2.1")
    assert capsys.readouterr().err.splitlines()[:3] == [
        "answers: 300/1,200 prompts, 12.5 prompts/s, 1 min 12 s left, loss 2.1",
        "answers: 400/1,200 prompts, 12.5 prompts/s, 1 min 04 s left, loss 2.1",
        "answers: 500/1,200 prompts, 12.5 prompts/s, 56 s left, loss 2.1",
    ]


def test_the_last_line_tells_the_time_and_a_failure_where_it_stopped(clock: list[float], capsys: Capture) -> None:
    with Progress("cache", 4000, "tokens") as bar:
        clock[0] += 2.0
        bar.advance(4000)
    with pytest.raises(ValueError, match="broken"), Progress("cache", 4000, "tokens") as bar:
        bar.advance(1000)
        clock[0] += 3.0
        raise ValueError("broken")
    assert capsys.readouterr().err.splitlines() == [
        "cache: 4,000/4,000 tokens in 2.0 s, 2,000 tokens/s",
        "cache: stopped at 1,000/4,000 tokens after 3.0 s",
    ]


def test_the_first_unit_promises_nothing(clock: list[float], capsys: Capture) -> None:
    """A first prompt of ten minutes, loading and compiling included, says nothing about the other 159."""
    with Progress("answers", 160, "prompts") as bar:
        clock[0] += 600.0
        bar.advance()
        for _ in range(90):
            clock[0] += 1.0
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "answers: 1/160 prompts, estimating time left"
    assert lines[1] == "answers: 61/160 prompts, 1.0 prompts/s, 1 min 39 s left"


def test_units_that_end_together_are_no_rate_of_their_own() -> None:
    rate = RecentRate(0.0)
    for request in range(16):  # a batch of sixteen, whose requests end within a tenth of a second
        rate.add(30.0 + request / 160, request + 1)
    assert rate.at(30.2) is None and rate.at(59.0) is None
    assert rate.at(60.0) == pytest.approx(0.5)
    for request in range(16):
        rate.add(60.0 + request / 160, request + 17)
    assert rate.at(60.1) == pytest.approx(31 / 30.1, rel=0.01)


def test_a_rate_is_of_late_and_stands_still_between_slow_units() -> None:
    rate = RecentRate(0.0)
    for second in range(1, 201):
        rate.add(float(second), second if second <= 100 else 100 + 10 * (second - 100))
    assert rate.at(200.0) == pytest.approx(10.0)
    slow = RecentRate(0.0)
    for unit in range(1, 6):
        slow.add(600.0 * unit, unit)
    assert slow.at(3001.0) == slow.at(3500.0) == pytest.approx(1 / 600)
    assert slow.at(6000.0) == pytest.approx(4 / 5400)  # the next one is long overdue


def test_a_log_of_a_day_stays_readable(clock: list[float], capsys: Capture) -> None:
    with Progress("train", 86_400, "steps") as bar:
        for _ in range(86_400):
            clock[0] += 1.0
            bar.advance()
    assert 1000 < len(capsys.readouterr().err.splitlines()) < 1600


def test_an_inner_loop_is_told_only_where_it_is_long(clock: list[float], capsys: Capture) -> None:
    with Progress("train", 10, "steps") as outer:
        for seconds in (1.0, 20.0):
            with Progress("probe", 2, "prompts") as inner:
                clock[0] += seconds
                inner.advance(2)
        outer.advance(10)
    said = [line.partition(" ")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["probe:", "train:"]


def test_ranks_beside_the_first_and_hidden_ones_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    with Progress("x", 1, shown=False) as bar:
        bar.advance()
    monkeypatch.setenv("RANK", "1")
    with Progress("x", 1) as bar:
        bar.advance()
    report("x", "here", 1.0)
    out, err = capsys.readouterr()
    assert out + err == ""


def on_a_terminal(code: str) -> str:
    """What a terminal of a hundred columns receives from a Python program."""
    owner, terminal = pty.openpty()
    env = os.environ | {"COLUMNS": "100", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    received = b""
    while True:
        try:
            part = os.read(owner, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        received += part
    os.close(owner)
    assert process.wait(timeout=30) == 0, received
    return received.decode()


def test_a_terminal_shows_one_live_line_and_keeps_what_is_printed() -> None:
    text = on_a_terminal(
        "import sys, time\n"
        "from specbench.progress import Progress\n"
        "with Progress('answers', 40, 'prompts') as bar:\n"
        "    for i in range(40):\n"
        "        if i == 20:\n"
        "            print('note to stdout'); print('note to stderr', file=sys.stderr)\n"
        "            with Progress('probe', 1, 'texts') as inner: time.sleep(0.3); inner.advance()\n"
        "        time.sleep(0.07); bar.advance()\n"
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "note to stdout" in plain and "note to stderr" in plain and "probe" in plain
    assert "estimating time left" in plain and re.search(r"\d+/40 prompts, 1\d\.\d prompts/s, \d s left", plain)
    assert "\x1b[?25h" in text  # the cursor is there again
    assert plain.splitlines()[-1].startswith("answers: 40/40 prompts in ")
    assert "\x1b[1A" not in text.rpartition("answers: 40/40 prompts in ")[2]


def test_a_stdout_that_is_a_file_keeps_what_is_printed(tmp_path) -> None:
    """The live line is on stderr, and takes nothing that was meant for a file."""
    kept = tmp_path / "table.txt"
    on_a_terminal(
        f"import sys; sys.stdout = open({str(kept)!r}, 'w')\n"
        "from specbench.progress import Progress\n"
        "with Progress('x', 1) as bar:\n"
        "    print('a row of a table'); bar.advance()\n"
    )
    assert kept.read_text() == "a row of a table\n"


def test_a_summary_is_a_box_on_a_terminal_with_the_next_command_in_one_piece() -> None:
    command = "specbench evaluate root=/somewhere/long " + " ".join(f"target.key{i}=value" for i in range(9))
    text = on_a_terminal(
        "from specbench.cli.summary import report\n"
        f"report('train', 'outputs/runs/train/x', 63.2, {{'best_step': 40, 'loss': 1.23456}}, {command!r})\n"
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "╭─ train: done in 1 min 03 s" in plain and "│ best step  40" in plain and "1.235" in plain
    assert f"next: {command}" in plain


def test_a_part_of_another_verb_ends_with_one_line(capsys: Capture) -> None:
    with within():
        report("train", "runs/train/x", 4.0, {"best_step": 40, "kept": [1, 2]}, "specbench evaluate draft=x")
        report("cache", "cache/1", 1.0, {"samples": 60, "left_out": 0})
    report("quickstart", "compare/quickstart", 9.0, {"drafts": "dspark"}, "specbench status")
    assert capsys.readouterr().out.splitlines() == [
        "train: done in 4.0 s, best step 40 (runs/train/x)",
        "cache: done in 1.0 s, samples 60 (cache/1)",
        "quickstart: done in 9.0 s",
        "  drafts: dspark",
        "  in compare/quickstart",
        "  next: specbench status",
    ]


def test_durations_read_well() -> None:
    assert [duration(s) for s in (4.24, 60, 200, 7500)] == ["4.2 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]
