"""The one reader of line files: what it gives back, what it refuses by file and line, what it never does."""

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specbench.files import json_lines as jsonl
from specbench.files.atomic import read_json, write_json

TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates, U+0085, U+2028 and all controls
ROW = st.dictionaries(TEXT, st.recursive(TEXT | st.integers() | st.booleans() | st.none(), st.lists, max_leaves=5))
BREAKS = "\u0085\u2028\u2029\u000b\u000c\u001c\u001d\u001e"
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(st.lists(ROW, max_size=4))
def test_whatever_is_written_is_read_back(tmp_path, rows):
    path = tmp_path / "a.jsonl"
    path.unlink(missing_ok=True)
    with jsonl.Appender(path) as file:
        for row in rows:
            file.append(row)
    assert list(jsonl.read(path)) == list(enumerate(rows, start=1))
    write_json(tmp_path / "a.json", rows)
    assert read_json(tmp_path / "a.json", None) == rows


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("start", [b"", jsonl.BOM, b"\n \r\n"])
def test_byte_order_mark_line_ends_and_empty_lines(tmp_path, start, end):
    path = tmp_path / "a.jsonl"
    said = json.dumps({"t": f"a{BREAKS}b"}, ensure_ascii=False).encode()
    path.write_bytes(start + said + (end or b"\n") + b"\n" + said + end)
    found = list(jsonl.read(path))
    assert [row["t"] for _, row in found] == [f"a{BREAKS}b"] * 2
    first = 1 + start.count(b"\n")
    assert [number for number, _ in found] == [first, first + 2]


BROKEN = {
    "cut": (b'{"id": ', "not JSON"),
    "two values": (b'{"id": 1} {"id": 2}', "more than one value"),
    "a list": (b"[1]", "holds a list, not an object"),
    "a number": (b"7", "holds a int, not an object"),
    "not a number": (b'{"id": NaN}', "NaN is not a number"),
    "infinite": (b'{"id": -Infinity}', "-Infinity is not a number"),
    "a key twice": (b'{"id": 1, "id": 2}', "the key 'id' occurs twice"),
    "a key twice inside": (b'{"id": {"b": 1, "b": 1}}', "the key 'b' occurs twice"),
    "nested lists": (b'{"id": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
    "nested objects": (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested too deeply"),
    "digits": (b'{"id": ' + b"9" * 5000 + b"}", "thousands of digits"),
    "Latin-1": ('{"id": "ü"}'.encode("latin-1"), r"not UTF-8 \(byte 9\)"),
    "an encoded surrogate": (b'{"id": "\xed\xa0\x80"}', "not UTF-8"),
    "zeros": (b"\0" * 40, "not JSON"),
    "no key": (b'{"other": 1}', "lacks 'id'"),
    "Python": (b"{'id': 1}", "not JSON"),
    "a comment": (b"# prompts", "not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named(tmp_path, name):
    line, why = BROKEN[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1}\n\n' + line + b"\n")
    with pytest.raises(jsonl.BrokenLine, match=rf"a\.jsonl, line 3: .*{why}.*; repair or delete that line"):
        list(jsonl.read(path, "id"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x1f\x8b\x08\x00rest", "compressed with gzip: unpack it"),
        (b"PK\x03\x04rest", "zip archive"),
        (b"PAR1rest", "parquet file"),
        ("{}".encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        (b"\x7fELF\x02\x01\x01\0\0", "binary file"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, content, why):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.jsonl .*{why}"):
        list(jsonl.read(path))


def test_folders_and_absent_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="is a folder, not a file"):
        list(jsonl.read(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        list(jsonl.read(tmp_path / "none"))


def test_a_file_without_line_ends_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST", 1 << 16)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * (16 << 20))
    tracemalloc.start()
    with pytest.raises(jsonl.BrokenLine, match="line 1: longer than"):
        list(jsonl.read(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_text_of_a_megabyte_is_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "long words, \u2028 " * 80_000
    path.write_text(jsonl.line({"id": "a", "messages": [{"role": "user", "content": text}]}), encoding="utf-8")
    ((number, row),) = jsonl.conversations(path)
    assert number == 1 and row["messages"][0]["content"] == text


def test_a_line_without_its_end_is_read_or_dropped_as_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    for tail in (b'{"a": 2}', b'{"a": ', "{ü".encode()[:-1], b"\0\0"):
        path.write_bytes(b'{"a": 1}\n' + tail)
        assert list(jsonl.read(path, unfinished="drop")) == [(1, {"a": 1})]
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert [row["a"] for _, row in jsonl.read(path)] == [1, 2]


@pytest.mark.parametrize(
    ("id", "kept"), [("a", "a"), ("7", "7"), (7, "7"), (0, "0"), (-1, "-1"), (1.5, "1.5"), (10**400, str(10**400))]
)
def test_ids_that_are_numbers_are_kept_as_text(id, kept):
    assert jsonl.text_id(id) == kept


@pytest.mark.parametrize("id", [None, True, False, "", "  ", [], {}, float("nan"), float("inf"), "\ud800"])
def test_what_names_nothing_is_no_id(id):
    with pytest.raises(ValueError, match="`id` is"):
        jsonl.text_id(id)


SAID = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"id": None, "messages": [SAID]}, "`id` is null"),
        ({"id": True, "messages": [SAID]}, "`id` is a bool"),
        ({"id": 1, "messages": [SAID]}, "repeats the id '1' of line 1"),
        ({"id": "b", "messages": []}, "at least one message"),
        ({"id": "b", "messages": "hello"}, "`messages` is not a list"),
        ({"id": "b", "messages": [{"role": "user"}]}, "a `role` and a `content`"),
        ({"id": "b", "messages": [{"role": "user", "content": ["x"]}]}, "a `role` and a `content`"),
        ({"id": "b", "messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"id": "b", "messages": [SAID], "source": 3}, "`source` is not a text"),
    ],
)
def test_conversations_that_are_none_are_named(tmp_path, row, why):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": "1", "messages": [SAID]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(jsonl.BrokenLine, match=f"line 2: .*{why}"):
        list(jsonl.conversations(path))
