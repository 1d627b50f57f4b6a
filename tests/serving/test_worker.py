"""The engine's own process with a real tiny model: what it accepts, refuses and frees, and how it is locked up."""

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import (
    EngineRestarting,
    EnvironmentIncomplete,
    ModelFileError,
    PromptTooLong,
    RecipeError,
    RequestError,
)
from appliance.serving.engine import Generation
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import Finished, TextPiece
from appliance.serving.requests import (
    ChatPrompt,
    GenerationRequest,
    Grammar,
    PoolingRequest,
    Prompt,
    SamplingSettings,
    TextPrompt,
    TokenPrompt,
)
from appliance.serving.supervisor import Patience, Supervisor
from tests import tiny_gguf
from tests.serving.test_supervisor import NUMBERS, Listener, in_loop, settings, until

HELLO = ChatPrompt(messages=({"role": "user", "content": "hello"},))
ENDLESS = TextPrompt(text="the use ")
NEVER_ENDING_TEMPLATE = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{{ messages[0]['content'] if messages[0]['content'] == 'quick' else '' }}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worker")
    tiny_gguf.write(folder / "chat.gguf")
    tiny_gguf.write(folder / "base.gguf", template=None)
    tiny_gguf.write(folder / "broken.gguf", template="{% for %}")
    tiny_gguf.write(folder / "stuck.gguf", template=NEVER_ENDING_TEMPLATE)
    tiny_gguf.write_adapter(folder / "formal.gguf")
    tiny_gguf.write_embedding(folder / "vectors.gguf")
    tiny_gguf.write_reranker(folder / "reranker.gguf")
    return folder


def of(path: Path, **fields: Any) -> EngineSettings:
    plain = {"model_path": str(path), "context_tokens": 1000, "queue_requests": 8, "is_speculating": False}
    return settings(path.stem, **{**plain, "queue_tokens": 100_000, **fields})


@contextlib.asynccontextmanager
async def engine_of(chosen: EngineSettings, **patience: float) -> AsyncIterator[tuple[Supervisor, Listener]]:
    listener = Listener()
    engine = Supervisor(chosen, listener=listener, patience=Patience(ping_seconds=0.05, **patience))
    await engine.start()
    try:
        yield engine, listener
    finally:
        await engine.close()


def ask(prompt: Prompt = HELLO, **fields: Any) -> GenerationRequest:
    plain = {"max_tokens": 8, "arrived_at": time.monotonic()}
    return GenerationRequest(id=f"real-{next(NUMBERS)}", prompt=prompt, **{**plain, **fields})


async def answer(engine: Supervisor, request: GenerationRequest) -> str:
    return "".join([event.text async for event in await engine.submit(request) if isinstance(event, TextPiece)])


@in_loop
async def test_places_and_cells_are_free_again_whenever_a_request_is_cancelled(folder: Path) -> None:
    """Cancelled in the queue, while its prompt is read and while it answers."""
    async with engine_of(of(folder / "chat.gguf", slots=1)) as (engine, listener):
        decoding = await engine.submit(ask(ENDLESS, max_tokens=900, ignore_end=True))
        queued = await engine.submit(ask(TokenPrompt(tokens=tuple(range(200)) * 4)))
        await anext(aiter(decoding))
        await until(lambda: engine.load().kv_cells_running > 0)
        for generation in (queued, decoding):
            generation.cancel()
            assert await reason_of(generation) == "cancelled"
        reading = await engine.submit(ask(TokenPrompt(tokens=tuple(range(250)) * 3 + (7,)), max_tokens=200, ignore_end=True))
        reading.cancel()
        assert await reason_of(reading) == "cancelled"
        await until(lambda: not (engine.load().running or engine.load().waiting or engine.load().kv_cells_running))
        phases = [stats.cancelled_in for stats in listener.requests]
        assert phases[:2] == ["queue", "decode"]
        assert phases[2] in ("queue", "prefill")


@in_loop
async def test_a_request_that_is_cancelled_before_it_is_read_never_runs(folder: Path) -> None:
    async with engine_of(of(folder / "chat.gguf")) as (engine, listener):
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGSTOP)
        for _ in range(4):
            task = asyncio.create_task(engine.submit(ask(ENDLESS, max_tokens=900, ignore_end=True)))
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.sleep(0)
        os.kill(engine.pid, signal.SIGCONT)
        await until(lambda: len(listener.requests) == 4)
        assert {stats.outcome for stats in listener.requests} == {"cancelled"}
        await until(lambda: not (engine.load().running or engine.load().waiting or engine.load().kv_cells_running))
        assert sum(step.generated_tokens for step in listener.steps) < 900


async def reason_of(generation: Generation) -> str:
    return [event.reason async for event in generation if isinstance(event, Finished)][-1]


