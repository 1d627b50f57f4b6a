"""The made-up town of `benchmarks.passages`: what is held back is held back, and documents alone tell every answer."""

import itertools
import random
import re
from collections.abc import Sequence

import pytest

from benchmarks import passages, passages_world
from benchmarks.passages_world import (
    COMPARISON,
    DAY,
    DISH,
    DOOR,
    HOUR,
    KINDS,
    OF_PLACES,
    PEOPLE,
    PHONE,
    PLACE,
    PLACES,
    QUESTIONS,
    STATEMENTS,
    STREET,
    WHERE_WORKS,
    Question,
    Scene,
    Town,
)

SHAPES = {
    STREET: r"[A-Z][a-z]+ Street \d",
    HOUR: r"\d",
    PHONE: r"\d{3}",
    DOOR: r"[a-z]+",
    PLACE: r"[A-Z][a-z]+",
    DAY: r"[A-Z][a-z]+day",
    DISH: r"[a-z]+",
}
NAME = r"([A-Z][a-z]+)"


def trained(town: Town, count: int) -> list[tuple[Scene, Question]]:
    chance = random.Random(1)
    scenes = [town.trained_scene(chance, 4, 2) for _ in range(count)]
    return [(scene, question) for scene, asked in scenes for question in asked]


def found_by_reading(documents: Sequence[tuple[str, str]], question: str) -> str | None:
    """What a person finds who has nothing but the documents' texts and the question."""
    told = {text.split()[0]: text for _, text in documents}

    def value(name: str, attribute: str) -> str:
        text = told[name]
        for statement in STATEMENTS[attribute]:
            pattern = re.escape(statement).replace(r"\{\}", r"\w+", 1).replace(r"\{\}", f"({SHAPES[attribute]})")
            if match := re.search(pattern, text):
                return match[1]
        raise AssertionError(f"{attribute} is not in {text!r}")

    if match := re.fullmatch(re.escape(COMPARISON).replace(r"\{\}", NAME), question):
        return min(match.groups(), key=lambda name: int(value(name, HOUR)))
    for attribute, texts in QUESTIONS.items():
        for text in texts:
            pattern = re.escape(text).replace(r"\{\}", "{}")
            if attribute in OF_PLACES and (match := re.fullmatch(pattern.format(WHERE_WORKS.format(NAME)), question)):
                return value(value(match[1], PLACE), attribute)
            if (match := re.fullmatch(pattern.format(NAME), question)) and match[1] in told:
                return value(match[1], attribute)
    return None


def test_every_answer_is_in_the_documents() -> None:
    every = trained(Town(1), 200)
    assert {question.kind for _, question in every} == set(KINDS)
    for scene, question in every:
        assert found_by_reading(scene.documents, question.text) == question.answer, (scene.documents, question)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tested_combination_is_trained(kind: passages_world.Kind) -> None:
    town = Town(2)
    asked = {(question.subjects, question.attribute) for _, question in trained(town, 1500) if question.kind == kind}
    told = {
        (person, scene.facts[person][PLACE]) for scene, _ in trained(town, 1500) for person in scene.people
    }
    for scene, question in passages.draw(town, 2, kind, 200):
        assert found_by_reading(scene.documents, question.text) == question.answer
        if kind == "two documents":
            assert question.subjects not in told
        else:
            assert not {(order, question.attribute) for order in itertools.permutations(question.subjects)} & asked


def test_towns_hold_different_combinations_back_and_the_same_town_the_same() -> None:
    assert Town(1).never_together == Town(1).never_together
    assert Town(1).never_together != Town(2).never_together
    share = len(Town(1).never_together) / (len(PEOPLE) * len(PLACES))
    assert share == pytest.approx(passages_world.HELD_BACK, abs=0.01)


def test_rows_of_training_have_no_held_back_combination(tmp_path: passages.Path) -> None:
    town = Town(3)
    path = passages.write(tmp_path, town, 3, 90)
    rows = [passages.json.loads(line) for line in (path.parent / "sft.jsonl").read_text().splitlines()]
    assert len(rows) == 90
    for row in rows:
        documents = [(each["id"], each["text"]) for each in row["documents"]]
        question, answer = (message["content"] for message in row["messages"])
        assert found_by_reading(documents, question) == answer
        works = [re.match(rf"{NAME}.*(?:works|helps) at {NAME}\.", text) for _, text in documents]
        assert not {match.groups() for match in works if match} & town.never_together


def test_mean_has_an_interval_over_seeds() -> None:
    found = passages.interval([0.5, 0.6, 0.7])
    assert found["mean"] == pytest.approx(0.6)
    assert found["half_width"] == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
