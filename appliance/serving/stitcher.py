"""Puts prompts together from documents that were each read once, by themselves: their cells are moved to where they stand.

What is not known yet is read first, one after the other in the slot of the answer that needs it (its errands), and is known
from then on. Where anything refuses, the prompt is read from its beginning to its end, as any other. Used with the
scheduler's lock held.
"""

import logging
from collections.abc import Iterator, Sequence

from appliance.serving.decoder import Adapter, Decoder, SavedPart
from appliance.serving.job import Answer, Job, Stitching
from appliance.serving.passages import Passages, arranged
from appliance.serving.prefixes import Place, Prefixes
from appliance.serving.snapshots import Prefix

logger = logging.getLogger("appliance.serving")


class Stitcher:
    """`reread_tokens` of each document are computed anew where it stands; None: no prompt is put together."""

    def __init__(self, decoder: Decoder, prefixes: Prefixes, reread_tokens: int | None, tolerance: float) -> None:
        self._decoder = decoder
        self._prefixes = prefixes
        self._tolerance = tolerance
        self.read_from_now_on(reread_tokens)

    def read_from_now_on(self, reread_tokens: int | None) -> None:
        """How documents of prompts to come are read: so many tokens of each where they stand; None: all of it."""
        self._reread_tokens = reread_tokens if self._decoder.can_move else None

    @property
    def is_stitching(self) -> bool:
        return self._reread_tokens is not None

    def arranged(
        self, prompt: Sequence[int], passages: Passages | None, adapter: Adapter | None, owner: str
    ) -> tuple[Sequence[int], Passages | None]:
        """The prompt, with its documents where most of what is known of them is of use: anywhere, if each is read apart."""
        if passages is None or self._can_stitch(passages):
            return prompt, passages

        def known(tokens: Sequence[int]) -> int:
            return self._prefixes.source(Prefix(tuple(tokens), adapter, owner)).length

        return arranged(prompt, passages, self._tolerance, known)

    def plan(self, job: Job, passages: Passages | None) -> None:
        """Decides how the job's prompt will be read. What is put together must find place in the cache beforehand."""
        if passages is None or self._reread_tokens is None:
            return
        if self._can_stitch(passages) and passages.end < job.prompt_tokens:
            job.stitching = Stitching(passages, self._reread_tokens)

    def _can_stitch(self, passages: Passages) -> bool:
        return self.is_stitching and passages.end <= self._prefixes.place_left

    def known_tokens(self, job: Job) -> int:
        """How much of the prompt need not be computed, with what would be loaded from disk."""
        whole = self._prefixes.known_tokens(job)
        if job.stitching is None or whole >= job.stitching.passages.end:
            return whole
        kept = sum(job.stitching.kept(span) for span in self._spans(job) if self._prefixes.is_somewhere(_part(job, *span)))
        return max(whole, self._begin(job) + kept)

    def cached_tokens(self, job: Job) -> int:
        """The same of what is in memory."""
        whole = self._prefixes.cached_tokens(job)
        if job.stitching is None or whole >= job.stitching.passages.end:
            return whole
        kept = sum(job.stitching.kept(span) for span in self._spans(job) if self._prefixes.has(_part(job, *span)))
        return max(whole, self._begin(job) + kept)

    def worth_recalling(self, job: Job) -> Sequence[Prefix]:
        """What is on disk and should be in memory before the job begins."""
        found = self._prefixes.worth_recalling(job)
        wanted = [] if found is None else [found]
        if job.stitching is not None:
            parts = [_part(job, *span) for span in self._spans(job)]
            files = [self._prefixes.on_disk(part) for part in parts if not self._prefixes.has(part)]
            wanted += [file for file in files if file is not None]
        return wanted

    def has_to_wait(self, answer: Answer, running: Sequence[Answer]) -> bool:
        """One answer at a time reads what is not known: another may need the same, and the cache has to hold it all."""
        if answer.job.stitching is None or not any(each.errand is not None for each in running):
            return False
        return next(self._missing(answer.job), None) is not None

    def enter(self, answer: Answer, place: Place) -> None:
        """Gives the answer its slot, with what is known of its prompt."""
        job, stitching = answer.job, answer.job.stitching
        if stitching is not None and answer.index == 0:
            for span in stitching.passages.spans:
                self._prefixes.see_prefix(_part(job, *span))
        if stitching is None or place.source.length >= stitching.passages.end:
            self._prefixes.enter(job, place)
            answer.cached = job.computed
            if stitching is not None and job.computed < stitching.passages.end:
                job.stitching = None  # its cells were refused, and it is read from its beginning
            return
        self._prefixes.keep_left(place.slot)
        for span in self._spans(job):
            self._prefixes.touch(_part(job, *span))  # or what has to be read would push it out
        stitching.known = self._begin(job)
        self._go_on(answer, place.slot)

    def went_on(self, answer: Answer) -> None:
        """To be called when the answer's errand or job has computed more: does what comes next, if it is time."""
        errand, job = answer.errand, answer.job
        if errand is not None:
            if not errand.is_reading:
                answer.read_apart += errand.prompt_tokens
                self._prefixes.keep(errand)
                self._go_on(answer, errand.slot)
        elif job.stitching is not None and job.computed in job.stitching.stops:
            self._append(answer)

    def forget(self, answer: Answer) -> None:
        """Lets the answer end as it would, and leave nothing; documents that it has not got yet it reads in their place.

        It waits or runs, and nothing is being computed.
        """
        errand, job = answer.errand, answer.job
        job.is_forgotten = True
        if errand is not None:
            answer.errand = None
            self._prefixes.drop(errand)
            self._read_whole(answer, errand.slot, "a document was removed meanwhile")
        elif answer.started_at is None:
            job.stitching = None

    def _go_on(self, answer: Answer, slot: int) -> None:
        """The next errand, or else the job itself."""
        answer.errand = None
        job, stitching = answer.job, answer.job.stitching
        assert stitching is not None
        missing = next(self._missing(job), None)
        if missing is None:
            self._put_together(answer, slot)
        elif missing in stitching.tried:
            self._read_whole(answer, slot, "what was read for it found no place in the cache")
        else:
            stitching.tried.add(missing)
            start, end = missing
            alone = start >= stitching.passages.start
            answer.errand = Job(job.tokens[start:end], end - start, job.adapter, job.owner, is_alone=alone)
            self._prefixes.enter(answer.errand, Place(slot, self._prefixes.source(answer.errand.prefix(end - start))))
            if not alone:
                stitching.known = answer.errand.computed

    def _put_together(self, answer: Answer, slot: int) -> None:
        """Everything up to the first token that has to be computed."""
        job, begin = answer.job, self._begin(answer.job)
        assert job.stitching is not None
        parts = self._prefixes.parts(job.prefix(begin)) if begin else []
        job.stitching.stops = job.stitching.stops_from(begin)
        moved = [] if job.stitching.reread_tokens else self._spans(job)
        for span in moved:
            parts += self._prefixes.parts(_part(job, *span))
        answer.cached = min(begin, job.stitching.known)
        if self._prefixes.enter_with(job, slot, parts):
            _count(answer, moved)
        else:
            self._read_whole(answer, slot, "its cells were not taken")

    def _append(self, answer: Answer) -> None:
        """The rest of the document whose beginning was just read again; it is read as well if it is not known any more."""
        job = answer.job
        assert job.stitching is not None
        start, end = next(span for span in job.stitching.passages.spans if span[0] < job.computed <= span[1])
        if not self._prefixes.has(_part(job, start, end)):
            return
        own = SavedPart(self._decoder.save(job.slot), 0, job.computed)
        rest = self._prefixes.parts(_part(job, start, end))
        if self._prefixes.enter_with(job, job.slot, [own, *_cut(rest, job.computed - start)]):
            _count(answer, [(start, end)])
        else:
            self._read_whole(answer, job.slot, "its cells were not taken")

    def _read_whole(self, answer: Answer, slot: int, reason: str) -> None:
        logger.warning("event=documents_read_exactly tokens=%d reason=%r", answer.job.prompt_tokens, reason)
        job, stitching = answer.job, answer.job.stitching
        assert stitching is not None
        job.stitching = None
        self._prefixes.enter(job, Place(slot, self._prefixes.source(job.prefix(job.prompt_tokens - 1))))
        answer.cached, answer.stitched = min(job.computed, stitching.known), 0
        answer.expected_cached = answer.read_apart = 0

    def _missing(self, job: Job) -> Iterator[tuple[int, int]]:
        """What has to be read by itself: first of all what stands before the documents, unless more is known."""
        assert job.stitching is not None
        start = job.stitching.passages.start
        if self._begin(job) < start:
            yield 0, start
        for span in self._spans(job):
            if job.stitching.kept(span) and not self._prefixes.has(_part(job, *span)):
                yield span

    def _spans(self, job: Job) -> Sequence[tuple[int, int]]:
        """The documents that are not in the known beginning of the prompt."""
        assert job.stitching is not None
        begin = self._begin(job)
        return [span for span in job.stitching.passages.spans if span[0] >= begin]

    def _begin(self, job: Job) -> int:
        """How much of the prompt's beginning is known, in whole documents; all of it where it goes beyond them."""
        assert job.stitching is not None
        known = self._prefixes.source(job.prefix(job.prompt_tokens - 1)).length
        passages = job.stitching.passages
        if known >= passages.end:
            return known
        # A shorter beginning may not be worth its copy where a longer one is, so that each is asked for by itself.
        fitting = (bound for bound in reversed(passages.bounds) if bound <= known)
        return next((bound for bound in fitting if self._prefixes.has(job.prefix(bound))), 0)


def _count(answer: Answer, moved: Sequence[tuple[int, int]]) -> None:
    """Notes what need not be computed: not what was just read for this answer."""
    stitching = answer.job.stitching
    assert stitching is not None
    kept = sum(stitching.kept(span) for span in moved if span not in stitching.tried)
    answer.stitched += kept
    answer.cached += kept


def _part(job: Job, start: int, end: int) -> Prefix:
    """How a part of the prompt is known when it was read by itself."""
    apart = Job(job.tokens[start:end], end - start, job.adapter, job.owner, is_alone=True)
    return apart.prefix(end - start)


def _cut(parts: Sequence[SavedPart], start: int) -> Iterator[SavedPart]:
    """The parts from this position on."""
    for part in parts:
        if part.end > start:
            yield SavedPart(part.cells, max(part.start, start), part.end)
