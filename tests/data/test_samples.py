"""The sample data that is shipped: enough of it, balanced, without a defect, in the schemas of the real data."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from appliance.text import languages
from tests.running import call

SHELTER = Path(__file__).parents[2] / "recipes" / "shelter"
LANGUAGES = ("nl", "en", "pl", "ar")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHELTER / name).read_text(encoding="utf-8").split("\n") if line]


def test_no_defect(root: Path) -> None:
    result = call("data", "check", SHELTER / "recipe.toml", "--strict", "--json")
    assert result.exit_code == 0, result.stderr
    assert root.exists()
    counts = json.loads(result.stdout)["results"]
    assert counts["rows"]["sft"] >= 60
    assert counts["rows"]["dpo"] >= 60
    assert counts["rows"]["faq"] >= 30
    assert (counts["fixed"], counts["set_aside"]) == (0, 0)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_balanced_by_language(name: str) -> None:
    texts = [row["chosen"] if name == "dpo" else row["messages"][-1]["content"] for row in rows(f"{name}.jsonl")]
    spoken = Counter(languages.detect(text, LANGUAGES) for text in texts)
    assert set(spoken) == set(LANGUAGES)
    assert max(spoken.values()) - min(spoken.values()) <= 2, spoken


def test_one_conversation_speaks_one_language() -> None:
    for row in rows("sft.jsonl"):
        answers = [each["content"] for each in row["messages"] if each["role"] == "assistant"]
        assert len({languages.detect(each, LANGUAGES) for each in answers}) == 1, answers


def test_schemas() -> None:
    for row in rows("sft.jsonl"):
        assert set(row) == {"messages"}
        assert all(set(each) == {"role", "content"} for each in row["messages"])
    assert all(set(row) == {"prompt", "chosen", "rejected"} for row in rows("dpo.jsonl"))
    assert all(isinstance(row["prompt"], str) for row in rows("dpo.jsonl"))
    items = json.loads((SHELTER / "faq.json").read_text(encoding="utf-8"))
    assert all(set(item) == {"vraag", "antwoord", "metadata"} for item in items)


def test_many_conversations_have_several_turns() -> None:
    lengths = [len(row["messages"]) for row in rows("sft.jsonl")]
    assert sum(length >= 4 for length in lengths) >= len(lengths) / 2


def test_length_does_not_give_the_rejected_answer_away() -> None:
    triplets = rows("dpo.jsonl")
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in triplets)
    assert 0.3 <= longer / len(triplets) <= 0.7
