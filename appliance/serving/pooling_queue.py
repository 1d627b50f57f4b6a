"""Requests for embeddings and scores, answered one after the other by a thread that owns the context.

Texts are computed a few at a time, so that a request can be cancelled, or end with its deadline, in between. Knows nothing
of llama.cpp but what a `Pooler` does.
"""

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from appliance.errors import DeadlineExceeded, EngineFailed, QueueFull, RequestError
from appliance.serving.engine import StatsListener
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import Event, Failed, Load, Outcome, Phase, Pooled, RequestStats, StepStats
from appliance.serving.intake import Intake
from appliance.serving.pace import retry_after
from appliance.serving.requests import PoolingRequest

STOPPED = "The engine stopped before this was answered; ask again."

logger = logging.getLogger("appliance.serving")


class Pooler(Protocol):
    """Computes; used from one thread only, but for `abort`. None when aborted."""

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[bytes] | None: ...

    def score(self, pairs: Sequence[Sequence[int]]) -> list[float] | None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(slots=True, eq=False)
class _Job:
    request: PoolingRequest
    inputs: Sequence[Sequence[int]]
    deliver: Callable[[Event], None]
    started_at: float | None = None
    is_cancelled: bool = False

    @property
    def tokens(self) -> int:
        return sum(map(len, self.inputs))

    @property
    def phase(self) -> Phase:
        return "queue" if self.started_at is None else "prefill"


