"""A small made-up town to ask about: what stands in its documents is drawn anew for every scene, so that only reading helps.

A scene is a handful of documents, each about one place or one person, and questions over them: answered by one document,
by two (the phone of the place where Anna works), or by comparing two. Some combinations are held back: a name and what is
asked of it, a person and their place, two places compared. `trained_scene` never has them, every question of
`held_back_questions` is one.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal

Kind = Literal["one document", "two documents", "comparison", "one, in a word", "two, in a word"]
KINDS: tuple[Kind, ...] = ("one document", "two documents", "comparison", "one, in a word", "two, in a word")
IN_A_WORD: Mapping[str, Kind] = {"one document": "one, in a word", "two documents": "two, in a word"}
PLACES = (
    "Anchor", "Beacon", "Castle", "Dolphin", "Eagle", "Falcon", "Garden", "Harbour", "Island", "Jasmine", "Kettle",
    "Lantern", "Meadow", "Nest", "Orchard", "Pillar", "Quarry", "Raven", "Saddle", "Tower", "Umbrella", "Valley", "Willow",
    "Zebra",
)  # fmt: skip
PEOPLE = (
    "Anna", "Boris", "Clara", "David", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Katja", "Lukas",
    "Maria", "Nico", "Olga", "Pavel", "Rosa", "Samir", "Teresa", "Umar", "Vera", "Walter", "Yasmin", "Zoltan",
)  # fmt: skip
STREETS = ("Birch", "Canal", "Church", "Copper", "Forest", "King", "Market", "Mill", "North", "River", "School", "Station")
COLOURS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "red", "white", "yellow")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DISHES = ("apples", "beans", "bread", "cake", "cheese", "eggs", "honey", "milk", "onions", "pasta", "rice", "soup")
HOURS = DIGITS[1:]
STREET, HOUR, PHONE, COLOUR = "street", "hour", "phone", "colour"  # of a place
PLACE, DAY, DISH = "place", "day", "dish"  # of a person
STATEMENTS: Mapping[str, str] = {
    STREET: "{} stands in {}.",
    HOUR: "{} opens at {}.",
    PHONE: "{} has phone {}.",
    COLOUR: "{} is painted {}.",
    PLACE: "{} works at {}.",
    DAY: "{} comes on {}.",
    DISH: "{} brings {}.",
}
QUESTIONS: Mapping[str, Sequence[str]] = {
    STREET: ("Where is {}?", "In which street is {}?"),
    HOUR: ("When does {} open?", "From when is {} open?"),
    PHONE: ("What is the phone of {}?", "Which phone has {}?"),
    COLOUR: ("What colour is {}?", "How is {} painted?"),
    PLACE: ("Where does {} work?", "Which place has {}?"),
    DAY: ("When does {} come?", "Which day has {}?"),
    DISH: ("What does {} bring?", "Which dish has {}?"),
}
OF_PLACES, OF_PEOPLE = (STREET, HOUR, PHONE, COLOUR), (PLACE, DAY, DISH)
BRIEFLY = "In a word, {}"
WHERE_WORKS = "the place of {}"
COMPARED = "{} opens at {}, {} opens at {}, so {}."
COMPARISON = "Which opens earlier, {} or {}?"
HELD_BACK = 0.2  # of all combinations of a sort
MOST_PLACES = 4


@dataclass(frozen=True, slots=True)
class Question:
    """`subjects` are the documents that hold the answer, in the order in which they are needed."""

    kind: Kind
    text: str
    answer: str
    subjects: tuple[str, ...]
    attribute: str


@dataclass(frozen=True, slots=True)
class Scene:
    """`facts` by name and attribute; `documents` are pairs of name and text in the order in which they stand."""

    facts: Mapping[str, Mapping[str, str]]
    documents: Sequence[tuple[str, str]]

    @property
    def places(self) -> Sequence[str]:
        return [name for name, _ in self.documents if name in PLACES]

    @property
    def people(self) -> Sequence[str]:
        return [name for name, _ in self.documents if name in PEOPLE]


class Town:
    """Which combinations are held back; all of it follows from `seed`."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(f"town {seed}")
        asked = [*product(PLACES, OF_PLACES), *product(PEOPLE, OF_PEOPLE)]
        self.never_asked = _part(asked, chance)
        self.never_together = _part([*product(PEOPLE, PLACES)], chance)
        self.never_compared = _part([*combinations(PLACES, 2)], chance)

    def is_held_back(self, question: Question) -> bool:
        """Whether training has not asked it."""
        if question.kind == "comparison":
            return tuple(sorted(question.subjects)) in self.never_compared
        person, place = question.subjects[0], question.subjects[-1]
        return (place, question.attribute) in self.never_asked or (person, place) in self.never_together

    def trained_scene(self, chance: random.Random, places: int, people: int) -> tuple[Scene, Sequence[Question]]:
        """Documents, and every question over them that may be trained, in random order."""
        found = scene(chance, chance.sample(PLACES, places), chance.sample(PEOPLE, people), self.never_together)
        asked = [each for each in questions(found, chance) if not self.is_held_back(each)]
        chance.shuffle(asked)
        return found, asked

    def held_back_questions(
        self, chance: random.Random, kind: Kind, places: int, people: int
    ) -> Iterator[tuple[Scene, Question]]:
        """Scenes with one question each, of combinations that no trained scene has; without end."""
        while True:
            found = scene(chance, chance.sample(PLACES, places), chance.sample(PEOPLE, people))
            held = [each for each in questions(found, chance) if each.kind == kind and self._is_tested(each)]
            if held:
                yield found, chance.choice(held)

    def _is_tested(self, question: Question) -> bool:
        """Of two documents the person must be new at the place: that is what makes the combination."""
        if len(question.subjects) == 2 and question.kind != "comparison":
            return question.subjects in self.never_together
        return self.is_held_back(question)


