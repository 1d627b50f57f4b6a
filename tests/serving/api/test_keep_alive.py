"""Comments in a stream of events while there is nothing to tell."""

import asyncio
from typing import Any

import pytest

from appliance.serving import sse
from appliance.serving.api.keep_alive import KEEP_ALIVE, attended

START: dict[str, Any] = {"type": "http.response.start", "status": 200}
END: dict[str, Any] = {"type": "http.response.body", "body": b"", "more_body": False}


def body(text: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": True}


class Client:
    """Hears what is sent; `pings` is set after three comments in a row."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.pings = asyncio.Event()

    async def send(self, message: Any) -> None:
        self.heard.append(message)
        if [each.get("body") for each in self.heard[-3:]] == [KEEP_ALIVE] * 3:
            self.pings.set()


def test_silence_is_filled_with_comments_until_the_end() -> None:
    async def go() -> list[Any]:
        client = Client()
        async with attended(client.send, unread_seconds=60.0, seconds=0.001) as say:
            await asyncio.sleep(0.01)
            assert client.heard == [], "nothing may come before the status"
            await say(START)
            for text in (b"one", b"two"):
                await say(body(text))
                client.pings.clear()
                await asyncio.wait_for(client.pings.wait(), 20)
            await say(END)
            await asyncio.sleep(0.01)
        return client.heard

    heard = asyncio.run(go())
    assert [each for each in heard if each.get("body") != KEEP_ALIVE] == [START, body(b"one"), body(b"two"), END]
    assert heard[-1] == END
    assert all(each["more_body"] for each in heard if each.get("body") == KEEP_ALIVE)
    assert list(sse.decode((KEEP_ALIVE + sse.encode({"a": 1})).decode().split("\n"))) == [{"a": 1}]


def test_a_comment_never_overtakes_an_event_that_waits_for_its_client() -> None:
    async def go() -> list[Any]:
        client, is_slow = Client(), asyncio.Event()

        async def send(message: Any) -> None:
            if message.get("body") == b"one":
                await is_slow.wait()
            await client.send(message)

        async with attended(send, unread_seconds=60.0, seconds=0.001) as say:
            await say(START)
            saying = asyncio.create_task(say(body(b"one")))
            await asyncio.sleep(0.02)
            count = len(client.heard)
            is_slow.set()
            await saying
            await say(END)
            return client.heard[count:]

    assert asyncio.run(go())[0] == body(b"one")


def test_failures_pass_through_and_a_lost_client_stops_the_comments() -> None:
    async def send(message: Any) -> None:
        if message.get("body") == KEEP_ALIVE:
            raise OSError("gone")

    async def go() -> None:
        async with attended(send, unread_seconds=60.0, seconds=0.001) as say:
            await say(START)
            await asyncio.sleep(0.02)
            raise ValueError("It broke.")

    with pytest.raises(ValueError, match="broke"):
        asyncio.run(go())
