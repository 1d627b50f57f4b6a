"""The KV memory's book-keeping: what running jobs reserve, what the prefix cache holds, what goes to and comes from disk.

Running jobs' reservations and the cache's cells together never exceed those there are. Used from the scheduler's thread.
"""

import collections
import logging
from collections.abc import Iterator, Sequence

from appliance.serving.cache import Match, PrefixCache, common_length
from appliance.serving.decoder import Decoder, SavedCells, SnapshotRefused
from appliance.serving.job import Job
from appliance.serving.snapshots import Prefix, SnapshotStore

SNAPSHOT_TOKENS = 32  # a shorter prefix is read as fast as it is loaded
RECALL_TOKENS = 64  # what loading a file must save before a request waits for it
SIGHTINGS = 2  # of a shared prefix, before it is written to disk
REMEMBERED = 64  # shared prefixes whose sightings are counted

logger = logging.getLogger("appliance.serving")


class Prefixes:
    """Reserves cells for jobs, attaches what is cached, and keeps what jobs have computed."""

    def __init__(self, decoder: Decoder, cells: int, cache_tokens: int, store: SnapshotStore | None) -> None:
        can_share = self.can_share = decoder.can_share and decoder.sequences > decoder.slots
        self._decoder = decoder
        self._store = store if can_share else None
        sequences = range(decoder.slots, decoder.sequences) if can_share else range(0)
        self._cache = PrefixCache(decoder, sequences, cache_tokens if can_share else 0)
        self._reserved: dict[Job, None] = {}
        self._operators: list[Prefix] = []  # whatever begins like one of these may be shared by all
        self._sightings: collections.OrderedDict[Prefix, int] = collections.OrderedDict()
        self._used: set[Prefix] = set()  # since the files were last told
        self._tried: set[Prefix] = set()  # to write, whatever came of it
        self.cells = cells

    @property
    def used_cells(self) -> int:
        """Cells in use now, reservations aside."""
        return self._cache.cells + sum(job.own_cells for job in self._reserved)

    @property
    def running_cells(self) -> int:
        return self.used_cells - self._cache.free_cells

    @property
    def saved_tokens(self) -> int:
        """Of cached prefixes, in ordinary memory."""
        return self._cache.saved_tokens

    @property
    def saved_limit(self) -> int:
        return self._cache.saved_limit

    def cached_tokens(self, job: Job) -> int:
        """How much of the prompt need not be computed now; the last token always is."""
        return self._match(job).length

    def known_tokens(self, job: Job) -> int:
        """As `cached_tokens`, with what would be loaded from disk."""
        on_disk = self.worth_recalling(job)
        return self.cached_tokens(job) if on_disk is None else len(on_disk.tokens)

    def has(self, prefix: Prefix) -> bool:
        """Whether all of it is cached."""
        size = len(prefix.tokens)
        return self._cache.match(prefix.adapter, prefix.owner, prefix.tokens, size).length == size

    def plan(self, job: Job) -> Match | None:
        """What the job would share when it got its cells now; None when running jobs hold too many."""
        # A node that would be shared may hold more than it saves: then nothing is.
        for match in (self._match(job), self._cache.match(job.adapter, job.owner, job.tokens, 0)):
            self._cache.lock(match.node)
            available = self._free + self._cache.free_cells
            self._cache.unlock(match.node)
            if _needed(job, match) <= available:
                return match
        return None

    def reserve(self, job: Job, match: Match) -> None:
        """Promises the job its cells and attaches what it shares; what nobody shares any more leaves the KV memory."""
        self._cache.lock(match.node)
        self._cache.park(_needed(job, match) - self._free)
        self._cache.unlock(match.node)
        self._reserved[job] = None
        if match.length:
            match = self._cache.attach(match, job.slot)
            job.locks.append(match.node)
        job.computed = job.shared = job.published = match.length

    def save_one(self) -> bool:
        """Copies cached cells that nobody uses into ordinary memory, for an idle moment; False when all are there."""
        return self._cache.save_one()

    def publish(self, job: Job, known_tokens: int) -> None:
        """Lets others share what the job has computed, and parks it for those to come."""
        prefix = Prefix(tuple(job.tokens[:known_tokens]), job.adapter, job.owner)
        common = 0 if job.owner is None else self._operator_length(prefix)
        if common and self._cache.match(job.adapter, None, prefix.tokens, common).length >= min(job.published, common):
            self._keep(job, Prefix(prefix.tokens[:common], job.adapter))  # not what is a tenant's already
        self._keep(job, prefix)
        job.published = known_tokens

    def leave(self, job: Job) -> None:
        """Takes back the job's reservation and its hold on shared cells; its sequence is empty."""
        for node in job.locks:
            self._cache.unlock(node)
        job.locks.clear()
        job.shared = job.computed = 0
        self._reserved.pop(job, None)

    @property
    def operators(self) -> Sequence[Prefix]:
        return self._operators

    def add_operator_prefix(self, prefix: Prefix) -> None:
        if prefix not in self._operators:
            self._operators.append(prefix)

    def drop_operator_prefix(self, prefix: Prefix) -> None:
        self._operators.remove(prefix)

    def see(self, job: Job, shared_tokens: int) -> None:
        """Counts a prompt whose first `shared_tokens` hold no visitor's text."""
        if self._store is None:
            return
        tokens = tuple(job.tokens[:shared_tokens])
        for each in self._operators:
            if each.adapter == job.adapter and tokens[: len(each.tokens)] == each.tokens:
                self._used.add(each)
                if len(tokens) < len(each.tokens) + SNAPSHOT_TOKENS:
                    return  # what it has beside the operator's text is not worth a file
        prefix = Prefix(tokens, job.adapter, job.owner)
        self._used.add(prefix)
        self._sightings[prefix] = self._sightings.get(prefix, 0) + 1
        self._sightings.move_to_end(prefix)
        while len(self._sightings) > REMEMBERED:
            self._sightings.popitem(last=False)
        remembered = {*self._operators, *self._sightings}
        self._used &= remembered
        self._tried &= remembered

    def worth_saving(self) -> Prefix | None:
        """A cached prefix that should be on disk and is not. For idle moments: it waits for a file being written."""
        if self._store is None:
            return None
        for prefix in self._used:
            self._store.touch(prefix)
        self._used.clear()
        seen = (prefix for prefix, count in self._sightings.items() if count >= SIGHTINGS)
        for prefix in (*self._operators, *seen):
            size = len(prefix.tokens)
            is_right_size = size >= SNAPSHOT_TOKENS and size * self._decoder.cell_bytes <= self._store.limit_bytes
            if not is_right_size or prefix in self._tried or prefix in self._store:
                continue
            if self.has(prefix):
                return prefix
        return None

    def save(self, prefix: Prefix, scratch: int) -> SavedCells | None:
        """The cells of a cached prefix, put together in the empty sequence `scratch`; None when they find no room there."""
        self._tried.add(prefix)
        size = len(prefix.tokens)
        match = self._cache.match(prefix.adapter, prefix.owner, prefix.tokens, size)
        if match.node.start == 0 and match.node.end == size and match.node.saved is not None:
            return match.node.saved.cells
        if not self._make_room(match.cells_to_load, match):
            return None
        match = self._cache.attach(match, scratch)
        try:
            return self._decoder.save(scratch) if match.length == size else None
        finally:
            self._decoder.remove(scratch, 0, -1)
            self._cache.unlock(match.node)

    def restorable(self) -> Iterator[tuple[Prefix, SavedCells]]:
        """Prefixes on disk that are not cached and find room, the last used last. Reads files: not for a held lock."""
        if self._store is None:
            return
        chosen, room = [], self._free + self._cache.saved_limit
        for prefix in self._store.prefixes():
            if len(prefix.tokens) <= min(room, self._free):
                chosen.append(prefix)
                room -= len(prefix.tokens)
        for prefix in reversed(chosen):
            if not self.has(prefix) and (payload := self._store.read(prefix)) is not None:
                yield prefix, payload

    def worth_recalling(self, job: Job) -> Prefix | None:
        """The longest beginning of the job's prompt that is on disk, if it saves enough and would find room now."""
        if self._store is None:
            return None
        found = self._store.longest(job.adapter, job.owner, job.tokens[: job.prompt_tokens - 1])
        if found is None or len(found.tokens) < self.cached_tokens(job) + RECALL_TOKENS:
            return None
        return found if len(found.tokens) <= self._free + self._cache.free_cells else None

    def read(self, prefix: Prefix) -> SavedCells | None:
        """Its cells from disk, or None when the file does not hold. Any thread."""
        return None if self._store is None else self._store.read(prefix)

    def restore(self, prefix: Prefix, payload: SavedCells, scratch: int) -> None:
        """Caches a prefix from its cells, through the empty sequence `scratch`, if others can make room for it."""
        assert self._store is not None
        if not self._make_room(len(prefix.tokens)):
            return
        try:
            self._decoder.restore(scratch, payload)
            self._cache.insert(prefix.adapter, prefix.owner, prefix.tokens, scratch)
            logger.info("event=prefix_restored tokens=%d bytes=%d", len(prefix.tokens), len(payload))
        except SnapshotRefused as error:
            self._store.discard(prefix, str(error))
        finally:
            self._decoder.remove(scratch, 0, -1)

    def clear(self) -> None:
        """After the decoder has forgotten its sequences, and no job is left."""
        self._cache.clear()
        self._reserved.clear()

    @property
    def _free(self) -> int:
        """Cells that are neither parked nor promised."""
        return self.cells - self._cache.cells - sum(job.capacity - job.shared for job in self._reserved)

    def _make_room(self, cells: int, match: Match | None = None) -> bool:
        """Whether so many cells are free now, or could be made so by parking others than the match's."""
        if match is not None:
            self._cache.lock(match.node)
        if is_possible := cells <= self._free + self._cache.free_cells:
            self._cache.park(cells - self._free)
        if match is not None:
            self._cache.unlock(match.node)
        return is_possible

    def _match(self, job: Job) -> Match:
        return self._cache.match(job.adapter, job.owner, job.tokens, job.prompt_tokens - 1)

    def _operator_length(self, prefix: Prefix) -> int:
        same = [each.tokens for each in self._operators if each.adapter == prefix.adapter]
        return max((common_length(tokens, prefix.tokens) for tokens in same), default=0)

    def _keep(self, job: Job, prefix: Prefix) -> None:
        node, added = self._cache.insert(prefix.adapter, prefix.owner, prefix.tokens, job.slot, job.locks)
        if node is not None:
            job.shared += added
            if node not in job.locks:
                job.locks.append(self._cache.lock(node))


def _needed(job: Job, match: Match) -> int:
    """Cells that the job takes when it shares the match."""
    return job.capacity - match.length + match.cells_to_load


def awaited_length(reader: Job, waiter: Job) -> int:
    """How many tokens of the waiter's prompt the reader will have computed when it has read its own."""
    if reader.adapter != waiter.adapter or reader.owner != waiter.owner:
        return 0
    return min(common_length(reader.tokens[: reader.prompt_tokens], waiter.tokens), waiter.prompt_tokens - 1)
