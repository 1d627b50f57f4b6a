"""Files of rows: each row with the line that it begins on, however the file is written, and little of it in memory."""

import csv
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.data import files
from appliance.errors import DataError

ROW = {"a": "b"}


def records(tmp_path: Path, content: bytes | str, name: str = "rows.json") -> list[files.Record]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(files.find(path).records())


def values(found: list[files.Record]) -> list[tuple[int, Any]]:
    return [(each.line, each.value) for each in found if not each.defect]


def defects(found: list[files.Record]) -> list[tuple[int, str]]:
    return [(each.line, each.defect[0]) for each in found if each.defect]


@pytest.mark.parametrize(
    ("content", "name", "kind"),
    [
        ('{"a": 1}\n{"a": 2}\n', "rows.json", "JSON lines"),
        ('\n \n{"a": 1}', "rows.txt", "JSON lines"),
        ('[1, 2]\n{"a": 2}\n', "rows.jsonl", "JSON lines"),
        ("nonsense", "rows.jsonl", "JSON lines"),
        ('[{"a": 1}]', "rows.jsonl", "a JSON list"),
        ('[{"a": 1}]\n\n', "rows.jsonl", "a JSON list"),
        ('\ufeff\n[\n{"a": 1}]', "rows.json", "a JSON list"),
        ("a,b\n1,2\n", "rows.CSV", "CSV"),
        ("a\tb\n1\t2\n", "rows.tsv", "CSV"),
        ("__label__A:x\tb\n", "rows.txt", "fastText labels"),
    ],
)
def test_kinds(tmp_path: Path, content: str, name: str, kind: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert files.find(path).kind == kind


@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=4), st.text(max_size=30) | st.integers() | st.none(), max_size=3), min_size=1
    ),
    indent=st.sampled_from([None, 0, 2]),
    chunk_bytes=st.sampled_from([1, 2, 7, 64]),
)
def test_list_is_read_piece_by_piece(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, chunk_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", chunk_bytes)
        found = records(folder, json.dumps(rows, indent=indent, ensure_ascii=False))
    assert [each.value for each in found] == rows
    if indent is not None:  # a row and each of its entries on a line of its own, an empty one on one
        lines = [sum(1 if not row else len(row) + 2 for row in rows[:position]) + 2 for position in range(len(rows))]
        assert [each.line for each in found] == lines


def test_list_with_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf[\r\n" + json.dumps(ROW).encode() + b",\r\n\r\n12 , null]\r\n"
    assert values(records(tmp_path, content)) == [(2, ROW), (4, 12), (4, None)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"a": 1},\n]', ":2: is not valid JSON: Expecting value"),
        (b'[{"a": 1}\n\n{"a": 2}]', ":3: is not valid JSON: expected ','"),
        (b'[{"a": 1},\n{"a":\n 2', ":3: is not valid JSON: Expecting ',' delimiter"),
        (b'[{"a": 1},\n{"a": "\xff"}]', ":2: not UTF-8"),
        (b'[{"a": "\xc3', ":1: not UTF-8"),
        (b"[1\n[2]", ":2: is not valid JSON: expected ','"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_mistake_in_a_list_ends_it(
    tmp_path: Path, content: bytes, said: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk_bytes)
    with pytest.raises(DataError, match=said):
        records(tmp_path, content)


def test_mistake_in_a_long_list_is_found_without_reading_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 256)
    content = '[{"a" 1},\n' + json.dumps("x" * 2_000_000) + "]"
    (tmp_path / "rows.json").write_text(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=":1: is not valid JSON: Expecting ':' delimiter"):
        list(files.find(tmp_path / "rows.json").records())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.json", "rows.csv"])
