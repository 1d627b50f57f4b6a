"""The scheduler over the real llama.cpp with a tiny random model: whatever is shared or guessed, the text stays the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.serving.events import Finished, TokenLogprob
from appliance.serving.llama import Context
from appliance.serving.scheduler import Scheduler
from appliance.serving.snapshots import Identity, SnapshotStore
from tests import tiny_gguf
from tests.serving.counting_decoder import Listener
from tests.serving.llama_decoding import engine_settings, open_model
from tests.serving.scheduler_bench import Client, until

SYSTEM = tuple(b"You are the assistant of a library. Be brief, be kind, and never guess. ")
QUESTION = tuple(b"When do you open?")
TIE = 0.05


class Engine:
    def __init__(self, path: Path, snapshots: Path | None = None, **changes: Any) -> None:
        settings = engine_settings(path, **{"queue_requests": 20, "queue_tokens": 10_000, **changes})
        self.context = Context(open_model(path), settings)
        self.listener = Listener()
        store = None
        if snapshots is not None:
            identity = Identity(model_sha256="m", template_sha256="t", kv_type="f16", layout="1")
            store = SnapshotStore(snapshots, 10**7, identity)
        self.scheduler = Scheduler(self.context, settings=settings, listener=self.listener, snapshots=store)

    def client(self, prompt: tuple[int, ...], **fields: Any) -> Client:
        return Client(self.scheduler, prompt, **{"max_tokens": 40, "ignore_end": True, "top_logprobs": 2, **fields})

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.scheduler.close()


def said(client: Client) -> list[TokenLogprob]:
    return [logprob for piece in client.pieces for logprob in piece.logprobs]


def assert_same(one: Client, other: Client) -> None:
    """The same tokens up to the first place where two were as good as equally likely.

    The order in which a batch adds up differs with what else is in it, and flash attention rounds to 16 bits.
    """
    assert said(one)
    for mine, theirs in zip(said(one), said(other), strict=False):
        if mine.piece != theirs.piece:
            (_, first), (piece, second) = mine.top
            assert piece == theirs.piece
            assert first - second < TIE
            return
    assert one.text == other.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_gguf.write(folder / "tiny.gguf")
    tiny_gguf.write_adapter(folder / "a.gguf", seed=1)
    return folder


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(folder / "tiny.gguf", adapters={"a": str(folder / "a.gguf")}) as engine:
        yield engine


def test_hit_says_what_a_miss_says(engine: Engine) -> None:
    first = engine.client(SYSTEM + QUESTION)
    assert first.finished().cached_tokens == 0
    again = engine.client(SYSTEM + QUESTION)
    assert again.finished().cached_tokens == len(SYSTEM + QUESTION) - 1
    assert_same(first, again)


def test_together_they_say_what_each_says_alone(engine: Engine) -> None:
    prompts = [SYSTEM + QUESTION + bytes_of(number) for number in range(6)]
    alone = []
    for number, prompt in enumerate(prompts):
        client = engine.client(prompt, tenant=str(number))
        client.end()
        alone.append(client)
    clients = [engine.client(prompt, tenant=f"again {number}") for number, prompt in enumerate(prompts)]
    assert all(isinstance(client.end(), Finished) for client in clients)
    for one, other in zip(alone, clients, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("requests", [1, 3, 8])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_any_number_of_requests_over_any_number_of_slots(folder: Path, slots: int, requests: int) -> None:
    prompts = [SYSTEM[: 9 * number] + QUESTION + bytes_of(number) for number in range(requests)]
    with Engine(folder / "tiny.gguf", slots=slots) as engine:
        alone = [engine.client(prompt, tenant="alone") for prompt in prompts[:1]]
        for prompt in prompts[1:]:
            alone[-1].end()
            alone.append(engine.client(prompt, tenant="alone"))
        alone[-1].end()
        together = [engine.client(prompt) for prompt in prompts]
        assert all(isinstance(client.end(), Finished) for client in together)
        for one, other in zip(alone, together, strict=True):
            assert_same(one, other)
        assert engine.scheduler.load().kv_cells_running == 0


def test_answers_to_one_prompt_are_those_of_their_seeds(engine: Engine) -> None:
    together = engine.client(QUESTION, n=4, seed=5)
    assert [end.cached_tokens for end in together.ends() if isinstance(end, Finished)][1:] == [len(QUESTION) - 1] * 3
    assert set(together.texts) == {0, 1, 2, 3}


def test_adapters_keep_their_own_cells(engine: Engine) -> None:
    plain = engine.client(SYSTEM + QUESTION)
    plain.end()
    adapted = engine.client(SYSTEM + QUESTION, adapter="a")
    assert adapted.finished().cached_tokens == 0
    assert adapted.text != plain.text
    mixed = [engine.client(SYSTEM + QUESTION, adapter=name) for name in (None, "a", None)]
    assert all(isinstance(client.end(), Finished) for client in mixed)
    for one, other in zip((plain, adapted, plain), mixed, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("prompt", [SYSTEM + QUESTION, tuple(b"abcabcabcabc")])
def test_guesses_change_no_text(folder: Path, prompt: tuple[int, ...]) -> None:
    clients = []
    for is_speculating in (False, True):
        with Engine(folder / "tiny.gguf", is_speculating=is_speculating) as engine:
            client = engine.client(prompt, max_tokens=150)
            assert client.finished().generated_tokens == 150
            clients.append(client)
            drafted = sum(stats.drafted_tokens for stats in engine.listener.steps)
            assert (drafted > 0) == is_speculating
    assert_same(*clients)


def test_cancelled_prefill_leaves_a_usable_memory(engine: Engine) -> None:
    expected = engine.client(QUESTION)
    expected.end()
    for _ in range(10):
        gone = engine.client(SYSTEM * 3, tenant="gone")
        gone.cancel()
        assert gone.reason() == "cancelled"
    after = engine.client(QUESTION, tenant="new")
    assert isinstance(after.end(), Finished)
    assert_same(expected, after)
    until(lambda: engine.scheduler.load().kv_cells_running == 0)


def test_prefix_from_disk_says_the_same(folder: Path, tmp_path: Path) -> None:
    with Engine(folder / "tiny.gguf", tmp_path) as engine:
        engine.scheduler.warm(SYSTEM)
        until(lambda: len(list(tmp_path.glob("*.prefix"))) == 1)
        first = engine.client(SYSTEM + QUESTION)
        assert first.finished().cached_tokens == len(SYSTEM)
    with Engine(folder / "tiny.gguf", tmp_path) as engine:
        engine.scheduler.warm(SYSTEM)
        again = engine.client(SYSTEM + QUESTION)
        assert again.finished().cached_tokens == len(SYSTEM)
        assert_same(first, again)
        assert sum(stats.prompt_tokens for stats in engine.listener.steps) == len(QUESTION)
    with Engine(folder / "tiny.gguf") as engine:
        cold = engine.client(SYSTEM + QUESTION)
        assert cold.finished().cached_tokens == 0
        assert_same(first, cold)


def test_memory_is_full_of_parked_prefixes_and_serves_on(engine: Engine) -> None:
    for number in range(30):
        client = engine.client(tuple(bytes_of(number)) * 20 + QUESTION, max_tokens=30)
        assert isinstance(client.end(), Finished)
    load = engine.scheduler.load()
    assert 0 < load.kv_cells_used <= load.kv_cells


def bytes_of(number: int) -> tuple[int, ...]:
    return tuple(f" {number:04d}".encode())
