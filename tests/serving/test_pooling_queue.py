"""The queue of embedding and ranking requests, with a pooler that waits until it is let go."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from appliance.errors import EngineFailed, PromptTooLong, QueueFull, ShuttingDown
from appliance.serving.events import Event, Failed, Pooled, RequestStats
from appliance.serving.pooling_queue import PoolingQueue
from appliance.serving.requests import PoolingRequest
from tests.serving.test_supervisor import NUMBERS, Listener, settings


class Pooler:
    """A text's vector is its length. Computes only while `gate` is set."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.is_aborted = self.is_closed = False

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[bytes] | None:
        self.entered.release()
        self.gate.wait()
        if self.is_aborted:
            self.is_aborted = False
            return None
        if any(len(each) > 9 for each in inputs):
            raise PromptTooLong("Too long.")
        return [bytes([len(each)]) for each in inputs]

    def score(self, pairs: Sequence[Sequence[int]]) -> list[float] | None:
        vectors = self.embed(pairs)
        return None if vectors is None else [float(each[0]) for each in vectors]

    def abort(self) -> None:
        self.is_aborted = True
        self.gate.set()

    def close(self) -> None:
        self.is_closed = True


class Asked:
    """A request that was submitted, and the event that came."""

    def __init__(self, queue: PoolingQueue, *lengths: int, **fields: Any) -> None:
        self.id = f"pool-{next(NUMBERS)}"
        self.events: list[Event] = []
        self._arrived = threading.Event()
        inputs = [tuple(range(length)) for length in lengths]
        request = PoolingRequest(id=self.id, inputs=tuple(inputs), arrived_at=time.monotonic(), **fields)
        queue.submit(request, inputs, self._take)

    def _take(self, event: Event) -> None:
        self.events.append(event)
        self._arrived.set()

    def event(self) -> Event:
        assert self._arrived.wait(10)
        (event,) = self.events
        return event


@pytest.fixture
def pooler() -> Pooler:
    return Pooler()


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def queue(pooler: Pooler, listener: Listener) -> Iterator[PoolingQueue]:
    chosen = settings(slots=2, queue_requests=2, queue_tokens=50)
    queue = PoolingQueue(pooler, settings=chosen, listener=listener, flush=lambda: None)
    yield queue
    queue.close()
    assert pooler.is_closed


def held(queue: PoolingQueue, pooler: Pooler) -> Asked:
    """A request that is being computed and does not end by itself."""
    pooler.gate.clear()
    asked = Asked(queue, 1)
    assert pooler.entered.acquire(timeout=10)
    return asked


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_vectors_and_scores_in_the_order_of_the_inputs(queue: PoolingQueue, listener: Listener) -> None:
    embedded, scored = Asked(queue, 3, 1, 2, 5, 4), Asked(queue, 2, 1, query="x")
    assert embedded.event() == Pooled(vectors=(b"\3", b"\1", b"\2", b"\5", b"\4"), prompt_tokens=15)
    assert scored.event() == Pooled(scores=(2.0, 1.0), prompt_tokens=3)
    until(lambda: len(listener.requests) == 2)
    assert [step.prompt_tokens for step in listener.steps] == [4, 7, 4, 3]
    assert [stats.outcome for stats in listener.requests] == ["stop", "stop"]


def test_a_failure_ends_one_request_only(queue: PoolingQueue, listener: Listener) -> None:
    failed, other = Asked(queue, 10), Asked(queue, 1)
    assert isinstance(failed.event(), Failed)
    assert isinstance(other.event(), Pooled)
    until(lambda: len(listener.requests) == 2)
    assert [stats.failure_code for stats in listener.requests] == ["context_length_exceeded", None]


def test_cancelled_while_waiting_and_while_computed(queue: PoolingQueue, pooler: Pooler, listener: Listener) -> None:
    running = held(queue, pooler)
    waiting = Asked(queue, 1)
    assert (queue.load().running, queue.load().waiting) == (1, 1)
    assert queue.load().step_started_at is not None
    queue.cancel(waiting.id)
    queue.cancel(running.id)
    queue.cancel("unheard of")
    assert isinstance(waiting.event(), Failed)
    assert isinstance(running.event(), Failed)
    until(lambda: queue.load().running == queue.load().waiting == 0)
    assert [stats.cancelled_in for stats in listener.requests] == ["queue", "prefill"]
    assert isinstance(Asked(queue, 1).event(), Pooled)


def test_a_full_queue_refuses(queue: PoolingQueue, pooler: Pooler) -> None:
    held(queue, pooler)
    Asked(queue, 1)
    Asked(queue, 1)
    with pytest.raises(QueueFull) as refused:
        Asked(queue, 1)
    assert refused.value.retry_after_seconds >= 1
    pooler.gate.set()


def test_tokens_fill_the_queue_too(queue: PoolingQueue, pooler: Pooler) -> None:
    held(queue, pooler)
    Asked(queue, *[9] * 6)
    with pytest.raises(QueueFull, match="54 tokens"):
        Asked(queue, 1)
    pooler.gate.set()


def test_the_deadline_ends_a_request_between_two_steps(queue: PoolingQueue, pooler: Pooler) -> None:
    held(queue, pooler)
    late = Asked(queue, 1, deadline_at=time.monotonic())
    pooler.gate.set()
    event = late.event()
    assert isinstance(event, Failed)
    assert event.code == "deadline_exceeded"


def test_drain_finishes_what_waits_and_refuses_the_rest(queue: PoolingQueue, pooler: Pooler) -> None:
    held(queue, pooler)
    waiting = Asked(queue, 1)
    queue.drain(10.0)
    with pytest.raises(ShuttingDown):
        Asked(queue, 1)
    assert queue.load().state == "draining"
    pooler.gate.set()
    assert isinstance(waiting.event(), Pooled)


def test_close_fails_what_is_left(queue: PoolingQueue, pooler: Pooler) -> None:
    running = held(queue, pooler)
    waiting = Asked(queue, 1)
    queue.close()
    assert isinstance(running.event(), Failed)
    assert isinstance(waiting.event(), Failed)
    with pytest.raises(EngineFailed):
        Asked(queue, 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_is_noticed_and_tells_those_who_wait(
    queue: PoolingQueue, pooler: Pooler, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = held(queue, pooler)
    waiting = Asked(queue, 3)
    record = listener.record_request

    def record_badly(_: RequestStats) -> None:
        monkeypatch.setattr(listener, "record_request", record)
        raise RuntimeError

    monkeypatch.setattr(listener, "record_request", record_badly)
    pooler.gate.set()
    assert isinstance(running.event(), Pooled)
    assert isinstance(waiting.event(), Failed)
    assert queue.load().state == "stopped"
