"""Every request ends exactly once, slots come back, and nobody waits behind a long prompt."""

import queue
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import EngineFailed, PromptTooLong, QueueFull
from appliance.serving.engine import Event, Failed, Finished, GenerationRequest, TextPiece
from appliance.serving.scheduler import BUSY_CHUNK_TOKENS, Scheduler
from tests.serving.fakes import CountingDecoder, Listener

WAIT_SECONDS = 20.0


class Client:
    """One request and everything that was delivered for it."""

    def __init__(self, scheduler: Scheduler, prompt: tuple[int, ...], max_tokens: int = 5, stop: str = "") -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.text = ""
        stops = (stop,) if stop else ()
        request = GenerationRequest(id="r", prompt=prompt, max_tokens=max_tokens, stop=stops, arrived_at=time.monotonic())
        self.cancel = scheduler.submit(request, self.events.put)

    def next(self) -> Event:
        return self.events.get(timeout=WAIT_SECONDS)

    def end(self) -> Finished | Failed:
        while isinstance(event := self.next(), TextPiece):
            self.text += event.text
        return event

    def reason(self) -> str:
        end = self.end()
        assert isinstance(end, Finished)
        return end.reason


class Bench:
    def __init__(self, *, slots: int = 2, context_tokens: int = 64, queue_requests: int = 4) -> None:
        self.decoder = CountingDecoder(slots, context_tokens)
        self.listener = Listener()
        self.scheduler = Scheduler(self.decoder, queue_requests=queue_requests, listener=self.listener)

    def client(self, *prompt: int, max_tokens: int = 5, stop: str = "") -> Client:
        return Client(self.scheduler, prompt, max_tokens, stop)

    def close(self) -> None:
        self.decoder.gate.set()
        self.scheduler.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_answer_counts_and_reasons(bench: Bench) -> None:
    cut, ended, stopped = bench.client(1, 2, 3), bench.client(97, max_tokens=50), bench.client(5, stop="7 8")
    assert cut.end() == Finished(reason="length", prompt_tokens=3, generated_tokens=5)
    assert cut.text == "4 5 6 7 8 "
    assert ended.end() == Finished(reason="stop", prompt_tokens=1, generated_tokens=3)
    assert ended.text == "98 99 "
    assert stopped.end() == Finished(reason="stop", prompt_tokens=1, generated_tokens=3)
    assert stopped.text == "6 "
    assert [stats.outcome for stats in bench.listener.requests].count("stop") == 2


def test_answer_ends_with_the_context(bench: Bench) -> None:
    client = bench.client(*range(1, 61), max_tokens=1000)
    assert client.end() == Finished(reason="length", prompt_tokens=60, generated_tokens=4)


@pytest.mark.parametrize("length", [0, 64, 65])
def test_prompt_that_leaves_no_room_is_refused(bench: Bench, length: int) -> None:
    with pytest.raises(PromptTooLong, match=str(length)):
        bench.client(*range(length))


def test_full_queue_is_refused_with_an_estimate(bench: Bench) -> None:
    bench.decoder.gate.clear()
    clients = [bench.client(i, max_tokens=2) for i in range(6)]
    with pytest.raises(QueueFull, match="4 waiting") as refused:
        bench.client(9)
    assert refused.value.retry_after_seconds >= 1
    bench.decoder.gate.set()
    assert all(isinstance(client.end(), Finished) for client in clients)


def test_cancelled_in_the_queue_gives_its_place_to_another(bench: Bench) -> None:
    bench.decoder.gate.clear()
    running = [bench.client(1), bench.client(2)]
    waiting = [bench.client(3) for _ in range(4)]
    waiting[0].cancel()
    assert waiting[0].end() == Finished(reason="cancelled", prompt_tokens=1, generated_tokens=0)
    late = bench.client(4)
    bench.decoder.gate.set()
    for client in (*running, *waiting[1:], late):
        assert client.reason() == "length"
    assert bench.listener.requests[0].cancelled_in == "queue"


def test_cancelled_while_running_frees_the_slot(bench: Bench) -> None:
    bench.decoder.hold_at = 1
    gone = bench.client(1, max_tokens=60)
    assert isinstance(gone.next(), TextPiece)
    gone.cancel()
    assert gone.reason() == "cancelled"
    until(lambda: bench.scheduler.load().running == 0)
    assert bench.decoder.sequences == {}
    assert bench.listener.requests[0].cancelled_in == "decode"


