"""Questions for the chat server, and the check that every one was answered once and by what it said."""

import json

from specbench.data.answers.engines import AnswerPolicy, ServerEngine
from specbench.data.answers.servers import Patience
from tests.data.chat_server import answer_to

QUICK = Patience(request=0.6, attempts=8, backoff=0.02, longest=0.2, probe=0.05, outage=5.0)
POLICY = AnswerPolicy("tiny", max_new_tokens=32)


def prompts(count, turns=1):
    """Conversations whose questions name conversation and turn."""
    return [
        {
            "id": f"p{i}",
            "source": "s",
            "messages": [{"role": "user", "content": f"question {i}.{t}"} for t in range(turns)],
        }
        for i in range(count)
    ]


def rows(folder, name="answers.jsonl"):
    """The lines of a file, parsed."""
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
    """An engine over these servers that loses patience quickly."""
    return ServerEngine([s.url for s in servers], model, concurrency=concurrency, patience=patience)
