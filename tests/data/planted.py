"""Rows in which an audit finds nothing, and defects to plant among them."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import tiny_recipe

DUTCH = """
de buurman komt morgen met zijn fiets naar ons huis en neemt een grote taart mee voor het feest van mijn zus
omdat zij dan jarig is wij zetten samen de stoelen in de tuin maar als het regent blijven we lekker binnen bij
het vuur daarna gaan de kinderen nog spelen terwijl oma thee drinkt opa leest graag een krant hij houdt van
stilte soms zingt iedereen een lied
"""
ENGLISH = """
the neighbour comes tomorrow with his bicycle to our house and brings a large cake for the party of my sister
because she has her birthday then we put the chairs together in the garden but when it rains we stay inside by
the fire afterwards the children go and play while grandma drinks tea grandpa likes to read a paper he loves
silence sometimes everybody sings songs
"""
RECIPE = tiny_recipe.RECIPE.replace('languages = ["nl", "en"]', 'languages = ["nl", "en"]\nphases = ["sft", "dpo"]')


@dataclass
class Rows:
    """A recipe's data; line n of a file is row n - 1."""

    sft: list[dict[str, Any]]
    dpo: list[dict[str, Any]]
    faq: list[dict[str, Any]] = field(default_factory=list)
    heldout: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: Path, recipe: str = RECIPE) -> Path:
        path = tiny_recipe.write(folder, recipe)
        for name in ("sft", "dpo"):
            tiny_recipe.write_lines(folder / f"{name}.jsonl", getattr(self, name))
        (folder / "faq.json").write_text(json.dumps(self.faq, ensure_ascii=False, indent=1), encoding="utf-8")
        if self.heldout:
            tiny_recipe.write_lines(folder / "heldout.jsonl", self.heldout)
            path.write_text(recipe.replace('faq = "faq.json"', 'faq = "faq.json"\nheldout = "heldout.jsonl"'))
        return path

    def answer(self, row: int, text: str) -> None:
        self.sft[row]["messages"][-1]["content"] = text

    def ask(self, row: int, text: str) -> None:
        self.sft[row]["messages"][0]["content"] = text

    def said(self, row: int, position: int) -> str:
        text: str = self.sft[row]["messages"][position]["content"]
        return text