def test_cancelled_prefill_is_aborted_when_it_is_alone(bench: Bench) -> None:
    bench.decoder.gate.clear()
    gone = bench.client(1, 2)
    assert bench.decoder.entered.acquire(timeout=WAIT_SECONDS)
    gone.cancel()  # the fake's abort opens the gate
    assert gone.reason() == "cancelled"
    assert bench.listener.requests[0].cancelled_in == "prefill"
    assert bench.client(1).reason() == "length"


def test_others_keep_running_when_one_is_cancelled(bench: Bench) -> None:
    bench.decoder.gate.clear()
    gone, stays = bench.client(1), bench.client(2)
    until(lambda: bench.scheduler.load().running + bench.scheduler.load().waiting == 2)
    gone.cancel()
    gone.cancel()
    bench.decoder.gate.set()
    assert stays.reason() == "length"
    assert stays.text == "3 4 5 6 7 "
    assert gone.reason() == "cancelled"


@pytest.mark.parametrize("error", [EngineFailed("no memory"), ZeroDivisionError()])
def test_failed_decode_fails_those_in_flight_and_no_others(bench: Bench, error: Exception) -> None:
    bench.decoder.gate.clear()
    first = bench.client(1)
    assert bench.decoder.entered.acquire(timeout=WAIT_SECONDS)
    bench.decoder.failures.append(error)
    bench.decoder.gate.set()
    failed = first.end()
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, EngineFailed)
    second = bench.client(2)
    assert second.reason() == "length"
    assert [stats.outcome for stats in bench.listener.requests] == ["failed", "length"]


def test_long_prompt_does_not_stop_running_answers() -> None:
    bench = Bench(context_tokens=1000)
    try:
        bench.decoder.gate.clear()
        answer = bench.client(1, max_tokens=90)
        assert bench.decoder.entered.acquire(timeout=WAIT_SECONDS)
        long = bench.client(*([1] * 500), max_tokens=1)
        bench.decoder.gate.set()
        assert long.reason() == answer.reason() == "length"
        assert [1, BUSY_CHUNK_TOKENS] in bench.decoder.batches
        assert all(batch[0] == 1 for batch in bench.decoder.batches if len(batch) == 2)
    finally:
        bench.close()


def test_drain_refuses_new_requests_and_finishes_the_others(bench: Bench) -> None:
    bench.decoder.gate.clear()
    clients = [bench.client(i) for i in range(4)]
    bench.scheduler.drain(grace_seconds=1000)
    with pytest.raises(QueueFull, match="shutting down"):
        bench.client(1)
    assert not bench.scheduler.load().is_accepting
    bench.decoder.gate.set()
    assert [client.reason() for client in clients] == ["length"] * 4


def test_drain_fails_what_is_late(bench: Bench) -> None:
    bench.decoder.gate.clear()
    clients = [bench.client(i) for i in range(4)]
    assert bench.decoder.entered.acquire(timeout=WAIT_SECONDS)
    bench.scheduler.drain(grace_seconds=0)
    bench.decoder.gate.set()
    assert all(isinstance(client.end(), Failed) for client in clients)
    assert bench.scheduler.load().running == bench.scheduler.load().waiting == 0


def test_close_ends_everything_and_refuses_more() -> None:
    bench = Bench()
    bench.decoder.gate.clear()
    clients = [bench.client(i) for i in range(4)]
    bench.scheduler.close()
    assert all(isinstance(client.end(), Failed) for client in clients)
    assert bench.decoder.is_closed
    with pytest.raises(EngineFailed, match="not running"):
        bench.client(1)


@settings(max_examples=25, deadline=None)
@given(
    slots=st.integers(1, 4),
    requests=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20), st.booleans()), min_size=1, max_size=12),
)
def test_every_request_ends_once_and_everything_comes_back(slots: int, requests: list[tuple[int, int, bool]]) -> None:
    bench = Bench(slots=slots, context_tokens=80, queue_requests=12)
    try:
        clients = [bench.client(*range(1, length + 1), max_tokens=limit) for length, limit, _ in requests]
        for client, (_, _, is_cancelled) in zip(clients, requests, strict=True):
            if is_cancelled:
                client.cancel()
        for client, (length, limit, is_cancelled) in zip(clients, requests, strict=True):
            end = client.end()
            assert isinstance(end, Finished)
            if not is_cancelled:
                expected = [*range(length + 1, length + 1 + limit)]
                assert client.text == "".join(f"{token} " for token in expected)
            assert client.events.empty()
        load = bench.scheduler.load()
        assert load.running == load.waiting == 0
        assert bench.decoder.sequences == {}
        assert len(bench.listener.requests) == len(requests)
    finally:
        bench.close()
