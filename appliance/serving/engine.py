"""The engine contract: what HTTP asks of whatever turns prompts into text.

`Models` finds an engine by name, `Engine` answers requests, `Generation` is the handle of one that is being answered. The
data between them is in `requests.py` and `events.py`. Knows nothing of HTTP, Prometheus or llama.cpp.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal, Protocol

from msgspec import Struct

from appliance.errors import ModelNotFound, RequestError
from appliance.serving.events import (
    Accepted,
    Event,
    Failed,
    Finished,
    Load,
    ModelInfo,
    ModelKind,
    Pooled,
    RequestStats,
    StepStats,
    TextPiece,
    Tokens,
)
from appliance.serving.requests import ChatPrompt, GenerationRequest, PoolingRequest

RestartReason = Literal["exit", "signal", "hang", "memory"]


class Generation:
    """One accepted request: an async iterator over what comes after `Accepted`, until every answer has `Finished`.

    Raises the error of `Failed`. Used in the event loop's thread; only `cancel` may be called from any.
    """

    def __init__(self, answers: int = 1) -> None:
        self.accepted = Accepted(prompt_tokens=0)
        self._answers = answers
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._cancel: Callable[[], None] | None = None

    def on_cancel(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel

    def deliver(self, event: Event) -> None:
        self._events.put_nowait(event)

    def cancel(self) -> None:
        """Frees the request's place as soon as the chunk in flight allows; harmless after the end."""
        if self._cancel is not None:
            self._cancel()

    async def started(self) -> "Generation":
        """Waits for the first event; raises the error of `Failed`."""
        event = await self._events.get()
        if isinstance(event, Failed):
            raise event.error()
        assert isinstance(event, Accepted), event
        self.accepted = event
        return self

    async def __aiter__(self) -> AsyncIterator[TextPiece | Finished]:
        left = self._answers
        while left:
            event = await self._events.get()
            if isinstance(event, Failed):
                raise event.error()
            assert isinstance(event, TextPiece | Finished), event
            left -= isinstance(event, Finished)
            yield event


class StatsListener(Protocol):
    """Receives the engine's facts; must be quick and must not raise."""

    def record_step(self, stats: StepStats) -> None: ...

    def record_request(self, stats: RequestStats) -> None: ...


class EngineListener(Protocol):
    """Receives what happens to engines; must be quick and must not raise."""

    def of_model(self, name: str) -> StatsListener: ...

    def record_load(self, model: ModelInfo, seconds: float) -> None: ...

    def record_first_token_after_load(self, name: str, seconds: float) -> None:
        """From the start of loading to the first token of any request."""

    def record_unload(self, name: str) -> None: ...

    def record_restart(self, name: str, reason: RestartReason) -> None: ...


class Engine(Protocol):
    """One loaded model. All methods are called from the event loop's thread, and none blocks it."""

    @property
    def model(self) -> ModelInfo: ...

    async def submit(self, request: GenerationRequest) -> Generation:
        """Returns once the request has its place in the queue.

        Raises `RequestError` (template, grammar or settings refused), `PromptTooLong`, `QueueFull`, `DeadlineExceeded` or
        `DeadlineTooShort` when the deadline cannot be kept, `EngineRestarting`, `ShuttingDown` or `EngineFailed`. Cancelling
        the awaiting task cancels the request.
        """

    async def pool(self, request: PoolingRequest) -> Pooled:
        """Embeds or ranks. Raises as `submit` does, and `RequestError` when the model is of another kind."""

    async def tokenize(self, text: str, *, is_special_parsed: bool = False) -> Tokens: ...

    async def detokenize(self, tokens: Sequence[int]) -> str: ...

    async def apply_template(self, prompt: ChatPrompt) -> str: ...

    def load(self) -> Load: ...


class ModelCard(Struct, frozen=True, kw_only=True):
    """A model that can be asked for, loaded or not; `parent` is the base of an adapter."""

    id: str
    kind: ModelKind
    made_at: int
    size_bytes: int
    sha256: str
    is_loaded: bool
    quantization: str = ""
    architecture: str = ""
    context_tokens: int = 0
    parent: str | None = None


class EngineLease(Struct, frozen=True, kw_only=True):
    """An engine that stays loaded while the lease is held; `adapter` is what the asked name said behind the colon."""

    engine: Engine
    name: str
    adapter: str | None = None

    def scaled(self, scale: float) -> float:
        """How strongly the adapter acts. Raises `RequestError` for a scale without an adapter."""
        if self.adapter is None and scale != 1.0:
            raise RequestError(
                f"adapter_scale: {self.name!r} is no adapter; ask for one by model:adapter, or leave the scale out.",
                param="adapter_scale",
            )
        return scale


def no_such_model(cards: Sequence[ModelCard]) -> ModelNotFound:
    known = ", ".join(repr(card.id) for card in cards)
    return ModelNotFound(f"This server has no model of that name; it serves {known}.", param="model")


class Models(Protocol):
    """The models of this server. Used from the event loop's thread."""

    def cards(self) -> Sequence[ModelCard]: ...

    def lease(self, name: str | None, kind: ModelKind = "chat") -> contextlib.AbstractAsyncContextManager[EngineLease]:
        """Loads the model if need be; None takes the default one. Waits while a model is being replaced or restarted.

        Raises `ModelNotFound`, `NoMemoryForModel`, `EngineRestarting` or `EngineFailed`.
        """

    def load(self) -> Load:
        """Of all engines together; the state is the default model's."""

    def drain(self, grace_seconds: float) -> None:
        """Refuses new requests from now on; those accepted may finish within the grace time, the rest fails then."""

    async def close(self) -> None:
        """Ends every engine."""
