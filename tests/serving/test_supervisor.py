"""The supervisor and a real child process, whose engine is a stand-in that does what its prompts say."""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import (
    EngineFailed,
    EngineRestarting,
    EnvironmentIncomplete,
    ModelFileError,
    QueueFull,
    RequestError,
    ShuttingDown,
)
from appliance.serving import wire, worker_process
from appliance.serving.engine import Generation
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import Finished, Load, ModelInfo, RequestStats, StepStats, TextPiece
from appliance.serving.requests import ChatPrompt, GenerationRequest, PoolingRequest, TextPrompt
from appliance.serving.supervisor import Patience, Supervisor
from appliance.serving.worker_process import Workers

COMMAND = (sys.executable, "-m", "tests.serving.stand_in_worker")
QUICK = Patience(step_seconds=0.2, silence_seconds=0.4, encode_seconds=0.2, ping_seconds=0.05)
WAIT_SECONDS = 20.0
NUMBERS = itertools.count()


class Listener:
    """An `EngineListener` that remembers; it is its own `StatsListener`."""

    def __init__(self) -> None:
        self.restarts: list[str] = []
        self.loads: list[str] = []
        self.first_tokens = 0
        self.steps: list[StepStats] = []
        self.requests: list[RequestStats] = []

    def of_model(self, name: str) -> "Listener":  # noqa: ARG002
        return self

    def record_load(self, model: ModelInfo, seconds: float) -> None:
        assert seconds > 0
        self.loads.append(model.name)

    def record_first_token_after_load(self, name: str, seconds: float) -> None:  # noqa: ARG002
        self.first_tokens += 1

    def record_unload(self, name: str) -> None: ...

    def record_restart(self, name: str, reason: str) -> None:  # noqa: ARG002
        self.restarts.append(reason)

    def record_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def record_request(self, stats: RequestStats) -> None:
        self.requests.append(stats)


def settings(name: str = "tiny", **fields: Any) -> EngineSettings:
    plain: dict[str, Any] = {
        "name": name,
        "model_path": "/models/tiny.gguf",
        "sha256": "0" * 64,
        "made_at": 0,
        "kind": "chat",
        "slots": 2,
        "context_tokens": 64,
        "threads_decode": 1,
        "threads_prefill": 1,
        "kv_type": "f16",
        "is_mapped": True,
        "is_repacked": False,
        "queue_requests": 3,
        "queue_tokens": 1000,
    }
    return EngineSettings(**{**plain, **fields})


@contextlib.asynccontextmanager
async def supervised(
    name: str = "tiny", patience: Patience = QUICK, **fields: Any
) -> AsyncIterator[tuple[Supervisor, Listener]]:
    listener = Listener()
    engine = Supervisor(settings(name, **fields), listener=listener, patience=patience, workers=Workers(COMMAND))
    await engine.start()
    try:
        yield engine, listener
    finally:
        await engine.close()


def ask(text: str, **fields: Any) -> GenerationRequest:
    now = time.monotonic()
    return GenerationRequest(
        id=f"request-{next(NUMBERS)}", prompt=TextPrompt(text=text), arrived_at=now, max_tokens=9, **fields
    )


