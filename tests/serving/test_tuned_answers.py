"""Whatever is tuned for speed, the answers stay: threads, chunk sizes, mmap and repacking, on a model that was trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.serving.decoder import Feed
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import TokenLogprob
from appliance.serving.llama import Context, Model
from appliance.serving.requests import SamplingSettings
from appliance.serving.scheduler import Scheduler
from convert.quantizer import Settings, quantize_file
from tests.running import Trained
from tests.serving.counting_decoder import Listener
from tests.serving.llama_decoding import engine_settings
from tests.serving.scheduler_bench import Client
from tests.tiny_recipe import CONVERSATIONS

TIE = 0.1  # in log probability: two tokens that are as good as equally likely
TOLERANCE = 0.05  # measured were 0.007 with repacked matrices
ANSWER_TOKENS = 24
LAYOUTS = [(is_mapped, is_repacked) for is_mapped in (True, False) for is_repacked in (True, False)]


@pytest.fixture(scope="module")
def model(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the type that llama.cpp repacks on most CPUs, and whose repacked form adds up in another order."""
    path = tmp_path_factory.mktemp("tuned") / "tiny-Q4_0.gguf"
    quantize_file(trained.full, path, Settings(type="Q4_0"))
    return path


def settings(model: Path, **changes: Any) -> EngineSettings:
    usual = {"is_repacked": True, "queue_requests": 20, "queue_tokens": 10_000, "is_speculating": False}
    return engine_settings(model, **{**usual, **changes})


def opened(settings: EngineSettings) -> Context:
    path = Path(settings.model_path)
    return Context(Model(path, is_mapped=settings.is_mapped, is_repacked=settings.is_repacked), settings)


def prompts(model: Path) -> Sequence[tuple[int, ...]]:
    """Questions behind a conversation that takes several of the smallest chunks."""
    loaded = Model(model, is_mapped=True, is_repacked=False)
    past = "".join(_said(*turns) for turns in CONVERSATIONS[:4])
    texts = [f"{past}<|im_start|>user\n{turns[0]}<|im_end|>\n<|im_start|>assistant\n" for turns in CONVERSATIONS[1:]]
    tokens = [tuple(loaded.tokenize(text, parse_special=True)) for text in texts]
    loaded.close()
    return tokens


def _said(*turns: str) -> str:
    return "".join(f"<|im_start|>{('user', 'assistant')[i % 2]}\n{text}<|im_end|>\n" for i, text in enumerate(turns))


def answers(settings: EngineSettings, prompts: Sequence[tuple[int, ...]]) -> list[list[TokenLogprob]]:
    """Greedy, all together, over the real scheduler."""
    scheduler = Scheduler(opened(settings), settings=settings, listener=Listener())
    fields: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "ignore_end": True, "top_logprobs": 2}
    clients = [Client(scheduler, prompt, **fields) for prompt in prompts]
    for client in clients:
        client.finished()
    scheduler.close()
    return [[logprob for piece in client.pieces for logprob in piece.logprobs] for client in clients]


def assert_same(expected: list[list[TokenLogprob]], found: list[list[TokenLogprob]]) -> None:
    """The same tokens, up to the first place where two were as good as equally likely."""
    for one, other in zip(expected, found, strict=True):
        assert len(one) == len(other) == ANSWER_TOKENS
        for mine, theirs in zip(one, other, strict=True):
            if mine.piece != theirs.piece:
                (_, first), (piece, second) = mine.top
                assert piece == theirs.piece
                assert first - second < TIE
                break


@pytest.fixture(scope="module")
def asked(model: Path) -> Sequence[tuple[int, ...]]:
    found = prompts(model)
    assert min(map(len, found)) > 2 * 64
    return found


@pytest.fixture(scope="module")
def expected(model: Path, asked: Sequence[tuple[int, ...]]) -> list[list[TokenLogprob]]:
    """With the defaults, one thread and nothing repacked."""
    return answers(settings(model, is_repacked=False, threads_decode=1, threads_prefill=1), asked)


@pytest.mark.parametrize("threads", [(1, 2), (2, 1), (2, 2), (3, 3)])
def test_threads(model: Path, asked: Any, expected: Any, threads: tuple[int, int]) -> None:
    assert_same(expected, answers(settings(model, threads_decode=threads[0], threads_prefill=threads[1]), asked))


@pytest.mark.parametrize("chunk_tokens", [64, 100, 512])
def test_chunk_sizes(model: Path, asked: Any, expected: Any, chunk_tokens: int) -> None:
    assert_same(expected, answers(settings(model, chunk_tokens=chunk_tokens), asked))


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_slots(model: Path, asked: Any, expected: Any, slots: int) -> None:
    assert_same(expected, answers(settings(model, slots=slots), asked))


@pytest.mark.parametrize(("is_mapped", "is_repacked"), LAYOUTS)
def test_layouts(model: Path, asked: Any, expected: Any, is_mapped: bool, is_repacked: bool) -> None:
    assert_same(expected, answers(settings(model, is_mapped=is_mapped, is_repacked=is_repacked), asked))


@pytest.mark.parametrize(("is_mapped", "is_repacked"), LAYOUTS)
def test_log_probabilities_of_layouts(model: Path, asked: Any, is_mapped: bool, is_repacked: bool) -> None:
    plain = _logprobs(settings(model, is_mapped=True, is_repacked=False), asked[0])
    found = _logprobs(settings(model, is_mapped=is_mapped, is_repacked=is_repacked), asked[0])
    likely = plain > -10
    assert np.abs(found - plain)[likely].max() < TOLERANCE


def test_what_changes_answers_is_seen(model: Path, asked: Any) -> None:
    """KV in q8_0, which tuning therefore only proposes."""
    plain, rounded = (_logprobs(settings(model, kv_type=kv_type), asked[0]) for kv_type in ("f16", "q8_0"))
    assert np.abs(plain - rounded)[plain > -10].max() > 1e-3


def _logprobs(settings: EngineSettings, tokens: tuple[int, ...]) -> np.ndarray:
    """Of every token of the vocabulary, after a prompt that is read at once."""
    context = opened(settings)
    model = Model(Path(settings.model_path), is_mapped=True, is_repacked=False)
    context.start(0, SamplingSettings(), None, model.token_count)
    decoded = context.decode([Feed(0, tokens, 0, is_sampled=True)], None)
    assert decoded is not None
    row = np.empty(model.token_count)
    for token, logprob in decoded[0][0].top:
        row[token] = logprob
    context.close()
    model.close()
    return row
