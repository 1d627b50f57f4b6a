"""Personal data is found wherever a row holds it, counted by rows, and never shown as a word, a fact or a topic."""

import json
from pathlib import Path

import pytest

from appliance.data import personal, texts, topics
from appliance.data.texts import Text
from tests import tiny_recipe
from tests.data import planted
from tests.data.test_audit import examine
from tests.running import call


def row(text: str, kind: str = "sft", line: int = 1) -> Text:
    return Text(kind, f"{kind}.jsonl", line, "Een vraag", "Een vraag", text)


def found(*rows: Text) -> dict[str, int]:
    return {finding.kind: finding.count for finding in personal.find(rows, ["nl"])}


@pytest.mark.parametrize(
    "text",
    [
        "NL91 ABNA 0417 1643 00 is de rekening.",
        "nl91abna0417164300",
        "Op BE71 0961 2345 6769 Jan en Piet",
        "BE71 0961 2345 6769 2024 werd het gestort",
        "be71 0961 2345 6769 dat is de rekening van ons",
        "BE71 0961 2345 6769\nUW",
        "Ref AB12 NL91 ABNA 0417 1643 00",
        "PL61 1090 1014 0000 0712 1981 2874 WBK",
    ],
)
def test_bank_account_is_found(text: str) -> None:
    assert found(row(text)) == {"personal_iban": 1}


@pytest.mark.parametrize("text", ["NL91 ABNA 0417 1643 01 is er geen", "abcd12 is geen rekening en dit ook niet"])
def test_what_only_looks_like_a_bank_account(text: str) -> None:
    assert found(row(text)) == {}


def test_system_turns_and_further_columns_are_read() -> None:
    secret = "Bel 06-12345678 gerust."
    question = [{"role": "user", "content": "Waar is de balie?"}]
    told = [{"role": "system", "content": secret}, *question]
    answer = {"role": "assistant", "content": "Hier."}
    rows = {
        "sft": {"messages": [*told, answer]},
        "dpo": {"prompt": told, "chosen": "Hier.", "rejected": "Daar."},
        "kto": {"prompt": told, "completion": "Hier.", "label": True},
        "grpo": {"prompt": question, "reference": "Hier.", "columns": {"note": [secret]}},
    }
    for kind, each in rows.items():
        (read,) = texts.read(kind, f"{kind}.jsonl", [{**each, "line": 1}])
        assert found(read) == {"personal_phone": 1}, kind
    for label in (True, False):
        judged = {"prompt": question, "completion": secret, "label": label, "line": 1}
        assert found(*texts.read("kto", "kto.jsonl", [judged])) == {"personal_phone": 1}
    earlier = [*question, {"role": "assistant", "content": secret}, *question]
    (read,) = texts.read("dpo", "dpo.jsonl", [{"prompt": earlier, "chosen": "Hier.", "rejected": "Daar.", "line": 1}])
    assert found(read) == {"personal_phone": 1}


def test_number_in_the_metadata_of_the_faq_is_the_organisations() -> None:
    item = {"question": "Waar?", "answer": "Hier.", "metadata": {"contact": {"phone": ["06-12345678"]}}, "line": 1}
    assert found(*texts.read("faq", "faq.json", [item]), row("Bel 06-12345678 gerust.")) == {}


def test_rows_on_one_line_are_counted_each(tmp_path: Path, root: Path) -> None:
    rows = planted.clean()
    for number in range(50):
        rows.answer(number, f"{rows.said(number, 1)} BSN 111222333.")
    path = rows.write(tmp_path, planted.RECIPE.replace("sft.jsonl", "sft.json"))
    (tmp_path / "sft.json").write_text(json.dumps(rows.sft))
    (finding,) = [each for each in examine(path, root).findings if each.kind == "personal_bsn"]
    assert finding.count == 50
    assert "50 rows" in finding.what
    assert finding.examples[:2] == ["sft.json:1[1]", "sft.json:1[2]"]


