"""Several models, promotion and memory, with processes whose engine is a stand-in and a plan that counts in whole models."""

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from appliance import gpu
from appliance.errors import (
    ArtifactError,
    EngineFailed,
    EngineRestarting,
    EnvironmentIncomplete,
    ModelFileError,
    ModelNotFound,
    NoMemoryForModel,
    RecipeError,
    ShuttingDown,
)
from appliance.gpu_access import ARCHITECTURES
from appliance.recipe import Serve
from appliance.serving import served_model, wire
from appliance.serving.events import DocumentCounts
from appliance.serving.memory_plan import Plan
from appliance.serving.memory_prediction import MemoryPrediction
from appliance.serving.model_pool import ModelPool
from appliance.serving.requests import Document
from appliance.serving.served_model import ServedModel
from appliance.serving.supervisor import Supervisor
from appliance.serving.worker_process import Workers
from tests import tiny_gguf
from tests.serving.test_supervisor import COMMAND, Listener, ask, in_loop, settings, text_of, until
from tests.test_gpu import mixed

ONE = MemoryPrediction(
    weights_file_bytes=0,
    weights_copied_bytes=1,
    weights_idle_bytes=0,
    adapter_bytes=0,
    kv_bytes=0,
    cache_bytes=0,
    compute_bytes=0,
    output_bytes=0,
    process_bytes=0,
)


@dataclasses.dataclass
class Room:
    """`Plans` for a machine with room for so many models; with `smaller`, the last one fits with one slot only."""

    models: int = 9
    smaller: bool = False

    def plan(
        self,
        model: ServedModel,
        serve: Serve,
        others: Sequence[MemoryPrediction],
        freed: MemoryPrediction | None = None,  # noqa: ARG002
    ) -> Plan:
        if len(others) >= self.models:
            raise EnvironmentIncomplete(f"{len(others)} models are loaded, and there is room for {self.models}.")
        slots = 1 if self.smaller and len(others) == self.models - 1 else serve.slots
        chosen = settings(
            model.name,
            model_path=str(model.path),
            slots=slots,
            adapters=dict.fromkeys(model.adapters, ""),
            queue_requests=50,
        )
        return Plan(settings=chosen, memory=ONE, free_bytes=1)


class Promoted:
    """A `Promotion` that a test changes."""

    def __init__(self) -> None:
        self.number = 0
        self.found: tuple[ServedModel, Serve] | Exception | None = None

    def promote(self, found: tuple[ServedModel, Serve] | Exception) -> None:
        self.number += 1
        self.found = found

    def mark(self) -> object:
        return self.number

    def find(self) -> tuple[ServedModel, Serve]:
        assert self.found is not None
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


class Unloads(Listener):
    def __init__(self) -> None:
        super().__init__()
        self.unloads: list[str] = []

    def record_unload(self, name: str) -> None:
        self.unloads.append(name)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_gguf.write(folder / "main.gguf")
    tiny_gguf.write_adapter(folder / "formal.gguf")
    for name in ("second", "third", "crash", "refused", "newer"):
        (folder / f"{name}.gguf").write_bytes((folder / "main.gguf").read_bytes())
    return folder


def model(files: Path, name: str, **fields: Any) -> ServedModel:
    found = served_model.find(str(files / f"{name}.gguf"), files)
    return dataclasses.replace(found, is_foreign=False, **fields)


@contextlib.asynccontextmanager
async def pool_of(
    *models: ServedModel, room: Room | None = None, promotion: Promoted | None = None, **serve: Any
) -> AsyncIterator[tuple[ModelPool, Unloads]]:
    listener = Unloads()
    served = [(each, Serve(**serve)) for each in models]
    pool = ModelPool(
        served,
        plans=room or Room(),
        listener=listener,
        promotion=promotion,
        workers=Workers(COMMAND),
        tick_seconds=0.02,
    )
    await pool.start()
    try:
        yield pool, listener
    finally:
        await pool.close()


async def answer(pool: ModelPool, name: str | None) -> str:
    """The name of the model that answered."""
    async with pool.lease(name) as lease:
        assert await text_of(await lease.engine.submit(ask("count 1"))) == "1 "
        return lease.name


