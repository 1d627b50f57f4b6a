"""Stand-ins for the engine contract: an engine that says what it is told, the models around it, listeners that remember."""

import contextlib
import struct
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from appliance.errors import EngineFailed, ModelNotFound, PromptTooLong, RequestError
from appliance.serving.engine import EngineLease, Generation, ModelCard, RestartReason
from appliance.serving.events import (
    Accepted,
    DocumentCounts,
    EngineState,
    Event,
    Failed,
    Finished,
    FinishReason,
    Load,
    ModelInfo,
    ModelKind,
    Pooled,
    RequestStats,
    StepStats,
    TextPiece,
    Tokens,
)
from appliance.serving.requests import ChatPrompt, GenerationRequest, PoolingRequest, Prompt, TextPrompt

# Knows tools in the Hermes format and a thinking switch, as Qwen's templates do.
TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '<tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
MODEL = ModelInfo(
    name="fake",
    kind="chat",
    sha256="0123456789abcdef" * 4,
    template_sha256="fedcba9876543210" * 4,
    quantization="Q4_K - Medium",
    architecture="fake",
    size_bytes=1,
    context_tokens=64,
    slots=2,
    made_at=1_700_000_000,
    vocabulary_tokens=1000,
    embedding_width=2,
)
THINKING_MODEL = msgspec.structs.replace(MODEL, chat_template=TEMPLATE)

Script = Sequence[Event] | Callable[[GenerationRequest], Sequence[Event]]


class Listener:
    """A `StatsListener`, and an `EngineListener` that hands itself out for every model."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.requests: list[RequestStats] = []
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.restarts: list[tuple[str, RestartReason]] = []

    def record_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def record_request(self, stats: RequestStats) -> None:
        self.requests.append(stats)

    def of_model(self, name: str) -> "Listener":  # noqa: ARG002
        return self

    def record_load(self, model: ModelInfo, seconds: float) -> None:  # noqa: ARG002
        self.loads.append(model.name)

    def record_first_token_after_load(self, name: str, seconds: float) -> None:
        pass

    def record_unload(self, name: str) -> None:
        self.unloads.append(name)

    def record_restart(self, name: str, reason: RestartReason) -> None:
        self.restarts.append((name, reason))


class FakeEngine:
    """Answers every request with `script`; one without an end leaves the request running until it is cancelled.

    A prompt has as many tokens as characters. Texts become their UTF-8 bytes as tokens, and vectors (characters, 1).
    """

    def __init__(self, script: Script = (), *, model: ModelInfo = MODEL, opening: str = "") -> None:
        self.model = model
        self.script = script
        self.opening = opening
        self.refusal: RequestError | None = None  # raised by everything that is asked
        self.requests: list[GenerationRequest] = []
        self.pooled: list[PoolingRequest] = []
        self.generations: list[Generation] = []
        self.cancelled = 0
        self.running = 0

    async def submit(self, request: GenerationRequest) -> Generation:
        self._refuse()
        count = prompt_size(request.prompt)
        if count >= self.model.context_tokens:
            limit = self.model.context_tokens
            raise PromptTooLong(f"The prompt has {count} tokens; the limit is {limit}.", param="messages")
        self.requests.append(request)
        events = self.script(request) if callable(self.script) else self.script
        generation = Generation(answers=request.n)
        is_over = sum(isinstance(event, Finished) for event in events) == request.n
        is_over |= any(isinstance(event, Failed) for event in events)
        self.running += not is_over
        generation.on_cancel(self._canceller(generation, request, is_over))
        generation.deliver(Accepted(prompt_tokens=count, opening=self.opening))
        for event in events:
            generation.deliver(event)
        self.generations.append(generation)
        return await generation.started()

    def _canceller(self, generation: Generation, request: GenerationRequest, is_over: bool) -> Callable[[], None]:
        def cancel() -> None:
            nonlocal is_over
            if is_over:
                return
            is_over = True
            self.cancelled += 1
            self.running -= 1
            for index in range(request.n):
                generation.deliver(ends("cancelled", index=index))

        return cancel

    async def pool(self, request: PoolingRequest) -> Pooled:
        self._refuse()
        self.pooled.append(request)
        tokens = sum(len(each) for each in request.inputs) + len(request.query or "")
        if request.query is not None:
            return Pooled(scores=tuple(float(len(each)) for each in request.inputs), prompt_tokens=tokens)
        vectors = tuple(struct.pack("<2f", len(each), 1.0) for each in request.inputs)
        return Pooled(vectors=vectors, prompt_tokens=tokens)

    async def tokenize(self, text: str, *, is_special_parsed: bool = False) -> Tokens:  # noqa: ARG002
        self._refuse()
        data = text.encode()
        return Tokens(tokens=tuple(data), pieces=tuple(bytes([each]) for each in data))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        self._refuse()
        return bytes(tokens).decode(errors="replace")

    async def apply_template(self, prompt: ChatPrompt) -> str:
        """With the model's thinking switch, and nothing else of a template."""
        self._refuse()
        told = "".join(f"{message['role']}: {message['content']}\n" for message in prompt.messages)
        is_off = prompt.template_variables.get("enable_thinking", True) is False
        return told + "assistant: " + (self.opening or ("<think>\n\n</think>\n\n" if is_off else ""))

    def load(self) -> Load:
        return Load(state="ready", running=self.running, waiting=0, slots=self.model.slots)

    def _refuse(self) -> None:
        if self.refusal is not None:
            raise self.refusal


