"""What an engine's process is for: a loaded model, what turns prompts into its tokens, and what answers them.

Rendering, tokenising and compiling grammars happen in a few threads of their own, so that a slow template holds up neither
the answers that are running nor the process's ear. Knows nothing of sockets and processes.
"""

import concurrent.futures
import functools
import importlib.metadata
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from appliance import artifacts
from appliance.errors import EngineFailed, ModelFileError, RecipeError, RequestError
from appliance.serving.decoder import CompiledGrammar, SnapshotRefused
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import Failed, Load, ModelInfo, RequestStats, Text, Tokens
from appliance.serving.kept_documents import KeptDocuments
from appliance.serving.llama import Context, Model, PoolingContext
from appliance.serving.outbox import Outbox
from appliance.serving.pooling_queue import PoolingQueue
from appliance.serving.prompt import PromptEncoder
from appliance.serving.requests import (
    ChatPrompt,
    DetokenizeRequest,
    GenerationRequest,
    PoolingRequest,
    Request,
    TokenizeRequest,
    TokenPrompt,
)
from appliance.serving.scheduler import Scheduler
from appliance.serving.snapshots import Identity, SnapshotStore
from appliance.serving.wire import Documents
from appliance.text.chat_template import ChatTemplate, TemplateFailed

ENCODING_THREADS = 2
NO_TEMPLATE = "{{ raise_exception('this model has none. It is a base model: it can only continue text.') }}"

logger = logging.getLogger("appliance.serving")