def loaded(pool: ModelPool) -> set[str]:
    return {card.id for card in pool.cards() if card.is_loaded and card.parent is None}


@in_loop
async def test_others_are_loaded_on_demand_and_unloaded_when_idle(files: Path) -> None:
    models = [model(files, name) for name in ("main", "second", "third")]
    async with pool_of(*models, idle_seconds=0.2) as (pool, listener):
        assert loaded(pool) == {"main"}
        assert [await answer(pool, name) for name in ("second", None, "third", "main")] == [
            "second",
            "main",
            "third",
            "main",
        ]
        assert loaded(pool) == {"main", "second", "third"}
        await until(lambda: loaded(pool) == {"main"})
        assert sorted(listener.unloads) == ["second", "third"]
        assert await answer(pool, "second") == "second"


@in_loop
async def test_every_engine_is_told_of_documents_and_the_default_models_reads_them(files: Path) -> None:
    promotion = Promoted()
    async with pool_of(model(files, "main"), model(files, "second"), promotion=promotion) as (pool, _):
        pool.keep(wire.Documents(documents=(Document(id="a.md", text="a"), Document(id="b.md", text="b")), refused=1))
        both, none = DocumentCounts(known=2, refused=1), DocumentCounts(refused=1)

        async def told(name: str | None) -> DocumentCounts | None:
            await answer(pool, name)
            async with pool.lease(name) as lease:
                return lease.engine.load().documents

        assert await told("main") == both
        assert await told("second") == none
        assert pool.load().documents == both
        async with pool.lease("main") as lease:
            assert isinstance(lease.engine, Supervisor)
            os.kill(lease.engine.pid or 0, signal.SIGKILL)
            await until(lambda: lease.engine.load().state != "ready")
        assert await told("main") == both, "so is the process that comes after it"
        promotion.promote((model(files, "newer"), Serve()))
        await until(lambda: "newer" in loaded(pool))
        assert await told(None) == both


@in_loop
async def test_ten_requests_for_a_model_load_it_once(files: Path) -> None:
    async with pool_of(model(files, "main"), model(files, "second")) as (pool, listener):
        asked = [answer(pool, "second") for _ in range(10)]
        assert await asyncio.gather(*asked) == ["second"] * 10
        assert listener.loads == ["main", "second"]


@in_loop
async def test_who_goes_away_while_a_model_loads_does_not_stop_it(files: Path) -> None:
    async with pool_of(model(files, "main"), model(files, "second")) as (pool, _):
        impatient = asyncio.create_task(answer(pool, "second"))
        await asyncio.sleep(0)
        patient = asyncio.create_task(answer(pool, "second"))
        await asyncio.sleep(0.05)
        impatient.cancel()
        assert await patient == "second"


@in_loop
async def test_the_least_recently_used_makes_room_but_never_one_in_use(files: Path) -> None:
    models = [model(files, name) for name in ("main", "second", "third")]
    async with pool_of(*models, room=Room(2)) as (pool, listener):
        async with pool.lease("second"):
            with pytest.raises(NoMemoryForModel) as refused:
                await answer(pool, "third")
            assert refused.value.retry_after_seconds > 0
        assert await answer(pool, "third") == "third"
        assert loaded(pool) == {"main", "third"}
        assert listener.unloads == ["second"]


@in_loop
async def test_a_model_that_does_not_load_is_an_error_for_those_who_ask_for_it(files: Path) -> None:
    models = [model(files, name) for name in ("main", "crash", "refused")]
    async with pool_of(*models) as (pool, _):
        with pytest.raises(EngineFailed, match="log"):
            await answer(pool, "crash")
        with pytest.raises(NoMemoryForModel, match="log"):
            await answer(pool, "refused")
        assert await answer(pool, None) == "main"


@in_loop
async def test_the_default_model_must_load(files: Path) -> None:
    with pytest.raises(ModelFileError, match="SIGABRT"):
        async with pool_of(model(files, "crash")):
            pass


