"""The pool against real HTTP servers that misbehave, die and come back: no answer lost, none twice."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from specbench.data.answers import generation as answers
from specbench.data.answers.engines import ServerEngine
from specbench.data.answers.servers import Patience
from tests.data.chat_server import ChatServer
from tests.data.dialogues import POLICY, QUICK, check, engine, prompts, rows


def test_no_answer_is_lost_or_doubled_under_faults(tmp_path):
    """A third of all requests to three servers meets a 429, a 500, a cut, garbage or a hang."""
    chance = random.Random(0)
    lock = threading.Lock()

    def fault(body, number):
        with lock:
            kinds = (429, 500, 503, "cut", "garbage", "hang")
            return chance.choices((*kinds, None), (1, 1, 1, 1, 1, 0.4, 11))[0]

    asked = prompts(60, turns=2)
    with ChatServer(fault=fault) as a, ChatServer(fault=fault) as b, ChatServer(fault=fault) as c:
        counts = answers.collect(
            asked, engine(a, b, c, patience=replace(QUICK, request=2.0, attempts=16)), tmp_path, POLICY
        )
        injected = a.faults + b.faults + c.faults
        received = sum(len(s.bodies) for s in (a, b, c))
        assert all(s.said for s in (a, b, c))
    assert counts["answered"] == 60 and counts["failed"] == 0
    assert set(injected) == {"429", "500", "503", "cut", "garbage", "hang"}
    # Each fault costs a retry. A stalled machine may add timeouts of good requests, and those are retries too.
    assert received - 120 <= counts["retries"] >= sum(injected.values())
    check(tmp_path, asked)
    assert rows(tmp_path, "failed.jsonl") == []


def test_a_restarted_server_comes_back(tmp_path):
    """One of two servers is killed in the middle and started again on its port: it answers again afterwards."""
    asked = prompts(120)
    with ChatServer() as steady, ChatServer() as first:
        steady.delay = first.delay = 0.03
        port, second = first.port, []

        def restart():
            while sum(first.said.values()) < 10:
                time.sleep(0.005)
            first.stop()
            time.sleep(0.15)
            second.append(ChatServer(port).start())
            second[0].delay = 0.03

        thread = threading.Thread(target=restart)
        thread.start()
        counts = answers.collect(asked, engine(steady, first, concurrency=3), tmp_path, POLICY)
        thread.join()
        assert counts["outages"] >= 1 and counts["failed"] == 0
        assert sum(second[0].said.values()) > 0
        second[0].stop()
    check(tmp_path, asked)


def test_the_only_server_goes_away_and_returns(tmp_path):
    asked = prompts(40)
    with ChatServer() as first:
        first.delay = 0.02
        second = []

        def restart():
            while sum(first.said.values()) < 8:
                time.sleep(0.005)
            first.stop()
            time.sleep(0.4)
            second.append(ChatServer(first.port).start())

        thread = threading.Thread(target=restart)
        thread.start()
        counts = answers.collect(asked, engine(first, concurrency=4), tmp_path, POLICY)
        thread.join()
        second[0].stop()
    assert counts["answered"] == 40 and counts["failed"] == 0
    check(tmp_path, asked)


def test_a_long_outage_stops_the_run_and_the_next_run_continues(tmp_path):
    asked = prompts(30)
    patience = Patience(request=0.5, attempts=4, backoff=0.01, longest=0.05, probe=0.05, outage=0.3)
    with ChatServer() as server:
        server.delay = 0.02
        stopper = threading.Thread(target=lambda: (_until(lambda: sum(server.said.values()) >= 6), server.stop()))
        stopper.start()
        with pytest.raises(ValueError, match=r"no server has answered for 0\.3 s"):
            answers.collect(asked, engine(server, concurrency=2, patience=patience), tmp_path, POLICY)
        stopper.join()
        before = len(rows(tmp_path))
        assert 0 < before < 30
        with ChatServer(server.port) as again:
            counts = answers.collect(asked, engine(again), tmp_path, POLICY)
            assert counts["kept"] == before and counts["answered"] == 30 - before
            assert sum(again.said.values()) == 30 - before
    check(tmp_path, asked)


def _until(condition):
    while not condition():
        time.sleep(0.005)


def test_concurrency_is_bounded_and_used(tmp_path):
    with ChatServer() as server:
        server.delay = 0.05
        answers.collect(prompts(20), engine(server, concurrency=4), tmp_path, POLICY)
        assert server.busiest == 4


def test_refused_requests_are_failures_with_a_cause_and_tried_again(tmp_path):
    asked = prompts(6)

    def fault(body, number):
        if "question 2." in body["messages"][0]["content"]:
            return 400
        return 500 if "question 4." in body["messages"][0]["content"] else None

    patience = Patience(request=0.5, attempts=3, backoff=0.01, longest=0.05, probe=0.02, outage=3)
    with ChatServer(fault=fault) as server:
        counts = answers.collect(asked, engine(server, patience=patience), tmp_path, POLICY)
        assert (counts["answered"], counts["failed"]) == (4, 2)
        failed = {r["id"]: r for r in rows(tmp_path, "failed.jsonl")}
        assert set(failed) == {"p2", "p4"}
        assert "HTTP 400" in failed["p2"]["cause"] and "given up after 3 tries" in failed["p4"]["cause"]
        asked_of_p2 = [b for b in server.bodies if "question 2." in b["messages"][0]["content"]]
        assert len(asked_of_p2) == 1
        server.fault = lambda body, number: None
        counts = answers.collect(asked, engine(server), tmp_path, POLICY)
        assert (counts["answered"], counts["kept"], counts["failed"]) == (2, 4, 0)
    assert rows(tmp_path, "failed.jsonl") == []
    check(tmp_path, asked)


@pytest.mark.parametrize("status", [401, 404])
def test_what_can_never_work_stops_the_run(tmp_path, status):
    with ChatServer(fault=lambda body, number: status) as server, pytest.raises(ValueError, match=f"HTTP {status}"):
        answers.collect(prompts(5), engine(server), tmp_path, POLICY)


def test_wrong_servers_are_named_at_once(tmp_path):
    with ChatServer() as server:
        with pytest.raises(ValueError, match="'other' is not served; the servers have tiny"):
            answers.collect(prompts(1), engine(server, model="other"), tmp_path, POLICY)
        server.stop()
        with pytest.raises(ValueError, match="no server answers at"):
            answers.collect(prompts(1), engine(server), tmp_path, POLICY)
    with pytest.raises(ValueError, match="names no server"):
        ServerEngine([], "tiny")


SCRIPT = """
import sys
from pathlib import Path
from specbench.data.answers import generation as answers
from specbench.data.answers.engines import AnswerPolicy, ServerEngine
ask = lambda i: [{"role": "user", "content": f"question {i}.0"}]
asked = [{"id": f"p{i}", "source": "s", "messages": ask(i)} for i in range(60)]
engine = ServerEngine([sys.argv[2]], "tiny", concurrency=4)
print("ready", flush=True)
answers.collect(asked, engine, Path(sys.argv[1]), AnswerPolicy("tiny", max_new_tokens=32))
"""


def test_killed_in_the_middle_and_run_again(tmp_path):
    with ChatServer() as server:
        server.delay = 0.02
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), server.url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        path = tmp_path / "answers.jsonl"
        deadline = time.monotonic() + 120
        while not (path.exists() and path.read_bytes().count(b"\n") >= 9):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        process.kill()
        assert process.wait(20) == -signal.SIGKILL
        asked = prompts(60)
        kept = path.read_bytes().count(b"\n")
        assert 9 <= kept < 60
        counts = answers.collect(asked, engine(server), tmp_path, POLICY)
        assert counts["kept"] == kept and counts["answered"] == 60 - kept
    check(tmp_path, asked)


def test_ctrl_c_keeps_what_is_answered(tmp_path):
    asked, seen = prompts(40), []

    def press(kind):
        seen.append(kind)
        if len(seen) == 11:
            os.kill(os.getpid(), signal.SIGINT)

    with ChatServer() as server:
        server.delay = 0.01
        with pytest.raises(KeyboardInterrupt):
            answers.collect(asked, engine(server, concurrency=3), tmp_path, POLICY, progress=press)
        assert 11 <= len(rows(tmp_path)) < 40
        counts = answers.collect(asked, engine(server), tmp_path, POLICY)
        assert counts["kept"] + counts["answered"] == 40 and counts["repaired"] == 0
    check(tmp_path, asked)
