"""Training questions to ask a trained model: what it should by now answer in the words that it was given."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from appliance.data import examples
from appliance.data.documents import DOCUMENTS, texts
from appliance.text import languages


@dataclass(frozen=True, slots=True)
class Question:
    """The first turn of a conversation, the answer that was trained for, and the documents that it rests on."""

    language: str
    question: str
    answer: str
    documents: tuple[dict[str, str], ...] = ()


def training_questions(rows: Sequence[dict[str, Any]], wanted: Sequence[str], per_language: int) -> list[Question]:
    """Up to `per_language` opening questions in each wanted language, spread evenly over the rows.

    Openings that occur more than once, over the same documents, are passed over: they have no single answer.
    """
    openings = Counter(_opening(row) for row in rows)
    found: dict[str, list[Question]] = {language: [] for language in wanted}
    for row in rows:
        messages = row["messages"]
        if messages[0]["role"] != "user" or openings[_opening(row)] > 1:
            continue
        question, answer = messages[0]["content"], messages[1]["content"]
        language = languages.detect(answer, wanted)
        if language is not None:
            found[language].append(Question(language, question, answer, tuple(row.get(DOCUMENTS, ()))))
    return [question for language in wanted for question in examples.spread(found[language], per_language)]


def _opening(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["messages"][0]["content"], *sorted(texts(row)))