@in_loop
async def test_names(files: Path) -> None:
    main = served_model.with_adapters(model(files, "main"), [f"formal={files / 'formal.gguf'}"])
    async with pool_of(main, model(files, "second")) as (pool, _):
        async with pool.lease("main:formal") as lease:
            assert (lease.name, lease.adapter) == ("main:formal", "formal")
        for wrong in ("", "third", "main:", "main:casual", ":formal", "second:formal"):
            with pytest.raises(ModelNotFound, match="'main', 'main:formal', 'second'"):
                await answer(pool, wrong)
        assert [(card.id, card.parent, card.is_loaded) for card in pool.cards()] == [
            ("main", None, True),
            ("main:formal", "main", True),
            ("second", None, False),
        ]


@in_loop
async def test_the_kind_decides_where_no_name_is_given(files: Path) -> None:
    second = model(files, "second")
    header = dataclasses.replace(second.header, pooling_type="mean")
    async with pool_of(model(files, "main"), dataclasses.replace(second, header=header)) as (pool, _):
        async with pool.lease(None, "embedding") as lease:
            assert lease.name == "second"
        async with pool.lease(None, "rerank") as lease:
            assert lease.name == "main"  # whose engine says that it cannot


async def keep_asking(pool: ModelPool, until_model: str) -> list[str]:
    """One request after the other until the new model has answered; none may fail."""
    names: list[str] = []
    while not names or names[-1] != until_model:
        names.append(await answer(pool, "main"))
    return names


@pytest.mark.parametrize("room", [Room(9), Room(1), Room(2, smaller=True)])
def test_a_promoted_model_takes_over_and_no_request_fails(files: Path, room: Room) -> None:
    """Beside the old one; in turn, where there is no room for both or only for a smaller plan."""
    room = dataclasses.replace(room)

    @in_loop
    async def scenario() -> None:
        promotion = Promoted()
        async with pool_of(model(files, "main"), room=room, promotion=promotion) as (pool, listener):
            clients = [asyncio.create_task(keep_asking(pool, "newer")) for _ in range(4)]
            await asyncio.sleep(0.1)
            promotion.promote((model(files, "newer"), Serve()))
            for names in await asyncio.gather(*clients):
                assert set(names) == {"main", "newer"}
            await until(lambda: listener.unloads == ["main"])
            assert loaded(pool) == {"newer"}
            assert pool.load().slots == 2
            assert [card.id for card in pool.cards()] == ["newer"]

    scenario()


@in_loop
async def test_a_request_of_the_old_model_is_finished_by_it(files: Path) -> None:
    promotion = Promoted()
    async with pool_of(model(files, "main"), promotion=promotion) as (pool, listener):
        async with pool.lease(None) as lease:
            resting = await lease.engine.submit(ask("rest"))
            promotion.promote((model(files, "newer"), Serve()))
            await until(lambda: loaded(pool) == {"newer"})
            assert await answer(pool, None) == "newer"
            assert pool.load().running == 1
            assert listener.unloads == []
            resting.cancel()
            assert [type(event).__name__ async for event in resting] == ["Finished"]
        await until(lambda: listener.unloads == ["main"])


@pytest.mark.parametrize(("broken", "room"), [("crash", 1), ("refused", 9), ("changed file", 9)])
def test_a_promoted_model_that_does_not_load_changes_nothing(files: Path, room: int, broken: str) -> None:
    @in_loop
    async def scenario() -> None:
        promotion = Promoted()
        async with pool_of(model(files, "main"), room=Room(room), promotion=promotion) as (pool, _):
            client = asyncio.create_task(keep_asking(pool, "newer"))
            changed = ArtifactError("The file has changed.")
            promotion.promote(changed if broken == "changed file" else (model(files, broken), Serve()))
            await asyncio.sleep(0.4)
            assert not client.done()
            promotion.promote((model(files, "newer"), Serve()))
            assert set(await client) == {"main", "newer"}

    scenario()


