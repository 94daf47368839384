"""Answers through a real HTTP server with injected faults, and in process: none lost, none twice."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from specbench.data import answers, jsonl
from specbench.data.chat import encode, prompt_ids
from specbench.data.engines import InProcessEngine, Policy, ServerEngine
from specbench.data.servers import Patience
from tests.data.chat_server import STOP, ChatServer, answer_to
from tests.data.tokenizers_small import THINKING, tokenizer

QUICK = Patience(request=0.6, attempts=8, backoff=0.02, longest=0.2, probe=0.05, outage=5.0)
POLICY = Policy("tiny", max_new_tokens=32)


def prompts(count, turns=1):
    return [
        {
            "id": f"p{i}",
            "source": "s",
            "messages": [{"role": "user", "content": f"question {i}.{t}"} for t in range(turns)],
        }
        for i in range(count)
    ]


def rows(folder, name="answers.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def check(folder, asked):
    """Every prompt answered exactly once, and with the answers that its own dialogue gives."""
    got = rows(folder)
    assert sorted(r["id"] for r in got) == sorted(p["id"] for p in asked)
    questions = {p["id"]: [m["content"] for m in p["messages"] if m["role"] == "user"] for p in asked}
    for row in got:
        assert [m["content"] for m in row["messages"] if m["role"] == "user"] == questions[row["id"]]
        for i, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                assert message["content"] == answer_to(row["messages"][:i])
        assert len(row["truncated"]) == len(questions[row["id"]])


def engine(*servers, concurrency=8, patience=QUICK, model="tiny"):
    return ServerEngine([s.url for s in servers], model, concurrency=concurrency, patience=patience)


def test_multi_turn_answers_with_the_servers_own_tokens(tmp_path):
    asked = prompts(12, turns=3)
    asked[0]["messages"].insert(0, {"role": "system", "content": "be kind"})
    asked[0]["domain"] = "chat"
    asked[1]["messages"].insert(1, {"role": "assistant", "content": "somebody else's answer"})
    with ChatServer() as server:
        counts = answers.collect(asked, engine(server), tmp_path, POLICY)
        assert counts == {"answered": 12, "kept": 0, "failed": 0, "repaired": 0, "retries": 0, "outages": 0}
        assert len(server.bodies) == 36 and max(server.said.values()) == 1
    check(tmp_path, asked)
    by_id = {r["id"]: r for r in rows(tmp_path)}
    assert by_id["p0"]["domain"] == "chat" and by_id["p0"]["messages"][0]["role"] == "system"
    assert "somebody" not in json.dumps(by_id["p1"])
    for row in by_id.values():
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert row["answer_tokens"] == [[*text.encode(), STOP] for text in said]
        assert row["truncated"] == [False] * 3
    assert list(answers.read(tmp_path)) == rows(tmp_path)


def test_settings_go_out_under_their_right_names(tmp_path):
    policy = Policy("tiny", None, None, False, 0.7, 0.8, 20, 0.1, 1.05, 1.5, 32, seed=3)
    with ChatServer(ids=False) as server:
        answers.collect(prompts(3), engine(server), tmp_path, policy)
        bodies = {b["messages"][0]["content"]: b for b in server.bodies}
    for i in range(3):
        body = bodies[f"question {i}.0"]
        seed = policy.seed_of(f"p{i}", 0) & 0x7FFFFFFF
        assert body == {
            "model": "tiny", "messages": [{"role": "user", "content": f"question {i}.0"}],
            "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05,
            "presence_penalty": 1.5, "max_tokens": 32, "seed": seed,
            "chat_template_kwargs": {"enable_thinking": False}, "return_token_ids": True,
        }  # fmt: skip
    assert all(r["answer_tokens"] is None for r in rows(tmp_path))
    plain = POLICY.request(5)
    assert "presence_penalty" not in plain and set(plain["extra_body"]) == {"return_token_ids", "top_k"}
    assert len({policy.seed_of(f"p{i}", t) for i in range(50) for t in range(4)}) == 200
    assert policy.seed_of("p1", 0) != Policy("tiny", seed=4).seed_of("p1", 0)


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
        counts = answers.collect(asked, engine(a, b, c), tmp_path, POLICY)
        injected = a.faults + b.faults + c.faults
        assert all(s.said for s in (a, b, c))
    assert counts["answered"] == 60 and counts["failed"] == 0
    assert set(injected) == {"429", "500", "503", "cut", "garbage", "hang"}
    assert counts["retries"] == sum(injected.values())
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


def test_truncated_answers_are_marked(tmp_path):
    with ChatServer() as server:
        server.finish = "length"
        answers.collect(prompts(2), engine(server), tmp_path, POLICY)
    assert [r["truncated"] for r in rows(tmp_path)] == [[True], [True]]


def test_answers_of_another_policy_are_refused(tmp_path):
    with ChatServer() as server:
        answers.collect(prompts(2), engine(server), tmp_path, POLICY)
        other = Policy("tiny", max_new_tokens=32, temperature=1.0, thinking=True)
        with pytest.raises(ValueError, match=r"thinking: None -> True; temperature: 0\.7 -> 1\.0"):
            answers.collect(prompts(4), engine(server), tmp_path, other)
    assert len(rows(tmp_path)) == 2
    assert json.loads((tmp_path / "header.json").read_text())["policy"]["top_k"] == 20


def test_a_cut_last_line_is_repaired_and_counted_and_a_broken_one_named(tmp_path):
    asked = prompts(8)
    with ChatServer() as server:
        answers.collect(asked[:5], engine(server), tmp_path, POLICY)
        path = tmp_path / "answers.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])
        counts = answers.collect(asked, engine(server), tmp_path, POLICY)
        assert (counts["repaired"], counts["kept"], counts["answered"]) == (1, 4, 4)
        check(tmp_path, asked)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([lines[0], b'{"id": \n', *lines[1:]]))
        with pytest.raises(ValueError, match=r"answers\.jsonl, line 2: not JSON"):
            answers.collect(asked, engine(server), tmp_path, POLICY)
        path.write_bytes(b"".join([*lines, lines[3]]))
        with pytest.raises(ValueError, match=r"line 9: repeats the answer"):
            answers.collect(asked, engine(server), tmp_path, POLICY)
    with pytest.raises(ValueError, match="occurs twice among the prompts"):
        answers.collect([*asked, asked[0]], Echo(), tmp_path / "new", POLICY)


class Echo:
    name, counts = "echo", {}

    def answer(self, conversations, policy, emit):
        for c in conversations:
            emit("answer", {"id": c["id"], "messages": c["messages"], "truncated": []})


def test_repair_finds_the_last_newline_far_back(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    assert jsonl.repair(path) == 1 and path.read_bytes() == b'{"a": 1}\n'
    assert jsonl.repair(path) == 0 and jsonl.repair(tmp_path / "none") == 0
    path.write_bytes(b"x" * 70_000)
    assert jsonl.repair(path) == 1 and path.read_bytes() == b""
    with jsonl.Appender(path) as appender:
        appender.append({"t": "lone \ud800 surrogate, ü"})
    assert next(jsonl.read(path)) == (1, {"t": "lone \ud800 surrogate, ü"})


SCRIPT = """
import sys
from pathlib import Path
from specbench.data import answers
from specbench.data.engines import Policy, ServerEngine
ask = lambda i: [{"role": "user", "content": f"question {i}.0"}]
asked = [{"id": f"p{i}", "source": "s", "messages": ask(i)} for i in range(60)]
engine = ServerEngine([sys.argv[2]], "tiny", concurrency=4)
print("ready", flush=True)
answers.collect(asked, engine, Path(sys.argv[1]), Policy("tiny", max_new_tokens=32))
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


