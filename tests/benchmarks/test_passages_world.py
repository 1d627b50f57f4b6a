"""The made-up town of `benchmarks.passages`: what is held back is held back, and documents alone tell every answer."""

import itertools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from appliance.training import documents, starter
from benchmarks import passages, passages_reader, passages_world
from benchmarks.passages_exam import Examined, Reading
from benchmarks.passages_world import HOUR, HOURS, KINDS, OF_PLACES, PEOPLE, PLACE, PLACES, Kind, Question, Scene, Town

NAME = r"([A-Z][a-z]+)"


def trained(town: Town, count: int) -> list[tuple[Scene, Question]]:
    chance = random.Random(1)
    scenes = [town.trained_scene(chance, 4, 2) for _ in range(count)]
    return [(scene, question) for scene, asked in scenes for question in asked]


def pattern(text: str, *inserted: str) -> str:
    """A wording as an expression that finds what was inserted."""
    return re.escape(text).replace(r"\{\}", "{}").format(*inserted)


def told(texts: Sequence[tuple[str, str]], name: str, attribute: str) -> str:
    """What the document of this name says."""
    (found,) = re.findall(pattern(passages_world.STATEMENTS[attribute], name, r"([\w ]+)"), dict(texts)[name])
    return str(found)


def found_by_reading(texts: Sequence[tuple[str, str]], question: str) -> str:
    """The answer of someone who has nothing but the documents and the question."""
    if match := re.fullmatch(pattern(passages_world.COMPARISON, NAME, NAME), question):
        one, other = match.groups()
        hours = [told(texts, name, HOUR) for name in (one, other)]
        earlier = min(zip(map(HOURS.index, hours), (one, other), strict=True))[1]
        return passages_world.COMPARED.format(one, hours[0], other, hours[1], earlier)
    for attribute, wordings in passages_world.QUESTIONS.items():
        for wording, frame in itertools.product(wordings, ("{}", passages_world.BRIEFLY)):
            asked = frame.format(wording)
            is_brief = frame != "{}"
            if match := re.fullmatch(pattern(asked, pattern(passages_world.WHERE_WORKS, NAME)), question):
                name = told(texts, match[1], PLACE)
            elif match := re.fullmatch(pattern(asked, NAME), question):
                name = match[1]
            else:
                continue
            if (attribute in OF_PLACES) == (name in PLACES):
                value = told(texts, name, attribute)
                return value if is_brief else passages_world.STATEMENTS[attribute].format(name, value)
    raise AssertionError(f"nobody asks {question!r}")


def test_every_answer_is_in_the_documents() -> None:
    every = trained(Town(1), 100)
    assert {question.kind for _, question in every} == set(KINDS)
    for scene, question in every:
        assert found_by_reading(scene.documents, question.text) == question.answer, (scene.documents, question)
        assert set(question.subjects) <= {name for name, _ in scene.documents}


@pytest.mark.parametrize("kind", KINDS)
def test_no_tested_combination_is_trained(kind: Kind) -> None:
    town = Town(2)
    every = trained(town, 1000)
    asked = {(frozenset(question.subjects), question.attribute) for _, question in every}
    together = {(person, scene.facts[person][PLACE]) for scene, _ in every for person in scene.people}
    tested = passages.draw(town, 2, kind, 200)
    assert len({question.subjects for _, question in tested}) > 20
    for scene, question in tested:
        assert question.kind == kind
        assert found_by_reading(scene.documents, question.text) == question.answer
        if kind in ("two documents", "two, in a word"):
            assert question.subjects not in together
        else:
            assert (frozenset(question.subjects), question.attribute) not in asked


def test_towns_hold_different_combinations_back_and_the_same_town_the_same() -> None:
    assert Town(1).never_together == Town(1).never_together
    assert Town(1).never_together != Town(2).never_together
    share = len(Town(1).never_together) / (len(PEOPLE) * len(PLACES))
    assert share == pytest.approx(passages_world.HELD_BACK, abs=0.01)


def test_rows_of_the_phases_have_no_held_back_combination(tmp_path: Path) -> None:
    town = Town(3)
    recipe = passages.write(tmp_path, tmp_path / "base", town, 3, 90)
    rows = [json.loads(line) for line in (recipe.parent / "sft.jsonl").read_text().splitlines()]
    assert len(rows) == 90
    for row in rows:
        texts = [(each["id"], each["text"]) for each in row["documents"]]
        question, answer = (message["content"] for message in row["messages"])
        assert found_by_reading(texts, question) == answer
        works = {(name, told(texts, name, PLACE)) for name, _ in texts if name in PEOPLE}
        assert not works & town.never_together


def test_lesson_with_one_question_has_the_tokens_that_serving_would_give() -> None:
    tokenizer = starter.make_tokenizer(passages_reader.texts(), passages_reader.SHAPE.vocabulary_tokens)
    for scene, question in trained(Town(1), 3):
        lesson = passages_reader.lesson(tokenizer, scene, [question])
        row = passages_world.row(scene, question)
        prompt = documents.render(tokenizer, row["messages"][:1], row["documents"], add_generation_prompt=True)
        answer = [*tokenizer(question.answer)["input_ids"], tokenizer.eos_token_id]
        assert lesson.ids == [*prompt.input_ids, *answer]
        assert lesson.labels == [passages_reader.IGNORED] * len(prompt.input_ids) + answer
        assert lesson.positions == list(range(len(lesson.ids)))


def test_questions_of_a_lesson_see_the_documents_and_not_each_other() -> None:
    tokenizer = starter.make_tokenizer(passages_reader.texts(), passages_reader.SHAPE.vocabulary_tokens)
    scene, asked = Town(1).trained_scene(random.Random(1), 2, 1)
    lesson = passages_reader.lesson(tokenizer, scene, asked[:2])
    sees = passages_reader.batch([lesson], tokenizer.pad_token_id)["attention_mask"][0, 0] == 0
    start, second = lesson.segments.index(0), lesson.segments.index(1)
    assert sees[start - 1, :start].all()
    assert not sees[:start, start:].any()
    assert sees[-1, :start].all()
    assert not sees[-1, start:second].any()
    assert sees[-1, second:].all()
    assert lesson.positions[second] == lesson.positions[start] == start


def test_exam_begins_an_answer_as_the_template_does(tmp_path: Path) -> None:
    tokenizer = starter.make_tokenizer(passages_reader.texts(), passages_reader.SHAPE.vocabulary_tokens)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    starter.save(passages_reader.begin(tokenizer), tokenizer, tmp_path)
    examined = Examined(tmp_path)
    ((scene, question),) = trained(Town(1), 1)[:1]
    readings: tuple[Reading, ...] = ("full", "blocks", "none")
    for reading in readings:
        expected = tokenizer.decode(examined.expected((scene, question), reading))
        assert expected == f"<think>\n\n</think>\n\n{question.answer}<|im_end|>"


def test_mean_has_an_interval_over_seeds() -> None:
    found = passages.interval([0.5, 0.6, 0.7])
    assert found["mean"] == pytest.approx(0.6)
    assert found["half_width"] == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)  # two degrees of freedom