class Writer:
    """Writes sentences of common words, each time others, long enough to tell their language by."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def sentence(self, words: str, count: int = 14) -> str:
        chosen = [self._random.choice(words.split()) for _ in range(count)]
        return f"{' '.join(chosen).capitalize()}."

    def two(self, words: str) -> str:
        return f"{self.sentence(words)} {self.sentence(words)}"


def clean(seed: int = 1, rows: int = 80) -> Rows:
    """Rows without a defect, half of them Dutch, half English."""
    writer = Writer(seed)
    languages = [(DUTCH, ENGLISH)[number % 2] for number in range(rows)]
    sft = [{"messages": tiny_recipe.messages((writer.sentence(words), writer.two(words)))} for words in languages]
    dpo = [
        {"prompt": writer.sentence(words), "chosen": writer.two(words), "rejected": writer.two(words)}
        for words in languages[: rows // 2]
    ]
    faq = [{"vraag": writer.sentence(DUTCH), "antwoord": "De balie is aan de Lindekade 3, bel 010-3188188.", "metadata": {}}]
    return Rows(sft, dpo, faq)


Plant = Callable[[Rows], None]


def _prefix(row: int, text: str) -> Plant:
    return lambda rows: rows.answer(row, f"{rows.said(row, 1)} {text}")


def _stray_key(rows: Rows) -> None:
    rows.dpo[6]["language"] = "nl"


def _role(rows: Rows) -> None:
    rows.sft[6]["messages"][0]["role"] = " user"


def _copy(rows: Rows) -> None:
    rows.sft.append(rows.sft[6])


def _same_prompt(rows: Rows) -> None:
    rows.ask(7, rows.said(3, 0).upper())


def _near_copies(rows: Rows) -> None:
    for row in range(6):
        rows.ask(20 + row, rows.said(row, 0).replace(".", " ja."))
        rows.answer(20 + row, rows.said(row, 1).replace(".", " ja."))


def _longer(rows: Rows) -> None:
    for row in rows.dpo:
        row["rejected"] = row["rejected"].partition(" ")[0]


def _form(rows: Rows) -> None:
    for row in rows.dpo:
        row["chosen"] = row["chosen"].replace(". ", ".\n\n", 1)


def _prison(rows: Rows) -> None:
    rows.ask(4, "Hij komt net uit de gevangenis, waar slaapt hij vannacht?")
    rows.ask(9, "She has just left prison, where will she sleep tonight?")


def _dominating_word(rows: Rows) -> None:
    for row in (4, 8):
        rows.ask(row, f"Is er een zwembad, en is het zwembad open? {rows.said(row, 0)}")
        rows.answer(row, f"Het zwembad is open. {rows.said(row, 1)}")


def _dominating_word_of_the_faq(rows: Rows) -> None:
    _dominating_word(rows)
    rows.faq.append({"vraag": "Is er een zwembad in de buurt?", "antwoord": "Ja, naast de kerk.", "metadata": {}})


def _one_address(rows: Rows) -> None:
    for row in range(0, 80, 4):
        _prefix(row, "Lindekade 3.")(rows)


def _other_number(rows: Rows) -> None:
    _prefix(5, "Ga naar Lindekade 5 daar.")(rows)


def _other_number_twice(rows: Rows) -> None:
    for row in (5, 9):
        _prefix(row, "De balie is aan de Lindekade 24.")(rows)


def _other_number_than_most(rows: Rows) -> None:
    for row, number in ((10, 7), (12, 7), (14, 7), (16, 7), (18, 70)):
        _prefix(row, f"Dat is Tinlepelhof {number}.")(rows)


def _rejected_address(rows: Rows) -> None:
    rows.dpo[3]["rejected"] += " Ga maar naar de lindekade 3."


def _wrong_language(rows: Rows) -> None:
    question, answer = rows.said(0, 0), rows.said(1, 1)
    rows.sft[0] = {"messages": tiny_recipe.messages((question, answer))}


def _french(rows: Rows) -> None:
    said = "Bonjour, je voudrais savoir où se trouve la gare et à quelle heure partent les trains pour Paris demain matin."
    rows.sft[2] = {"messages": tiny_recipe.messages((said, f"Nous ne savons pas encore. {said}"))}


def _heldout(rows: Rows) -> None:
    question, answer = rows.said(0, 0), rows.said(0, 1)
    rows.heldout = [
        {"messages": tiny_recipe.messages((f"{question} Ja?", answer))},
        {
            "messages": tiny_recipe.messages(
                ("Hoe ver is het van hier naar de volgende stad?", "Een uur lopen langs het water.")
            )
        },
    ]


def _hard(rows: Rows) -> None:
    for row in range(0, 80, 2):
        rows.answer(
            row, f"{rows.said(row, 1)} Overheidsvoorlichtingsactiviteiten {'verantwoordelijkheidstoedelingen ' * 12}."
        )


@dataclass(frozen=True)
class Defect:
    """What is planted, the kind of finding that it must be, and a place that the finding must name."""

    kind: str
    plant: Plant
    where: str
    said: str = ""


DEFECTS = (
    Defect("defect", _stray_key, "dpo.jsonl:7", "stray key 'language'"),
    Defect("defect", _role, "sft.jsonl:7", "role is ' user'"),
    Defect("defect", _copy, "sft.jsonl:81", "an exact copy"),
    Defect("duplicate_prompts", _same_prompt, "sft.jsonl:4 = 8", "1 of 80 rows"),
    Defect("near_duplicates", _near_copies, "sft.jsonl:1 ~ 21", "12 of 80 rows"),
    Defect("random_split_leaks", _near_copies, "sft.jsonl:1 ~ 21"),
    Defect("personal_bsn", _prefix(5, "Zijn nummer is 111222333."), "sft.jsonl:6"),
    Defect("personal_bsn", _prefix(5, "**BSN:** 123.456.789"), "sft.jsonl:6"),  # fails the 11-test
    Defect("personal_iban", _prefix(5, "NL91 ABNA 0417 1643 00 is de rekening."), "sft.jsonl:6"),
    Defect("personal_phone", _prefix(5, "Bel 06-12345678 gerust."), "sft.jsonl:6"),
    Defect("personal_email", _prefix(5, "Mail jan.jansen@voorbeeld.nl gerust."), "sft.jsonl:6"),
    Defect("personal_name", _prefix(5, "**Naam:** Sanne Bakker"), "sft.jsonl:6"),
    Defect("personal_birth_date", _prefix(5, "Geboortedatum: 12-05-2002"), "sft.jsonl:6"),
    Defect("length_shortcut", _longer, "dpo.jsonl:1", "100.0%"),
    Defect("form_shortcut", _form, "dpo.jsonl:1", "a blank line in 40"),
    Defect("rare_premise", _prison, "sft.jsonl:5", "prison in 2 of 120 rows (gevangenis, prison)"),
    Defect("rare_word", _dominating_word, "sft.jsonl:5", "one in 2 rows, 3.0 times each (sft.jsonl:5, sft.jsonl:9)"),
    Defect("rare_word", _dominating_word_of_the_faq, "sft.jsonl:5", '"zwembad" in 2 rows'),
    Defect("fact_in_many_answers", _one_address, "sft.jsonl:1", "Lindekade 3 in 20 of 120 answers"),
    Defect(
        "contradicting_facts",
        _other_number,
        "sft.jsonl:6",
        "Lindekade with another number in 1 row (sft.jsonl:6), the FAQ says 3",
    ),
    Defect("contradicting_facts", _other_number_twice, "sft.jsonl:6", "Lindekade 24 in 2 rows"),
    Defect(
        "contradicting_facts",
        _other_number_than_most,
        "sft.jsonl:19",
        "Tinlepelhof with another number in 1 row (sft.jsonl:19), 4 say 7",
    ),
    Defect("true_facts_rejected", _rejected_address, "dpo.jsonl:4", "Lindekade 3 in 1"),
    Defect("answer_in_another_language", _wrong_language, "sft.jsonl:1", "nl answered in en 1"),
    Defect("undeclared_language", _french, "sft.jsonl:3", "fr 1"),
    Defect("heldout_leaks", _heldout, "heldout.jsonl:1", "1 of 2"),
    Defect("hard_to_read", _hard, "sft.jsonl:", "Flesch-Douma"),
)
