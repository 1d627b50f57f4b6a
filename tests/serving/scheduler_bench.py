"""A scheduler over a counting decoder, and clients that keep all that is delivered to them."""

import itertools
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import Accepted, Event, Failed, Finished, TextPiece
from appliance.serving.passages import Passages
from appliance.serving.requests import GenerationRequest, SamplingSettings, TokenPrompt
from appliance.serving.scheduler import Scheduler
from appliance.serving.snapshots import SnapshotStore
from tests.serving.counting_decoder import CountingDecoder, Forcing, Listener

WAIT_SECONDS = 20.0
_ids = itertools.count()


def settings_for(decoder: CountingDecoder, **changes: Any) -> EngineSettings:
    defaults: dict[str, Any] = {
        "name": "fake",
        "model_path": "/nowhere.gguf",
        "sha256": "0" * 64,
        "made_at": 0,
        "kind": "chat",
        "slots": decoder.slots,
        "context_tokens": decoder.context_tokens,
        "threads_decode": 1,
        "threads_prefill": 1,
        "kv_type": "f16",
        "is_mapped": True,
        "is_repacked": True,
        "queue_requests": 4,
        "queue_tokens": 100_000,
    }
    return EngineSettings(**(defaults | changes))


class Client:
    """One request and everything that was delivered for it."""

    def __init__(
        self,
        scheduler: Scheduler,
        prompt: tuple[int, ...],
        *,
        shared: int = 0,
        grammar: Forcing | None = None,
        passages: Passages | None = None,
        wait: float | None = None,
        seed: int | None = None,
        **fields: Any,
    ) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.texts: dict[int, str] = {}
        self.pieces: list[TextPiece] = []
        self.id = f"r{next(_ids)}"
        now = time.monotonic()
        request = GenerationRequest(
            id=self.id,
            prompt=TokenPrompt(tokens=prompt),
            arrived_at=now,
            deadline_at=None if wait is None else now + wait,
            sampling=SamplingSettings(seed=seed),
            **({"max_tokens": 5} | fields),
        )
        self.n = request.n
        self._scheduler = scheduler
        scheduler.submit(request, prompt, shared, grammar, self.events.put, "<think>", passages)
        assert self.next() == Accepted(prompt_tokens=len(prompt), opening="<think>")

    @property
    def text(self) -> str:
        return self.texts.get(0, "")

    def cancel(self) -> None:
        self._scheduler.cancel(self.id)

    def next(self) -> Event:
        return self.events.get(timeout=WAIT_SECONDS)

    def ends(self) -> list[Finished | Failed]:
        """Waits for the end of all answers; by index, or the one failure."""
        ends: list[Finished | Failed] = []
        while len(ends) < self.n:
            event = self.next()
            if isinstance(event, TextPiece):
                self.pieces.append(event)
                self.texts[event.index] = self.texts.get(event.index, "") + event.text
            else:
                assert isinstance(event, Finished | Failed)
                ends.append(event)
                if isinstance(event, Failed):
                    return ends
        return sorted(ends, key=lambda end: end.index if isinstance(end, Finished) else 0)

    def end(self) -> Finished | Failed:
        return self.ends()[-1]

    def finished(self) -> Finished:
        end = self.end()
        assert isinstance(end, Finished), end
        return end

    def failed(self) -> Failed:
        end = self.end()
        assert isinstance(end, Failed), end
        return end

    def reason(self) -> str:
        return self.finished().reason


class Bench:
    def __init__(
        self,
        decoder: CountingDecoder | None = None,
        *,
        snapshots: SnapshotStore | None = None,
        weight_bytes: int = 0,
        **settings: Any,
    ) -> None:
        self.decoder = decoder or CountingDecoder()
        self.listener = Listener()
        self.flushes = 0
        self.scheduler = Scheduler(
            self.decoder,
            settings=settings_for(self.decoder, **settings),
            listener=self.listener,
            snapshots=snapshots,
            flush=self._flushed,
            weight_bytes=weight_bytes,
        )

    def client(self, *prompt: int, **fields: Any) -> Client:
        return Client(self.scheduler, prompt, **fields)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is asked meanwhile comes in one moment: the scheduler sees it all before its next step."""
        with self.scheduler._changed:
            yield

    def idle(self) -> None:
        """Waits until nothing runs, nothing waits and nothing is read ahead."""
        until(lambda: self.scheduler.load().running == self.scheduler.load().waiting == 0 and not self.scheduler._idle._warm)

    def close(self) -> None:
        """Ends the scheduler; the decoder must have had nothing to complain about."""
        self.decoder.gate.set()
        self.scheduler.close()
        assert self.decoder.problems == []

    def _flushed(self) -> None:
        self.flushes += 1

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def bench_of(*, context_tokens: int = 200, slots: int = 2, cache_tokens: int = 1000, **rest: Any) -> Bench:
    return Bench(CountingDecoder(slots=slots, context_tokens=context_tokens), cache_tokens=cache_tokens, **rest)


def cached(client: Client) -> int:
    return client.finished().cached_tokens


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def numbers(first: int, count: int) -> str:
    return "".join(f"{number} " for number in range(first, first + count))
