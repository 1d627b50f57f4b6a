"""The client: what it makes of bytes and their times, and of servers that end badly."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.client import Answer, Exchange, Request, ask, read

REQUEST = Request(host="127.0.0.1", port=1, path="/v1/chat/completions", body={"stream": True})
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(text: str = "", **fields: Any) -> bytes:
    delta = {"content": text} if text else {}
    body = {"choices": [{"index": 0, "delta": delta, "finish_reason": fields.pop("finish_reason", None)}], **fields}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def answer(*reads: tuple[float, bytes], problem: str = "") -> Answer:
    return read(REQUEST, Exchange(sent_at=0.5, ended_at=9.0, reads=reads, problem=problem))


class TestTimes:
    def test_an_event_arrives_with_the_read_that_completes_it(self) -> None:
        whole = chunk(event("a"))
        found = answer((1.0, HEAD), (2.0, whole[:20]), (3.0, whole[20:]), (4.0, chunk(event("b")) + chunk(DONE) + END))
        assert found.is_whole
        assert found.text == "ab"
        assert found.text_times == [3.0, 4.0]
        assert found.first_token_seconds == 2.5
        assert found.coalesced == 0

    def test_events_of_one_read_are_counted_apart_and_flagged(self) -> None:
        together = chunk(event("a") + event("b")) + chunk(event("c"))
        found = answer((1.0, HEAD), (2.0, together), (3.0, chunk(event("d"))), (4.0, chunk(DONE) + END))
        assert found.text_times == [2.0, 2.0, 2.0, 3.0]
        assert found.coalesced == 2

    def test_roles_pings_and_usage_are_no_tokens(self) -> None:
        role = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
        usage = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\n'
        parts = (role, b": ping\r\n\r\n", event("a", finish_reason="length"), usage, DONE)
        found = answer((1.0, HEAD), *((2.0 + i, chunk(part)) for i, part in enumerate(parts)), (9.0, END))
        assert found.text_times == [4.0]
        assert (found.prompt_tokens, found.answer_tokens, found.finish_reason) == (7, 3, "length")
        assert found.finished_at == 4.0

    def test_what_a_model_thinks_is_text_too(self) -> None:
        thought = b'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}\r\n\r\n'
        found = answer((1.0, HEAD + chunk(thought)), (2.0, chunk(DONE) + END))
        assert (found.text, found.text_times) == ("hm", [1.0])

    @given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
    def test_the_text_does_not_depend_on_how_bytes_arrive(self, sizes: Sequence[int]) -> None:
        words = ["één ", "twee\n\n", "drie ", "😀"]
        data = HEAD + b"".join(chunk(event(word)) for word in words) + chunk(DONE) + END
        reads, start = [], 0
        for number, size in enumerate(sizes):
            reads.append((float(number), data[start : start + size]))
            start += size
        found = answer(*reads, (99.0, data[start:]))
        assert found.is_whole
        assert found.text == "".join(words)
        assert len(found.text_times) == len(words)
        assert list(found.text_times) == sorted(found.text_times)


class TestBadEnds:
    def test_a_stream_that_is_cut_is_not_whole(self) -> None:
        found = answer((1.0, HEAD + chunk(event("a"))))
        assert not found.is_whole
        assert found.problem == "the stream ended before its end"
        assert found.text == "a"

    def test_an_error_in_the_stream_is_told(self) -> None:
        found = answer((1.0, HEAD + chunk(b'data: {"error": {"message": "out of memory"}}\n\n') + END))
        assert "out of memory" in found.problem

    def test_a_refusal_keeps_its_headers_and_words(self) -> None:
        refusal = b"HTTP/1.1 503 X\r\nRetry-After: 7\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        found = answer((1.0, refusal))
        assert (found.status, found.headers["retry-after"], found.text) == (503, "7", "{}")
        assert not found.is_whole

    def test_nonsense_is_no_answer(self) -> None:
        assert answer((1.0, b"\x00\x01\r\n\r\n")).status == 0
        assert answer().problem == "closed without an answer"
        assert "no JSON" in answer((1.0, HEAD + chunk(b"data: {\n\n") + END)).problem

    def test_a_whole_answer_needs_no_stream(self) -> None:
        body = json.dumps({"choices": [{"message": {"content": "ja"}}], "usage": {"completion_tokens": 1}}).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        found = answer((1.0, head + body))
        assert (found.text, found.answer_tokens, found.is_whole) == ("ja", 1, True)


class TestAsk:
    def ask(self, *said: bytes, pause: float = 0.0, patience: float = 20.0) -> tuple[Answer, bytes]:
        """Against a server that reads a request, says `said`, waits and closes."""

        async def main() -> tuple[Answer, bytes]:
            heard: list[bytes] = []
            gone = asyncio.Event()

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                heard.append(await reader.readuntil(b"}"))
                for data in said:
                    writer.write(data)
                    await writer.drain()
                if pause:
                    heard.append(await reader.read())  # until the client cuts the connection
                writer.close()
                gone.set()

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            request = Request(host="127.0.0.1", port=port, path="/x", body={"a": 1})
            async with server:
                found = await ask(request, patience_seconds=patience)
                await asyncio.wait_for(gone.wait(), 20.0)
            return found, heard[0]

        return asyncio.run(main())

    def test_sends_the_body_and_reads_to_the_end(self) -> None:
        found, heard = self.ask(HEAD, chunk(event("a")), chunk(DONE) + END)
        assert found.is_whole
        assert found.sent_at <= found.text_times[0] <= found.ended_at
        assert heard.startswith(b"POST /x HTTP/1.1\r\n")
        assert heard.endswith(b'{"a": 1}')

    def test_patience_ends_it_and_cuts_the_connection(self) -> None:
        found, _ = self.ask(HEAD, chunk(event("a")), pause=1.0, patience=0.3)
        assert found.problem == "no end within 0.3 s"
        assert found.text == "a"

    def test_nobody_there(self) -> None:
        found = asyncio.run(ask(Request(host="127.0.0.1", port=1, path="/"), patience_seconds=5.0))
        assert found.status == 0
        assert found.problem.startswith("no connection")

    def test_a_cancelled_request_cuts_the_connection(self) -> None:
        async def main() -> bytes:
            closed: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            arrived = asyncio.Event()

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.readuntil(b"}")
                arrived.set()
                closed.set_result(await reader.read())
                writer.close()

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            async with server:
                asking = asyncio.create_task(
                    ask(Request(host="127.0.0.1", port=port, path="/x", body={}), patience_seconds=60.0)
                )
                await arrived.wait()
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
                return await asyncio.wait_for(closed, 20.0)

        assert asyncio.run(main()) == b""