def test_large_file_needs_little_memory(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 16)
    rows = [json.dumps({"a": "x" * 1000, "b": number}) for number in range(5000)]
    if kind == "rows.csv":
        text = "a,b\n" + "".join(f"{'x' * 1000},{number}\n" for number in range(5000))
    else:
        text = f"[{','.join(rows)}]" if kind == "rows.json" else "\n".join(rows)
    (tmp_path / kind).write_text(text)
    tracemalloc.start()
    count = sum(1 for _ in files.find(tmp_path / kind).records())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5000
    assert peak < 1_000_000  # of five million characters


def test_column_of_a_mistake_in_a_line(tmp_path: Path) -> None:
    found = records(tmp_path, '{"a": 1}\r\n{"a": \r\n')
    assert values(found) == [(1, {"a": 1})]
    assert defects(found) == [(2, "invalid JSON (Expecting value: line 1 column 7 (char 6))")]


def test_csv_rows_begin_on_their_physical_lines(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfa,b\r\n"eerste\nregel","zegt ""hoi"""\r\n\r\nc,d\r\n'
    found = records(tmp_path, content, "rows.csv")
    assert values(found) == [(2, {"a": "eerste\nregel", "b": 'zegt "hoi"'}), (5, {"a": "c", "b": "d"})]
    assert defects(found) == [(4, "the line is empty")]


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1))
def test_csv_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    stream = io.StringIO(newline="")
    csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    found = records(tmp_path_factory.mktemp("rows"), stream.getvalue(), "rows.csv")
    assert [tuple(each.value.values()) for each in found] == rows


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_other_delimiters(tmp_path: Path, delimiter: str) -> None:
    content = delimiter.join(["vraag", "antwoord"]) + "\n" + delimiter.join(["q", "a"]) + "\n"
    assert values(records(tmp_path, content, "rows.csv")) == [(2, {"vraag": "q", "antwoord": "a"})]


def test_csv_row_of_other_length_or_encoding_is_set_aside(tmp_path: Path) -> None:
    found = records(tmp_path, b"a,b\n1\n1,2,3\ncaf\xe9,2\n1,2\n", "rows.csv")
    assert defects(found) == [
        (2, "has 1 fields, and the head names 2 columns"),
        (3, "has 3 fields, and the head names 2 columns"),
        (4, "not UTF-8"),
    ]
    assert values(found) == [(5, {"a": "1", "b": "2"})]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; it must hold a head"),
        (b"\n\n", "is empty; it must hold a head"),
        (b"a,,c\n1,2,3\n", ":1: a head with a name for each column is needed, each once; found a, , c"),
        (b"a,b,a\n1,2,3\n", "each once; found a, b, a"),
        ("a,b\n".encode("utf-16"), ":1: not UTF-8"),
        (b'a,b\n1,2\n"3,4\n5,6\n', ":3: not valid CSV .*; a quote is left open"),
        (b'a,b\n1,2\n"3"x,4\n', ":3: not valid CSV .*one inside a text is not doubled"),
        (b'a\n"' + b"x" * (1 << 21) + b'"\n', ":2: not valid CSV .field larger than field limit"),
    ],
)
def test_unusable_csv(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        records(tmp_path, content, "rows.csv")


def test_lines_with_labels(tmp_path: Path) -> None:
    content = (
        "__label__HOTEL:positiv __label__LAGE:positiv\tSchön gelegen.\n\nohne\n__label__sport Tor!\n__label__HOTEL:negativ\n"
    )
    found = records(tmp_path, content, "rows.txt")
    assert values(found) == [
        (
            1,
            {
                "labels": "HOTEL: positiv, LAGE: positiv",
                "aspects": "HOTEL, LAGE",
                "polarities": "positiv",
                "text": "Schön gelegen.",
            },
        ),
        (4, {"labels": "sport", "aspects": "sport", "polarities": "", "text": "Tor!"}),
        (5, {"labels": "HOTEL: negativ", "aspects": "HOTEL", "polarities": "negativ", "text": ""}),
    ]
    assert defects(found) == [(2, "the line is empty"), (3, "the line does not begin with __label__")]
