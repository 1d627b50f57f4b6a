"""Continuous batching: one thread owns the decoder and answers up to `slots` requests together; others wait.

Each step decodes one token of every running answer first and fills what room is left with prompt chunks, so that a long
prompt never freezes an answer. `Scheduler` is used from any thread. Knows nothing of llama.cpp (a `Decoder` does the
computing), of HTTP or of templates.
"""

import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from appliance.errors import EngineFailed, PromptTooLong, QueueFull, RequestError, ShuttingDown
from appliance.serving.engine import (
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Load,
    Outcome,
    Phase,
    RequestStats,
    SamplingSettings,
    StatsListener,
    StepStats,
    TextPiece,
)
from appliance.serving.text_stream import TextStream

IDLE_CHUNK_TOKENS = 256  # prompt tokens per step while no answer is running
BUSY_CHUNK_TOKENS = 64  # and beside running answers: at 17 tokens/s they pause for less than four seconds
FIRST_GUESS_SECONDS = 10.0  # a request's duration, before any was measured
LONGEST_RETRY_SECONDS = 600

logger = logging.getLogger("appliance.serving")


@dataclasses.dataclass(frozen=True, slots=True)
class Feed:
    """Tokens to append to one sequence from `position` on; `is_sampled` asks for the token that follows them."""

    slot: int
    tokens: Sequence[int]
    position: int
    is_sampled: bool


class Decoder(Protocol):
    """Computes sequences; used from one thread only, but for `abort`."""

    @property
    def slots(self) -> int: ...

    @property
    def context_tokens(self) -> int:
        """Per sequence."""

    def start(self, slot: int, sampling: SamplingSettings) -> None:
        """Prepares an empty sequence."""

    def decode(self, feeds: Sequence[Feed]) -> Mapping[int, int] | None:
        """The sampled token of each slot that asked for one; None when aborted. Raises `EngineFailed`."""

    def release(self, slot: int) -> None:
        """Forgets the sequence."""

    def clear(self) -> None:
        """Forgets every sequence, after a failure."""

    def abort(self) -> None:
        """Makes the decode call now running return early; any thread. Without effect on the next call."""

    def piece(self, token: int) -> bytes: ...

    def is_end(self, token: int) -> bool: ...

    def close(self) -> None: ...


@dataclasses.dataclass(slots=True, eq=False)
class Job:
    """A request on its way through the queue, prefill and decode."""

    request: GenerationRequest
    deliver: Callable[[Event], None]
    stream: TextStream
    max_tokens: int
    slot: int = -1
    started_at: float | None = None
    last_token_at: float | None = None
    fed: int = 0  # prompt tokens computed
    generated: int = 0
    last_token: int = -1
    is_cancelled: bool = False

    @property
    def phase(self) -> Phase:
        if self.started_at is None:
            return "queue"
        return "prefill" if self.generated == 0 else "decode"

    def feed(self, room: int) -> Feed:
        """What to compute next: the last token, or up to `room` tokens of the prompt."""
        if self.generated:
            return Feed(self.slot, (self.last_token,), len(self.request.prompt) + self.generated - 1, True)
        chunk = self.request.prompt[self.fed : self.fed + room]
        return Feed(self.slot, chunk, self.fed, self.fed + len(chunk) == len(self.request.prompt))


