"""Which language each row is in, answers in another language than their question, and answers hard to read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from appliance.data import examples
from appliance.data.texts import Text
from appliance.findings import Finding
from appliance.text import languages, readability

SAMPLE_ROWS = 10_000
MINIMUM_ANSWERS = 10


@dataclass(frozen=True, slots=True)
class Spoken:
    """Languages by row (of its answer, else of its question), and what was found."""

    of_row: Sequence[str]
    counts: Mapping[str, Mapping[str, int]]  # file -> language -> rows
    findings: Sequence[Finding]


@dataclass(frozen=True, slots=True)
class Reading:
    """How hard the answers of one language are to read."""

    language: str
    method: str
    answers: int
    median_score: float | None
    hard_share: float | None
    hardest: Sequence[str]


def listen(rows: Sequence[Text], spoken: Sequence[str]) -> Spoken:
    """Detects the language of each question and answer; `spoken` are the recipe's."""
    of_row, mixed, undeclared = [], [], []
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        answer, question = languages.hear(row.answer, spoken), languages.hear(row.asked, spoken)
        either = answer or question
        of_row.append(either[0] if either else languages.UNKNOWN)
        counts.setdefault(row.file, Counter())[of_row[-1]] += 1
        is_long = min(len(row.answer), len(row.asked)) >= languages.SURE_CHARACTERS
        if is_long and answer and question and answer[0] != question[0] and min(answer[1], question[1]) >= languages.SURE:
            mixed.append((row, question[0], answer[0]))
        if answer and answer[0] not in spoken:
            undeclared.append((row, answer[0]))
    return Spoken(of_row, counts, [*_mixed(mixed), *_undeclared(undeclared, spoken)])


def _mixed(rows: Sequence[tuple[Text, str, str]]) -> list[Finding]:
    if not rows:
        return []
    kinds = Counter(f"{question} answered in {answer}" for _, question, answer in rows)
    parts = [f"{kind} {count:,}" for kind, count in kinds.most_common()]
    return [
        Finding(
            kind="answer_in_another_language",
            level="problem",
            what=f"The answer is in another language than the question in {examples.rows(len(rows))}:"
            f" {examples.listed(parts)}",
            remedy="Look at each: rewrite the answer in the language of the question, unless it asked for a translation.",
            count=len(rows),
            examples=examples.of(row for row, _, _ in rows),
        )
    ]


def _undeclared(rows: Sequence[tuple[Text, str]], spoken: Sequence[str]) -> list[Finding]:
    if not rows:
        return []
    parts = [f"{language} {count:,}" for language, count in Counter(language for _, language in rows).most_common()]
    return [
        Finding(
            kind="undeclared_language",
            level="notice",
            what=f"The answer is in a language that the recipe does not name in {examples.rows(len(rows))}:"
            f" {examples.listed(parts)}",
            remedy=f"Add it to languages (now {', '.join(spoken)}), so that it is measured too, or take the rows out.",
            count=len(rows),
            examples=examples.of(row for row, _ in rows),
        )
    ]


def read(rows: Sequence[Text], of_row: Sequence[str]) -> tuple[list[Reading], list[Finding]]:
    """Readability of the answers by language, of a sample where there are many."""
    by_language: dict[str, list[Text]] = {}
    for row, language in zip(rows, of_row, strict=True):
        by_language.setdefault(language, []).append(row)
    readings = [
        _reading(language, each[:: -(-len(each) // SAMPLE_ROWS)])
        for language, each in sorted(by_language.items())
        if language != languages.UNKNOWN
    ]
    return readings, [finding for each in readings for finding in _hard(each)]


def _reading(language: str, rows: Sequence[Text]) -> Reading:
    name = readability.method_name(language)
    scored = [(score, row) for row in rows if (score := readability.score(row.answer, language)) is not None]
    if not scored:
        return Reading(language, name, len(rows), None, None, [])
    method = readability.METHODS[language]
    scored.sort(key=lambda each: each[0], reverse=method.better == "lower")
    hard = [row for score, row in scored if method.is_hard(score)]
    middle = median(score for score, _ in scored)
    return Reading(language, name, len(rows), middle, len(hard) / len(scored), examples.of(hard))


def _hard(reading: Reading) -> list[Finding]:
    """A finding where half of the answers are hard."""
    if reading.hard_share is None or reading.hard_share < 0.5 or reading.answers < MINIMUM_ANSWERS:
        return []
    return [
        Finding(
            kind="hard_to_read",
            level="notice",
            what=f"{reading.hard_share:.0%} of the answers in {reading.language} are hard to read by {reading.method}"
            f" (median {reading.median_score:.0f}, limit {readability.METHODS[reading.language].hard:.0f})",
            remedy="Shorter sentences and words, if your readers need them; the score only counts syllables and words.",
            count=round(reading.hard_share * reading.answers),
            examples=reading.hardest,
        )
    ]
