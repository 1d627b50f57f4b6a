"""Gives back to the system what the C library keeps of memory that was freed.

glibc keeps freed memory that lies below memory in use, in a heap for each of several threads: requests of many sizes,
rendered and computed in turn by many threads, let a process grow for hours, ever more slowly, though nothing leaks.
"""

import ctypes
import sys
import time
from collections.abc import Callable

INTERVAL_SECONDS = 60.0  # trimming takes a millisecond or two, and what is given back is asked for again


class Heap:
    """The heap of this process. Where the C library cannot trim (musl, macOS) nothing is done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._trimmed_at = clock()
        self._is_used = False
        self._malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def use(self) -> None:
        """Something was computed."""
        self._is_used = self._malloc_trim is not None

    @property
    def seconds_left(self) -> float | None:
        """Until it is time to trim; None where nothing was computed since."""
        return max(0.0, self._trimmed_at + INTERVAL_SECONDS - self._clock()) if self._is_used else None

    def trim_in_time(self) -> bool:
        """Trims when it is time (malloc_trim(3)); whether it did. Other threads may allocate meanwhile."""
        if self._malloc_trim is None or self.seconds_left != 0:
            return False
        self._malloc_trim(0)
        self._trimmed_at = self._clock()
        self._is_used = False
        return True
