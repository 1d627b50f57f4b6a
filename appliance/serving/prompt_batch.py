"""Several prompts of one client, answered by one engine: never more at a time than it has slots. Knows nothing of HTTP."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from appliance.serving.engine import Engine, Generation
from appliance.serving.events import Finished, TextPiece
from appliance.serving.requests import GenerationRequest


class PromptBatch:
    """An async iterator over the events of all prompts, each with the number of its prompt."""

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest]) -> None:
        self._engine = engine
        self._requests = requests
        self._numbers = iter(range(len(requests)))
        self._events: asyncio.Queue[tuple[int, TextPiece | Finished] | Exception] = asyncio.Queue()
        self._workers: list[asyncio.Task[None]] = []
        self._running: set[Generation] = set()

    async def start(self) -> None:
        """Returns once the first prompt has its place in the queue; raises what `Engine.submit` raises."""
        number = next(self._numbers)
        first = await self._submit(number)
        self._workers.append(asyncio.create_task(self._answer(number, first)))
        for number in [next(self._numbers) for _ in range(min(self._engine.model.slots, len(self._requests)) - 1)]:
            self._workers.append(asyncio.create_task(self._answer(number, None)))

    async def __aiter__(self) -> AsyncIterator[tuple[int, TextPiece | Finished]]:
        left = sum(request.n for request in self._requests)
        while left:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event[1], Finished)
            yield event

    async def close(self) -> None:
        """Cancels what is not finished."""
        for worker in self._workers:
            worker.cancel()
        for generation in self._running:
            generation.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def _answer(self, number: int | None, generation: Generation | None) -> None:
        """One prompt after the other. What goes wrong is raised where the events are read."""
        try:
            while number is not None:
                generation = generation or await self._submit(number)
                async for event in generation:
                    self._events.put_nowait((number, event))
                self._running.remove(generation)
                number, generation = next(self._numbers, None), None
        except Exception as error:
            self._events.put_nowait(error)

    async def _submit(self, number: int) -> Generation:
        generation = await self._engine.submit(self._requests[number])
        self._running.add(generation)
        return generation
