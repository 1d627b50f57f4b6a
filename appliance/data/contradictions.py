"""Facts on which rows disagree, true facts that preferences push down, and facts that most answers end in.

An address of the FAQ is true. Where the FAQ is silent, what `USUAL_ROWS` answers say, and few contradict, counts as true.
What is not true is not shown: it may be where somebody lives. Nor are an address and a number that only few rows give.
"""

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from appliance.data import examples, personal
from appliance.data.texts import Text
from appliance.findings import Finding
from appliance.text import facts
from appliance.text.facts import Address

USUAL_ROWS = personal.SHARED_ROWS + 1
FEW = 0.25  # of those who say otherwise
MANY_ANSWERS = 0.1
MINIMUM_ANSWERS = 20

POSTCODE = " postcode"  # ends the subject that an address's postcode is

Values = dict[str, dict[str, list[Text]]]  # subject -> value -> rows that state it


@dataclass(frozen=True, slots=True)
class Stated:
    """What answers and the FAQ state: house numbers by street, postcodes by address."""

    answers: Values = field(default_factory=dict)
    faq: Values = field(default_factory=dict)

    def wrong(self) -> Iterable[tuple[str, str, list[Text], str]]:
        """Subject, value, the rows that state it, and what contradicts it."""
        for subject, values in self.answers.items():
            right, source = self.right(subject)
            for value, rows in values.items():
                if right and not any(facts.agree(value, each) for each in right):
                    yield subject, value, rows, source

    def right(self, subject: str) -> tuple[set[str], str]:
        """The true values of a subject, and who says so; none where it is not known."""
        if known := self.faq.get(subject):
            return set(known), f"the FAQ says {' or '.join(sorted(known))}"
        values = {value: len(rows) for value, rows in self.answers.get(subject, {}).items()}
        most = max(values.values(), default=0)
        usual = {value for value, count in values.items() if count >= USUAL_ROWS and count > FEW * most}
        said = ", ".join(f"{values[value]:,} say {value}" for value in sorted(usual))
        return usual, said

    def true(self, address: Address) -> str | None:
        """The true address that a text gives, if it does, as the FAQ or most answers have it."""
        numbers = sorted(each for each in self.right(address.street)[0] if facts.agree(address.number, each))
        return f"{string.capwords(address.street)} {numbers[0]}" if numbers else None


def find(rows: Sequence[Text], regions: Sequence[str]) -> list[Finding]:
    """All findings about facts."""
    addresses = {id(row): facts.addresses(row.answer) for row in rows}
    stated = _collect(rows, addresses)
    return [*_contradicting(stated), *_pushed_down(rows, stated), *_everywhere(rows, addresses, regions)]


def _collect(rows: Sequence[Text], addresses: Mapping[int, Sequence[Address]]) -> Stated:
    stated = Stated()
    for row in rows:
        values = stated.faq if row.kind == "faq" else stated.answers
        told = [(each.street, each.number) for text in row.documents for each in facts.addresses(text)]
        for address in addresses[id(row)]:
            if (address.street, address.number) in told:
                continue  # what the answer rests on says so, and may say otherwise elsewhere
            _note(values, address.street, address.number, row)
            if postcode := facts.postcode_of(address, row.answer):
                _note(values, f"{address}{POSTCODE}", postcode, row)
    return stated


def _note(values: Values, subject: str, value: str, row: Text) -> None:
    rows = values.setdefault(subject, {}).setdefault(value, [])
    if not rows or rows[-1] is not row:
        rows.append(row)


def _contradicting(stated: Stated) -> list[Finding]:
    wrong = sorted(stated.wrong(), key=lambda each: -len(each[2]))
    if not wrong:
        return []
    parts = [_said(*each) for each in wrong]
    count = len({id(row) for _, _, rows, _ in wrong for row in rows})
    return [
        Finding(
            kind="contradicting_facts",
            level="problem",
            what=f"Answers contradict the FAQ or each other: {examples.listed(parts)}",
            remedy="Find out which is true and correct the rows; a model learns whichever it reads, and mixes them.",
            count=count,
            examples=examples.of(row for _, _, rows, _ in wrong for row in rows),
            figures={"contradictions": len(wrong)},
        )
    ]


