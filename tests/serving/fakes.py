"""Stand-ins: a decoder that counts, an engine that says what it is told, a listener that remembers."""

import threading
from collections.abc import Callable, Mapping, Sequence

from appliance.errors import EngineFailed, PromptTooLong, RequestError
from appliance.serving.engine import (
    Event,
    Failed,
    Finished,
    Generation,
    GenerationRequest,
    Load,
    Message,
    ModelInfo,
    RequestStats,
    SamplingSettings,
    StepStats,
    TextPiece,
)
from appliance.serving.scheduler import Feed

END = 0
MODEL = ModelInfo(
    name="fake",
    sha256="0123456789abcdef" * 4,
    quantization="Q4_K - Medium",
    architecture="fake",
    size_bytes=1,
    context_tokens=64,
    slots=2,
    made_at=1_700_000_000,
)


class Listener:
    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.requests: list[RequestStats] = []

    def record_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def record_request(self, stats: RequestStats) -> None:
        self.requests.append(stats)


class CountingDecoder:
    """Answers a prompt with the numbers after its last token: 5 → 6 7 8 …, as text "6 7 8 ". 99 is followed by the end.

    `gate` holds every decode call until it is set. Checks what llama.cpp would abort on: holes and wrong positions.
    """

    def __init__(self, slots: int = 2, context_tokens: int = 64) -> None:
        self.slots, self.context_tokens = slots, context_tokens
        self.sequences: dict[int, list[int]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.hold_at = -1  # closes the gate before this decode call
        self.entered = threading.Semaphore(0)  # one count per decode call begun
        self.failures: list[Exception] = []
        self.batches: list[list[int]] = []
        self.is_closed = False
        self.aborts = 0

    def start(self, slot: int, sampling: SamplingSettings) -> None:  # noqa: ARG002
        assert slot not in self.sequences
        self.sequences[slot] = []

    def decode(self, feeds: Sequence[Feed]) -> Mapping[int, int] | None:
        before = self.aborts
        if len(self.batches) == self.hold_at:
            self.gate.clear()
        self.entered.release()
        self.gate.wait()
        if self.failures:
            raise self.failures.pop()
        if self.aborts > before:
            return None
        assert len({feed.slot for feed in feeds}) == len(feeds) <= self.slots
        self.batches.append([len(feed.tokens) for feed in feeds])
        for feed in feeds:
            assert feed.tokens
            assert feed.position == len(self.sequences[feed.slot]) < self.context_tokens
            self.sequences[feed.slot] += feed.tokens
        return {feed.slot: self._next(feed.tokens[-1]) for feed in feeds if feed.is_sampled}

    def _next(self, token: int) -> int:
        return END if token == 99 else token + 1

    def release(self, slot: int) -> None:
        self.sequences.pop(slot, None)

    def clear(self) -> None:
        self.sequences.clear()

    def abort(self) -> None:
        self.aborts += 1
        self.gate.set()

    def piece(self, token: int) -> bytes:
        return f"{token} ".encode()

    def is_end(self, token: int) -> bool:
        return token == END

    def close(self) -> None:
        self.is_closed = True


class FakeEngine:
    """Answers every request with `script`; an empty script leaves it running until it is cancelled."""

    def __init__(self, script: Sequence[Event] = ()) -> None:
        self.script = list(script)
        self.refusal: RequestError | None = None
        self.requests: list[GenerationRequest] = []
        self.conversations: list[Sequence[Message]] = []
        self.cancelled = 0
        self.running = 0
        self.is_accepting = True

    @property
    def model(self) -> ModelInfo:
        return MODEL

    async def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        self.conversations.append(messages)
        count = sum(len(message["content"]) for message in messages)
        if count >= MODEL.context_tokens:
            raise PromptTooLong(f"The prompt has {count} tokens; the limit is {MODEL.context_tokens}.", param="messages")
        return tuple(range(count))

    def submit(self, request: GenerationRequest) -> Generation:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        generation = Generation()
        generation.on_cancel(self._canceller(generation))
        self.running += 1
        for event in self.script:
            generation.deliver(event)
        if self.script and isinstance(self.script[-1], Finished | Failed):
            self.running -= 1
        return generation

    def _canceller(self, generation: Generation) -> Callable[[], None]:
        is_over = bool(self.script) and isinstance(self.script[-1], Finished | Failed)

        def cancel() -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                self.cancelled += 1
                self.running -= 1
                generation.deliver(Finished(reason="cancelled", prompt_tokens=1, generated_tokens=0))

        return cancel

    def load(self) -> Load:
        return Load(running=self.running, waiting=0, slots=2, is_accepting=self.is_accepting)

    def drain(self, grace_seconds: float) -> None:  # noqa: ARG002
        self.is_accepting = False

    def close(self) -> None:
        self.is_accepting = False


def says(*pieces: str) -> list[Event]:
    finished = Finished(reason="stop", prompt_tokens=5, generated_tokens=len(pieces) + 1)
    return [*(TextPiece(text=piece) for piece in pieces), finished]


def breaks(*pieces: str) -> list[Event]:
    return [*(TextPiece(text=piece) for piece in pieces), Failed(error=EngineFailed("It broke."))]
