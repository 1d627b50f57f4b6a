"""The answers that have a slot: how they get one, what a step made of them, and how they leave it.

Used with the scheduler's lock held, but for `Decoder.decode` itself, which the scheduler calls.
"""

from collections.abc import Mapping, Sequence

import msgspec

from appliance.serving.batch import Batch, Composer
from appliance.serving.decoder import Decoder, Feed, Sampled
from appliance.serving.events import StepStats
from appliance.serving.job import Answer
from appliance.serving.pace import Pace
from appliance.serving.prefixes import Prefixes, awaited_length
from appliance.serving.speculation import Gate, Lookup
from appliance.serving.stitcher import Stitcher

AWAITED_TOKENS = 64  # a prefix that another request is just reading is worth waiting for from here on


class Running:
    """Answers in slots, in order of admission."""

    def __init__(
        self, decoder: Decoder, prefixes: Prefixes, stitcher: Stitcher, pace: Pace, gate: Gate | None, weight_bytes: int
    ) -> None:
        self._decoder = decoder
        self._prefixes = prefixes
        self._stitcher = stitcher
        self._pace = pace
        self._gate = gate
        self._weight_bytes = weight_bytes
        self._composer = Composer(pace, gate)
        self.answers: list[Answer] = []

    def admit(self, answer: Answer, now: float) -> bool:
        """Gives the answer a slot and what is known of its prompt; False when it has to wait.

        Raises as `Decoder.start` does, and then has changed nothing; when the cells fail, the answer is among `answers`.
        """
        if not self._prefixes.has_free_slot:
            return False
        request, job = answer.ticket.request, answer.job
        sampling = request.sampling
        if sampling.seed is not None:
            sampling = msgspec.structs.replace(sampling, seed=sampling.seed + answer.index)
        place = self._prefixes.choose(job)
        self._decoder.start(place.slot, sampling, answer.ticket.grammar, request.top_logprobs)
        self.answers.append(answer)
        self._stitcher.enter(answer, place)
        if answer.index == 0 and not job.is_forgotten:
            self._prefixes.see(job, answer.ticket.shared_tokens)
        answer.started_at = now
        if self._gate is not None:
            answer.record = self._gate.record()
        return True

    def has_to_wait(self, answer: Answer) -> bool:
        """Whether a running answer is just reading much of this one's prompt. It is waited for once, and then no more."""
        if not self._prefixes.can_share:
            return False
        if self._stitcher.has_to_wait(answer, self.answers):
            return True
        if answer.awaited is None and not answer.has_awaited:
            cached = self._stitcher.cached_tokens(answer.job)
            for reader in self.answers:
                is_sibling = reader.ticket is answer.ticket
                if reader.errand is not None and not is_sibling:
                    continue  # what it reads is known as soon as it is read, and not at its end
                gain = awaited_length(reader.job, answer.job) - cached
                if reader.job.is_reading and gain >= (1 if is_sibling else AWAITED_TOKENS):
                    answer.awaited = reader
                    break
        if answer.awaited is not None and not answer.awaited.is_over:
            reader_job = answer.awaited.job
            if reader_job.is_reading and reader_job.computed < awaited_length(reader_job, answer.job):
                return True
        answer.has_awaited, answer.awaited = answer.awaited is not None or answer.has_awaited, None
        return False

    def compose(self) -> Batch:
        self._prefixes.close_gaps()
        return self._composer.compose(self.answers)

    def take(self, batch: Batch, sampled: Mapping[int, Sequence[Sampled]], seconds: float, now: float) -> StepStats:
        """Notes what a decode call gave; answers that end with it have their `reason` set, and the caller ends them."""
        prompt_tokens = generated = forced_tokens = drafted = accepted = rows = read_cells = 0
        first: list[float] = []
        between: list[float] = []
        for answer, feed in batch.parts:
            job, given = answer.in_slot, sampled.get(feed.slot, ())
            read_cells += feed.position + len(feed.tokens)
            if answer.is_decoding:
                rows += len(feed.tokens)
            else:
                prompt_tokens += len(feed.tokens)
            right = max(0, len(given) - 1)
            job.computed += len(feed.tokens) - feed.drafted + right
            if feed.drafted and self._gate is not None and answer.record is not None:
                self._gate.learn(answer.record, feed.drafted, right)
                drafted, accepted = drafted + feed.drafted, accepted + right
            if answer.ticket.is_cancelled:
                continue
            self._stitcher.went_on(answer)
            if not given:
                continue
            if answer.ticket.first_token_at is None:
                first.append(now - answer.ticket.request.arrived_at)
            elif answer.last_token_at is not None:
                between.append(now - answer.last_token_at)
            taken, forced = self._take_tokens(answer, given, now)
            generated, forced_tokens = generated + taken, forced_tokens + forced
        self._pace.observe_step(seconds, rows=rows, prompt_tokens=prompt_tokens)
        return StepStats(
            seconds=seconds,
            prompt_tokens=prompt_tokens,
            generated_tokens=generated,
            first_token_seconds=tuple(first),
            inter_token_seconds=tuple(between),
            drafted_tokens=drafted,
            accepted_tokens=accepted,
            forced_tokens=forced_tokens,
            read_bytes=self._weight_bytes + read_cells * self._decoder.cell_bytes,
        )

    def stats_of_warming(self, feed: Feed, seconds: float) -> StepStats:
        """Of a decode call that read a part of an operator's prefix."""
        read_cells = feed.position + len(feed.tokens)
        return StepStats(
            seconds=seconds,
            prompt_tokens=len(feed.tokens),
            generated_tokens=0,
            read_bytes=self._weight_bytes + read_cells * self._decoder.cell_bytes,
        )

    def trim(self, batch: Batch) -> None:
        """Brings sequences back to what is known after an aborted call."""
        if self._decoder.can_share:
            for answer, feed in batch.parts:
                self._decoder.remove(feed.slot, answer.in_slot.computed, -1)

    def leave(self, answer: Answer) -> None:
        """Frees the slot; what was computed stays there until the slot is needed."""
        self.answers.remove(answer)
        self._prefixes.leave(answer.in_slot, answer.known_tokens)

    def clear(self) -> None:
        """After a failure, with no answer left."""
        self.answers.clear()
        self._prefixes.clear()
        self._decoder.clear()

    def _take_tokens(self, answer: Answer, given: Sequence[Sampled], now: float) -> tuple[int, int]:
        """Adds sampled tokens and those that the grammar decides after them; returns how many of all, and of the latter."""
        tokens = list(given)
        forced: Sequence[int] = ()
        if answer.ticket.grammar is not None:
            forced = self._decoder.forced(answer.job.slot)
            tokens += [Sampled(token) for token in forced]
        taken = answer.take(tokens, self._decoder, now)
        if self._gate is not None and answer.reason is None:
            if answer.lookup is None:
                answer.lookup = Lookup(answer.job.tokens)
            else:
                answer.lookup.extend([each.token for each in tokens])
        return taken, max(0, taken - len(given))