class FakeModels:
    """The engines given, the first being the default; `leases` counts those held now. "name:adapter" finds adapters."""

    def __init__(self, *engines: FakeEngine) -> None:
        self.engines = {engine.model.name: engine for engine in engines}
        self.leases = 0
        self.leased: list[tuple[str | None, ModelKind]] = []
        self.is_draining = False
        self.is_closed = False
        self.documents: DocumentCounts | None = None

    def cards(self) -> Sequence[ModelCard]:
        return [
            ModelCard(
                id=model.name,
                kind=model.kind,
                made_at=model.made_at,
                size_bytes=model.size_bytes,
                sha256=model.sha256,
                is_loaded=True,
                quantization=model.quantization,
                architecture=model.architecture,
                context_tokens=model.context_tokens,
            )
            for model in (engine.model for engine in self.engines.values())
        ]

    @contextlib.asynccontextmanager
    async def lease(self, name: str | None, kind: ModelKind = "chat") -> AsyncIterator[EngineLease]:
        self.leased.append((name, kind))
        base, _, adapter = (name or next(iter(self.engines))).partition(":")
        if base not in self.engines:
            raise ModelNotFound("This server has no model of that name.", param="model")
        self.leases += 1
        try:
            yield EngineLease(engine=self.engines[base], name=name or base, adapter=adapter or None)
        finally:
            self.leases -= 1

    def load(self) -> Load:
        running = sum(engine.running for engine in self.engines.values())
        state: EngineState = "draining" if self.is_draining else "ready"
        return Load(state=state, running=running, waiting=0, slots=2, documents=self.documents)

    def drain(self, grace_seconds: float) -> None:  # noqa: ARG002
        self.is_draining = True

    async def close(self) -> None:
        self.is_closed = True


def prompt_size(prompt: Prompt) -> int:
    if isinstance(prompt, ChatPrompt):
        return sum(len(message["content"]) for message in prompt.messages)
    return len(prompt.text) if isinstance(prompt, TextPrompt) else len(prompt.tokens)


def ends(reason: FinishReason = "stop", *, index: int = 0, generated_tokens: int = 0, cached_tokens: int = 0) -> Finished:
    return Finished(
        reason=reason, prompt_tokens=5, generated_tokens=generated_tokens, cached_tokens=cached_tokens, index=index
    )


def says(*pieces: str, reason: FinishReason = "stop", index: int = 0) -> list[Event]:
    told = [TextPiece(text=piece, index=index) for piece in pieces]
    return [*told, ends(reason, index=index, generated_tokens=len(pieces) + 1)]


def breaks(*pieces: str) -> list[Event]:
    return [*(TextPiece(text=piece) for piece in pieces), Failed.of(EngineFailed("It broke."))]
