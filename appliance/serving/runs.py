"""Finding documents' tokens in what was read, wherever they stand there and however it was read.

There may be tens of thousands of documents, and answers wait meanwhile: a position costs one look, however many there are.
"""

import array
import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

Run = Sequence[int]  # the token ids of a document
Finder = Callable[[Sequence[int]], int | None]  # where one begins in these token ids; None: they hold nothing of any

KEY_TOKENS = 16  # by which a document is looked up, from where documents begin to differ
_TYPE = "i"
_SIZE = array.array(_TYPE).itemsize
_KEY_BYTES = KEY_TOKENS * _SIZE


def packed(tokens: Sequence[int]) -> "array.array[int]":
    """As they are kept: four bytes for each."""
    return array.array(_TYPE, tokens)


def finder(runs: Iterable[Run], opening: int | None = None) -> Finder:
    """Finds the first of the documents; with an `opening` also the beginning of one at the end, as of a cancelled reading.

    The first `opening` tokens are those of every document, and tell nothing.
    """
    return _Index(sorted({packed(run).tobytes() for run in runs if run}), opening).find


class _Index:
    """`runs` are in order, in bytes."""

    def __init__(self, runs: Sequence[bytes], opening: int | None) -> None:
        self._runs = runs
        self._least_tail = None if opening is None else (opening + 1) * _SIZE
        self._longest = max(map(len, runs), default=0)
        self._common = _common(runs[0], runs[-1], opening) if runs else b""  # of all: they are in order
        self._firsts = {array.array(_TYPE, run[:_SIZE])[0] for run in runs}
        self._long: dict[bytes, list[bytes]] = {}
        self._short: dict[int, set[bytes]] = {}  # by length: those without a whole key
        start, end = len(self._common), len(self._common) + _KEY_BYTES
        for run in runs:
            if len(run) < end:
                self._short.setdefault(len(run), set()).add(run)
            else:
                self._long.setdefault(run[start:end], []).append(run)

    def find(self, tokens: Sequence[int]) -> int | None:
        data = packed(tokens).tobytes()
        return next((at // _SIZE for at in self._places(tokens, data) if self._is_here(data, at)), None)

    def _places(self, tokens: Sequence[int], data: bytes) -> Iterator[int]:
        """Where one may begin."""
        if not self._common:
            yield from (at * _SIZE for at, token in enumerate(tokens) if token in self._firsts)
            return
        at = data.find(self._common)
        while at >= 0:
            if at % _SIZE == 0:
                yield at
            at = data.find(self._common, at + 1)

    def _is_here(self, data: bytes, at: int) -> bool:
        start = at + len(self._common)
        if any(data.startswith(run, at) for run in self._long.get(data[start : start + _KEY_BYTES], ())):
            return True
        if any(data[at : at + size] in runs for size, runs in self._short.items()):
            return True
        if self._least_tail is None or not self._least_tail <= len(data) - at < self._longest:
            return False
        tail = data[at:]
        following = bisect.bisect_left(self._runs, tail)
        return following < len(self._runs) and self._runs[following].startswith(tail)


def _common(one: bytes, other: bytes, most: int | None) -> bytes:
    """What both begin with, in whole tokens."""
    pairs = itertools.islice(zip(array.array(_TYPE, one), array.array(_TYPE, other), strict=False), most)
    return one[: _SIZE * sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))]
