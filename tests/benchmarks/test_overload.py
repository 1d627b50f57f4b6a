"""The open loop: arrivals that depend on nobody, and what is counted of their requests."""

import asyncio
import itertools
import statistics
from pathlib import Path

import pytest

from benchmarks import overload
from benchmarks.client import Answer, Request, clock
from benchmarks.overload import arrivals, open_loop, outcome
from tests.benchmarks.stand_ins import trial

NOBODY = Request(host="127.0.0.1", port=1, path="/")


def answer(status: int, problem: str = "", *, first: float = 1.0, **headers: str) -> Answer:
    return Answer(
        sent_at=0.0,
        ended_at=2.0,
        status=status,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        text_times=[first] if status == 200 else [],
        answer_tokens=10 if status == 200 and not problem else None,
        problem=problem,
    )


class TestArrivals:
    def test_are_a_poisson_process_of_the_rate(self) -> None:
        times = list(arrivals("rate", 10.0, 2000.0))
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.03)
        assert statistics.stdev(gaps) == pytest.approx(0.1, rel=0.05)
        assert times[-1] < 2000.0

    def test_the_label_decides_them(self) -> None:
        assert list(arrivals("a", 5.0, 9.0)) == list(arrivals("a", 5.0, 9.0))
        assert list(arrivals("a", 5.0, 9.0)) != list(arrivals("b", 5.0, 9.0))

    def test_nobody_waits_for_those_before(self) -> None:
        """Requests that take a second each are all under way at once."""

        async def main() -> int:
            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.readuntil(b"\r\n\r\n")
                arrived.append(clock())
                if len(arrived) == 5:
                    everyone.set()
                await everyone.wait()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                writer.close()

            arrived: list[float] = []
            everyone = asyncio.Event()
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            request = Request(host="127.0.0.1", port=server.sockets[0].getsockname()[1], path="/")
            async with server:
                answers, _ = await open_loop(itertools.repeat(request), iter([0.0] * 5), patience_seconds=20.0)
            return sum(answer.status == 200 for answer in answers)

        assert asyncio.run(main()) == 5


class TestOutcome:
    def test_every_request_is_counted_once(self) -> None:
        answers = [
            answer(200, first=1.0),
            answer(200, first=3.0),
            answer(503, retry_after="2"),
            answer(429),
            answer(200, "no end within 20 s"),
            answer(0, "no end within 20 s"),
            answer(0, "connection lost"),
            answer(500),
        ]
        found = outcome(answers, 10.0, 48)
        assert (found.sent, found.served, found.refused, found.refused_with_time) == (8, 2, 2, 1)
        assert (found.gave_up, found.failed) == (2, 2)
        assert found.tokens_per_second == 2.0
        assert (found.first_token_p50, found.first_token_p95) == (2.0, pytest.approx(2.9))

    def test_nobody_served(self) -> None:
        found = outcome([answer(503)], 10.0, 48)
        assert (found.served, found.first_token_p50, found.tokens_per_second) == (0, None, 0.0)


class TestOverload:
    def test_measures_capacity_and_what_is_held(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(overload, "SECONDS", 1.0)
        held, first = asyncio.run(overload.overload(trial(tmp_path)))
        assert (held.row, first.row) == ("overload-held", "overload-ttft")
        assert held.details["served"] == held.details["sent"] > 0  # a stand-in has no capacity
        assert held.details["refused"] == 0

    def test_nobody_there_is_counted_too(self) -> None:
        answers, seconds = asyncio.run(open_loop(itertools.repeat(NOBODY), iter([0.0, 0.0]), patience_seconds=5.0))
        assert outcome(answers, seconds, 1).failed == 2
