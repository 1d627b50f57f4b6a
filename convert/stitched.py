"""Questions over documents, answered as serving answers them: with the documents in their place, or each read by itself.

The scheduler itself does the reading: a second implementation could be right where the one that serves is wrong. With
`fitting` the only module of `convert` that knows serving.
"""

import contextlib
import itertools
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from appliance import device
from appliance.errors import ModelFileError, PromptTooLong, RequestError
from appliance.serving import gguf_file
from appliance.serving.decoder import Feed, Sampled, SnapshotRefused
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import Event, Failed, Finished, RequestStats, StepStats
from appliance.serving.llama import Context, Model
from appliance.serving.memory_prediction import repackable_bytes
from appliance.serving.prompt import PromptEncoder
from appliance.serving.requests import ChatPrompt, Document, GenerationRequest
from appliance.serving.sampling import Logits
from appliance.serving.scheduler import Scheduler
from appliance.text.chat_template import ChatTemplate, TemplateFailed

MOST_SECONDS = 3600.0  # for one token: a scheduler that has died says nothing
KEPT_CONTEXTS = 2  # of prefixes: a question's documents, and one put together from them


class CannotRead(Exception):
    """Documents cannot be read by themselves with this model; the text says why."""


@dataclass(frozen=True, slots=True)
class Question:
    """`messages` end with what is asked; each document has an `id` and a `text`."""

    messages: Sequence[dict[str, str]]
    documents: Sequence[dict[str, str]]

    @property
    def prompt(self) -> ChatPrompt:
        documents = tuple(Document(id=each["id"], text=each["text"]) for each in self.documents)
        return ChatPrompt(messages=tuple(self.messages), documents=documents)


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids with the one that ended it, and the logits `(tokens, vocabulary)` by which each was chosen."""

    tokens: Sequence[int]
    logits: Any
    text: str


class Reader:
    """A model file, and the questions that fit into `context_tokens` with `answer_tokens` more. A context manager.

    Raises `ModelFileError` for a file that cannot be loaded, `CannotRead` where its documents can only stand in their place.
    """

    def __init__(self, path: Path, context_tokens: int, answer_tokens: int) -> None:
        is_repacked = repackable_bytes(gguf_file.check(path), device.machine().cpu_features) > 0  # as serving would
        self._model = Model(path, is_mapped=True, is_repacked=is_repacked)
        with contextlib.ExitStack() as stack:
            stack.callback(self._model.close)
            self._answer_tokens = answer_tokens
            limit = min(context_tokens, self._model.trained_context_tokens or context_tokens)
            try:
                template = ChatTemplate(self._model.chat_template or "", self._model.special_tokens)
            except TemplateFailed as error:
                raise ModelFileError(f"{path}: {error}") from error
            self._encoder = PromptEncoder(self._model, template, limit - answer_tokens)
            settings = _settings(path, limit, is_repacked=is_repacked)
            self._context = _Followed(self._model, settings)
            stack.pop_all()
            stack.callback(self._context.close)  # and the model with it
            try:
                self._context.allow_moving()
            except SnapshotRefused as error:
                raise CannotRead(str(error)) from error
            self._scheduler = Scheduler(self._context, settings=settings, listener=_Unheard())
            stack.pop_all()  # it closes the context
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._scheduler.close()

    def fits(self, question: Question) -> bool:
        """Whether there is room for it and its answer. Raises `CannotRead` where the template has no place for it."""
        try:
            self._encoder.encode(question.prompt)
        except PromptTooLong:
            return False
        except RequestError as error:
            raise CannotRead(str(error)) from error
        return True

    def answer(self, question: Question, reread_tokens: int | None, along: Sequence[int] | None = None) -> Answer:
        """The likeliest answer, or what stands at each place of another answer, `along` which it is made to go.

        The first `reread_tokens` of each document are read where they stand, the rest by itself; None: all in its place.
        Raises `CannotRead` where the scheduler found that it could not put the prompt together.
        """
        encoded = self._encoder.encode(question.prompt)
        self._scheduler.read_documents(reread_tokens)
        self._context.follow(along)
        events: queue.Queue[Event] = queue.Queue()
        request = GenerationRequest(
            id=f"proof-{next(self._numbers)}",
            prompt=question.prompt,
            arrived_at=time.monotonic(),
            max_tokens=self._answer_tokens if along is None else len(along),
        )
        self._scheduler.submit(
            request, encoded.tokens, encoded.shared_tokens, None, events.put, encoded.opening, encoded.passages
        )
        finished = _last(events)
        if (finished.documents == "stitched") != (reread_tokens is not None):
            raise CannotRead("a prompt could not be put together from its documents; the log has the reason")
        tokens, logits = self._context.followed()
        text = b"".join(map(self._model.piece, tokens)).decode(errors="replace")
        return Answer(tokens, logits, text.strip())


class _Followed(Context):
    """Keeps the logits of an answer, which may be made to go along another one."""

    _along: Sequence[int] | None = None

    def follow(self, along: Sequence[int] | None) -> None:
        """From now on, until the answer has ended; nothing is being answered."""
        self._along = along
        self._told: list[tuple[int, Logits]] = []

    def followed(self) -> tuple[Sequence[int], Any]:
        import numpy

        return [token for token, _ in self._told], numpy.stack([row for _, row in self._told])

    def sample(self, feed: Feed, logits: Sequence[Logits]) -> Sequence[Sampled]:
        row = logits[0].copy()  # the sampler may change it
        told = super().sample(feed, logits)[0]
        if self._along is not None:
            told = Sampled(self._along[len(self._told)])
        self._told.append((told.token, row))
        return [told]


class _Unheard:
    def record_step(self, stats: StepStats) -> None: ...

    def record_request(self, stats: RequestStats) -> None: ...


def _settings(path: Path, context_tokens: int, *, is_repacked: bool) -> EngineSettings:
    return EngineSettings(
        name=path.stem,
        model_path=str(path),
        sha256="",
        made_at=0,
        kind="chat",
        slots=1,
        context_tokens=context_tokens,
        cache_tokens=KEPT_CONTEXTS * context_tokens,
        threads_decode=device.physical_cores(),
        threads_prefill=device.usable_cores(),
        kv_type="f16",
        is_mapped=True,
        is_repacked=is_repacked,
        queue_requests=1,
        queue_tokens=context_tokens,
        reread_tokens=0,
        is_speculating=False,  # a guess would be sampled beside others
    )


def _last(events: "queue.Queue[Event]") -> Finished:
    while True:
        event = events.get(timeout=MOST_SECONDS)
        if isinstance(event, Failed):
            raise ModelFileError(f"A question could not be answered: {event.message}")
        if isinstance(event, Finished):
            return event
