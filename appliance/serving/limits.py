"""How often one key, or one address, may ask: a token bucket each, in a table that cannot grow without bound.

A bucket is full at first, so that a burst of one minute's requests passes at once. Knows nothing of HTTP.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

MAX_BUCKETS = 4096


class RateLimit:
    """`per_minute` events for each name, 0 for no limit. Used from one thread."""

    def __init__(
        self, per_minute: int, *, clock: Callable[[], float] = time.monotonic, max_buckets: int = MAX_BUCKETS
    ) -> None:
        self._per_minute, self._clock, self._max_buckets = per_minute, clock, max_buckets
        self._empty_until: OrderedDict[str, float] = OrderedDict()  # when a bucket is full again; the latest used at the end

    def wait_seconds(self, name: str) -> int:
        """Takes one from the bucket of `name` and returns 0; when it is empty, whole seconds until there is one again."""
        if self._per_minute == 0:
            return 0
        now, each = self._clock(), 60.0 / self._per_minute
        full_at = max(self._empty_until.get(name, now), now) + each
        wait = full_at - now - 60.0
        if wait > each * 1e-6:
            return max(1, math.ceil(wait))
        self._empty_until[name] = full_at
        self._empty_until.move_to_end(name)
        if len(self._empty_until) > self._max_buckets:
            self._empty_until.popitem(last=False)
        return 0
