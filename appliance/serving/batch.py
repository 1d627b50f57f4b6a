"""What the next decode call computes: answers first, one adapter at a time, and prompts in the room that is left.

Every group of answers with one adapter gets its turn, and every prompt its share. Knows the rates of `Pace` and the
verdicts of the speculation `Gate`; it changes no answer.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from appliance.serving.decoder import MAX_DRAFT_TOKENS, Adapter, Feed
from appliance.serving.job import Answer
from appliance.serving.pace import Pace
from appliance.serving.speculation import Gate, Proposal

SHORTEST_PART_TOKENS = 32  # of a prompt that is read beside others: fewer take as long


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    adapter: Adapter | None
    parts: Sequence[tuple[Answer, Feed]]

    @property
    def feeds(self) -> list[Feed]:
        return [feed for _, feed in self.parts]


class Composer:
    """Makes batches; remembers whose turn it was."""

    def __init__(self, pace: Pace, gate: Gate | None) -> None:
        self._pace = pace
        self._gate = gate
        self._turns: list[Adapter | None] = []  # longest ago first
        self._is_first_served = False

    def compose(self, answers: Sequence[Answer]) -> Batch:
        """The next batch of these running answers, of which there is at least one."""
        adapter = self._next_turn(dict.fromkeys(answer.job.adapter for answer in answers))
        group = [answer for answer in answers if answer.job.adapter == adapter]
        decoding = [answer for answer in group if answer.is_decoding]
        reading = [answer for answer in group if not answer.is_decoding]
        parts = []
        drafts = self._drafts(decoding, is_reading=bool(reading))
        if not reading and all(len(answer.job.tokens) - answer.job.computed <= 1 + MAX_DRAFT_TOKENS for answer in decoding):
            room = 0  # nobody wants any, as in most steps
        else:
            room = self._pace.chunk_tokens(len(decoding), is_busy=any(answer.is_decoding for answer in answers))
        for answer in decoding:
            job = answer.job
            # A grammar may have decided more tokens than there are rows for each answer; the rest uses the prompts' room.
            count = min(len(job.tokens) - job.computed, 1 + MAX_DRAFT_TOKENS + room)
            room -= max(0, count - 1 - MAX_DRAFT_TOKENS)
            parts.append((answer, _feed(answer, count, drafts.get(answer, ()))))
        # In turns, so that a short question does not wait for a long document, and the document only twice as long as alone.
        self._is_first_served ^= len(reading) > 1
        for answer, count in _shares(reading, room, is_first_served=self._is_first_served):
            parts.append((answer, _feed(answer, count, ())))
        return Batch(adapter, parts)

    def _next_turn(self, present: Iterable[Adapter | None]) -> Adapter | None:
        present = list(present)
        if len(present) == 1 and self._turns == present:
            return present[0]
        self._turns = [adapter for adapter in self._turns if adapter in present]
        new = [adapter for adapter in present if adapter not in self._turns]
        adapter = new[0] if new else self._turns.pop(0)
        self._turns.append(adapter)
        return adapter

    def _drafts(self, decoding: Sequence[Answer], *, is_reading: bool) -> dict[Answer, Sequence[int]]:
        """Guesses by answer: only for those that have exactly their last token to compute."""
        if self._gate is None:
            return {}
        guesses: list[tuple[Answer, Sequence[int]]] = []
        for answer in decoding:
            job = answer.job
            limit = min(MAX_DRAFT_TOKENS, answer.ticket.max_tokens - answer.generated - 1)
            if answer.lookup is None or limit < 1 or len(job.tokens) - job.computed > 1:
                continue
            if found := answer.lookup.drafts(limit):
                guesses.append((answer, found))
        proposals = [Proposal(answer.record, len(found)) for answer, found in guesses if answer.record is not None]
        rows = sum(len(answer.job.tokens) - answer.job.computed for answer in decoding)
        counts = self._gate.choose(proposals, rows=rows, answers=len(decoding), may_try=not is_reading)
        return {answer: found[:count] for (answer, found), count in zip(guesses, counts, strict=True)}


def _feed(answer: Answer, count: int, drafts: Sequence[int]) -> Feed:
    job = answer.in_slot
    end = job.computed + count
    tokens = [*job.tokens[job.computed : end], *drafts]
    is_sampled = end == len(job.tokens) and job is answer.job
    return Feed(job.slot, tokens, job.computed, is_sampled=is_sampled, drafted=len(drafts))


def _shares(reading: Sequence[Answer], room: int, *, is_first_served: bool) -> list[tuple[Answer, int]]:
    """Splits the room among prompts: what is short goes first, in half of it, and the rest to the one that came first.

    Where none is short, the first that came is served, or else the one that is nearest to its answer. A part of a prompt is
    as long as can be, because each one in a batch costs a pass over the weights.
    """
    left = {answer: answer.in_slot.next_stop - answer.in_slot.computed for answer in reading}
    if len(reading) == 1:
        # In equal parts: a last part of a few tokens takes nearly as long as one of fifty.
        parts = math.ceil(left[reading[0]] / room) if room > 0 else 0
        return [(reading[0], math.ceil(left[reading[0]] / parts))] if parts else []
    order = sorted(reading, key=left.__getitem__)
    short = sum(1 for total in itertools.accumulate(left[answer] for answer in order) if total <= room // 2)
    if order and (short or is_first_served):
        order = list(dict.fromkeys([*order[:short], reading[0], *order]))
    shares: list[tuple[Answer, int]] = []
    for answer in order:
        count = min(room, left[answer])
        if count < min(left[answer], SHORTEST_PART_TOKENS if shares else 1):
            break
        shares.append((answer, count))
        room -= count
    return shares
