"""What a model could learn instead of the task: length, form, or a circumstance that few rows share."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from appliance.data import examples, personal
from appliance.data.texts import Text
from appliance.findings import Finding
from appliance.text import facts, premises
from appliance.text.words import telling

MINIMUM_TRIPLETS = 20
DECIDES = 0.75  # share of triplets that a shortcut gets right; a coin gets half
MUCH_LONGER = 1.5
RARE = 0.05  # of the rows
FEWEST_ROWS = 2
DOMINATES = 2.5  # times in a row, on average
ENDS_IN_ANSWERS = 2 / 3
OWN_SHARE = 0.8  # of all rows with the word
MINIMUM_ROWS = 40
MOST_CONCERNED = 0.25  # of the rows; where more have such a word, each row has a subject of its own
SAMPLE_ROWS = 20_000

FORMS: dict[str, Callable[[str], bool]] = {
    "a blank line": lambda text: "\n\n" in text,
    "a list": lambda text: re.search(r"^\s*(?:[-*•]|\d+[.)])\s", text, re.MULTILINE) is not None,
    "a question": lambda text: "?" in text or "؟" in text,
    "an exclamation mark": lambda text: "!" in text,
    "a figure": lambda text: any(character.isdecimal() for character in text),
    "bold type": lambda text: "**" in text,
}


def find(rows: Sequence[Text]) -> list[Finding]:
    """All shortcuts found."""
    triplets = [row for row in rows if row.kind == "dpo"]
    asked = [row for row in rows if row.kind in ("sft", "dpo", "kto", "grpo")]
    public = [row for row in rows if row.kind == "faq"]
    return [*_length(triplets), *_form(triplets), *_premise(asked, public), *_word(asked, public)]


def _length(triplets: Sequence[Text]) -> list[Finding]:
    if len(triplets) < MINIMUM_TRIPLETS:
        return []
    longer = sum(len(row.answer) > len(row.rejected) for row in triplets) / len(triplets)
    shorter = sum(len(row.answer) < len(row.rejected) for row in triplets) / len(triplets)
    if max(longer, shorter) < DECIDES:
        return []
    is_longer = longer > shorter
    ratios = [len(row.answer) / max(1, len(row.rejected)) for row in triplets]
    order = sorted(range(len(triplets)), key=lambda number: -ratios[number] if is_longer else ratios[number])
    middle = sorted(ratios)[len(ratios) // 2]
    much = sum(ratio >= MUCH_LONGER for ratio in ratios) / len(ratios)
    word = "longer" if is_longer else "shorter"
    return [
        Finding(
            kind="length_shortcut",
            level="problem",
            what=f"Chosen is {word} than rejected in {max(longer, shorter):.1%} of {len(triplets):,} triplets"
            f" (by half or more in {much:.1%}; median ratio {middle:.2f}), so length alone nearly wins",
            remedy="Write rejected answers of the same length, or drop the most unequal triplets; accuracy in training means"
            f" nothing above {max(longer, shorter):.0%}.",
            count=sum((ratio > 1) == is_longer and ratio != 1 for ratio in ratios),
            examples=examples.of(triplets[number] for number in order),
            figures={"share": max(longer, shorter), "by_half_or_more": much, "median_ratio": middle},
        )
    ]


def _form(triplets: Sequence[Text]) -> list[Finding]:
    """Signs that by themselves tell chosen from rejected, one finding for all."""
    told = []
    for name, has in FORMS.items():
        only_chosen = [row for row in triplets if has(row.answer) and not has(row.rejected)]
        only_rejected = sum(has(row.rejected) and not has(row.answer) for row in triplets)
        # Where neither or both have it, the sign decides nothing: half of those are right.
        right = (len(only_chosen) + (len(triplets) - len(only_chosen) - only_rejected) / 2) / max(1, len(triplets))
        if len(triplets) >= MINIMUM_TRIPLETS and right >= DECIDES:
            told.append((right, name, only_chosen))
    if not told:
        return []
    told.sort(key=lambda each: -each[0])
    parts = [f"{name} in {len(rows):,} chosen answers and not in the rejected one" for _, name, rows in told]
    return [
        Finding(
            kind="form_shortcut",
            level="notice",
            what=f"A sign of form tells chosen from rejected: {examples.listed(parts)}",
            remedy="Give rejected answers the same form, or the form is all that is learned.",
            count=len(told[0][2]),
            examples=examples.of(told[0][2]),
            figures={"right_by_it_alone": told[0][0]},
        )
    ]


def _premise(rows: Sequence[Text], faq: Sequence[Text]) -> list[Finding]:
    """Circumstances of a person that only a few rows state, in whatever languages; a finding each."""
    if len(rows) < MINIMUM_ROWS:
        return []
    stating: dict[str, list[tuple[Text, set[str]]]] = {}
    for row in rows:
        for name, named in premises.stated(row.asked).items():
            stating.setdefault(name, []).append((row, named))
    findings = []
    for name, each in sorted(stating.items(), key=lambda item: (len(item[1]), item[0])):
        if FEWEST_ROWS <= len(each) <= RARE * len(rows):
            holders = [row for row, _ in each]
            words = sorted({word for _, named in each for word in named})[:4]
            what = f"A circumstance that few rows share: {name} in {len(each)} of {len(rows):,} rows ({', '.join(words)})"
            findings.append(_rare("rare_premise", what + _same_address(holders, [*rows, *faq]), holders))
    return findings


def _same_address(rows: Sequence[Text], every: Sequence[Text]) -> str:
    """The address that the answers to these rows go to, if most go to one; told only where it is no secret."""
    counts = Counter(name for row in rows for name in _addresses(row))
    (name, count), *_ = [*counts.most_common(1), ("", 0)]
    if count < max(2, ENDS_IN_ANSWERS * len(rows)):
        return ""
    number = name.rpartition(" ")[2]
    holders = [row for row in every if number in row.answer and name in _addresses(row)]
    return f", and {count} of their answers give {name if personal.is_public(holders) else 'one address'}"


def _addresses(row: Text) -> set[str]:
    return {str(each) for each in facts.addresses(row.answer)}


def _word(rows: Sequence[Text], faq: Sequence[Text]) -> list[Finding]:
    """Words that dominate a few rows, in question and answer, and hardly occur elsewhere.

    A word is only told where the FAQ has it: it may be somebody's name.
    """
    rows = rows[:: -(-len(rows) // SAMPLE_ROWS)] if rows else rows
    if len(rows) < MINIMUM_ROWS:
        return []
    times: Counter[str] = Counter()
    anywhere: Counter[str] = Counter()
    asked: dict[str, list[Text]] = {}
    for row in rows:
        counts = Counter(telling(row.whole))
        times.update(counts)
        anywhere.update(counts.keys())
        for word in set(telling(row.asked)):
            asked.setdefault(word, []).append(row)
    slices = []
    for word, holders in asked.items():
        is_few = FEWEST_ROWS <= len(holders) <= RARE * len(rows) and len(holders) >= OWN_SHARE * anywhere[word]
        if not is_few or times[word] < DOMINATES * len(holders):
            continue
        if sum(word in telling(row.answer) for row in holders) >= ENDS_IN_ANSWERS * len(holders):
            slices.append((times[word] / len(holders), word, holders))
    concerned_rows = {id(row) for _, _, holders in slices for row in holders}
    if not slices or len(concerned_rows) > MOST_CONCERNED * len(rows):
        return []
    slices.sort(key=lambda each: (-each[0], each[1]))
    public = {word for row in faq for word in telling(row.whole)}
    parts = [
        (f'"{word}"' if word in public else "one")
        + f" in {len(holders)} rows, {often:.1f} times each ({', '.join(examples.of(holders)[:3])})"
        for often, word, holders in slices
    ]
    concerned = [row for _, _, holders in slices for row in holders]
    return [
        _rare("rare_word", f"Words dominate few rows and end up in their answers: {examples.listed(parts, 8)}", concerned)
    ]


def _rare(kind: str, what: str, concerned: Sequence[Text]) -> Finding:
    return Finding(
        kind=kind,
        level="notice",
        what=what,
        remedy="A model may come to assume it of everybody: add rows of the same question without it, or take these out, and"
        " test with questions that do not mention it.",
        count=len({id(row) for row in concerned}),
        examples=examples.of(concerned),
    )