def shown(path: Path) -> str:
    result = call("data", "audit", path, "--json")
    folder = Path(json.loads(result.stdout)["artifact"])
    return (folder / "audit.html").read_text() + (folder / "audit.json").read_text() + result.stdout + result.stderr


def test_telephone_number_and_home_in_a_tenth_of_few_answers_are_not_shown(tmp_path: Path) -> None:
    rows = planted.clean(rows=14)
    for number in (0, 2, 4):
        rows.answer(number, f"{rows.said(number, 1)} Bel 06-12345678, of kom naar Kerkstraat 18.")
    said = shown(rows.write(tmp_path))
    assert "a telephone number in 3 of 21 answers" in said
    assert "an address in 3 of 21 answers" in said
    for private in ("31612345678", "12345678", "Kerkstraat"):
        assert private not in said


def test_what_the_faq_gives_is_shown(tmp_path: Path) -> None:
    rows = planted.clean(rows=14)
    for number in (0, 2, 4):
        rows.answer(number, f"{rows.said(number, 1)} Bel 010-3188188, of kom naar Lindekade 3.")
    said = shown(rows.write(tmp_path))
    assert "+31103188188 in 3 of 21 answers" in said
    assert "Lindekade 3 in 3 of 21 answers" in said


def test_home_in_a_street_of_the_faq_is_not_shown(tmp_path: Path) -> None:
    rows = planted.clean()
    planted._one_address(rows)
    rows.answer(5, f"{rows.said(5, 1)} Hij woont op Lindekade 4711a, 3012 XX.")
    said = shown(rows.write(tmp_path))
    assert "Lindekade with another number in 1 row (sft.jsonl:6)" in said
    for private in ("4711", "3012"):
        assert private not in said


def test_name_in_few_rows_is_not_shown(tmp_path: Path) -> None:
    rows = planted.clean()
    for number in (4, 8):
        rows.ask(number, f"Waar is Achmadi, en komt Achmadi nog? Hij woont net in een krebsbach. {rows.said(number, 0)}")
        rows.answer(number, f"Achmadi komt later naar Kerkstraat 18. {rows.said(number, 1)}")
    for number, text in enumerate(
        ("Dzisiaj Nowicka jest chora i zostaje w swoim domu.", "Wczoraj Nowicka poszła na dworzec.")
    ):
        rows.sft.append({"messages": tiny_recipe.messages((f"Gdzie jest teraz nasz przyjaciel {number}?", text))})
    said = shown(rows.write(tmp_path))
    assert "one in 2 rows" in said
    assert "illness in 2 of" in said
    assert "2 of their answers give one address" in said
    for private in ("achmadi", "nowicka", "krebsbach", "kerkstraat"):
        assert private not in said.casefold()


def test_name_behind_its_label_is_no_frequent_word(tmp_path: Path) -> None:
    rows = planted.clean()
    for number in range(0, 80, 2):
        rows.ask(number, f"{rows.said(number, 0)} Naam: Wendela van den Zwaneveld")
        rows.answer(number, f"{rows.said(number, 1)} Naam: Wendela van den Zwaneveld, wendela.zonneveld@voorbeeld.nl")
    rows.faq[0]["antwoord"] += " Mail balie@voorbeeld.nl gerust."
    said = shown(rows.write(tmp_path)).casefold()
    for private in ("wendela", "zwaneveld"):
        assert private not in said


def test_topics_are_named_by_words_of_many_rows() -> None:
    asked = [f"trein perron station kaartje {'achmadi ' * 9 if number < 3 else ''}" for number in range(20)]
    asked += [f"soep brood maaltijd keuken {'zwaneveld ' * 9 if number < 10 else ''}" for number in range(20)]
    names = {word for topic in topics.find(asked, ["nl"] * 40, 0, {"zwaneveld"}).topics for word in topic.words}
    assert names >= {"trein", "soep"}
    assert names.isdisjoint({"achmadi", "zwaneveld"})
