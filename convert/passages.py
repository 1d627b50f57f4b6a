"""What reading documents by themselves costs in answers: the proof on which `serve.documents = "auto"` rests.

The data set's own questions are answered with their documents in place (full attention), and with each document read by
itself but for its first 0, 8 or 16 tokens. Both give a distribution over the next token along the first answer, and an
answer of their own, whose facts must be the same. The fewest tokens read again that keep to the limits, in every language,
are what serving may use. Main entry: `prove`.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.console import Progress
from appliance.errors import DataError
from appliance.recipe import Verify
from appliance.text import claims
from appliance.text.scores import chrf
from convert import conversations
from convert.conversations import Asked
from convert.divergence import log_softmax
from convert.stitched import Answer, CannotRead, Question, Reader

REREAD_TOKENS = (0, 8, 16)
LEAST_QUESTIONS = 20  # fewer prove nothing: one lost fact in twenty is five times the limit
ANSWER_TOKENS = 128
WORST_SHOWN = 5


@dataclass(slots=True)
class Sums:
    """Of one language, questions over one document or over several, one way of reading."""

    questions: int = 0
    divergences: list[float] = field(default_factory=list)  # nats, one for each token of full attention's answers
    agreed: int = 0
    same: int = 0
    chrf: float = 0.0
    facts: int = 0
    kept: int = 0
    expected: int = 0
    right: int = 0
    right_full: int = 0

    def result(self) -> dict[str, Any]:
        tokens = len(self.divergences)
        return {
            "questions": self.questions,
            "tokens": tokens,
            "kl_mean": math.fsum(self.divergences) / tokens,
            "same_top_ratio": self.agreed / tokens,
            "same_answers": self.same,
            "chrf": self.chrf / self.questions,
            "facts": self.facts,
            "facts_kept": self.kept,
            "expected_facts": self.expected,
            "right_facts": self.right,
            "right_facts_full": self.right_full,
        }


@dataclass(frozen=True, slots=True)
class Told:
    """Both answers to a question."""

    asked: Asked
    full: str
    apart: str
    divergences: Sequence[float]
    agreed: int

    def add_to(self, sums: Sums, language: str | None) -> int:
        """Counts it; returns how many facts were lost."""
        facts, kept = _kept(self.full, self.apart, language)
        expected, right = _kept(self.asked.answer, self.apart, language)
        sums.questions += 1
        sums.divergences += self.divergences
        sums.agreed += self.agreed
        sums.same += self.full == self.apart
        sums.chrf += chrf(self.apart, self.full)
        sums.facts += facts
        sums.kept += kept
        sums.expected += expected
        sums.right += right
        sums.right_full += _kept(self.asked.answer, self.full, language)[1]
        return facts - kept


def prove(file: Path, asked: Sequence[Asked], codes: Sequence[str], settings: Verify, context_tokens: int) -> dict[str, Any]:
    """Results for the certificate: figures of each reading by language, what is allowed, and why no more.

    Raises `DataError` when no question fits into the context with its documents and an answer.
    """
    limits = {"kl": settings.passages_kl_limit, "facts_lost": settings.passages_lost_limit, "questions": LEAST_QUESTIONS}
    try:
        with Reader(file, context_tokens, ANSWER_TOKENS) as reader:
            fitting = [each for each in asked if reader.fits(_question(each))]
            if not fitting:
                raise DataError(
                    f"None of the {len(asked)} questions over documents fits into {context_tokens} tokens"
                    f" (serve.context_tokens) with an answer of {ANSWER_TOKENS}; shorten the documents, or raise it."
                )
            groups = _grouped(fitting, codes, settings.passages_questions)
            readings, lost = _measure(reader, groups)
    except CannotRead as error:
        return {"limits": limits, "allowed_reread_tokens": None, "reason": f"this model cannot do otherwise: {error}"}
    allowed, reason = decide(readings, limits)
    return {
        "questions": sum(map(len, groups.values())),
        "left_out": len(asked) - len(fitting),
        "limits": limits,
        "readings": readings,
        "lost": lost,
        "allowed_reread_tokens": allowed,
        "reason": reason,
    }


def decide(readings: Mapping[str, Mapping[str, Mapping[str, Any]]], limits: Mapping[str, float]) -> tuple[int | None, str]:
    """The fewest tokens to read again with which every group keeps to the limits, None if that is none; and why."""
    first = next(iter(readings.values()))
    if (questions := sum(group["questions"] for group in first.values())) < limits["questions"]:
        return None, f"only {questions} questions have documents, and fewer than {limits['questions']:.0f} prove nothing"
    refused = []
    for reread, groups in readings.items():
        if not (problems := [said for name, group in groups.items() for said in _beyond(name, group, limits)]):
            return int(reread), f"with {reread} tokens of each document read again every language keeps to the limits"
        refused.append(f"with {reread} tokens read again {', '.join(problems)}")
    return None, "; ".join(refused)


def summary(results: Mapping[str, Any]) -> list[str]:
    """A line for each way of reading, and the decision."""
    lines = []
    for reread, groups in results.get("readings", {}).items():
        worst = max(groups.items(), key=lambda item: item[1]["kl_mean"])
        facts, kept = (sum(group[key] for group in groups.values()) for key in ("facts", "facts_kept"))
        lines.append(
            f"documents read by themselves, {reread:>2} tokens of each again: KL {worst[1]['kl_mean']:.4f} at most"
            f" ({worst[0]}), {kept} of {facts} facts kept"
        )
    allowed = results["allowed_reread_tokens"]
    lines.append(f"documents will be read {'in their place' if allowed is None else 'by themselves'}: {results['reason']}")
    return lines


def _measure(
    reader: Reader, groups: Mapping[str, Sequence[Asked]]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Figures by what was read again and by group; and answers that lost facts where nothing was."""
    sums: dict[int, dict[str, Sums]] = {reread: defaultdict(Sums) for reread in REREAD_TOKENS}
    lost: list[dict[str, Any]] = []
    pairs = [(group, asked) for group, members in groups.items() for asked in members]
    progress = Progress("verify: questions over documents", len(pairs))
    for done, (group, asked) in enumerate(pairs, 1):
        language = group.split()[0]
        full = reader.answer(_question(asked), None)
        for reread in REREAD_TOKENS:
            told = _compared(reader, asked, full, reread)
            losses = told.add_to(sums[reread][group], None if language == conversations.UNTOLD else language)
            if losses and reread == REREAD_TOKENS[0] and len(lost) < WORST_SHOWN:
                lost.append({"group": group, "in_place": told.full, "by_themselves": told.apart})
        progress.update(done)
    found = {str(reread): {name: each.result() for name, each in groups.items()} for reread, groups in sums.items()}
    return found, lost