class Scheduler:
    """Runs `decoder` in a thread of its own until `close`."""

    def __init__(self, decoder: Decoder, *, queue_requests: int, listener: StatsListener) -> None:
        self._decoder = decoder
        self._queue_requests = queue_requests
        self._listener = listener
        self._changed = threading.Condition()  # guards everything below
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._in_flight: list[Job] = []  # jobs of the decode call now running
        self._free_slots = list(range(decoder.slots))
        self._mean_seconds = FIRST_GUESS_SECONDS
        self._drain_deadline: float | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, deliver: Callable[[Event], None]) -> Callable[[], None]:
        """Queues a request and returns its cancel function. Events reach `deliver` from the scheduler's thread."""
        room = self._decoder.context_tokens - len(request.prompt)
        if room < 1 or not request.prompt:
            raise PromptTooLong(
                f"The prompt has {len(request.prompt)} tokens; it must have 1 to {self._decoder.context_tokens - 1}.",
                param="messages",
            )
        job = Job(request, deliver, TextStream(request.stop), min(request.max_tokens, room))
        with self._changed:
            self._require_place()
            self._waiting.append(job)
            self._changed.notify()
        return lambda: self._cancel(job)

    def load(self) -> Load:
        with self._changed:
            is_accepting = not self._is_closed and self._drain_deadline is None
            return Load(
                running=len(self._running),
                waiting=len(self._waiting),
                slots=self._decoder.slots,
                is_accepting=is_accepting,
            )

    def drain(self, grace_seconds: float) -> None:
        """Refuses new requests; fails those that are not finished after the grace time."""
        with self._changed:
            self._drain_deadline = time.monotonic() + grace_seconds
            self._changed.notify()

    def close(self) -> None:
        """Fails what is left, ends the thread and closes the decoder."""
        with self._changed:
            self._is_closed = True
            self._decoder.abort()
            self._changed.notify()
        self._thread.join()

    def _require_place(self) -> None:
        if self._is_closed:
            raise EngineFailed("The engine is not running; restart the server.")
        if self._drain_deadline is not None:
            left = max(1, math.ceil(self._drain_deadline - time.monotonic()))
            raise ShuttingDown("The server is shutting down and takes no new requests.", retry_after_seconds=left)
        if len(self._waiting) + len(self._running) < self._decoder.slots + self._queue_requests:
            return
        seconds = math.ceil(self._mean_seconds / self._decoder.slots)
        raise QueueFull(
            f"{len(self._running)} requests are running and {len(self._waiting)} wait; the limit is "
            f"{self._decoder.slots} running and {self._queue_requests} waiting. Try again in {seconds} s.",
            retry_after_seconds=min(max(seconds, 1), LONGEST_RETRY_SECONDS),
        )

    def _cancel(self, job: Job) -> None:
        with self._changed:
            job.is_cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled")
            elif self._in_flight and all(each.is_cancelled for each in self._in_flight):
                self._decoder.abort()
            self._changed.notify()

    def _run(self) -> None:
        try:
            while not self._is_closed:
                try:
                    self._step()
                except EngineFailed as error:
                    self._fail_running(error)
                except Exception:
                    logger.exception("event=step_failed")
                    self._fail_running(EngineFailed("The engine met an unexpected error; the server's log has it."))
        finally:
            self._end_all()
            self._decoder.close()

    def _step(self) -> None:
        """Waits for work, decodes one batch and hands out what came of it."""
        with self._changed:
            self._retire()
            self._admit()
            if not self._running:
                if not self._is_closed:
                    self._changed.wait()
                return
            batch = self._compose()
            self._in_flight = [job for job, _ in batch]
        sampled = self._decoder.decode([feed for _, feed in batch])
        with self._changed:
            self._in_flight = []
            if sampled is not None:
                self._take(batch, sampled)

    def _retire(self) -> None:
        """Ends cancelled jobs, and all that are left once the grace time of a drain is over."""
        if self._drain_deadline is not None and time.monotonic() >= self._drain_deadline:
            late = EngineFailed("The server shut down before the answer was complete; ask again.")
            for job in (*self._waiting, *self._running):
                self._end(job, late)
            self._waiting.clear()
        for job in [job for job in self._running if job.is_cancelled]:
            self._end(job, "cancelled")

    def _admit(self) -> None:
        while self._waiting and self._free_slots:
            job = self._waiting.popleft()
            job.slot = self._free_slots.pop()
            job.started_at = time.monotonic()
            self._running.append(job)
            self._decoder.start(job.slot, job.request.sampling)

    def _compose(self) -> list[tuple[Job, Feed]]:
        """The next batch: running answers first, then prompts in order of arrival as far as there is room."""
        batch = [(job, job.feed(1)) for job in self._running if job.phase == "decode"]
        room = BUSY_CHUNK_TOKENS if batch else IDLE_CHUNK_TOKENS
        for job in self._running:
            if job.phase == "prefill" and room > 0:
                batch.append((job, feed := job.feed(room)))
                room -= len(feed.tokens)
        return batch

    def _take(self, batch: Sequence[tuple[Job, Feed]], sampled: Mapping[int, int]) -> None:
        now = time.monotonic()
        prompt_tokens, first, between = 0, [], []
        for job, feed in batch:
            if job.phase == "prefill":
                job.fed += len(feed.tokens)
                prompt_tokens += len(feed.tokens)
            if feed.slot not in sampled:
                continue
            if job.last_token_at is None:
                first.append(now - job.request.arrived_at)
            else:
                between.append(now - job.last_token_at)
            job.last_token_at = now
            self._take_token(job, sampled[feed.slot])
        self._listener.record_step(
            StepStats(
                prompt_tokens=prompt_tokens,
                generated_tokens=len(sampled),
                first_token_seconds=tuple(first),
                inter_token_seconds=tuple(between),
            )
        )

    def _take_token(self, job: Job, token: int) -> None:
        job.generated += 1
        job.last_token = token
        if job.is_cancelled:
            return
        if self._decoder.is_end(token):
            self._end(job, "stop")
        else:
            self._send(job, job.stream.push(self._decoder.piece(token)))
            if job.stream.is_stopped:
                self._end(job, "stop")
            elif job.generated >= job.max_tokens:
                self._end(job, "length")

    def _send(self, job: Job, text: str) -> None:
        if text:
            job.deliver(TextPiece(text=text))

    def _end(self, job: Job, result: FinishReason | RequestError) -> None:
        """The one way out: frees the slot, tells the client and the listener."""
        if job in self._running:
            self._running.remove(job)
            self._free_slots.append(job.slot)
            self._decoder.release(job.slot)
        now, started = time.monotonic(), job.started_at
        outcome: Outcome = "failed"
        if isinstance(result, RequestError):
            job.deliver(Failed(error=result))
        else:
            outcome = result
            self._send(job, job.stream.finish() if result != "cancelled" else "")
            prompt_tokens = len(job.request.prompt)
            job.deliver(Finished(reason=result, prompt_tokens=prompt_tokens, generated_tokens=job.generated))
            if started is not None and result != "cancelled":
                self._mean_seconds += 0.2 * (now - started - self._mean_seconds)
        arrived = job.request.arrived_at
        self._listener.record_request(
            RequestStats(
                outcome=outcome,
                duration_seconds=now - arrived,
                queue_seconds=(now if started is None else started) - arrived,
                cancelled_in=job.phase if outcome == "cancelled" else None,
            )
        )
        logger.info("event=request_ended request=%s outcome=%s generated=%d", job.request.id, outcome, job.generated)

    def _fail_running(self, error: EngineFailed) -> None:
        """A failed decode leaves no sequence trustworthy: its requests fail, those waiting go on."""
        with self._changed:
            self._in_flight = []
            for job in list(self._running):
                self._end(job, error)
            self._decoder.clear()

    def _end_all(self) -> None:
        with self._changed:
            self._is_closed = True
            for job in (*self._running, *self._waiting):
                self._end(job, EngineFailed("The engine stopped before the answer was complete; ask again."))
            self._waiting.clear()
