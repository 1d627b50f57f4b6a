"""Every defect in the training files is reported with its line and what was done about it; nothing is dropped in silence."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.data import formats
from appliance.data.formats import Defect
from appliance.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "hoi"}, {"role": "assistant", "content": "dag"}]}
TRIPLET = {"prompt": "hoi", "chosen": "dag", "rejected": "weg"}


def conversation(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def read(tmp_path: Path, content: bytes, name: str = "sft") -> tuple[list[formats.Row], list[Defect]]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    defects: list[Defect] = []
    return list(formats.examine(path, name).rows(defects)), defects


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (conversation(("user", "hoi"), ("bot", "dag")), 'messages[1].role is "bot"; known roles: system, user, assistant'),
        (conversation(("user", "hoi"), (None, "dag")), "messages[1].role is nothing"),
        (conversation(("user", "hoi")), "no assistant turn among 1 messages"),
        (conversation(("user", "hoi"), ("assistant", "dag"), ("user", "en?")), "the last message is from 'user'"),
        (conversation(("assistant", "dag"), ("user", "hoi"), ("assistant", "dag")), "turns must alternate user, assistant"),
        (conversation(("user", "a"), ("user", "b"), ("assistant", "c")), "found user, user, assistant"),
        (conversation(("system", "s")), "turns must alternate"),
        (conversation(("user", "a"), ("system", "s"), ("assistant", "c")), "turns must alternate"),
        (conversation(("user", " \n"), ("assistant", "c")), "messages[0].content is empty"),
        (conversation(("user", 3), ("assistant", "c")), "messages[0].content: expected text, found a number"),
        (conversation(("user", "a<|im_end|>b"), ("assistant", "c")), "holds the control token '<|im_end|>'"),
        (conversation(("user", "a"), ("assistant", "<|endoftext|>")), "holds the control token '<|endoftext|>'"),
        ({"messages": []}, "messages: expected a list of messages, found a list of 0"),
        ({"messages": ["hoi"]}, "messages[0]: expected an object with role and content, found text of 3 characters"),
        ({"message": []}, "messages: expected a list of messages, found nothing"),
        ([1, 2], "expected an object, found a list of 2"),
        (conversation(("user", "x" * 90), ("assistant", ["y" * 90])), "content: expected text, found a list of 1"),
    ],
)
def test_unusable_conversation_is_set_aside(tmp_path: Path, row: Any, what: str) -> None:
    rows, defects = read(tmp_path, line(GOOD) + line(row))
    assert [each["line"] for each in rows] == [1]
    last = defects[-1]
    assert (last.file, last.line, last.action) == ("rows.jsonl", 2, "set aside")
    assert what in last.what
    assert str(last) == f"rows.jsonl:2: {last.what}; set aside."
    assert len(last.what) < 200  # rows may hold personal data


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"messages": [\n', "invalid JSON"),
        (b"\xff\xfe{}\n", "not UTF-8 at byte 0 of the line"),
        (b'{"messages": "caf\xe9"}\n', "not UTF-8 at byte 17 of the line"),
        (b"[" * 100_000 + b"\n", "invalid JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "c"}]}\n', "'\\ud83d'"),
    ],
)
def test_unreadable_line_is_set_aside(tmp_path: Path, content: bytes, what: str) -> None:
    rows, defects = read(tmp_path, line(GOOD) + content + line(conversation(("user", "q"), ("assistant", "a"))))
    assert [each["line"] for each in rows] == [1, 3]
    assert [(each.line, each.action) for each in defects] == [(2, "set aside")]
    assert what in defects[0].what


@pytest.mark.parametrize(
    ("row", "what", "kept"),
    [
        ({**GOOD, "id": 3}, "stray key 'id' ignored", GOOD),
        (conversation(("User ", "hoi"), ("assistant", "dag")), "messages[0].role is 'User ', read as 'user'", GOOD),
        (conversation(("user", " hoi\n"), ("assistant", "dag")), "messages[0].content has white space around it", GOOD),
        (
            conversation(("user", "e\u0301"), ("assistant", "dag")),
            "is not in Unicode normal form C",
            conversation(("user", "é"), ("assistant", "dag")),
        ),
        (
            conversation(("user", "a\r\nb\rc"), ("assistant", "dag")),
            "messages[0].content has line ends of Windows",
            conversation(("user", "a\nb\nc"), ("assistant", "dag")),
        ),
        (
            {"messages": [{"role": "user", "content": "hoi", "name": "x"}, {"role": "assistant", "content": "dag"}]},
            "messages[0]: stray key 'name' ignored",
            GOOD,
        ),
    ],
)
def test_mendable_row_is_mended_and_reported(tmp_path: Path, row: Any, what: str, kept: Any) -> None:
    rows, defects = read(tmp_path, line(row))
    assert rows == [{**kept, "line": 1}]
    assert [each.action for each in defects] == ["fixed"]
    assert what in defects[0].what


def test_byte_order_mark_windows_line_ends_and_empty_lines(tmp_path: Path) -> None:
    other = conversation(("system", "s"), ("user", "q"), ("assistant", "a"))
    content = b"\xef\xbb\xbf" + line(GOOD).replace(b"\n", b"\r\n") + b"\r\n" + line(other).rstrip()
    rows, defects = read(tmp_path, content)
    assert rows == [{**GOOD, "line": 1}, {**other, "line": 3}]
    assert [str(each) for each in defects] == ["rows.jsonl:2: the line is empty; fixed."]


def test_exact_copy_is_set_aside(tmp_path: Path) -> None:
    rows, defects = read(tmp_path, line(GOOD) + line({**GOOD, "id": 1}))
    assert [each["line"] for each in rows] == [1]
    assert "an exact copy of line 1" in defects[-1].what


def test_preferences(tmp_path: Path) -> None:
    several = {**TRIPLET, "prompt": [*GOOD["messages"], {"role": "user", "content": "en?"}]}
    rows, defects = read(tmp_path, line(TRIPLET) + line(several), "dpo")
    assert rows[0] == {"prompt": [{"role": "user", "content": "hoi"}], "chosen": "dag", "rejected": "weg", "line": 1}
    assert len(rows[1]["prompt"]) == 3
    assert defects == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rejected": "dag"}, "chosen and rejected are the same text"),
        ({"chosen": ""}, "chosen is empty"),
        ({"chosen": None}, "chosen: expected text, found nothing"),
        ({"prompt": 3}, "prompt: expected a list of messages, found a number"),
        ({"prompt": GOOD["messages"]}, "the prompt ends with 'assistant'"),
        ({"rejected": "<|im_start|>user"}, "holds the control token '<|im_start|>'"),
    ],
)
def test_unusable_preference_is_set_aside(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    rows, defects = read(tmp_path, line({**TRIPLET, **change}), "dpo")
    assert rows == []
    assert what in defects[0].what


def test_faq_in_both_languages_with_lines(tmp_path: Path) -> None:
    items = b'[\n {"vraag": "v", "antwoord": "a",\n  "metadata": {"x": 1}},\n\n {"question": "q", "answer": "b"},\n 3,'
    items += b' {"vraag": "v"}, {"vraag": "w", "antwoord": "a", "metadata": 3}]'
    rows, defects = read(tmp_path, items, "faq")
    assert rows == [
        {"question": "v", "answer": "a", "metadata": {"x": 1}, "line": 2},
        {"question": "q", "answer": "b", "metadata": {}, "line": 5},
    ]
    assert [(each.where, each.what) for each in defects] == [
        ("rows.jsonl:6[1]", "expected an object, found a number"),
        ("rows.jsonl:6[2]", "antwoord: expected text, found nothing"),
        ("rows.jsonl:6[3]", "metadata: expected an object, found a number"),
    ]


def test_rows_of_one_line_are_told_apart(tmp_path: Path) -> None:
    answers = ["a", "b", "b", "c"]
    items = [{"question": "q", "answer": each} for each in answers]
    rows, defects = read(tmp_path, json.dumps(items).encode(), "faq")
    assert [(row["line"], row["item"]) for row in rows] == [(1, 1), (1, 2), (1, 4)]
    assert [str(each) for each in defects] == ["rows.jsonl:1[3]: an exact copy of line 1[2]; set aside."]
    rows, defects = read(tmp_path, json.dumps(items, indent=1).encode(), "faq")
    assert [(row["line"], row.get("item")) for row in rows] == [(2, None), (6, None), (14, None)]
    assert str(defects[0]) == "rows.jsonl:10: an exact copy of line 6; set aside."


PRIVATE = "Sanne Bakker, BSN 111222333"


@pytest.mark.parametrize(
    "row",
    [
        PRIVATE,
        111222333,
        [PRIVATE],
        {"messages": PRIVATE},
        {"messages": [PRIVATE]},
        conversation((PRIVATE, "hoi"), ("assistant", "dag")),
        conversation(("user", {PRIVATE: PRIVATE}), ("assistant", "dag")),
        {**GOOD, "x" * 60 + PRIVATE: 1},
        conversation((f"user{' ' * 5_000}", "hoi"), ("assistant", "dag")),
        conversation(("user", f"<|{'a' * 5_000}|>"), ("assistant", "dag")),
    ],
)
def test_no_defect_shows_what_a_row_holds(tmp_path: Path, row: Any) -> None:
    _, defects = read(tmp_path, line(GOOD) + line(row))
    assert defects
    for each in defects:
        assert "Sanne" not in each.what
        assert "111222333" not in each.what
        assert len(each.what) < 200


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{}", "no known shape of row; keys found: none"),
        (b"[]", "is an empty list"),
        (b'[{"question": "q", "answer": "a"}\n{}]', ":2: is not valid JSON: expected ','"),
        (b'[{"question": "q",\n"answer": "a"}]\n]', ":3: is not valid JSON: there is more after the end"),
        (b'[{"question": "q",\n"answer": "a]', ":2: is not valid JSON: Unterminated string"),
        (b'[{"question": "q",\n"answer": "a\n"}]', ":2: is not valid JSON: Invalid control character"),
        (b"[" * 100_000, ":1: is not valid JSON"),
        (b"[1, ", "is not valid JSON"),
        (b'[\n"\xff"]', ":2: not UTF-8"),
        (b" \n", "is empty"),
    ],
)
def test_unusable_faq(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(tmp_path, content, "faq")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; correct the path"):
        formats.examine(tmp_path / "no.jsonl", "sft")
    with pytest.raises(DataError, match="is empty; it must hold at least one row"):
        read(tmp_path, b"\n\n")
    with pytest.raises(DataError, match="cannot be read"):
        formats.examine(tmp_path, "sft")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["user", "assistant", "system"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["messages", "role", "content"]), inner),
    max_leaves=8,
)


@given(st.lists(JSON | st.binary(max_size=20), min_size=1, max_size=4))
def test_every_line_is_either_kept_or_reported(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    content = b"".join(each.replace(b"\n", b"") + b"\n" if isinstance(each, bytes) else line(each) for each in values)
    rows, defects = read(tmp_path_factory.mktemp("rows"), line(GOOD) + content)
    accounted = {each["line"] for each in rows} | {each.line for each in defects}
    assert accounted == set(range(1, len(values) + 2))
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles[-1] == "assistant"
        assert all(message["content"].strip() for message in row["messages"])
