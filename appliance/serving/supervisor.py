"""One model's engine as the server sees it: an `Engine` whose work is done by a child process that may die.

When the process dies, requests that had begun to answer fail with `EngineFailed`, those that had not with
`EngineRestarting`: their clients may ask again. Nothing is ever asked again from here, so that a request that kills the
engine kills it once. The process is started again at once, then with growing pauses for as long as it keeps dying. New
requests wait for it, as far as their deadline and the queue's bound allow. A process that hangs is killed: the watchdog
looks at the answers to its pings.
Knows nothing of HTTP; used from the event loop's thread only, but for `Generation.cancel`.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence

import msgspec

from appliance.errors import ApplianceError, EngineRestarting, QueueFull, RequestError, ShuttingDown
from appliance.serving import wire
from appliance.serving.engine import EngineListener, Generation
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import EngineState, Event, Failed, Load, ModelInfo, Pooled, RequestStats, Text, Tokens
from appliance.serving.in_hand import InHand
from appliance.serving.requests import (
    ChatPrompt,
    DetokenizeRequest,
    GenerationRequest,
    PoolingRequest,
    Request,
    TemplateRequest,
    TokenizeRequest,
)
from appliance.serving.worker_process import Death, WorkerDied, WorkerProcess, Workers

STABLE_SECONDS = 60.0  # a process that lived so long is started again at once when it dies
LONGEST_PAUSE_SECONDS = 60.0

logger = logging.getLogger("appliance.serving")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long what may take before the process counts as hung."""

    step_seconds: float = 120.0  # one decode call
    silence_seconds: float = 120.0  # no answer to a ping; a machine that swaps can be silent for long
    encode_seconds: float = 60.0  # template, tokenizer and grammar of one request
    load_seconds: float = 3600.0  # eight gigabytes from a disk that is busy otherwise
    ping_seconds: float = 1.0


