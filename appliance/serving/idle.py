"""What the scheduler does while nobody asks: reads the operator's prefixes and documents, copies what answers left in their
slots into the cache, so that the slots can be used at once when a request comes, and writes shared prefixes to disk.

All give way to requests: reading goes on in small chunks and gives up its slot, writing happens in a thread of its own.
"""

import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence

from appliance.serving import passages
from appliance.serving.decoder import Adapter, Decoder, Feed, Sampled, SavedCells
from appliance.serving.job import Job
from appliance.serving.pace import Pace
from appliance.serving.prefixes import Prefixes
from appliance.serving.reading_ahead import ReadingAhead
from appliance.serving.requests import SamplingSettings
from appliance.serving.runs import Finder
from appliance.serving.snapshots import Prefix, SnapshotStore

SETTLE_SECONDS = 0.3  # without a step before anything is copied or written: the next turn often comes at once
LEAST_PRIORITY = 19  # nice(2)
LONGEST_PAUSE_SECONDS = 1.0  # between two pieces of a file: a server that is never idle writes it in the end, too

logger = logging.getLogger("appliance.serving")

Decode = Callable[[Sequence[Feed], Adapter | None], tuple[Mapping[int, Sequence[Sampled]] | None, float]]


class IdleWork:
    """Work in units of one decode call or one file. `work` runs in the scheduler's thread without its lock."""

    def __init__(
        self, decoder: Decoder, prefixes: Prefixes, pace: Pace, store: SnapshotStore | None, ahead: ReadingAhead
    ) -> None:
        self._decoder = decoder
        self._prefixes = prefixes
        self._pace = pace
        self._store = store
        self._ahead = ahead
        self._warm: list[Prefix] = []
        self._job: Job | None = None  # reads `_wanted`
        self._wanted: Prefix | None = None  # the first of `_warm`, or else a document
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "snapshots", initializer=_least_priority)
        self._writing: concurrent.futures.Future[bool] | None = None
        self._in_hand: Prefix | None = None  # what it is of
        self._document: Prefix | None = None  # the same, if its outcome is waited for
        self._is_free = threading.Event()  # nobody computes

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def tell(self, *, is_free: bool) -> None:
        """Whether nobody computes now: a file is written then, and hardly while somebody does."""
        if is_free != self._is_free.is_set():
            self._is_free.set() if is_free else self._is_free.clear()

    def add(self, prefix: Prefix) -> None:
        self._prefixes.add_operator_prefix(prefix)
        self._warm.append(prefix)

    def next_feed(self) -> tuple[Job, Feed] | None:
        """The next chunk of an operator's prefix to read, or of a document."""
        while self._warm and self._prefixes.has(self._warm[0]):
            self.pause()
            del self._warm[0]
        wanted = self._warm[0] if self._warm else self._ahead.next()
        if wanted != self._wanted:
            self.pause()
            self._wanted = wanted
        if wanted is None:
            return None
        job = self._job or self._begin(wanted)
        count = self._pace.chunk_tokens(0, is_busy=True)
        return job, Feed(job.slot, job.tokens[job.computed : job.computed + count], job.computed, is_sampled=False)

    def take(self, job: Job, feed: Feed, *, is_aborted: bool) -> None:
        """Notes that the chunk was read, or that it was not."""
        if is_aborted:
            self._decoder.remove(feed.slot, job.computed, -1)
            return
        job.computed += len(feed.tokens)
        if not job.is_reading:
            self.pause()
            if self._warm and self._warm[0] == self._wanted:
                del self._warm[0]
            elif self._wanted is not None:
                self._ahead.was_read(self._wanted)

    def pause(self) -> None:
        """Gives the slot back; what was read stays there until the slot is needed."""
        if (job := self._job) is not None:
            self._job = None
            self._prefixes.leave(job, job.computed)

    def write_document(self, notify: Callable[[], None]) -> bool:
        """Begins to write the document that was read last, once the one before it is written; False when there is none.

        It waits for no quiet moment: nobody's next turn will want its slot.
        """
        if self.is_writing:
            return False
        document, self._document = self._document, None
        if document is not None and self._writing is not None:
            if (error := self._writing.exception()) is not None:
                logger.error("event=document_not_written", exc_info=error)
            self._ahead.was_written(document, is_kept=error is None and self._writing.result())
        if (prefix := self._ahead.unwritten) is None:
            return document is not None
        if (payload := self._prefixes.save(prefix)) is None:
            self._ahead.was_lost(prefix)
            return True
        self._document = prefix
        self._ahead.begin_writing()
        self._write(prefix, payload, notify)
        self._prefixes.keep_document(prefix, is_on_disk=True)
        return True

    def save_one(self, notify: Callable[[], None]) -> bool:
        """Copies a prefix into the cache, or begins to write one to disk; `notify` is called when it is written."""
        if self._ahead.unwritten is not None:
            return False  # it is to go from its slot to the disk, and nothing should leave the cache for it
        if self._prefixes.save_one():
            return True
        is_busy = self.is_writing or self._document is not None  # whose outcome is not taken yet
        if self._store is None or is_busy or (prefix := self._prefixes.worth_saving()) is None:
            return False
        if (payload := self._prefixes.save(prefix)) is not None:
            self._write(prefix, payload, notify)
        return True

    def forget_failed(self) -> None:
        """After a failure that emptied the cache: reads everything anew, but for what was being read just then."""
        if self._job is not None and self._wanted is not None:
            logger.warning("event=warming_failed tokens=%d", self._job.prompt_tokens)
            if self._warm and self._warm[0] == self._wanted:
                self._prefixes.drop_operator_prefix(self._wanted)
            else:
                self._ahead.refuse(self._wanted, "reading it failed")
        self._job = self._wanted = None
        self._warm = list(self._prefixes.operators)
        self._ahead.forget_memory()

    def forget(self, find: Finder) -> None:
        """Takes back what is about to be written and holds something of it; what is being written is the store's to stop."""
        self.pause()
        if self._writing is None or self._in_hand is None or find(passages.texts(self._in_hand.tokens)) is None:
            return
        if self._writing.cancel():
            self._writing = self._document = None

    def close(self) -> None:
        """Waits for the file being written."""
        self._is_free.set()
        self._writer.shutdown()

    def _give_way(self) -> None:
        self._is_free.wait(LONGEST_PAUSE_SECONDS)

    def _write(self, prefix: Prefix, payload: SavedCells, notify: Callable[[], None]) -> None:
        assert self._store is not None
        self._in_hand = prefix
        self._writing = self._writer.submit(self._store.write, prefix, payload, self._give_way)
        self._writing.add_done_callback(lambda _: notify())

    def _begin(self, prefix: Prefix) -> Job:
        size = len(prefix.tokens)
        is_alone = passages.is_alone(prefix.tokens)
        job = Job(passages.texts(prefix.tokens), size, prefix.adapter, None, is_alone=is_alone)
        place = self._prefixes.choose(job)
        self._job = job
        self._decoder.start(place.slot, SamplingSettings(), None, None)
        self._prefixes.enter(job, place)
        return job


def _least_priority() -> None:
    """Lets this thread compute when no other wants to. On Linux a thread has a priority of its own."""
    with contextlib.suppress(OSError):  # where that may not be, a file costs requests a little
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)
