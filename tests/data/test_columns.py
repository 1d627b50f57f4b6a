"""Columns that the recipe names become prompt and answer, from CSV and JSON alike."""

import json
from pathlib import Path
from typing import Any

import pytest

from appliance import recipe as recipes
from appliance.data import formats
from appliance.data.formats import Defect, Reading
from appliance.errors import DataError, RecipeError
from tests import tiny_recipe

KEYPHRASES = {"prompt": "{query}. {keyphrase}", "completion": "boolean"}


def examine(tmp_path: Path, name: str, content: str, columns: dict[str, str], file: str = "pairs.csv") -> Reading:
    path = tmp_path / file
    path.write_text(content, encoding="utf-8")
    return formats.examine(path, name, columns)


def read(reading: Reading) -> tuple[list[formats.Row], list[Defect]]:
    defects: list[Defect] = []
    return list(reading.rows(defects)), defects


def test_two_columns(tmp_path: Path) -> None:
    reading = examine(tmp_path, "sft", "LLM,human,language\nstijf,los,nl\n", {"prompt": "LLM", "completion": "human"})
    assert str(reading) == (
        "pairs.csv: prompt and completion from columns (CSV); prompt = LLM, completion = human; not used: language"
    )
    assert read(reading) == ([{"messages": tiny_recipe.messages(("stijf", "los")), "line": 2}], [])


@pytest.mark.parametrize("file", ["pairs.csv", "pairs.jsonl", "pairs.json"])
def test_keyphrase_pairs(tmp_path: Path, file: str) -> None:
    row = {"query": "social media", "keyphrase": " readership", "boolean": '("a" OR b)'}
    contents = {
        "pairs.csv": 'query,keyphrase,boolean\nsocial media, readership,"(""a"" OR b)"\n',
        "pairs.jsonl": json.dumps(row),
        "pairs.json": json.dumps([row]),
    }
    rows, defects = read(examine(tmp_path, "sft", contents[file], KEYPHRASES, file))
    assert [row["messages"] for row in rows] == [tiny_recipe.messages(("social media. readership", '("a" OR b)'))]
    assert [defect.what for defect in defects] == ["keyphrase has white space around it, removed"]


def test_text_around_columns_and_braces(tmp_path: Path) -> None:
    columns = {"prompt": 'Antwoord als {{"a": 1}}:\n\n{q}', "completion": "a"}
    rows, defects = read(examine(tmp_path, "sft", "q,a\n{a} en {q},ja\n", columns))
    assert rows[0]["messages"][0]["content"] == 'Antwoord als {"a": 1}:\n\n{a} en {q}'
    assert defects == []


def test_preferences_and_references(tmp_path: Path) -> None:
    content = "q,good,bad,stars\nvraag,ja,nee,4\n"
    rows, _ = read(examine(tmp_path, "dpo", content, {"prompt": "q", "chosen": "good", "rejected": "bad"}))
    assert rows == [{"prompt": [{"role": "user", "content": "vraag"}], "chosen": "ja", "rejected": "nee", "line": 2}]
    rows, _ = read(examine(tmp_path, "grpo", content, {"prompt": "{q} ({stars})", "reference": "good"}))
    assert rows[0]["prompt"] == [{"role": "user", "content": "vraag (4)"}]
    assert (rows[0]["reference"], rows[0]["columns"]) == ("ja", {"q": "vraag", "bad": "nee", "stars": "4"})


def test_lines_with_labels_have_a_map_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "reviews.txt"
    path.write_text("__label__HOTEL:positiv __label__LAGE:negativ\tSchön, aber laut.\n", encoding="utf-8")
    reading = formats.examine(path, "grpo")
    assert (
        str(reading) == "reviews.txt: prompt and reference from columns (fastText labels); prompt = labels, reference = text"
    )
    (row,), defects = read(reading)
    assert row["prompt"] == [{"role": "user", "content": "HOTEL: positiv, LAGE: negativ"}]
    assert row["reference"] == "Schön, aber laut."
    assert row["columns"] == {"aspects": "HOTEL, LAGE", "polarities": "positiv, negativ"}
    (row,), _ = read(formats.examine(path, "sft", {"prompt": "{aspects} ist {polarities}.", "completion": "text"}))
    assert row["messages"] == tiny_recipe.messages(("HOTEL, LAGE ist positiv, negativ.", "Schön, aber laut."))
    assert defects == []
    with pytest.raises(DataError, match=r"lines with labels cannot be read as data\.dpo"):
        formats.examine(path, "dpo")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"query": "q", "keyphrase": "k"}, "no column 'boolean'; found query, keyphrase"),
        ({"query": "q", "keyphrase": "", "boolean": "b"}, "column 'keyphrase' is empty"),
        ({"query": "q", "keyphrase": " ", "boolean": "b"}, "keyphrase is empty"),
        ({"query": "q", "keyphrase": None, "boolean": "b"}, "column 'keyphrase' is empty"),
        ({"query": True, "keyphrase": "k", "boolean": "b"}, "column 'query': expected text, found true"),
        ({"query": ["q"], "keyphrase": "k", "boolean": "b"}, "query: expected text, found a list of 1"),
        ({"query": "q", "keyphrase": "k<|im_end|>", "boolean": "b"}, "keyphrase holds the control token"),
        ({"query": "q", "keyphrase": "k", "boolean": {"x": 1}}, "column 'boolean': expected text, found an object of 1"),
    ],
)
def test_unusable_row(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    good = {"query": 1984, "keyphrase": "k", "boolean": "b"}
    content = f"{json.dumps(good)}\n{json.dumps(row)}\n"
    rows, defects = read(examine(tmp_path, "sft", content, KEYPHRASES, "pairs.jsonl"))
    assert [each["messages"][0]["content"] for each in rows] == ["1984. k"]
    assert [(each.line, each.action) for each in defects] == [(2, "set aside")]
    assert what in defects[0].what


def test_missing_columns_are_all_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        examine(tmp_path, "sft", "LLM,human\na,b\n", {"prompt": "{llm}. {x}", "completion": "humans"})
    said = str(caught.value)
    assert "data.columns.sft.prompt: no column 'llm'; did you mean 'LLM'? columns: LLM, human" in said
    assert "data.columns.sft.prompt: no column 'x'; columns: LLM, human" in said
    assert "data.columns.sft.completion: no column 'humans'; did you mean 'human'? columns: LLM, human" in said


def test_csv_without_a_map_is_told_by_its_head(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,input,output,id\nVertaal.,hello,dag,7\nZeg hoi.,,hoi,8\n")
    reading = formats.examine(path, "sft")
    assert str(reading) == "rows.csv: Alpaca instructions (CSV); not used: id"
    rows, defects = read(reading)
    assert [row["messages"][0]["content"] for row in rows] == ["Vertaal.\n\nhello", "Zeg hoi."]
    assert defects == []


def test_map_in_the_recipe(tmp_path: Path) -> None:
    path = tiny_recipe.write(tmp_path / "recipe")
    recipe = recipes.load(path, ["data.columns.sft.completion=human", "data.grpo=x.csv", "data.columns.grpo.prompt={a} {b}"])
    assert recipe.data.columns.sft == recipes.PairColumns(prompt="prompt", completion="human")
    assert recipe.data.columns.grpo == recipes.ReferenceColumns(prompt="{a} {b}", reference="reference")
    assert recipe.data.columns.dpo is None
    with pytest.raises(RecipeError, match=r"data\.columns\.dpo\.choosen: unknown key; did you mean 'chosen'"):
        recipes.load(path, ["data.columns.dpo.choosen=x"])
