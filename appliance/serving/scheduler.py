"""Continuous batching: one thread owns the decoder and answers up to `slots` requests together; others wait.

Each step computes the running answers first and fills what room is left with prompts, so that a long prompt never freezes
an answer. `Scheduler` is used from any thread. Its parts: `job.py` (a request's state), `backlog.py` (who waits),
`running.py` (who is answered), `slots.py` (where), `prefixes.py` (what is known of a prompt), `stitcher.py` (documents that
were read by themselves), `batch.py` (what a step computes), `recall.py` (what comes back from disk), `idle.py` (what is done
while nobody asks), `reading_ahead.py` and `document_orders.py` (the operator's documents), `heap.py` (freed memory).
Knows nothing of llama.cpp (a `Decoder` does the computing), of HTTP or of templates.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from appliance.errors import DeadlineExceeded, EngineFailed, PromptTooLong, RequestError
from appliance.serving.backlog import Backlog
from appliance.serving.decoder import Adapter, CompiledGrammar, Decoder, Feed, Sampled
from appliance.serving.document_orders import DocumentOrders
from appliance.serving.engine import StatsListener
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import Accepted, Event, Failed, FinishReason, Load
from appliance.serving.heap import Heap
from appliance.serving.idle import SETTLE_SECONDS, IdleWork
from appliance.serving.intake import Intake
from appliance.serving.job import Answer, Job, Ticket
from appliance.serving.pace import Pace, Work
from appliance.serving.passages import Passages
from appliance.serving.prefixes import Prefixes
from appliance.serving.reading_ahead import ReadingAhead
from appliance.serving.recall import Recall
from appliance.serving.requests import GenerationRequest
from appliance.serving.running import Running
from appliance.serving.snapshots import Prefix, SnapshotStore
from appliance.serving.speculation import Gate
from appliance.serving.stitcher import Stitcher
from appliance.serving.text_stream import TextStream
from appliance.serving.thread_choice import ThreadChoice

logger = logging.getLogger("appliance.serving")


def _no_flush() -> None:
    """For listeners that need no telling when a step is over."""


def _adapter(request: GenerationRequest) -> Adapter | None:
    return None if request.adapter is None else Adapter(request.adapter, request.adapter_scale)


def _unexpected() -> EngineFailed:
    """For the exception that is being handled, which is logged."""
    logger.exception("event=step_failed")
    return EngineFailed("The engine met an unexpected error; the server's log has it.")


class Scheduler:
    """Runs `decoder` in a thread of its own until `close`.

    `deliver` functions and `listener` are called with the scheduler's lock held, from its thread and from those that
    submit and cancel: they must be quick and must not call the scheduler. `flush` follows once after each step.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        settings: EngineSettings,
        listener: StatsListener,
        snapshots: SnapshotStore | None = None,
        flush: Callable[[], None] = _no_flush,
        weight_bytes: int = 0,
    ) -> None:
        self._decoder = decoder
        self._listener = listener
        self._flush = flush
        self._pace = Pace(settings.chunk_tokens)
        self._stream_seconds = settings.stream_seconds
        self._threads, self._prefill_threads = ThreadChoice(settings.threads_decode), settings.threads_prefill
        self._gate = Gate(self._pace.costs) if settings.is_speculating and decoder.can_share else None
        self._changed = threading.Condition()  # guards everything below
        self._prefixes = Prefixes(decoder, settings.cache_tokens, snapshots)
        self._backlog = Backlog(decoder.slots, settings.queue_requests, settings.queue_tokens)
        self._stitcher = Stitcher(decoder, self._prefixes, settings.reread_tokens, settings.document_tolerance)
        self._running = Running(decoder, self._prefixes, self._stitcher, self._pace, self._gate, weight_bytes)
        store = snapshots if decoder.can_share else None
        self._ahead = ReadingAhead(self._prefixes, store, decoder.cell_bytes, decoder.context_tokens)
        self._idle = IdleWork(decoder, self._prefixes, self._pace, snapshots, self._ahead)
        self._heap = Heap()
        self._recall = Recall(self._prefixes, self._stitcher, self._notify)
        self._tickets: dict[str, Ticket] = {}
        self.documents = DocumentOrders(
            self._changed,
            self._tickets,
            ahead=self._ahead,
            idle=self._idle,
            prefixes=self._prefixes,
            recall=self._recall,
            stitcher=self._stitcher,
        )
        self._in_flight: Sequence[Answer] = ()  # answers of the decode call now running
        self._step_started_at: float | None = None
        self._stepped_at = 0.0
        self._intake = Intake()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: GenerationRequest,
        prompt: Sequence[int],
        shared_tokens: int,
        grammar: CompiledGrammar | None,
        deliver: Callable[[Event], None],
        opening: str = "",
        passages: Passages | None = None,
    ) -> None:
        """Queues a request; `Accepted` is delivered before this returns, the rest by the scheduler's thread.

        The first `shared_tokens` of the prompt hold no visitor's text. Raises `PromptTooLong`, `QueueFull`,
        `DeadlineExceeded`, `DeadlineTooShort`, `ShuttingDown` or `EngineFailed`, and then delivers nothing.
        """
        limit = self._decoder.context_tokens
        if not 0 < len(prompt) < limit:
            raise PromptTooLong(
                f"The prompt has {len(prompt)} tokens; it must have 1 to {limit - 1}. Shorten it, or start the server "
                "with a larger --context-tokens.",
                param="messages",
            )
        max_tokens = min(request.max_tokens, limit - len(prompt))
        with self._changed:
            prompt, passages = self._stitcher.arranged(prompt, passages, _adapter(request), request.tenant)
            ticket = Ticket(request, tuple(prompt), min(shared_tokens, len(prompt)), grammar, deliver, max_tokens, passages)
            ticket.answers = [self._answer(ticket, index) for index in range(request.n)]
            self._require_place(ticket)
            self._tickets[request.id] = ticket
            deliver(Accepted(prompt_tokens=len(prompt), opening=opening))
            self._backlog.add(ticket.answers)
            self._changed.notify()
        self._flush()

    def cancel(self, request_id: str) -> None:
        """Ends a request as soon as the decode call in flight allows; harmless for one that is over or unknown."""
        with self._changed:
            if (ticket := self._tickets.get(request_id)) is None:
                return
            ticket.is_cancelled = True
            for answer in self._backlog.of(ticket):
                self._end(answer, "cancelled")
            if self._in_flight and all(each.ticket.is_cancelled for each in self._in_flight):
                self._decoder.abort()
            self._changed.notify()
        self._flush()

    def warm(self, prefix: Sequence[int], adapter: Adapter | None = None) -> None:
        """Reads an operator's prefix when nothing else is to be done, for all tenants; writes it to disk too."""
        limit = self._decoder.context_tokens
        if not self._decoder.can_share or not 0 < len(prefix) < limit:
            reason = "its length" if self._decoder.can_share else "this model's memory cannot be shared"
            logger.warning("event=prefix_not_warmed tokens=%d limit=%d reason=%r", len(prefix), limit - 1, reason)
            return
        with self._changed:
            self._idle.add(Prefix(tuple(prefix), adapter))
            self._changed.notify()

    def read_documents(self, reread_tokens: int | None) -> None:
        """How documents of requests to come are read: see `Stitcher.read_from_now_on`. To compare both ways."""
        with self._changed:
            self._stitcher.read_from_now_on(reread_tokens)

    def load(self) -> Load:
        with self._changed:
            return Load(
                documents=self._ahead.counts,
                state=self._intake.state,
                running=len(self._running.answers),
                waiting=self._backlog.requests,
                slots=self._decoder.slots,
                waiting_tokens=self._backlog.tokens,
                kv_cells_used=self._prefixes.used_cells,
                kv_cells_running=self._prefixes.running_cells,
                kv_cells=self._prefixes.cells,
                cached_tokens=self._prefixes.saved_tokens,
                cache_tokens=self._prefixes.saved_limit,
                is_speculating=self._gate is not None and self._gate.is_on,
                step_started_at=self._step_started_at,
            )

    def drain(self, grace_seconds: float) -> None:
        """Refuses new requests; fails those that are not finished after the grace time."""
        with self._changed:
            self._intake.drain(grace_seconds)
            self._changed.notify()

    def close(self) -> None:
        """Fails what is left, ends the thread and closes the decoder."""
        with self._changed:
            self._intake.close()
            self._decoder.abort()
            self._changed.notify()
        self._thread.join()

    def _answer(self, ticket: Ticket, index: int) -> Answer:
        request = ticket.request
        job = Job(list(ticket.prompt), len(ticket.prompt), _adapter(request), request.tenant)
        self._stitcher.plan(job, ticket.passages)
        return Answer(ticket, index, job, TextStream(request.stop), interval_seconds=self._stream_seconds)

    def _require_place(self, ticket: Ticket) -> None:
        """Raises when the request has to be refused."""
        self._intake.require_open()
        if ticket.request.id in self._tickets:
            raise RequestError(f"A request with the id {ticket.request.id!r} is being answered; choose another id.")
        running = [self._work(answer) for answer in self._running.answers]
        self._backlog.require_place(len(ticket.prompt), running, self._work, self._pace)
        cached = self._stitcher.known_tokens(ticket.answers[0].job)
        for answer in ticket.answers:
            answer.expected_cached = cached if answer.index == 0 else len(ticket.prompt) - 1
        if ticket.request.deadline_at is not None:
            left = ticket.request.deadline_at - time.monotonic()
            own = Work(len(ticket.prompt) - cached, self._pace.expected_answer(ticket.max_tokens))
            self._backlog.require_time(left, own, running, self._work, self._pace)

    def _work(self, answer: Answer) -> Work:
        job = answer.job
        left = job.prompt_tokens - max(job.computed, answer.expected_cached + answer.read_apart)
        return Work(max(left, 0), self._pace.expected_answer(answer.ticket.max_tokens, answer.generated))

    def _run(self) -> None:
        try:
            while not self._intake.is_closed:
                self._guarded(self._step)
        finally:
            self._end_all()
            self._idle.close()
            self._recall.close()
            self._decoder.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        """A failed decode leaves no sequence trustworthy: its requests fail, those waiting go on."""
        try:
            work()
        except EngineFailed as error:
            self._fail_running(error)
        except Exception:
            self._fail_running(_unexpected())

    def _step(self) -> None:
        """Decodes one batch and hands out what came of it; without requests, does idle work or waits."""
        self._heap.trim_in_time()
        with self._changed:
            self._retire()
            self.documents.obey()
            self._admit()
            batch = self._running.compose() if self._running.answers and not self._intake.is_closed else None
            if batch is not None and any(feed.is_read for feed in batch.feeds):
                for answer in self._running.answers:
                    answer.send()  # reading takes longer than text may be kept
            self._in_flight = [answer for answer, _ in batch.parts] if batch is not None else ()
            self._idle.tell(is_free=batch is None)
        self._flush()
        if batch is None:
            self._work_idly()
            return
        sampled, seconds = self._decode(batch.feeds, batch.adapter)
        self._heap.use()
        with self._changed:
            self._in_flight = ()
            if sampled is None:
                self._running.trim(batch)
                return
            now = time.monotonic()
            self._listener.record_step(self._running.take(batch, sampled, seconds, now))
            for answer, _ in batch.parts:
                if answer.failure is not None and not answer.is_over:
                    self._fail(answer.ticket, RequestError(answer.failure))
                elif answer.reason is not None:
                    self._end(answer, answer.reason)
        self._flush()

    def _decode(
        self, feeds: Sequence[Feed], adapter: Adapter | None
    ) -> tuple[Mapping[int, Sequence[Sampled]] | None, float]:
        """What followed, and the seconds that it took."""
        is_text_read = any(feed.is_read for feed in feeds)
        rows = sum(len(feed.tokens) for feed in feeds if not feed.is_read)
        threads = self._threads.best(rows) if is_text_read else self._threads.choose(rows)
        self._decoder.use_threads(threads, self._prefill_threads)
        started = self._step_started_at = time.monotonic()
        try:
            sampled = self._decoder.decode(feeds, adapter)
        finally:
            self._step_started_at = None
        self._stepped_at = time.monotonic()
        seconds = self._stepped_at - started
        if sampled is not None and not is_text_read:
            self._threads.observe(rows, threads, seconds)
        return sampled, seconds

    def _retire(self) -> None:
        """Ends cancelled requests, late ones, and all that are left once the grace time of a drain is over."""
        now = time.monotonic()
        if self._intake.is_grace_over:
            for ticket in list(self._tickets.values()):
                self._fail(ticket, EngineFailed("The server shut down before the answer was complete; ask again."))
        for ticket in list(self._tickets.values()):
            deadline = ticket.request.deadline_at
            if ticket.is_cancelled:
                for answer in ticket.answers:
                    self._end(answer, "cancelled")
            elif deadline is not None and now >= deadline:
                self._end_late(ticket, deadline)

    def _end_late(self, ticket: Ticket, deadline: float) -> None:
        """An answer that has begun ends with what there is."""
        ticket.is_deadline_missed = True
        if ticket.phase == "decode":
            for answer in ticket.answers:
                self._end(answer, "length", is_deadline=True)
            return
        allowed = deadline - ticket.request.arrived_at
        where = "it was waiting for its turn" if ticket.phase == "queue" else "its prompt was being read"
        self._fail(ticket, DeadlineExceeded(f"The time allowed, {allowed:.1f} s, was over while {where}; allow more time."))

    def _admit(self) -> None:
        """Gives slots to those that wait, in order; those are overtaken that wait for another's reading, or for a file."""
        if self._backlog:
            self._idle.pause()
        self._recall.settle()
        for answer in list(self._backlog):
            if not self._prefixes.has_free_slot:
                return
            if answer.is_over or self._running.has_to_wait(answer) or self._recall.has_to_wait(answer):
                continue
            try:
                if not self._running.admit(answer, time.monotonic()):
                    return
            except Exception as error:
                if answer in self._running.answers:
                    raise  # the memory cannot be trusted
                self._fail(answer.ticket, error if isinstance(error, RequestError) else _unexpected())
            else:
                self._backlog.remove(answer)

    def _work_idly(self) -> None:
        with self._changed:
            if self._intake.is_closed:
                return
            if self._backlog:
                if self._recall.is_reading:
                    self._changed.wait()
                return
            if self._recall.read_ahead():
                self._changed.wait()
                return
            if (chunk := self._idle.next_feed()) is None:
                if self._idle.write_document(self._notify):
                    return
                if (early := self._stepped_at + SETTLE_SECONDS - time.monotonic()) > 0:
                    self._changed.wait(early)
                elif not self._idle.save_one(self._notify):
                    self._changed.wait(self._heap.seconds_left)
                return
        job, feed = chunk
        sampled, seconds = self._decode([feed], job.adapter)
        with self._changed:
            self._idle.take(job, feed, is_aborted=sampled is None)
            if sampled is not None:
                self._pace.observe_step(seconds, rows=0, prompt_tokens=len(feed.tokens))
                self._listener.record_step(self._running.stats_of_warming(feed, seconds))

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify()

    def _end(self, answer: Answer, reason: FinishReason, *, is_deadline: bool = False) -> None:
        """The way out of one answer; with the last one, the request is over."""
        if answer.is_over:
            return
        now = time.monotonic()
        if answer.reason is None and reason != "cancelled":
            answer.send_rest()
        answer.reason = reason
        self._take_out(answer)
        answer.ticket.deliver(answer.finished(reason, now, is_deadline=is_deadline))
        if reason != "cancelled":
            self._pace.observe_answer(answer.generated)
        if answer.ticket.is_over:
            self._record(answer.ticket, now)

    def _fail(self, ticket: Ticket, error: RequestError) -> None:
        """The way out of a request that cannot be answered."""
        for answer in ticket.answers:
            if not answer.is_over:
                answer.send()
                self._take_out(answer)
        ticket.deliver(Failed.of(error))
        self._record(ticket, time.monotonic(), error.api_code)

    def _take_out(self, answer: Answer) -> None:
        answer.is_over = True
        if answer in self._running.answers:
            self._running.leave(answer)
        elif answer in self._backlog:
            self._backlog.remove(answer)

    def _record(self, ticket: Ticket, now: float, failure_code: str | None = None) -> None:
        del self._tickets[ticket.request.id]
        self._listener.record_request(ticket.stats(now, failure_code))

    def _fail_running(self, error: EngineFailed) -> None:
        with self._changed:
            self._in_flight = ()
            tickets = dict.fromkeys(answer.ticket for answer in self._running.answers)
            self._running.clear()
            for ticket in tickets:
                self._fail(ticket, error)
            self._idle.forget_failed()
        self._flush()

    def _end_all(self) -> None:
        with self._changed:
            self._intake.close()
            self.documents.close()
            for ticket in list(self._tickets.values()):
                self._fail(ticket, EngineFailed("The engine stopped before the answer was complete; ask again."))
        self._flush()
