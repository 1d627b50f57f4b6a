"""Which shared prefixes were seen how often, and which of them should be on disk. Used from the scheduler's thread.

Knows nothing of slots and of the cache.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterator, Sequence

from appliance.serving import passages
from appliance.serving.runs import Finder
from appliance.serving.snapshots import Prefix, SnapshotStore

SNAPSHOT_TOKENS = 32  # a shorter prefix is read as fast as it is loaded
SIGHTINGS = 2  # of a shared prefix, before it is written to disk
REMEMBERED = 1024  # shared prefixes and documents whose sightings are counted


class Sightings:
    """`cell_bytes` is what a token takes on disk."""

    def __init__(self, store: SnapshotStore, cell_bytes: int) -> None:
        self._store = store
        self._cell_bytes = cell_bytes
        self._counts: collections.OrderedDict[Prefix, int] = collections.OrderedDict()
        self._used: set[Prefix] = set()  # since the files were last told
        self._tried: set[Prefix] = set()  # to write, whatever came of it
        self._written: set[Prefix] = set()  # found among the files

    @property
    def all(self) -> set[Prefix]:
        """Whatever is remembered."""
        return {*self._counts, *self._used, *self._tried, *self._written}

    def see(self, prefix: Prefix, operators: Sequence[Prefix], documents: Collection[Prefix]) -> None:
        """Counts a prefix that may be asked for again; what the operator gave is used then, and not counted."""
        tokens = prefix.tokens
        if (common := dataclasses.replace(prefix, owner=None)) in documents:
            self._used.add(common)
            return
        for each in operators:
            if each.adapter == prefix.adapter and tokens[: len(each.tokens)] == each.tokens:
                self._used.add(each)
                if len(tokens) < len(each.tokens) + SNAPSHOT_TOKENS:
                    return  # what it has beside the operator's text is not worth a file
        self._used.add(prefix)
        self._counts[prefix] = self._counts.get(prefix, 0) + 1
        self._counts.move_to_end(prefix)
        if prefix in self._written and prefix not in self._store:  # it had to make room, and is used again
            self._written.discard(prefix)
            self._tried.discard(prefix)
        while len(self._counts) > REMEMBERED:
            oldest, _ = self._counts.popitem(last=False)
            if oldest not in operators:
                self._forget(oldest)

    def tell_files(self) -> None:
        """Which of them were used."""
        for prefix in self._used:
            self._store.touch(prefix)
        self._used.clear()

    def worth_saving(self, operators: Sequence[Prefix]) -> Iterator[Prefix]:
        """Those that should be on disk, are not, and were not tried."""
        seen = (prefix for prefix, count in self._counts.items() if count >= SIGHTINGS)
        for prefix in (*operators, *seen):
            size = len(prefix.tokens)
            is_right_size = size >= SNAPSHOT_TOKENS and size * self._cell_bytes <= self._store.limit_bytes
            if not is_right_size or prefix in self._written:
                continue
            if prefix in self._store:
                self._written.add(prefix)
            elif prefix not in self._tried:
                yield prefix

    def note_tried(self, prefix: Prefix) -> None:
        self._tried.add(prefix)

    def erase(self, find: Finder) -> None:
        """Forgets all in which `find` finds something."""
        for prefix in [prefix for prefix in self.all if find(passages.texts(prefix.tokens)) is not None]:
            self._counts.pop(prefix, None)
            self._forget(prefix)

    def _forget(self, prefix: Prefix) -> None:
        for each in (self._used, self._tried, self._written):
            each.discard(prefix)
