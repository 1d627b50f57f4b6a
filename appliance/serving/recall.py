"""Brings back prefixes from disk for requests that begin like one that memory no longer holds.

Files are read in a thread of its own, beside the answers that run; the request waits for its file, and others overtake it.
"""

import collections
import concurrent.futures
import logging
from collections.abc import Callable

from appliance.serving import passages
from appliance.serving.decoder import SavedCells
from appliance.serving.job import Answer
from appliance.serving.prefixes import Prefixes
from appliance.serving.runs import Finder
from appliance.serving.snapshots import Prefix
from appliance.serving.stitcher import Stitcher

logger = logging.getLogger("appliance.serving")


class Recall:
    """Used from the scheduler's thread, with its lock; `notify` is called from another when a file has been read."""

    def __init__(self, prefixes: Prefixes, stitcher: Stitcher, notify: Callable[[], None]) -> None:
        self._prefixes = prefixes
        self._stitcher = stitcher
        self._notify = notify
        self._reader = concurrent.futures.ThreadPoolExecutor(1, "recall")
        self._reader.submit(bool)  # starts its thread now: an engine has as many when it is new as when it is old
        self._files: dict[Prefix, concurrent.futures.Future[SavedCells | None]] = {}
        self._from_before = collections.deque(prefixes.restorable())

    @property
    def is_reading(self) -> bool:
        return any(not file.done() for file in self._files.values())

    def has_to_wait(self, answer: Answer) -> bool:
        """Whether files with the prompt's beginning or its documents are being read. Each answer asks for them once."""
        if not answer.has_recalled:
            answer.has_recalled = True
            answer.recalled = self._stitcher.worth_recalling(answer.job)
            for prefix in answer.recalled:
                if prefix not in self._files:
                    self._begin(prefix)
        answer.recalled = [prefix for prefix in answer.recalled if prefix in self._files]
        return bool(answer.recalled)

    def read_ahead(self) -> bool:
        """While nobody asks, brings back what memory held before a restart, file after file, as far as there is room.

        Says whether one is being read. A request that comes meanwhile and needs files waits for the one being read and for
        its own; one that needs none does not wait.
        """
        while self._from_before and not self.is_reading:
            prefix = self._from_before.popleft()
            if self._prefixes.has_room_for(prefix):
                self._begin(prefix)
        return self.is_reading

    def settle(self) -> None:
        """Caches what has been read."""
        for prefix in [prefix for prefix, file in self._files.items() if file.done()]:
            payload = self._files.pop(prefix).result()
            if payload is not None and not self._prefixes.has(prefix):
                self._prefixes.restore(prefix, payload)

    def forget(self, find: Finder) -> None:
        """Drops files being read in which `find` finds something; who waits for them goes on without."""
        for prefix in [prefix for prefix in self._files if find(passages.texts(prefix.tokens)) is not None]:
            del self._files[prefix]

    def _begin(self, prefix: Prefix) -> None:
        self._files[prefix] = file = self._reader.submit(self._prefixes.read, prefix)
        file.add_done_callback(lambda _: self._notify())

    def close(self) -> None:
        """Waits for the file being read."""
        self._reader.shutdown(cancel_futures=True)