def _compared(reader: Reader, asked: Asked, full: Answer, reread: int) -> Told:
    import numpy

    question = _question(asked)
    apart = reader.answer(question, reread, along=full.tokens)
    expected, found = log_softmax(full.logits), log_softmax(apart.logits)
    divergences = numpy.maximum((numpy.exp(expected) * (expected - found)).sum(axis=1, dtype=float), 0.0)
    agreed = int((found.argmax(axis=1) == numpy.array(full.tokens)).sum())
    # Where every token would have been chosen, the answer is the same.
    text = full.text if agreed == len(full.tokens) else reader.answer(question, reread).text
    return Told(asked, full.text, text, divergences.tolist(), agreed)


def _grouped(asked: Sequence[Asked], codes: Sequence[str], most: int) -> dict[str, list[Asked]]:
    """Questions by language, over one document or several; `most` of them in all, evenly of each."""
    groups: dict[str, list[Asked]] = {}
    for each in asked:
        name = f"{conversations.language_of(each.messages, codes)} {'one' if len(each.documents) == 1 else 'several'}"
        groups.setdefault(name, []).append(each)
    chosen: dict[str, list[Asked]] = {}
    left = most
    for index, name in enumerate(sorted(groups, key=lambda name: len(groups[name]))):  # small ones leave room to others
        members = groups[name]
        count = min(len(members), max(1, left // (len(groups) - index)))
        chosen[name] = [members[place * len(members) // count] for place in range(count)]
        left -= count
    return dict(sorted(chosen.items()))


def _question(asked: Asked) -> Question:
    return Question([dict(each) for each in asked.messages[:-1]], [dict(each) for each in asked.documents])


def _kept(text: str, other: str, language: str | None) -> tuple[int, int]:
    """How many facts a text has, and how many of them another; one without any is a fact as a whole."""
    facts = claims.find(text, language)
    if not facts:
        return 1, int(_folded(text) == _folded(other))
    among = claims.find(other, language)
    return len(facts), sum(claims.occurs(each, other, among) for each in facts)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _beyond(name: str, group: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    """What of a group is beyond the limits, in words."""
    problems = []
    if not group["kl_mean"] <= limits["kl"]:  # nor is what is no number
        problems.append(f"{name} differs by {group['kl_mean']:.3f} nats (at most {limits['kl']})")
    lost = 1 - group["facts_kept"] / group["facts"]
    if lost > limits["facts_lost"]:
        problems.append(f"{name} loses {lost:.1%} of {group['facts']} facts (at most {limits['facts_lost']:.1%})")
    return problems
