"""Documents in a prompt: where they lie, in which order they stand, and how the cells of what was read apart are known.

The cells of a token depend on what was read before it, so prefixes are known by all their tokens. A document that was read
by itself has other cells than the same text behind a system prompt, and a prompt put together from such cells has others
than one that was read from its beginning. Their tokens are known by other numbers, so that they are never taken for each
other: whatever compares tokens (the prefix cache, slots, files) need not know of documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST_LOOKUPS = 128  # of what is known, for one prompt: each takes a tenth of a millisecond, and answers wait meanwhile
# Above any token id, of 31 bits. What is read again (up to 2^14 tokens of each document) makes other cells, too.
_ALONE, _STITCHED, _BEGINS = 1 << 60, 1 << 59, 1 << 58
_REREAD_SHIFT = 32


@dataclass(frozen=True, slots=True)
class Passages:
    """`bounds` are positions in the prompt: of each document's first token, and of what follows the last.

    `scores` say how relevant each is; None where nobody said, and then its place is not for us to choose.
    """

    bounds: tuple[int, ...]
    scores: tuple[float | None, ...]

    @property
    def start(self) -> int:
        return self.bounds[0]

    @property
    def end(self) -> int:
        return self.bounds[-1]

    @property
    def spans(self) -> Sequence[tuple[int, int]]:
        return list(zip(self.bounds[:-1], self.bounds[1:], strict=True))


def alone(tokens: Sequence[int]) -> tuple[int, ...]:
    """How a document is known that was read by itself."""
    return tuple(_ALONE | token for token in tokens)


def is_alone(known: Sequence[int]) -> bool:
    """Whether this is what `alone` made."""
    return bool(known) and bool(known[0] & _ALONE)


def is_stitched(known: Sequence[int]) -> bool:
    """Whether this is what `stitched` made, or ends so."""
    return bool(known) and bool(known[-1] & _STITCHED)


def texts(known: Sequence[int]) -> list[int]:
    """The token ids behind what `alone` made, or ordinary ones."""
    return [token & ~_ALONE for token in known]


def mark(reread_tokens: int) -> int:
    """What makes the number of a token that stands behind the beginning of the first document."""
    return _STITCHED | reread_tokens << _REREAD_SHIFT


def stitched(tokens: Sequence[int], passages: Passages, reread_tokens: int) -> tuple[int, ...]:
    """How a prompt is known whose documents were read by themselves, but for the first `reread_tokens` of each."""
    marks = mark(reread_tokens)
    known = [*tokens[: passages.start], *(marks | token for token in tokens[passages.start :])]
    for at in passages.bounds:
        if at < len(known):
            known[at] |= _BEGINS
    return tuple(known)


def arranged(
    tokens: Sequence[int], passages: Passages, tolerance: float, known_length: Callable[[Sequence[int]], int]
) -> tuple[tuple[int, ...], Passages]:
    """The prompt with its documents in the order that makes the most of what is known, as far as their scores allow it.

    A document may stand before one that is more relevant by no more than `tolerance` of the range of all scores.
    `known_length` says how much of a prompt's beginning is known. Among those that may come next it is the one with which
    most is known, or else always the same one, so that the same documents find the same place again.
    """
    if None in passages.scores or len(passages.scores) < 2:
        return tuple(tokens), passages
    scores = [score for score in passages.scores if score is not None]
    allowed = tolerance * (max(scores) - min(scores))
    left = [(score, tuple(tokens[start:end])) for score, (start, end) in zip(scores, passages.spans, strict=True)]
    left.sort(key=lambda each: each[1])
    found, bounds, order = list(tokens[: passages.start]), [passages.start], []
    is_known, lookups = known_length(found) == len(found), 0
    while left:
        best = max(score for score, _ in left)
        open_ones = [each for each in left if each[0] >= best - allowed]
        lookups += len(open_ones)
        if is_known and lookups <= MOST_LOOKUPS:
            lengths = [known_length([*found, *text]) - len(found) for _, text in open_ones]
            chosen = open_ones[lengths.index(max(lengths))]
            is_known = max(lengths) == len(chosen[1])
        else:
            chosen = open_ones[0]
        left.remove(chosen)
        found += chosen[1]
        bounds.append(len(found))
        order.append(chosen[0])
    return (*found, *tokens[passages.end :]), Passages(tuple(bounds), tuple(order))
