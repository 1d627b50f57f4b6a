"""What an engine says, as plain data that crosses from the engine's process: answers, failures, facts for metrics."""

from collections.abc import Sequence
from typing import Literal, Self

from msgspec import Struct

from appliance import errors
from appliance.errors import EngineFailed, RequestError, TryAgain

FinishReason = Literal["stop", "length", "cancelled"]
Outcome = Literal["stop", "length", "cancelled", "failed"]
Phase = Literal["queue", "prefill", "decode"]
Reading = Literal["exact", "stitched"]  # of documents: in their place, or by themselves and then moved
EngineState = Literal["loading", "ready", "draining", "restarting", "failed", "stopped"]
ModelKind = Literal["chat", "embedding", "rerank"]


class Accepted(Struct, frozen=True, kw_only=True, tag=True):
    """The first event: the request has its place in the queue. Before it, only `Failed` can come.

    `opening` is the end of the rendered prompt that belongs to the answer, such as "<think>\\n": the model continues it.
    """

    prompt_tokens: int
    opening: str = ""


class TokenLogprob(Struct, frozen=True, kw_only=True):
    """A sampled token, before it was bent by temperature, bias or grammar; `top` are the likeliest in its place."""

    piece: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


class TextPiece(Struct, frozen=True, kw_only=True, tag=True):
    """Text that nothing can take back any more. Without text only when there are log probabilities to tell."""

    text: str
    index: int = 0  # which of `n` answers
    logprobs: tuple[TokenLogprob, ...] = ()


class Finished(Struct, frozen=True, kw_only=True, tag=True):
    """The end of one answer. `generated_tokens` counts every sampled token, the one that ended the answer included."""

    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int = 0  # of the prompt: not computed for this request
    stitched_tokens: int = 0  # of them: of documents that were read by themselves
    documents: Reading | None = None  # None: there were none
    index: int = 0
    is_deadline: bool = False  # "length" because the time was over
    stop: str | None = None  # the stop string that ended it
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Failed(Struct, frozen=True, kw_only=True, tag=True):
    """The last event of a request that could not be answered."""

    code: str
    message: str
    param: str | None = None
    retry_after_seconds: int | None = None

    @classmethod
    def of(cls, error: RequestError) -> Self:
        retry = error.retry_after_seconds if isinstance(error, TryAgain) else None
        return cls(code=error.api_code, message=str(error), param=error.param, retry_after_seconds=retry)

    def error(self) -> RequestError:
        """The error again, of its own class."""
        kind = _ERRORS.get(self.code, EngineFailed)
        if issubclass(kind, TryAgain):
            return kind(self.message, retry_after_seconds=self.retry_after_seconds or 1, param=self.param)
        return kind(self.message, param=self.param)


class Pooled(Struct, frozen=True, kw_only=True, tag=True):
    """The only event of a `PoolingRequest`: float32 vectors, little-endian, or scores in the order of the inputs."""

    vectors: tuple[bytes, ...] = ()
    scores: tuple[float, ...] = ()
    prompt_tokens: int


class Tokens(Struct, frozen=True, kw_only=True, tag=True):
    """The only event of a `TokenizeRequest`."""

    tokens: tuple[int, ...]
    pieces: tuple[bytes, ...]


class Text(Struct, frozen=True, kw_only=True, tag=True):
    """The only event of a `DetokenizeRequest` or `TemplateRequest`."""

    text: str


Event = Accepted | TextPiece | Finished | Failed | Pooled | Tokens | Text


class ModelInfo(Struct, frozen=True, kw_only=True, tag=True):
    """A loaded model; `context_tokens` is the limit of one request, prompt and answer together."""

    name: str
    kind: ModelKind
    sha256: str
    template_sha256: str
    quantization: str
    architecture: str
    size_bytes: int
    context_tokens: int
    slots: int
    made_at: int  # seconds since the epoch
    adapters: dict[str, str] = {}  # name to sha256
    chat_template: str = ""
    vocabulary_tokens: int = 0
    embedding_width: int = 0
    kv_cells: int = 0  # tokens of all sequences
    kv_bytes_per_token: int = 0
    weight_bytes: int = 0  # read for every token decoded
    threads_decode: int = 0
    threads_prefill: int = 0
    gpu_layers: int = 0
    load_seconds: float = 0.0
    notes: tuple[str, ...] = ()  # what was stepped down from what was asked, for a person


class DocumentCounts(Struct, frozen=True, kw_only=True, tag=True):
    """Of the operator's documents, which are read ahead; `erased` ones were removed or edited since the engine started.

    Files of `unerased` ones could not be deleted yet; that is tried again.
    """

    known: int = 0
    waiting: int = 0
    refused: int = 0
    erased: int = 0
    unerased: int = 0


class Load(Struct, frozen=True, kw_only=True, tag=True):
    """What the engine is doing now."""

    state: EngineState
    running: int
    waiting: int
    slots: int
    waiting_tokens: int = 0
    kv_cells_used: int = 0  # by running requests and what the last ones left
    kv_cells_running: int = 0
    kv_cells: int = 0
    cached_tokens: int = 0  # of prefixes kept in ordinary memory
    cache_tokens: int = 0  # their limit
    is_speculating: bool = False
    step_started_at: float | None = None  # of the decode call in flight
    documents: DocumentCounts | None = None  # None: there is no folder of them

    @property
    def is_accepting(self) -> bool:
        return self.state == "ready"


def together(loads: Sequence[Load], *, state: EngineState, waiting: int, documents: DocumentCounts | None) -> Load:
    """What several engines do; `waiting` requests more wait for one of them to be loaded."""
    return Load(
        documents=documents,
        state=state,
        running=sum(each.running for each in loads),
        waiting=sum(each.waiting for each in loads) + waiting,
        slots=sum(each.slots for each in loads),
        waiting_tokens=sum(each.waiting_tokens for each in loads),
        kv_cells_used=sum(each.kv_cells_used for each in loads),
        kv_cells_running=sum(each.kv_cells_running for each in loads),
        kv_cells=sum(each.kv_cells for each in loads),
        cached_tokens=sum(each.cached_tokens for each in loads),
        cache_tokens=sum(each.cache_tokens for each in loads),
        is_speculating=any(each.is_speculating for each in loads),
        step_started_at=min((each.step_started_at for each in loads if each.step_started_at is not None), default=None),
    )


class StepStats(Struct, frozen=True, kw_only=True, tag=True):
    """One decode call: tokens computed, and the times that clients saw."""

    seconds: float
    prompt_tokens: int
    generated_tokens: int
    first_token_seconds: tuple[float, ...] = ()
    inter_token_seconds: tuple[float, ...] = ()
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0  # decided by a grammar, computed without being sampled
    read_bytes: int = 0  # weights once, and the KV of every token in the batch's sequences: what memory had to deliver


class RequestStats(Struct, frozen=True, kw_only=True, tag=True):
    """One request that has ended, however it ended; `cancelled_in` names the phase of a cancelled one."""

    id: str
    outcome: Outcome
    duration_seconds: float
    queue_seconds: float
    prefill_seconds: float | None = None  # None: it never got there
    decode_seconds: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    stitched_tokens: int = 0
    documents: Reading | None = None
    generated_tokens: int = 0
    n: int = 1
    max_tokens: int = 0
    cancelled_in: Phase | None = None
    missed_deadline_in: Phase | None = None
    failure_code: str | None = None


def _subclasses(kind: type[RequestError]) -> dict[str, type[RequestError]]:
    found = {kind.api_code: kind}
    for each in kind.__subclasses__():
        found |= _subclasses(each)
    return found


_ERRORS = _subclasses(errors.RequestError)