def _said(subject: str, value: str, rows: Sequence[Text], source: str) -> str:
    """What a single answer says may be where a client lives; what several say is the organisation's, and shown."""
    street = subject.removesuffix(POSTCODE)
    if subject != street:
        name = f"{street} with postcode {value}" if len(rows) > 1 else f"{street} with another postcode"
    else:
        name = f"{string.capwords(street)} {value if len(rows) > 1 else 'with another number'}"
    return f"{name} in {examples.rows(len(rows))} ({_lines(rows)}), {source}"


def _lines(rows: Sequence[Text]) -> str:
    return ", ".join(examples.of(rows)[:3]) + (" …" if len(rows) > 3 else "")


def _pushed_down(rows: Sequence[Text], stated: Stated) -> list[Finding]:
    told: dict[str, int] = {}
    found, alone = [], 0
    for row in rows:
        given = facts.addresses(row.rejected) if row.rejected else []
        true = {name: each.street for each in given if (name := stated.true(each))}
        if not true:
            continue
        found.append(row)
        chosen = {each.street for each in facts.addresses(row.answer)}
        alone += any(street not in chosen for street in true.values())
        for name in true:
            told[name] = told.get(name, 0) + 1
    if not found:
        return []
    named = [f"{name} in {count:,}" for name, count in sorted(told.items(), key=lambda item: (-item[1], item[0]))]
    return [
        Finding(
            kind="true_facts_rejected",
            level="problem",
            what=f"A correct address stands in the rejected answer of {examples.rows(len(found))}: {examples.listed(named)}."
            f" In {alone:,} of them the chosen answer does not give it",
            remedy="Preferences push down what is rejected, true or not: leave the address out of the rejected answer, or"
            " make it the wrong one.",
            count=len(found),
            examples=examples.of(found),
            figures={"not_in_chosen": alone},
        )
    ]


def _everywhere(rows: Sequence[Text], addresses: Mapping[int, Sequence[Address]], regions: Sequence[str]) -> list[Finding]:
    """An address or telephone number that a great part of all answers gives, whatever was asked."""
    answers = sum(row.kind != "faq" for row in rows)
    if answers < MINIMUM_ANSWERS:
        return []
    givers: dict[str, list[Text]] = {}
    secret: dict[str, str] = {}  # what is said of those that are not
    for row in rows:
        for name, kind in _given(row, addresses[id(row)], regions):
            givers.setdefault(name, []).append(row)
            secret[name] = kind
    many = []
    for name, holders in givers.items():
        given = [row for row in holders if row.kind != "faq"]
        if len(given) >= MANY_ANSWERS * answers:
            many.append((name if personal.is_public(holders) else secret[name], given))
    if not many:
        return []
    many.sort(key=lambda item: -len(item[1]))
    parts = [f"{name} in {len(each):,} of {answers:,} answers" for name, each in many]
    return [
        Finding(
            kind="fact_in_many_answers",
            level="notice",
            what=f"The same fact ends many answers: {examples.listed(parts)}",
            remedy="A model that has seen it so often says it of other places too: add rows with other answers, and let the"
            " knowledge base supply addresses.",
            count=len(many[0][1]),
            examples=examples.of(many[0][1]),
            figures={"share": len(many[0][1]) / answers},
        )
    ]


def _given(row: Text, addresses: Sequence[Address], regions: Sequence[str]) -> Iterable[tuple[str, str]]:
    """What an answer gives, and what to call it where it may not be shown."""
    text = row.everything if row.kind == "faq" else row.answer
    yield from ((name, "an address") for name in {str(each) for each in addresses})
    yield from ((phone.number, "a telephone number") for phone in facts.phones(text, regions))