def scene(
    chance: random.Random,
    places: Sequence[str],
    people: Sequence[str],
    never_together: frozenset[tuple[str, ...]] = frozenset(),
) -> Scene:
    """Draws every fact, no two places or people alike in any of them but where they work; documents in random order."""
    drawn: dict[str, Sequence[str]] = {
        STREET: [f"{name} Street" for name in chance.sample(STREETS, len(places))],
        HOUR: chance.sample(HOURS, len(places)),
        PHONE: [f"{first} {chance.choice(DIGITS)}" for first in chance.sample(DIGITS, len(places))],
        COLOUR: chance.sample(COLOURS, len(places)),
        DAY: chance.sample(DAYS, len(people)),
        DISH: chance.sample(DISHES, len(people)),
    }
    facts = {name: {attribute: drawn[attribute][at] for attribute in OF_PLACES} for at, name in enumerate(places)}
    for at, name in enumerate(people):
        allowed = [place for place in places if (name, place) not in never_together]
        # A person for whom no place is left works elsewhere; nothing is asked about that place.
        works_at = chance.choice(allowed or [each for each in PLACES if (name, each) not in never_together])
        facts[name] = {PLACE: works_at, DAY: drawn[DAY][at], DISH: drawn[DISH][at]}
    documents = [(name, _told(name, facts[name], chance)) for name in chance.sample([*facts], len(facts))]
    return Scene(facts, documents)


def questions(found: Scene, chance: random.Random) -> list[Question]:
    """All that can be asked about a scene, each in a wording by chance, and to be answered in a sentence or in a word."""
    facts = found.facts
    asked = [
        each
        for name, known in facts.items()
        for attribute, value in known.items()
        for each in _both_ways("one document", name, (name,), attribute, value, chance)
    ]
    for person in found.people:
        place = facts[person][PLACE]
        for attribute, value in facts.get(place, {}).items():
            asked += _both_ways("two documents", WHERE_WORKS.format(person), (person, place), attribute, value, chance)
    for pair in combinations(found.places, 2):
        one, other = chance.sample(pair, 2)
        hours = [facts[name][HOUR] for name in (one, other)]
        earlier = one if HOURS.index(hours[0]) < HOURS.index(hours[1]) else other
        answer = COMPARED.format(one, hours[0], other, hours[1], earlier)
        asked.append(Question("comparison", COMPARISON.format(one, other), answer, (one, other), HOUR))
    return asked


def _both_ways(
    kind: Kind, subject: str, subjects: tuple[str, ...], attribute: str, value: str, chance: random.Random
) -> list[Question]:
    texts = [chance.choice(QUESTIONS[attribute]).format(subject) for _ in range(2)]
    return [
        Question(kind, texts[0], said(subjects[-1], attribute, value), subjects, attribute),
        Question(IN_A_WORD[kind], BRIEFLY.format(texts[1]), value, subjects, attribute),
    ]


def said(name: str, attribute: str, value: str) -> str:
    return STATEMENTS[attribute].format(name, value)


def row(found: Scene, question: Question) -> dict[str, Any]:
    """As a row of training data."""
    return {
        "messages": [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}],
        "documents": [{"id": name, "text": text} for name, text in found.documents],
    }


def sentences() -> list[str]:
    """Every word that any scene can have, for a tokenizer: each often enough to become one token."""
    chance = random.Random(0)
    found = []
    for _ in range(1000):
        each = scene(chance, chance.sample(PLACES, MOST_PLACES), chance.sample(PEOPLE, 3))
        found += [text for _, text in each.documents]
        found += [text for question in questions(each, chance) for text in (question.text, question.answer)]
    return found


def _told(name: str, known: Mapping[str, str], chance: random.Random) -> str:
    return " ".join(said(name, attribute, known[attribute]) for attribute in chance.sample([*known], len(known)))


def _part(every: Sequence[tuple[str, ...]], chance: random.Random) -> frozenset[tuple[str, ...]]:
    return frozenset(chance.sample(every, round(HELD_BACK * len(every))))
