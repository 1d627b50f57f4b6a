"""The operator's documents, which are read by themselves before anybody asks: which are known, and which comes next.

Each is read, written to disk and may then leave memory, so that there may be more of them than memory holds. They stay on
disk whatever else is written there, and only as many are read as find place: none ever pushes out another. Without a disk as
many are read as the cache has place for. Used with the scheduler's lock held; `idle.py` does the reading and the writing.
"""

import collections
import dataclasses
import logging
from collections.abc import Mapping, Sequence

from appliance.serving.events import DocumentCounts
from appliance.serving.prefixes import Prefixes
from appliance.serving.runs import Finder
from appliance.serving.snapshots import Prefix, SnapshotStore

MOST_READINGS = 3  # of one document: its file may be lost, and a disk on which all are lost is no reason to read forever
HEADER_BYTES, TOKEN_BYTES = 4096, 24  # of a file, beside its cells
MIB = 2**20

logger = logging.getLogger("appliance.serving")


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """`documents`, by name, are to be read when nothing else is to be done, and no others any more.

    All in which `find` finds something is forgotten, files apart. Others are only counted: `refused` and `erased` ones,
    those whose files could not be erased, and by their tokens those for which there can be no place.
    """

    documents: Mapping[Prefix, str]
    find: Finder | None = None
    refused: int = 0
    erased: int = 0
    unerased: int = 0
    unplaced: Sequence[int] = ()


