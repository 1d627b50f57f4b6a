"""Which rows are the same or nearly the same, and how often a random split puts them on both sides.

Texts are alike when the Jaccard similarity of their shingles (runs of five characters, case and punctuation aside) is
estimated at `SIMILAR` or more by MinHash (datasketch). Candidates are texts whose signatures agree in a band of four; they
are found by sorting band after band, since datasketch's index of dictionaries takes gigabytes for what a sort needs
megabytes. Pairs of 0.8 are missed once in ten million, pairs of 0.7 once in six thousand. The same question over other
documents is another one. Main entry: `Likeness`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from appliance.data.texts import Text
from appliance.text.words import normal

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, Any]

PERMUTATIONS, BAND = 128, 4
SHINGLE_CHARACTERS = 5
SIMILAR = 0.6
MOST_CHARACTERS = 4000  # of a longer text only these are compared
MOST_COMPARED = 16  # in a larger band's bucket each text is compared with its neighbours and the first one only
COMPARED_AT_ONCE = 100_000
MINIMUM_TARGET_CHARACTERS = 60  # a shorter answer ("Yes.") may well be right for many questions
STOCK_SHARE = 0.02  # an answer that more rows share is a stock answer, and would join what has nothing in common
INSTRUCTION_SHARE, FEWEST_INSTRUCTED = 0.05, 20  # an opening that more rows share, or nearly share, is no question
LEAK_ROUNDS = 20
MULTIPLIER = 0x9E3779B97F4A7C15  # odd and without a pattern: 2**64 by the golden ratio
NOTHING = 0  # told beside a question
Form = tuple[str, int]  # a text's normal form, and what was told beside it


@dataclass(frozen=True, slots=True)
class Alike:
    """Texts by likeness. `codes` gives each text the number of its exact form; `pairs` (n, 2) are codes that are near."""

    codes: "Array"
    pairs: "Array"
    distinct: int

    def edges(self) -> "Array":
        """(n, 2) rows to join: each with the first of its form, and the first rows of near forms."""
        import numpy

        rows = numpy.arange(len(self.codes))
        first = numpy.zeros(self.distinct, dtype=numpy.int64)
        first[self.codes[::-1]] = rows[::-1]
        return numpy.concatenate((numpy.stack((first[self.codes], rows), axis=1), first[self.pairs]))

    def of_many(self) -> "Array":
        """For each row whether its form, with those near it and near those, is that of a great part of all rows."""
        import numpy

        rows_of = numpy.bincount(self.codes, minlength=self.distinct)
        families = _connected(self.distinct, [self.pairs])
        sizes = numpy.bincount(families, weights=rows_of)[families]
        many: Array = (sizes > max(FEWEST_INSTRUCTED, INSTRUCTION_SHARE * len(self.codes)))[self.codes]
        return many

    def without(self, rows: "Array") -> "Alike":
        """The same with some rows (n,), as booleans, like no other."""
        import numpy

        codes = self.codes.copy()
        codes[rows] = self.distinct + numpy.arange(int(rows.sum()))
        left = numpy.zeros(self.distinct, dtype=bool)
        left[self.codes[~rows]] = True
        return Alike(codes, self.pairs[left[self.pairs].all(axis=1)], self.distinct + int(rows.sum()))

    def among(self, rows: slice) -> "Alike":
        """The same for some of the rows."""
        import numpy

        present = numpy.zeros(self.distinct, dtype=bool)
        present[self.codes[rows]] = True
        return Alike(self.codes[rows], self.pairs[present[self.pairs].all(axis=1)], self.distinct)


@dataclass(frozen=True, slots=True)
class Leak:
    """Shares of the rows held out that have the same, or nearly the same, among the rows trained on."""

    exact: float
    near: float


@dataclass(frozen=True, slots=True)
class Likeness:
    """Rows compared by how they open and as a whole; `groups` numbers the rows that belong together.

    `questions` are the openings as they are; in `openings` those that are an instruction to many rows are like no other.
    """

    questions: Alike
    openings: Alike
    wholes: Alike
    groups: "Array"

    def leak(self, is_heldout: "Array", of: "Array | None" = None) -> Leak:
        """What of the rows held out (of those in `of` only, if given) is among the rows trained on too."""
        asked = is_heldout if of is None else is_heldout & of
        count = max(1, int(asked.sum()))
        exact = _seen(self.openings, is_heldout, near=False)
        return Leak(float((exact & asked).sum()) / count, float((self.leaking(is_heldout) & asked).sum()) / count)

    def leaking(self, is_heldout: "Array") -> "Array":
        """For each row whether the same or nearly the same is trained on."""
        near: Array = _seen(self.openings, is_heldout, near=True) | _seen(self.wholes, is_heldout, near=True)
        return near

    def among(self, rows: slice) -> "Likeness":
        """The likeness of some rows with each other."""
        return Likeness(self.questions.among(rows), self.openings.among(rows), self.wholes.among(rows), self.groups[rows])

    def random_leak(self, heldout_rows: int, seed: int) -> Leak:
        """The same for random splits of this size, on average."""
        import numpy

        generator = numpy.random.default_rng(seed)
        leaks = []
        for _ in range(LEAK_ROUNDS):
            is_heldout = numpy.zeros(len(self.groups), dtype=bool)
            is_heldout[generator.permutation(len(self.groups))[:heldout_rows]] = True
            leaks.append(self.leak(is_heldout))
        return Leak(sum(leak.exact for leak in leaks) / LEAK_ROUNDS, sum(leak.near for leak in leaks) / LEAK_ROUNDS)


def compare(rows: Sequence[Text]) -> Likeness:
    """Compares all rows with each other, also those of different files.

    What opens a great part of them ("Write a sentence about the room") is an instruction: those rows are compared by their
    answers alone, or all of them would belong together.
    """
    told = [_digest(row) for row in rows]
    questions = alike([row.opening for row in rows], told)
    is_instructed = questions.of_many()
    openings = questions.without(is_instructed)
    wholes = alike([row.answer if alone else row.whole for row, alone in zip(rows, is_instructed, strict=True)], told)
    edges = (openings.edges(), wholes.edges(), _same_targets(rows), _same_over_others(rows))
    return Likeness(questions, openings, wholes, _connected(len(rows), edges))


def alike(texts: Sequence[str], told: Sequence[int] | None = None) -> Alike:
    """Which texts have the same form, and which forms are near; only those that were `told` the same (`_digest`) can be."""
    import numpy

    numbers: dict[Form, int] = {}
    forms = [(normal(text), about) for text, about in zip(texts, told or [NOTHING] * len(texts), strict=True)]
    codes = numpy.array([numbers.setdefault(form, len(numbers)) for form in forms], dtype=numpy.int64)
    return Alike(codes, _near_pairs(list(numbers)), len(numbers))


def _digest(row: Text) -> int:
    """What a row is told beside its question, in 64 bits: its documents, in whatever order and under whatever name."""
    if not row.documents:
        return NOTHING
    found = hashlib.blake2b(json.dumps(sorted(map(normal, row.documents))).encode(), digest_size=8)
    return int.from_bytes(found.digest(), "little")


def _same_targets(rows: Sequence[Text]) -> "Array":
    """Rows with the same answer: one who learned it of one row knows it for the other."""
    import numpy

    by_answer: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        form = normal(row.answer)
        if len(form) >= MINIMUM_TARGET_CHARACTERS:
            by_answer.setdefault(hash(form), []).append(number)
    most = max(5, STOCK_SHARE * len(rows))
    ends = [(same[0], other) for same in by_answer.values() if len(same) <= most for other in same[1:]]
    return numpy.array(ends, dtype=numpy.int64).reshape(-1, 2)


def _same_over_others(rows: Sequence[Text]) -> "Array":
    """Rows with the same answer to the same question over other documents: who learned it needs none to give it."""
    import numpy

    first: dict[str, int] = {}
    told = ((number, row) for number, row in enumerate(rows) if row.documents)
    ends = [(first.setdefault(normal(row.whole), number), number) for number, row in told]
    return numpy.array(ends, dtype=numpy.int64).reshape(-1, 2)


def _connected(count: int, edges: "Sequence[Array]") -> "Array":
    import numpy
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = numpy.concatenate(edges)
    graph = coo_array((numpy.ones(len(ends), dtype=numpy.int8), (ends[:, 0], ends[:, 1])), shape=(count, count))
    labels: Array
    _, labels = connected_components(graph, directed=False)
    return labels


def _seen(alike: Alike, is_heldout: "Array", *, near: bool) -> "Array":
    """For each row whether a row that is trained on has its form, or one near it."""
    import numpy

    trained = numpy.zeros(alike.distinct, dtype=bool)
    trained[alike.codes[~is_heldout]] = True
    seen = trained.copy()
    if near and len(alike.pairs):
        ones, others = alike.pairs.T
        seen[ones[trained[others]]] = True
        seen[others[trained[ones]]] = True
    of_rows: Array = seen[alike.codes]
    return of_rows


def _near_pairs(forms: Sequence[Form]) -> "Array":
    import numpy

    if len(forms) < 2:
        return numpy.empty((0, 2), dtype=numpy.int64)
    signatures = _signatures(forms)
    found = numpy.empty(0, dtype=numpy.int64)
    for start in range(0, PERMUTATIONS, BAND):
        # Those found by an earlier band are not measured again.
        candidates = numpy.setdiff1d(_candidates(signatures[:, start : start + BAND]), found)
        kept = [
            part[_similarity(signatures, part // len(forms), part % len(forms)) >= SIMILAR]
            for part in numpy.array_split(candidates, len(candidates) // COMPARED_AT_ONCE + 1)
        ]
        found = numpy.union1d(found, numpy.concatenate(kept))
    return numpy.stack((found // len(forms), found % len(forms)), axis=1)


def _similarity(signatures: "Array", ones: "Array", others: "Array") -> "Array":
    shares: Array = (signatures[ones] == signatures[others]).mean(axis=1)
    return shares


def _candidates(band: "Array") -> "Array":
    """Pairs of texts that agree in a band, each as one number: first * texts + second, the first being the smaller."""
    import numpy

    count = len(band)
    keys = numpy.zeros(count, dtype=numpy.uint64)  # what falls together by chance is told apart by its similarity
    for column in band.T:
        keys = keys * numpy.uint64(MULTIPLIER) + column
    order = numpy.argsort(keys, kind="stable")
    ordered = keys[order]
    # The position at which each text's bucket begins.
    begins = numpy.flatnonzero(numpy.concatenate(([True], ordered[1:] != ordered[:-1])))
    bucket = numpy.repeat(begins, numpy.diff(numpy.append(begins, count)))
    pairs = []
    for distance in range(1, min(MOST_COMPARED, count - 1) + 1):
        near = numpy.flatnonzero(bucket[distance:] == bucket[:-distance])
        pairs.append((order[near], order[near + distance]))
    far = numpy.flatnonzero(numpy.arange(count) - bucket > MOST_COMPARED)
    pairs.append((order[bucket[far]], order[far]))
    ones, others = (numpy.concatenate(side) for side in zip(*pairs, strict=True))
    return numpy.unique(numpy.minimum(ones, others) * count + numpy.maximum(ones, others))


def _signatures(forms: Sequence[Form]) -> "Array":
    """(texts, permutations) of 32 bits."""
    import numpy
    from datasketch import MinHash

    signatures = numpy.empty((len(forms), PERMUTATIONS), dtype=numpy.uint32)
    shingles = (_shingles(*form) for form in forms)
    made = MinHash.generator(shingles, num_perm=PERMUTATIONS, seed=1, hashfunc=_as_it_is, scheme="affine32")
    for number, each in enumerate(made):
        signatures[number] = each.hashvalues
    return signatures


def _shingles(form: str, told: int) -> list[int]:
    """Hashes of a text's runs of characters; of its whole, when it is shorter than one. Others for each thing `told`."""
    import numpy

    padded = f" {form[:MOST_CHARACTERS]} "
    points = numpy.frombuffer(padded.encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32).astype(numpy.uint64)
    width = min(SHINGLE_CHARACTERS, len(points))
    hashes = numpy.zeros(len(points) - width + 1, dtype=numpy.uint64)
    for offset in range(width):
        hashes = hashes * numpy.uint64(MULTIPLIER) + points[offset : offset + len(hashes)]
    hashes ^= numpy.uint64(told)
    hashes ^= hashes >> numpy.uint64(31)
    hashes *= numpy.uint64(MULTIPLIER)
    distinct: list[int] = numpy.unique(hashes >> numpy.uint64(32)).tolist()
    return distinct


def _as_it_is(value: int) -> int:
    return value
