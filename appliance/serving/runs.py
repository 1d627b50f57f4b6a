"""Finding a document's tokens in what was read, wherever it stands there and however it was read."""

import array
import dataclasses
from collections.abc import Callable, Sequence

Finder = Callable[[Sequence[int]], int | None]  # where it begins in these token ids; None: they hold nothing of it

_TYPE = "i"
_SIZE = array.array(_TYPE).itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """The tokens of a document. The first `opening` of them are those of every document, and tell nothing."""

    tokens: tuple[int, ...]
    opening: int = 0


def finder(runs: Sequence[Run]) -> Finder:
    """Finds the first of the documents, or at the end the beginning of one, as when its reading was cancelled."""
    packed = [(_packed(run.tokens), min(run.opening, len(run.tokens) - 1)) for run in runs if run.tokens]

    def find(tokens: Sequence[int]) -> int | None:
        data = _packed(tokens)
        found = [at for wanted, opening in packed if (at := _place(data, wanted, opening)) is not None]
        return min(found, default=None)

    return find


def _place(data: bytes, wanted: bytes, opening: int) -> int | None:
    at = _aligned(data, wanted, 0)
    if at is not None:
        return at // _SIZE
    told = wanted[: _SIZE * (opening + 1)]
    at = _aligned(data, told, max(0, len(data) - len(wanted)) // _SIZE * _SIZE)
    while at is not None:
        if wanted.startswith(data[at:]):
            return at // _SIZE
        at = _aligned(data, told, at + _SIZE)
    return None


def _aligned(data: bytes, wanted: bytes, start: int) -> int | None:
    """Where `wanted` begins, at a whole token."""
    at = data.find(wanted, start)
    while at % _SIZE and at >= 0:
        at = data.find(wanted, at + 1)
    return None if at < 0 else at


def _packed(tokens: Sequence[int]) -> bytes:
    return array.array(_TYPE, tokens).tobytes()