@in_loop
async def test_an_old_model_that_had_to_go_first_is_loaded_again(files: Path) -> None:
    promotion = Promoted()
    async with pool_of(model(files, "main"), room=Room(1), promotion=promotion) as (pool, listener):
        promotion.promote((model(files, "crash"), Serve()))
        await until(lambda: listener.loads == ["main", "main"])
        await until(lambda: pool.load().state == "ready")


@in_loop
async def test_the_same_model_promoted_again_is_not_loaded_again(files: Path) -> None:
    promotion = Promoted()
    async with pool_of(model(files, "main"), promotion=promotion) as (pool, listener):
        promotion.promote((model(files, "main"), Serve()))
        await asyncio.sleep(0.1)
        assert listener.loads == ["main"]
        promotion.promote((model(files, "main"), Serve(slots=3)))  # its settings changed
        await until(lambda: pool.load().slots == 3)
        assert listener.unloads == []  # there is a model of that name


@in_loop
async def test_who_waits_for_a_model_is_bounded(files: Path) -> None:
    promotion = Promoted()
    serve = {"queue_requests": 1, "slots": 1}
    async with pool_of(model(files, "main"), room=Room(1), promotion=promotion, **serve) as (pool, _):
        async with pool.lease(None):
            promotion.promote((model(files, "newer"), Serve(**serve)))
            await until(lambda: pool.load().state == "restarting")
            waiting = [asyncio.create_task(answer(pool, None)) for _ in range(2)]
            await asyncio.sleep(0)
            assert pool.load().waiting == 2
            with pytest.raises(EngineRestarting, match="the limit is 2"):
                await answer(pool, None)
        assert await asyncio.gather(*waiting) == ["newer", "newer"]


@in_loop
async def test_drain_and_close(files: Path) -> None:
    async with pool_of(model(files, "main"), model(files, "second")) as (pool, _):
        async with pool.lease(None) as lease:
            resting = await lease.engine.submit(ask("rest"))
            pool.drain(5.0)
            with pytest.raises(ShuttingDown):
                await answer(pool, None)
            with pytest.raises(ShuttingDown):
                await answer(pool, "second")
            assert pool.load().state == "draining"
            assert [type(event).__name__ async for event in resting] == ["Finished"]
        await until(lambda: pool.load().running + pool.load().waiting == 0)
        await pool.close()
        assert pool.load().state == "stopped"


@in_loop
async def test_cards_that_are_computed_on_are_held_and_no_others(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor's own graphics are counted from 0 as well, and a server would meet itself there."""

    class OnCards(Room):
        def plan(self, *args: Any, **named: Any) -> Plan:
            plan = super().plan(*args, **named)
            return dataclasses.replace(plan, settings=msgspec.structs.replace(plan.settings, gpu_layers=1))

    monkeypatch.setattr(gpu, "gpus", mixed)
    monkeypatch.setenv("APPLIANCE_LEASES", str(tmp_path / "leases"))
    for compiled, hidden, names in (("86-real", "0", ["nvidia-0"]), ("gfx1101", "", ["amd-0"])):
        monkeypatch.setenv(ARCHITECTURES, compiled)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        async with pool_of(model(files, "main"), room=OnCards()):
            leases = {path.stem: path.read_text() for path in (tmp_path / "leases").iterdir()}
            assert [name for name, holder in leases.items() if "serving" in holder] == names


def test_adapters_are_checked_before_anything_is_loaded(files: Path, tmp_path: Path) -> None:
    main = model(files, "main")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((files / "main.gguf").read_bytes()[:100])
    for entries, error, said in (
        (["formal"], RecipeError, "name=file.gguf"),
        (["=x.gguf"], RecipeError, "name=file.gguf"),
        (["a:b=x.gguf"], RecipeError, "name=file.gguf"),
        ([f"a={tmp_path / 'none.gguf'}"], ModelFileError, "does not exist"),
        ([f"a={cut}"], ModelFileError, "truncated"),
        ([f"a={files / 'main.gguf'}"], ModelFileError, "no LoRA adapter"),
    ):
        with pytest.raises(error, match=said):
            served_model.with_adapters(main, entries)
    assert served_model.with_adapters(main, []) == main
