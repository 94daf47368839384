"""Lines of answers.jsonl that nobody's target wrote are refused by line; others come back as they were."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specbench.data.answers import generation as answers
from specbench.data.answers.servers import Refused, _reply
from tests.data.tokenizers_small import tokenizer

ASK, SAY = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
VOCABULARY = 100
WHOLE = {"id": "a", "messages": [ASK, SAY], "source": "s", "answer_tokens": [[1, 2, 99]], "truncated": [False]}


def write(folder, *rows):
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


BROKEN = {
    "a fraction": ({"answer_tokens": [[1, 2.0]]}, "answer 1 holds float"),
    "a text": ({"answer_tokens": [[1, "2"]]}, "answer 1 holds str"),
    "true": ({"answer_tokens": [[1, True]]}, "answer 1 holds bool"),
    "null": ({"answer_tokens": [[1, None]]}, "answer 1 holds null"),
    "a list": ({"answer_tokens": [[1, [2]]]}, "answer 1 holds list"),
    "below 0": ({"answer_tokens": [[1, -1]]}, "answer 1 holds -1, and token ids count from 0"),
    "beyond the vocabulary": ({"answer_tokens": [[1, 100]]}, "answer 1 holds 100, beyond the target's 100"),
    "huge": ({"answer_tokens": [[1, 10**40]]}, "more than 18 digits, beyond the target's 100"),
    "no token": ({"answer_tokens": [[]]}, "not a list with at least one token id"),
    "null for one": ({"answer_tokens": [None]}, "not a list with at least one token id"),
    "flat": ({"answer_tokens": [1, 2]}, "`answer_tokens` holds 2 entries for 1 answers"),
    "too many": ({"answer_tokens": [[1], [2]]}, "`answer_tokens` holds 2 entries for 1 answers"),
    "none": ({"answer_tokens": []}, "`answer_tokens` holds 0 entries for 1 answers"),
    "an object": ({"answer_tokens": {"0": [1]}}, "`answer_tokens` holds a dict"),
    "marks too many": ({"truncated": [False, True]}, "`truncated` holds 2 entries for 1 answers"),
    "marks of numbers": ({"truncated": [0]}, "something else than true and false"),
    "marks of null": ({"truncated": [None]}, "something else than true and false"),
    "one mark": ({"truncated": True}, "`truncated` holds a bool"),
    "an id of null": ({"id": None}, "`id` is null"),
    "an id of false": ({"id": False}, "`id` is a bool"),
    "an id of the first": ({"id": 7}, "repeats the id '7' of line 1"),
    "an answer of parts": ({"messages": [ASK, SAY | {"content": [{"text": "x"}]}]}, "both text"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_is_named(tmp_path, name):
    change, why = BROKEN[name]
    write(tmp_path, WHOLE | {"id": 7}, WHOLE | change)
    with pytest.raises(ValueError, match=rf"answers\.jsonl, line 2: .*{why}"):
        list(answers.read(tmp_path, VOCABULARY))


def test_whole_answers_come_back_with_ids_as_text(tmp_path):
    rows = [WHOLE, WHOLE | {"id": 7}, WHOLE | {"id": "b", "answer_tokens": None}]
    write(tmp_path, *rows, {"id": "c", "messages": [ASK, SAY]})
    found = list(answers.read(tmp_path, VOCABULARY))
    assert [row["id"] for row in found] == ["a", "7", "b", "c"] and answers.answered(tmp_path) == {"a", "7", "b", "c"}
    assert found[0] == WHOLE and found[3]["answer_tokens"] is None and found[3]["truncated"] == [False]


IDS = st.one_of(st.integers(-3, 200), st.floats(0, 9), st.booleans(), st.none(), st.text(max_size=2))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(IDS, max_size=4))
def test_token_ids_are_whole_numbers_of_the_vocabulary_or_refused(tmp_path, ids):
    write(tmp_path, WHOLE | {"answer_tokens": [ids]})
    sound = bool(ids) and all(type(one) is int and 0 <= one < VOCABULARY for one in ids)
    try:
        (row,) = answers.read(tmp_path, VOCABULARY)
    except ValueError as error:
        assert not sound and "answers.jsonl, line 1" in str(error)
    else:
        assert sound and row["answer_tokens"] == [ids]


def test_building_a_cache_refuses_token_ids_of_another_target(tmp_path):
    tok = tokenizer()
    write(tmp_path, WHOLE, WHOLE | {"id": "b", "answer_tokens": [[len(tok)]]})
    with pytest.raises(ValueError, match=rf"line 2: .*beyond the target's {len(tok)} token ids"):
        answers.all_encoded(tmp_path, tok, 100, None, len(tok))


def test_a_header_that_is_none_is_named(tmp_path):
    policy = answers.AnswerPolicy("tiny")
    for content in ("[]", "{}", '{"schema": "specbench.answers/1", "policy": 3}'):
        (tmp_path / "header.json").write_text(content)
        with pytest.raises(ValueError, match=r"header\.json is not a header of answers"):
            answers.check_header(tmp_path, policy)


class Completion:
    """A chat completion as a server sent it."""

    def __init__(self, content, token_ids):
        message = type("Message", (), {"content": content, "model_extra": {}})
        extra = {"token_ids": token_ids}
        self.choices = [type("Choice", (), {"finish_reason": "stop", "message": message, "model_extra": extra})]
        self.model_extra: dict[str, object] = {}


@pytest.mark.parametrize("ids", [[1, 2.0], [1, "2"], [True], [-1], [None], "12", {"a": 1}, 7])
def test_a_servers_token_ids_are_taken_as_they_are_or_refused(ids):
    with pytest.raises(Refused, match="token_ids that are not whole numbers"):
        _reply(Completion("So.", ids))
    assert _reply(Completion("So.", [1, 2])).tokens == [1, 2]
    assert _reply(Completion("So.", [])).tokens is None


def test_a_servers_answer_of_lone_surrogates_is_a_failure():
    with pytest.raises(Refused, match="lone surrogate"):
        _reply(Completion("\ud83d", None))
