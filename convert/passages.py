"""What reading documents by themselves costs in answers: the proof on which `serve.documents = "auto"` rests.

The data set's own questions are answered with their documents in place (full attention), and with each document read by
itself but for its first 0, 8 or 16 tokens. Both give a distribution over the next token along the first answer, and an
answer of their own, whose facts must be the same. The fewest tokens read again that keep to the limits, in every language,
are what serving may use. Main entry: `prove`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.console import Progress
from appliance.errors import EnvironmentIncomplete, ModelFileError
from appliance.recipe import Verify
from convert import answer_facts, conversations
from convert.answer_facts import Sums
from convert.conversations import UNTOLD, Asked
from convert.divergence import log_softmax
from convert.stitched import Answer, CannotRead, Question, Reader

REREAD_TOKENS = (0, 8, 16)
LEAST_QUESTIONS = 20  # in all: fewer prove nothing
LEAST_SEVERAL = 5  # over several documents, in each language
COARSE_LIMIT = 0.1  # of the facts of one language's answers, which are few
ANSWER_TOKENS = 128
ROWS_AT_ONCE = 16  # of logits
LOST_SHOWN = 5
ONE, SEVERAL = "one", "several"

Groups = Mapping[str, Mapping[str, Any]]  # figures by language and number of documents, "nl several"


def prove(file: Path, asked: Sequence[Asked], codes: Sequence[str], settings: Verify, context_tokens: int) -> dict[str, Any]:
    """Results for the certificate: figures of each reading by language, what is allowed, and why no more.

    Where the file cannot be asked, nothing is allowed, and that is the reason: it can be served all the same.
    """
    limits = {"kl": settings.passages_kl_limit, "facts": settings.passages_lost_limit}
    try:
        with Reader(file, context_tokens, ANSWER_TOKENS) as reader:
            fitting = [each for each in asked if reader.fits(_question(each))]
            groups = grouped(fitting, codes, settings.passages_questions)
            measured = _measure(reader, groups)
    except (CannotRead, ModelFileError, EnvironmentIncomplete) as error:
        return {"limits": limits, "allowed_reread_tokens": None, "reason": str(error)}
    allowed, reason = decide(measured["readings"], codes, limits)
    if not fitting:
        reason = f"none of {len(asked)} questions fits into {context_tokens} tokens with an answer of {ANSWER_TOKENS}"
    chosen = [each for members in groups.values() for each in members]
    return {
        "questions": len(chosen),
        "held_out": sum(each.is_held_out for each in chosen),
        "left_out": len(asked) - len(fitting),
        "most_documents": max((len(each.documents) for each in chosen), default=0),
        "limits": limits,
        **measured,
        "allowed_reread_tokens": allowed,
        "reason": reason,
    }


def decide(readings: Mapping[str, Groups], codes: Sequence[str], limits: Mapping[str, float]) -> tuple[int | None, str]:
    """The fewest tokens to read again with which all keeps to the limits, None if that is none; and why."""
    refused = []
    for reread, groups in readings.items():
        if few := _too_few(groups, codes):
            return None, few
        if not (problems := [*_beyond(groups, limits)]):
            return int(reread), f"with {reread} tokens of each document read again every language keeps to the limits"
        refused.append(f"with {reread} tokens read again {', '.join(problems)}")
    return None, "; ".join(refused) or "nothing was measured"


def summary(results: Mapping[str, Any]) -> list[str]:
    """A line for each way of reading, and the decision."""
    lines = []
    for reread, groups in results.get("readings", {}).items():
        if not groups:
            continue
        worst = max(groups.items(), key=lambda item: item[1]["kl_mean"])
        facts = answer_facts.pooled(groups)
        lines.append(
            f"documents read by themselves, {reread:>2} tokens of each again: KL {worst[1]['kl_mean']:.4f} at most"
            f" ({worst[0]}), {facts['facts_kept']} of {facts['facts']} facts kept, {facts['facts_added']} others said"
        )
    allowed = results["allowed_reread_tokens"]
    lines.append(f"documents will be read {'in their place' if allowed is None else 'by themselves'}: {results['reason']}")
    return lines


def grouped(asked: Sequence[Asked], codes: Sequence[str], most: int) -> dict[str, list[Asked]]:
    """Questions by language, over one document or several; `most` of them in all, evenly of each, held-out ones first."""
    groups: dict[str, list[Asked]] = {}
    for each in asked:
        name = f"{conversations.language_of(each.messages, codes)} {ONE if len(each.documents) == 1 else SEVERAL}"
        groups.setdefault(name, []).append(each)
    chosen: dict[str, list[Asked]] = {}
    left = most
    for index, name in enumerate(sorted(groups, key=lambda name: len(groups[name]))):  # small ones leave room to others
        count = min(len(groups[name]), max(1, left // (len(groups) - index)))
        held_out = [each for each in groups[name] if each.is_held_out]
        trained = [each for each in groups[name] if not each.is_held_out]
        chosen[name] = [*_spread(held_out, count), *_spread(trained, count - len(held_out))]
        left -= count
    return dict(sorted(chosen.items()))


def _measure(reader: Reader, groups: Mapping[str, Sequence[Asked]]) -> dict[str, Any]:
    """Figures by what was read again and by group, questions that were refused, and answers that changed with nothing."""
    sums: dict[int, dict[str, Sums]] = {reread: {} for reread in REREAD_TOKENS}
    refused: Counter[str] = Counter()
    changed: list[dict[str, Any]] = []
    pairs = [(group, asked) for group, members in groups.items() for asked in members]
    progress = Progress("verify: questions over documents", len(pairs))
    for done, (group, asked) in enumerate(pairs, 1):
        language = None if group.split()[0] == UNTOLD else group.split()[0]
        full = reader.answer(_question(asked), None)
        for reread in REREAD_TOKENS:
            try:
                text, divergences, agreed = _compared(reader, asked, full, reread)
            except CannotRead as error:  # serving would read this one in place, too
                refused[str(error)] += 1
                continue
            counted = sums[reread].setdefault(group, Sums()).add(asked.answer, full.text, text, language)
            sums[reread][group].add_tokens(divergences, agreed)
            if counted and reread == REREAD_TOKENS[0] and len(changed) < LOST_SHOWN:
                changed.append({"group": group, "in_place": full.text, "by_themselves": text})
        progress.update(done)
    readings = {str(reread): {name: each.result() for name, each in found.items()} for reread, found in sums.items()}
    return {"readings": readings, "refused": dict(refused), "changed": changed}


def _compared(reader: Reader, asked: Asked, full: Answer, reread: int) -> tuple[str, list[float], int]:
    """The answer, divergences along the one with documents in place, how many of its tokens are the likeliest here."""
    import numpy

    question = _question(asked)
    apart = reader.answer(question, reread, along=full.tokens)
    divergences: list[float] = []
    for start in range(0, len(full.tokens), ROWS_AT_ONCE):
        expected, found = (log_softmax(each.logits[start : start + ROWS_AT_ONCE]) for each in (full, apart))
        each = (numpy.exp(expected) * (expected - found)).sum(axis=1, dtype=float)
        divergences += numpy.maximum(each, 0.0).tolist()
    agreed = int((apart.logits.argmax(axis=1) == numpy.array(full.tokens)).sum())
    # Where every token would have been chosen, the answer is the same.
    text = full.text if agreed == len(full.tokens) else reader.answer(question, reread).text
    return text, divergences, agreed


def _question(asked: Asked) -> Question:
    return Question([dict(each) for each in asked.messages[:-1]], [dict(each) for each in asked.documents])


def _spread(members: Sequence[Asked], count: int) -> list[Asked]:
    count = max(0, min(len(members), count))
    return [members[place * len(members) // count] for place in range(count)]


def _too_few(groups: Groups, codes: Sequence[str]) -> str:
    """Why nothing is proven, whatever the figures say; empty where enough was asked."""
    questions = sum(group["questions"] for group in groups.values())
    if questions < LEAST_QUESTIONS:
        return f"only {questions} questions over documents were answered, and fewer than {LEAST_QUESTIONS} prove nothing"
    several = {code: groups.get(f"{code} {SEVERAL}", {"questions": 0})["questions"] for code in codes}
    few = [f"{code} {count}" for code, count in several.items() if count < LEAST_SEVERAL]
    if few:
        return (
            f"questions over several documents are too few, of at least {LEAST_SEVERAL} in each language: {', '.join(few)}"
        )
    return ""


def _beyond(groups: Groups, limits: Mapping[str, float]) -> list[str]:
    """What is beyond the limits, in words."""
    problems = [
        f"{name} differs by {group['kl_mean']:.3f} nats (at most {limits['kl']})"
        for name, group in groups.items()
        if not group["kl_mean"] <= limits["kl"]  # nor is what is no number
    ]
    for name, group in groups.items():
        if (share := answer_facts.changed_share(group)) > max(COARSE_LIMIT, limits["facts"]):
            problems.append(f"{name} changes {share:.1%} of its {group['facts']} facts")
    every = answer_facts.pooled(groups)
    if (share := answer_facts.changed_share(every)) > limits["facts"]:
        problems.append(f"{share:.1%} of {every['facts']} facts are other ones (at most {limits['facts']:.1%})")
    fewer = every["right_facts_full"] - every["right_facts"]
    if fewer > limits["facts"] * every["expected_facts"]:
        problems.append(f"{fewer} of {every['expected_facts']} facts are not right any more (at most {limits['facts']:.1%})")
    return problems
