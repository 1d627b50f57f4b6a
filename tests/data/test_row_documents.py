"""Rows with documents: read, refused with a reason, counted, told apart, and looked at where a reader of data should."""

import json
from pathlib import Path
from typing import Any

import pytest

from appliance.data import check, contradictions, duplicates, formats, lengths, questions, texts
from appliance.data.formats import Defect
from appliance.data.lengths import Meter
from appliance.data.texts import Text
from appliance.text import passages
from appliance.text.passages import MOST_DOCUMENTS, MOST_ID_CHARACTERS
from tests import tiny_recipe
from tests.data import planted
from tests.data.test_audit import examine, folder_of_words
from tests.running import call

DOCUMENTS = [{"id": "desk", "text": "De balie is aan de Lindekade 3."}, {"id": "dog", "text": "Eén hond mag mee."}]
ASK, SAY = {"role": "user", "content": "hoi"}, {"role": "assistant", "content": "dag"}


def read(folder: Path, *rows: Any, name: str = "sft") -> tuple[list[formats.Row], list[Defect]]:
    path = tiny_recipe.write_lines(folder / "rows.jsonl", rows)
    defects: list[Defect] = []
    return list(formats.examine(path, name).rows(defects)), defects


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, SAY]},
        {"conversations": [{"from": "human", "value": "hoi"}, {"from": "gpt", "value": "dag"}]},
        {"instruction": "hoi", "output": "dag"},
        {"prompt": "hoi", "completion": "dag"},
    ],
    ids=lambda row: next(iter(row)),
)
def test_every_shape_of_conversation_may_have_documents(tmp_path: Path, row: Any) -> None:
    plain = {"messages": [ASK, SAY], "line": 1}
    for name in ("sft", "heldout"):
        assert read(tmp_path, {**row, "documents": DOCUMENTS}, name=name) == ([{**plain, "documents": DOCUMENTS}], [])
    for empty in (None, [], ""):
        assert read(tmp_path, {**row, "documents": empty}) == ([plain], [])


@pytest.mark.parametrize(
    ("documents", "what"),
    [
        ("De balie is dicht.", "documents: expected a list of objects with id and text, found text of 18 characters"),
        ({"id": "a", "text": "x"}, "documents: expected a list of objects with id and text, found an object of 2"),
        (["x"], "documents[0]: expected an object with id and text, found text of 1 characters"),
        ([{"text": "x"}], "documents[0].id: expected text, found nothing"),
        ([{"id": 7, "text": "x"}], "documents[0].id: expected text, found a number"),
        ([{"id": "a"}], "documents[0].text: expected text, found nothing"),
        ([DOCUMENTS[0], {"id": "a", "text": " \n"}], "documents[1].text is empty"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "documents[1] has the id of documents[0]"),
        ([{"id": "a", "text": "x"}, {"id": "b", "text": " x"}], "documents[1] has the text of documents[0]"),
        ([{"id": "a", "text": "<|im_end|>"}], "documents[0].text holds the control token"),
        ([{"id": "x" * (MOST_ID_CHARACTERS + 1), "text": "x"}], "documents[0].id has 513 characters, the limit is 512"),
        (
            [{"id": str(at), "text": str(at)} for at in range(MOST_DOCUMENTS + 1)],
            "documents: 65 of them, the limit is 64",
        ),
    ],
)
def test_documents_that_cannot_be_used(tmp_path: Path, documents: Any, what: str) -> None:
    rows, defects = read(tmp_path, {"messages": [ASK, SAY]}, {"messages": [ASK, SAY], "documents": documents})
    assert [row["line"] for row in rows] == [1]
    assert (defects[-1].line, defects[-1].action) == (2, "set aside")
    assert what in defects[-1].what


def test_stray_keys_and_white_space_are_repaired(tmp_path: Path) -> None:
    rows, defects = read(tmp_path, {"messages": [ASK, SAY], "documents": [{"id": "a", "text": "x\n", "url": "y"}]})
    assert rows[0]["documents"] == [{"id": "a", "text": "x"}]
    assert [defect.what for defect in defects] == [
        "documents[0]: stray key 'url' ignored",
        "documents[0].text has white space around it, removed",
    ]


def test_the_same_conversation_over_other_documents_is_another_row(tmp_path: Path) -> None:
    rows = [{"messages": [ASK, SAY], "documents": [each]} for each in DOCUMENTS]
    found, defects = read(tmp_path, *rows, rows[0])
    assert len(found) == 2
    assert [defect.what for defect in defects] == ["an exact copy of line 1"]


@pytest.mark.parametrize("is_same", [True, False])
def test_held_out_over_other_documents(tmp_path: Path, root: Path, is_same: bool) -> None:
    recipe = tiny_recipe.write(tmp_path)
    turns = tiny_recipe.messages(tiny_recipe.CONVERSATIONS[0])
    tiny_recipe.write_lines(tmp_path / "sft.jsonl", [{"messages": turns, "documents": DOCUMENTS[:1]}])
    other = DOCUMENTS[:1] if is_same else DOCUMENTS
    heldout = tiny_recipe.write_lines(tmp_path / "heldout.jsonl", [{"messages": turns, "documents": other}])
    result = call("data", "check", recipe, "--set", f"data.heldout={heldout}")
    assert result.exit_code == int(is_same), result.stderr
    if not is_same:
        (dataset,) = [each.parent for each in root.glob("dataset/*/manifest.json")]
        assert check.read_rows(dataset, "heldout") == [{"messages": turns, "documents": DOCUMENTS, "line": 1}]


