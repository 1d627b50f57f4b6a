"""The beginnings of prompts that are known: in slots, in the prefix cache and on disk; how they come into a slot, and what
stays when an answer is over. Used from the scheduler's thread.
"""

import dataclasses
import logging
from collections.abc import Collection, Sequence

from appliance.serving import passages
from appliance.serving.cache import Match, PrefixCache, common_length
from appliance.serving.decoder import Decoder, SavedCells, SavedPart, SnapshotRefused
from appliance.serving.job import Job
from appliance.serving.runs import Finder
from appliance.serving.sightings import Sightings
from appliance.serving.slots import Slots
from appliance.serving.snapshots import Prefix, SnapshotStore

RECALL_TOKENS = 64  # what loading a file must save before a request waits for it
COPY_RATIO = 16  # a slot is copied whole: not for the sake of fewer tokens than one of so many, while somebody waits

logger = logging.getLogger("appliance.serving")


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """The longest beginning of a prompt that is known: in a slot, or else in the cache."""

    length: int
    match: Match
    slot: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A free slot for a job, and what it begins with there."""

    slot: int
    source: Source


class Prefixes:
    """Puts jobs into slots with what is known of their prompts, and keeps what they have computed."""

    def __init__(self, decoder: Decoder, cache_tokens: int, store: SnapshotStore | None) -> None:
        can_share = self.can_share = decoder.can_share
        self._decoder = decoder
        self._store = store if can_share else None
        mapped_tokens = 0 if self._store is None else self._store.limit_bytes // decoder.cell_bytes
        self._cache = PrefixCache(decoder.join, cache_tokens if can_share else 0, mapped_tokens)
        self._slots = Slots(decoder.slots)
        self._operators: list[Prefix] = []  # whatever begins like one of these may be shared by all
        self._documents: frozenset[Prefix] = frozenset()  # the operator's, read by themselves: for all as well
        self._sightings = None if self._store is None else Sightings(self._store, decoder.cell_bytes)

    @property
    def cells(self) -> int:
        return self._slots.count * self._decoder.context_tokens

    @property
    def used_cells(self) -> int:
        """By running answers and what the last ones left."""
        return self.running_cells + sum(len(left.prefix.tokens) for left in self._slots.left.values())

    @property
    def running_cells(self) -> int:
        return sum(job.computed for job in self._slots.running.values())

    @property
    def saved_tokens(self) -> int:
        """Of cached prefixes, in ordinary memory."""
        return self._cache.tokens

    @property
    def saved_limit(self) -> int:
        return self._cache.limit

    @property
    def place_left(self) -> int:
        """Tokens of the cache that a tenant's prompt can have."""
        return self._cache.limit - self._cache.common_tokens

    @property
    def has_free_slot(self) -> bool:
        return len(self._slots.running) < self._slots.count

    def cached_tokens(self, job: Job) -> int:
        """How much of the prompt need not be computed now; the last token always is."""
        return self.source(_prompt(job)).length

    def known_tokens(self, job: Job) -> int:
        """As `cached_tokens`, with what would be loaded from disk."""
        on_disk = self.worth_recalling(job)
        return self.cached_tokens(job) if on_disk is None else len(on_disk.tokens)

    def has(self, prefix: Prefix) -> bool:
        """Whether all of it is known."""
        return self.source(prefix).length == len(prefix.tokens)

    def is_somewhere(self, prefix: Prefix) -> bool:
        """Whether all of it is known, or on disk."""
        return self.has(prefix) or self.on_disk(prefix) is not None

    def on_disk(self, prefix: Prefix) -> Prefix | None:
        """What is in a file and will do for it: the operator's, or else its owner's."""
        if self._store is None:
            return None
        usable = (dataclasses.replace(prefix, owner=None), prefix)
        return next((each for each in usable if each in self._store), None)

    def touch(self, prefix: Prefix) -> None:
        """Counts as used now, as far as it is in the cache."""
        self._cache.touch(self._cache.match(prefix.adapter, prefix.owner, prefix.tokens))

    def parts(self, prefix: Prefix) -> list[SavedPart]:
        """The saved cells of a prefix that is known."""
        source = self.source(prefix)
        assert source.length == len(prefix.tokens), f"{source.length} of {len(prefix.tokens)} tokens are known"
        return self._parts(source)

    def choose(self, job: Job) -> Place:
        """Where the job would go now; there must be a free slot."""
        source = self.source(_prompt(job))
        return Place(self._slots.choose(source.slot), source)

    def enter(self, job: Job, place: Place) -> None:
        """Gives the job its slot, with what is known of its prompt; what was left there goes into the cache."""
        slot, source = place.slot, place.source
        if source.slot == slot:
            lost = len(self._slots.left[slot].prefix.tokens) - source.length
            if lost * COPY_RATIO > source.length:
                self.keep_left(slot)
            self._decoder.remove(slot, source.length, -1)
            job.computed = source.length
        else:
            parts = self._parts(source)
            self.keep_left(slot)
            job.computed = self._fill(slot, parts, job.prefix(source.length))
        self._slots.enter(slot, job)

    def enter_with(self, job: Job, slot: int, parts: Sequence[SavedPart]) -> bool:
        """Gives the job this slot with these cells; False when they are refused, and the slot is empty then."""
        self.keep_left(slot)
        length = sum(part.end - part.start for part in parts)
        try:
            if parts:
                self._decoder.restore(slot, parts)
            else:
                self._decoder.remove(slot, 0, -1)
        except SnapshotRefused as error:
            logger.warning("event=prefix_not_loaded tokens=%d reason=%r", length, str(error))
            self._slots.empty(slot)
            job.computed = 0
            return False
        job.computed = length
        self._slots.enter(slot, job)
        return True

    def keep(self, job: Job) -> None:
        """Takes the job out of its slot, and copies what it has computed into the cache."""
        self._slots.leave(job, job.prefix(job.computed))
        self.keep_left(job.slot)

    def drop(self, job: Job) -> None:
        """Takes the job out of its slot, which is empty then."""
        self._slots.leave(job, job.prefix(0))
        self._decoder.remove(job.slot, 0, -1)

    def leave(self, job: Job, known_tokens: int) -> None:
        """Takes the job's slot back; what it has computed of its `known_tokens` stays there until the slot is needed."""
        kept = min(known_tokens, job.computed) if self.can_share and not job.is_forgotten else 0
        self._decoder.release(job.slot, kept)
        self._slots.leave(job, job.prefix(kept))
        job.computed = 0

    def keep_left(self, slot: int) -> None:
        """Copies what was left in a slot into the cache, unless it is there or finds no place."""
        left = self._slots.left.get(slot)
        if left is None or left.is_cached:
            return
        self._slots.note_cached(slot)
        saved: list[SavedPart] = []
        prefix, size = left.prefix, len(left.prefix.tokens)

        def save() -> SavedPart:
            if not saved:
                saved.append(SavedPart(self._decoder.save(slot), 0, size))
            return saved[0]

        common = 0 if prefix.owner is None else self._operator_length(prefix)
        if common:
            self._cache.insert(prefix.adapter, None, prefix.tokens[:common], save)
        self._cache.insert(prefix.adapter, prefix.owner, prefix.tokens, save)

    def close_gaps(self) -> None:
        """Moves running answers until they are side by side."""
        if not self.can_share:
            return
        for source, target in self._slots.moves():
            self.keep_left(target)
            self._decoder.move(source, target)
            self._slots.moved(source, target)

    def save_one(self) -> bool:
        """Copies what was left in a slot into the cache, for an idle moment; False when all is there."""
        for slot, left in self._slots.left.items():
            if not left.is_cached:
                self.keep_left(slot)
                return True
        return False

    @property
    def operators(self) -> Sequence[Prefix]:
        return self._operators

    def add_operator_prefix(self, prefix: Prefix) -> None:
        if prefix not in self._operators:
            self._operators.append(prefix)

    def drop_operator_prefix(self, prefix: Prefix) -> None:
        self._operators.remove(prefix)

    def set_documents(self, documents: Collection[Prefix]) -> None:
        """The operator's; their files stay while others have to make room."""
        self._documents = frozenset(documents)
        if self._store is not None:
            self._store.protect(documents)

    def keep_document(self, document: Prefix, *, is_on_disk: bool) -> None:
        """Copies what was read ahead from its slot into the cache; one that is on disk if nothing has to leave for it."""
        for slot, left in list(self._slots.left.items()):
            if left.prefix == document and not left.is_cached:
                if is_on_disk and self._cache.tokens + len(document.tokens) > self._cache.limit:
                    self._slots.note_cached(slot)  # as good as
                else:
                    self.keep_left(slot)

    def erase(self, find: Finder) -> tuple[int, int]:
        """Forgets all in which `find` finds something, but for running answers: of how many cached tokens and slots."""
        tokens, slots = self._cache.erase(find), 0
        for slot, left in list(self._slots.left.items()):
            if find(passages.texts(left.prefix.tokens)) is not None:
                self._decoder.remove(slot, 0, -1)
                self._slots.empty(slot)
                slots += 1
        if self._sightings is not None:
            self._sightings.erase(find)
        return tokens, slots

    def see(self, job: Job, shared_tokens: int) -> None:
        """Counts a prompt whose first `shared_tokens` hold no visitor's text."""
        self.see_prefix(job.prefix(shared_tokens))

    def see_prefix(self, prefix: Prefix) -> None:
        """Counts a prefix that may be asked for again."""
        if self._sightings is not None:
            self._sightings.see(prefix, self._operators, self._documents)

    def worth_saving(self) -> Prefix | None:
        """A cached prefix that should be on disk and is not. For idle moments: it waits for a file being written."""
        if self._sightings is None:
            return None
        self._sightings.tell_files()
        return next((prefix for prefix in self._sightings.worth_saving(self._operators) if self.has(prefix)), None)

    def save(self, prefix: Prefix) -> SavedCells | None:
        """The cells of a known prefix; None when they cannot be put together."""
        if self._sightings is not None:
            self._sightings.note_tried(prefix)
        size = len(prefix.tokens)
        source = self.source(prefix)
        try:
            return self._decoder.join(self._parts(source)) if source.length == size else None
        except SnapshotRefused as error:
            logger.warning("event=prefix_not_saved tokens=%d reason=%r", size, str(error))
            return None

    def restorable(self) -> Sequence[Prefix]:
        """The last used prefixes on disk, as many as find room, oldest first; documents wait until they are asked for.

        Brought back in this order, the last used one is the last to leave again.
        """
        if self._store is None:
            return []
        chosen: list[Prefix] = []
        tokens = 0
        for prefix in self._store.prefixes():
            size = len(prefix.tokens)
            if not passages.is_alone(prefix.tokens) and self._cache.has_room(tokens + size, is_mapped=True):
                chosen.append(prefix)
                tokens += size
        return chosen[::-1]

    def has_room_for(self, prefix: Prefix) -> bool:
        """Whether it is not known, and no other file's pages would have to be given up for it."""
        return not self.has(prefix) and self._cache.has_room(len(prefix.tokens), is_mapped=True)

    def worth_recalling(self, job: Job) -> Prefix | None:
        """The longest beginning of the job's prompt that is on disk, if it saves enough."""
        if self._store is None:
            return None
        found = self._store.longest(job.adapter, job.owner, _prompt(job).tokens)
        return found if found is not None and len(found.tokens) >= self.cached_tokens(job) + RECALL_TOKENS else None

    def read(self, prefix: Prefix) -> SavedCells | None:
        """Its cells from disk, or None when the file does not hold. Any thread."""
        return None if self._store is None else self._store.read(prefix)

    def restore(self, prefix: Prefix, payload: SavedCells) -> None:
        """Caches what was read from disk; it stays in the file's pages."""
        assert self._store is not None
        size = len(prefix.tokens)
        try:
            self._decoder.check(payload, size)
        except SnapshotRefused as error:
            self._store.discard(prefix, str(error))
            return
        whole = SavedPart(payload, 0, size)
        if self._cache.insert(prefix.adapter, prefix.owner, prefix.tokens, lambda: whole, is_mapped=True):
            logger.info("event=prefix_restored tokens=%d bytes=%d", size, len(payload))

    def clear(self) -> None:
        """After the decoder has forgotten its sequences, and no job is left."""
        self._cache.clear()
        self._slots.clear()

    def source(self, wanted: Prefix) -> Source:
        """The longest known beginning; one in a free slot, which need not be copied, before another of the same length."""
        match = self._cache.match(wanted.adapter, wanted.owner, wanted.tokens)
        best, is_best_free = Source(match.length, match), False
        for slot, held in self._slots.held() if self.can_share else ():
            length, is_free = self._shared_length(held, wanted), slot not in self._slots.running
            is_worth_it = is_free or length * COPY_RATIO >= len(held.tokens)
            if is_worth_it and length and (length, is_free) > (best.length, is_best_free):
                best, is_best_free = Source(length, match, slot), is_free
        return best

    def _shared_length(self, held: Prefix, wanted: Prefix) -> int:
        """How much of what a slot holds may be used: another tenant's only as far as it is the operator's text."""
        if held.adapter != wanted.adapter:
            return 0
        length = common_length(held.tokens, wanted.tokens)
        return length if held.owner in (None, wanted.owner) else min(length, self._operator_length(held))

    def _parts(self, source: Source) -> list[SavedPart]:
        """The cells for another slot: the cache's, which need not be saved any more, if it has as many."""
        if source.slot is not None and source.match.length < source.length:
            return [SavedPart(self._decoder.save(source.slot), 0, source.length)]
        return self._cache.parts(source.match)

    def _fill(self, slot: int, parts: Sequence[SavedPart], prefix: Prefix) -> int:
        """Puts saved cells into a slot; returns how many tokens it holds then."""
        if not parts:
            if slot in self._slots.left:
                self._decoder.remove(slot, 0, -1)
            return 0
        try:
            self._decoder.restore(slot, parts)
        except SnapshotRefused as error:
            logger.warning("event=prefix_not_loaded tokens=%d reason=%r", len(prefix.tokens), str(error))
            match = self._cache.match(prefix.adapter, prefix.owner, prefix.tokens)
            if match.length:
                self._cache.forget(match)
            return 0
        return len(prefix.tokens)

    def _operator_length(self, prefix: Prefix) -> int:
        same = [each.tokens for each in self._operators if each.adapter == prefix.adapter]
        return max((common_length(tokens, prefix.tokens) for tokens in same), default=0)


def _prompt(job: Job) -> Prefix:
    """What may be shared of a prompt: its last token is always computed."""
    return job.prefix(job.prompt_tokens - 1)


def awaited_length(reader: Job, waiter: Job) -> int:
    """How many tokens of the waiter's prompt the reader will have computed when it has read its own."""
    if reader.adapter != waiter.adapter or reader.owner != waiter.owner:
        return 0
    return common_length(reader.prefix(reader.prompt_tokens).tokens, _prompt(waiter).tokens)
