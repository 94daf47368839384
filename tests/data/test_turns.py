"""Layouts of conversations: every one gives the same turns, and what is none says so."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specbench.data.prompts.sources import Columns, digest
from specbench.data.prompts.turns import PLACEHOLDER, Unfit, find, text_of

WORDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda text: text.strip() and text.strip() != PLACEHOLDER
)


def layouts(question, answer):
    """One question and its answer in every layout."""
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    theirs = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    parts = [{"type": "text", "text": question}]
    return [
        {"messages": said},
        {"conversations": theirs},
        {"conversation": said},
        {"items": theirs},
        {"turns": theirs},
        {"id": 3, "conversations": [{"from": "HUMAN", "value": question}, {"from": "bing", "value": answer}]},
        {"messages": [{"role": "user", "content": parts}, {"role": "model", "content": [answer]}]},
        {"messages": [{"role": "user", "text": question}, {"role": "ai", "text": answer}]},
        {"prompt": question, "response": answer},
        {"prompt": question, "completion": answer},
        {"prompt": said},
        {"question": question, "answer": answer},
        {"instruction": question, "input": "", "output": answer},
        {"instruction": question, "output": answer},
        {"messages": None, "conversations": theirs},
        {"messages": [], "prompt": question, "response": answer},
    ]


@settings(max_examples=50, deadline=None)
@given(WORDS, WORDS)
def test_every_layout_gives_the_same_turns(question, answer):
    expected = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for row in layouts(question, answer):
        assert find(row) == expected, row


def test_user_turns_systems_and_inputs():
    asked = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    system = {"role": "system", "content": "S"}
    assert find({"turns": ["a", "b"]}) == find({"prompt": ["a", "b"]}) == asked
    assert find({"system": "S", "turns": ["a", "b"]}) == [system, *asked]
    assert find(
        {"system": "S", "conversations": [{"from": "system", "value": "T"}, {"from": "human", "value": "a"}]}
    ) == [
        {"role": "system", "content": "T"},
        asked[0],
    ]
    assert find({"instruction": "Sum.", "input": "1 2", "output": ""}) == [
        {"role": "user", "content": "Sum.\n\nInput:\n1 2"}
    ]


def test_parts_of_text_are_joined_by_line_ends():
    parts = [{"type": "text", "text": "one"}, "two", {"type": "input_text", "text": "three"}, {"text": "four"}]
    assert text_of(parts) == "one\ntwo\nthree\nfour"


UNFIT = [
    ({}, "no column with turns"),
    ({"text": "raw"}, "no column with turns"),
    ({"messages": []}, "no question"),
    ({"messages": "hello"}, "'messages' is not a list of turns"),
    ({"messages": ["a", "b"]}, "'messages' is not a list of turns"),
    ({"messages": [{"role": "user", "content": "a"}, 3]}, "'messages' is not a list of turns"),
    ({"turns": "hello"}, "'turns' is not a list of turns"),
    ({"turns": ["a", None]}, "a turn without text"),
    ({"turns": [3]}, "a turn without text"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "role 'tool'"),
    ({"messages": [{"role": None, "content": "a"}]}, "role null"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "role of type list"),
    ({"messages": [{"role": "user", "content": None}]}, "a turn without text"),
    ({"messages": [{"role": "user", "content": " \n"}]}, "a turn without text"),
    ({"messages": [{"role": "user", "content": []}]}, "a turn without text"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "a turn without text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "'image_url' in a turn"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}, {"text": "a"}]}]}, "'input_audio' in a turn"),
    ({"messages": [{"role": "user", "content": [{"type": ["x"]}]}]}, "a part of type list"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a text part without text"),
    ({"messages": [{"role": "user", "content": [7]}]}, "a part of type int"),
    ({"messages": [{"role": "user", "content": "a\udc00"}]}, "not Unicode"),
    ({"messages": [{"role": "\ud800", "content": "a"}]}, r"role '\\ud800'"),
    ({"turns": [PLACEHOLDER]}, "placeholder of SPEED-Bench"),
    ({"prompt": ["a", {"role": "user", "content": "b"}]}, "a turn without text"),
]


@pytest.mark.parametrize(("row", "why"), UNFIT, ids=[str(i) for i in range(len(UNFIT))])
def test_rows_that_hold_no_conversation_say_why(row, why):
    with pytest.raises(Unfit, match=why) as caught:
        find(row)
    str(caught.value).encode()  # a cause can be written down


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=4)
NAMES = st.sampled_from(["role", "from", "content", "value", "type", "text"])
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=8)
KEYS = st.sampled_from(["messages", "conversations", "turns", "prompt", "instruction", "input", "output", "system"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, JSON))
def test_a_row_of_anything_is_turns_or_unfit(row):
    try:
        found = find(row)
    except Unfit as cause:
        str(cause).encode()
    else:
        assert all(turn["role"] in ("user", "assistant", "system") and turn["content"].strip() for turn in found)


@pytest.mark.parametrize(
    ("id", "kept"), [("a", "a"), (7, "7"), (0, "0"), (1.5, "1.5"), (None, None), ("", None), (10**20, str(10**20))]
)
def test_ids_of_a_column(id, kept):
    columns = Columns(prompt="q", id="k", source="s", domain="d")
    found = columns.conversation({"q": "hello", "k": id, "s": 3, "d": "math"}, "mine", Counter())
    assert found["id"] == (kept or f"mine-{digest(found['messages'])}")
    assert (found["source"], found["domain"]) == ("3", "math")


@pytest.mark.parametrize("id", [True, ["a"], {"a": 1}, "\ud800", float("nan")])
def test_ids_that_name_nothing_are_unfit(id):
    with pytest.raises(Unfit, match="column 'k'"):
        Columns(prompt="q", id="k").conversation({"q": "hello", "k": id}, "mine", Counter())
