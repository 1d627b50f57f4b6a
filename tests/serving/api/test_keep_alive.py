"""Comments in a stream of events while there is nothing to tell."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from appliance.errors import EngineFailed
from appliance.serving import sse
from appliance.serving.api import keep_alive


def test_silence_is_filled_with_comments() -> None:
    async def events() -> AsyncIterator[bytes]:
        yield b"one"
        await spoken.wait()
        yield b"two"

    async def go() -> list[bytes]:
        told = []
        async for part in keep_alive.with_keep_alive(events(), seconds=0.001):
            told.append(part)
            if told.count(keep_alive.KEEP_ALIVE) == 3:
                spoken.set()
        return told

    spoken = asyncio.Event()
    told = asyncio.run(asyncio.wait_for(go(), timeout=20))
    assert [part for part in told if part != keep_alive.KEEP_ALIVE] == [b"one", b"two"]
    assert list(sse.decode((keep_alive.KEEP_ALIVE + sse.encode({"a": 1})).decode().split("\n"))) == [{"a": 1}]


def test_failures_pass_through_the_comments() -> None:
    async def events() -> AsyncIterator[bytes]:
        yield b"one"
        raise EngineFailed("It broke.")

    async def go() -> list[bytes]:
        return [part async for part in keep_alive.with_keep_alive(events())]

    with pytest.raises(EngineFailed):
        asyncio.run(go())
