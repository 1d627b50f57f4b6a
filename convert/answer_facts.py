"""Whether two answers say the same: their facts, counted over many questions."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from appliance.text import claims
from appliance.text.scores import chrf

ALIKE = 70.0  # chrF from which two answers without any claim count as one
SURE = 1.645  # standard errors: one side, 95 of 100
COUNTED = ("questions", "facts", "facts_kept", "facts_added", "expected_facts", "right_facts", "right_facts_full")


@dataclass(slots=True)
class Sums:
    """Of one language, questions over one document or over several, and one way of reading."""

    divergences: list[float] = field(default_factory=list)  # nats, one for each token of the answers with documents in place
    agreed: int = 0
    same: int = 0
    chrf: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, expected: str, full: str, apart: str, language: str | None) -> int:
        """Counts an answer beside the one with documents in place; returns how many facts are other ones."""
        facts, kept = found_in(full, apart, language)
        said, also_full = found_in(apart, full, language)
        wanted, right = found_in(expected, apart, language)
        self.same += full == apart
        self.chrf += chrf(apart, full)
        figures = (1, facts, kept, said - also_full, wanted, right, found_in(expected, full, language)[1])
        self.counts.update(dict(zip(COUNTED, figures, strict=True)))
        return facts - kept + said - also_full

    def add_tokens(self, divergences: Sequence[float], agreed: int) -> None:
        self.divergences += divergences
        self.agreed += agreed

    def result(self) -> dict[str, Any]:
        tokens, counts = len(self.divergences), {name: self.counts[name] for name in COUNTED}
        return {
            **counts,
            "tokens": tokens,
            "kl_mean": math.fsum(self.divergences) / tokens,
            "same_top_ratio": self.agreed / tokens,
            "same_answers": self.same,
            "chrf": self.chrf / counts["questions"],
        }


def found_in(text: str, other: str, language: str | None) -> tuple[int, int]:
    """How many facts a text has, and how many of them another; one without any is a fact as a whole."""
    facts = claims.find(text, language)
    if not facts:
        return 1, int(_words(text) == _words(other) or chrf(other, text) >= ALIKE)
    among = claims.find(other, language)
    return len(facts), sum(claims.occurs(each, other, among) for each in facts)


def pooled(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """What was counted, of all groups together."""
    return {name: sum(group[name] for group in groups.values()) for name in COUNTED}


def changed_share(counts: Mapping[str, Any]) -> float:
    """Facts that were lost, and others said instead or besides, to those of the answers with documents in place."""
    lost, added = counts["facts"] - counts["facts_kept"], counts["facts_added"]
    return float((lost + added) / counts["facts"])


def at_most(counts: Mapping[str, Any]) -> float:
    """What the share of lost facts hardly exceeds, with so few seen: one-sided bound of 95 % (Wilson, 1927)."""
    total = counts["facts"]
    share, square = 1 - counts["facts_kept"] / total, SURE**2
    spread = SURE * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    return float((share + square / (2 * total) + spread) / (1 + square / total))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