class Supervisor:
    """An `Engine`. `start` loads the model; `close` ends the process."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        listener: EngineListener,
        patience: Patience | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._stats = listener.of_model(settings.name)
        self._patience = patience or Patience()
        self._workers = workers or Workers()
        self._in_hand = InHand()
        self._ids = itertools.count()
        self._worker: WorkerProcess | None = None
        self._model: ModelInfo | None = None
        self._task: asyncio.Task[None] | None = None
        self._state: EngineState = "loading"
        self._changed = asyncio.Event()  # replaced by a new one at each change of state
        self._waiting = 0  # requests, for the process to be back
        self._said: Load | None = None  # by the process, last
        self._silent_pings = 0
        self._early_deaths = 0  # in a row
        self._loading_since = self._ready_at = self._back_at = 0.0
        self._has_first_token = False
        self._documents: wire.Documents | None = None

    @property
    def model(self) -> ModelInfo:
        assert self._model is not None, "not started"
        return self._model

    @property
    def pid(self) -> int | None:
        """Of the process there is now."""
        return self._worker.pid if self._worker is not None else None

    async def start(self) -> None:
        """Loads the model. Raises `ModelFileError`, `EnvironmentIncomplete` or what else the worker says."""
        try:
            await self._start_worker()
        except WorkerDied as died:
            raise died.error(self._settings.model_path) from died
        self._task = asyncio.create_task(self._supervise(), name=f"supervisor of {self._settings.name}")

    async def submit(self, request: GenerationRequest) -> Generation:
        generation = Generation(request.n)
        loop = asyncio.get_running_loop()

        def cancel() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed, and the process with it
                loop.call_soon_threadsafe(self._cancel, request.id)

        generation.on_cancel(cancel)
        await self._ask(request, generation.deliver, request.deadline_at)
        try:
            return await generation.started()
        except asyncio.CancelledError:
            self._cancel(request.id)
            raise

    async def pool(self, request: PoolingRequest) -> Pooled:
        event = await self._answer(request, request.deadline_at)
        assert isinstance(event, Pooled), event
        return event

    async def tokenize(self, text: str, *, is_special_parsed: bool = False) -> Tokens:
        event = await self._answer(TokenizeRequest(id=self._id(), text=text, is_special_parsed=is_special_parsed))
        assert isinstance(event, Tokens), event
        return event

    async def detokenize(self, tokens: Sequence[int]) -> str:
        event = await self._answer(DetokenizeRequest(id=self._id(), tokens=tuple(tokens)))
        assert isinstance(event, Text), event
        return event.text

    async def apply_template(self, prompt: ChatPrompt) -> str:
        event = await self._answer(TemplateRequest(id=self._id(), prompt=prompt))
        assert isinstance(event, Text), event
        return event.text

    def load(self) -> Load:
        """As the process last told, and with the requests that it does not know of yet."""
        said = self._said
        if said is None or self._is_down or self._state == "stopped":
            said = Load(state=self._state, running=0, waiting=0, slots=self._settings.slots)
        waiting = max(said.waiting, len(self._in_hand) - said.running) + self._waiting
        return msgspec.structs.replace(said, state=self._state, waiting=waiting)

    def keep(self, documents: wire.Documents) -> None:
        """Follows what is in the operator's folder now; each process that is started later is told of it, too."""
        self._documents = documents
        if self._state in ("ready", "draining") and self._worker is not None:
            self._worker.send(documents)

    def drain(self, grace_seconds: float) -> None:
        """Refuses new requests; those in hand fail when the grace time is over."""
        if self._state == "ready" and self._worker is not None:
            self._worker.send(wire.Drain(grace_seconds=grace_seconds))
        if self._state != "stopped":
            self._become("draining")

    async def close(self) -> None:
        """Ends the process; what is left fails."""
        self._become("stopped")
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail_in_hand("was ended because the server shuts down")
        if self._worker is not None:
            await self._worker.end()

    async def _answer(self, request: Request, deadline_at: float | None = None) -> Event:
        """The event of a request that has only one."""
        answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

        def deliver(event: Event) -> None:
            if not answer.done():
                answer.set_result(event)

        await self._ask(request, deliver, deadline_at)
        try:
            event = await answer
        except asyncio.CancelledError:
            self._cancel(request.id)
            raise
        if isinstance(event, Failed):
            raise event.error()
        return event

    async def _ask(self, request: Request, deliver: Callable[[Event], None], deadline_at: float | None) -> None:
        """Hands a request to the process once there is one. Raises what `Engine.submit` says."""
        while (worker := self._worker) is None or self._state != "ready":
            await self._wait_for_worker(deadline_at)
        self._require_place()
        if request.id in self._in_hand:
            raise RequestError(f"A request with the id {request.id!r} is being answered; choose another id.")
        try:
            worker.send(request)
        except wire.FrameBroken as error:
            raise RequestError(f"The request cannot be handed to the engine: {error}.") from error
        self._in_hand.add(request, deliver)

    async def _wait_for_worker(self, deadline_at: float | None) -> None:
        if self._state in ("draining", "stopped"):
            raise ShuttingDown("The engine is shutting down and takes no new request.", retry_after_seconds=1)
        left = None if deadline_at is None else deadline_at - time.monotonic()
        is_too_late = left is not None and left < self._back_at - time.monotonic()
        if self._state == "failed" or is_too_late or self._waiting >= self._settings.queue_requests:
            raise self._restarting()
        self._waiting += 1
        try:
            async with asyncio.timeout(left):
                await self._changed.wait()
        except TimeoutError:
            raise self._restarting() from None
        finally:
            self._waiting -= 1

    def _restarting(self) -> EngineRestarting:
        message = f"The engine's process has died and is being started again; try again in {self._retry_seconds} s."
        return EngineRestarting(message, retry_after_seconds=self._retry_seconds)

    def _require_place(self) -> None:
        """The process bounds its queue; this bounds what it has not looked at yet."""
        limit = self._settings.slots + self._settings.queue_requests
        if (unread := self._in_hand.unread) >= limit:
            message = f"{unread} requests wait to be read; the limit is {limit}. Try again in {self._retry_seconds} s."
            raise QueueFull(message, retry_after_seconds=self._retry_seconds)

    @property
    def _retry_seconds(self) -> int:
        return max(1, math.ceil(self._back_at - time.monotonic()))

    def _cancel(self, request_id: str) -> None:
        if self._in_hand.cancel(request_id) and self._worker is not None:
            self._worker.send(wire.Cancel(id=request_id))

    def _id(self) -> str:
        return f"engine-{next(self._ids)}"

    async def _supervise(self) -> None:
        """Takes what the process says until it dies, and starts the next one; ends when no other is wanted."""
        while self._state == "ready" and self._worker is not None:
            self._bury(await self._serve(self._worker))
            while self._is_down:
                await self._try_again()

    @property
    def _is_down(self) -> bool:
        return self._state in ("restarting", "failed")

    async def _serve(self, worker: WorkerProcess) -> Death:
        watchdog = asyncio.create_task(self._watch(worker))
        try:
            await worker.listen(lambda message: self._take(message, worker))
        finally:
            watchdog.cancel()
        self._become("restarting" if self._state == "ready" else self._state)
        return await worker.death()

    async def _try_again(self) -> None:
        """Starts the process again, at once the first time, then after growing pauses."""
        pause = 0.0 if self._early_deaths < 2 else min(2.0 ** (self._early_deaths - 2), LONGEST_PAUSE_SECONDS)
        load_seconds = self._model.load_seconds if self._model is not None else 0.0
        self._back_at = time.monotonic() + pause + load_seconds
        await asyncio.sleep(pause)
        try:
            await self._start_worker()
        except WorkerDied as died:
            self._become("failed")
            self._bury(died.death)
        except ApplianceError as error:
            self._become("failed")
            self._early_deaths += 1
            logger.error("event=engine_not_started model=%s reason=%s", self._settings.name, error)

    async def _start_worker(self) -> None:
        """Starts a process and waits until it has loaded the model. Raises `WorkerDied`, or what it says is wrong."""
        self._loading_since = time.monotonic()
        worker = self._worker = await self._workers.start(self._settings)
        try:
            async with asyncio.timeout(self._patience.load_seconds):
                first = await worker.message()
        except TimeoutError:
            worker.kill(f"did not load its model within {self._patience.load_seconds:.0f} s")
            first = None
        except asyncio.CancelledError:
            worker.kill("was not wanted any more")
            await worker.death()
            raise
        if isinstance(first, wire.LoadRefused):
            await worker.end()
            raise first.error()
        if not isinstance(first, wire.Ready):
            raise WorkerDied(await worker.death())
        self._ready_at = time.monotonic()
        seconds = self._ready_at - self._loading_since
        self._model = msgspec.structs.replace(first.model, load_seconds=seconds)
        self._said, self._silent_pings, self._has_first_token = None, 0, False
        self._listener.record_load(self._model, seconds)
        if self._documents is not None:
            worker.send(self._documents)
        self._become("ready" if self._state in ("loading", "restarting", "failed") else self._state)

    def _bury(self, death: Death) -> None:
        """Counts the death, and tells those whose requests died with it."""
        lived = time.monotonic() - self._ready_at
        self._early_deaths = 1 if lived > STABLE_SECONDS else self._early_deaths + 1
        if self._model is not None:
            self._back_at = time.monotonic() + self._model.load_seconds
        logger.error("event=engine_died model=%s reason=%s story=%s", self._settings.name, death.reason, death.story)
        self._listener.record_restart(self._settings.name, death.reason)
        self._fail_in_hand(death.story)

    def _fail_in_hand(self, story: str) -> None:
        for stats in self._in_hand.fail(story, self._retry_seconds):
            self._record(stats)

    def _take(self, message: wire.FromWorker, worker: WorkerProcess) -> None:
        if isinstance(message, wire.Report):
            self._said = message.load or self._said
            for request_id, event in message.events:
                self._in_hand.pass_on(request_id, event)
            for step in message.steps:
                self._stats.record_step(step)
                self._notice_first_token(step.generated_tokens)
            for stats in message.requests:
                self._record(stats)
        elif isinstance(message, wire.Pong):
            self._said = message.load
            self._silent_pings = 0
            self._judge(message, worker)

    def _record(self, stats: RequestStats) -> None:
        self._stats.record_request(stats)
        logger.info(
            "event=answered request=%s model=%s outcome=%s code=%s seconds=%.3f queue_seconds=%.3f prefill_seconds=%s "
            "decode_seconds=%s prompt_tokens=%d cached_tokens=%d generated_tokens=%d",
            *(stats.id, self._settings.name, stats.outcome, stats.failure_code, stats.duration_seconds),
            *(stats.queue_seconds, stats.prefill_seconds, stats.decode_seconds),
            *(stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens),
        )

    def _notice_first_token(self, tokens: int) -> None:
        if tokens and not self._has_first_token:
            self._has_first_token = True
            self._listener.record_first_token_after_load(self._settings.name, time.monotonic() - self._loading_since)

    async def _watch(self, worker: WorkerProcess) -> None:
        """Pings; kills a process that gives no sign of life."""
        while True:
            worker.send(wire.Ping())
            await asyncio.sleep(self._patience.ping_seconds)
            self._silent_pings += 1  # pings are counted, not seconds: this process may have been stopped itself
            if (silence := self._silent_pings * self._patience.ping_seconds) > self._patience.silence_seconds:
                worker.kill(f"gave no sign of life for {silence:.0f} s")
                return

    def _judge(self, pong: wire.Pong, worker: WorkerProcess) -> None:
        """Kills a process in which something does not return."""
        step, limit = pong.load.step_started_at, self._patience.step_seconds
        if step is not None and pong.at - step > limit:
            worker.kill(f"computed one step for more than {limit:.0f} s")
        limit = self._patience.encode_seconds
        if pong.encoding_since is not None and pong.at - pong.encoding_since > limit:
            worker.kill(f"was busy with the template, tokens or grammar of one request for more than {limit:.0f} s")

    def _become(self, state: EngineState) -> None:
        self._state = state
        self._changed.set()
        self._changed = asyncio.Event()