class Hosted:
    """A `Host`; making it loads the model. Raises `ModelFileError`, `EnvironmentIncomplete` or `RecipeError`."""

    def __init__(self, settings: EngineSettings, outbox: Outbox) -> None:
        self._settings = settings
        self._outbox = outbox
        path = Path(settings.model_path)
        self._model = Model(
            path, is_mapped=settings.is_mapped, is_repacked=settings.is_repacked, gpu_layers=settings.gpu_layers
        )
        adapters = {name: artifacts.digest_file(Path(file)) for name, file in settings.adapters.items()}
        self._encoder = PromptEncoder(self._model, _template(path, self._model), settings.context_tokens)
        self._context: Context | None = None
        self._documents: KeptDocuments | None = None
        self._pooling: PoolingContext | None = None
        self._runner: Scheduler | PoolingQueue
        if settings.kind == "chat":
            self._context = Context(self._model, settings)
            _allow_moving(self._context, settings)
            self._runner = self._scheduler(self._context, adapters)
        else:
            self._pooling = PoolingContext(self._model, settings)
            self._runner = PoolingQueue(self._pooling, settings=settings, listener=outbox, flush=outbox.flush)
        self._info = self._describe(adapters)
        self._lock = threading.Lock()  # guards the two below, and that a request is cancelled before or after it is queued
        self._encoding: dict[str, float | None] = {}  # since when, or None while it waits for a thread
        self._cancelled: set[str] = set()
        self._threads = concurrent.futures.ThreadPoolExecutor(ENCODING_THREADS, "encoding")

    @property
    def model(self) -> ModelInfo:
        return self._info

    @property
    def encoding_since(self) -> float | None:
        with self._lock:
            return min((since for since in self._encoding.values() if since is not None), default=None)

    def accept(self, request: Request) -> None:
        with self._lock:
            self._encoding[request.id] = None
        self._threads.submit(self._take, request)

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if request_id in self._encoding:
                self._cancelled.add(request_id)
                return
        self._runner.cancel(request_id)

    def load(self) -> Load:
        return self._runner.load()

    def drain(self, grace_seconds: float) -> None:
        self._runner.drain(grace_seconds)

    def keep(self, documents: Documents) -> None:
        if self._documents is not None:
            self._documents.keep(documents)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._documents is not None:
            self._documents.close()
        self._runner.close()

    def _take(self, request: Request) -> None:
        """Runs in one of the encoding threads, from a request's arrival to its place in the queue or its end."""
        with self._lock:
            self._encoding[request.id] = time.monotonic()
        hand_over: Callable[[], None] | None = None
        failure: RequestError | None = None
        try:
            hand_over = self._prepared(request)
        except RequestError as error:
            failure = error
        except Exception as error:
            failure = _unexpected(error)
        with self._lock:
            del self._encoding[request.id]
            is_cancelled = request.id in self._cancelled
            self._cancelled.discard(request.id)
            if hand_over is not None and not is_cancelled:
                try:
                    hand_over()
                except RequestError as error:
                    failure = error
                except Exception as error:
                    failure = _unexpected(error)
        if is_cancelled:
            self._record_cancelled(request)
            failure = failure or EngineFailed("The request was cancelled.")
        if failure is not None:
            self._outbox.deliver(request.id, Failed.of(failure))
        self._outbox.flush()

    def _prepared(self, request: Request) -> Callable[[], None]:
        """Everything that takes time; what is returned is quick. Raises `RequestError`."""
        deliver = functools.partial(self._outbox.deliver, request.id)
        if isinstance(request, GenerationRequest):
            return self._prepared_generation(request)
        if isinstance(request, PoolingRequest):
            return self._prepared_pooling(request)
        if isinstance(request, TokenizeRequest):
            tokens = self._model.tokenize(request.text, parse_special=request.is_special_parsed)
            pieces = tuple(map(self._model.piece, tokens))
            return functools.partial(deliver, Tokens(tokens=tuple(tokens), pieces=pieces))
        if isinstance(request, DetokenizeRequest):
            return functools.partial(deliver, Text(text=self._model.detokenize(request.tokens)))
        return functools.partial(deliver, Text(text=self._encoder.render(request.prompt)))

    def _prepared_generation(self, request: GenerationRequest) -> Callable[[], None]:
        context, runner = self._context, self._runner
        if context is None or not isinstance(runner, Scheduler):
            raise RequestError(f"{self._info.name!r} is a model for {self._info.kind}, and writes no text.", param="model")
        if request.adapter is not None and request.adapter not in self._settings.adapters:
            raise RequestError(f"{self._info.name!r} has no adapter {request.adapter!r}.", param="model")
        if isinstance(request.prompt, TokenPrompt):
            self._model.check_tokens(request.prompt.tokens, "prompt")
        context.check_sampling(request.sampling)
        grammar: CompiledGrammar | None = context.compile(request.grammar) if request.grammar is not None else None
        encoded = self._encoder.encode(request.prompt)
        deliver = functools.partial(self._outbox.deliver, request.id)
        prompt = (encoded.tokens, encoded.shared_tokens)
        return functools.partial(runner.submit, request, *prompt, grammar, deliver, encoded.opening, encoded.passages)

    def _prepared_pooling(self, request: PoolingRequest) -> Callable[[], None]:
        context, runner = self._pooling, self._runner
        wanted = "embedding" if request.query is None else "rerank"
        if context is None or not isinstance(runner, PoolingQueue) or self._settings.kind != wanted:
            said = f"{self._info.name!r} is a model for {self._info.kind}, not for {wanted}; name another."
            raise RequestError(said, param="model")
        query = request.query
        inputs: list[Sequence[int]] = []
        for each in request.inputs:
            if isinstance(each, str):
                inputs.append(context.encode(each) if query is None else context.encode_pair(query, each))
            else:
                self._model.check_tokens(each, "input")
                inputs.append(each)
        return functools.partial(runner.submit, request, inputs, functools.partial(self._outbox.deliver, request.id))

    def _record_cancelled(self, request: Request) -> None:
        if isinstance(request, GenerationRequest | PoolingRequest):
            seconds = time.monotonic() - request.arrived_at
            stats = RequestStats(
                id=request.id, outcome="cancelled", duration_seconds=seconds, queue_seconds=seconds, cancelled_in="queue"
            )
            self._outbox.record_request(stats)

    def _scheduler(self, context: Context, adapters: Mapping[str, str]) -> Scheduler:
        settings = self._settings
        store = None
        if settings.snapshot_folder is not None and settings.snapshot_bytes:
            identity = Identity(
                model_sha256=settings.sha256,
                template_sha256=self._model.template_sha256,
                kv_type=settings.kv_type,
                layout=f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}, flash attention",
                adapters=adapters,
            )
            store = SnapshotStore(Path(settings.snapshot_folder), settings.snapshot_bytes, identity)
        scheduler = Scheduler(
            context,
            settings=settings,
            listener=self._outbox,
            snapshots=store,
            flush=self._outbox.flush,
            weight_bytes=self._model.weight_bytes,
        )
        for number, prompt in enumerate(settings.system_prompts):
            scheduler.warm(self._prefix(number, prompt))
        self._documents = KeptDocuments(scheduler.documents, self._encoder.encode_document, store, settings.sha256)
        return scheduler

    def _prefix(self, number: int, system: str) -> Sequence[int]:
        """The tokens with which every conversation under this system prompt begins."""
        messages = ({"role": "system", "content": system}, {"role": "user", "content": "?"})
        try:
            encoded = self._encoder.encode(ChatPrompt(messages=messages))
        except RequestError as error:
            raise RecipeError(f"serve.system_prompts[{number}]: {error}") from error
        return encoded.tokens[: encoded.shared_tokens]

    def _describe(self, adapters: Mapping[str, str]) -> ModelInfo:
        settings, model, context = self._settings, self._model, self._context
        notes = settings.notes
        if settings.kind == "chat" and model.chat_template is None:
            notes += ("chat template: none in the file, so that this model can only continue text.",)
        return ModelInfo(
            name=settings.name,
            kind=settings.kind,
            sha256=settings.sha256,
            template_sha256=model.template_sha256,
            quantization=model.quantization,
            architecture=model.architecture,
            size_bytes=model.path.stat().st_size,
            context_tokens=context.context_tokens if context is not None else settings.context_tokens,
            slots=settings.slots,
            made_at=settings.made_at,
            adapters=dict(adapters),
            chat_template=model.chat_template or "",
            vocabulary_tokens=model.token_count,
            embedding_width=model.embedding_width,
            kv_cells=context.cells if context is not None else 0,
            kv_bytes_per_token=context.cell_bytes if context is not None else 0,
            weight_bytes=model.weight_bytes,
            threads_decode=settings.threads_decode,
            threads_prefill=settings.threads_prefill,
            gpu_layers=settings.gpu_layers,
            notes=notes,
        )


def _unexpected(error: Exception) -> EngineFailed:
    """Its message may hold a client's text, so only its type and place are logged."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("event=encoding_failed type=%s\n%s", type(error).__name__, where)
    return EngineFailed("The engine could not read this request; the server's log says where it failed.")


def _allow_moving(context: Context, settings: EngineSettings) -> None:
    """Says so where documents cannot be read by themselves, as they should be."""
    if settings.reread_tokens is None:
        return
    try:
        context.allow_moving()
    except SnapshotRefused as error:
        logger.warning("event=documents_read_in_their_place model=%s reason=%r", settings.name, str(error))


def _template(path: Path, model: Model) -> ChatTemplate:
    try:
        return ChatTemplate(model.chat_template or NO_TEMPLATE, model.special_tokens)
    except TemplateFailed as error:
        raise ModelFileError(f"{path}: {error}") from error
