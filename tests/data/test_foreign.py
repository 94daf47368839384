"""Other people's files: the same rows from every format, and a sentence for what is broken."""

import csv
import gzip
import json
import tracemalloc
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specbench.data.prompts import foreign_layouts as foreign
from specbench.files import json_lines as jsonl

# What every one of the formats can hold: text without lone surrogates and zeros, cells that are not empty.
CELL = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=8)
ROWS = st.lists(st.fixed_dictionaries({"id": CELL, "prompt": CELL, "Ünder": CELL}), min_size=1, max_size=5)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(folder, rows):
    """The rows in every format, as files."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    array, pretty = (json.dumps(rows, ensure_ascii=False, indent=indent).encode() for indent in (None, 2))
    files = {
        "a.jsonl": lines, "b.json": lines, "c.json": array, "d.json": pretty,
        "e.json": jsonl.BOM + b"\n " + array + b"\n", "f.jsonl.gz": gzip.compress(lines),
        "g.json.gz": gzip.compress(pretty), "h.jsonl": lines.rstrip(b"\n"),
        "i.jsonl": jsonl.BOM + lines.replace(b"\n", b"\r\n"), "packed": gzip.compress(array),
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name, separator in (("k.csv", ","), ("l.tsv", "\t")):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter=separator)
            table.writeheader()
            table.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "m.parquet")
    return [*files, "k.csv", "l.tsv", "m.parquet"]


@QUICK
@given(ROWS, st.sampled_from([1, 3, 7, 1 << 20]))
def test_every_format_gives_the_same_rows(tmp_path, rows, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign, "CHUNK", chunk)  # an element of an array may be cut anywhere
        for name in written(tmp_path, rows):
            assert [row for _, row in foreign.rows(tmp_path / name)] == rows, name


def test_rows_are_counted_in_the_files_own_unit(tmp_path):
    rows = [{"a": "one"}, {"a": "two"}]
    for name in written(tmp_path, rows):
        found = foreign.rows(tmp_path / name)
        numbers = [number for number, _ in found]
        counted = {"line": [2, 3] if name[-3:] in ("csv", "tsv") else [1, 2], "element": [1, 2], "row": [1, 2]}
        assert numbers == counted[found.unit], name
        assert str(found.broken(2, "odd")).startswith(f"{tmp_path / name}, {found.unit} 2: odd")


ARRAYS = {
    "[": "element 1: not JSON",
    '[{"a": 1}': "element 2: the array ends here",
    '[{"a": 1},': "element 2: not JSON",
    '[{"a": 1},]': "element 2: not JSON",
    '[{"a": 1} {"a": 2}]': "element 2: '{' follows it",
    '[{"a": 1}, {"a": tru}]': "element 2: not JSON",
    '[{"a": 1}, {"a": NaN}]': "element 2: NaN is not a number",
    '[{"a": 1, "a": 1}]': "element 1: the key 'a' occurs twice",
    "[1, 2]": "element 1: holds a int",
    '["a"]': "element 1: holds a str",
    "[[]]": "element 1: holds a list",
    "[" * 5000 + "]" * 5000: "element 1: nested too deeply",
    '[{"a": 1}] [{"a": 2}]': "element 2: text follows the array",
    '[{"a": "x\ny"}]': "element 1: not JSON",
}


@pytest.mark.parametrize("chunk", [4, 1 << 20])
@pytest.mark.parametrize("text", ARRAYS, ids=lambda text: text[:20])
def test_broken_arrays_are_named(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(foreign, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(jsonl.BrokenLine, match=r"a\.json, " + ARRAYS[text].replace("[", r"\[").replace("{", r"\{")):
        list(foreign.rows(path))


TABLES = {
    "a,a\n1,2\n": "line 1: .*names its columns, each once",
    "a,\n1,2\n": "line 1: .*names its columns",
    "a,b\n1\n": "line 2: holds 1 cells for 2 columns",
    "a,b\n1,2,3\n": "line 2: holds 3 cells for 2 columns",
    'a,b\n"1,2\n': "line 2: not a row of the table",
    'turns,b\n"[1",2\n': "line 2: column 'turns' is not JSON",
}


@pytest.mark.parametrize("text", TABLES, ids=repr)
def test_broken_tables_are_named(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(jsonl.BrokenLine, match=r"a\.csv, " + TABLES[text]):
        list(foreign.rows(path))


def test_cells_hold_lists_where_turns_are_lists(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,turns,prompt\n1,"[""one"", ""two""]","[kept]"\n')
    assert [row for _, row in foreign.rows(path)] == [{"id": "1", "turns": ["one", "two"], "prompt": "[kept]"}]


def test_files_of_other_kinds_are_named(tmp_path):
    packed = gzip.compress(b'{"a": 1}\n' * 1000)
    with zipfile.ZipFile(tmp_path / "zip.jsonl", "w") as archive:
        archive.writestr("a", "b")
    contents = {
        "cut.jsonl.gz": (packed[: len(packed) // 2], "truncated or damaged gzip file"),
        "spoilt.jsonl.gz": (packed[:-8] + b"\0" * 8, "truncated or damaged gzip file"),
        "binary.jsonl": (b"\x7fELF\0\0", "binary file"),
        "wide.jsonl": ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        "inner.gz": (gzip.compress(b"PAR1rest"), "parquet file"),
        "text.txt": (b"a prompt a line\n", "no format that can be read as prompts: convert it to JSON lines"),
        "cut.parquet": (b"PAR1" + b"x" * 40, "cannot be read as parquet"),
        "latin.csv": ("a,b\nü,ü\n".encode("latin-1"), "not UTF-8"),
        "latin.json": ('[{"a": "ü"}]'.encode("latin-1"), "element 1: not UTF-8"),
    }
    for name, (content, why) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.*{why}"):
            list(foreign.rows(tmp_path / name))
    with pytest.raises(ValueError, match="zip archive"):
        foreign.rows(tmp_path / "zip.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        foreign.rows(tmp_path)
    (tmp_path / "empty.jsonl").write_bytes(b" \n\n")
    assert list(foreign.rows(tmp_path / "empty.jsonl")) == []


@pytest.mark.parametrize("start", ['{"a": 1}', "{'a': 1}"])
def test_an_array_is_never_held_whole(tmp_path, start):
    """Neither when it is read nor when it is broken at its beginning."""
    path = tmp_path / "a.json"
    path.write_text("[" + start + "".join(',{"a": "%s"}' % ("x" * 1000) for _ in range(20_000)) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in foreign.rows(path)) == 20_001
    except jsonl.BrokenLine:
        assert start.startswith("{'")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20e6 and peak < 8e6
