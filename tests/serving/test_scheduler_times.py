"""Deadlines, and the end of the scheduler itself: what is in hand is ended in words, and nothing new is taken."""

import time
from collections.abc import Iterator

import pytest

from appliance.errors import (
    DeadlineExceeded,
    DeadlineTooShort,
    EngineFailed,
    ShuttingDown,
)
from appliance.serving.events import Failed, Finished, TextPiece
from tests.serving.scheduler_bench import WAIT_SECONDS, Bench, until


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as bench:
        yield bench


def test_deadline_in_the_queue_and_in_prefill_fails(bench: Bench) -> None:
    bench.decoder.gate.clear()
    with bench.together():
        reading = bench.client(1, wait=0.05)
        other = bench.client(2, max_tokens=60)
    until(lambda: bench.scheduler.load().running == 2)
    waiting = bench.client(3, wait=0.05)
    time.sleep(0.06)
    bench.decoder.abort()  # the chunk was not read in time
    assert reading.failed().code == waiting.failed().code == "deadline_exceeded"
    assert other.reason() == "length"
    assert {stats.missed_deadline_in for stats in bench.listener.requests} == {"queue", "prefill", None}


def test_deadline_in_decode_ends_with_what_there_is(bench: Bench) -> None:
    bench.decoder.hold_at = 3
    client = bench.client(1, max_tokens=60, wait=0.2, n=3, stop=("2 3 4 5 9",))
    time.sleep(0.21)
    bench.decoder.gate.set()
    ends = client.ends()
    assert [(end.reason, end.is_deadline) for end in ends if isinstance(end, Finished)] == [("length", True)] * 3
    assert client.text.startswith("2 3 ")
    assert bench.listener.requests[0].missed_deadline_in == "decode"


def test_deadline_that_cannot_be_kept_is_refused_at_once(bench: Bench) -> None:
    with pytest.raises(DeadlineExceeded):
        bench.client(1, wait=-1.0)
    assert bench.client(1, wait=0.5).reason() == "length"  # nothing was measured yet: no refusal on a guess
    bench.idle()
    bench.scheduler._pace._prompt_token_seconds = bench.scheduler._pace._best_prompt_token_seconds = 1.0
    with pytest.raises(DeadlineExceeded, match=r"could begin in 49\.0 s, and the deadline is in"):
        bench.client(*range(10, 59), wait=10.0)
    assert bench.client(*range(10, 59), wait=1000.0).reason() == "length"


def test_deadline_that_others_stand_in_the_way_of_is_told_when_to_come_back(bench: Bench) -> None:
    bench.client(1).end()
    bench.idle()
    bench.decoder.gate.clear()
    bench.scheduler._pace._prompt_token_seconds = 1.0
    for first in (100, 200, 300):
        bench.client(*range(first, first + 40))
    with pytest.raises(DeadlineTooShort, match=r"or try again in \d+ s") as caught:
        bench.client(*range(10, 15), wait=6.0)
    assert 10 < caught.value.retry_after_seconds < 120
    bench.decoder.gate.set()


def test_slow_moment_is_told_when_to_come_back_and_is_measured_again_as_soon_as_nobody_is_in_the_way(bench: Bench) -> None:
    bench.client(1).end()
    bench.idle()
    bench.decoder.gate.clear()
    pace = bench.scheduler._pace
    pace._best_prompt_token_seconds, pace._prompt_token_seconds = 0.001, 1.0
    running = bench.client(2)
    with pytest.raises(DeadlineTooShort, match=r"could be complete in 4\d\.\d s, and the deadline is in 10\.0 s") as caught:
        bench.client(*range(10, 50), wait=10.0)
    assert caught.value.retry_after_seconds >= 30
    bench.decoder.gate.set()
    assert running.reason() == "length"
    bench.idle()
    assert bench.client(*range(10, 50), wait=10.0).reason() == "length"


def test_answer_that_others_would_cut_off_is_told_when_to_come_back(bench: Bench) -> None:
    bench.client(1).end()
    bench.idle()
    bench.decoder.gate.clear()
    pace = bench.scheduler._pace
    pace._prompt_token_seconds = 0.0
    for rows in range(1, bench.decoder.slots + 1):
        for _ in range(100):
            pace.costs.observe(rows, 1.0)
    for first in range(bench.decoder.slots):
        bench.client(first, max_tokens=4)  # a place comes free in 4 s
    with pytest.raises(DeadlineTooShort, match=r"could be complete in 8\.0 s, and the deadline is in 6\.0 s"):
        bench.client(50, max_tokens=4, wait=6.0)
    waits = bench.client(51, max_tokens=4, wait=9.0)
    bench.decoder.gate.set()
    end = waits.finished()
    assert (end.reason, end.is_deadline) == ("length", False)


def test_drain_refuses_new_requests_and_finishes_the_others(bench: Bench) -> None:
    bench.decoder.gate.clear()
    clients = [bench.client(i) for i in range(1, 5)]
    bench.scheduler.drain(grace_seconds=1000)
    with pytest.raises(ShuttingDown, match="shutting down") as refused:
        bench.client(1)
    assert refused.value.retry_after_seconds == 600
    assert bench.scheduler.load().state == "draining"
    bench.decoder.gate.set()
    assert [client.reason() for client in clients] == ["length"] * 4


def test_drain_fails_what_is_late(bench: Bench) -> None:
    bench.decoder.gate.clear()
    clients = [bench.client(i) for i in range(1, 5)]
    assert bench.decoder.entered.acquire(timeout=WAIT_SECONDS)
    bench.scheduler.drain(grace_seconds=0)
    bench.decoder.gate.set()
    assert all(isinstance(client.end(), Failed) for client in clients)
    bench.idle()


def test_close_ends_everything_and_refuses_more() -> None:
    bench = Bench()
    bench.decoder.gate.clear()
    clients = [bench.client(i) for i in range(1, 5)]
    bench.close()
    assert all(isinstance(client.end(), Failed) for client in clients)
    assert bench.decoder.is_closed
    assert bench.scheduler.load().state == "stopped"
    with pytest.raises(EngineFailed, match="not running"):
        bench.client(1)


def _now() -> float:
    import time

    return time.monotonic()


def test_text_does_not_wait_for_another_prompt_to_be_read() -> None:
    """A step with reading is a long one: what was kept for the next frame leaves before it."""
    with Bench(stream_seconds=60.0) as bench:
        bench.decoder.hold_at = 2
        client = bench.client(1, max_tokens=4)
        until(lambda: len(bench.decoder.feeds) == 2 and not bench.decoder.gate.is_set())
        other = bench.client(20, 21, 22, max_tokens=1)
        bench.decoder.hold_at = 3
        bench.decoder.gate.set()
        assert [client.next(), client.next()] == [TextPiece(text="2 "), TextPiece(text="3 4 ")]
        bench.decoder.gate.set()
        assert (client.reason(), other.reason()) == ("length", "length")
