"""The models of a server: the default one, loaded from start to end, and others that are loaded while they are wanted.

A model in use is never unloaded. One that is not makes room after some idle time, or at once for a model that is asked for
(the least recently used first; the default one never). When another model is promoted it is loaded beside the default one
and takes its place, and the old one ends with its last request. Where memory does not allow for both, requests wait until
those in hand are done and the new model is loaded. A promoted model that cannot be loaded changes nothing.

Knows nothing of HTTP; used from the event loop's thread only.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from appliance import gpu
from appliance.errors import (
    ApplianceError,
    EngineFailed,
    EngineRestarting,
    EnvironmentIncomplete,
    NoMemoryForModel,
    ShuttingDown,
)
from appliance.recipe import Serve
from appliance.serving import probe, wire
from appliance.serving.engine import EngineLease, EngineListener, ModelCard, no_such_model
from appliance.serving.events import EngineState, Load, ModelKind, together
from appliance.serving.memory_plan import Plan
from appliance.serving.memory_prediction import MemoryPrediction
from appliance.serving.place import Place
from appliance.serving.served_model import ServedModel
from appliance.serving.supervisor import Patience, Supervisor
from appliance.serving.worker_process import Workers

TICK_SECONDS = 1.0  # between looks at what is promoted and what is idle
BUSY_RETRY_SECONDS = 10

logger = logging.getLogger("appliance.serving")


class Plans(Protocol):
    """Decides how a model is loaded. Raises `EnvironmentIncomplete` when it does not fit."""

    def plan(
        self, model: ServedModel, serve: Serve, others: Sequence[MemoryPrediction], freed: MemoryPrediction | None = None
    ) -> Plan: ...


class Promotion(Protocol):
    """What is promoted: `mark` is cheap and changes with each promotion; `find` checks the files, in a thread."""

    def mark(self) -> object: ...

    def find(self) -> tuple[ServedModel, Serve]: ...


class ModelPool:
    """Implements `Models`. `start` loads the default model, the first of `served`."""

    def __init__(
        self,
        served: Sequence[tuple[ServedModel, Serve]],
        *,
        plans: Plans,
        listener: EngineListener,
        promotion: Promotion | None = None,
        on_planned: Callable[[Plan], None] = lambda plan: None,  # noqa: ARG005
        probe: Callable[[Path, Path | None], object] = probe.check,
        workers: Workers | None = None,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        """Without a `promotion` the default model stays what it is."""
        places = [Place(model, serve) for model, serve in served]
        self._default, self._others = places[0], places[1:]
        self._former_names: set[str] = set()  # of default models: their clients go on with the one promoted since
        self._leaving: set[Place] = set()
        self._plans = plans
        self._listener = listener
        self._promotion = promotion
        self._mark = promotion.mark() if promotion is not None else None
        self._on_planned = on_planned
        self._probe = probe
        self._workers = workers or Workers()
        self._tick_seconds = tick_seconds
        self._lock = asyncio.Lock()  # one model is loaded or unloaded at a time
        self._changed = asyncio.Event()  # replaced by a new one at each change
        self._waiting = 0
        self._gpus = contextlib.ExitStack()  # leases of the cards, once a model uses one
        self._has_gpus = False
        self._documents: wire.Documents | None = None
        self._is_draining = self._is_closed = False
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Raises `ModelFileError`, `EnvironmentIncomplete`, ... when the default model cannot be loaded."""
        async with self._lock:
            await self._load(self._default)
        self._spawn(self._tend())

    def cards(self) -> Sequence[ModelCard]:
        return [card for place in (self._default, *self._others) for card in place.cards()]

    def processes(self) -> Mapping[str, int]:
        """Process ids: "api" is this one, the others go by the name of their model."""
        engines = {place.model.name: place.engine.pid for place in self._loaded() if place.engine is not None}
        return {"api": os.getpid(), **{name: pid for name, pid in engines.items() if pid is not None}}

    @contextlib.asynccontextmanager
    async def lease(self, name: str | None, kind: ModelKind = "chat") -> AsyncIterator[EngineLease]:
        place, adapter = await self._ready_place(name, kind)
        assert place.engine is not None
        place.leases += 1
        try:
            yield EngineLease(engine=place.engine, name=place.full_name(adapter), adapter=adapter)
        finally:
            place.leases -= 1
            place.used_at = time.monotonic()
            self._tell()

    @property
    def document_folder(self) -> Path | None:
        """The default model's."""
        return self._default.serve.document_folder

    def keep(self, documents: wire.Documents) -> None:
        """Tells every engine what is in the operator's folder now; the default model's reads it ahead."""
        self._documents = documents
        for place in self._loaded():
            self._tell_documents(place)

    def _tell_documents(self, place: Place) -> None:
        if self._documents is not None and place.engine is not None and place.model.kind == "chat":
            is_default = place not in self._others
            place.engine.keep(msgspec.structs.replace(self._documents, is_read_ahead=is_default))

    def load(self) -> Load:
        default = self._default.engine
        return together(
            [engine.load() for engine in self._engines()],
            state=self._state(),
            waiting=self._waiting,
            documents=None if default is None else default.load().documents,
        )

    def drain(self, grace_seconds: float) -> None:
        self._is_draining = True
        for engine in self._engines():
            engine.drain(grace_seconds)
        self._tell()

    async def close(self) -> None:
        self._is_draining = self._is_closed = True
        self._tell()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in self._engines()))
        self._gpus.close()

    def _state(self) -> EngineState:
        if self._is_draining:
            return "stopped" if self._is_closed else "draining"
        if self._default.engine is None:
            return "loading" if self._lock.locked() else "failed"
        return "restarting" if self._default.is_leaving else self._default.engine.load().state

    def _engines(self) -> list[Supervisor]:
        places = (self._default, *self._others, *self._leaving)
        return [place.engine for place in places if place.engine is not None]

    def _find(self, name: str | None, kind: ModelKind) -> tuple[Place, str | None]:
        """The place that `model` or `model:adapter` names, and the adapter. Raises `ModelNotFound`."""
        places = (self._default, *self._others)
        if name is None:
            return next((place for place in places if place.model.kind == kind), self._default), None
        base, _, adapter = name.rpartition(":")
        for place in places:
            names = {place.model.name, *(self._former_names if place is self._default else ())}
            if name in names:
                return place, None
            if base in names and adapter in place.model.adapters:
                return place, adapter
        raise no_such_model(self.cards())

    async def _ready_place(self, name: str | None, kind: ModelKind) -> tuple[Place, str | None]:
        """A place whose model is loaded and stays so until the caller's next `await`."""
        while True:
            if self._is_draining:
                raise ShuttingDown("The server is shutting down and takes no new request.", retry_after_seconds=1)
            place, adapter = self._find(name, kind)
            if place.engine is not None and not place.is_leaving:
                return place, adapter
            await self._wait_for(place)

    async def _wait_for(self, place: Place) -> None:
        """Waits until something has changed about a place; bounded like the queue of an engine."""
        limit = place.serve.slots + place.serve.queue_requests
        if self._waiting >= limit:
            message = f"{self._waiting} requests wait for a model to be loaded; the limit is {limit}. Try again in a while."
            raise EngineRestarting(message, retry_after_seconds=BUSY_RETRY_SECONDS)
        self._waiting += 1
        try:
            async with asyncio.timeout(place.serve.deadline_seconds):
                if place.is_leaving:
                    await self._changed.wait()
                else:
                    await asyncio.shield(self._loading(place))  # it goes on when this client goes away
        except TimeoutError:
            seconds = place.serve.deadline_seconds
            message = f"The model was not loaded within {seconds:.0f} s; try again later."
            raise EngineRestarting(message, retry_after_seconds=BUSY_RETRY_SECONDS) from None
        finally:
            self._waiting -= 1

    def _loading(self, place: Place) -> asyncio.Task[None]:
        if place.loading is None or place.loading.done():
            place.loading = self._spawn(self._load_on_demand(place))
        return place.loading

    async def _load_on_demand(self, place: Place) -> None:
        name = place.model.name
        async with self._lock:
            if place.engine is not None:
                return
            try:
                await self._load(place)
            except EnvironmentIncomplete as error:
                logger.error("event=model_not_loaded model=%s reason=%s", name, error)
                message = f"There is no memory for {name!r} beside the models that are loaded; the log has the numbers."
                raise NoMemoryForModel(message, retry_after_seconds=BUSY_RETRY_SECONDS) from error
            except ApplianceError as error:
                logger.error("event=model_not_loaded model=%s reason=%s", name, error)
                raise EngineFailed(f"{name!r} cannot be loaded; the server's log says why.") from error

    async def _load(self, place: Place) -> None:
        """Makes room if need be and loads the model of a place; the caller holds the lock."""
        if not place.is_probed:
            await asyncio.to_thread(self._probe_all, place.model)
            place.is_probed = True
        while True:
            try:
                plan = await self._plan(place, [each.memory for each in self._loaded()])
                break
            except EnvironmentIncomplete:
                idle = [each for each in self._others if each.engine is not None and not each.leases]
                if not idle:
                    raise
                await self._end(min(idle, key=lambda each: each.used_at))
        await self._start_engine(place, plan)

    async def _plan(
        self, place: Place, others: Sequence[MemoryPrediction | None], freed: MemoryPrediction | None = None
    ) -> Plan:
        staying = [memory for memory in others if memory is not None]
        return await asyncio.to_thread(self._plans.plan, place.model, place.serve, staying, freed)

    def _loaded(self) -> list[Place]:
        return [each for each in (self._default, *self._others, *self._leaving) if each.engine is not None]

    async def _start_engine(self, place: Place, plan: Plan) -> None:
        if plan.settings.gpu_layers and not self._has_gpus:
            for each in gpu.computing():
                self._gpus.enter_context(gpu.lease(each.vendor, each.index, "serving"))
            self._has_gpus = True
        self._on_planned(plan)
        seconds = place.serve.watchdog_seconds
        patience = Patience(step_seconds=seconds, silence_seconds=seconds)
        engine = Supervisor(plan.settings, listener=self._listener, patience=patience, workers=self._workers)
        await engine.start()
        place.engine, place.memory, place.used_at = engine, plan.memory, time.monotonic()
        self._tell_documents(place)
        self._tell()

    async def _end(self, place: Place) -> None:
        """Ends the process of a place that nobody uses."""
        assert place.engine is not None
        assert not place.leases
        place.is_leaving = True
        await place.engine.close()
        place.engine = place.memory = None
        place.is_leaving = False
        if all(each.model.name != place.model.name for each in self._loaded()):
            self._listener.record_unload(place.model.name)
        self._tell()

    async def _tend(self) -> None:
        """Looks after idle models and promotions until it is cancelled."""
        while True:
            await asyncio.sleep(self._tick_seconds)
            try:
                await self._end_idle()
                await self._follow_promotion()
            except Exception:
                logger.exception("event=tending_failed")  # the next round tries again

    async def _end_idle(self) -> None:
        for place in self._others:
            idle_seconds = place.serve.idle_seconds
            async with self._lock:
                is_unused = place.engine is not None and not place.leases
                if idle_seconds and is_unused and time.monotonic() - place.used_at > idle_seconds:
                    await self._end(place)

    async def _follow_promotion(self) -> None:
        if self._promotion is None or (mark := self._promotion.mark()) in (self._mark, None):
            return
        self._mark = mark
        try:
            model, serve = await asyncio.to_thread(self._promotion.find)
            if (model, serve) != (self._default.model, self._default.serve):
                async with self._lock:
                    await self._replace_default(Place(model, serve))
        except ApplianceError as error:
            logger.error("event=promotion_refused still_serving=%s reason=%s", self._default.model.name, error)

    async def _replace_default(self, new: Place) -> None:
        """Loads the new default model beside the old one, or after it; raises what kept it from being loaded."""
        old = self._default
        if (plan := await self._plan_beside(new, old)) is not None:
            try:
                await self._start_engine(new, plan)
            except EnvironmentIncomplete as error:
                logger.warning("event=no_room_beside model=%s reason=%s", new.model.name, error)
            else:
                self._take_over(new)
                self._leaving.add(old)
                self._spawn(self._retire(old))
                return
        await self._replace_in_turn(new, old)

    async def _plan_beside(self, new: Place, old: Place) -> Plan | None:
        """None when the new model would be stepped down only because the old one is still there."""
        others = [each.memory for each in self._loaded() if each is not old]
        alone = await self._plan(new, others, old.memory)
        try:
            beside = await self._plan(new, [*others, old.memory])
        except EnvironmentIncomplete:
            return None
        is_same = msgspec.structs.replace(beside.settings, notes=()) == msgspec.structs.replace(alone.settings, notes=())
        return beside if is_same else None

    async def _replace_in_turn(self, new: Place, old: Place) -> None:
        """Requests that come meanwhile wait in `lease`."""
        logger.warning("event=replacing_in_turn old=%s new=%s", old.model.name, new.model.name)
        old.is_leaving = True
        try:
            await self._until(lambda: old.leases == 0)
            if old.engine is not None:
                await self._end(old)
            old.is_leaving = True
            try:
                await self._load(new)
            except ApplianceError:
                await self._load(old)
                raise
            self._take_over(new)
        finally:
            old.is_leaving = False
            self._tell()

    def _take_over(self, new: Place) -> None:
        self._former_names.add(self._default.model.name)
        self._default = new
        logger.warning("event=model_replaced model=%s sha256=%s", new.model.name, new.model.sha256[:12])
        self._tell()

    async def _retire(self, old: Place) -> None:
        await self._until(lambda: old.leases == 0)
        await self._end(old)
        self._leaving.discard(old)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _probe_all(self, model: ServedModel) -> None:
        """Tries what nobody vouches for in a process that may crash. Raises `ModelFileError`."""
        if model.is_foreign:
            self._probe(model.path, None)
        for path in model.foreign_adapters:
            self._probe(path, model.path)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, ApplianceError):
            logger.error("event=task_failed", exc_info=error)