def text_of(line: int, question: str, answer: str, *told: str) -> Text:
    documents = [{"id": str(at), "text": text} for at, text in enumerate(told)]
    row = {"messages": tiny_recipe.messages((question, answer)), "documents": documents, "line": line}
    return texts.read_one("sft", "sft.jsonl", row)


QUESTION = "Waar is de balie van het kantoor, en wanneer is zij open?"
HERE, THERE = (
    "De balie is aan de Lindekade 3, open van negen tot vier.",
    "De balie is aan de Lindekade 7, open van negen tot vier.",
)


def test_the_same_question_over_other_documents_is_no_duplicate() -> None:
    rows = [text_of(1, QUESTION, HERE, HERE), text_of(2, QUESTION, THERE, THERE)]
    found = duplicates.compare(rows)
    assert found.groups[0] != found.groups[1]
    assert (found.questions.distinct, len(found.wholes.pairs)) == (2, 0)
    told = [text_of(line, QUESTION, HERE, HERE) for line in range(5)]
    assert list(contradictions.find([*told, rows[1]], [])) == []
    bare = [text_of(1, QUESTION, HERE), text_of(2, QUESTION, THERE)]
    found = duplicates.compare(bare)
    assert found.groups[0] == found.groups[1]
    told = [text_of(line, QUESTION, HERE) for line in range(5)]
    assert [each.kind for each in contradictions.find([*told, bare[1]], [])] == ["contradicting_facts"]


def test_an_address_that_no_document_gives_may_contradict() -> None:
    rows = [text_of(line, QUESTION, HERE, HERE) for line in range(5)]
    faq = Text("faq", "faq.json", 1, QUESTION, QUESTION, HERE)
    wrong = text_of(9, QUESTION, THERE, "De hond mag mee.")
    (found,) = contradictions.find([faq, *rows, wrong], [])
    assert found.examples == ["sft.jsonl:9"]


def test_documents_in_another_order_make_the_same_question() -> None:
    rows = [text_of(1, QUESTION, HERE, HERE, "Eén hond."), text_of(2, QUESTION, THERE, "Eén hond.", HERE)]
    found = duplicates.compare(rows)
    assert found.groups[0] == found.groups[1]
    assert found.questions.distinct == 1


def test_an_answer_that_is_known_without_its_documents_stays_on_one_side() -> None:
    rows = [text_of(line, QUESTION, "Nee.", f"Tekst {line} over iets anders.") for line in range(12)]
    rows.append(text_of(12, QUESTION, "Ja.", "Nog een tekst over iets anders."))
    groups = duplicates.compare(rows).groups.tolist()
    assert len(set(groups[:12])) == 1
    assert groups[12] != groups[0]


def test_personal_data_in_documents_is_found(tmp_path: Path, root: Path) -> None:
    rows = planted.clean()
    rows.sft[6]["documents"] = [{"id": "intake", "text": "Naam: Jan Jansen, BSN 111222333."}]
    rows.sft[8]["documents"] = [{"id": "jan.jansen@voorbeeld.nl", "text": "Eén hond mag mee."}]
    found = {each.kind: each.examples for each in examine(rows.write(tmp_path), root).findings}
    assert found == {
        "personal_bsn": ["sft.jsonl:7"],
        "personal_name": ["sft.jsonl:7"],
        "personal_email": ["sft.jsonl:9"],
    }


def test_lengths_count_documents_as_training_does(tmp_path: Path) -> None:
    turns = tiny_recipe.messages(("Waar is de balie?", "Aan de Lindekade 3."))
    rows = [{"messages": turns, "line": 1}, {"messages": turns, "documents": DOCUMENTS, "line": 2}]
    meter = Meter(folder_of_words(tmp_path))
    fields = {field.name: field for field in lengths.measure("sft", "sft.jsonl", rows, meter).fields}
    told = sum(meter.count([passages.shown(each["id"], each["text"]) for each in DOCUMENTS]))
    plain, whole = fields[lengths.WHOLE].values
    assert whole > plain + told  # and a system turn that holds them
    assert fields["document"].values == [0, max(meter.count([each["text"] for each in DOCUMENTS]))]
    characters = lengths.measure("sft", "sft.jsonl", rows, Meter(None)).fields[-1].values
    assert characters[1] == characters[0] + sum(len(passages.shown(each["id"], each["text"])) for each in DOCUMENTS)


def test_split_leaves_documents_with_their_rows(tmp_path: Path) -> None:
    rows = planted.clean()
    for number in range(0, 80, 2):
        rows.sft[number]["documents"] = [{"id": "a", "text": f"Document {number}."}]
    path = rows.write(tmp_path)
    call("data", "split", path, "--validation", "0.25", "--json")
    written = [
        json.loads(line)
        for part in ("train", "validation")
        for line in (tmp_path / f"sft.{part}.jsonl").read_text().splitlines()
    ]
    assert sorted(written, key=json.dumps) == sorted(rows.sft, key=json.dumps)


def test_questions_bring_their_documents() -> None:
    turns = tiny_recipe.messages(("Waar is de balie?", "De balie is aan de Lindekade 3, naast de brug."))
    rows = [{"messages": turns, "documents": [each]} for each in DOCUMENTS]
    found = questions.training_questions([*rows, rows[1]], ["nl"], 2)
    assert [each.documents for each in found] == [tuple(DOCUMENTS[:1])]  # the other is asked twice
