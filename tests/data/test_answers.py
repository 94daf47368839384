"""Answers: what is written down, under which policy, resumed by id; and the engine in this process."""

import json

import pytest

from specbench.data.answers import generation as answers
from specbench.data.answers.chat import encode, prompt_ids
from specbench.data.answers.engines import AnswerPolicy, InProcessEngine, ServerEngine
from specbench.files import json_lines as jsonl
from tests.data.chat_server import STOP, ChatServer
from tests.data.dialogues import POLICY, QUICK, check, engine, prompts, rows
from tests.data.tokenizers_small import THINKING, tokenizer


def test_multi_turn_answers_with_the_servers_own_tokens(tmp_path):
    asked = prompts(12, turns=3)
    asked[0]["messages"].insert(0, {"role": "system", "content": "be kind"})
    asked[0]["domain"] = "chat"
    asked[1]["messages"].insert(1, {"role": "assistant", "content": "somebody else's answer"})
    with ChatServer() as server:
        counts = answers.collect(asked, engine(server), tmp_path, POLICY)
        assert counts == {"answered": 12, "kept": 0, "failed": 0, "repaired": 0} | {
            "retries": 0, "outages": 0, "retokenised": 24,
        }  # fmt: skip
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
    policy = AnswerPolicy("tiny", None, None, False, 0.7, 0.8, 20, 0.1, 1.05, 1.5, 32, seed=3)
    with ChatServer(ids=False) as server:
        answers.collect(prompts(3), engine(server), tmp_path, policy)
        bodies = {b["messages"][0]["content"]: b for b in server.bodies}
    for i in range(3):
        body = bodies[f"question {i}.0"]
        seed = policy.seed_of(f"p{i}", 0) & 0x7FFFFFFF
        assert body == {
            "model": "tiny", "messages": [{"role": "user", "content": f"question {i}.0"}],
            "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05,
            "presence_penalty": 1.5, "frequency_penalty": 0.0, "max_tokens": 32, "seed": seed,
            "chat_template_kwargs": {"enable_thinking": False}, "return_token_ids": True,
        }  # fmt: skip
    assert all(r["answer_tokens"] is None for r in rows(tmp_path))
    # What is off is sent too: a server fills what is missing from the model's generation_config.json.
    off = AnswerPolicy("tiny", temperature=0.0, top_p=1.0, top_k=0).request(5)
    neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
    assert off["extra_body"] == neutral and (off["presence_penalty"], off["frequency_penalty"]) == (0.0, 0.0)
    assert len({policy.seed_of(f"p{i}", t) for i in range(50) for t in range(4)}) == 200
    assert policy.seed_of("p1", 0) != AnswerPolicy("tiny", seed=4).seed_of("p1", 0)


@pytest.mark.parametrize("has_completions", [True, False])
def test_later_turns_go_out_as_the_ids_that_training_sees(tmp_path, has_completions):
    """Else the server would tokenise its own answers again; where it takes no ids, such turns are counted."""
    tok = tokenizer(THINKING)
    policy = AnswerPolicy("tiny", thinking=False, max_new_tokens=32)
    with ChatServer() as server:
        server.completes = (lambda ids: f"{len(ids)} ids") if has_completions else None
        asker = ServerEngine([server.url], "tiny", concurrency=2, patience=QUICK, tokenizer=tok)
        counts = answers.collect(prompts(3, turns=3), asker, tmp_path, policy)
    assert counts["answered"] == 3
    if not has_completions:
        assert (counts["retokenised"], len(server.bodies)) == (6, 9)
        return
    assert (counts["retokenised"], len(server.bodies), len(server.completions)) == (0, 3, 6)
    sent = [body["prompt"] for body in server.completions]
    for row in rows(tmp_path):
        for turn in (1, 2):
            known = row["answer_tokens"][:turn]
            assert prompt_ids(tok, row["messages"][: 2 * turn + 1], False, known) in sent
    for body in server.completions:
        assert (body["top_k"], body["repetition_penalty"], body["return_token_ids"]) == (20, 1.0, True)
        assert "chat_template_kwargs" not in body


def test_truncated_answers_are_marked(tmp_path):
    with ChatServer() as server:
        server.finish = "length"
        answers.collect(prompts(2), engine(server), tmp_path, POLICY)
    assert [r["truncated"] for r in rows(tmp_path)] == [[True], [True]]


def test_answers_of_another_policy_are_refused(tmp_path):
    with ChatServer() as server:
        answers.collect(prompts(2), engine(server), tmp_path, POLICY)
        other = AnswerPolicy("tiny", max_new_tokens=32, temperature=1.0, thinking=True)
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
        with pytest.raises(ValueError, match=r"line 9: repeats the id 'p3' of line 4"):
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
    policy = AnswerPolicy("tiny", thinking=False, max_new_tokens=32)
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
    answers.collect(prompts(1), long, tmp_path / "long", AnswerPolicy("tiny", max_new_tokens=5))
    assert rows(tmp_path / "long")[0]["truncated"] == [True]
    with pytest.raises(ValueError, match=r"repetition_penalty=1\.1"):
        answers.collect(prompts(1), long, tmp_path / "p", AnswerPolicy("tiny", repetition_penalty=1.1))


def test_a_prompt_that_the_target_cannot_read_fails_alone(tmp_path):
    tok = tokenizer()

    def require(prompt):
        if len(prompt) > 500:
            raise ValueError(f"prompt 0 has {len(prompt)} tokens, and tiny has 500 positions")

    asked = prompts(3)
    asked[1]["messages"][0]["content"] = "long " * 200_000  # a megabyte
    asker = InProcessEngine(Parrot(tok), tok, [tok.convert_tokens_to_ids("<|im_end|>")], require=require)
    counts = answers.collect(asked, asker, tmp_path, AnswerPolicy("tiny", max_new_tokens=32))
    assert (counts["answered"], counts["failed"]) == (2, 1) and {r["id"] for r in rows(tmp_path)} == {"p0", "p2"}
    ((id, cause),) = [(r["id"], r["cause"]) for r in rows(tmp_path, "failed.jsonl")]
    assert id == "p1" and "tiny has 500 positions" in cause