class Parrot:
    """A decoder whose output is a function of prompt and seed alone, delivered in a scrambled order."""

    def __init__(self, tok, words=lambda seed: f"word {seed % 97}"):
        self.tok, self.words, self.calls = tok, words, []

    def __call__(self, prompts, sampling, max_new_tokens, stop_token_ids, seeds):
        self.calls.append((prompts, sampling, max_new_tokens, stop_token_ids, seeds))
        for index in sorted(range(len(prompts)), key=lambda i: seeds[i]):
            ids = self.tok(self.words(seeds[index]), add_special_tokens=False)["input_ids"][:max_new_tokens]
            cut = len(ids) == max_new_tokens
            yield index, ids if cut else [*ids, stop_token_ids[0]], cut


def test_in_process_answers_are_the_tokens_that_were_decoded(tmp_path):
    tok = tokenizer(THINKING)
    stop = tok.convert_tokens_to_ids("<|im_end|>")
    generate = Parrot(tok)
    asked = prompts(7) + [{**p, "id": "m" + p["id"]} for p in prompts(5, turns=3)]
    policy = Policy("tiny", thinking=False, max_new_tokens=32)
    counts = answers.collect(asked, InProcessEngine(generate, tok, [stop], chunk=4), tmp_path, policy)
    assert (counts["answered"], counts["failed"]) == (12, 0)
    assert generate.calls[0][1].temperature == 0.7 and generate.calls[0][1].top_k == 20
    for row in rows(tmp_path):
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert said == [f"word {policy.seed_of(row['id'], t) % 97}" for t in range(len(said))]
        assert [tok.decode(t[:-1]) for t in row["answer_tokens"]] == said
        assert all(t[-1] == stop for t in row["answer_tokens"])
        encoded = encode(tok, row["messages"], thinking=False, answer_tokens=row["answer_tokens"], cut=row["truncated"])
        # What is trained on begins with what the last answer was decoded from.
        prompt = prompt_ids(tok, row["messages"][:-1], False, row["answer_tokens"][:-1])
        assert encoded.tokens[: len(prompt)] == prompt
        assert prompt in [p for call in generate.calls for p in call[0]]
    other = InProcessEngine(Parrot(tok), tok, [stop], chunk=100)
    answers.collect(asked[::-1], other, tmp_path / "other", policy)
    key = lambda r: r["id"]  # noqa: E731
    assert sorted(rows(tmp_path / "other"), key=key) == sorted(rows(tmp_path), key=key)


def test_in_process_failures_and_limits(tmp_path):
    tok = tokenizer()
    stop = tok.convert_tokens_to_ids("<|im_end|>")
    silent = InProcessEngine(Parrot(tok, lambda seed: ""), tok, [stop])
    counts = answers.collect([*prompts(2), {"id": "e", "messages": []}], silent, tmp_path, POLICY)
    assert counts["failed"] == 3
    assert {r["cause"] for r in rows(tmp_path, "failed.jsonl")} == {"an empty answer", "no question"}
    long = InProcessEngine(Parrot(tok, lambda seed: "many words " * 9), tok, [stop])
    answers.collect(prompts(1), long, tmp_path / "long", Policy("tiny", max_new_tokens=5))
    assert rows(tmp_path / "long")[0]["truncated"] == [True]
    with pytest.raises(ValueError, match=r"repetition_penalty=1\.1"):
        answers.collect(prompts(1), long, tmp_path / "p", Policy("tiny", repetition_penalty=1.1))
