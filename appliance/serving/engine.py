"""The engine contract: what HTTP asks of whatever turns prompts into text, and the plain data between the two.

`Engine` is the contract, `Generation` the handle of one running request. Everything here can be sent over a pipe, so an
engine may live in this process or in one of its own. Knows nothing of HTTP, Prometheus or llama.cpp. Times are
`time.monotonic()` seconds, which processes of one machine share.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Literal, Protocol

from appliance.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled"]
Outcome = Literal["stop", "length", "cancelled", "failed"]
Phase = Literal["queue", "prefill", "decode"]
Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The served model; `context_tokens` is the limit of one request, prompt and answer together."""

    name: str
    sha256: str
    quantization: str
    architecture: str
    size_bytes: int
    context_tokens: int
    slots: int
    made_at: int  # seconds since the epoch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How the next token is chosen. Temperature 0 takes the likeliest token; the filters then do nothing.

    The order is llama.cpp's: penalties (over generated tokens only), top_k, top_p, min_p, temperature.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A prompt as token ids and how to continue it; `arrived_at` is where the waiting of the client began."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    arrived_at: float
    stop: tuple[str, ...] = ()
    sampling: SamplingSettings = SamplingSettings()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TextPiece:
    """Text that nothing can take back any more; never empty."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event. `generated_tokens` counts every sampled token, the one that ended the answer included."""

    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The last event of a request that could not be answered."""

    error: RequestError


Event = TextPiece | Finished | Failed


class Generation:
    """One request being answered: an async iterator that ends with `Finished` or raises the error of `Failed`.

    Made inside a running event loop; `deliver` and `cancel` may be called from any thread.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._cancel: Callable[[], None] | None = None

    def on_cancel(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel

    def deliver(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """Frees the request's place as soon as the chunk in flight allows; harmless after the end."""
        if self._cancel is not None:
            self._cancel()

    async def __aiter__(self) -> AsyncIterator[TextPiece | Finished]:
        while True:
            event = await self._events.get()
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, Finished):
                return


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the engine is doing now."""

    running: int
    waiting: int
    slots: int
    is_accepting: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One decode call: tokens computed, and the times that clients saw."""

    prompt_tokens: int
    generated_tokens: int
    first_token_seconds: tuple[float, ...]
    inter_token_seconds: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """One request that has ended, however it ended; `cancelled_in` names the phase of a cancelled one."""

    outcome: Outcome
    duration_seconds: float
    queue_seconds: float
    cancelled_in: Phase | None = None


class StatsListener(Protocol):
    """Receives the engine's facts, from the engine's thread; must be quick and must not raise."""

    def record_step(self, stats: StepStats) -> None: ...

    def record_request(self, stats: RequestStats) -> None: ...


class Engine(Protocol):
    """Turns prompts into text. All methods are called from the event loop's thread, and none blocks it."""

    @property
    def model(self) -> ModelInfo: ...

    async def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation with the assistant's turn opened.

        Raises `PromptTooLong` when no answer fits behind it, `RequestError` when the template refuses it.
        """

    def submit(self, request: GenerationRequest) -> Generation:
        """Queues a request. Raises `PromptTooLong`, `QueueFull`, or `EngineFailed` when the engine is not running."""

    def load(self) -> Load: ...

    def drain(self, grace_seconds: float) -> None:
        """Refuses new requests from now on; those accepted may finish within the grace time, the rest fails then."""

    def close(self) -> None:
        """Ends every request and frees the memory. The only call that may block, for the chunk in flight."""