class ReadingAhead:
    """`cell_bytes` is what a token takes on disk; `longest` is how long a document can be, in tokens."""

    def __init__(self, prefixes: Prefixes, store: SnapshotStore | None, cell_bytes: int, longest: int) -> None:
        self._prefixes = prefixes
        self._store = store
        self._cell_bytes = cell_bytes
        self._longest = longest
        self._names: Mapping[Prefix, str] = {}
        self._waiting: collections.deque[Prefix] = collections.deque()
        self._known: set[Prefix] = set()
        self._readings: collections.Counter[Prefix] = collections.Counter()
        self._losses: collections.Counter[Prefix] = collections.Counter()  # from memory, before they were written
        self._unwritten: Prefix | None = None  # has been read: the first of those that wait
        self._in_writing: Prefix | None = None
        self._refused = self._erased = self._unerased = 0
        self._is_told = True

    @property
    def counts(self) -> DocumentCounts | None:
        known, waiting = len(self._known), len(self._waiting) + (self._in_writing is not None)
        if not (known or waiting or self._refused or self._erased or self._unerased):
            return None
        return DocumentCounts(
            known=known, waiting=waiting, refused=self._refused, erased=self._erased, unerased=self._unerased
        )

    @property
    def unwritten(self) -> Prefix | None:
        """What has been read and is to be written now."""
        return self._unwritten

    @property
    def most_tokens(self) -> int:
        """No more find place, whatever else there is."""
        if self._store is None:
            return self._prefixes.saved_limit
        return self._store.limit_bytes // (self._cell_bytes + TOKEN_BYTES)

    def keep(self, change: Change) -> None:
        """Wants its documents, in this order, and no others any more."""
        self._erased += change.erased
        self._refused, self._unerased = change.refused, change.unerased
        self._unwritten = None
        fitting = self._fitting(change.documents, change.unplaced)
        self._names = fitting
        if self._in_writing not in fitting:
            self._in_writing = None
        self._waiting = collections.deque(each for each in fitting if each != self._in_writing)
        self._known.clear()
        for counts in (self._readings, self._losses):
            for gone in [each for each in counts if each not in fitting]:
                del counts[gone]
        self._is_told = not fitting
        self._prefixes.set_documents(fitting.keys())

    def next(self) -> Prefix | None:
        """What is to be read now; None while what was read waits to be written, and when all is known."""
        self._look_for_lost()
        while self._waiting and self._unwritten is None:
            prefix = self._waiting[0]
            if self._is_kept(prefix):
                self._known.add(self._waiting.popleft())
            elif self._store is not None and self._prefixes.has(prefix):
                self._unwritten = prefix
            else:
                return prefix
        if not self._waiting and self._in_writing is None and not self._is_told:
            self._is_told = True
            logger.warning("event=documents_known known=%d refused=%d", len(self._known), self._refused)
        return None

    def was_read(self, prefix: Prefix) -> None:
        if prefix not in self._names or not self._waiting or self._waiting[0] != prefix:
            return  # nobody wants it any more
        self._readings[prefix] += 1
        if self._store is not None:
            self._unwritten = prefix
            return
        self._prefixes.keep_document(prefix, is_on_disk=False)

    def forget_memory(self) -> None:
        """After a failure that emptied it."""
        if self._store is None:
            self._waiting.extend(each for each in self._names if each in self._known)
            self._known.clear()

    def begin_writing(self) -> None:
        """What is unwritten is on its way; the next one may be read."""
        self._unwritten, self._in_writing = None, self._waiting.popleft()

    def was_written(self, prefix: Prefix, *, is_kept: bool) -> None:
        """Or was not: `is_kept` says so."""
        if prefix != self._in_writing:
            return  # nobody wants it any more
        self._in_writing = None
        if is_kept:
            self._known.add(prefix)
        else:
            self._refuse(prefix, "its file could not be written, or found no place in serve.snapshot_mib")

    def was_lost(self, prefix: Prefix) -> None:
        """What had been read has left memory before it was written, or cannot be copied from there."""
        self._unwritten = None
        self._losses[prefix] += 1
        if self._losses[prefix] >= MOST_READINGS:
            self.refuse(prefix, f"it was to be written {MOST_READINGS} times, and was lost from memory each time")

    def refuse(self, prefix: Prefix, reason: str) -> None:
        """Does not try it again until the documents change."""
        if prefix in self._waiting:
            self._waiting.remove(prefix)
            self._refuse(prefix, reason)

    def _refuse(self, prefix: Prefix, reason: str) -> None:
        self._refused += 1
        logger.warning("event=document_refused id=%r tokens=%d reason=%r", self._names[prefix], len(prefix.tokens), reason)

    def _is_kept(self, prefix: Prefix) -> bool:
        return self._prefixes.has(prefix) if self._store is None else prefix in self._store

    def _look_for_lost(self) -> None:
        for prefix in self._store.lost() & self._known if self._store is not None else ():
            self._known.discard(prefix)
            self._waiting.append(prefix)
            if self._readings[prefix] >= MOST_READINGS:
                self.refuse(prefix, f"its file was lost, and it has been read {MOST_READINGS} times")

    def _fitting(self, documents: Mapping[Prefix, str], unplaced: Sequence[int]) -> dict[Prefix, str]:
        """Those that find place together, in order; the others are refused."""
        found: dict[Prefix, str] = {}
        longest = min(self._longest, self._prefixes.place_left)
        limit = self._prefixes.place_left if self._store is None else self._store.limit_bytes
        taken = 0 if self._store is None else sum(self._place_of(len(each.tokens)) for each in self._prefixes.operators)
        needed = taken + sum(map(self._place_of, unplaced))
        for prefix, name in documents.items():
            size = len(prefix.tokens)
            if size >= longest:
                said = f"it has {size} tokens; the limit is {longest - 1}, by serve.context_tokens and serve.cache_tokens"
                logger.warning("event=document_refused id=%r tokens=%d reason=%r", name, size, said)
                continue
            place = self._place_of(size)
            needed += place
            if taken + place <= limit:
                taken += place
                found[prefix] = name
        count = len(documents) + len(unplaced)
        self._refused += count - len(found)
        if taken < needed:
            wanted = f"raise serve.snapshot_mib to {-(-needed // MIB)}"
            if self._store is None:
                wanted = f"raise serve.cache_tokens by {needed - limit}, or let them be written to disk"
            logger.warning("event=documents_find_no_place fitting=%d of=%d remedy=%r", len(found), count, wanted)
        return found

    def _place_of(self, tokens: int) -> int:
        """Bytes on disk, or tokens in memory."""
        return tokens if self._store is None else tokens * (self._cell_bytes + TOKEN_BYTES) + HEADER_BYTES