@in_loop
async def test_what_cannot_be_asked_is_refused_and_harms_nothing(folder: Path) -> None:
    async with engine_of(of(folder / "chat.gguf")) as (engine, listener):
        refusals = [
            (ask(adapter="formal"), RequestError, "adapter"),
            (ask(TokenPrompt(tokens=(99_999,))), RequestError, "99999"),
            (ask(TokenPrompt(tokens=())), RequestError, "empty"),
            (ask(TextPrompt(text="x" * 5000)), PromptTooLong, "1000"),
            (ask(ChatPrompt(messages=({"content": "no role"},))), RequestError, "."),
            (ask(sampling=SamplingSettings(logit_bias={99_999: 1.0})), RequestError, "99999"),
            (ask(grammar=Grammar(kind="gbnf", source="root ::= (")), RequestError, "."),
        ]
        for request, error, said in refusals:
            with pytest.raises(error, match=said):
                await engine.submit(request)
        with pytest.raises(RequestError, match="not for embedding"):
            await engine.pool(PoolingRequest(id="p", inputs=("x",), arrived_at=time.monotonic()))
        assert await answer(engine, ask())
        assert listener.restarts == []


@in_loop
async def test_an_adapter_is_loaded_and_named_by_its_sha256(folder: Path) -> None:
    adapters = {"formal": str(folder / "formal.gguf")}
    async with engine_of(of(folder / "chat.gguf", adapters=adapters)) as (engine, _):
        assert len(engine.model.adapters["formal"]) == 64
        plain, formal = ask(max_tokens=20), ask(max_tokens=20, adapter="formal")
        assert await answer(engine, plain) != await answer(engine, formal)


@in_loop
async def test_a_base_model_continues_text_and_cannot_chat(folder: Path) -> None:
    async with engine_of(of(folder / "base.gguf")) as (engine, _):
        assert any("chat template" in note for note in engine.model.notes)
        assert await answer(engine, ask(ENDLESS, ignore_end=True))
        with pytest.raises(RequestError, match="base model"):
            await engine.submit(ask())


@in_loop
async def test_a_template_that_never_ends_costs_a_restart_and_no_more(folder: Path) -> None:
    async with engine_of(of(folder / "stuck.gguf"), encode_seconds=0.3) as (engine, listener):
        with pytest.raises(EngineRestarting, match="template"):
            await engine.submit(ask())
        assert listener.restarts == ["hang"]
        assert await answer(engine, ask(ENDLESS, ignore_end=True))


@in_loop
async def test_embeddings_and_scores(folder: Path) -> None:
    now = time.monotonic()
    async with engine_of(of(folder / "vectors.gguf", kind="embedding", context_tokens=128)) as (engine, _):
        pooled = await engine.pool(PoolingRequest(id="a", inputs=("the use", "using", (6, 7, 8)), arrived_at=now))
        assert [len(vector) for vector in pooled.vectors] == [4 * engine.model.embedding_width] * 3
        with pytest.raises(PromptTooLong):
            await engine.pool(PoolingRequest(id="b", inputs=("x " * 999,), arrived_at=now))
        with pytest.raises(RequestError, match="writes no text"):
            await engine.submit(ask())
    async with engine_of(of(folder / "reranker.gguf", kind="rerank", context_tokens=128)) as (engine, _):
        pooled = await engine.pool(PoolingRequest(id="a", inputs=("the use", "a", "b"), query="use", arrived_at=now))
        assert len(pooled.scores) == 3


@in_loop
async def test_the_process_is_locked_up(folder: Path, tmp_path: Path) -> None:
    """No new privileges, a system call filter, no core files, and its snapshots are nobody else's."""
    chosen = of(folder / "chat.gguf", snapshot_folder=str(tmp_path / "snapshots"), snapshot_bytes=1 << 20)
    async with engine_of(chosen) as (engine, _):
        status = dict(line.split(":\t") for line in Path(f"/proc/{engine.pid}/status").read_text().splitlines())
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        limits = Path(f"/proc/{engine.pid}/limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits)
        assert engine.pid is not None
        assert os.getsid(engine.pid) == engine.pid
        assert (tmp_path / "snapshots").stat().st_mode & 0o777 == 0o700
        assert await answer(engine, ask())


@in_loop
async def test_system_prompts_are_read_at_start(folder: Path) -> None:
    system = "Be brief. " * 9
    async with engine_of(of(folder / "chat.gguf", system_prompts=(system,))) as (engine, _):
        await until(lambda: engine.load().kv_cells_used > 90)
        messages = ({"role": "system", "content": system}, {"role": "user", "content": "hello"})
        events = [event async for event in await engine.submit(ask(ChatPrompt(messages=messages)))]
        assert isinstance(events[-1], Finished)
        assert events[-1].cached_tokens > 90


@pytest.mark.parametrize(
    ("name", "fields", "error", "said"),
    [
        ("missing", {}, EnvironmentIncomplete, "No such file"),
        ("broken", {}, ModelFileError, "chat template"),
        ("formal", {}, ModelFileError, "LoRA adapter"),
        ("chat", {"system_prompts": ("x" * 5000,)}, RecipeError, r"system_prompts\[0\]"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_words(
    folder: Path, name: str, fields: dict[str, Any], error: type[Exception], said: str
) -> None:
    @in_loop
    async def scenario() -> None:
        engine = Supervisor(of(folder / f"{name}.gguf", **fields), listener=Listener())
        with pytest.raises(error, match=said):
            await engine.start()
        await engine.close()

    scenario()


@in_loop
async def test_many_requests_at_once_all_end(folder: Path) -> None:
    async with engine_of(of(folder / "chat.gguf", slots=4, queue_requests=40)) as (engine, _):
        alone = await answer(engine, ask(max_tokens=16))
        assert await asyncio.gather(*(answer(engine, ask(max_tokens=16)) for _ in range(30))) == [alone] * 30
