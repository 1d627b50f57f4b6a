"""One request's state: the request as a whole (`Ticket`), each of its answers, and the sequence that an answer computes.

Turns sampled tokens into events. Knows the `Decoder` only as a vocabulary; slots, budgets and batches are others' business.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from appliance.serving import passages
from appliance.serving.decoder import Adapter, CompiledGrammar, Sampled
from appliance.serving.events import (
    Event,
    Finished,
    FinishReason,
    Outcome,
    Phase,
    Reading,
    RequestStats,
    TextPiece,
    TokenLogprob,
)
from appliance.serving.passages import Passages
from appliance.serving.requests import GenerationRequest
from appliance.serving.snapshots import Prefix
from appliance.serving.speculation import Lookup, Record
from appliance.serving.text_stream import TextStream


class Vocabulary(Protocol):
    def piece(self, token: int) -> bytes: ...

    def is_end(self, token: int) -> bool: ...


@dataclasses.dataclass(slots=True, eq=False)
class Job:
    """A sequence to compute: known tokens, how many of them have their cells, and where."""

    tokens: list[int]  # prompt, then what was sampled
    prompt_tokens: int
    adapter: Adapter | None
    owner: str | None  # whose prompt it is; None: the operator's
    slot: int = -1
    computed: int = 0
    is_alone: bool = False  # a document that is read by itself
    is_forgotten: bool = False  # leaves nothing behind
    stitching: "Stitching | None" = None

    @property
    def is_reading(self) -> bool:
        return self.computed < self.prompt_tokens

    @property
    def next_stop(self) -> int:
        """The most tokens that may be computed before something else has to be done."""
        stops = self.stitching.stops if self.stitching is not None else ()
        return next((stop for stop in stops if stop > self.computed), len(self.tokens))

    def prefix(self, length: int) -> Prefix:
        """How its first tokens are known."""
        tokens = self.tokens if self.stitching is None else self.stitching.marked(self.tokens)
        known = tuple(tokens[:length])
        return Prefix(passages.alone(known) if self.is_alone else known, self.adapter, self.owner)


@dataclasses.dataclass(slots=True, eq=False)
class Stitching:
    """How a prompt is put together from documents that were read by themselves.

    `stops` are positions up to which tokens are computed, and behind which the rest of a document is known.
    """

    passages: Passages
    reread_tokens: int  # of each document, computed where it stands
    stops: Sequence[int] = ()
    known: int = 0  # of the prompt's beginning, when the answer got its slot
    tried: set[tuple[int, int]] = dataclasses.field(default_factory=set)  # what was read for it
    _marked: list[int] = dataclasses.field(default_factory=list)

    def marked(self, tokens: Sequence[int]) -> list[int]:
        """How all tokens of the prompt and its answer are known; they only become more."""
        if not self._marked:
            self._marked += passages.stitched(tokens, self.passages, self.reread_tokens)
        if len(self._marked) < len(tokens):
            mark = passages.mark(self.reread_tokens)
            self._marked += [mark | token for token in tokens[len(self._marked) :]]
        return self._marked

    def kept(self, span: tuple[int, int]) -> int:
        """How much of a document is not read again."""
        start, end = span
        return max(0, end - start - self.reread_tokens)

    def stops_from(self, begin: int) -> list[int]:
        """Where what is known up to `begin`."""
        spans = (span for span in self.passages.spans if span[0] >= begin and self.kept(span))
        return [start + self.reread_tokens for start, _ in spans] if self.reread_tokens else []


@dataclasses.dataclass(slots=True, eq=False)
class Answer:
    """One of the answers to a request, on its way through queue, prefill and decode."""

    ticket: "Ticket"
    index: int
    job: Job
    stream: TextStream
    errand: Job | None = None  # what is read before the job, in its slot
    read_apart: int = 0  # tokens of errands that are over
    expected_cached: int = 0  # when it was queued
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    cached: int = 0
    stitched: int = 0  # of them, moved to where they stand
    generated: int = 0
    awaited: "Answer | None" = None  # reads a prefix that this answer needs too
    has_awaited: bool = False
    recalled: Sequence[Prefix] = ()  # are being read from disk for this answer
    has_recalled: bool = False
    lookup: Lookup | None = None
    record: Record | None = None
    reason: FinishReason | None = None
    failure: str | None = None  # why sampling could not go on
    is_over: bool = False
    interval_seconds: float = 0.0  # text leaves at most this often
    unsent: str = ""
    unsent_logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    sent_at: float = -math.inf

    @property
    def is_decoding(self) -> bool:
        return self.generated > 0

    @property
    def reading(self) -> Reading | None:
        """How the documents are read, if there are any, as far as it is known by now."""
        if self.ticket.passages is None:
            return None
        return "exact" if self.job.stitching is None else "stitched"

    @property
    def in_slot(self) -> Job:
        """The sequence that is computed now."""
        return self.errand or self.job

    @property
    def has_unsent(self) -> bool:
        return bool(self.unsent or self.unsent_logprobs)

    @property
    def known_tokens(self) -> int:
        """Computed tokens that are part of the conversation: none behind what ended the answer."""
        return min(self.in_slot.computed, self.in_slot.prompt_tokens + self.generated)

    def take(self, sampled: Iterable[Sampled], vocabulary: Vocabulary, now: float) -> int:
        """Adds what was sampled and delivers its text; returns how many tokens counted. Sets `reason` at the end."""
        before = self.generated
        for each in sampled:
            self.job.tokens.append(each.token)
            if self.reason is None:
                self.unsent += self._take_token(each, vocabulary)
        if self.generated > before:
            self.first_token_at = self.first_token_at or now
            self.ticket.first_token_at = self.ticket.first_token_at or now
            self.last_token_at = now
        if self.reason is not None:
            self.send_rest()
        elif self.has_unsent and now - self.sent_at >= self.interval_seconds:
            self.send()
            self.sent_at = now
        return self.generated - before

    def send_rest(self) -> None:
        """Delivers all text that there is, since no more can follow."""
        self.unsent += self.stream.finish()
        self.send()

    def send(self) -> None:
        """Delivers what has not left yet."""
        if self.has_unsent:
            self.ticket.deliver(TextPiece(text=self.unsent, index=self.index, logprobs=tuple(self.unsent_logprobs)))
            self.unsent = ""
            self.unsent_logprobs.clear()

    def finished(self, reason: FinishReason, now: float, *, is_deadline: bool = False) -> Finished:
        started, first = self.started_at or now, self.first_token_at or now
        return Finished(
            reason=reason,
            prompt_tokens=self.job.prompt_tokens,
            generated_tokens=self.generated,
            cached_tokens=self.cached,
            stitched_tokens=self.stitched,
            documents=self.reading,
            index=self.index,
            is_deadline=is_deadline,
            stop=self.stream.stopped_by,
            queue_seconds=started - self.ticket.request.arrived_at,
            prefill_seconds=first - started,
            decode_seconds=now - first,
        )

    def _take_token(self, sampled: Sampled, vocabulary: Vocabulary) -> str:
        """The text that one token makes final."""
        if sampled.failure is not None:
            self.reason, self.failure = "stop", sampled.failure
            return ""
        self.generated += 1
        request = self.ticket.request
        if vocabulary.is_end(sampled.token) and not request.ignore_end:
            self.reason = "stop"
            return ""
        piece = vocabulary.piece(sampled.token)
        text = self.stream.push(piece)
        if sampled.logprob is not None:
            top = tuple((vocabulary.piece(token), logprob) for token, logprob in sampled.top)
            self.unsent_logprobs.append(TokenLogprob(piece=piece, logprob=sampled.logprob, top=top))
        if self.stream.is_stopped:
            self.reason = "stop"
        elif self.generated >= self.ticket.max_tokens:
            self.reason = "length"
        return text


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """An accepted request: where its events go, and what is counted once for all its answers."""

    request: GenerationRequest
    prompt: tuple[int, ...]
    shared_tokens: int  # how much of the prompt holds no visitor's text
    grammar: CompiledGrammar | None
    deliver: Callable[[Event], None]
    max_tokens: int
    passages: Passages | None = None
    answers: list[Answer] = dataclasses.field(default_factory=list)
    first_token_at: float | None = None
    is_cancelled: bool = False
    is_deadline_missed: bool = False

    @property
    def started_at(self) -> float | None:
        return min((each.started_at for each in self.answers if each.started_at is not None), default=None)

    @property
    def is_over(self) -> bool:
        return all(answer.is_over for answer in self.answers)

    @property
    def phase(self) -> Phase:
        if self.first_token_at is not None:
            return "decode"
        return "queue" if self.started_at is None else "prefill"

    def stats(self, now: float, failure_code: str | None = None) -> RequestStats:
        """Of the request, once it is over."""
        reasons = {answer.reason for answer in self.answers}
        outcome: Outcome = "failed"
        if failure_code is None:
            outcome = "cancelled" if "cancelled" in reasons else "length" if "length" in reasons else "stop"
        arrived, started, first = self.request.arrived_at, self.started_at, self.first_token_at
        return RequestStats(
            id=self.request.id,
            outcome=outcome,
            duration_seconds=now - arrived,
            queue_seconds=(now if started is None else started) - arrived,
            prefill_seconds=None if started is None else (first or now) - started,
            decode_seconds=None if first is None else now - first,
            prompt_tokens=len(self.prompt),
            cached_tokens=self.answers[0].cached,
            stitched_tokens=self.answers[0].stitched,
            documents=self.answers[0].reading,
            generated_tokens=sum(answer.generated for answer in self.answers),
            n=self.request.n,
            max_tokens=self.request.max_tokens,
            cancelled_in=self.phase if outcome == "cancelled" else None,
            missed_deadline_in=self.phase if self.is_deadline_missed else None,
            failure_code=failure_code,
        )
