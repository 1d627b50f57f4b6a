"""Every shape that rows come in is detected, becomes the normal form of its purpose, and is refused with a reason."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from appliance.data import formats
from appliance.data.formats import Defect, Reading
from appliance.data.shapes import SHAPES
from appliance.errors import DataError

ASK = {"role": "user", "content": "hoi"}
SAY = {"role": "assistant", "content": "dag"}
KIND = {"role": "system", "content": "wees aardig"}
HUMAN, GPT = {"from": "human", "value": "hoi"}, {"from": "gpt", "value": "dag"}
MORE = {"role": "user", "content": "en?"}


def examine(tmp_path: Path, name: str, *rows: Any) -> Reading:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return formats.examine(path, name)


def read(tmp_path: Path, name: str, *rows: Any) -> tuple[list[formats.Row], list[Defect]]:
    defects: list[Defect] = []
    return list(examine(tmp_path, name, *rows).rows(defects)), defects


CONVERSATIONS: list[tuple[str, Any, Any]] = [
    ("chat messages (JSON lines)", {"messages": [KIND, ASK, SAY]}, [KIND, ASK, SAY]),
    ("ShareGPT conversations (JSON lines)", {"conversations": [HUMAN, GPT]}, [ASK, SAY]),
    (
        "ShareGPT conversations (JSON lines)",
        {"conversations": [{"from": "system", "value": "wees aardig"}, HUMAN, GPT]},
        [KIND, ASK, SAY],
    ),
    ("ShareGPT conversations (JSON lines)", {"system": "wees aardig", "conversations": [HUMAN, GPT]}, [KIND, ASK, SAY]),
    (
        "ShareGPT conversations (JSON lines)",
        {"system": "", "conversations": [{"from": "user", "value": "hoi"}, {"from": "assistant", "value": "dag"}]},
        [ASK, SAY],
    ),
    ("Alpaca instructions (JSON lines)", {"instruction": "hoi", "output": "dag"}, [ASK, SAY]),
    ("Alpaca instructions (JSON lines)", {"instruction": "hoi", "input": "", "output": "dag"}, [ASK, SAY]),
    (
        "Alpaca instructions (JSON lines)",
        {"instruction": "Vertaal.", "input": "hello", "output": "dag", "system": "wees aardig"},
        [KIND, {"role": "user", "content": "Vertaal.\n\nhello"}, SAY],
    ),
    ("prompt and completion (JSON lines)", {"prompt": "hoi", "completion": "dag"}, [ASK, SAY]),
    ("prompt and completion (JSON lines)", {"prompt": [KIND, ASK], "completion": [SAY]}, [KIND, ASK, SAY]),
    ("prompt and completion (JSON lines)", {"prompt": "hoi", "completion": SAY}, [ASK, SAY]),
]


@pytest.mark.parametrize(("said", "row", "messages"), CONVERSATIONS)
def test_conversations(tmp_path: Path, said: str, row: Any, messages: Any) -> None:
    assert str(examine(tmp_path, "sft", row)) == f"rows.jsonl: {said}"
    assert read(tmp_path, "sft", row) == ([{"messages": messages, "line": 1}], [])
    assert read(tmp_path, "heldout", row)[0] == [{"messages": messages, "line": 1}]


PREFERENCES: list[tuple[str, Any, Any]] = [
    ("preference triplets", {"prompt": "hoi", "chosen": "dag", "rejected": "weg"}, [ASK]),
    ("preference triplets", {"prompt": [KIND, ASK, SAY, MORE], "chosen": "dag", "rejected": "weg"}, [KIND, ASK, SAY, MORE]),
    ("preference triplets", {"prompt": [ASK], "chosen": [SAY], "rejected": [{**SAY, "content": "weg"}]}, [ASK]),
    ("preference triplets", {"prompt": "hoi", "chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "weg"}]}, [ASK]),
    ("preference triplets", {"chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "weg"}]}, [ASK]),
    ("ShareGPT preferences", {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "weg"}}, [ASK]),
    (
        "ShareGPT preferences",
        {"conversations": [HUMAN], "chosen": "dag", "rejected": "weg", "system": "wees aardig"},
        [KIND, ASK],
    ),
]


@pytest.mark.parametrize(("shape", "row", "prompt"), PREFERENCES)
def test_preferences(tmp_path: Path, shape: str, row: Any, prompt: Any) -> None:
    assert str(examine(tmp_path, "dpo", row)) == f"rows.jsonl: {shape} (JSON lines)"
    assert read(tmp_path, "dpo", row) == ([{"prompt": prompt, "chosen": "dag", "rejected": "weg", "line": 1}], [])


def test_references_keep_their_other_columns(tmp_path: Path) -> None:
    rows = [
        {"prompt": "hoi", "reference": "dag", "polarity": "positief", "facts": ["a", 1]},
        {"prompt": [KIND, ASK], "reference": "dag"},
    ]
    assert str(examine(tmp_path, "grpo", *rows)) == "rows.jsonl: prompt and reference (JSON lines)"
    assert read(tmp_path, "grpo", *rows) == (
        [
            {"prompt": [ASK], "reference": "dag", "columns": {"polarity": "positief", "facts": ["a", 1]}, "line": 1},
            {"prompt": [KIND, ASK], "reference": "dag", "columns": {}, "line": 2},
        ],
        [],
    )


DEFECTS: list[tuple[str, Any, Any, str]] = [
    ("sft", {"conversations": [HUMAN, GPT]}, {"conversations": [HUMAN]}, "no assistant turn among 1 messages"),
    ("sft", {"conversations": [HUMAN, GPT]}, {"conversations": [HUMAN, GPT, HUMAN]}, "the last message is from 'user'"),
    ("sft", {"conversations": [HUMAN, GPT]}, {"conversations": [GPT, HUMAN, GPT]}, "turns must alternate"),
    (
        "sft",
        {"conversations": [HUMAN, GPT]},
        {"conversations": [HUMAN, {"from": "function_call", "value": "x"}]},
        'conversations[1].from is "function_call"; known roles: system, human, gpt, user, assistant',
    ),
    (
        "sft",
        {"conversations": [HUMAN, GPT]},
        {"conversations": [HUMAN, {"from": "gpt"}]},
        "conversations[1].value: expected text, found nothing",
    ),
    (
        "sft",
        {"conversations": [HUMAN, GPT]},
        {"conversations": [HUMAN, "dag"]},
        "conversations[1]: expected an object with from and value, found text of 3 characters",
    ),
    (
        "sft",
        {"conversations": [HUMAN, GPT]},
        {"conversations": [{"from": "system", "value": "a"}, HUMAN, GPT], "system": "b"},
        "turns must alternate user, assistant after at most one system turn; found system, system",
    ),
    (
        "sft",
        {"conversations": [HUMAN, GPT]},
        {"messages": [ASK, SAY]},
        "conversations: expected a list of messages, found nothing",
    ),
    ("sft", {"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}, "output is empty"),
    (
        "sft",
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": 3, "output": "b"},
        "input: expected text, found a number",
    ),
    (
        "sft",
        {"instruction": "a", "output": "b"},
        {"instruction": "<|im_end|>", "output": "b"},
        "the control token '<|im_end|>'",
    ),
    (
        "sft",
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": None},
        "completion: expected text, found nothing",
    ),
    (
        "sft",
        {"prompt": "a", "completion": "b"},
        {"prompt": [ASK, SAY], "completion": "b"},
        "the prompt ends with 'assistant'",
    ),
    ("sft", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": []}, "completion is empty"),
    ("sft", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": [ASK]}, "completion ends with 'user'"),
    ("dpo", PREFERENCES[0][1], {**PREFERENCES[0][1], "chosen": [MORE, SAY]}, "chosen has other turns before its answer"),
    ("dpo", PREFERENCES[0][1], {**PREFERENCES[0][1], "chosen": [MORE]}, "chosen ends with 'user'"),
    ("dpo", PREFERENCES[0][1], {"chosen": "a", "rejected": "b"}, "prompt: expected a list of messages, found nothing"),
    (
        "dpo",
        PREFERENCES[5][1],
        {**PREFERENCES[5][1], "conversations": [HUMAN, GPT]},
        "conversations ends with the assistant's",
    ),
    ("dpo", PREFERENCES[5][1], {**PREFERENCES[5][1], "rejected": GPT}, "chosen and rejected are the same text"),
    ("dpo", PREFERENCES[5][1], {**PREFERENCES[5][1], "rejected": HUMAN}, "rejected ends with 'user'"),
    ("dpo", PREFERENCES[5][1], {**PREFERENCES[5][1], "rejected": {"value": "weg"}}, "rejected: stray key 'value' ignored"),
    ("grpo", {"prompt": "a", "reference": "b"}, {"prompt": "a"}, "reference: expected text, found nothing"),
    ("grpo", {"prompt": "a", "reference": "b"}, {"prompt": "a", "reference": 3}, "reference: expected text, found a number"),
    (
        "grpo",
        {"prompt": "a", "reference": "b"},
        {"prompt": [ASK, SAY], "reference": "b"},
        "the prompt ends with 'assistant'",
    ),
]


@pytest.mark.parametrize(("name", "good", "bad", "what"), DEFECTS)
def test_unusable_row_is_set_aside_with_its_line(tmp_path: Path, name: str, good: Any, bad: Any, what: str) -> None:
    rows, defects = read(tmp_path, name, *([good] * 20), bad)  # the shape is told by the first twenty
    assert [row["line"] for row in rows] == [1]
    of_row = [defect for defect in defects if defect.line == 21]
    assert any(what in defect.what for defect in of_row), defects[-1]
    assert of_row[-1].action == "set aside"


JUDGED = {"prompt": "hoi", "completion": "dag", "label": True}


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({}, True),
        ({"label": False}, False),
        ({"label": "False "}, False),
        ({"label": 1}, True),
        ({"completion": [SAY]}, True),
    ],
)
def test_judged_answers(tmp_path: Path, change: Any, label: bool) -> None:
    reading = examine(tmp_path, "kto", {**JUDGED, **change})
    assert str(reading) == "rows.jsonl: judged answers (JSON lines)"
    defects: list[Defect] = []
    assert list(reading.rows(defects)) == [{"prompt": [ASK], "completion": "dag", "label": label, "line": 1}]
    assert not defects


@pytest.mark.parametrize("label", ["maybe", None, 2, ""])
def test_judged_answer_without_a_judgement(tmp_path: Path, label: Any) -> None:
    rows, defects = read(tmp_path, "kto", JUDGED, {**JUDGED, "prompt": "en?", "label": label})
    assert len(rows) == 1
    assert "label: expected true or false, found" in defects[0].what


def test_key_of_every_row_is_said_once_and_of_some_rows_each_time(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "id": 1}, {"prompt": "c", "completion": "d", "id": 2, "note": "x"}]
    assert str(examine(tmp_path, "sft", *rows)) == "rows.jsonl: prompt and completion (JSON lines); not used: id"
    assert [str(defect) for defect in read(tmp_path, "sft", *rows)[1]] == ["rows.jsonl:2: stray key 'note' ignored; fixed."]


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("sft", {"question": "q", "reply": "a"}, "rows.jsonl:1: no known shape of row; keys found: question, reply."),
        ("sft", {"question": "q", "reply": "a"}, "Known for data.sft: chat messages (messages); ShareGPT conversations"),
        ("sft", {"question": "q", "reply": "a"}, "Alpaca instructions (instruction, output); prompt and completion"),
        ("sft", {"question": "q", "reply": "a"}, "; name the columns in [data.columns.sft], or rename the keys."),
        (
            "dpo",
            {"question": "q", "reply": "a"},
            "preference triplets (prompt, chosen, rejected or chosen, rejected); ShareGPT",
        ),
        ("sft", PREFERENCES[0][1], "They are those of preference triplets"),
        ("sft", PREFERENCES[0][1], "that is read as data.dpo. Known for data.sft"),
        ("sft", JUDGED, "They are those of judged answers (prompt, completion, label): that is read as data.kto."),
        ("kto", {"prompt": "a"}, "Known for data.kto: judged answers (prompt, completion, label); name the columns in"),
        ("sft", PREFERENCES[5][1], "They are those of ShareGPT preferences"),
        ("dpo", {"messages": [ASK, SAY]}, "They are those of chat messages (messages): that is read as data.sft."),
        ("faq", {"prompt": "a"}, "questions and answers (vraag, antwoord or question, answer); or rename the keys."),
        ("sft", {f"key {number:02}": 0 for number in range(30)}, "key 19, and 10 more. Known"),
        ("sft", {"x" * 90: 0}, f"keys found: {'x' * 40}…."),
    ],
)
def test_unknown_shape(tmp_path: Path, name: str, row: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        examine(tmp_path, name, row)
    assert said in str(caught.value)


def test_ambiguous_shapes(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        examine(tmp_path, "sft", {"messages": [ASK, SAY], "instruction": "a", "output": "b"})
    said = str(caught.value)
    assert "rows.jsonl:1: can be read as chat messages (messages) and as Alpaca instructions (instruction, output)" in said
    assert "name the columns in [data.columns.sft], leave one of them out." in said
    with pytest.raises(DataError) as caught:
        examine(tmp_path, "sft", {"messages": [ASK, SAY]}, {"x": 1}, {"prompt": "a", "completion": "b"})
    assert "several shapes (line 1: chat messages; line 3: prompt and completion)" in str(caught.value)


DOCUMENTATION = Path(__file__).parents[2] / "docs" / "data.md"
EXAMPLES = re.findall(
    r"^\*\*(.+?)\*\* \((`\w+`(?:, `\w+`)*)\).*?```(?:json)?\n(.*?)```", DOCUMENTATION.read_text(), re.M | re.S
)


@pytest.mark.parametrize(("shape", "names", "example"), EXAMPLES, ids=[example[0] for example in EXAMPLES])
def test_examples_of_the_documentation(tmp_path: Path, shape: str, names: str, example: str) -> None:
    path = tmp_path / "rows"
    path.write_text(example, encoding="utf-8")
    for name in re.findall(r"\w+", names):
        reading, defects = formats.examine(path, name), list[Defect]()
        assert shape.lower() in str(reading).lower()
        assert (len(list(reading.rows(defects))), defects) == (1, [])


def test_each_shape_has_an_example() -> None:
    assert len(EXAMPLES) == len(SHAPES)  # none of questions and answers, one of lines with labels
