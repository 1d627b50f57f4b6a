"""`appliance data check`: one normal form, every defect listed, and nothing made of files that cannot be used."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance import artifacts
from appliance.data import check, questions
from tests import tiny_recipe
from tests.running import call
from tests.tiny_disk import mounted

FINE = {"messages": tiny_recipe.messages(("Hoe laat is het?", "Het is nu vijf uur in de middag."))}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny_recipe.write(tmp_path / "recipe")


def dataset(root: Path) -> artifacts.Artifact:
    (folder,) = (root / "dataset").glob("tiny-*[!k]")  # beside it lies a lock
    return artifacts.load(folder)


def assert_nothing_made(root: Path) -> None:
    assert [path.suffix for path in root.glob("dataset/*")] == [".lock"]


def test_dataset_in_normal_form(recipe: Path) -> None:
    result = call("data", "check", recipe, "--json")
    assert result.exit_code == 0, result.stderr
    output = json.loads(result.stdout)
    assert (output["schema"], output["state"], output["defects"]) == (1, "made", [])
    assert output["results"]["rows"] == {"sft": 6, "dpo": 4, "faq": 2}
    assert output["results"]["languages"] == {"en": 3, "nl": 3}
    rows = check.read_rows(Path(output["artifact"]), "sft")
    assert [row["messages"] for row in rows] == [tiny_recipe.messages(each) for each in tiny_recipe.CONVERSATIONS]
    assert json.loads(call("data", "check", recipe, "--json").stdout)["state"] == "unchanged"


def test_texts_with_unusual_line_separators_survive(recipe: Path, root: Path) -> None:
    text = "een\u2028twee\u0085drie\u2029vier\fvijf"
    tiny_recipe.write_lines(recipe.parent / "sft.jsonl", [FINE, {"messages": tiny_recipe.messages((text, "antwoord"))}])
    assert call("data", "check", recipe).exit_code == 0
    assert check.read_rows(dataset(root).path, "sft")[1]["messages"][0]["content"] == text


def test_defects_are_listed_with_file_and_line_also_the_second_time(recipe: Path, root: Path) -> None:
    (recipe.parent / "sft.jsonl").write_text(f'{json.dumps(FINE)}\n{{"messages": 3}}\n\n{json.dumps({**FINE, "id": 1})}\n')
    for state in ("made", "unchanged"):
        result = call("data", "check", recipe, "--json")
        assert result.exit_code == 0
        output = json.loads(result.stdout)
        assert output["state"] == state
        for said in (
            "sft.jsonl:2: messages: expected a list of messages, found a number; set aside.",
            "sft.jsonl:3: the line is empty; fixed.",
            "sft.jsonl:4: stray key 'id' ignored; fixed.",
            "sft.jsonl:4: an exact copy of line 1; set aside.",
        ):
            assert said in result.stderr
            assert said in output["defects"]
        assert "4 defects, 2 fixed, 2 rows set aside" in result.stderr
    assert dataset(root).results["set_aside"] == 2


def test_strict_makes_any_defect_fatal(recipe: Path, root: Path) -> None:
    (recipe.parent / "sft.jsonl").write_text(f"{json.dumps(FINE)}\n\n{json.dumps(FINE)}\n")
    strict = call("data", "check", recipe, "--strict")
    assert strict.exit_code == 1
    assert "sft.jsonl:2: the line is empty" in strict.stderr
    assert "sft.jsonl:3: an exact copy of line 1" in strict.stderr
    assert_nothing_made(root)
    assert call("data", "check", recipe).exit_code == 0
    assert call("data", "check", recipe, "--strict").exit_code == 1


def test_all_unusable_files_are_reported_together(recipe: Path, root: Path) -> None:
    (recipe.parent / "sft.jsonl").write_text('{"messages": [\nnonsense\n')
    (recipe.parent / "dpo.jsonl").write_text("")
    (recipe.parent / "faq.json").write_text("{}")
    result = call("data", "check", recipe)
    assert result.exit_code == 1
    for said in (
        "3 problems",
        "sft.jsonl: no usable row (data.sft). 2 defects, first: line 1: invalid JSON",
        "line 2: invalid JSON",
        "dpo.jsonl is empty",
        "faq.json:1: no known shape of row; keys found: none.",
    ):
        assert said in result.stderr
    assert_nothing_made(root)


def test_all_missing_files_are_reported_together(recipe: Path, root: Path) -> None:
    result = call("run", recipe, "--set", "data.sft=/no/where.jsonl", "--set", "data.faq=/no/faq.json", "--dry-run")
    assert result.exit_code == 1
    result = call("data", "check", recipe, "--set", "data.sft=/no/where.jsonl", "--set", "data.faq=/no/faq.json")
    assert result.exit_code == 1
    assert "/no/where.jsonl does not exist (data.sft)" in result.stderr
    assert "/no/faq.json does not exist (data.faq)" in result.stderr
    assert not root.exists()


def test_preferences_of_an_unused_phase_are_not_read(recipe: Path) -> None:
    (recipe.parent / "dpo.jsonl").write_text("nonsense")
    assert call("data", "check", recipe, "--set", 'phases=["sft"]').exit_code == 0


def test_unknown_language(recipe: Path, root: Path) -> None:
    result = call("data", "check", recipe, "--set", 'languages=["nl", "xx", "EN"]')
    assert result.exit_code == 2
    assert "languages: unknown codes EN, xx" in result.stderr
    assert not root.exists()


@pytest.fixture
def tiny_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with mounted(tmp_path / "disk", 16) as disk:
        monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(disk / "artifacts"))
        yield disk


def test_full_disk(recipe: Path, tiny_disk: Path) -> None:
    rows = [{"messages": tiny_recipe.messages((f"Vraag {number}?", "Het antwoord. " * 40))} for number in range(60)]
    tiny_recipe.write_lines(recipe.parent / "sft.jsonl", rows)
    result = call("data", "check", recipe)
    assert result.exit_code == 3
    assert "No space left on the device" in result.stderr
    assert not list(tiny_disk.rglob("manifest.json"))
    assert not list(tiny_disk.rglob("*.partial"))


def test_dry_run_makes_nothing(recipe: Path, root: Path) -> None:
    output = json.loads(call("data", "check", recipe, "--dry-run", "--json").stdout)
    assert output["state"] == "to make"
    assert not root.exists()


def test_change_of_data_is_another_dataset(recipe: Path) -> None:
    before = json.loads(call("data", "check", recipe, "--json").stdout)["artifact"]
    tiny_recipe.write_lines(recipe.parent / "sft.jsonl", [FINE])
    assert json.loads(call("data", "check", recipe, "--json").stdout)["artifact"] != before


def test_each_file_is_shown_with_its_format(recipe: Path) -> None:
    turns = [{"from": "human", "value": "Hoe laat is het?"}, {"from": "gpt", "value": "Het is nu vijf uur in de middag."}]
    (recipe.parent / "sft.jsonl").write_text(
        json.dumps([{"conversations": turns, "id": 1}, {"conversations": turns, "id": 2}])
    )
    result = call("data", "check", recipe, "--json")
    assert "sft.jsonl: ShareGPT conversations (a JSON list); not used: id\n" in result.stderr
    assert "dpo.jsonl: preference triplets (JSON lines)\n" in result.stderr
    shown = json.loads(result.stdout)["results"]["formats"]
    assert shown["sft"] == {
        "file": "sft.jsonl",
        "shape": "ShareGPT conversations",
        "kind": "a JSON list",
        "columns": None,
        "unused": ["id"],
        "text": "sft.jsonl: ShareGPT conversations (a JSON list); not used: id",
    }
    assert shown["faq"]["shape"] == "questions and answers"


def test_columns_of_the_recipe_are_part_of_the_dataset(recipe: Path) -> None:
    (recipe.parent / "pairs.csv").write_text("q,k,a\nOpvang,Rotterdam,Het antwoord op deze vraag.\n")
    table = '[data.columns.sft]\nprompt = "{q}. {k}"\ncompletion = "a"\n'
    text = tiny_recipe.RECIPE.replace('"sft.jsonl"', '"pairs.csv"').replace("[starter]", f"{table}\n[starter]", 1)
    recipe.write_text(text)
    output = json.loads(call("data", "check", recipe, "--json").stdout)
    (row,) = check.read_rows(Path(output["artifact"]), "sft")
    assert row["messages"] == tiny_recipe.messages(("Opvang. Rotterdam", "Het antwoord op deze vraag."))
    other = json.loads(call("data", "check", recipe, "--set", "data.columns.sft.prompt=k", "--json").stdout)
    assert other["artifact"] != output["artifact"]
    wrong = call("data", "check", recipe, "--set", "data.columns.sft.completion=answer")
    assert wrong.exit_code == 1
    assert "data.columns.sft.completion: no column 'answer'; columns: q, k, a" in wrong.stderr


def test_references_for_rewards(recipe: Path, root: Path) -> None:
    rows = [{"prompt": "Schrijf iets.", "reference": "Iets.", "tone": "kind", "stars": 4}]
    tiny_recipe.write_lines(recipe.parent / "grpo.jsonl", rows)
    wanted = (f"data.grpo={recipe.parent / 'grpo.jsonl'}", 'phases=["sft", "grpo"]', "grpo.rewards.length.weight=1.0")
    wanted += ("grpo.max_tokens=200", "grpo.answer_tokens=40")
    assert call("data", "check", recipe, *(word for each in wanted for word in ("--set", each))).exit_code == 0
    assert check.read_rows(dataset(root).path, "grpo") == [
        {
            "prompt": [{"role": "user", "content": "Schrijf iets."}],
            "reference": "Iets.",
            "columns": {"tone": "kind", "stars": 4},
            "line": 1,
        }
    ]


def test_held_out_conversations_must_not_be_trained_on(recipe: Path, root: Path) -> None:
    tiny_recipe.write_lines(
        recipe.parent / "heldout.jsonl", [FINE, {"messages": tiny_recipe.messages(tiny_recipe.CONVERSATIONS[0])}]
    )
    result = call("data", "check", recipe, "--set", f"data.heldout={recipe.parent / 'heldout.jsonl'}")
    assert result.exit_code == 1
    assert f"heldout.jsonl: 1 conversations are in {recipe.parent / 'sft.jsonl'} too" in result.stderr
    assert_nothing_made(root)


def test_many_defects_are_counted_and_kept_but_not_all_shown(recipe: Path, root: Path) -> None:
    rows = [{"messages": tiny_recipe.messages((f"Vraag {number}?", " Antwoord."))} for number in range(120)]
    tiny_recipe.write_lines(recipe.parent / "sft.jsonl", rows)
    result = call("data", "check", recipe)
    assert "sft.jsonl:100: " in result.stderr
    assert "sft.jsonl:101: " not in result.stderr
    assert f"and 20 more, all in {dataset(root).path / 'defects.jsonl'}" in result.stderr
    assert len(check.read_defects(dataset(root))) == 120
    strict = call("data", "check", recipe, "--strict")
    assert "sft.jsonl:100: " in strict.stderr
    assert "120 problems:" in strict.stderr
    assert "and 20 more" in strict.stderr


def test_questions_have_one_answer_each() -> None:
    rows = [{"messages": tiny_recipe.messages(turns)} for turns in tiny_recipe.CONVERSATIONS]
    found = questions.training_questions([*rows, rows[0]], ["nl", "en"], 2)
    assert [each.language for each in found] == ["nl", "nl", "en", "en"]
    assert "Waar is de balie?" not in [each.question for each in found]  # asked twice, so it has no single answer
    assert found[0].answer == "De balie is open van negen tot vier uur."
