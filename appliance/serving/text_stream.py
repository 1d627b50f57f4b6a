"""Bytes of tokens in, text out: whole characters only, and nothing that may still turn out to be a stop string.

The text that comes out does not depend on how the bytes were cut into tokens. Knows nothing of tokens or models.
"""

import codecs
from collections.abc import Sequence


class TextStream:
    """Incremental UTF-8 decoding and stop strings.

    The stop string that is complete first ends the text (the longest of those that end together); it is not part of it.
    Bytes that are no UTF-8 become U+FFFD; an incomplete character at the very end is dropped.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped_by: str | None = None

    @property
    def is_stopped(self) -> bool:
        return self.stopped_by is not None

    def push(self, piece: bytes) -> str:
        """Text that is final after these bytes; may be empty."""
        if self.is_stopped:
            return ""
        if not self._stop:
            return self._decoder.decode(piece)
        self._held += self._decoder.decode(piece)
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self.stopped_by = self._held[start:end]
            return self._release(start, drop_rest=True)
        return self._release(len(self._held) - self._undecided())

    def finish(self) -> str:
        """The text still held back, once no more can follow."""
        return self._release(len(self._held))

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, count: int, *, drop_rest: bool = False) -> str:
        text, self._held = self._held[:count], "" if drop_rest else self._held[count:]
        return text