class PoolingQueue:
    """Runs `pooler` in a thread of its own until `close`; everything else may be called from any thread."""

    def __init__(
        self, pooler: Pooler, *, settings: EngineSettings, listener: StatsListener, flush: Callable[[], None]
    ) -> None:
        self._pooler = pooler
        self._settings = settings
        self._listener = listener
        self._flush = flush
        self._changed = threading.Condition()  # guards everything below
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._step_started_at: float | None = None
        self._token_seconds = 0.001  # measured from the first step on
        self._intake = Intake()
        self._thread = threading.Thread(target=self._run, name="pooling", daemon=True)
        self._thread.start()

    def submit(self, request: PoolingRequest, inputs: Sequence[Sequence[int]], deliver: Callable[[Event], None]) -> None:
        """Queues a request of token ids. Raises `QueueFull`, `ShuttingDown` or `EngineFailed`."""
        job = _Job(request, inputs, deliver)
        with self._changed:
            self._require_place()
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            for job in [each for each in self._waiting if each.request.id == request_id]:
                self._waiting.remove(job)
                job.is_cancelled = True
                self._end(job)
            if (running := self._running) is not None and running.request.id == request_id:
                running.is_cancelled = True
                self._pooler.abort()
        self._flush()

    def load(self) -> Load:
        with self._changed:
            return Load(
                state=self._intake.state,
                running=int(self._running is not None),
                waiting=len(self._waiting),
                slots=self._settings.slots,
                waiting_tokens=sum(job.tokens for job in self._waiting),
                step_started_at=self._step_started_at,
            )

    def drain(self, grace_seconds: float) -> None:
        with self._changed:
            self._intake.drain(grace_seconds)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._intake.close()
            self._pooler.abort()
            self._changed.notify()
        self._thread.join()

    def _require_place(self) -> None:
        self._intake.require_open()
        waiting, limit = len(self._waiting), self._settings.queue_requests
        tokens = sum(job.tokens for job in self._waiting)
        is_free = self._running is None and not waiting
        if not is_free and (waiting >= max(limit, 1) or tokens >= self._settings.queue_tokens):
            seconds = retry_after(tokens * self._token_seconds)
            raise QueueFull(
                f"{waiting} requests of {tokens} tokens wait; the limits are {limit} and {self._settings.queue_tokens}. "
                f"Try again in {seconds} s.",
                retry_after_seconds=seconds,
            )

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._answer(job)
        finally:
            self._end_all()
            self._pooler.close()

    def _next(self) -> _Job | None:
        """Waits for a request; None after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._intake.is_closed)
            if self._intake.is_closed:
                return None
            self._running = self._waiting.popleft()
            self._running.started_at = time.monotonic()
            return self._running

    def _answer(self, job: _Job) -> None:
        try:
            pooled = self._compute(job)
        except RequestError as error:
            self._finish(job, Failed.of(error))
        except Exception:
            logger.exception("event=pooling_failed")
            unexpected = EngineFailed("The engine met an unexpected error; the server's log has it.")
            self._finish(job, Failed.of(unexpected))
        else:
            self._finish(job, pooled)

    def _end_all(self) -> None:
        """Tells those that wait, also when this thread ends for a reason that nothing has foreseen."""
        with self._changed:
            self._intake.close()
            while self._waiting:
                self._end(self._waiting.popleft(), Failed.of(EngineFailed(STOPPED)))
        self._flush()

    def _compute(self, job: _Job) -> Pooled | None:
        """None when it was cancelled. Raises `RequestError`."""
        vectors: list[bytes] = []
        scores: list[float] = []
        size = self._settings.slots
        for start in range(0, len(job.inputs), size):
            self._require_time(job)
            part = job.inputs[start : start + size]
            if job.is_cancelled or not self._compute_part(job.request.query is not None, part, vectors, scores):
                return None
        return Pooled(vectors=tuple(vectors), scores=tuple(scores), prompt_tokens=job.tokens)

    def _compute_part(
        self, is_ranking: bool, part: Sequence[Sequence[int]], vectors: list[bytes], scores: list[float]
    ) -> bool:
        """One step; False when it was aborted."""
        started = self._step_started_at = time.monotonic()
        try:
            made = self._pooler.score(part) if is_ranking else self._pooler.embed(part)
        finally:
            self._step_started_at = None
        if made is None:
            return False
        for each in made:
            vectors.append(each) if isinstance(each, bytes) else scores.append(each)
        seconds, tokens = time.monotonic() - started, sum(map(len, part))
        self._token_seconds = seconds / max(tokens, 1)
        self._listener.record_step(StepStats(seconds=seconds, prompt_tokens=tokens, generated_tokens=0))
        return True

    def _require_time(self, job: _Job) -> None:
        now, deadline = time.monotonic(), job.request.deadline_at
        if self._intake.is_grace_over:
            raise EngineFailed("The server shut down before this was computed; ask again.")
        if deadline is not None and now >= deadline:
            allowed = deadline - job.request.arrived_at
            raise DeadlineExceeded(f"The time allowed, {allowed:.1f} s, was over before all was computed; allow more time.")

    def _finish(self, job: _Job, event: Pooled | Failed | None) -> None:
        with self._changed:
            self._running = None
            if self._intake.is_closed and event is None:
                event = Failed.of(EngineFailed(STOPPED))
            self._end(job, event)
        self._flush()

    def _end(self, job: _Job, event: Pooled | Failed | None = None) -> None:
        """Tells the client, who is told of a cancellation too, and the listener."""
        now, started = time.monotonic(), job.started_at
        outcome: Outcome = "stop" if isinstance(event, Pooled) else "cancelled" if event is None else "failed"
        failure = event.code if isinstance(event, Failed) else None
        job.deliver(event or Failed.of(EngineFailed("The request was cancelled.")))
        self._listener.record_request(
            RequestStats(
                id=job.request.id,
                outcome=outcome,
                duration_seconds=now - job.request.arrived_at,
                queue_seconds=(now if started is None else started) - job.request.arrived_at,
                prefill_seconds=None if started is None else now - started,
                prompt_tokens=job.tokens,
                cancelled_in=job.phase if outcome == "cancelled" else None,
                missed_deadline_in=job.phase if failure == DeadlineExceeded.api_code else None,
                failure_code=failure,
            )
        )