async def text_of(generation: Generation) -> str:
    return "".join([event.text async for event in generation if isinstance(event, TextPiece)])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an async test to its end, and sees that it leaves no task behind."""

    def run(**fixtures: Any) -> None:
        async def main() -> None:
            async with asyncio.timeout(WAIT_SECONDS):
                await test(**fixtures)
            await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.__signature__ = __import__("inspect").signature(test)  # type: ignore[attr-defined]
    return run


@in_loop
async def test_answers_of_every_kind() -> None:
    async with supervised() as (engine, listener):
        generation = await engine.submit(ask("count 3"))
        assert generation.accepted.prompt_tokens == 3
        assert await text_of(generation) == "1 2 3 "
        assert (await engine.tokenize("añ")).pieces == (b"a", b"\xc3", b"\xb1")
        assert await engine.detokenize([104, 105]) == "hi"
        assert await engine.apply_template(ChatPrompt(messages=({"role": "user", "content": "x"},))) == "x"
        pooled = await engine.pool(PoolingRequest(id="p", inputs=("a", "bcd"), arrived_at=0.0))
        assert pooled.scores == (1.0, 3.0)
        assert engine.model.load_seconds > 0
        assert (listener.loads, listener.first_tokens, len(listener.steps)) == (["tiny"], 1, 1)


@in_loop
async def test_several_answers_to_one_prompt() -> None:
    async with supervised() as (engine, _):
        events = [event async for event in await engine.submit(ask("count 1", n=3))]
        assert [event.index for event in events if isinstance(event, Finished)] == [0, 1, 2]


@in_loop
async def test_cancel_reaches_the_process() -> None:
    async with supervised() as (engine, _):
        generation = await engine.submit(ask("rest"))
        await until(lambda: engine.load().running == 1)
        generation.cancel()
        generation.cancel()
        assert [event.reason async for event in generation if isinstance(event, Finished)] == ["cancelled"]
        await until(lambda: engine.load() == Load(state="ready", running=0, waiting=0, slots=2))


@in_loop
async def test_a_task_that_is_cancelled_while_it_submits_takes_its_request_along() -> None:
    async with supervised() as (engine, _):
        task = asyncio.create_task(engine.submit(ask("rest")))
        while not engine.load().waiting:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.load().running + engine.load().waiting == 0)


@in_loop
async def test_a_death_in_an_answer_costs_the_requests_in_flight_only() -> None:
    """With text: failed for good. Without: may be asked again. What comes afterwards waits and is answered."""
    async with supervised() as (engine, listener):
        resting = await engine.submit(ask("rest"))
        deadly = await engine.submit(ask("SIGKILL-after-text"))
        with pytest.raises(EngineFailed, match="SIGKILL"):
            await text_of(deadly)
        assert engine.load().state == "restarting"
        assert await text_of(await engine.submit(ask("count 2"))) == "1 2 "
        with pytest.raises(EngineRestarting) as refused:
            await text_of(resting)
        assert refused.value.retry_after_seconds >= 1
        assert listener.restarts == ["signal"]
        assert [each.failure_code for each in listener.requests] == ["engine_restarting", "engine_failed"]
        assert listener.loads == ["tiny", "tiny"]
        assert listener.first_tokens == 1


@in_loop
async def test_nothing_is_asked_twice() -> None:
    async with supervised() as (engine, listener):
        with pytest.raises(EngineRestarting):
            await text_of(await engine.submit(ask("SIGKILL")))
        await until(lambda: engine.load().state == "ready")
        assert await text_of(await engine.submit(ask("count 1"))) == "1 "
        assert listener.restarts == ["signal"]


@pytest.mark.parametrize("prompt", ["stuck-step", "stuck-encoding", "SIGSTOP"])
def test_a_process_that_hangs_is_replaced(prompt: str) -> None:
    @in_loop
    async def scenario() -> None:
        async with supervised() as (engine, listener):
            first = engine.pid
            assert first is not None
            if prompt == "SIGSTOP":
                os.kill(first, signal.SIGSTOP)
            with pytest.raises(EngineRestarting):
                await text_of(await engine.submit(ask(prompt)))
            assert await text_of(await engine.submit(ask("count 1"))) == "1 "
            assert listener.restarts == ["hang"]
            assert engine.pid != first

    scenario()


@in_loop
async def test_nonsense_from_the_process_ends_it() -> None:
    async with supervised() as (engine, listener):
        with pytest.raises(EngineRestarting):
            await engine.submit(ask("nonsense"))
        assert listener.restarts == ["hang"]


@in_loop
async def test_an_engine_that_cannot_come_back_says_so_and_keeps_trying(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    async with supervised("once-well", model_path=str(starts)) as (engine, listener):
        with pytest.raises(EngineRestarting):
            await text_of(await engine.submit(ask("SIGKILL")))
        await until(lambda: engine.load().state == "failed")
        with pytest.raises(EngineRestarting):
            await engine.submit(ask("count 1"))
        await until(lambda: len(listener.restarts) >= 2)
        starts.write_text("")  # now it is mended
        await until(lambda: engine.load().state == "ready")
        assert await text_of(await engine.submit(ask("count 1"))) == "1 "


@in_loop
async def test_who_waits_for_a_restart_is_bounded_by_queue_and_deadline() -> None:
    async with supervised(queue_requests=1) as (engine, _):
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: engine.load().state == "restarting")
        waiting = asyncio.create_task(engine.submit(ask("count 1")))
        await asyncio.sleep(0)
        assert engine.load().waiting == 1
        with pytest.raises(EngineRestarting):
            await engine.submit(ask("count 1"))
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        with pytest.raises(EngineRestarting):
            await engine.submit(ask("count 1", deadline_at=time.monotonic() + 0.01))


@in_loop
async def test_what_the_process_has_not_read_is_bounded() -> None:
    async with supervised(patience=Patience()) as (engine, _):
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGSTOP)
        tasks = [asyncio.create_task(engine.submit(ask("count 1"))) for _ in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="limit is 5"):
            await engine.submit(ask("count 1"))
        os.kill(engine.pid, signal.SIGCONT)
        assert [await text_of(each) for each in await asyncio.gather(*tasks)] == ["1 "] * 5


@in_loop
async def test_an_id_can_be_used_again_only_when_its_request_is_over() -> None:
    async with supervised() as (engine, _):
        request = ask("rest")
        generation = await engine.submit(request)
        with pytest.raises(RequestError, match="id"):
            await engine.submit(request)
        generation.cancel()
        assert [type(event) async for event in generation] == [Finished]
        assert (await engine.submit(request)).accepted.prompt_tokens == 3


@in_loop
async def test_too_large_a_request_is_refused() -> None:
    async with supervised() as (engine, _):
        with pytest.raises(RequestError, match="limit"):
            await engine.submit(ask("x" * (65 << 20)))
        assert await text_of(await engine.submit(ask("count 1"))) == "1 "


@in_loop
async def test_drain_refuses_what_comes_and_ends_what_runs() -> None:
    async with supervised() as (engine, _):
        generation = await engine.submit(ask("rest"))
        engine.drain(5.0)
        with pytest.raises(ShuttingDown):
            await engine.submit(ask("count 1"))
        assert [type(event) async for event in generation] == [Finished]
        assert engine.load().state == "draining"


@in_loop
async def test_close_fails_what_is_left_and_ends_the_process() -> None:
    async with supervised() as (engine, listener):
        generation = await engine.submit(ask("rest"))
        await engine.close()
        with pytest.raises(EngineRestarting):
            await text_of(generation)
        assert engine.pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(engine.pid, 0)
        assert listener.restarts == []


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("refused", EnvironmentIncomplete, "12 GB"),
        ("crash", ModelFileError, "SIGABRT"),
        ("SIGILL", EnvironmentIncomplete, "this CPU lacks"),
        ("silent", ModelFileError, "did not load its model within"),
    ],
)
def test_a_model_that_does_not_load_is_an_error_in_words(name: str, error: type[Exception], said: str) -> None:
    @in_loop
    async def scenario() -> None:
        patience = Patience(load_seconds=1.0)
        engine = Supervisor(settings(name), listener=Listener(), patience=patience, workers=Workers(COMMAND))
        with pytest.raises(error, match=said):
            await engine.start()
        await engine.close()

    scenario()


@in_loop
async def test_a_process_that_was_prepared_gets_the_settings() -> None:
    workers = Workers(COMMAND)
    workers.prepare()
    prepared = workers._waiting
    assert prepared is not None
    for is_prepared in (True, False):
        worker = await workers.start(settings("fake"))
        assert isinstance(await worker.message(), wire.Ready)
        assert (worker.pid == prepared.process.pid) == is_prepared
        await worker.end()
    workers.close()


@in_loop
async def test_a_prepared_process_that_died_is_replaced() -> None:
    workers = Workers(COMMAND)
    workers.prepare()
    prepared = workers._waiting
    assert prepared is not None
    prepared.process.kill()
    prepared.process.wait()
    worker = await workers.start(settings("fake"))
    assert isinstance(await worker.message(), wire.Ready)
    await worker.end()


def test_a_prepared_process_that_nobody_needs_is_ended() -> None:
    workers = Workers(COMMAND)
    workers.prepare()
    prepared = workers._waiting
    assert prepared is not None
    workers.close()
    assert prepared.process.returncode is not None
    workers.close()


@in_loop
async def test_a_start_that_is_not_wanted_any_more_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    spawn = worker_process._spawn

    def noted(*arguments: Any) -> "subprocess.Popen[bytes]":
        started.append(spawn(*arguments))
        return started[-1]

    monkeypatch.setattr(worker_process, "_spawn", noted)
    task = asyncio.create_task(Workers(COMMAND).start(settings("fake")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [process.returncode for process in started] == [-signal.SIGKILL]
