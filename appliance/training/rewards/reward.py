"""What a reward is: a function from answers, each with its own row, to one number for each."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Value = float | None  # None: the reward does not apply to this row


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row of the data: what is asked, and what its answers are held against."""

    line: int
    messages: Sequence[Mapping[str, str]]
    reference: str
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer with the row that it answers, so that no reward can take another's reference."""

    prompt: Prompt
    text: str


Score = Callable[[Sequence[Answer]], Any]


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward of a recipe. `score` may return anything; `malformed` says what is wrong with it."""

    name: str
    weight: float
    score: Score


def prompts(rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """The rows of a dataset's grpo.jsonl."""
    return [Prompt(row["line"], row["prompt"], row["reference"], row.get("columns", {})) for row in rows]


def malformed(found: Any, answers: int) -> str | None:
    """What keeps `found` from being one finite number (or None) for each of so many answers."""
    shape = tuple(getattr(found, "shape", ()))
    if len(shape) > 1:
        return f"returned a matrix of shape {shape} for {answers} answers; return one value for each, a list of numbers"
    try:
        values = None if isinstance(found, Iterator) else list(found)  # an iterator is empty after its first reading
    except TypeError:
        values = None
    if values is None:
        return f"returned {type(found).__name__} instead of a list with one value for each of {answers} answers"
    if len(values) != answers:
        return (
            f"returned {len(values)} value{'' if len(values) == 1 else 's'} for {answers} answers. Iterating over a matrix"
            " of similarities of shape (1, N) gives its one row, not N values: every answer would get the same reward, and"
            " nothing would be learned. Take that row (matrix[0]), or better compare each answer with its own reference"
        )
    for position, value in enumerate(values):
        try:
            number = 0.0 if value is None else float(value)
        except (TypeError, ValueError):
            return f"returned {_shown(value)} for answer {position + 1}, which is no number"
        if not math.isfinite(number):
            return f"returned {number} for answer {position + 1}; a reward is finite, or None where it does not apply"
    return None


def values(found: Any) -> list[Value]:
    """What a reward that is not malformed returned, as plain numbers."""
    return [None if value is None else float(value) for value in found]


def _shown(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 40 else f"{text[:40]}…"
